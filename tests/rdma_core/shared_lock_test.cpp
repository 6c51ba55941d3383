#include "rdma_core/base/shared_lock.hpp"

#include <sched.h>
#include <signal.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#include <boost/test/unit_test.hpp>
#include <cstring>
#include <memory>
#include <new>
#include <set>
#include <thread>
#include <vector>

#ifdef __SANITIZE_THREAD__
extern "C" const char* __tsan_default_options() { return "die_after_fork=0"; }
#endif

namespace rdma {
namespace {

template <class T>
struct Unmap {
  void operator()(T* p) const { munmap(p, sizeof(T)); }
};
template <class T>
std::unique_ptr<T, Unmap<T>> shared() {
  void* p = mmap(nullptr, sizeof(T), PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
  BOOST_REQUIRE(p != MAP_FAILED);
  return std::unique_ptr<T, Unmap<T>>(new (p) T);
}

template <class Body>
pid_t start(Body body) {
  const pid_t pid = fork();
  BOOST_REQUIRE(pid >= 0);
  if (pid == 0) {
    prctl(PR_SET_PDEATHSIG, SIGKILL);
    alarm(60);
    _exit(body());
  }
  return pid;
}

/// Exit status of a child that start() made; -signal if it was killed.
int finish(pid_t pid) {
  int status = 0;
  BOOST_REQUIRE(waitpid(pid, &status, 0) == pid);
  return WIFEXITED(status) ? WEXITSTATUS(status) : -WTERMSIG(status);
}

void wait_until(const std::atomic<int>& word, int value) {
  while (word.load() != value) sched_yield();
}

bool is_zombie(pid_t pid) {
  siginfo_t info{};
  return waitid(P_PID, static_cast<id_t>(pid), &info, WEXITED | WNOHANG | WNOWAIT) == 0 && info.si_pid == pid;
}

struct Board {
  SharedLock lock;
  std::atomic<int> step{0};
  std::atomic<int> inside{0};
  std::atomic<int> deaths{0};
  long counter = 0;
};

}  // namespace

// ---------------------------------------------------------------- lock

BOOST_AUTO_TEST_CASE(zeroed_memory_is_an_unlocked_lock) {
  auto board = shared<Board>();
  memset(static_cast<void*>(board.get()), 0, sizeof(Board));
  BOOST_TEST(!board->lock.held_by_me());
  BOOST_TEST(board->lock.owner_pid() == 0u);
  BOOST_TEST((board->lock.lock() == Acquired::clean));
  BOOST_TEST(board->lock.held_by_me());
  BOOST_TEST(board->lock.owner_pid() == static_cast<std::uint32_t>(getpid()));
  BOOST_TEST(!board->lock.try_lock());
  board->lock.unlock();
  BOOST_TEST(board->lock.try_lock());
  board->lock.unlock();
  BOOST_TEST(!board->lock.held_by_me());
}

BOOST_AUTO_TEST_CASE(held_by_me_means_this_thread) {
  auto board = shared<Board>();
  const SharedLockGuard guard(board->lock);
  bool held = true;
  std::thread([&] { held = board->lock.held_by_me(); }).join();
  BOOST_TEST(!held);
}

BOOST_AUTO_TEST_CASE(one_at_a_time_among_threads_and_processes) {
  constexpr int kProcesses = 3, kThreads = 3;
  constexpr long kRounds = 20'000;
  auto board = shared<Board>();
  const auto work = [&] {
    for (long i = 0; i < kRounds; ++i) {
      if (board->lock.lock() != Acquired::clean) board->deaths.fetch_add(1);
      if (board->inside.fetch_add(1) != 0) board->step.store(1);
      board->counter = board->counter + 1;
      board->inside.fetch_sub(1);
      board->lock.unlock();
    }
  };
  std::vector<pid_t> children;
  for (int p = 0; p < kProcesses; ++p)
    children.push_back(start([&] {
      std::vector<std::thread> threads;
      for (int t = 0; t < kThreads; ++t) threads.emplace_back(work);
      for (auto& thread : threads) thread.join();
      return 0;
    }));
  for (const pid_t child : children) BOOST_TEST(finish(child) == 0);
  BOOST_TEST(board->counter == kProcesses * kThreads * kRounds);
  BOOST_TEST(board->step.load() == 0);
  BOOST_TEST(board->deaths.load() == 0);
}

BOOST_AUTO_TEST_CASE(a_waiter_sleeps_and_is_woken) {
  auto board = shared<Board>();
  (void)board->lock.lock();
  timespec cpu{};
  std::thread waiter([&] {
    board->step.store(1);
    const SharedLockGuard guard(board->lock);
    clock_gettime(CLOCK_THREAD_CPUTIME_ID, &cpu);
    BOOST_TEST(!guard.owner_died());
  });
  wait_until(board->step, 1);
  usleep(200'000);  // long enough that spinning all the time would show
  board->lock.unlock();
  waiter.join();
  BOOST_TEST(cpu.tv_sec == 0);
  BOOST_TEST(cpu.tv_nsec < 50'000'000);
}

BOOST_AUTO_TEST_CASE(a_forks_child_is_somebody_else) {
  auto board = shared<Board>();
  const SharedLockGuard guard(board->lock);
  BOOST_TEST(finish(start([&] { return board->lock.held_by_me() || board->lock.try_lock() ? 1 : 0; })) == 0);
  // A raw clone runs no fork handlers.
  const auto pid = static_cast<pid_t>(syscall(SYS_clone, SIGCHLD, 0, 0, 0, 0));
  if (pid == 0) syscall(SYS_exit_group, board->lock.held_by_me() ? 1 : 0);
  BOOST_TEST(finish(pid) == 0);
}

BOOST_AUTO_TEST_CASE(the_lock_of_a_killed_child_is_taken_over_even_while_it_is_a_zombie) {
  auto board = shared<Board>();
  const pid_t child = start([&] {
    (void)board->lock.lock();
    board->step.store(1);
    for (;;) pause();
    return 0;
  });
  wait_until(board->step, 1);
  BOOST_TEST(!board->lock.try_lock());
  kill(child, SIGKILL);
  while (!is_zombie(child)) sched_yield();
  BOOST_TEST((board->lock.lock() == Acquired::owner_died));
  BOOST_TEST(board->lock.held_by_me());
  board->lock.unlock();
  BOOST_TEST((board->lock.lock() == Acquired::clean));  // said once
  board->lock.unlock();
  BOOST_TEST(finish(child) == -SIGKILL);
}

// The waiter is not the parent, and the parent never waits for the zombie: only a pidfd tells.
BOOST_AUTO_TEST_CASE(the_lock_of_a_zombie_that_is_no_child_is_taken_over) {
  auto board = shared<Board>();
  const pid_t holder = start([&] {
    (void)board->lock.lock();
    board->step.store(1);
    for (;;) pause();
    return 0;
  });
  wait_until(board->step, 1);
  const pid_t waiter = start([&] { return board->lock.lock() == Acquired::owner_died ? 0 : 1; });
  kill(holder, SIGKILL);
  BOOST_TEST(finish(waiter) == 0);
  BOOST_TEST(is_zombie(holder));
  BOOST_TEST(finish(holder) == -SIGKILL);
}

BOOST_AUTO_TEST_CASE(sleepers_survive_the_death_of_the_owner_and_of_a_woken_sleeper) {
  auto board = shared<Board>();
  const auto hold = [&] {
    const Acquired acquired = board->lock.lock();
    if (acquired == Acquired::owner_died) board->deaths.fetch_add(1);
    board->step.fetch_add(1);
    for (;;) pause();
    return 0;
  };
  std::vector<pid_t> holders;
  for (int i = 0; i < 4; ++i) holders.push_back(start(hold));
  // Kill whoever holds it, until all have.
  for (int i = 1; i <= 4; ++i) {
    wait_until(board->step, i);
    kill(static_cast<pid_t>(board->lock.owner_pid()), SIGKILL);
  }
  for (const pid_t holder : holders) BOOST_TEST(finish(holder) == -SIGKILL);
  BOOST_TEST((board->lock.lock() == Acquired::owner_died));
  BOOST_TEST(board->deaths.load() == 3);
  board->lock.unlock();
}

BOOST_AUTO_TEST_CASE(the_lock_of_a_thread_that_ended_is_taken_over) {
  auto board = shared<Board>();
  std::thread([&] { (void)board->lock.lock(); }).join();
  BOOST_TEST((board->lock.lock() == Acquired::owner_died));
  board->lock.unlock();
}

BOOST_AUTO_TEST_CASE(a_slow_owner_is_not_taken_for_dead) {
  auto board = shared<Board>();
  const pid_t holder = start([&] {
    (void)board->lock.lock();
    board->step.store(1);
    wait_until(board->step, 2);
    board->counter = 42;
    board->lock.unlock();
    return 0;
  });
  wait_until(board->step, 1);
  kill(holder, SIGSTOP);
  std::thread releaser([&] {
    usleep(150'000);  // several slices of the waiter's sleep
    board->step.store(2);
    kill(holder, SIGCONT);
  });
  BOOST_TEST((board->lock.lock() == Acquired::clean));
  BOOST_TEST(board->counter == 42);
  board->lock.unlock();
  releaser.join();
  BOOST_TEST(finish(holder) == 0);
}

BOOST_AUTO_TEST_CASE(an_owner_in_another_pid_namespace_is_not_taken_for_dead) {
  auto board = shared<Board>();
  (void)board->lock.lock();  // this process is at home from here on
  board->lock.unlock();
  const pid_t outer = start([&] {
    if (unshare(CLONE_NEWUSER | CLONE_NEWPID) != 0 && unshare(CLONE_NEWPID) != 0) return 77;
    const pid_t inner = start([&] {
      (void)board->lock.lock();  // as process 1, whose number means somebody else outside
      board->step.store(1);
      wait_until(board->step, 2);
      board->lock.unlock();
      return 0;
    });
    return finish(inner);
  });
  int waited = 0;
  while (board->step.load() != 1 && (waited = is_zombie(outer)) == 0) sched_yield();
  if (waited != 0) {
    BOOST_TEST(finish(outer) == 77);
    BOOST_TEST_MESSAGE("no pid namespaces here: not tested");
    return;
  }
  std::thread releaser([&] {
    usleep(100'000);
    board->step.store(2);
  });
  BOOST_TEST((board->lock.lock() == Acquired::clean));
  BOOST_TEST(board->step.load() == 2);
  board->lock.unlock();
  releaser.join();
  BOOST_TEST(finish(outer) == 0);
}

BOOST_AUTO_TEST_CASE(locking_twice_stops_the_process) {
  auto board = shared<Board>();
  const int result = finish(start([&] {
    for (const int signal_number : {SIGILL, SIGTRAP, SIGABRT}) signal(signal_number, SIG_DFL);  // Boost's
    close(2);
    (void)board->lock.lock();
    (void)board->lock.lock();
    return 0;
  }));
  BOOST_TEST((result == -SIGILL || result == -SIGTRAP || result == -SIGABRT));
}

// ---------------------------------------------------------------- slab

BOOST_AUTO_TEST_CASE(cells_are_zeroed_aligned_apart_and_used_again) {
  SharedSlab slab(200);
  BOOST_TEST(slab.cell_bytes() == 256u);
  std::set<std::byte*> cells;
  for (int i = 0; i < 5000; ++i) {
    auto* cell = static_cast<std::byte*>(slab.allocate());
    BOOST_REQUIRE(cell != nullptr);
    BOOST_REQUIRE(reinterpret_cast<std::uintptr_t>(cell) % 64 == 0);
    for (std::size_t b = 0; b < 256; ++b) BOOST_REQUIRE(cell[b] == std::byte{0});
    memset(cell, 0xAB, 256);
    const auto next = cells.lower_bound(cell);
    if (next != cells.end()) BOOST_REQUIRE(cell + 256 <= *next);
    if (next != cells.begin()) BOOST_REQUIRE(*std::prev(next) + 256 <= cell);
    cells.insert(cell);
  }
  BOOST_TEST(slab.cells_in_use() == 5000u);
  for (std::byte* cell : cells) slab.deallocate(cell);
  BOOST_TEST(slab.cells_in_use() == 0u);
  for (int i = 0; i < 5000; ++i) {
    auto* cell = static_cast<std::byte*>(slab.allocate());
    BOOST_REQUIRE(cells.count(cell) == 1);
    for (std::size_t b = 0; b < 256; ++b) BOOST_REQUIRE(cell[b] == std::byte{0});
  }
}

BOOST_AUTO_TEST_CASE(cells_of_every_size) {
  for (const std::size_t bytes :
       {std::size_t{0}, std::size_t{1}, std::size_t{64}, std::size_t{30'000}, SharedSlab::max_cell_bytes()}) {
    SharedSlab slab(bytes);
    void* a = slab.allocate();
    void* b = slab.allocate();
    BOOST_REQUIRE(a != nullptr);
    BOOST_REQUIRE(b != nullptr);
    BOOST_TEST(a != b);
    memset(a, 1, slab.cell_bytes());
    memset(b, 2, slab.cell_bytes());
    BOOST_TEST(*static_cast<char*>(a) == 1);
    slab.deallocate(a);
    slab.deallocate(b);
    slab.deallocate(nullptr);
    BOOST_TEST(slab.cells_in_use() == 0u);
  }
}

BOOST_AUTO_TEST_CASE(a_cell_is_one_thing_in_parent_and_child) {
  SharedSlab slab(sizeof(Board));
  auto* board = new (slab.allocate()) Board;
  (void)board->lock.lock();
  const pid_t child = start([&] {
    board->step.store(1);
    const SharedLockGuard guard(board->lock);
    board->counter = 7;
    return 0;
  });
  wait_until(board->step, 1);
  board->counter = 6;
  board->lock.unlock();
  BOOST_TEST(finish(child) == 0);
  BOOST_TEST(board->counter == 7);
}

BOOST_AUTO_TEST_CASE(a_child_neither_frees_nor_reuses_what_it_inherited) {
  SharedSlab slab(64);
  auto* cell = static_cast<char*>(slab.allocate());
  auto* freed = static_cast<char*>(slab.allocate());
  slab.deallocate(freed);
  *cell = 'p';
  const pid_t child = start([&] {
    if (slab.cells_in_use() != 0) return 1;
    slab.deallocate(cell);
    for (int i = 0; i < 3000; ++i) {
      auto* own = static_cast<char*>(slab.allocate());
      if (own == nullptr || own == cell || own == freed) return 2;
      if (own >= cell - 65536 && own < cell + 65536 &&
          (reinterpret_cast<std::uintptr_t>(own) >> 16) == (reinterpret_cast<std::uintptr_t>(cell) >> 16))
        return 3;
      *own = 'c';
      if (i % 2) slab.deallocate(own);
    }
    if (slab.cells_in_use() != 1500) return 4;
    // And its own child again.
    return finish(start([&] { return slab.cells_in_use() == 0 && slab.allocate() != nullptr && *cell == 'p' ? 0 : 1; }));
  });
  BOOST_TEST(finish(child) == 0);
  BOOST_TEST(*cell == 'p');
  BOOST_TEST(slab.cells_in_use() == 1u);
  BOOST_TEST(slab.allocate() == freed);
}

BOOST_AUTO_TEST_CASE(a_fork_while_other_threads_allocate_leaves_the_child_able_to) {
  SharedSlab slab(128);
  std::atomic<bool> stop{false};
  std::vector<std::thread> threads;
  for (int t = 0; t < 2; ++t)
    threads.emplace_back([&] {
      while (!stop) {
        void* cells[8];
        for (void*& cell : cells) cell = slab.allocate();
        for (void* cell : cells) slab.deallocate(cell);
      }
    });
  for (int i = 0; i < 50; ++i)
    BOOST_TEST(finish(start([&] {
                 for (int n = 0; n < 100; ++n)
                   if (slab.allocate() == nullptr) return 1;
                 return slab.cells_in_use() == 100 ? 0 : 2;
               })) == 0);
  stop = true;
  for (auto& thread : threads) thread.join();
  BOOST_TEST(slab.cells_in_use() == 0u);
}

}  // namespace rdma
