#include "rdma_core/registered_heap.hpp"

#include <errno.h>
#include <pthread.h>

#include <algorithm>
#include <atomic>
#include <bit>
#include <cassert>
#include <cstdint>
#include <cstdio>
#include <mutex>
#include <vector>

#include "rdma_core/base/log.hpp"
#include "rdma_core/base/shared_lock.hpp"
#include "rdma_core/sdpje.hpp"

namespace rdma {
namespace {

std::uint32_t this_process() noexcept { return static_cast<std::uint32_t>(detail::identity() >> 32); }

// Fork. jemalloc's way is to take all its mutexes before, and to make them anew after, about a hundred per arena and 60 us per
// heap, mostly for pages copied in a child that may only exec. Ours: threads inside jemalloc are counted (a read lock), fork waits
// until there is none (the write lock), and a child makes the mutexes anew when it creates its first heap.

pthread_rwlock_t gate = PTHREAD_RWLOCK_WRITER_NONRECURSIVE_INITIALIZER_NP;
void (*fork_child_handler)() = nullptr;  ///< jemalloc's; set when it sets itself up
std::atomic<std::uint32_t> user{0};      ///< the process that uses jemalloc; 0 as long as there is none
std::atomic<bool> stale{false};          ///< in a child: fork_child_handler has yet to run

/// The calling thread is inside a heap, whichever, or in a fork: what comes in once more is a signal handler that interrupted it.
thread_local bool busy __attribute__((tls_model("initial-exec"))) = false;
class Busy {
 public:
  Busy() noexcept {
    busy = true;
    std::atomic_signal_fence(std::memory_order_seq_cst);
  }
  ~Busy() {
    std::atomic_signal_fence(std::memory_order_seq_cst);
    busy = false;
  }
  Busy(const Busy&) = delete;
  Busy& operator=(const Busy&) = delete;
};

/// The calling thread is inside jemalloc.
class Inside {
 public:
  Inside() noexcept { pthread_rwlock_rdlock(&gate); }
  ~Inside() { pthread_rwlock_unlock(&gate); }
  Inside(const Inside&) = delete;
  Inside& operator=(const Inside&) = delete;
};
/// In a hook, where jemalloc holds no mutex: outside for a while. A driver may then take its time, and locks that somebody who
/// forks holds.
class Outside {
 public:
  Outside() noexcept { pthread_rwlock_unlock(&gate); }
  ~Outside() { pthread_rwlock_rdlock(&gate); }
  Outside(const Outside&) = delete;
  Outside& operator=(const Outside&) = delete;
};

void before_fork() noexcept {
  busy = true;
  pthread_rwlock_wrlock(&gate);
}
void after_fork_in_parent() noexcept {
  pthread_rwlock_unlock(&gate);
  busy = false;
}
void after_fork_in_child() noexcept {
  busy = false;
  // Unlocked, and then anew: it counts waiting readers, and those are in the parent.
  pthread_rwlock_unlock(&gate);
  gate = PTHREAD_RWLOCK_WRITER_NONRECURSIVE_INITIALIZER_NP;
  user = this_process();
  stale = true;
  // At once, because it is walked when a thread ends, and leads through the stacks of threads that are no more.
  sdpje_je_tsd_postfork_child(&sdpje_je_tsd_tls);
}

}  // namespace
}  // namespace rdma

// The settings of our copy, and all of them: what it would read besides is below made to find nothing, for MALLOC_CONF and
// /etc/malloc.conf are addressed to the program's allocator.
//   tcache, narenas     one arena for its own metadata, nothing per thread
//   *_decay_ms:0        freed pages join their neighbours at once instead of by age: no clock, no fragments of every size
//   retain:false        or a destroyed arena leaves address space behind; growth in large steps is ours (alloc_extent)
//   dss                 the break is the program's
extern "C" {
const char* sdpje_malloc_conf =
    "narenas:1,tcache:false,dirty_decay_ms:0,muzzy_decay_ms:0,retain:false,dss:disabled,"
    "background_thread:false,metadata_thp:disabled,oversize_threshold:0";
char* sdpje_secure_getenv(const char*) noexcept { return nullptr; }
long sdpje_readlink(const char*, char*, std::size_t) noexcept { return -1; }
int sdpje_pthread_atfork(void (*)(), void (*)(), void (*child)()) noexcept {
  rdma::fork_child_handler = child;
  return pthread_atfork(rdma::before_fork, rdma::after_fork_in_parent, rdma::after_fork_in_child);
}
// Background threads, which are off.
int sdpje_pthread_create(void*, const void*, void* (*)(void*), void*) noexcept { return EAGAIN; }
// The profiler, which is off.
double sdpje_exp(double) noexcept { return 0; }
double sdpje_log(double) noexcept { return 0; }
double sdpje_round(double) noexcept { return 0; }
int sdpje_open(const char*, int, ...) noexcept { return -1; }
int sdpje_creat(const char*, unsigned) noexcept { return -1; }
int sdpje_close(int) noexcept { return -1; }
}

