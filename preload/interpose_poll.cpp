// poll, ppoll, select, pselect and epoll: the waits that see lanes beside the kernel's descriptors.
#include <sys/select.h>

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <memory>

#include "preload/dispatch.hpp"
#include "preload/epoll_set.hpp"
#include "rdma_core/base/clock.hpp"
#include "rdma_core/base/program_call.hpp"
#include "rdma_core/base/sys.hpp"
#include "rdma_core/base/user_memory.hpp"
#include "sdp/engine.hpp"
#include "sdp/spinner.hpp"

using preload::EpollSet;
using preload::fds;
using preload::libc;
using sdp::Stream;
namespace sys = rdma::sys;

namespace {

constexpr std::int64_t kKernelEveryNs = 20'000;
constexpr std::int64_t kSliceNs = 10'000'000;

std::int64_t now_ns() noexcept { return rdma::SteadyClock{}.now(); }

struct Free {
  void operator()(void* p) const noexcept { std::free(p); }
};
using Owned = std::unique_ptr<pollfd[], Free>;

enum class As : std::uint8_t { poll, select };

/// What select() shows of a descriptor in these sets: a hang-up is something to read, an error to read and to write, and neither is
/// an exception.
constexpr short shown_by_select(short events) noexcept {
  int shown = POLLNVAL;
  if ((events & POLLIN) != 0) shown |= POLLIN | POLLRDNORM | POLLHUP | POLLERR;
  if ((events & POLLOUT) != 0) shown |= POLLOUT | POLLWRNORM | POLLERR;
  if ((events & POLLPRI) != 0) shown |= POLLPRI;
  return static_cast<short>(shown);
}

/// One wait over pollfds, by the protocol of sdp/stream.hpp. `shadow` is what the kernel is asked; entry `count` is the thread's
/// bell. For select() a descriptor of which the kernel tells only what its sets do not show is left out from then on, as `~fd`:
/// poll would tell it again and again.
class LaneWait {
 public:
  LaneWait(pollfd* fds_in, nfds_t count, pollfd* shadow, As as) noexcept : fds_(fds_in), count_(count), shadow_(shadow), as_(as) {}

  int run(std::int64_t timeout_ns, const sigset_t* mask) {
    const std::int64_t deadline = timeout_ns > 0 ? now_ns() + timeout_ns : 0;
    for (nfds_t i = 0; i < count_; ++i)
      if (const Stream s = stream(i)) s.on_wait_entry(fds_[i].fd);
    for (;;) {
      const int by_lanes = lanes();
      if (by_lanes > 0 && only_lanes_ && mask == nullptr && !kernels_turn()) return by_lanes;
      int kernel = ask_kernel(0, mask, false);
      if (kernel < 0) return kernel;
      if (const int ready = total(); ready > 0 || timeout_ns == 0) return ready;
      if (spin(mask)) continue;
      if (const int slept = sleep_alone(deadline, timeout_ns >= 0, mask); slept == -EINTR) {
        return slept;
      } else if (slept == 0) {
        continue;
      }
      sdp::engine::prepare_sleep();
      arm();
      sdp::engine::arm_fence();
      if (lanes() > 0) continue;
      std::int64_t left = -1;
      if (timeout_ns >= 0) left = std::max<std::int64_t>(deadline - now_ns(), 0);
      kernel = ask_kernel(left, mask, true);
      if (kernel < 0) return kernel;
      if (timeout_ns >= 0 && now_ns() >= deadline) {
        lanes();
        ask_kernel(0, nullptr, false);
        return total();
      }
    }
  }

 private:
  Stream stream(nfds_t i) const noexcept {
    const Stream s = fds_[i].fd >= 0 ? fds().find(fds_[i].fd) : Stream{};
    return s && s.has_lane() ? s : Stream{};
  }

  int lanes() noexcept {
    int n = 0;
    only_lanes_ = true;
    for (nfds_t i = 0; i < count_; ++i) {
      fds_[i].revents = 0;
      bool anchor_too = fds_[i].fd >= 0;
      if (const Stream s = stream(i))
        fds_[i].revents = static_cast<short>(s.poll(static_cast<std::uint16_t>(fds_[i].events), &anchor_too));
      only_lanes_ = only_lanes_ && !anchor_too;
      n += fds_[i].revents != 0;
    }
    return n;
  }

