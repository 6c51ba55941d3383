#include "sdp/stats.hpp"

#include <arpa/inet.h>
#include <errno.h>
#include <fcntl.h>
#include <netinet/in.h>
#include <sys/mman.h>
#include <sys/stat.h>

#include <bit>
#include <cstdio>
#include <cstring>
#include <new>

#include "rdma_core/base/high_fd.hpp"
#include "rdma_core/base/sys.hpp"
#include "sdp/stats_process.hpp"
#include "sdp/stream_impl.hpp"

namespace sdp {
namespace {

namespace sys = rdma::sys;

struct ReasonRow {
  LaneReason reason;
  const char* name;
  const char* text;
  const char* hint;
};

constexpr ReasonRow kReasons[] = {
    {LaneReason::none, "none", "has a lane", ""},
    {LaneReason::below_threshold, "below_threshold", "has not carried enough yet to be worth a lane",
     "SDP_UPGRADE_MESSAGES and SDP_UPGRADE_BYTES set the threshold"},
    {LaneReason::pursued, "pursued", "a lane is being set up", ""},
    {LaneReason::policy_tcp, "policy_tcp", "the policy says TCP", "see SDP_POLICY and the rules in SDP_CONFIG"},
    {LaneReason::bad_settings, "bad_settings", "settings could not be read, so everything stays on TCP",
     "`sdp env` shows what is wrong"},
    {LaneReason::disabled, "disabled", "lanes are switched off here", ""},
    {LaneReason::not_tcp, "not_tcp", "no connected TCP socket", ""},
    {LaneReason::other_host, "other_host", "the peer is on another host and no RDMA device reaches it", ""},
    {LaneReason::no_peer, "no_peer", "the peer did not answer: it does not run the library, or is on another host",
     "start the peer with `sdp run` too"},
    {LaneReason::wrong_owner, "wrong_owner", "who answered does not own the other end",
     "another user may be squatting the name: look for him"},
    {LaneReason::unproven, "unproven", "the two ends could not show each other that they hold the same connection",
     "the same SDP_SECRET_FILE on both sides; without one, somebody may pose as the peer"},
    {LaneReason::version, "version", "the peer's library speaks another version", "install the same version on both sides"},
    {LaneReason::refused, "refused", "the peer refused", "`sdp stat` there says why"},
    {LaneReason::no_resources, "no_resources", "memory or descriptors were short, or too many lanes", "look at ulimit -n and -l"},
    {LaneReason::foreign_use, "foreign_use", "bytes went past the library (a raw system call, another program)", ""},
    {LaneReason::second_process, "second_process", "a second process used the connection", ""},
    {LaneReason::fork, "fork", "the connection was inherited by fork", ""},
    {LaneReason::exec, "exec", "the connection was handed on through exec", ""},
    {LaneReason::credentials, "credentials",
     "the process changed its credentials (setuid and its kin), which no RDMA device outlives", ""},
    {LaneReason::mode, "mode", "the socket is in a mode or made a call that no lane can have (MSG_OOB, SO_RCVLOWAT, O_ASYNC…)", ""},
    {LaneReason::peer_gone, "peer_gone", "the peer closed or died", ""},
    {LaneReason::device_lost, "device_lost", "the device, or the path to the peer, failed", "`rdma link` shows the devices"},
    {LaneReason::protocol_error, "protocol_error", "the peer broke the protocol", "SDP_LOG=info names the rule that it broke"},
    {LaneReason::not_connected, "not_connected", "never got connected", ""},
    {LaneReason::closed, "closed", "this side closed or shut it down", ""},
    {LaneReason::too_late, "too_late", "the peer began to set up a lane and did not get through in time", ""},
    {LaneReason::io_uring, "io_uring", "the program has an io_uring that may read and write sockets past the library",
     "SDP_IO_URING=ignore, if its rings never serve sockets"},
};
constexpr bool in_order() noexcept {
  for (std::size_t i = 0; i < kLaneReasons; ++i)
    if (static_cast<std::size_t>(kReasons[i].reason) != i) return false;
  return true;
}
static_assert(std::size(kReasons) == kLaneReasons && in_order(), "one row per enumerator");

const ReasonRow& row_of(LaneReason r) noexcept {
  static constexpr ReasonRow kUnknown{LaneReason::none, "unknown", "unknown", ""};
  const auto i = static_cast<std::size_t>(r);
  return i < kLaneReasons ? kReasons[i] : kUnknown;
}

// --- tables

/// Overflow tables are not shown by `sdp stat`; with 64 of them 65,536 connections are still counted right.
constexpr std::size_t kMaxTables = 64;

struct Process {
  std::atomic<std::uint32_t> pid{0};       ///< whose this is; another process (a fork's child) starts anew
  std::atomic<std::uint32_t> renewing{0};  ///< pid of the process that is starting anew
  std::atomic<StatsHeader*> tables[kMaxTables]{};
  std::atomic<std::uint32_t> table_lock{0};  ///< pid of the process that adds a table
  std::atomic<int> fd{-1};
  std::uint64_t device = 0, inode = 0;  ///< which file it is
  std::atomic<bool> keep_closed{false};
  std::atomic<std::uint32_t> history_lock{0};
  ProcessTotals totals;
  std::atomic<std::uint64_t> moves_begun{0}, moves_ended{0};  ///< of a slot's counts into the totals
  ClosedConnections* closed = nullptr;
};
constinit Process process;

/// Where connections are counted when nothing else can be had: shared by all of them, read by nobody.
constinit ConnStats sink;

std::uint32_t own_pid() noexcept { return engine::process_id(); }

/// A lock for rare moments that a fork's child finds open: a holder of another process does not count.
class PidLock {
 public:
  explicit PidLock(std::atomic<std::uint32_t>& word, std::uint32_t pid) noexcept : word_(word) {
    std::uint32_t seen = 0;
    while (!word_.compare_exchange_weak(seen, pid, std::memory_order_acquire, std::memory_order_relaxed)) {
      if (seen == pid) {  // another thread of ours
        sys::call(SYS_sched_yield);
        seen = 0;
      }  // else: free it is not, and the process that held it is not this one: take it from there
    }
  }
  ~PidLock() { word_.store(0, std::memory_order_release); }
  PidLock(const PidLock&) = delete;
  PidLock& operator=(const PidLock&) = delete;

