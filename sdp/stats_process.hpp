// What the report is made of: the process's totals and its connections, as plain values. Internal to the statistics.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>

#include "sdp/stats.hpp"

namespace sdp {

struct TrafficView {
  std::uint64_t bytes_sent = 0, messages_sent = 0, bytes_received = 0, messages_received = 0;
};

/// In the order of ZeroCopyTraffic.
struct ZeroCopyView {
  std::uint64_t adverts = 0, bytes_sent = 0, bytes_received = 0, cancelled = 0, refused = 0, unregistered = 0;
  std::uint64_t bytes_written = 0, bytes_placed = 0, sinks = 0, sinks_cancelled = 0, sinks_unused = 0;
};
inline constexpr int kZeroCopyCounts = 11;

/// A connection's state at one moment.
struct ConnView {
  std::int32_t fd = -1;
  std::uint64_t cookie = 0;
  EndpointText local, remote;
  TrafficView lane, tcp;
  ZeroCopyView zero_copy;
  std::uint64_t switches_up = 0, switches_down = 0;
  std::uint64_t lanes_failed = 0, lanes_returned = 0, looks_again = 0;
  bool will_look = false;
  std::uint32_t credits_send = 0, credits_recv = 0;
  LaneReason reason = LaneReason::none;
  std::uint8_t transport = 0;  ///< 1 + Transport, 0: none
  std::uint8_t had_lanes = 0;
};
ConnView view_of(const ConnStats& stats) noexcept;

/// Sums over connections that are gone; add() one that is still there to a copy.
struct ProcessTotals {
  std::atomic<std::uint64_t> sockets{0};  ///< all that were ever tracked
  std::atomic<std::uint64_t> lane[4]{};   ///< in the order of TrafficView
  std::atomic<std::uint64_t> tcp[4]{};
  std::atomic<std::uint64_t> zero_copy[kZeroCopyCounts]{};  ///< in the order of ZeroCopyView
  std::atomic<std::uint64_t> up{0}, down{0};
  std::atomic<std::uint64_t> failed{0}, returned{0};
  std::atomic<std::uint64_t> lanes[kTransports]{};  ///< connections that had a lane on it
  std::atomic<std::uint64_t> reasons[kLaneReasons]{};

  void reset() noexcept;
  void add(const ConnStats& stats) noexcept;
  void copy(const ProcessTotals& from) noexcept;
};

inline constexpr std::size_t kMaxReported = 256;

/// The last kMaxReported connections that were closed.
struct ClosedConnections {
  ConnView item[kMaxReported];
  std::uint64_t count = 0;  ///< ever
  void push(const ConnStats& stats) noexcept;
};

bool is_own_process() noexcept;  ///< false in a fork's child that has tracked nothing: what follows is then its parent's
/// All connections, open and closed, each counted once though some close meanwhile.
void sum_up(ProcessTotals& sum) noexcept;
const ClosedConnections* closed_connections() noexcept;  ///< nullptr: not kept
void for_each_open(void (*each)(const ConnStats&, void* context), void* context) noexcept;

}  // namespace sdp