  /// Where lanes are ready and nothing else is waited for, the kernel could add an anchor's hang-up, error or urgent byte alone: it
  /// is asked every few calls.
  static bool kernels_turn() noexcept {
    constexpr unsigned kEvery = 8;
    thread_local unsigned calls = 0;
    return ++calls % kEvery == 0;
  }

  int total() const noexcept {
    int n = 0;
    for (nfds_t i = 0; i < count_; ++i) n += fds_[i].revents != 0;
    return n;
  }

  /// Where bytes of one stream are all that is waited for. Once in a call: what wakes it and is none of these may stay. As
  /// Stream::sleep_for_bytes(), but 0 also at the end of the time.
  int sleep_alone(std::int64_t deadline, bool has_deadline, const sigset_t* mask) {
    constexpr int kBytes = POLLIN | POLLRDNORM | POLLPRI | POLLRDHUP | POLLERR | POLLHUP;
    if (count_ != 1 || mask != nullptr || (fds_[0].events & POLLIN) == 0 || (fds_[0].events & ~kBytes) != 0 || has_slept_)
      return -ENOTSUP;
    const Stream s = stream(0);
    if (!s) return -ENOTSUP;
    has_slept_ = true;
    const int slept = s.sleep_for_bytes(has_deadline ? std::max<std::int64_t>(deadline - now_ns(), 0) : -1);
    return slept == -EAGAIN ? 0 : slept;
  }

  void arm() const noexcept {
    const sdp::Grace::Look look(sdp::engine::grace());
    for (nfds_t i = 0; i < count_; ++i)
      if (const Stream s = stream(i)) s.arm(look);
  }

  bool maybe_ready() const noexcept {
    const sdp::Grace::Look look(sdp::engine::grace());
    for (nfds_t i = 0; i < count_; ++i)
      if (const Stream s = stream(i); s && s.maybe_ready(look, static_cast<std::uint16_t>(fds_[i].events))) return true;
    return false;
  }

  /// Adds the kernel's results; `sleep`: with the bell. -errno, or the kernel's count.
  int ask_kernel(std::int64_t timeout_ns, const sigset_t* mask, bool sleep) {
    for (nfds_t i = 0; i < count_; ++i) {
      shadow_[i] = fds_[i];
      shadow_[i].revents = 0;
      if (const Stream s = stream(i))
        shadow_[i].events = static_cast<short>(s.kernel_events(static_cast<std::uint16_t>(fds_[i].events)));
    }
    shadow_[count_] = pollfd{sleep ? sdp::engine::thread_bell_fd() : -1, POLLIN, 0};
    // No bell yet, or none to be had: sleep in slices.
    if (sleep && shadow_[count_].fd < 0 && (timeout_ns < 0 || timeout_ns > kSliceNs)) timeout_ns = kSliceNs;
    timespec ts{timeout_ns / 1'000'000'000, timeout_ns % 1'000'000'000};
    const long args[] = {sys::arg(shadow_), static_cast<long>(count_ + 1), timeout_ns >= 0 ? sys::arg(&ts) : 0, sys::arg(mask)};
    // One with a mask of its own may bring handlers, too.
    const long r = sleep             ? sys::blocking_call(sys::EndedBy::any, SYS_ppoll, args[0], args[1], args[2], args[3], 8)
                   : mask != nullptr ? sys::sleeping_call(sys::EndedBy::nothing, SYS_ppoll, args[0], args[1], args[2], args[3], 8)
                                     : sys::call(SYS_ppoll, args[0], args[1], args[2], 0, 8);
    if (r < 0) return static_cast<int>(r);
    for (nfds_t i = 0; i < count_; ++i) {
      if (as_ == As::select) hide(fds_[i], shadow_[i]);
      fds_[i].revents = static_cast<short>(fds_[i].revents | shadow_[i].revents);
    }
    return static_cast<int>(r);
  }

  static void hide(pollfd& entry, pollfd& kernels) noexcept {
    const auto shown = static_cast<short>(kernels.revents & shown_by_select(entry.events));
    if (kernels.revents != 0 && shown == 0) entry.fd = ~entry.fd;
    kernels.revents = shown;
  }

  bool spin(const sigset_t* mask) {
    std::int64_t kernel_due = now_ns() + kKernelEveryNs;
    int looks = 0;
    return sdp::Spinner(static_cast<std::uint32_t>(count_)).run([&]() {
      if (maybe_ready()) return true;
      if (++looks % 64 != 0 || now_ns() < kernel_due) return false;
      kernel_due = now_ns() + kKernelEveryNs;
      return ask_kernel(0, mask, false) > 0;
    });
  }

