#include "sdp/rings.hpp"

#include <fcntl.h>
#include <time.h>

#include <algorithm>
#include <charconv>
#include <cstring>
#include <string_view>
#include <vector>

#include "rdma_core/base/clock.hpp"
#include "rdma_core/base/log.hpp"
#include "rdma_core/base/sys.hpp"
#include "sdp/service.hpp"

namespace sdp {

namespace sys = rdma::sys;

namespace {

constinit FollowedRings g_followed;

constexpr std::string_view kRing = "anon_inode:[io_uring]\n";

/// `line` begins as one of /proc/self/maps does.
bool is_of_followed_ring(std::string_view line) noexcept {
  std::uintptr_t from = 0, to = 0;
  const char* const end = line.data() + line.size();
  const auto first = std::from_chars(line.data(), end, from, 16);
  if (first.ec != std::errc() || first.ptr == end || *first.ptr != '-') return false;
  const auto second = std::from_chars(first.ptr + 1, end, to, 16);
  return second.ec == std::errc() && g_followed.have_memory_in(from, to);
}

/// In whole lines.
bool shows_a_strange_ring(std::string_view lines) noexcept {
  for (std::size_t at = lines.find(kRing); at != std::string_view::npos; at = lines.find(kRing, at + kRing.size()))
    if (!is_of_followed_ring(lines.substr(lines.rfind('\n', at) + 1))) return true;
  return false;
}

bool mappings_show_a_strange_ring() noexcept {
  const long fd = sys::call(SYS_openat, AT_FDCWD, sys::arg("/proc/self/maps"), O_RDONLY | O_CLOEXEC, 0);
  if (fd < 0) return false;
  char text[8192];
  std::size_t kept = 0;  // of a line whose rest comes by the next read
  bool found = false;
  while (!found) {
    const long n = sys::call(SYS_read, fd, sys::arg(text + kept), static_cast<long>(sizeof text - kept));
    if (n <= 0) break;
    const std::string_view all(text, kept + static_cast<std::size_t>(n));
    const std::size_t whole = all.rfind('\n') + 1;
    found = shows_a_strange_ring(all.substr(0, whole));
    kept = all.size() - whole;
    if (kept == sizeof text) kept = 0;  // longer than any path
    std::memmove(text, all.data() + whole, kept);
  }
  sys::call(SYS_close, fd);
  return found;
}

bool read_clock(clockid_t whose, std::int64_t& ns) noexcept {
  timespec t{};
  const bool known = sys::call(SYS_clock_gettime, whose, sys::arg(&t)) == 0;
  ns = t.tv_sec * 1'000'000'000 + t.tv_nsec;
  return known;
}

}  // namespace

FollowedRings& followed_rings() noexcept { return g_followed; }

bool FollowedRings::add(const Memory& memory) noexcept {
  for (Ring& ring : rings_) {
    std::uintptr_t free = 0;
    if (!ring.requests.compare_exchange_strong(free, memory.requests)) continue;
    ring.submissions.store(memory.submissions);
    ring.completions.store(memory.completions);
    return true;
  }
  return false;
}

bool FollowedRings::has(std::uintptr_t requests) const noexcept {
  return std::any_of(std::begin(rings_), std::end(rings_),
                     [=](const Ring& ring) { return ring.requests.load(std::memory_order_relaxed) == requests; });
}

void FollowedRings::remove(std::uintptr_t requests) noexcept {
  for (Ring& ring : rings_) {
    if (ring.requests.load() != requests) continue;
    ring.submissions.store(0);
    ring.completions.store(0);
    ring.requests.store(0);
  }
}

bool FollowedRings::have_memory_in(std::uintptr_t from, std::uintptr_t to) const noexcept {
  const auto inside = [=](const std::atomic<std::uintptr_t>& address) { return address.load() - from < to - from; };
  return std::any_of(std::begin(rings_), std::end(rings_), [&](const Ring& ring) {
    return ring.requests.load() != 0 && (inside(ring.requests) || inside(ring.submissions) || inside(ring.completions));
  });
}

// Whoever makes a ring runs for some microseconds. The process's clock is read first: what passes between the two readings can hide
// that once, and not for good.
bool RingWatch::others_have_run() noexcept {
  constexpr std::int64_t kLeastNs = 1000;
  constexpr unsigned kMostSpared = 16;  // there are clocks that count in ticks
  std::int64_t all = 0, own = 0;
  const bool known = read_clock(CLOCK_PROCESS_CPUTIME_ID, all) && read_clock(CLOCK_THREAD_CPUTIME_ID, own);
  if (known && others_ns_ && all - own - *others_ns_ < kLeastNs && ++spared_ < kMostSpared) return false;
  others_ns_.reset();
  if (known) others_ns_ = all - own;
  spared_ = 0;
  return true;
}

bool RingWatch::finds_one(bool before_a_lane) noexcept {
  constexpr std::int64_t kPauseNs = 240'000'000, kPauseBeforeLaneNs = 20'000'000;
  const rdma::SteadyClock clock;
  const std::int64_t now = clock.now();
  const std::int64_t pause = before_a_lane ? std::max(kPauseBeforeLaneNs, 100 * took_ns_) : std::max(kPauseNs, 1000 * took_ns_);
  if (last_ns_ != 0 && now - last_ns_ < pause) return false;
  last_ns_ = now;
  if (!others_have_run()) return false;
  const std::uint32_t changes = g_followed.changes();
  const bool found = mappings_show_a_strange_ring();
  took_ns_ = clock.now() - now;
  if (!found || (g_followed.changes() == changes && !g_followed.are_changing())) return found;
  others_ns_.reset();  // the next look tells
  return false;
}

bool Service::may_have_ring(bool before_a_lane) noexcept {
  if (!options_.rings_mean_tcp) return false;
  if (!engine::has_ring() && ring_watch_.finds_one(before_a_lane)) engine::ring_may_serve_sockets();
  return engine::has_ring();
}

// For rings that were made behind our back. The bytes that such a ring waits for come by TCP as soon as the peer has seen ABANDON.
void Service::look_for_rings() noexcept {
  if ((laned_.empty() && handshakes_.empty()) || engine::has_ring() || !may_have_ring(false)) return;
  RDMA_LOG(info, "the program has an io_uring that cannot be followed: everything stays on TCP");
  std::vector<std::uint64_t> cookies;
  for (const auto& [cookie, h] : handshakes_) cookies.push_back(cookie);
  for (const std::uint64_t cookie : cookies) {
    Handshake& h = handshakes_[cookie];
    if (h.conn != rdma::cm::ConnId::none) cm_->disconnect(h.conn);
    cm_->withdraw(cookie);
    give_up(h, LaneReason::io_uring);
  }
  for (StreamImpl* s : laned_) {
    (void)s->lock.lock();
    if (s->phase.load() == Phase::laned) s->take_down_locked(LaneReason::io_uring);
    s->lock.unlock();
  }
}

}  // namespace sdp
