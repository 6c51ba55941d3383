#include "rdma_core/base/shared_lock.hpp"

#include <errno.h>
#include <fcntl.h>
#include <linux/futex.h>
#include <poll.h>
#include <signal.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/wait.h>

#include <algorithm>
#include <bit>
#include <cstring>
#include <new>

#include "rdma_core/base/clock.hpp"
#include "rdma_core/base/log.hpp"
#include "rdma_core/base/sys.hpp"

namespace rdma {
namespace {

constexpr std::size_t kPageBytes = 4096;
constexpr std::uint64_t kTidMask = (std::uint64_t{1} << 30) - 1;

/// Zero until the page exists; a thread's epoch is never 0, so meanwhile (and for good, if there is no memory) every call looks
/// itself up.
std::atomic<std::uint32_t> no_epoch{0};
/// Ordinary memory, copied by fork: an epoch of a process is larger than those of all its ancestors, whose threads' caches it
/// inherits.
std::atomic<std::uint32_t> last_epoch{1};
/// Inode of the pid namespace in which the first of the family asked; inherited. kUnknown stays: guessing later could differ per
/// child.
std::atomic<std::uint64_t> home_namespace{0};
constexpr std::uint64_t kUnknown = ~std::uint64_t{0};

void* map_wiped_on_fork(std::size_t bytes) noexcept {
  void* p = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (p == MAP_FAILED) return nullptr;
  if (madvise(p, bytes, MADV_WIPEONFORK) != 0) {
    munmap(p, bytes);
    return nullptr;
  }
  return p;
}

std::atomic<std::uint32_t>* epoch_page() noexcept {
  const std::atomic<std::uint32_t>* current = detail::process_epoch.load(std::memory_order_acquire);
  if (current == &no_epoch) {
    const int saved_errno = errno;
    void* page = map_wiped_on_fork(kPageBytes);
    errno = saved_errno;
    if (page == nullptr) return nullptr;
    auto* word = new (page) std::atomic<std::uint32_t>(0);
    if (detail::process_epoch.compare_exchange_strong(current, word, std::memory_order_acq_rel)) return word;
    munmap(page, kPageBytes);
  }
  return const_cast<std::atomic<std::uint32_t>*>(current);
}

bool in_home_namespace() noexcept {
  struct stat st {};
  const long failed = sys::call(SYS_newfstatat, AT_FDCWD, sys::arg("/proc/self/ns/pid"), sys::arg(&st));
  const std::uint64_t mine = failed != 0 ? kUnknown : st.st_ino;
  std::uint64_t home = 0;
  if (home_namespace.compare_exchange_strong(home, mine)) home = mine;
  return mine != kUnknown && mine == home;
}

/// `thorough` also finds a dead process that its parent has not waited for. It may open a descriptor for a moment.
bool is_dead(std::uint64_t owner, bool thorough) noexcept {
  const auto pid = static_cast<long>(owner >> 32);
  const auto tid = static_cast<long>(owner & kTidMask);
  if (sys::call(SYS_tgkill, pid, tid, 0) == -ESRCH) return true;
  if (pid == sys::call(SYS_getpid)) return false;
  siginfo_t info{};
  if (sys::call(SYS_waitid, P_PID, pid, sys::arg(&info), WEXITED | WNOHANG | WNOWAIT | __WALL) == 0) return info.si_pid == pid;
  if (!thorough) return false;
  const long fd = sys::call(SYS_pidfd_open, pid, 0);
  if (fd < 0) return fd == -ESRCH;
  pollfd exited{static_cast<int>(fd), POLLIN, 0};
  const timespec at_once{};
  const long ready = sys::call(SYS_ppoll, sys::arg(&exited), 1, sys::arg(&at_once));
  sys::call(SYS_close, fd);
  return ready == 1;
}

std::uint32_t* futex_of(std::atomic<std::uint64_t>& word) noexcept { return reinterpret_cast<std::uint32_t*>(&word); }
static_assert(std::endian::native == std::endian::little, "the futex is the lower half of the word");

}  // namespace

namespace detail {

thread_local ThreadIdentity thread_identity = {1, 0};
std::atomic<const std::atomic<std::uint32_t>*> process_epoch{&no_epoch};

std::uint64_t find_identity() noexcept {
  const auto pid = static_cast<std::uint64_t>(sys::call(SYS_getpid));
  const auto tid = static_cast<std::uint64_t>(sys::call(SYS_gettid));
  const std::uint64_t word = pid << 32 | tid | (in_home_namespace() ? 0 : SharedLock::kForeign);
  if (std::atomic<std::uint32_t>* page = epoch_page()) {
    std::uint32_t epoch = page->load(std::memory_order_acquire);
    if (epoch == 0) {
      const std::uint32_t next = last_epoch.fetch_add(1) + 1;
      if (page->compare_exchange_strong(epoch, next)) epoch = next;
    }
    thread_identity = {epoch, word};
  }
  return word;
}

}  // namespace detail

Acquired SharedLock::lock_contended(std::uint64_t self) noexcept {
  constexpr int kSpins = 100;
  constexpr timespec kSlice{0, 20'000'000};
  for (int i = 0; i < kSpins; ++i) {
    cpu_relax();
    std::uint64_t current = word_.load(std::memory_order_relaxed);
    if (current == 0 && word_.compare_exchange_weak(current, self, std::memory_order_acquire, std::memory_order_relaxed))
      return Acquired::clean;
  }
  // From here on the word is taken with kWaiters set: others may sleep, and only an unlock that wakes one lets them on.
  bool slept_a_slice = false;
  for (;;) {
    std::uint64_t current = word_.load(std::memory_order_relaxed);
    if (current == 0) {
      if (word_.compare_exchange_strong(current, self | kWaiters, std::memory_order_acquire, std::memory_order_relaxed))
        return Acquired::clean;
      continue;
    }
    const std::uint64_t owner = current & ~kWaiters;
    if (owner == self) {
      RDMA_LOG(error, "lock %p taken twice by one thread", static_cast<void*>(this));
      __builtin_trap();
    }
    if (((owner | self) & kForeign) == 0 && is_dead(owner, slept_a_slice)) {
      if (word_.compare_exchange_strong(current, self | kWaiters, std::memory_order_acquire, std::memory_order_relaxed))
        return Acquired::owner_died;
      continue;
    }
    if (current == owner && !word_.compare_exchange_strong(current, owner | kWaiters, std::memory_order_relaxed)) continue;
    // In slices, for an owner that dies between its exchange and its wake-up, or with the lock held, wakes nobody.
    const long rc = sys::call(SYS_futex, sys::arg(futex_of(word_)), FUTEX_WAIT, static_cast<std::uint32_t>(owner | kWaiters),
                              sys::arg(&kSlice));
    slept_a_slice = rc == -ETIMEDOUT;
  }
}

void SharedLock::wake_one() noexcept { sys::call(SYS_futex, sys::arg(futex_of(word_)), FUTEX_WAKE, 1); }

// ---------------------------------------------------------------- slab

namespace {

constexpr std::size_t kChunkBytes = 64 * 1024;  ///< and alignment: a cell's chunk is its address rounded down
constexpr std::size_t kLine = 64;
constexpr std::size_t kLedgerBytes = 1024 * 1024;  ///< of address space; pages appear as chunks do

/// The first line of a chunk, in front of its cells.
struct ChunkHead {
  std::uint32_t index;  ///< in its maker's ledger
};

struct Chunk {
  std::byte* base;
  std::uint32_t free_cells;
  std::uint32_t first_word;  ///< no free cell in the words of `taken` in front of this one
  std::uint64_t taken[kChunkBytes / kLine / 64];
};

std::byte* map_chunk() noexcept {
  const int saved_errno = errno;
  void* p = mmap(nullptr, 2 * kChunkBytes, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
  if (p == MAP_FAILED) {
    errno = saved_errno;
    return nullptr;
  }
  auto* raw = static_cast<std::byte*>(p);
  const std::size_t front = -reinterpret_cast<std::uintptr_t>(raw) & (kChunkBytes - 1);
  if (front != 0) munmap(raw, front);
  munmap(raw + front + kChunkBytes, kChunkBytes - front);
  return raw + front;
}

}  // namespace

struct SharedSlab::Ledger {
  static constexpr std::size_t kMaxChunks = (kLedgerBytes - kLine) / sizeof(Chunk);

