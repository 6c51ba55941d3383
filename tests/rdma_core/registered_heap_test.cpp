#include "rdma_core/registered_heap.hpp"

#include <dlfcn.h>
#include <pthread.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <sys/wait.h>
#include <unistd.h>

#include <atomic>
#include <boost/test/unit_test.hpp>
#include <cstring>
#include <deque>
#include <functional>
#include <map>
#include <random>
#include <set>
#include <thread>
#include <vector>

#include "rdma_core/sdpje.hpp"

#ifdef __SANITIZE_THREAD__
// fork takes all of jemalloc's mutexes, more than the deadlock detector can count.
extern "C" const char* __tsan_default_options() { return "detect_deadlocks=0:die_after_fork=0"; }
#endif

namespace rdma {
namespace {

constexpr std::size_t kPageBytes = 4096;

/// Extents by mmap, counted; refuses when a budget is used up.
class FakePd final : public Pd {
 public:
  struct Extent final : Mr {
    Extent(FakePd& p, std::size_t bytes) : pd(p) {
      void* mem =
          mmap(pd.next_addr, bytes, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS | (pd.next_addr ? MAP_FIXED : 0), -1, 0);
      BOOST_REQUIRE(mem != MAP_FAILED);
      addr = static_cast<std::byte*>(mem);
      length = bytes;
      if (pd.next_addr != nullptr) pd.next_addr += bytes;
      pd.extents.insert(this);
    }
    ~Extent() override {
      pd.extents.erase(this);
      munmap(addr, length);
    }
    FakePd& pd;
  };

  Result<std::unique_ptr<Mr>> register_memory(std::span<std::byte>, Access) override { return fail(ENOTSUP, "fake"); }
  Result<std::unique_ptr<Qp>> create_qp(const QpInit&) override { return fail(ENOTSUP, "fake"); }
  Result<std::unique_ptr<Mr>> map_extent(std::size_t bytes) override {
    BOOST_TEST(bytes % kPageBytes == 0u);
    if (interrupt) interrupt();
    if (bytes > budget) return fail(ENOMEM, "fake: budget");
    budget -= bytes;
    return std::unique_ptr<Mr>(std::make_unique<Extent>(*this, bytes));
  }

  bool holds(const std::byte* p, std::size_t bytes) const {
    for (const Extent* e : extents)
      if (p >= e->addr && p + bytes <= e->addr + e->length) return true;
    return false;
  }

