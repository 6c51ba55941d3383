// A connection manager on the simulated fabric, in two manners, by the fabric's flavour:
//
//   ib_ca  REQ, REP, RTU: each a datagram with a delay that may be lost and is repeated; the passive side's `established` comes
//   with the
//          RTU, so the first Send often overtakes it. 56, 196 and 148 private bytes, delivered zero-padded to the full field.
//   rnic   MPA request and reply on a TCP stream: not lost, but the stream may break. 197, 251 and 251 private bytes. The passive
//   side is
//          established when its reply has left; a Send of it before it has received one kills the connection.
//
// Two sides meet when an offer's addresses are the dialler's, swapped. Everything runs on the fabric's events: progress() has
// something to do after an event said so, and with auto_progress (the default) that event calls it.
#pragma once

#include <array>
#include <memory>

#include "rdma_core/cm/connection_manager.hpp"
#include "tests/support/sim_fabric.hpp"

namespace rdma::sim {

struct SimCmOptions {
  unsigned lose_percent = 0;   ///< ib_ca: of each datagram
  unsigned break_percent = 0;  ///< rnic: of each handshake's stream, at the reply
  Nanos retry_after = 50'000;  ///< ib_ca: until a datagram is repeated
  unsigned max_retries = 15;
  Nanos rtu_extra_delay = 20'000;  ///< ib_ca: at the most; makes Sends overtake it
  bool auto_progress = true;
};

/// Both managers. The fabric outlives them; Qps given to them live until their connection has ended.
class SimCmPair {
 public:
  explicit SimCmPair(SimFabric& fabric, const SimCmOptions& options = {});
  ~SimCmPair();
  SimCmPair(const SimCmPair&) = delete;
  SimCmPair& operator=(const SimCmPair&) = delete;

  cm::ConnectionManager& at(Side side) noexcept;
  /// Events and make_qp name this Device instead of the fabric's own: one that wraps it.
  void report_device(Side side, Device& device) noexcept;
  /// The two ends of a TCP connection that does not exist: addresses and cookies match, no descriptor.
  static std::array<cm::Anchor, 2> anchors(std::uint16_t number);

 private:
  struct State;
  class SimCm;
  std::unique_ptr<State> state_;
};

}  // namespace rdma::sim