  SharedLock lock;
  std::uint32_t chunk_count;
  std::uint32_t first_chunk;  ///< no free cell in the chunks in front of this one
  std::size_t in_use;
  alignas(kLine) Chunk chunks[kMaxChunks];

  std::uint32_t cells_per_chunk(std::size_t cell_bytes) const noexcept {
    return static_cast<std::uint32_t>((kChunkBytes - kLine) / cell_bytes);
  }
  bool add_chunk(std::size_t cell_bytes) noexcept {
    if (chunk_count == kMaxChunks) return false;
    std::byte* base = map_chunk();
    if (base == nullptr) return false;
    new (base) ChunkHead{chunk_count};
    Chunk& chunk = chunks[chunk_count];
    const std::uint32_t cells = cells_per_chunk(cell_bytes);
    chunk.base = base;
    chunk.free_cells = cells;
    chunk.first_word = 0;
    std::fill(std::begin(chunk.taken), std::end(chunk.taken), ~std::uint64_t{0});
    for (std::uint32_t cell = 0; cell < cells; ++cell) chunk.taken[cell / 64] &= ~(std::uint64_t{1} << cell % 64);
    ++chunk_count;
    return true;
  }
};

SharedSlab::SharedSlab(std::size_t cell_bytes) noexcept : cell_bytes_((std::max(cell_bytes, kLine) + kLine - 1) & ~(kLine - 1)) {
  static_assert(sizeof(Ledger) <= kLedgerBytes);
  assert(cell_bytes_ <= max_cell_bytes());
}

SharedSlab::~SharedSlab() {
  Ledger* ledger = ledger_.load(std::memory_order_acquire);
  if (ledger == nullptr) return;
  for (std::uint32_t i = 0; i < ledger->chunk_count; ++i) munmap(ledger->chunks[i].base, kChunkBytes);
  munmap(ledger, kLedgerBytes);
}

std::size_t SharedSlab::max_cell_bytes() noexcept { return kChunkBytes - kLine; }

void* SharedSlab::allocate() noexcept {
  Ledger* ledger = ledger_.load(std::memory_order_acquire);
  if (ledger == nullptr) {
    const int saved_errno = errno;
    void* p = map_wiped_on_fork(kLedgerBytes);
    errno = saved_errno;
    if (p == nullptr) return nullptr;
    if (ledger_.compare_exchange_strong(ledger, static_cast<Ledger*>(p), std::memory_order_acq_rel)) {
      ledger = static_cast<Ledger*>(p);
    } else {
      munmap(p, kLedgerBytes);
    }
  }
  void* cell = nullptr;
  {
    SharedLockGuard guard(ledger->lock);
    for (std::uint32_t& i = ledger->first_chunk; cell == nullptr; ++i) {
      if (i == ledger->chunk_count && !ledger->add_chunk(cell_bytes_)) return nullptr;
      Chunk& chunk = ledger->chunks[i];
      if (chunk.free_cells == 0) continue;
      std::uint32_t& word = chunk.first_word;
      while (word < std::size(chunk.taken) && ~chunk.taken[word] == 0) ++word;
      assert(word < std::size(chunk.taken));
      const auto bit = static_cast<unsigned>(std::countr_one(chunk.taken[word]));
      chunk.taken[word] |= std::uint64_t{1} << bit;
      --chunk.free_cells;
      ++ledger->in_use;
      cell = chunk.base + kLine + (word * 64 + bit) * cell_bytes_;
      break;
    }
  }
  return std::memset(cell, 0, cell_bytes_);
}

void SharedSlab::deallocate(void* cell) noexcept {
  Ledger* ledger = ledger_.load(std::memory_order_acquire);
  if (cell == nullptr || ledger == nullptr) return;
  const auto* head = reinterpret_cast<const ChunkHead*>(reinterpret_cast<std::uintptr_t>(cell) & ~(kChunkBytes - 1));
  const auto* base = reinterpret_cast<const std::byte*>(head);
  SharedLockGuard guard(ledger->lock);
  const std::uint32_t index = head->index;
  if (index >= ledger->chunk_count || ledger->chunks[index].base != base) return;  // inherited: the parent's
  Chunk& chunk = ledger->chunks[index];
  const std::size_t number = static_cast<std::size_t>(static_cast<std::byte*>(cell) - base - kLine) / cell_bytes_;
  const std::uint64_t bit = std::uint64_t{1} << number % 64;
  assert(number < ledger->cells_per_chunk(cell_bytes_) && (chunk.taken[number / 64] & bit) != 0 && "not a cell, or back twice");
  if ((chunk.taken[number / 64] & bit) == 0) return;
  chunk.taken[number / 64] &= ~bit;
  ++chunk.free_cells;
  --ledger->in_use;
  chunk.first_word = std::min(chunk.first_word, static_cast<std::uint32_t>(number / 64));
  ledger->first_chunk = std::min(ledger->first_chunk, index);
}

std::size_t SharedSlab::cells_in_use() const noexcept {
  Ledger* ledger = ledger_.load(std::memory_order_acquire);
  if (ledger == nullptr) return 0;
  SharedLockGuard guard(ledger->lock);
  return ledger->in_use;
}

}  // namespace rdma
