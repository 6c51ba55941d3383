#include "preload/epoll_set.hpp"

#include <fcntl.h>
#include <poll.h>
#include <sys/random.h>

#include <algorithm>
#include <cerrno>
#include <new>

#include "preload/fd_table.hpp"
#include "preload/libc.hpp"
#include "rdma_core/base/clock.hpp"
#include "rdma_core/base/program_call.hpp"
#include "rdma_core/base/sys.hpp"
#include "sdp/engine.hpp"
#include "sdp/spinner.hpp"

namespace preload {

namespace sys = rdma::sys;

namespace {

constexpr std::uint32_t kModeBits = EPOLLET | EPOLLONESHOT | EPOLLWAKEUP | EPOLLEXCLUSIVE;
constexpr std::uint32_t kBellIndex = 0xffffff;
constexpr std::int64_t kKernelEveryNs = 20'000;
constexpr std::uint32_t kLooksPerClock = 64;  ///< at one lane
constexpr int kMaxSets = 1 << 16;

std::mutex sets_mutex;
std::atomic<EpollSet*> sets[kMaxSets];
std::atomic<int> highest_set{-1};

std::int64_t now_ns() noexcept { return rdma::SteadyClock{}.now(); }

/// 40 random bits of this process, then a member's index: no program's own data looks like that but by a chance of 2^-40.
std::uint64_t tag_base() noexcept {
  static const std::uint64_t base = [] {
    std::uint64_t random = 0;
    sys::call(SYS_getrandom, sys::arg(&random), sizeof random, 0);
    return random << 24;
  }();
  return base;
}

}  // namespace

EpollSet* EpollSet::find(int epfd) noexcept {
  return static_cast<unsigned>(epfd) < kMaxSets ? sets[epfd].load(std::memory_order_acquire) : nullptr;
}

EpollSet* EpollSet::make(int epfd) noexcept {
  if (static_cast<unsigned>(epfd) >= kMaxSets) return nullptr;
  std::lock_guard guard(sets_mutex);
  EpollSet* set = sets[epfd].load();
  if (set == nullptr) {
    set = new (std::nothrow) EpollSet(epfd);
    sets[epfd].store(set, std::memory_order_release);
    highest_set.store(std::max(highest_set.load(), epfd));
  }
  return set;
}

// A thread may still be inside wait() of a set that is closed; the object is left to it. Sets are few and small.
void EpollSet::drop(int epfd) noexcept {
  EpollSet* const set = find(epfd);
  if (set == nullptr) return;
  std::lock_guard guard(sets_mutex);
  sets[epfd].store(nullptr, std::memory_order_release);
  for (int i = 0; i <= highest_set.load(); ++i)
    if (sets[i].load() == set) set->epfd_ = i;  // it was duplicated
}

void EpollSet::duplicate(int from, int to) noexcept {
  EpollSet* set = find(from);
  if (set == nullptr || static_cast<unsigned>(to) >= kMaxSets) return;
  std::lock_guard guard(sets_mutex);
  sets[to].store(set, std::memory_order_release);
  highest_set.store(std::max(highest_set.load(), to));
}

namespace {
/// Each set once, by whichever of its descriptors it goes.
template <class Each>
void for_each_set(Each&& each) noexcept {
  for (int i = 0; i <= highest_set.load(); ++i)
    if (EpollSet* const set = sets[i].load(); set != nullptr && set->names(i)) each(*set);
}
}  // namespace

void EpollSet::before_fork() noexcept {
  sets_mutex.lock();
  for_each_set([](EpollSet& set) { set.mutex_.lock(); });
}

void EpollSet::after_fork_parent() noexcept {
  for_each_set([](EpollSet& set) { set.mutex_.unlock(); });
  sets_mutex.unlock();
}

// The bell in them is the parent's: it wakes nobody here for nothing more than one look.
void EpollSet::inherit() noexcept {
  for_each_set([](EpollSet& set) {
    set.sleepers_ = 0;
    set.bell_ = -1;
    for (Member& m : set.members_) {
      if (m.fd == kFree) continue;
      m.look = true;
      if (const sdp::Stream mine = fds().heir_of(m.stream))
        m.stream = mine;
      else
        set.release(m);  // closed behind our back: what is left of it is the parent's
    }
  });
  after_fork_parent();
}

void EpollSet::on_lane_changed(sdp::Stream stream) noexcept {
  std::lock_guard guard(sets_mutex);
  for (int i = 0; i <= highest_set.load(); ++i) {
    EpollSet* set = sets[i].load();
    if (set == nullptr) continue;
    std::lock_guard inner(set->mutex_);
    for (std::uint32_t m = 0; m < set->members_.size(); ++m) {
      if (set->members_[m].stream.word() != stream.word()) continue;
      set->sync(set->members_[m], m);
      // Who sleeps looks for himself: another thread's receive may switch the stream over meanwhile.
      if (set->members_[m].lane && set->sleepers_.load() != 0) sdp::engine::ring_bell();
    }
  }
}

void EpollSet::on_closing(int fd, sdp::Stream stream, bool last) noexcept {
  const int high = highest_set.load();
  for (int i = 0; i <= high; ++i) {
    EpollSet* set = sets[i].load();
    if (set == nullptr || !set->has_members()) continue;
    std::lock_guard inner(set->mutex_);
    if (Member* m = set->of(fd); m != nullptr && m->stream.word() == stream.word()) {
      if (!last) {
        set->orphan(*m);
      } else {
        if (stream.has_heirs()) set->give_back(*m);
        set->release(*m);
      }
    }
    if (!last || set->orphans_ == 0) continue;
    for (Member& m : set->members_)
      if (m.fd == kOrphan && m.stream.word() == stream.word()) set->release(m);
  }
}

// Nobody can change the kernel's entry once its number is closed: it is left watching everything, under our tag.
void EpollSet::orphan(Member& m) noexcept {
  epoll_event ev{m.disabled ? 0 : m.events, {.u64 = tag_base() | index_of(m)}};
  sys::call(SYS_epoll_ctl, epfd_, EPOLL_CTL_MOD, m.fd, sys::arg(&ev));
  count_lane(m, true);
  m.tagged = true;
  by_fd_.erase(m.fd);
  m.fd = kOrphan;
  ++orphans_;
}

void EpollSet::give_back(Member& m) noexcept {
  if (!m.tagged) return;
  epoll_event ev{m.disabled ? std::uint32_t{EPOLLET} : m.events, {.u64 = m.data}};
  sys::call(SYS_epoll_ctl, epfd_, EPOLL_CTL_MOD, m.fd, sys::arg(&ev));
}

void EpollSet::release(Member& m) noexcept {
  count_lane(m, false);
  if (m.fd == kOrphan)
    --orphans_;
  else
    by_fd_.erase(m.fd);
  m = Member{};
  free_.push_back(index_of(m));
  members_in_use_.fetch_sub(1);
}

std::uint32_t EpollSet::index_of(const Member& m) const noexcept { return static_cast<std::uint32_t>(&m - members_.data()); }

EpollSet::Member* EpollSet::of(int fd) noexcept {
  const auto found = by_fd_.find(fd);
  return found != by_fd_.end() ? &members_[found->second] : nullptr;
}

void EpollSet::ensure_bell() noexcept {
  const int bell = sdp::engine::bell_fd();
  if (bell < 0 || bell == bell_) return;
  epoll_event ev{EPOLLIN | EPOLLET, {.u64 = tag_base() | kBellIndex}};
  if (sys::call(SYS_epoll_ctl, epfd_, EPOLL_CTL_ADD, bell, sys::arg(&ev)) == 0) bell_ = bell;
}

void EpollSet::count_lane(Member& m, bool lane) noexcept {
  if (lane != m.lane) lanes_.fetch_add(lane ? 1 : -1);
  m.lane = lane;
}

epoll_event EpollSet::kernel_entry(const Member& m, std::uint32_t index, bool lane) const noexcept {
  // Nothing stops the kernel telling of errors and hang-ups: once, then.
  std::uint32_t mask = m.disabled ? std::uint32_t{EPOLLET} : m.events;
  if (lane && !m.disabled) mask = m.stream.kernel_events(m.events & ~kModeBits) | (m.events & kModeBits);
  return {mask, {.u64 = lane || (m.events & EPOLLONESHOT) != 0 ? tag_base() | index : m.data}};
}

void EpollSet::sync(Member& m, std::uint32_t index) noexcept {
  const bool lane = m.stream.has_lane();
  if (m.fd == kOrphan || (!lane && !m.tagged)) return;
  if (lane) ensure_bell();
  epoll_event ev = kernel_entry(m, index, lane);
  if (m.tagged && lane == m.lane && ev.events == m.kernel_mask) return;
  if (sys::call(SYS_epoll_ctl, epfd_, EPOLL_CTL_MOD, m.fd, sys::arg(&ev)) == 0) is_entered(m, index, ev, lane);
}

void EpollSet::is_entered(Member& m, std::uint32_t index, const epoll_event& entry, bool lane) noexcept {
  m.kernel_mask = entry.events;
  m.tagged = entry.data.u64 == (tag_base() | index);
  count_lane(m, lane);
  if (lane && !m.disabled && (nested_.load(std::memory_order_relaxed) || sleepers_.load() != 0)) arm_for_others(m);
}

/// Who sleeps has not armed it, and where the set itself is waited for nobody may be in wait() to do so.
void EpollSet::arm_for_others(const Member& m) noexcept {
  const sdp::Grace::Look look(sdp::engine::grace());
  m.stream.arm(look);
  sdp::engine::arm_fence();
  if (m.stream.poll(m.events & ~kModeBits) != 0) sdp::engine::ring_bell();
}

int EpollSet::add(int fd, sdp::Stream stream, const epoll_event& event) noexcept {
  epoll_event ev = event;
  if (event.events & EPOLLEXCLUSIVE) {
    const long result = sys::call(SYS_epoll_ctl, epfd_, EPOLL_CTL_ADD, fd, sys::arg(&ev));
    if (result == 0) stream.take_down(sdp::LaneReason::mode);
    return static_cast<int>(result);
  }
  std::lock_guard guard(mutex_);
  if (free_.empty()) {
    free_.push_back(static_cast<std::uint32_t>(members_.size()));
    members_.emplace_back();
  }
  const std::uint32_t index = free_.back();
  Member& m = members_[index];
  m.stream = stream;
  m.events = event.events;
  m.data = event.data.u64;
  const bool lane = stream.has_lane();
  if (lane) ensure_bell();
  ev = kernel_entry(m, index, lane);  // tagged from the first on, where it is one-shot: it may fire at once
  if (const long result = sys::call(SYS_epoll_ctl, epfd_, EPOLL_CTL_ADD, fd, sys::arg(&ev)); result != 0) {
    m = Member{};
    return static_cast<int>(result);
  }
  free_.pop_back();
  if (Member* stale = of(fd)) release(*stale);  // closed behind our back
  by_fd_[fd] = index;
  m.fd = fd;
  members_in_use_.fetch_add(1);
  is_entered(m, index, ev, lane);
  sync(m, index);
  return 0;
}

bool EpollSet::modify(int fd, const epoll_event& event, int* result) noexcept {
  std::lock_guard guard(mutex_);
  Member* m = of(fd);
  if (m == nullptr) return false;
  m->events = event.events;
  m->data = event.data.u64;
  m->disabled = false;
  m->look = true;
  m->seen_rx = m->seen_tx = m->looked_rx = m->looked_tx = ~0ULL;
  if (!m->tagged && !m->stream.has_lane() && (event.events & EPOLLONESHOT) == 0) return false;
  m->tagged = true;  // in any case the kernel's entry is ours to set
  m->kernel_mask = ~0U;
  sync(*m, index_of(*m));
  *result = 0;
  return true;
}

void EpollSet::removed(int fd) noexcept {
  std::lock_guard guard(mutex_);
  if (Member* m = of(fd)) release(*m);
}

int EpollSet::collect(epoll_event* events, int max) noexcept {
  std::lock_guard guard(mutex_);
  const sdp::Grace::Look look(sdp::engine::grace());
  int n = 0;
  const auto count = static_cast<std::uint32_t>(members_.size());
  std::uint32_t i = 0;
  for (; i < count && n < max; ++i) {
    const std::uint32_t index = (next_ + i) % count;
    Member& m = members_[index];
    if (!m.lane || m.disabled) continue;
    if (m.fd >= 0) m.stream.on_wait_entry(m.fd);
    if (!m.look && !may_have_changed(look, m)) continue;
    m.looked_rx = m.stream.rx_edges(look);
    m.looked_tx = m.stream.tx_edges();
    const std::uint32_t ready = ready_now(m);
    sync(m, index);
    m.look = ready != 0;
    if (!m.lane || ready == 0) continue;
    if (m.events & EPOLLET) {  // any edge tells all that is ready
      const std::uint64_t rx = m.stream.rx_edges(look), tx = m.stream.tx_edges();
      const bool arrived = (m.events & (EPOLLIN | EPOLLRDNORM)) != 0 && rx != m.seen_rx;
      const bool writable = (m.events & (EPOLLOUT | EPOLLWRNORM)) != 0 && tx != m.seen_tx;
      if (!arrived && !writable) continue;
      m.seen_rx = rx;
      m.seen_tx = tx;
    }
    if (m.events & EPOLLONESHOT) {
      m.disabled = true;
      m.kernel_mask = ~0U;
      sync(m, index);
    }
    events[n].events = ready;
    events[n].data.u64 = m.data;
    ++n;
  }
  if (count != 0 && i < count) next_ = (next_ + i) % count;
  return n;
}

// Behind the `lanes` entries that are there stand `count` of the kernel's. Members are recognised by their tags; one entry per
// member.
int EpollSet::merge(epoll_event* events, int lanes, int count) noexcept {
  std::lock_guard guard(mutex_);
  const epoll_event* const kernel = events + lanes;
  int n = lanes;  // never past the one that is read
  for (int i = 0; i < count; ++i) {
    const std::uint64_t data = kernel[i].data.u64;
    if ((data & ~0xffffffULL) != tag_base()) {
      events[n++] = kernel[i];
      continue;
    }
    const auto index = static_cast<std::uint32_t>(data & 0xffffff);
    if (index >= members_.size() || members_[index].fd == kFree) continue;  // the bell, or a member that has just gone
    Member& m = members_[index];
    if (m.disabled) continue;
    std::uint32_t wanted = kernel[i].events & (m.events | EPOLLERR | EPOLLHUP);
    if (wanted == 0) continue;
    if (m.lane && (m.events & EPOLLET)) wanted |= ready_now(m);
    int same = 0;
    while (same < lanes && events[same].data.u64 != m.data) ++same;
    if (same < lanes) {
      events[same].events |= wanted;
    } else {
      events[n].events = wanted;
      events[n++].data.u64 = m.data;
      if (m.events & EPOLLONESHOT) m.disabled = true;
    }
  }
  return n;
}

/// By both carriers.
std::uint32_t EpollSet::ready_now(const Member& m) noexcept {
  const std::uint32_t events = m.events & ~kModeBits;
  bool anchor_too = false;
  std::uint32_t ready = m.stream.poll(events, &anchor_too);
  if (anchor_too && m.fd >= 0) {
    pollfd p{m.fd, static_cast<short>(m.stream.kernel_events(events)), 0};
    if (sys::call(SYS_poll, sys::arg(&p), 1, 0) == 1 && (p.revents & POLLNVAL) == 0) ready |= static_cast<std::uint16_t>(p.revents);
  }
  return ready & (events | EPOLLERR | EPOLLHUP);
}

bool EpollSet::may_have_changed(const sdp::Grace::Look& look, const Member& m) noexcept {
  return m.stream.maybe_ready(look, m.events) || ((m.events & EPOLLIN) != 0 && m.stream.rx_edges(look) != m.looked_rx) ||
         ((m.events & EPOLLOUT) != 0 && m.stream.tx_edges() != m.looked_tx);
}

// A level that the last look found is still one; an edge has been told.
bool EpollSet::maybe_ready() noexcept {
  std::lock_guard guard(mutex_);
  const sdp::Grace::Look look(sdp::engine::grace());
  for (const Member& m : members_)
    if (m.lane && !m.disabled && ((m.look && (m.events & EPOLLET) == 0) || may_have_changed(look, m))) return true;
  return false;
}

void EpollSet::arm() noexcept {
  std::lock_guard guard(mutex_);
  const sdp::Grace::Look look(sdp::engine::grace());
  for (const Member& m : members_)
    if (m.lane && !m.disabled) m.stream.arm(look);
}

void EpollSet::leave_armed() noexcept {
  if (lanes_.load() == 0) return;
  arm();
  sdp::engine::arm_fence();
  if (maybe_ready()) sdp::engine::ring_bell();
}

void EpollSet::nest() noexcept {
  if (!nested_.exchange(true)) leave_armed();
}

namespace {
/// Whether this thread counts as a sleeper; also right when it is cancelled.
class Asleep {
 public:
  explicit Asleep(std::atomic<std::uint32_t>& sleepers) noexcept : sleepers_(sleepers) {}
  ~Asleep() { end(); }
  Asleep(const Asleep&) = delete;
  Asleep& operator=(const Asleep&) = delete;
  void begin() noexcept {
    if (!counted_) sleepers_.fetch_add(1);
    counted_ = true;
  }
  void end() noexcept {
    if (counted_) sleepers_.fetch_sub(1);
    counted_ = false;
  }

