// Statistics: what each connection carried and by what, and why it has no lane. Three readers: the JSON report at exit (SDP_STATS),
// `sdp stat` looking at a running process, and tests.
//
// A process's connections stand in a table in a memfd that has no name in any file system; `sdp stat` finds it among the process's
// open descriptors (/proc/PID/fd) and reads it from there, so nothing is left behind when the process dies. Counters are written in
// place: bumping one is a load, an add and a store.
//
// Threads: acquire and release: any. The counters of one connection: one writer at a time (the stream's lock). Readers: any, no
// lock. fork: the child starts with an empty table of its own, made at its first acquire(). The parent's slots stay mapped in it
// and are not to be touched: acquire new ones for inherited connections.
#pragma once

#include <sys/socket.h>

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <string_view>

#include "sdp/options.hpp"

namespace sdp {

/// Why a connection has no lane. Add new ones at the end (the numbers are in the table that `sdp stat` reads) and to kReasons in
/// stats.cpp.
enum class LaneReason : std::uint8_t {
  none,             ///< it has one
  below_threshold,  ///< has not carried enough yet
  pursued,          ///< being set up
  policy_tcp,
  bad_settings,  ///< SDP_POLICY, SDP_TRANSPORT or the rules could not be read
  disabled,
  not_tcp,
  other_host,
  no_peer,
  wrong_owner,
  unproven,
  version,
  refused,
  no_resources,
  foreign_use,
  second_process,
  fork,
  exec,
  credentials,
  mode,
  peer_gone,
  device_lost,
  protocol_error,
  not_connected,
  closed,
  too_late,
  io_uring,
};
inline constexpr std::size_t kLaneReasons = static_cast<std::size_t>(LaneReason::io_uring) + 1;
const char* to_string(LaneReason) noexcept;  ///< the enumerator's name, for programs
const char* explain(LaneReason) noexcept;    ///< one clause for people
const char* hint(LaneReason) noexcept;       ///< what to do for a lane; "" when nothing need or can be done

/// A counter with one writer at a time and any number of readers.
class Counter {
 public:
  void add(std::uint64_t n) noexcept { value_.store(value_.load(std::memory_order_relaxed) + n, std::memory_order_relaxed); }
  std::uint64_t get() const noexcept { return value_.load(std::memory_order_relaxed); }
  void reset() noexcept { value_.store(0, std::memory_order_relaxed); }

 private:
  std::atomic<std::uint64_t> value_{0};
};

/// What one carrier took of a connection's stream. A message is one successful send or receive call.
struct Traffic {
  Counter bytes_sent, messages_sent, bytes_received, messages_received;
};

/// What crossed without a copy, and why adverts came to nothing. All are of sends but `bytes_received`.
struct ZeroCopyTraffic {
  Counter adverts;          ///< SrcAvails sent
  Counter bytes_sent;       ///< by RDMA, out of the program's memory
  Counter bytes_received;   ///< by RDMA, into the program's memory
  Counter cancelled;        ///< taken back: the reader did not come in time, or the call had to end
  Counter refused;          ///< the peer wanted the bytes as messages
  Counter unregistered;     ///< calls whose memory the device did not take
  Counter bytes_written;    ///< of those sent: into the memory of the peer's waiting reader; the peer has read the others
  Counter bytes_placed;     ///< of those received: by the peer; this side has read the others
  Counter sinks;            ///< SinkAvails sent
  Counter sinks_cancelled;  ///< taken back: nothing came in time, or the call had to end
  Counter sinks_unused;     ///< what came was a message
};

/// An address and port as three words, so that it can be read without a lock. family 0: unknown.
struct EndpointWords {
  std::atomic<std::uint64_t> family_port{0};  ///< family << 16 | port
  std::atomic<std::uint64_t> address[2]{};    ///< as in sin_addr or sin6_addr, zero-padded
};
/// "192.0.2.1:80", "[2001:db8::1]:80", "" when unknown.
using EndpointText = Text<64>;
EndpointText format_endpoint(std::uint64_t family_port, const std::uint64_t address[2]) noexcept;

/// One connection: a slot of the table. Five cache lines: who it is, what every message changes, what rarely changes, what long
/// sends and receives change.
struct alignas(64) ConnStats {
  std::atomic<std::uint32_t> change{0};  ///< odd while the first line is being written
  std::atomic<std::int32_t> fd{-1};
  std::atomic<std::uint64_t> cookie{0};  ///< SO_COOKIE; 0: unknown
  EndpointWords local, remote;

