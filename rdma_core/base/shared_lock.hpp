// A lock and a slab for state that outlives fork: both live in MAP_SHARED memory, at the same address in a process and in the
// children that it forks, and survive the death of whoever uses them.
//
// Family only: everybody who maps this memory is a process of ours or its forked child, never a peer. Its contents are trusted.
#pragma once

#include <atomic>
#include <cassert>
#include <cstddef>
#include <cstdint>

namespace rdma {

namespace detail {

/// Who the calling thread is, as a lock word: thread id, process id, and whether it lives in the pid namespace in which this
/// library first ran (only there can others tell whether it is alive). A fork's child, even a raw clone()'s, gets a new one by
/// itself: `epoch` is compared with a word on a page that fork wipes.
struct ThreadIdentity {
  std::uint32_t epoch;
  std::uint64_t word;
};
extern thread_local ThreadIdentity thread_identity __attribute__((tls_model("initial-exec")));
extern std::atomic<const std::atomic<std::uint32_t>*> process_epoch;
std::uint64_t find_identity() noexcept;

inline std::uint64_t identity() noexcept {
  const std::uint32_t now = process_epoch.load(std::memory_order_acquire)->load(std::memory_order_relaxed);
  return __builtin_expect(thread_identity.epoch == now, 1) ? thread_identity.word : find_identity();
}

}  // namespace detail

enum class [[nodiscard]] Acquired : std::uint8_t{
    clean,
    owner_died,  ///< the lock is held, but its last owner died inside: what it guards may be half changed. Said once, to one taker
};

/// A futex mutex shared between processes. Zeroed memory is an unlocked SharedLock. 8 bytes: put beside it, in its cache line, what
/// it guards.
///
/// Uncontended: one compare-and-swap to lock, one exchange to unlock. Contended: a short spin, then sleeps on the futex in slices;
/// each slice asks whether the owner still lives. A dead owner's waiter takes the lock over and is told so.
///
/// Not recursive: locking twice is a programmer's mistake and stops the process; code that may run in a signal handler asks
/// held_by_me() first. An owner in another pid namespace is never taken for dead. Do not hold it across exec: the process goes on
/// under the same id.
class SharedLock {
 public:
  Acquired lock() noexcept {
    const std::uint64_t self = detail::identity();
    std::uint64_t expected = 0;
    if (__builtin_expect(word_.compare_exchange_strong(expected, self, std::memory_order_acquire, std::memory_order_relaxed), 1))
      return Acquired::clean;
    return lock_contended(self);
  }
  /// As lock(), for code that a signal handler may run while its own thread is inside: false, and nothing taken, if it is.
  bool enter() noexcept {
    const std::uint64_t self = detail::identity();
    std::uint64_t expected = 0;
    if (__builtin_expect(word_.compare_exchange_strong(expected, self, std::memory_order_acquire, std::memory_order_relaxed), 1))
      return true;
    if ((expected & ~kWaiters) == self) return false;
    (void)lock_contended(self);
    return true;
  }
  /// Never waits and never takes over from the dead.
  bool try_lock() noexcept {
    std::uint64_t expected = 0;
    return word_.compare_exchange_strong(expected, detail::identity(), std::memory_order_acquire, std::memory_order_relaxed);
  }
  void unlock() noexcept {
    assert(held_by_me());
    if (__builtin_expect((word_.exchange(0, std::memory_order_release) & kWaiters) != 0, 0)) wake_one();
  }
  bool held_by_me() const noexcept { return (word_.load(std::memory_order_relaxed) & ~kWaiters) == detail::identity(); }
  /// Process id of the owner, 0 when unlocked: a hint for diagnosis, old as soon as it is there.
  std::uint32_t owner_pid() const noexcept { return static_cast<std::uint32_t>(word_.load(std::memory_order_relaxed) >> 32); }

  // The word: process id in the upper half; in the lower half, which is the futex, the thread id and these.
  static constexpr std::uint64_t kWaiters = std::uint64_t{1} << 31;
  static constexpr std::uint64_t kForeign = std::uint64_t{1} << 30;  ///< the owner lives in another pid namespace

 private:
  Acquired lock_contended(std::uint64_t self) noexcept;
  void wake_one() noexcept;

  std::atomic<std::uint64_t> word_{0};
};
static_assert(sizeof(SharedLock) == 8 && std::atomic<std::uint64_t>::is_always_lock_free, "shared between processes");

/// Holds a SharedLock for a scope.
class SharedLockGuard {
 public:
  explicit SharedLockGuard(SharedLock& lock) noexcept : lock_(lock), acquired_(lock.lock()) {}
  ~SharedLockGuard() { lock_.unlock(); }
  SharedLockGuard(const SharedLockGuard&) = delete;
  SharedLockGuard& operator=(const SharedLockGuard&) = delete;
  bool owner_died() const noexcept { return acquired_ == Acquired::owner_died; }

 private:
  SharedLock& lock_;
  Acquired acquired_;
};

/// Cells of one size in MAP_SHARED memory. A cell keeps its address and its contents in every process that a fork makes while it
/// exists: parent and child see the same bytes.
///
/// Bookkeeping is private to each process and wiped by fork: a child uses the cells that it inherited, gets new ones from chunks
/// of its own, and its deallocate() of an inherited cell does nothing, for the cell is its parent's. So the maker of a cell gives
/// it back only when no child uses it any more; count users in the cell if that is not known otherwise. Memory is not returned to
/// the system before the slab goes; inherited chunks stay mapped in a child for good. Threads: any, also at once. A fork at any
/// moment is safe.
class SharedSlab {
 public:
  explicit SharedSlab(std::size_t cell_bytes) noexcept;  ///< rounded up to 64; at most max_cell_bytes(). Maps nothing yet
  ~SharedSlab();
  SharedSlab(const SharedSlab&) = delete;
  SharedSlab& operator=(const SharedSlab&) = delete;

  void* allocate() noexcept;  ///< zeroed, aligned to 64. nullptr: no memory
  void deallocate(void* cell) noexcept;
  std::size_t cell_bytes() const noexcept { return cell_bytes_; }
  std::size_t cells_in_use() const noexcept;  ///< of this process's own
  static std::size_t max_cell_bytes() noexcept;

 private:
  struct Ledger;  ///< on pages that fork wipes
  std::size_t cell_bytes_;
  std::atomic<Ledger*> ledger_{nullptr};
};

}  // namespace rdma
