// What became of each connection, and why one has no lane: counters, and the report that SDP_STATS asks for.
//
// Threads: the counters of one ConnStats are bumped by the threads that use its stream, without lock prefix: two threads at one
// counter at once can lose a count, never more. Everything else takes a lock.
#pragma once

#include <sys/socket.h>

#include <atomic>
#include <cstdint>

#include "sdp/options.hpp"

namespace sdp {

/// Why a connection has no lane. If you add one, to_string (stats.cpp) must learn it too.
enum class LaneReason : std::uint8_t {
  none,             ///< it has one
  below_threshold,  ///< it has not carried enough yet
  policy_tcp,
  no_peer,  ///< the other end does not run the library, or is on another host
  wrong_owner,
  version,
  refused,
  no_resources,
  foreign_use,  ///< the kernel moved bytes that we did not see
  second_process,
  mode,  ///< a socket mode or a call that no lane can have
  exec,
  peer_gone,
  protocol_error,
  not_tcp,
};
inline constexpr int kLaneReasons = 15;
const char* to_string(LaneReason) noexcept;

enum class Transport : std::uint8_t { tcp, local, ib, rnic };

class Counter {
 public:
  void add(std::uint64_t n) noexcept { v_.store(v_.load(std::memory_order_relaxed) + n, std::memory_order_relaxed); }
  std::uint64_t get() const noexcept { return v_.load(std::memory_order_relaxed); }

 private:
  std::atomic<std::uint64_t> v_{0};
};

struct Traffic {
  Counter bytes_sent, bytes_received, messages_sent, messages_received;
};

struct alignas(64) ConnStats {
  Traffic lane;
  Traffic tcp;
  Counter switches_up, switches_down;
  std::atomic<LaneReason> reason{LaneReason::below_threshold};
  std::atomic<Transport> transport{Transport::tcp};  ///< of its lane, also after the lane went
  int fd = -1;
  sockaddr_storage local{}, remote{};
  ConnStats* next = nullptr;
  bool live = false;

  void set_reason(LaneReason r) noexcept { reason.store(r, std::memory_order_relaxed); }
  void set_transport(Transport t) noexcept {
    transport.store(t, std::memory_order_relaxed);
    set_reason(LaneReason::none);
  }
  void set_addresses(const sockaddr_storage& l, const sockaddr_storage& r) noexcept {
    local = l;
    remote = r;
  }
};

ConnStats* acquire_stats(int fd) noexcept;      ///< nullptr: no memory
void release_stats(ConnStats* stats) noexcept;  ///< adds it to the totals
void write_stats_report(const Options& options) noexcept;
void forget_stats_in_child() noexcept;  ///< after fork: the parent's connections are not the child's

}  // namespace sdp
