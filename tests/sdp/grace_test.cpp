#include "sdp/grace.hpp"

#include <atomic>
#include <cstddef>
#include <new>
#include <optional>
#include <thread>

#include <boost/test/unit_test.hpp>

using sdp::Grace;

BOOST_AUTO_TEST_CASE(nobody_looks_and_it_passes_at_once) {
  Grace grace;
  for (int i = 0; i < 10; ++i) BOOST_TEST(grace.passed(grace.epoch()));
}

BOOST_AUTO_TEST_CASE(a_look_that_began_before_holds_it_up) {
  Grace grace;
  std::optional<Grace::Look> look(grace);
  const auto noted = grace.epoch();
  BOOST_TEST(!grace.passed(noted));
  BOOST_TEST(!grace.passed(noted));
  look.reset();
  BOOST_TEST(grace.passed(noted));
}

// A look nearly always overlaps another one where many threads wait: only those that began before count.
BOOST_AUTO_TEST_CASE(later_looks_do_not_hold_it_up) {
  Grace grace;
  std::optional<Grace::Look> first(grace);
  const auto noted = grace.epoch();
  BOOST_TEST(!grace.passed(noted));
  std::optional<Grace::Look> second(grace);
  first.reset();
  BOOST_TEST(grace.passed(noted));
}

BOOST_AUTO_TEST_CASE(looks_nest) {
  Grace grace;
  const auto noted = grace.epoch();
  {
    const Grace::Look outer(grace);
    const Grace::Look inner(grace);
  }
  BOOST_TEST(grace.passed(noted));
}

BOOST_AUTO_TEST_CASE(a_child_forgets_the_looks_of_threads_that_it_does_not_have) {
  Grace grace;
  alignas(Grace::Look) std::byte parents[sizeof(Grace::Look)];
  new (parents) Grace::Look(grace);
  const auto noted = grace.epoch();
  BOOST_TEST(!grace.passed(noted));
  grace.forget();
  BOOST_TEST(grace.passed(noted));
}

BOOST_AUTO_TEST_CASE(what_a_thread_sees_stays_until_it_has_looked) {
  struct Thing {
    std::atomic<bool> alive{true};
  };
  Grace grace;
  Thing things[2];
  std::atomic<Thing*> shown{&things[0]};
  std::atomic<bool> stop{false}, saw_dead{false};
  std::thread looker([&] {
    while (!stop.load()) {
      const Grace::Look look(grace);
      const Thing* thing = shown.load(std::memory_order_seq_cst);
      for (int i = 0; i < 20; ++i)
        if (!thing->alive.load()) saw_dead = true;
    }
  });
  for (int i = 0; i < 20'000; ++i) {
    Thing* old = shown.load();
    Thing* next = old == &things[0] ? &things[1] : &things[0];
    next->alive = true;
    shown.store(next, std::memory_order_seq_cst);
    const auto noted = grace.epoch();
    while (!grace.passed(noted)) std::this_thread::yield();
    old->alive = false;
  }
  stop = true;
  looker.join();
  BOOST_TEST(!saw_dead);
}