 private:
  std::atomic<std::uint32_t>& sleepers_;
  bool counted_ = false;
};
}  // namespace

int EpollSet::wait(epoll_event* events, int max, std::int64_t timeout_ns, const sigset_t* mask) {
  const int n = wait_once(events, max, timeout_ns, mask);
  // Another thread may go on waiting here, and what it has armed may have rung for this one.
  if (nested_.load(std::memory_order_relaxed) || sleepers_.load() != 0) [[unlikely]]
    leave_armed();
  return n;
}

// One with a mask of its own may bring handlers.
long EpollSet::ask_kernel(epoll_event* events, int max, const sigset_t* mask) const {
  if (mask == nullptr) return sys::call(SYS_epoll_pwait, epfd_, sys::arg(events), max, 0, 0, 8);
  return sys::sleeping_call(sys::EndedBy::nothing, SYS_epoll_pwait, epfd_, sys::arg(events), max, 0, sys::arg(mask), 8);
}

int EpollSet::wait_once(epoll_event* events, int max, std::int64_t timeout_ns, const sigset_t* mask) {
  const std::int64_t deadline = timeout_ns > 0 ? now_ns() + timeout_ns : 0;
  for (;;) {
    Asleep asleep(sleepers_);
    const std::uint32_t lanes_here = lanes_.load(std::memory_order_acquire);
    int n = lanes_here != 0 ? collect(events, max) : 0;
    if (n > 0) {
      // Kernel descriptors are not starved: they are asked every few calls.
      if (n < max && ++since_kernel_ >= 8) {
        since_kernel_ = 0;
        const long k = ask_kernel(events + n, max - n, mask);
        if (k > 0) n = merge(events, n, static_cast<int>(k));
      } else if (n == max && sleepers_.load() != 0) {
        sdp::engine::ring_bell();
      }
      return n;
    }
    if (lanes_here != 0) {
      since_kernel_ = 0;
      sdp::Spinner spinner(lanes_here);
      if (timeout_ns == 0 || spinner.may_find()) {  // a sleep asks by itself
        long k = ask_kernel(events, max, mask);
        if (k < 0) return static_cast<int>(k);
        if (k > 0 && (n = merge(events, 0, static_cast<int>(k))) > 0) return n;
        if (k > 0) continue;  // the bell alone: it may have taken the place of others
        if (timeout_ns == 0) return 0;
        // Spin: the lanes all the time, the kernel every few microseconds.
        std::int64_t kernel_due = now_ns() + kKernelEveryNs;
        std::uint32_t looks = 0;
        const bool found = spinner.run([&]() noexcept {
          if (maybe_ready()) return true;
          looks += lanes_here;
          if (looks < kLooksPerClock) return false;
          looks = 0;
          if (now_ns() < kernel_due) return false;
          kernel_due = now_ns() + kKernelEveryNs;
          k = ask_kernel(events, max, mask);
          if (k > 0) n = merge(events, 0, static_cast<int>(k));
          return n > 0;
        });
        if (n > 0) return n;
        if (found) continue;
      }
      asleep.begin();
      arm();
      sdp::engine::arm_fence();
      if (maybe_ready()) continue;
    }
    int timeout_ms = -1;
    timespec left{};
    if (timeout_ns >= 0) {
      const std::int64_t ns = timeout_ns == 0 ? 0 : std::max<std::int64_t>(deadline - now_ns(), 0);
      left = {ns / 1'000'000'000, ns % 1'000'000'000};
      timeout_ms = static_cast<int>(std::min<std::int64_t>((ns + 999'999) / 1'000'000, 0x7fffffff));
    }
    asleep.begin();
    const long k = sys::blocking_call(timeout_ns != 0 ? sys::EndedBy::any : sys::EndedBy::nothing, SYS_epoll_pwait, epfd_,
                                      sys::arg(events), max, timeout_ms, sys::arg(mask), 8);
    asleep.end();
    if (k < 0) return static_cast<int>(k);
    if (k > 0) {
      n = merge(events, 0, static_cast<int>(k));  // what the lanes have comes with the next call
      if (n > 0) return n;
      if (timeout_ns == 0) continue;  // the bell alone
    }
    if (timeout_ns == 0 || (timeout_ns > 0 && now_ns() >= deadline)) return lanes_.load() != 0 ? collect(events, max) : 0;
  }
}

}  // namespace preload