  alignas(64) Traffic lane;
  Traffic tcp;

  alignas(64) Counter switches_up;  ///< directions that went from TCP to the lane
  Counter switches_down;
  Counter lanes_failed;                        ///< path or device; what was under way came by TCP, or the connection was reset
  Counter lanes_returned;                      ///< lanes in place of those
  Counter looks_again;                         ///< searches for a lane after the first had failed
  std::atomic<std::uint32_t> credits_send{0};  ///< messages that we may send now
  std::atomic<std::uint32_t> credits_recv{0};  ///< receive buffers posted for the peer
  std::atomic<LaneReason> reason{LaneReason::below_threshold};
  std::atomic<std::uint8_t> transport{0};  ///< of the lane it has: 1 + Transport; 0: none
  std::atomic<std::uint8_t> had_lanes{0};  ///< bit set by Transport: lanes it had at any time
  std::atomic<bool> will_look{false};      ///< another look for a lane is to come

  alignas(64) ZeroCopyTraffic zero_copy;

  void set_addresses(const sockaddr_storage& from, const sockaddr_storage& to) noexcept;
  /// A lane carries it from now on.
  void set_transport(Transport t) noexcept {
    had_lanes.store(static_cast<std::uint8_t>(had_lanes.load(std::memory_order_relaxed) | 1U << static_cast<unsigned>(t)),
                    std::memory_order_relaxed);
    transport.store(static_cast<std::uint8_t>(1 + static_cast<unsigned>(t)), std::memory_order_relaxed);
    will_look.store(false, std::memory_order_relaxed);
    reason.store(LaneReason::none, std::memory_order_relaxed);
  }
  /// It has no lane, or none any more.
  void set_reason(LaneReason why, bool looks_on = false) noexcept {
    if (why != LaneReason::none) transport.store(0, std::memory_order_relaxed);
    reason.store(why, std::memory_order_relaxed);
    will_look.store(looks_on, std::memory_order_relaxed);
  }
};
static_assert(sizeof(ConnStats) == 320 && offsetof(ConnStats, lane) == 64 && offsetof(ConnStats, switches_up) == 128);
static_assert(std::atomic<std::uint64_t>::is_always_lock_free, "shared between processes");
using ConnSlot = ConnStats;

// --- the table's layout, for `sdp stat`; everything that is read from it is untrusted there

inline constexpr char kStatsName[] = "sdpreload-stats";              ///< of the memfd
inline constexpr std::uint64_t kStatsMagic = 0x5354415453504453ULL;  // "SDPSTATS" in memory
inline constexpr std::uint32_t kStatsVersion = 5;  ///< raise it with any change of StatsHeader, ConnStats or LaneReason's order
inline constexpr std::uint32_t kStatsSlots = 1024;

struct StatsHeader {
  std::uint64_t magic;
  std::uint32_t version, slot_bytes, slot_count;
  std::uint32_t pid;                                              ///< of the owner, in its own pid namespace
  char program[64];                                               ///< short name, NUL-padded
  std::atomic<std::uint64_t> connections;                         ///< tracked since the start, without those of overflow tables
  alignas(64) std::atomic<std::uint64_t> used[kStatsSlots / 64];  ///< bit per slot
};
inline constexpr std::size_t kStatsHeaderBytes = 4096;
inline constexpr std::size_t kStatsBytes = kStatsHeaderBytes + sizeof(ConnStats) * kStatsSlots;
static_assert(sizeof(StatsHeader) <= kStatsHeaderBytes);

// --- the process's table

/// A slot for a connection, zeroed. Never nullptr: when memory or the table is short, connections are counted but not all shown.
ConnStats* acquire_stats(int fd) noexcept;
/// The connection is gone: its counters go into the process's totals. The slot is used for another one at once. Ignored for slots
/// of the parent.
void release_stats(ConnStats* stats) noexcept;
/// In a fork's child: lets go of the parent's table at once. Not needed for the counts, which the first acquire_stats() sets right,
/// but until then the child keeps the parent's memfd open.
void forget_stats_in_child() noexcept;
/// The table's descriptor, -1: none. keep_fd() gave it.
int stats_fd() noexcept;
/// Keeps the last 256 closed connections for the report. Set by parse_options() when there will be one.
void keep_closed_connections(bool keep) noexcept;

/// Writes the JSON report to options.stats_file. False: it could not be written, which is logged.
bool write_stats_report(const Options& options) noexcept;

const char* library_version() noexcept;

}  // namespace sdp