namespace rdma {
namespace {

constexpr std::size_t kPageBytes = 4096;  // jemalloc's
struct Extent {
  std::unique_ptr<Mr> mr;
  std::byte* tail;  ///< not yet given to jemalloc from here on

  std::byte* begin() const noexcept { return mr->addr; }
  std::byte* end() const noexcept { return mr->addr + mr->length; }
  /// Cuts a piece from the tail, or nullptr. Bytes skipped for alignment are lost; jemalloc asks for more than a page rarely.
  std::byte* cut(std::size_t size, std::size_t alignment) noexcept {
    const std::size_t gap = -reinterpret_cast<std::uintptr_t>(tail) & (alignment - 1);
    const auto left = static_cast<std::size_t>(end() - tail);
    if (left < gap || left - gap < size) return nullptr;
    std::byte* piece = tail + gap;
    tail = piece + size;
    return piece;
  }
};

}  // namespace

struct RegisteredHeap::State {
  /// What jemalloc hands to the hooks.
  struct Hooks {
    sdpje::ExtentHooks table;
    State* state;
  };

  State(Pd& p, std::size_t first) : pd(p), first_extent(first) {}
  ~State();

  /// The extent that holds `addr`, or nullptr. Takes extents_mutex.
  const Extent* find(const void* addr) noexcept;
  std::byte* cut_or_map(std::size_t size, std::size_t alignment);

  static State& of(sdpje::ExtentHooks* table) noexcept { return *reinterpret_cast<Hooks*>(table)->state; }
  static void* alloc_extent(sdpje::ExtentHooks*, void* new_addr, std::size_t size, std::size_t alignment, bool* zero, bool* commit,
                            unsigned) noexcept;
  static bool commit_extent(sdpje::ExtentHooks*, void*, std::size_t, std::size_t, std::size_t, unsigned) noexcept { return false; }
  static bool split_extent(sdpje::ExtentHooks*, void*, std::size_t, std::size_t, std::size_t, bool, unsigned) noexcept {
    return false;
  }
  static bool merge_extents(sdpje::ExtentHooks*, void*, std::size_t, void*, std::size_t, bool, unsigned) noexcept;

