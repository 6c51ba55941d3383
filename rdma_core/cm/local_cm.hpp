// The connection manager of the software device: two processes of one host that share a TCP connection meet over Unix sockets.
//
// The passive side listens for a while on an abstract name made of its socket's cookie (abstract names are per network namespace).
// The active side asks sock_diag who holds the other end of its socket, connects to the name that follows from the answer's cookie,
// and both compare SO_PEERCRED with the user that sock_diag gave. The frames are in local_wire.hpp.
//
// What is proved: the process at the other end of the Unix connection runs under the uid that owns the other end of the TCP
// connection, and it names that socket. Not proved: that it is the very process. A process of the same user is trusted as that
// user. A squatted name costs a lane, never a byte.
//
// Two processes keep one link (see shm_links.hpp) and reuse it; the connection on which it was made stays open, and its end tells
// that the peer died or ran another program. A link without connections for 30 s is closed.
//
// Threads: one makes every call. Only fork: call abandon_in_child() in the child.
#pragma once

#include <memory>

#include "rdma_core/cm/connection_manager.hpp"

namespace rdma::shm {
class ShmDevice;
}

namespace rdma::cm {

class LocalCm final : public ConnectionManager {
 public:
  /// `device` outlives the CM. `reported` is what events and make_qp get instead of it: a Device that wraps `device`.
  static Result<std::unique_ptr<LocalCm>> create(shm::ShmDevice& device, Device* reported = nullptr);
  ~LocalCm() override;

  const char* name() const noexcept override { return "local"; }
  const Caps& caps() const noexcept override;
  void on_event(std::function<void(const Event&)> handler) override;
  Result<Unit> offer(const Anchor& anchor, unsigned ttl_ms) override;
  void withdraw(std::uint64_t anchor_cookie) noexcept override;
  Result<Unit> dial(const Anchor& anchor, unsigned timeout_ms, MakeQp make_qp) override;
  Result<Unit> accept(ConnId conn, Qp& qp, std::span<const std::byte> private_data) override;
  void reject(ConnId conn, Reason reason, std::span<const std::byte> private_data) noexcept override;
  Result<Unit> establish(ConnId conn) override;
  void disconnect(ConnId conn) noexcept override;
  int fd() const noexcept override;
  int next_timeout_ms() const noexcept override;
  void progress() override;

  void close_idle_links_after(unsigned ms) noexcept;  ///< 30 s unless told

  /// Of every descriptor, so that the parent's death shows at its peers; and abandons the device's links: the child makes a new
  /// device too.
  void abandon_in_child() noexcept override;

 private:
  struct State;
  explicit LocalCm(std::unique_ptr<State>);
  std::unique_ptr<State> state_;
};

}  // namespace rdma::cm