  std::set<const Extent*> extents;
  std::size_t budget = SIZE_MAX;
  std::function<void()> interrupt;  ///< happens in the middle of map_extent
  std::byte* next_addr = nullptr;   ///< set: extents lie there, each behind the last
};

std::unique_ptr<RegisteredHeap> heap_on(Pd& pd) {
  auto heap = RegisteredHeap::create(pd);
  BOOST_REQUIRE(heap.ok());
  return std::move(*heap);
}

std::size_t lines_of_maps() {
  FILE* f = fopen("/proc/self/maps", "r");
  std::size_t lines = 0;
  for (int c; (c = fgetc(f)) != EOF;) lines += c == '\n';
  fclose(f);
  return lines;
}

/// Runs `body` in a forked child and returns its exit status.
template <class Body>
int in_child(Body body) {
  const pid_t pid = fork();
  if (pid == 0) _exit(body());
  int status = -1;
  BOOST_REQUIRE(waitpid(pid, &status, 0) == pid);
  return status;
}

}  // namespace

// ---------------------------------------------------------------- the private jemalloc

// Of the C library, or of a sanitizer's: not of the image that jemalloc is linked into.
BOOST_AUTO_TEST_CASE(malloc_is_still_the_processs_own) {
  const auto image_of = [](auto* function) {
    Dl_info info{};
    BOOST_REQUIRE(dladdr(reinterpret_cast<void*>(function), &info) != 0);
    return info.dli_fbase;
  };
  void* const ours = image_of(&sdpje_mallocx);
  BOOST_TEST(image_of(static_cast<void* (*)(std::size_t)>(&malloc)) != ours);
  BOOST_TEST(image_of(static_cast<void (*)(void*)>(&free)) != ours);
  BOOST_TEST(image_of(static_cast<void* (*)(std::size_t)>(&operator new)) != ours);
  for (const char* name : {"mallctl", "mallocx", "dallocx", "malloc_conf", "malloc_stats_print"})
    BOOST_TEST(dlsym(RTLD_DEFAULT, name) == nullptr);
}

BOOST_AUTO_TEST_CASE(settings_addressed_to_the_programs_allocator_do_not_reach_it) {
  // Set before jemalloc's first use in the child; every option that matters is read back.
  const int status = in_child([] {
    setenv("MALLOC_CONF", "narenas:7,tcache:true,background_thread:true,stats_print:true,retain:true,abort_conf:true,junk:true", 1);
    unsigned narenas = 0;
    bool tcache = true, background = true, retain = true;
    std::size_t n = sizeof narenas;
    if (sdpje_mallctl("opt.narenas", &narenas, &n, nullptr, 0) != 0 || narenas != 1) return 1;
    n = sizeof tcache;
    if (sdpje_mallctl("opt.tcache", &tcache, &n, nullptr, 0) != 0 || tcache) return 2;
    if (sdpje_mallctl("opt.background_thread", &background, &n, nullptr, 0) != 0 || background) return 3;
    if (sdpje_mallctl("opt.retain", &retain, &n, nullptr, 0) != 0 || retain) return 4;
    const char* junk = nullptr;
    n = sizeof junk;
    if (sdpje_mallctl("opt.junk", &junk, &n, nullptr, 0) != 0 || strcmp(junk, "false") != 0) return 5;
    return 0;
  });
  BOOST_TEST(status == 0);
}

// ---------------------------------------------------------------- the heap

BOOST_AUTO_TEST_CASE(a_block_lies_in_an_extent_and_names_its_mr) {
  FakePd pd;
  auto heap = heap_on(pd);
  BOOST_TEST(heap->bytes_mapped() == 0u);
  for (const std::size_t bytes : {0u, 1u, 64u, 4096u, 16384u, 100'000u, 2'097'152u, 5'000'000u})
    for (const std::size_t alignment : {1u, 64u, 4096u, 65536u, 4'194'304u}) {
      auto block = heap->allocate(bytes, alignment);
      BOOST_REQUIRE(block.ok());
      BOOST_TEST(reinterpret_cast<std::uintptr_t>(block->addr) % alignment == 0u);
      BOOST_TEST(pd.holds(block->addr, bytes));
      BOOST_TEST(block->addr >= block->mr->addr);
      BOOST_TEST(block->addr + bytes <= block->mr->addr + block->mr->length);
      BOOST_TEST(heap->bytes_in_use() >= bytes);
      heap->deallocate(block->addr);
    }
  BOOST_TEST(heap->bytes_in_use() == 0u);
}

BOOST_AUTO_TEST_CASE(extents_are_few_and_are_used_again) {
  FakePd pd;
  auto heap = heap_on(pd);
  std::vector<std::byte*> blocks;
  for (int i = 0; i < 100; ++i) blocks.push_back(heap->allocate(16384, 4096)->addr);
  BOOST_TEST(pd.extents.size() == 1u);
  BOOST_TEST(heap->bytes_mapped() == 2u * 1024 * 1024);
  for (std::byte* block : blocks) heap->deallocate(block);
  blocks.clear();
  // Neighbours have joined: one block of nearly the whole extent fits, and so do blocks of another size.
  std::byte* large = heap->allocate(1'792 * 1024, 4096)->addr;
  BOOST_TEST(pd.extents.size() == 1u);
  heap->deallocate(large);
  for (int i = 0; i < 10'000; ++i) blocks.push_back(heap->allocate(128, 64)->addr);
  for (std::byte* block : blocks) heap->deallocate(block);
  BOOST_TEST(pd.extents.size() == 1u);
}

BOOST_AUTO_TEST_CASE(no_block_lies_across_two_extents_that_are_neighbours) {
  constexpr std::size_t kRoom = 32 << 20;
  void* room = mmap(nullptr, kRoom, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  {
    FakePd pd;
    pd.next_addr = static_cast<std::byte*>(room);
    auto heap = heap_on(pd);
    std::vector<std::byte*> blocks;
    // 28 KiB and the page that comes with it fill an extent without a rest.
    while (pd.extents.size() < 4) blocks.push_back(heap->allocate(28 * 1024, 4096)->addr);
    for (std::byte* block : blocks) heap->deallocate(block);
    auto large = heap->allocate(3 << 20, 4096);
    BOOST_REQUIRE(large.ok());
    BOOST_TEST(large->addr + (3 << 20) <= large->mr->addr + large->mr->length);
    heap->deallocate(large->addr);
  }
  munmap(room, kRoom);
}

BOOST_AUTO_TEST_CASE(no_block_lies_across_two_extents) {
  FakePd pd;
  auto heap = heap_on(pd);
  std::mt19937 random(1);
  std::deque<std::pair<std::byte*, std::size_t>> live;
  for (int i = 0; i < 20'000; ++i) {
    if (live.size() > 200 || (!live.empty() && random() % 3 == 0)) {
      heap->deallocate(live.front().first);
      live.pop_front();
      continue;
    }
    const std::size_t bytes = std::size_t{1} << random() % 20;
    auto block = heap->allocate(bytes, 64);
    BOOST_REQUIRE(block.ok());
    BOOST_REQUIRE(block->addr + bytes <= block->mr->addr + block->mr->length);
    live.emplace_back(block->addr, bytes);
  }
  BOOST_TEST(pd.extents.size() > 1u);
  for (auto& [addr, bytes] : live) heap->deallocate(addr);
  BOOST_TEST(heap->bytes_in_use() == 0u);
}

// A peer maps the extents and may write anything anywhere in them. It must reach no more than the contents of blocks.
BOOST_AUTO_TEST_CASE(garbage_in_every_byte_of_every_extent_does_not_hurt_the_heap) {
  FakePd pd;
  auto heap = heap_on(pd);
  std::mt19937 random(2);
  std::map<std::byte*, std::size_t> live;
  for (int round = 0; round < 30; ++round) {
    for (int i = 0; i < 300; ++i) {
      if (!live.empty() && random() % 2 == 0) {
        auto victim = std::next(live.begin(), random() % live.size());
        heap->deallocate(victim->first);
        live.erase(victim);
      } else {
        const std::size_t bytes = 1 + (std::size_t{1} << random() % 18);
        auto block = heap->allocate(bytes, 8);
        BOOST_REQUIRE(block.ok());
        BOOST_REQUIRE(pd.holds(block->addr, bytes));
        // No two live blocks overlap.
        const auto next = live.upper_bound(block->addr);
        if (next != live.end()) BOOST_REQUIRE(block->addr + bytes <= next->first);
        if (next != live.begin()) BOOST_REQUIRE(std::prev(next)->first + std::prev(next)->second <= block->addr);
        live.emplace(block->addr, bytes);
      }
    }
    for (const auto* extent : pd.extents)
      memset(extent->addr, round % 2 ? 0xFF : static_cast<int>(random() & 0xFF), extent->length);
  }
  for (auto& [addr, bytes] : live) heap->deallocate(addr);
  BOOST_TEST(heap->bytes_in_use() == 0u);
  heap.reset();
  BOOST_TEST(pd.extents.empty());
}

BOOST_AUTO_TEST_CASE(no_memory_is_an_error_and_goes_away) {
  FakePd pd;
  pd.budget = 2 * 1024 * 1024;
  auto heap = heap_on(pd);
  std::vector<std::byte*> blocks;
  for (;;) {
    auto block = heap->allocate(65536, 64);
    if (!block) {
      BOOST_TEST(block.error().code == ENOMEM);
      break;
    }
    blocks.push_back(block->addr);
  }
  // A block of this size takes a page more of address space than it has bytes.
  BOOST_TEST(blocks.size() == 2u * 1024 * 1024 / (65536 + 4096));
  heap->deallocate(blocks.back());
  blocks.back() = heap->allocate(65536, 64)->addr;
  BOOST_TEST(!heap->allocate(SIZE_MAX, 1).ok());
  BOOST_TEST(!heap->allocate(SIZE_MAX / 2, 4096).ok());
  for (std::byte* block : blocks) heap->deallocate(block);
}

BOOST_AUTO_TEST_CASE(a_signal_handler_that_comes_in_once_more_is_refused) {
  FakePd pd;
  auto heap = std::move(RegisteredHeap::create(pd).value());
  int error = 0;
  pd.interrupt = [&] {
    if (auto block = heap->allocate(64, 64); !block) error = block.error().code;
  };
  auto block = heap->allocate(64, 64);
  BOOST_REQUIRE(block);
  BOOST_TEST(error == EDEADLK);
  auto after = heap->allocate(64, 64);
  BOOST_REQUIRE(after);
  heap->deallocate(block->addr);
  heap->deallocate(after->addr);
}

/// Called by fork() in the parent when the heaps are locked: what is registered first runs last.
std::function<void()> in_the_middle_of_fork;
[[gnu::constructor]] void register_for_fork() {
  pthread_atfork([] { in_the_middle_of_fork ? in_the_middle_of_fork() : void(); }, nullptr, nullptr);
}

BOOST_AUTO_TEST_CASE(a_signal_handler_that_interrupts_a_fork_is_refused) {
  FakePd pd;
  auto heap = std::move(RegisteredHeap::create(pd).value());
  int error = 0;
  in_the_middle_of_fork = [&] {
    if (auto block = heap->allocate(64, 64); !block) error = block.error().code;
  };
  const pid_t child = fork();
  if (child == 0) _exit(0);
  in_the_middle_of_fork = nullptr;
  BOOST_TEST(waitpid(child, nullptr, 0) == child);
  BOOST_TEST(error == EDEADLK);
  auto block = heap->allocate(64, 64);
  BOOST_REQUIRE(block);
  heap->deallocate(block->addr);
}

BOOST_AUTO_TEST_CASE(heaps_do_not_share_extents) {
  FakePd one, two;
  auto a = heap_on(one);
  auto b = heap_on(two);
  for (int i = 0; i < 1000; ++i) {
    std::byte* x = a->allocate(200, 8)->addr;
    std::byte* y = b->allocate(200, 8)->addr;
    BOOST_REQUIRE(one.holds(x, 200));
    BOOST_REQUIRE(two.holds(y, 200));
    a->deallocate(x);
    b->deallocate(y);
  }
}

BOOST_AUTO_TEST_CASE(a_destroyed_heap_leaves_nothing_mapped) {
  const auto once = [] {
    FakePd pd;
    auto heap = heap_on(pd);
    heap->deallocate(heap->allocate(1000, 8)->addr);
    heap.reset();
    BOOST_TEST(pd.extents.empty());
  };
  for (int i = 0; i < 10; ++i) once();
  const std::size_t before = lines_of_maps();
  for (int i = 0; i < 200; ++i) once();
  BOOST_TEST(lines_of_maps() <= before + 2);
}

BOOST_AUTO_TEST_CASE(threads_allocate_and_free_each_others_blocks) {
  FakePd pd;
  pd.budget = SIZE_MAX;
  auto heap = heap_on(pd);
  // The fake's set is not locked: grow before the threads start, and take less than that.
  heap->deallocate(heap->allocate(32 << 20, 64)->addr);
  std::mutex mutex;
  std::vector<std::byte*> pool;
  std::vector<std::thread> threads;
  for (unsigned t = 0; t < 4; ++t)
    threads.emplace_back([&, t] {
      std::mt19937 random(t);
      for (int i = 0; i < 20'000; ++i) {
        std::byte* mine = heap->allocate(1 + random() % 10'000, 8)->addr;
        memset(mine, static_cast<int>(t), 1);
        const std::lock_guard lock(mutex);
        pool.push_back(mine);
        if (pool.size() > 100) {
          std::swap(pool[random() % pool.size()], pool.back());
          heap->deallocate(pool.back());
          pool.pop_back();
        }
      }
    });
  for (auto& thread : threads) thread.join();
  for (std::byte* block : pool) heap->deallocate(block);
  BOOST_TEST(heap->bytes_in_use() == 0u);
}

BOOST_AUTO_TEST_CASE(a_forks_child_reads_blocks_but_leaves_the_heap_alone) {
  FakePd pd;
  auto heap = heap_on(pd);
  std::byte* block = heap->allocate(100, 8)->addr;
  memset(block, 7, 100);
  const int status = in_child([&] {
    if (block[99] != std::byte{7}) return 1;
    heap->deallocate(block);
    if (heap->bytes_in_use() == 0) return 2;
    if (heap->allocate(100, 8).ok()) return 3;
    heap.reset();
    if (block[99] != std::byte{7}) return 4;
    // A heap of its own works.
    FakePd own;
    auto other = heap_on(own);
    std::byte* mine = other->allocate(100, 8)->addr;
    other->deallocate(mine);
    return 0;
  });
  BOOST_TEST(status == 0);
  heap->deallocate(block);
  BOOST_TEST(heap->bytes_in_use() == 0u);
}

#ifndef __SANITIZE_THREAD__  // which cannot follow threads of a fork's child
BOOST_AUTO_TEST_CASE(a_fork_in_the_middle_of_other_threads_work_leaves_the_child_able_to_make_heaps) {
  FakePd pd;
  auto heap = heap_on(pd);
  heap->deallocate(heap->allocate(32 << 20, 64)->addr);
  std::atomic<bool> stop{false};
  std::vector<std::thread> threads;
  for (unsigned t = 0; t < 3; ++t)
    threads.emplace_back([&, t] {
      std::mt19937 random(t);
      while (!stop) {
        std::byte* a = heap->allocate(1 + random() % 100'000, 8)->addr;
        std::byte* b = heap->allocate(1 + random() % 1000, 8)->addr;
        heap->deallocate(a);
        heap->deallocate(b);
      }
    });
  // Forked from a thread that ends in the child, so that jemalloc's thread clean-up runs there.
  for (int i = 0; i < 100; ++i) {
    int status = -1;
    std::thread([&] {
      const pid_t pid = fork();
      if (pid != 0) {
        BOOST_REQUIRE(waitpid(pid, &status, 0) == pid);
        return;
      }
      alarm(30);
      std::thread([&] {
        FakePd own;
        auto mine = heap_on(own);
        for (int n = 0; n < 50; ++n) mine->deallocate(mine->allocate(1000, 8)->addr);
      }).join();
      FakePd own;
      auto mine = heap_on(own);
      mine->deallocate(mine->allocate(100'000, 8)->addr);
      mine.reset();
      const bool left_alone = !heap->allocate(1, 1).ok();
      if (!left_alone) _exit(1);
#ifdef __SANITIZE_ADDRESS__
      _exit(0);  // the heap that the child left alone would be called a leak
#endif
      pthread_exit(nullptr);  // the last thread of the child: it ends with status 0
    }).join();
    BOOST_TEST(status == 0);
  }
  stop = true;
  for (auto& thread : threads) thread.join();
  BOOST_TEST(heap->bytes_in_use() == 0u);
}
#endif

/// Its map_extent says that it has begun, and waits.
class SlowPd final : public Pd {
 public:
  Result<std::unique_ptr<Mr>> register_memory(std::span<std::byte>, Access) override { return fail(ENOTSUP, "fake"); }
  Result<std::unique_ptr<Qp>> create_qp(const QpInit&) override { return fail(ENOTSUP, "fake"); }
  Result<std::unique_ptr<Mr>> map_extent(std::size_t bytes) override {
    begun = true;
    while (!go_on) std::this_thread::yield();
    return fast.map_extent(bytes);
  }
  FakePd fast;
  std::atomic<bool> begun{false}, go_on{false};
};

BOOST_AUTO_TEST_CASE(a_slow_driver_holds_up_neither_fork_nor_other_heaps) {
  SlowPd slow;
  FakePd fast;
  auto slow_heap = heap_on(slow);
  auto fast_heap = heap_on(fast);
  std::thread waiter([&] { slow_heap->deallocate(slow_heap->allocate(1, 1)->addr); });
  while (!slow.begun) std::this_thread::yield();
  BOOST_TEST(in_child([] { return 0; }) == 0);
  fast_heap->deallocate(fast_heap->allocate(1, 1)->addr);
  slow.go_on = true;
  waiter.join();
  BOOST_TEST(slow_heap->bytes_in_use() == 0u);
}

}  // namespace rdma