  pollfd* fds_;
  nfds_t count_;
  pollfd* shadow_;
  const As as_;
  bool has_slept_ = false;
  bool only_lanes_ = false;
};

/// Counts the calling thread as a waiter that has no bell, on every tracked stream of the set.
class PlainWait {
 public:
  PlainWait(const pollfd* set, nfds_t count) noexcept : set_(set), count_(count) {
    each([](Stream s) { s.enter_plain_wait(); });
  }
  ~PlainWait() {
    each([](Stream s) { s.leave_plain_wait(); });
  }

 private:
  template <class F>
  void each(F f) const noexcept {
    for (nfds_t i = 0; i < count_; ++i)
      if (set_[i].fd >= 0)
        if (const Stream s = fds().find(set_[i].fd)) f(s);
  }
  const pollfd* set_;
  nfds_t count_;
};

/// Is `fd` an epoll instance, which is about to be waited for itself?
void nest_set(int fd) noexcept {
  if (fds().kind(fd) != preload::Kind::epoll_set) [[likely]]
    return;
  if (EpollSet* inner = EpollSet::make(fd)) inner->nest();
}

bool any_lane(const pollfd* set, nfds_t count) noexcept {
  for (nfds_t i = 0; i < count; ++i)
    if (set[i].fd >= 0)
      if (const Stream s = fds().find(set[i].fd); s && s.has_lane()) return true;
  return false;
}
bool any_stream(const pollfd* set, nfds_t count) noexcept {
  bool any = false;
  for (nfds_t i = 0; i < count; ++i) {
    if (set[i].fd < 0) continue;
    any = any || static_cast<bool>(fds().find(set[i].fd));
    nest_set(set[i].fd);
  }
  return any;
}

/// `plain` is libc's way; it runs when no lane is concerned.
template <class Plain>
[[gnu::noinline]] int wait_for(pollfd* set, nfds_t count, std::int64_t timeout_ns, const sigset_t* mask, As as, Plain plain) {
  constexpr nfds_t kOnStack = 64;
  if (count > (1U << 20) || !rdma::is_readable(set, count * sizeof *set) || !any_stream(set, count)) return plain();
  if (!any_lane(set, count)) {
    PlainWait counted(set, count);
    if (!any_lane(set, count)) return plain();  // either we saw the lane, or the switch sees us
  }
  pollfd stack[kOnStack + 1];
  const Owned large(count <= kOnStack ? nullptr : static_cast<pollfd*>(std::malloc((count + 1) * sizeof(pollfd))));
  pollfd* const shadow = count <= kOnStack ? stack : large.get();
  if (shadow == nullptr) {
    errno = ENOMEM;
    return -1;
  }
  return preload::to_libc<int>(preload::cancellable([&] { return LaneWait(set, count, shadow, as).run(timeout_ns, mask); }));
}

/// -1: for ever. The caller has asked valid().
std::int64_t to_ns(const timespec* ts) noexcept {
  return ts == nullptr ? -1 : static_cast<std::int64_t>(ts->tv_sec) * 1'000'000'000 + ts->tv_nsec;
}
bool valid(const timespec* ts) noexcept {
  return ts == nullptr || (ts->tv_sec >= 0 && ts->tv_nsec >= 0 && ts->tv_nsec < 1'000'000'000);
}

template <class Plain>
int select_for(int n, fd_set* r, fd_set* w, fd_set* e, std::int64_t timeout_ns, const sigset_t* mask, Plain plain) {
  const auto in = [](int fd, const fd_set* s) { return s != nullptr && FD_ISSET(fd, s); };
  for (const fd_set* const s : {r, w, e})
    if (s != nullptr && n > 0 && !rdma::is_readable(s, (static_cast<std::size_t>(std::min(n, FD_SETSIZE)) + 7) / 8)) return plain();
  bool tracked = false;
  nfds_t count = 0;
  for (int fd = 0; fd < n && fd < FD_SETSIZE; ++fd) {
    if (!in(fd, r) && !in(fd, w) && !in(fd, e)) continue;
    ++count;
    tracked = tracked || static_cast<bool>(fds().find(fd));
  }
  if (!tracked || n > FD_SETSIZE) return plain();
  const Owned owned(static_cast<pollfd*>(std::malloc(count * sizeof(pollfd))));
  pollfd* const set = owned.get();
  if (set == nullptr) {
    errno = ENOMEM;
    return -1;
  }
  nfds_t at = 0;
  for (int fd = 0; fd < n; ++fd) {
    if (!in(fd, r) && !in(fd, w) && !in(fd, e)) continue;
    short events = 0;
    if (in(fd, r)) events |= POLLIN | POLLRDNORM;
    if (in(fd, w)) events |= POLLOUT | POLLWRNORM;
    if (in(fd, e)) events |= POLLPRI;
    set[at++] = pollfd{fd, events, 0};
  }
  bool went_plain = false;
  int result = wait_for(set, count, timeout_ns, mask, As::select, [&] {
    went_plain = true;
    return plain();
  });
  if (!went_plain && result >= 0) {
    result = 0;
    for (nfds_t i = 0; i < count; ++i)
      if (set[i].revents & POLLNVAL) result = -1;
    if (result < 0) {
      errno = EBADF;
    } else {
      for (nfds_t i = 0; i < count; ++i) {
        const int fd = set[i].fd >= 0 ? set[i].fd : ~set[i].fd;
        const auto settle = [&](fd_set* s, short event) {
          if (s == nullptr || !FD_ISSET(fd, s)) return;
          if (set[i].revents & shown_by_select(event))
            ++result;
          else
            FD_CLR(fd, s);
        };
        settle(r, POLLIN);
        settle(w, POLLOUT);
        settle(e, POLLPRI);
      }
    }
  }
  return result;
}

}  // namespace

// A process without streams pays one look for each call; what follows has large frames.
namespace {
bool no_stream_yet() noexcept { return !fds().ever_used(); }
}  // namespace

SDP_EXPORT int poll(pollfd* set, nfds_t count, int timeout) {
  if (no_stream_yet()) [[likely]]
    return libc().poll(set, count, timeout);
  return wait_for(set, count, timeout < 0 ? -1 : static_cast<std::int64_t>(timeout) * 1'000'000, nullptr, As::poll,
                  [&] { return libc().poll(set, count, timeout); });
}
SDP_EXPORT int ppoll(pollfd* set, nfds_t count, const timespec* timeout, const sigset_t* mask) {
  if (no_stream_yet() || !valid(timeout)) return libc().ppoll(set, count, timeout, mask);
  return wait_for(set, count, to_ns(timeout), mask, As::poll, [&] { return libc().ppoll(set, count, timeout, mask); });
}
SDP_EXPORT int select(int n, fd_set* r, fd_set* w, fd_set* e, timeval* timeout) {
  if (no_stream_yet() || (timeout != nullptr && (timeout->tv_sec < 0 || timeout->tv_usec < 0)))
    return libc().select(n, r, w, e, timeout);
  std::int64_t ns = -1;
  if (timeout != nullptr)
    ns = static_cast<std::int64_t>(timeout->tv_sec) * 1'000'000'000 + static_cast<std::int64_t>(timeout->tv_usec) * 1000;
  const std::int64_t begun = timeout != nullptr ? now_ns() : 0;
  bool plain = false;
  const int result = select_for(n, r, w, e, ns, nullptr, [&] {
    plain = true;
    return libc().select(n, r, w, e, timeout);
  });
  if (!plain && timeout != nullptr) {
    const std::int64_t left = std::max<std::int64_t>(ns - (now_ns() - begun), 0);
    timeout->tv_sec = left / 1'000'000'000;
    timeout->tv_usec = left % 1'000'000'000 / 1000;
  }
  return result;
}
SDP_EXPORT int pselect(int n, fd_set* r, fd_set* w, fd_set* e, const timespec* timeout, const sigset_t* mask) {
  if (no_stream_yet() || !valid(timeout)) return libc().pselect(n, r, w, e, timeout, mask);
  return select_for(n, r, w, e, to_ns(timeout), mask, [&] { return libc().pselect(n, r, w, e, timeout, mask); });
}

SDP_EXPORT int __poll(pollfd* set, nfds_t count, int timeout) { return poll(set, count, timeout); }
SDP_EXPORT int __select(int n, fd_set* r, fd_set* w, fd_set* e, timeval* timeout) { return select(n, r, w, e, timeout); }

extern "C" void __chk_fail(void) __attribute__((noreturn));
SDP_EXPORT int __poll_chk(pollfd* set, nfds_t count, int timeout, size_t room) {
  if (count > room / sizeof(pollfd)) __chk_fail();
  if (no_stream_yet()) [[likely]]
    return libc().poll(set, count, timeout);
  return poll(set, count, timeout);
}
SDP_EXPORT int __ppoll_chk(pollfd* set, nfds_t count, const timespec* timeout, const sigset_t* mask, size_t room) {
  if (count > room / sizeof(pollfd)) __chk_fail();
  return ppoll(set, count, timeout, mask);
}

// --- epoll

SDP_EXPORT int epoll_create1(int flags) noexcept {
  const int fd = libc().epoll_create1(flags);
  if (fd >= 0) preload::remember_new(fd, preload::Kind::epoll_set);
  return fd;
}
SDP_EXPORT int epoll_create(int size) noexcept {
  if (size > 0) return epoll_create1(0);
  errno = EINVAL;
  return -1;
}

SDP_EXPORT int epoll_ctl(int epfd, int op, int fd, epoll_event* event) noexcept {
  const Stream stream = fds().find(fd);
  if (!stream) [[likely]] {
    if (op == EPOLL_CTL_ADD) nest_set(fd);
    return libc().epoll_ctl(epfd, op, fd, event);
  }
  const sys::ProgramCall here;
  EpollSet* set = EpollSet::find(epfd);
  int result = 0;
  if (op == EPOLL_CTL_MOD && set != nullptr && rdma::is_readable(event, sizeof *event) && set->modify(fd, *event, &result))
    return result;
  if (op == EPOLL_CTL_ADD && rdma::is_readable(event, sizeof *event)) {
    if (set == nullptr) set = EpollSet::make(epfd);
    if (set != nullptr) {
      result = preload::to_libc<int>(set->add(fd, stream, *event));
      if (result == 0) fds().set_kind(epfd, preload::Kind::epoll_set);  // also one that came by exec or from another process
      return result;
    }
  }
  result = libc().epoll_ctl(epfd, op, fd, event);
  if (op == EPOLL_CTL_ADD && result == 0) stream.take_down(sdp::LaneReason::no_resources);  // there are no more sets
  if (op == EPOLL_CTL_DEL && result == 0 && set != nullptr) set->removed(fd);
  return result;
}

namespace {
/// Also of an instance without a stream of ours: the first may be added while we wait, and what is told then has our tag.
EpollSet* set_to_wait_for(int epfd) noexcept {
  EpollSet* const set = EpollSet::find(epfd);
  if (set != nullptr || fds().kind(epfd) != preload::Kind::epoll_set || sdp::engine::options().policy == sdp::Family::tcp)
    return set;
  return EpollSet::make(epfd);
}

template <class Plain>
int epoll_for(int epfd, epoll_event* events, int max, std::int64_t timeout_ns, const sigset_t* mask, Plain plain) {
  EpollSet* const set = max > 0 ? set_to_wait_for(epfd) : nullptr;
  if (set == nullptr) return plain();
  epoll_event unseen;
  const bool bad = !rdma::is_readable(events, sizeof *events);
  return preload::to_libc<int>(preload::cancellable([&] {
    const int n = bad ? set->wait(&unseen, 1, timeout_ns, mask) : set->wait(events, max, timeout_ns, mask);
    return bad && n > 0 ? -EFAULT : n;
  }));
}
}  // namespace

SDP_EXPORT int epoll_wait(int epfd, epoll_event* events, int max, int timeout) {
  return epoll_for(epfd, events, max, timeout < 0 ? -1 : static_cast<std::int64_t>(timeout) * 1'000'000, nullptr,
                   [&] { return libc().epoll_wait(epfd, events, max, timeout); });
}
SDP_EXPORT int epoll_pwait(int epfd, epoll_event* events, int max, int timeout, const sigset_t* mask) {
  return epoll_for(epfd, events, max, timeout < 0 ? -1 : static_cast<std::int64_t>(timeout) * 1'000'000, mask,
                   [&] { return libc().epoll_pwait(epfd, events, max, timeout, mask); });
}
SDP_EXPORT int epoll_pwait2(int epfd, epoll_event* events, int max, const timespec* timeout, const sigset_t* mask) {
  if (!valid(timeout)) return preload::to_libc<int>(-EINVAL);
  return epoll_for(epfd, events, max, to_ns(timeout), mask, [&] {
    return preload::to_libc<int>(sys::call(SYS_epoll_pwait2, epfd, sys::arg(events), max, sys::arg(timeout), sys::arg(mask), 8));
  });
}