 private:
  std::atomic<std::uint32_t>& word_;
};

ConnStats* slots_of(StatsHeader* table) noexcept {
  return static_cast<ConnStats*>(static_cast<void*>(reinterpret_cast<std::byte*>(table) + kStatsHeaderBytes));
}

void fill_header(StatsHeader* h, std::uint32_t pid) noexcept {
  new (h) StatsHeader{};
  h->version = kStatsVersion;
  h->slot_bytes = sizeof(ConnStats);
  h->slot_count = kStatsSlots;
  h->pid = pid;
  std::strncpy(h->program, program_invocation_short_name, sizeof h->program - 1);
  std::atomic_thread_fence(std::memory_order_release);
  h->magic = kStatsMagic;
}

/// The memfd may be gone and its number be somebody else's by now: the program can close what it likes.
bool still_ours(int fd) noexcept {
  struct stat st {};
  return fd >= 0 && sys::call(SYS_fstat, fd, sys::arg(&st)) == 0 && st.st_ino == process.inode && st.st_dev == process.device;
}

int make_memfd() noexcept {
  const long fd = sys::call(SYS_memfd_create, sys::arg(kStatsName), MFD_CLOEXEC | MFD_ALLOW_SEALING);
  if (fd < 0) return -1;
  const bool good = sys::call(SYS_ftruncate, fd, kStatsBytes) == 0 && sys::call(SYS_fchmod, fd, 0600) == 0 &&
                    sys::call(SYS_fcntl, fd, F_ADD_SEALS, F_SEAL_SHRINK | F_SEAL_GROW | F_SEAL_SEAL) == 0;
  if (good) return rdma::keep_fd(static_cast<int>(fd));
  sys::call(SYS_close, fd);
  return -1;
}

/// nullptr: no memory. The first table of a process is the one that `sdp stat` can find, if a memfd can be had.
StatsHeader* make_table(bool first, std::uint32_t pid) noexcept {
  const int fd = first ? make_memfd() : -1;
  const int flags = fd >= 0 ? MAP_SHARED : MAP_SHARED | MAP_ANONYMOUS;
  void* p = mmap(nullptr, kStatsBytes, PROT_READ | PROT_WRITE, flags, fd, 0);
  if (p == MAP_FAILED) {
    if (fd >= 0) rdma::forget_fd(fd), sys::call(SYS_close, fd);
    return nullptr;
  }
  if (fd >= 0) {
    struct stat st {};
    sys::call(SYS_fstat, fd, sys::arg(&st));
    process.device = st.st_dev;
    process.inode = st.st_ino;
    process.fd.store(fd, std::memory_order_relaxed);
  }
  auto* table = static_cast<StatsHeader*>(p);
  fill_header(table, pid);
  return table;
}

/// After fork the tables are the parent's: the child lets go of them (they stay mapped, for whoever still holds a pointer).
void start_anew(std::uint32_t pid) noexcept {
  const PidLock lock(process.renewing, pid);
  if (process.pid.load(std::memory_order_relaxed) == pid) return;
  const int fd = process.fd.exchange(-1, std::memory_order_relaxed);
  if (fd >= 0) rdma::forget_fd(fd);
  if (still_ours(fd)) sys::call(SYS_close, fd);
  for (auto& table : process.tables) table.store(nullptr, std::memory_order_relaxed);
  process.totals.reset();
  process.moves_begun.store(0, std::memory_order_relaxed);
  process.moves_ended.store(0, std::memory_order_relaxed);
  if (process.closed != nullptr) process.closed->count = 0;
  process.pid.store(pid, std::memory_order_release);
}

/// A free slot of `table`, the lowest: few connections touch few pages. nullptr: full.
ConnStats* take_slot(StatsHeader* table) noexcept {
  for (std::size_t w = 0; w < std::size(table->used); ++w) {
    std::uint64_t used = table->used[w].load(std::memory_order_relaxed);
    while (used != ~std::uint64_t{0}) {
      const int bit = std::countr_one(used);
      if (table->used[w].compare_exchange_weak(used, used | std::uint64_t{1} << bit, std::memory_order_acquire,
                                               std::memory_order_relaxed))
        return slots_of(table) + w * 64 + static_cast<std::size_t>(bit);
    }
  }
  return nullptr;
}

/// `change` goes on counting over the slot's users, so that a reader sees that it is another connection's now.
void begin(ConnStats* s, int fd) noexcept {
  const std::uint32_t change = s->change.load(std::memory_order_relaxed);
  s->change.store(change | 1, std::memory_order_relaxed);
  std::atomic_thread_fence(std::memory_order_release);
  s->fd.store(fd, std::memory_order_relaxed);
  s->cookie.store(0, std::memory_order_relaxed);
  for (EndpointWords* e : {&s->local, &s->remote}) {
    e->family_port.store(0, std::memory_order_relaxed);
    for (auto& word : e->address) word.store(0, std::memory_order_relaxed);
  }
  for (Traffic* t : {&s->lane, &s->tcp})
    for (Counter* c : {&t->bytes_sent, &t->messages_sent, &t->bytes_received, &t->messages_received}) c->reset();
  ZeroCopyTraffic& z = s->zero_copy;
  for (Counter* c : {&z.adverts, &z.bytes_sent, &z.bytes_received, &z.cancelled, &z.refused, &z.unregistered, &z.bytes_written,
                     &z.bytes_placed, &z.sinks, &z.sinks_cancelled, &z.sinks_unused})
    c->reset();
  s->switches_up.reset();
  s->switches_down.reset();
  s->lanes_failed.reset();
  s->lanes_returned.reset();
  s->looks_again.reset();
  s->will_look.store(false, std::memory_order_relaxed);
  s->credits_send.store(0, std::memory_order_relaxed);
  s->credits_recv.store(0, std::memory_order_relaxed);
  s->reason.store(LaneReason::below_threshold, std::memory_order_relaxed);
  s->transport.store(0, std::memory_order_relaxed);
  s->had_lanes.store(0, std::memory_order_relaxed);
  s->change.store((change | 1) + 1, std::memory_order_release);
}

/// The table of this process that `s` lies in; nullptr: none (the sink, or a parent's slot).
StatsHeader* table_of(const ConnStats* s) noexcept {
  const auto at = reinterpret_cast<std::uintptr_t>(s);
  for (auto& entry : process.tables) {
    StatsHeader* table = entry.load(std::memory_order_acquire);
    if (table == nullptr) return nullptr;
    const auto base = reinterpret_cast<std::uintptr_t>(table);
    if (at >= base && at < base + kStatsBytes) return table;
  }
  return nullptr;
}

void store_endpoint(EndpointWords& out, const sockaddr_storage& address) noexcept {
  std::uint64_t words[2] = {0, 0};
  std::uint64_t port = 0;
  if (address.ss_family == AF_INET) {
    sockaddr_in in;
    std::memcpy(&in, &address, sizeof in);
    std::memcpy(words, &in.sin_addr, 4);
    port = ntohs(in.sin_port);
  } else if (address.ss_family == AF_INET6) {
    sockaddr_in6 in6;
    std::memcpy(&in6, &address, sizeof in6);
    std::memcpy(words, &in6.sin6_addr, 16);
    port = ntohs(in6.sin6_port);
  }
  out.address[0].store(words[0], std::memory_order_relaxed);
  out.address[1].store(words[1], std::memory_order_relaxed);
  out.family_port.store(static_cast<std::uint64_t>(address.ss_family) << 16 | port, std::memory_order_relaxed);
}

}  // namespace

const char* to_string(LaneReason r) noexcept { return row_of(r).name; }
const char* explain(LaneReason r) noexcept { return row_of(r).text; }
const char* hint(LaneReason r) noexcept { return row_of(r).hint; }

EndpointText format_endpoint(std::uint64_t family_port, const std::uint64_t address[2]) noexcept {
  EndpointText out;
  const auto family = static_cast<int>(family_port >> 16 & 0xffff);
  char ip[INET6_ADDRSTRLEN];
  if ((family != AF_INET && family != AF_INET6) || inet_ntop(family, address, ip, sizeof ip) == nullptr) return out;
  char text[64];
  const char* format = family == AF_INET ? "%s:%u" : "[%s]:%u";
  const int n = std::snprintf(text, sizeof text, format, ip, static_cast<unsigned>(family_port & 0xffff));
  out.assign({text, static_cast<std::size_t>(n)});
  return out;
}

void ConnStats::set_addresses(const sockaddr_storage& from, const sockaddr_storage& to) noexcept {
  const std::uint32_t before = change.load(std::memory_order_relaxed);
  change.store(before | 1, std::memory_order_relaxed);
  std::atomic_thread_fence(std::memory_order_release);
  store_endpoint(local, from);
  store_endpoint(remote, to);
  change.store((before | 1) + 1, std::memory_order_release);
}

ConnStats* acquire_stats(int fd) noexcept {
  const std::uint32_t pid = own_pid();
  if (process.pid.load(std::memory_order_acquire) != pid) start_anew(pid);
  report_option_problems();
  process.totals.sockets.fetch_add(1, std::memory_order_relaxed);
  for (std::size_t i = 0; i < kMaxTables; ++i) {
    StatsHeader* table = process.tables[i].load(std::memory_order_acquire);
    if (table == nullptr) {
      const PidLock lock(process.table_lock, pid);
      table = process.tables[i].load(std::memory_order_acquire);
      if (table == nullptr) table = make_table(i == 0, pid);
      process.tables[i].store(table, std::memory_order_release);
      if (table == nullptr) break;
    }
    if (ConnStats* s = take_slot(table)) {
      begin(s, fd);
      table->connections.fetch_add(1, std::memory_order_relaxed);
      return s;
    }
  }
  return &sink;
}

void release_stats(ConnStats* s) noexcept {
  const std::uint32_t pid = own_pid();
  if (process.pid.load(std::memory_order_acquire) != pid) return;
  StatsHeader* table = table_of(s);
  if (table == nullptr) return;
  process.moves_begun.fetch_add(1, std::memory_order_seq_cst);
  process.totals.add(*s);
  if (process.closed != nullptr && process.keep_closed.load(std::memory_order_relaxed)) {
    const PidLock lock(process.history_lock, pid);
    process.closed->push(*s);
  }
  const auto slot = static_cast<std::size_t>(s - slots_of(table));
  table->used[slot / 64].fetch_and(~(std::uint64_t{1} << (slot % 64)), std::memory_order_release);
  process.moves_ended.fetch_add(1, std::memory_order_seq_cst);
}

void forget_stats_in_child() noexcept {
  if (process.pid.load(std::memory_order_acquire) != 0) start_anew(own_pid());
}

int stats_fd() noexcept {
  const int fd = process.fd.load(std::memory_order_relaxed);
  return process.pid.load(std::memory_order_acquire) == own_pid() ? fd : -1;
}

void keep_closed_connections(bool keep) noexcept {
  if (keep && process.closed == nullptr) {
    void* p = mmap(nullptr, sizeof(ClosedConnections), PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (p == MAP_FAILED) return;
    process.closed = new (p) ClosedConnections;
  }
  process.keep_closed.store(keep, std::memory_order_relaxed);
}

ConnView view_of(const ConnStats& s) noexcept {
  ConnView v;
  v.fd = s.fd.load(std::memory_order_relaxed);
  v.cookie = s.cookie.load(std::memory_order_relaxed);
  const auto endpoint = [](const EndpointWords& e) noexcept {
    const std::uint64_t address[2] = {e.address[0].load(std::memory_order_relaxed), e.address[1].load(std::memory_order_relaxed)};
    return format_endpoint(e.family_port.load(std::memory_order_relaxed), address);
  };
  v.local = endpoint(s.local);
  v.remote = endpoint(s.remote);
  const auto traffic = [](const Traffic& t) noexcept {
    return TrafficView{t.bytes_sent.get(), t.messages_sent.get(), t.bytes_received.get(), t.messages_received.get()};
  };
  v.lane = traffic(s.lane);
  v.tcp = traffic(s.tcp);
  const ZeroCopyTraffic& z = s.zero_copy;
  v.zero_copy = {z.adverts.get(), z.bytes_sent.get(),      z.bytes_received.get(), z.cancelled.get(),
                 z.refused.get(), z.unregistered.get(),    z.bytes_written.get(),  z.bytes_placed.get(),
                 z.sinks.get(),   z.sinks_cancelled.get(), z.sinks_unused.get()};
  v.switches_up = s.switches_up.get();
  v.switches_down = s.switches_down.get();
  v.lanes_failed = s.lanes_failed.get();
  v.lanes_returned = s.lanes_returned.get();
  v.looks_again = s.looks_again.get();
  v.will_look = s.will_look.load(std::memory_order_relaxed);
  v.credits_send = s.credits_send.load(std::memory_order_relaxed);
  v.credits_recv = s.credits_recv.load(std::memory_order_relaxed);
  v.reason = s.reason.load(std::memory_order_relaxed);
  v.transport = s.transport.load(std::memory_order_relaxed);
  v.had_lanes = s.had_lanes.load(std::memory_order_relaxed);
  return v;
}

void ProcessTotals::reset() noexcept {
  for (auto* counter :
       {&sockets, &lane[0], &lane[1], &lane[2], &lane[3], &tcp[0], &tcp[1], &tcp[2], &tcp[3], &up, &down, &failed, &returned})
    counter->store(0, std::memory_order_relaxed);
  for (auto& count : zero_copy) count.store(0, std::memory_order_relaxed);
  for (auto& lanes_of : lanes) lanes_of.store(0, std::memory_order_relaxed);
  for (auto& count : reasons) count.store(0, std::memory_order_relaxed);
}

void ProcessTotals::copy(const ProcessTotals& from) noexcept {
  const auto one = [](std::atomic<std::uint64_t>& to, const std::atomic<std::uint64_t>& a) noexcept {
    to.store(a.load(std::memory_order_relaxed), std::memory_order_relaxed);
  };
  one(sockets, from.sockets);
  for (int i = 0; i < 4; ++i) one(lane[i], from.lane[i]), one(tcp[i], from.tcp[i]);
  for (int i = 0; i < kZeroCopyCounts; ++i) one(zero_copy[i], from.zero_copy[i]);
  one(up, from.up);
  one(down, from.down);
  one(failed, from.failed);
  one(returned, from.returned);
  for (std::size_t i = 0; i < kTransports; ++i) one(lanes[i], from.lanes[i]);
  for (std::size_t i = 0; i < kLaneReasons; ++i) one(reasons[i], from.reasons[i]);
}

void ProcessTotals::add(const ConnStats& s) noexcept {
  const auto bump = [](std::atomic<std::uint64_t>& a, std::uint64_t n) noexcept {
    if (n != 0) a.fetch_add(n, std::memory_order_relaxed);
  };
  const auto traffic = [&](std::atomic<std::uint64_t>(&sum)[4], const Traffic& t) noexcept {
    bump(sum[0], t.bytes_sent.get());
    bump(sum[1], t.messages_sent.get());
    bump(sum[2], t.bytes_received.get());
    bump(sum[3], t.messages_received.get());
  };
  traffic(lane, s.lane);
  traffic(tcp, s.tcp);
  const ZeroCopyTraffic& z = s.zero_copy;
  bump(zero_copy[0], z.adverts.get());
  bump(zero_copy[1], z.bytes_sent.get());
  bump(zero_copy[2], z.bytes_received.get());
  bump(zero_copy[3], z.cancelled.get());
  bump(zero_copy[4], z.refused.get());
  bump(zero_copy[5], z.unregistered.get());
  bump(zero_copy[6], z.bytes_written.get());
  bump(zero_copy[7], z.bytes_placed.get());
  bump(zero_copy[8], z.sinks.get());
  bump(zero_copy[9], z.sinks_cancelled.get());
  bump(zero_copy[10], z.sinks_unused.get());
  bump(up, s.switches_up.get());
  bump(down, s.switches_down.get());
  bump(failed, s.lanes_failed.get());
  bump(returned, s.lanes_returned.get());
  const std::uint8_t had_lanes = s.had_lanes.load(std::memory_order_relaxed);
  for (std::size_t t = 0; t < kTransports; ++t) bump(lanes[t], had_lanes >> t & 1U);
  const LaneReason reason = s.reason.load(std::memory_order_relaxed);
  if (reason != LaneReason::none && static_cast<std::size_t>(reason) < kLaneReasons)
    bump(reasons[static_cast<std::size_t>(reason)], 1);
}

void ClosedConnections::push(const ConnStats& s) noexcept { item[count++ % kMaxReported] = view_of(s); }

bool is_own_process() noexcept { return process.pid.load(std::memory_order_acquire) == own_pid(); }

// No lock: a handler's close() may be among the moves.
void sum_up(ProcessTotals& sum) noexcept {
  constexpr int kTries = 1000;
  for (int i = 0; i < kTries; ++i) {
    const std::uint64_t begun = process.moves_begun.load(std::memory_order_seq_cst);
    const bool still = process.moves_ended.load(std::memory_order_seq_cst) == begun;
    sum.reset();
    if (is_own_process()) sum.copy(process.totals);
    for_each_open([](const ConnStats& s, void* all) { static_cast<ProcessTotals*>(all)->add(s); }, &sum);
    if (still && process.moves_begun.load(std::memory_order_seq_cst) == begun) return;
    sys::call(SYS_sched_yield);
  }
}
const ClosedConnections* closed_connections() noexcept { return process.closed; }

void for_each_open(void (*each)(const ConnStats&, void* context), void* context) noexcept {
  if (!is_own_process()) return;
  for (auto& entry : process.tables) {
    StatsHeader* table = entry.load(std::memory_order_acquire);
    if (table == nullptr) return;
    for (std::size_t i = 0; i < kStatsSlots; ++i)
      if ((table->used[i / 64].load(std::memory_order_acquire) >> (i % 64) & 1) != 0) each(slots_of(table)[i], context);
  }
}

const char* library_version() noexcept { return SDPRELOAD_VERSION; }

}  // namespace sdp
