// What no RDMA device outlives: exec, for the QP dies with the process image and what it has not sent yet with it; and a change of
// credentials, after which the kernel takes nothing from the descriptors that were opened before. It compares the credentials of
// the calling thread with the opener's as objects, and every thread of a process that calls setuid() gets an object of its own. So
// devices are opened by a thread that a thread of the program has made since: the service thread is replaced by the next pursue().
#include <dirent.h>
#include <fcntl.h>
#include <linux/futex.h>
#include <sys/single_threaded.h>

#include <algorithm>
#include <cerrno>
#include <climits>
#include <cstdio>
#include <cstring>
#include <ctime>
#include <mutex>

#include "rdma_core/base/clock.hpp"
#include "rdma_core/base/log.hpp"
#include "rdma_core/base/sys.hpp"
#include "rdma_core/verbs_module.hpp"
#include "sdp/service.hpp"

namespace sdp {

namespace sys = rdma::sys;

namespace {

constexpr std::int64_t kMillisecond = 1'000'000, kSecond = 1000 * kMillisecond;
constexpr std::int64_t kCallerNs = 500 * kMillisecond;  // the caller's patience with the service thread beyond its own
constexpr std::int64_t kRetiredNs = 10 * kSecond;       // for the last words of peers on devices that were let go

std::int64_t now_ns() noexcept { return rdma::SteadyClock{}.now(); }

LaneReason reason_of(Service::Leaving why) noexcept {
  switch (why) {
    case Service::Leaving::exec:
      return LaneReason::exec;
    case Service::Leaving::ring:
      return LaneReason::io_uring;
    case Service::Leaving::credentials:
      break;
  }
  return LaneReason::credentials;
}
const char* name_of(Service::Leaving why) noexcept {
  switch (why) {
    case Service::Leaving::exec:
      return "an exec";
    case Service::Leaving::ring:
      return "an io_uring was made";
    case Service::Leaving::credentials:
      break;
  }
  return "a change of credentials";
}

/// The process whose threads have credentials that differ; 0: none.
std::atomic<std::uint32_t> g_process_of_many{0};
bool credentials_differ() noexcept {
  const std::uint32_t process = g_process_of_many.load();
  return process != 0 && process == engine::process_id();
}

/// A thread of ours, in /proc/self/task?
bool is_own_thread(int tasks, const char* id) noexcept {
  char path[sizeof(dirent64::d_name) + 8];
  std::snprintf(path, sizeof path, "%s/comm", id);
  const long fd = sys::call(SYS_openat, tasks, sys::arg(path), O_RDONLY | O_CLOEXEC, 0);
  if (fd < 0) return fd == -ENOENT;  // it has just ended
  char name[32] = {};
  const long n = sys::call(SYS_read, fd, sys::arg(name), sizeof name - 1);
  sys::call(SYS_close, fd);
  constexpr std::size_t kLength = sizeof kServiceThreadName - 1;
  return n <= 0 || std::strncmp(name, kServiceThreadName, kLength) == 0;
}

/// Has the program more than one thread? Not known: yes.
bool has_threads() noexcept {
  const long tasks = sys::call(SYS_openat, AT_FDCWD, sys::arg("/proc/self/task"), O_RDONLY | O_DIRECTORY | O_CLOEXEC, 0);
  if (tasks < 0) return true;
  unsigned found = 0;
  alignas(dirent64) char entries[2048] = {};
  for (long bytes; found < 2 && (bytes = sys::call(SYS_getdents64, tasks, sys::arg(entries), sizeof entries)) > 0;) {
    for (long at = 0; at < bytes && found < 2;) {
      const auto* entry = static_cast<const dirent64*>(static_cast<const void*>(entries + at));
      if (entry->d_name[0] != '.' && !is_own_thread(static_cast<int>(tasks), entry->d_name)) ++found;
      at += entry->d_reclen;
    }
  }
  sys::call(SYS_close, tasks);
  return found > 1;
}

}  // namespace

// --- any thread

void Service::leave(Leaving why) noexcept {
  leavers_.fetch_add(1);  // looked at after left_host_ is set, by who opens
  if (!left_host_.load()) return;
  auto seen = static_cast<std::uint32_t>(Leave::no);
  if (leave_.load() == seen) {
    leaves_for_.store(why);
    leave_.compare_exchange_strong(seen, static_cast<std::uint32_t>(Leave::asked));
  }
  nudge();
  const std::int64_t until = now_ns() + kSecond * options_.exit_timeout_s + kCallerNs;
  while ((seen = leave_.load()) != static_cast<std::uint32_t>(Leave::done)) {
    const std::int64_t left = until - now_ns();
    if (left <= 0) {
      RDMA_LOG(warn, "lanes could not be taken down before %s", name_of(why));
      return;
    }
    const timespec wait{left / 1'000'000'000, left % 1'000'000'000};
    sys::call(SYS_futex, sys::arg(&leave_), FUTEX_WAIT, seen, sys::arg(&wait));
  }
}

void Service::stay(Leaving why) noexcept {
  if (why == Leaving::credentials) thread_.store(Thread::stale);
  if (leavers_.fetch_sub(1) == 1) leave_.store(static_cast<std::uint32_t>(Leave::no));
}

/// By a thread of the program, whose credentials the new one has.
void Service::renew_thread() noexcept {
  if (!rdma::has_rdma_devices()) return;
  Thread expected = Thread::stale;
  if (!thread_.compare_exchange_strong(expected, Thread::renewing)) return;
  const std::uint32_t number = last_number_.fetch_add(1) + 1;
  if (const int failed = start_thread(number); failed != 0) {
    RDMA_LOG(warn, "no thread with the new credentials (%s): no lanes to other hosts for now", std::strerror(failed));
    expected = Thread::renewing;
    thread_.compare_exchange_strong(expected, Thread::stale);
    return;
  }
  std::uint32_t newest = newest_.load();
  while (newest < number && !newest_.compare_exchange_weak(newest, number)) {
  }
  nudge();
}

/// In the new thread. Whatever was not let go in time is of no use to it.
void Service::take_turn() noexcept {
  Thread expected = Thread::renewing;
  if (newest_.load() > number_ || !thread_.compare_exchange_strong(expected, Thread::fresh)) return;
  if (left_host_.load()) let_devices_go();
}

void Service::await_names() const noexcept {
  constexpr int kPatienceMs = 50;
  for (int waited = 0; waited < kPatienceMs && starting_.load() != 0; ++waited) sys::call(SYS_poll, 0, 0, 1);
}

// --- the service thread

bool Service::may_leave_host() noexcept {
  left_host_.store(true);  // before the look at leavers_: leave() does it the other way round
  return leavers_.load() == 0 && thread_.load() == Thread::fresh && !credentials_differ();
}

bool Service::may_have_lanes_on(const rdma::Device& device) const noexcept {
  return device.attr().posts_arrive_at_once || leavers_.load() == 0;
}

LaneReason Service::reason_of_end(LaneReason told) const noexcept {
  const bool held_back = leavers_.load() != 0 || thread_.load() != Thread::fresh || credentials_differ();
  return told == LaneReason::other_host && left_host_.load() && held_back ? LaneReason::credentials : told;
}

/// True: look again soon.
bool Service::see_to_leaving() noexcept {
  if (!retired_.empty()) remove_retired_devices();
  const auto state = static_cast<Leave>(leave_.load());
  if (state != Leave::asked && state != Leave::under_way) return false;
  if (state == Leave::asked) begin_leaving();
  const bool through = is_evacuated();
  if (!through && now_ns() < leave_by_ns_) return true;
  if (!through) RDMA_LOG(warn, "not every lane could be taken down in time: what is under way on them is lost");
  if (leaves_for_.load() == Leaving::credentials) let_devices_go();
  leave_.store(static_cast<std::uint32_t>(Leave::done));
  sys::call(SYS_futex, sys::arg(&leave_), FUTEX_WAKE, INT_MAX);
  return false;
}

void Service::begin_leaving() noexcept {
  auto asked = static_cast<std::uint32_t>(Leave::asked);
  leave_.compare_exchange_strong(asked, static_cast<std::uint32_t>(Leave::under_way));
  leave_by_ns_ = now_ns() + kSecond * options_.exit_timeout_s;
  const LaneReason why = reason_of(leaves_for_.load());
  std::vector<std::uint64_t> cookies;
  for (const auto& [cookie, h] : handshakes_)
    if (h.lane != nullptr && h.lane->unordered()) cookies.push_back(cookie);
  for (const std::uint64_t cookie : cookies) {
    Handshake& h = handshakes_[cookie];
    if (h.conn != rdma::cm::ConnId::none) cm_->disconnect(h.conn);
    cm_->withdraw(cookie);
    give_up(h, why);
  }
  for (StreamImpl* s : laned_) {
    (void)s->lock.lock();
    if (s->phase.load() == Phase::laned && s->lane->unordered()) s->take_down_locked(why);
    s->lock.unlock();
  }
}

bool Service::is_evacuated() noexcept {
  const bool by_tcp_too = leaves_for_.load() != Leaving::credentials;
  bool through = inbox_.load() == nullptr && (!by_tcp_too || engine::flush_lingering());
  for (StreamImpl* s : laned_) {
    (void)s->lock.lock();
    if (s->phase.load() == Phase::laned && s->lane->unordered()) {
      s->advance_rx(s->fd);
      s->lane->drain();
      s->tend();
      const bool evacuated = s->is_evacuated() || s->lane_is_over();
      through = through && evacuated && s->last_words_arrived() && (!by_tcp_too || s->resend.empty());
      if (evacuated) s->lane->wake_sleepers();
    }
    s->lock.unlock();
  }
  return through && std::ranges::all_of(dying_, [](const Dying& d) {
           const Lane& lane = *d.lane;
           return !lane.unordered() || d.peer_gone || lane.said(kEndSeen) || lane.said(kGone) || lane.dead();
         });
}

// Who has read nothing yet reads on in our memory, for which the device need not work; it goes when nobody needs that any more.
void Service::let_devices_go() noexcept {
  const auto retired = composition_->retire_devices();
  const auto is_retired = [&](Lane& lane) { return std::ranges::find(retired, lane.device()) != retired.end(); };
  for (StreamImpl* s : laned_) {
    (void)s->lock.lock();
    if (s->phase.load() == Phase::laned && s->lane->unordered()) {
      if (s->is_evacuated() || s->lane_is_left()) {
        s->peer_gone.store(true, std::memory_order_relaxed);
      } else {
        s->break_off(s->fd);
        s->leave_failed_lane(s->fd);
      }
      if (s->stats != nullptr) s->stats->set_reason(LaneReason::credentials);
      s->state_edges.fetch_add(1);
      s->lane->wake_sleepers();
      if (is_retired(*s->lane)) {
        streams_by_conn_.erase(s->conn);
        s->conn = 0;
      }
    }
    s->lock.unlock();
  }
  for (Dying& d : dying_) {
    if (!is_retired(*d.lane)) continue;
    streams_by_conn_.erase(d.conn);
    d.conn = 0;
  }
  channel_->ring();
  left_host_.store(false);
  retired_.insert(retired_.end(), retired.begin(), retired.end());
  retired_until_ns_ = now_ns() + kRetiredNs;
}

void Service::remove_retired_devices() noexcept {
  const auto is_on = [](const rdma::Device& device) {
    return [&device](const auto& each) { return each.lane != nullptr && each.lane->device() == &device; };
  };
  if (now_ns() > retired_until_ns_) {
    for (Dying& d : dying_) d.peer_gone = d.peer_gone || std::ranges::find(retired_, d.lane->device()) != retired_.end();
  }
  composition_->remove_retired([&](const rdma::Device& device) {
    const bool used = std::ranges::any_of(dying_, is_on(device)) ||
                      std::ranges::any_of(laned_, [&](const StreamImpl* s) { return is_on(device)(*s); });
    if (!used) std::erase(retired_, &device);
    return used;
  });
}

// --- the calls

namespace engine {

CredentialsChange::CredentialsChange() noexcept : service_(running_service()) {
  if ((service_ == nullptr && __libc_single_threaded) || !options().transports.leaves_host() || in_vfork_child()) {
    service_ = nullptr;
    return;
  }
  const int saved = errno;
  const bool has_devices = rdma::has_rdma_devices();
  if (has_devices && service_ != nullptr) service_->await_names();
  // Of a device that comes later nobody will know whether it was opened by a thread that all others are like.
  if (!has_devices || has_threads()) g_process_of_many.store(process_id());
  if (service_ != nullptr) service_->leave(Service::Leaving::credentials);
  errno = saved;
}

CredentialsChange::~CredentialsChange() {
  if (service_ == nullptr) return;
  const int saved = errno;
  service_->stay(Service::Leaving::credentials);
  errno = saved;
}

void finish_lanes_for_ring() noexcept {
  Service* const running = running_service();
  if (running == nullptr) return;
  const int saved = errno;
  running->leave(Service::Leaving::ring);
  running->stay(Service::Leaving::ring);
  errno = saved;
}

ExecAttempt::ExecAttempt() noexcept : service_(running_service()) {
  if (service_ != nullptr && in_vfork_child()) service_ = nullptr;
  if (service_ != nullptr) service_->leave(Service::Leaving::exec);
}

ExecAttempt::~ExecAttempt() {
  if (service_ == nullptr) return;
  const int saved = errno;
  service_->stay(Service::Leaving::exec);
  errno = saved;
}

}  // namespace engine

}  // namespace sdp