  Pd& pd;
  const std::size_t first_extent;  ///< bytes
  // No dalloc: an Mr lives as long as the heap, for blocks point to it. No purge: a device may hold the pages, and a hole punched
  // under it would part the device's pages from ours.
  Hooks hooks{{.alloc = alloc_extent,
               .dalloc = nullptr,
               .destroy = nullptr,
               .commit = commit_extent,
               .decommit = nullptr,
               .purge_lazy = nullptr,
               .purge_forced = nullptr,
               .split = split_extent,
               .merge = merge_extents},
              this};
  unsigned arena = 0;
  bool has_arena = false;
  const std::uint32_t owner = this_process();
  // In this order, both outside of jemalloc's mutexes and tails_mutex outside of the gate too.
  std::mutex tails_mutex;                        ///< guards Extent::tail, and lets one thread map at a time
  std::mutex extents_mutex;                      ///< guards the vector; a leaf
  std::vector<std::unique_ptr<Extent>> extents;  ///< by address; changed with both mutexes held
  std::atomic<std::size_t> in_use{0};
  std::atomic<std::size_t> mapped{0};
};

RegisteredHeap::State::~State() {
  if (!has_arena) return;
  char name[40];
  std::snprintf(name, sizeof name, "arena.%u.destroy", arena);
  const Inside inside;
  if (const int failed = sdpje_mallctl(name, nullptr, nullptr, nullptr, 0); failed != 0)
    RDMA_LOG(error, "heap: arena %u cannot be destroyed: %d", arena, failed);
}

const Extent* RegisteredHeap::State::find(const void* addr) noexcept {
  const std::lock_guard lock(extents_mutex);
  const auto after =
      std::ranges::upper_bound(extents, static_cast<const std::byte*>(addr), {}, [](const auto& e) { return e->begin(); });
  if (after == extents.begin()) return nullptr;
  const Extent* extent = std::prev(after)->get();
  return addr < extent->end() ? extent : nullptr;
}

std::byte* RegisteredHeap::State::cut_or_map(std::size_t size, std::size_t alignment) {
  const std::lock_guard tails_lock(tails_mutex);
  for (const auto& extent : extents)
    if (std::byte* piece = extent->cut(size, alignment)) return piece;
  const std::size_t slack = alignment > kPageBytes ? alignment - kPageBytes : 0;
  // jemalloc asks for a few pages at a time, and gets them from something larger.
  const std::size_t step = std::clamp(mapped.load(std::memory_order_relaxed), first_extent, kExtentBytes);
  auto mr = pd.map_extent(std::max(size + slack, step));
  if (!mr) return nullptr;
  std::byte* begin = (*mr)->addr;
  const std::size_t length = (*mr)->length;
  auto extent = std::make_unique<Extent>(Extent{std::move(*mr), begin});
  std::byte* piece = reinterpret_cast<std::uintptr_t>(begin) % kPageBytes == 0 ? extent->cut(size, alignment) : nullptr;
  if (piece == nullptr) {
    RDMA_LOG(error, "heap: map_extent gave %zu bytes at %p", length, static_cast<void*>(begin));
    return nullptr;
  }
  const std::lock_guard extents_lock(extents_mutex);
  extents.insert(std::ranges::upper_bound(extents, begin, {}, [](const auto& e) { return e->begin(); }), std::move(extent));
  mapped.fetch_add(length, std::memory_order_relaxed);
  return piece;
}

void* RegisteredHeap::State::alloc_extent(sdpje::ExtentHooks* table, void* new_addr, std::size_t size, std::size_t alignment,
                                          bool* zero, bool* commit, unsigned) noexcept {
  constexpr std::size_t kMaxBytes = SIZE_MAX / 4;
  if (new_addr != nullptr || size > kMaxBytes || alignment > kMaxBytes) return nullptr;
  // jemalloc is C: nothing may be thrown through it.
  try {
    const Outside outside;  // before tails_mutex is taken: its owner must not wait for the gate
    std::byte* piece = of(table).cut_or_map(size, alignment);
    if (piece == nullptr) return nullptr;
    *zero = false;  // new, but a peer may have written to it already
    *commit = true;
    return piece;
  } catch (...) {
    return nullptr;
  }
}

/// Neighbours in the address space may belong to two Mrs; a block must not.
bool RegisteredHeap::State::merge_extents(sdpje::ExtentHooks* table, void* a, std::size_t, void* b, std::size_t, bool,
                                          unsigned) noexcept {
  State& state = of(table);
  return state.find(a) != state.find(b);  // true: refused
}

RegisteredHeap::RegisteredHeap(std::unique_ptr<State> state) : state_(std::move(state)) {}

Result<std::unique_ptr<RegisteredHeap>> RegisteredHeap::create(Pd& pd, std::size_t first_extent) {
  auto state = std::make_unique<State>(pd, std::min(first_extent, kExtentBytes));
  std::uint32_t expected = 0;
  if (!user.compare_exchange_strong(expected, state->owner) && expected != state->owner)
    return fail(ENOTSUP, "heap: in a process made without fork()");
  if (stale.load(std::memory_order_acquire)) {
    pthread_rwlock_wrlock(&gate);
    if (stale) fork_child_handler();
    stale = false;
    pthread_rwlock_unlock(&gate);
  }
  // Metadata by jemalloc's own mmap: peers map the extents.
  sdpje::ArenaConfig config{&state->hooks.table, false};
  std::size_t bytes = sizeof state->arena;
  const Inside inside;
  if (const int failed = sdpje_mallctl("experimental.arenas_create_ext", &state->arena, &bytes, &config, sizeof config);
      failed != 0)
    return fail(failed == EAGAIN ? ENOMEM : failed, "heap: no arena");
  state->has_arena = true;
  return std::unique_ptr<RegisteredHeap>(new RegisteredHeap(std::move(state)));
}

RegisteredHeap::~RegisteredHeap() {
  if (state_->owner == this_process()) {
    assert(bytes_in_use() == 0);
    return;
  }
  // A fork's child: arena, extents and QPs are its parent's, and another thread may have been inside when it forked. Left as they
  // are.
  (void)state_.release();
}

Result<RegisteredHeap::Block> RegisteredHeap::allocate(std::size_t bytes, std::size_t alignment) {
  assert(std::has_single_bit(alignment));
  State& state = *state_;
  if (state.owner != this_process()) return fail(EPERM, "heap: of the parent process");
  if (busy) return fail(EDEADLK, "heap: from a signal handler that interrupted it");
  const int flags = sdpje::in_arena(state.arena) | sdpje::kTcacheNone | sdpje::aligned(alignment);
  const Busy busy_now;
  const Inside inside;
  void* block = sdpje_mallocx(std::max<std::size_t>(bytes, 1), flags);
  if (block == nullptr) return fail(ENOMEM, "heap: no memory");
  const Extent* extent = state.find(block);
  assert(extent != nullptr);
  state.in_use.fetch_add(sdpje_sallocx(block, 0), std::memory_order_relaxed);
  return Block{static_cast<std::byte*>(block), extent->mr.get()};
}

void RegisteredHeap::deallocate(std::byte* addr) noexcept {
  State& state = *state_;
  if (addr == nullptr || state.owner != this_process()) return;
  assert(state.find(addr) != nullptr);
  const Busy busy_now;
  const Inside inside;
  state.in_use.fetch_sub(sdpje_sallocx(addr, 0), std::memory_order_relaxed);
  sdpje_dallocx(addr, sdpje::in_arena(state.arena) | sdpje::kTcacheNone);
}

std::size_t RegisteredHeap::bytes_in_use() const noexcept { return state_->in_use.load(std::memory_order_relaxed); }
std::size_t RegisteredHeap::bytes_mapped() const noexcept { return state_->mapped.load(std::memory_order_relaxed); }

}  // namespace rdma
