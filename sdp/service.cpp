#include "sdp/service.hpp"

#include <pthread.h>
#include <signal.h>
#include <sys/epoll.h>
#include <sys/eventfd.h>

#include <algorithm>
#include <cerrno>
#include <cstdint>
#include <cstring>
#include <mutex>
#include <new>
#include <utility>

#include "rdma_core/base/clock.hpp"
#include "rdma_core/base/log.hpp"
#include "rdma_core/base/sys.hpp"

namespace sdp {

namespace sys = rdma::sys;

namespace {

constexpr std::uint64_t kWakeTag = 1, kCmTag = 2, kBellTag = 3, kLinksTag = 4;  // all others are StreamImpl addresses
constexpr int kTendMs = 20;
constexpr int kReleaseMs = 250;
constexpr int kStrangersMs = 1000;
constexpr int kLeaveMs = 5;

/// The thread wakes rarely and works for microseconds, but both cores are often busy with the very stream that waits for its lane.
/// A short slice makes the scheduler run it at once (EEVDF, Linux 6.12; others ignore it). Not a priority: it gets no more time
/// than others.
void ask_for_short_slices() noexcept {
  struct {
    std::uint32_t size, policy;
    std::uint64_t flags;
    std::int32_t nice;
    std::uint32_t priority;
    std::uint64_t runtime, deadline, period;
  } attr{};
  attr.size = sizeof attr;
  attr.nice = 20 - static_cast<std::int32_t>(sys::call(SYS_getpriority, 0 /* PRIO_PROCESS */, 0));  // as it is
  attr.runtime = 100'000;                                                                           // ns, the least that is taken
  attr.flags = 0x08;                                                                                // SCHED_FLAG_KEEP_POLICY
  sys::call(SYS_sched_setattr, 0, sys::arg(&attr), 0);
}

}  // namespace

Service* Service::start(const Options& options, engine::Compose compose) noexcept {
  auto* service = new (std::nothrow) Service(options, compose);
  if (service == nullptr) return nullptr;
  service->wake_fd_.store(engine::high_fd(static_cast<int>(sys::call(SYS_eventfd2, 0, EFD_NONBLOCK | EFD_CLOEXEC))));
  service->epoll_fd_ = engine::high_fd(static_cast<int>(sys::call(SYS_epoll_create1, EPOLL_CLOEXEC)));
  const bool has_fds = service->wake_fd_.load() >= 0 && service->epoll_fd_ >= 0;
  if (const int failed = has_fds ? service->start_thread(1) : EMFILE; failed != 0) {
    RDMA_LOG(warn, "no service thread (%s): everything stays on TCP", has_fds ? std::strerror(failed) : "no descriptors");
    for (const int fd : {service->wake_fd_.load(), service->epoll_fd_}) {
      if (fd < 0) continue;
      engine::forget_helper_fd(fd);
      sys::call(SYS_close, fd);
    }
    delete service;
    return nullptr;
  }
  return service;
}

/// 0, or an error number.
int Service::start_thread(std::uint32_t number) noexcept {
  auto* start = new (std::nothrow) ThreadStart{this, number};
  if (start == nullptr) return ENOMEM;
  sigset_t all, old;
  sigfillset(&all);
  pthread_sigmask(SIG_SETMASK, &all, &old);
  pthread_attr_t attr;
  pthread_attr_init(&attr);
  pthread_attr_setdetachstate(&attr, PTHREAD_CREATE_DETACHED);
  pthread_attr_setstacksize(&attr, 512 * 1024);
  pthread_t thread;
  starting_.fetch_add(1);
  const int failed = pthread_create(&thread, &attr, thread_main, start);
  pthread_attr_destroy(&attr);
  pthread_sigmask(SIG_SETMASK, &old, nullptr);
  if (failed == 0) return 0;
  starting_.fetch_sub(1);
  delete start;
  return failed;
}

void* Service::thread_main(void* mine) noexcept {
  const std::unique_ptr<ThreadStart> start(static_cast<ThreadStart*>(mine));
  Service& service = *start->service;
  pthread_setname_np(pthread_self(), kServiceThreadName);
  service.starting_.fetch_sub(1);
  ask_for_short_slices();
  const std::lock_guard turn(service.turn_);  // the one before it leaves first
  service.number_ = start->number;
  service.run();
  return nullptr;
}

bool Service::open() noexcept {
  composition_ = compose_ != nullptr ? compose_(options_) : nullptr;
  if (composition_ == nullptr) return false;
  if (!take_devices()) return false;
  cm_ = &composition_->cm();
  composition_->ask_before_opening([this] { return may_leave_host(); });
  cm_->on_event([this](const rdma::cm::Event& event) { on_cm_event(event); });
  cm_->on_transcript([this](std::uint64_t cookie) { return transcript_of(cookie); });
  const auto watch = [this](int fd, std::uint32_t events, std::uint64_t tag) {
    epoll_event ev{events, {.u64 = tag}};
    return sys::call(SYS_epoll_ctl, epoll_fd_, EPOLL_CTL_ADD, fd, sys::arg(&ev)) == 0;
  };
  open_links();
  // Where a filter of system calls forbids one of these (seccomp), a thread that never wakes, or never sleeps, is of no use.
  epoll_event none[1];
  if (!watch(wake_fd_.load(), EPOLLIN, kWakeTag) || !watch(cm_->fd(), EPOLLIN, kCmTag) ||
      sys::call(SYS_epoll_pwait, epoll_fd_, sys::arg(none), 1, 0, 0, 8) < 0)
    return false;
  watch(links_->fd(), EPOLLIN, kLinksTag);
  bell_fd_.store(channel_->fd(), std::memory_order_release);
  return true;
}

void Service::run() noexcept {
  if (cm_ == nullptr && !open()) {
    RDMA_LOG(warn, "no device carries SDP here: everything stays on TCP");
    is_idle_.store(true);  // before the look at what has been asked: submit() does it the other way round
    refuse_all();
    return;
  }
  take_turn();
  while (newest_.load() <= number_) {
    take_commands();
    poll_handshakes();
    look_for_rings();
    tend_watched();
    look_after_lanes();
    release_buffers();
    const bool leaving = see_to_leaving();
    const int next_return_ms = tend_returns(), next_look_ms = tend_seekers();
    int timeout = cm_->next_timeout_ms();
    const bool busy = !handshakes_.empty() || !dying_.empty();
    const bool lingering = !engine::flush_lingering();
    const auto at_most = [&timeout](int ms) { timeout = timeout < 0 ? ms : std::min(timeout, ms); };
    if (busy || needs_looks_ || lingering) at_most(kTendMs);
    if (leaving) at_most(kLeaveMs);
    if (next_return_ms >= 0) at_most(next_return_ms);
    if (next_look_ms >= 0) at_most(next_look_ms);
    if (releasing_.load(std::memory_order_relaxed)) at_most(kReleaseMs);
    if (const int ms = tend_held(); ms >= 0) at_most(ms);
    if (links_->strangers() != 0) {
      links_->progress();
      at_most(kStrangersMs);
    }
    if (!laned_.empty()) at_most(next_words_ms());
    await_work(timeout);
    cm_->progress();
  }
}

// What a device announces is passed on at once and is no work by itself: a message for which a thread sleeps must not cost a round
// of everything.
void Service::await_work(int timeout_ms) noexcept {
  const bool wants_announcements = !handshakes_.empty() || !dying_.empty() || needs_looks_;
  listen_to_bell(wants_announcements);
  const rdma::SteadyClock clock;
  const std::int64_t until = timeout_ms >= 0 ? clock.now() + std::int64_t{timeout_ms} * 1'000'000 : INT64_MAX;
  for (;;) {
    epoll_event events[32];
    const long n = sys::call(SYS_epoll_pwait, epoll_fd_, sys::arg(events), 32, timeout_ms, 0, 8);
    bool work = n <= 0 || wants_announcements;
    for (long i = 0; i < n; ++i) {
      const std::uint64_t tag = events[i].data.u64;
      if (pass_on(tag)) {
        if (held_back_) (void)flush_held();
        continue;
      }
      work = true;
      if (tag == kWakeTag) {
        std::uint64_t count = 0;
        sys::call(SYS_read, wake_fd_.load(), sys::arg(&count), sizeof count);
      } else if (tag == kLinksTag) {
        links_->progress();
      } else if (tag != kCmTag && tag != kBellTag) {
        on_anchor(reinterpret_cast<StreamImpl*>(tag));
      }
    }
    if (work) return;
    if (timeout_ms >= 0) {
      const std::int64_t left = until - clock.now();
      if (left <= 0) return;
      timeout_ms = static_cast<int>((left + 999'999) / 1'000'000);
    }
  }
}

// All threads of the process have one bell; each ring that is not for this thread is a wake-up for nothing. A bell that has ever
// been rung is ready at once where it begins to listen.
void Service::listen_to_bell(bool listens) noexcept {
  if (std::exchange(listens_to_bell_, listens) == listens) return;
  epoll_event ev{EPOLLIN | EPOLLET, {.u64 = kBellTag}};
  sys::call(SYS_epoll_ctl, epoll_fd_, listens ? EPOLL_CTL_ADD : EPOLL_CTL_DEL, channel_->fd(), sys::arg(&ev));
}

// A push never waits, locks or allocates: close() may come from a signal handler.
void Service::submit(StreamImpl* stream, std::uint8_t what) noexcept {
  if (stream->commands.fetch_or(what, std::memory_order_acq_rel) == 0) {
    StreamImpl* head = inbox_.load(std::memory_order_relaxed);
    do {
      stream->next_command = head;
    } while (!inbox_.compare_exchange_weak(head, stream, std::memory_order_seq_cst, std::memory_order_relaxed));
  }
  if (is_idle_.load()) return refuse_all();
  nudge();
}

/// There is no thread that could make lanes: by whoever asks for one.
void Service::refuse_all() noexcept {
  for (StreamImpl* stream = inbox_.exchange(nullptr); stream != nullptr;) {
    StreamImpl* const next = stream->next_command;
    const std::uint8_t what = stream->commands.exchange(0, std::memory_order_acq_rel);
    if (what & kClosed) {
      (void)engine::free_at_once(stream);  // in a handler's place its cell is lost
    } else if (what & kPursue) {
      (void)stream->lock.lock();
      if (stream->phase.load() == Phase::pursued) stream->take_down_locked(LaneReason::no_resources);
      stream->lock.unlock();
      search_is_over(stream);
    }
    stream = next;
  }
}

void Service::pursue(StreamImpl* stream) noexcept {
  if (thread_.load() == Thread::stale) renew_thread();
  submit(stream, kPursue);
}

// The cell goes back only through the service thread, after it has forgotten the stream: nothing of a stream outlives it here.
void Service::closed(StreamImpl* stream, int fd) noexcept {
  if (stream->watched) sys::call(SYS_epoll_ctl, epoll_fd_, EPOLL_CTL_DEL, fd, 0);
  submit(stream, kClosed);
}

void Service::buffer_is_large() noexcept {
  if (!releasing_.exchange(true, std::memory_order_seq_cst)) nudge();
}

void Service::look_for_held() noexcept {
  if (!holding_.exchange(true, std::memory_order_seq_cst)) nudge();
}

void Service::nudge() noexcept {
  const std::uint64_t one = 1;
  sys::call(SYS_write, wake_fd_.load(std::memory_order_relaxed), sys::arg(&one), sizeof one);
}

void Service::take_commands(Take which) noexcept {
  for (StreamImpl* stream = inbox_.exchange(nullptr, std::memory_order_acquire); stream != nullptr;) {
    StreamImpl* const next = stream->next_command;
    const bool has_to_wait = which == Take::closed && (stream->commands.load(std::memory_order_acquire) & kClosed) == 0;
    const bool is_the_next_threads = newest_.load() > number_;  // which has the credentials for it
    if (has_to_wait || is_the_next_threads) {
      stream->next_command = inbox_.load(std::memory_order_relaxed);
      while (!inbox_.compare_exchange_weak(stream->next_command, stream, std::memory_order_release, std::memory_order_relaxed)) {
      }
      stream = next;
      continue;
    }
    const std::uint8_t what = stream->commands.exchange(0, std::memory_order_acq_rel);
    if (what & kClosed)
      forget(stream);
    else if (what & kPursue)
      begin(stream, stream->generation.load());
    stream = next;
  }
}

void Service::abandon_in_child() noexcept {
  if (composition_ != nullptr) composition_->abandon_in_child();
  if (links_ != nullptr) links_->abandon_in_child();
  for (const auto& [device, channel] : channels_) channel->abandon_in_child();
  engine::forget_helper_fd(epoll_fd_);
  sys::call(SYS_close, epoll_fd_);
}

}  // namespace sdp
