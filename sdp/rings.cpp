#include "sdp/rings.hpp"

#include <fcntl.h>

#include <algorithm>
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

constexpr std::string_view kRing = "anon_inode:[io_uring]\n";

bool mappings_show_a_ring() noexcept {
  const long fd = sys::call(SYS_openat, AT_FDCWD, sys::arg("/proc/self/maps"), O_RDONLY | O_CLOEXEC, 0);
  if (fd < 0) return false;
  char text[8192];
  std::size_t kept = 0;  // a name may lie across two reads
  bool found = false;
  while (!found) {
    const long n = sys::call(SYS_read, fd, sys::arg(text + kept), static_cast<long>(sizeof text - kept));
    if (n <= 0) break;
    const std::string_view all(text, kept + static_cast<std::size_t>(n));
    found = all.find(kRing) != std::string_view::npos;
    kept = std::min(all.size(), kRing.size() - 1);
    std::memmove(text, all.data() + all.size() - kept, kept);
  }
  sys::call(SYS_close, fd);
  return found;
}

}  // namespace

bool RingWatch::finds_one(bool before_a_lane) noexcept {
  constexpr std::int64_t kPauseNs = 240'000'000, kPauseBeforeLaneNs = 20'000'000;
  const rdma::SteadyClock clock;
  const std::int64_t now = clock.now();
  const std::int64_t pause = before_a_lane ? std::max(kPauseBeforeLaneNs, 100 * took_ns_) : std::max(kPauseNs, 1000 * took_ns_);
  if (last_ns_ != 0 && now - last_ns_ < pause) return false;
  const bool found = mappings_show_a_ring();
  last_ns_ = now;
  took_ns_ = clock.now() - now;
  return found;
}

bool Service::may_have_ring(bool before_a_lane) noexcept {
  if (!options_.rings_mean_tcp) return false;
  if (!engine::has_ring() && ring_watch_.finds_one(before_a_lane)) engine::ring_is_made();
  return engine::has_ring();
}

// For rings that were made behind our back. The bytes that such a ring waits for come by TCP as soon as the peer has seen ABANDON.
void Service::look_for_rings() noexcept {
  if ((laned_.empty() && handshakes_.empty()) || engine::has_ring() || !may_have_ring(false)) return;
  RDMA_LOG(info, "the program has an io_uring: everything stays on TCP");
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
