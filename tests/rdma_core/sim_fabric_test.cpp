// The simulation itself: that a seed replays a run, that its faults happen, and above all that check() finds what it must find. The
// contract is tested by the conformance suites.
#define NO_ALLOC_DEFINE_HOOKS
#include "tests/support/no_alloc.hpp"

#include <boost/test/data/test_case.hpp>
#include <functional>
#include <set>
#include <string>

#include "tests/conformance/sim_fixture.hpp"

using namespace rdma;
using namespace rdma::sim;
using rdma::conformance::End;
using rdma::conformance::Ends;
using rdma::conformance::move_to;
namespace bdata = boost::unit_test::data;

namespace sim_test {  // named: lambdas in data-driven cases capture it

/// Both ends on a fabric of the test's own shape. Nothing is checked at the end but by the test.
struct Pair {
  explicit Pair(const SimOptions& options, std::uint32_t recvs = 8) : fabric(options) {
    for (Side side : {Side::a, Side::b})
      Ends<conformance::SimDevices>::make(end(side), fabric.device(side), fabric.path(side), {.recvs = recvs});
    fabric.connect(*a.qp, *b.qp);
  }
  ~Pair() {
    a.clear();
    b.clear();
  }
  End& end(Side side) { return side == Side::a ? a : b; }
  unsigned drain(Cq& cq) {
    Wc wc[32];
    unsigned n = 0, got = 0;
    while ((got = cq.poll(wc)) > 0) n += got;
    return n;
  }
  void drain_all() {
    for (End* e : {&a, &b}) {
      drain(*e->send_cq);
      drain(*e->recv_cq);
    }
  }
  bool complains_of(const char* what) const {
    const std::string report = fabric.check();
    BOOST_TEST_MESSAGE(report);
    return report.find(what) != std::string::npos;
  }

  SimFabric fabric;
  End a, b;
};

}  // namespace sim_test
using sim_test::Pair;

namespace {

/// What happened in a run, for comparing two.
std::string story(const SimOptions& options) {
  Pair pair(options, 12);
  std::string log;
  std::uint32_t sent = 0, done = 0;
  bool reaped = false;
  const auto look = [&](const char* who, Cq& cq) {
    Wc wc[4];
    for (unsigned n = cq.poll(wc), i = 0; i < n; ++i) {
      reaped = true;
      log += who + std::to_string(wc[i].wr_id) + "@" + std::to_string(pair.fabric.clock().now()) + " ";
      if (who[0] == 'r') (void)pair.b.post_recv(static_cast<std::uint32_t>(wc[i].wr_id));
      if (who[0] == 's') ++done;
    }
  };
  do {
    reaped = false;
    while (sent < 50 && sent - done < 3) {
      pair.a.fill(20 + sent % 3, 40, sent);
      if (pair.a.send(20 + sent % 3, 40, kSignalled, sent) != Post::ok) {
        log += "full ";
        break;
      }
      ++sent;
    }
    look("s", *pair.a.send_cq);
    look("r", *pair.b.recv_cq);
  } while (pair.fabric.step() || reaped);  // a refused post is repeated after the next completion
  BOOST_TEST(done == 50u);
  BOOST_TEST(pair.fabric.check() == "");
  return log;
}

}  // namespace

// --- seeds

BOOST_DATA_TEST_CASE(a_seed_replays_a_run_and_another_seed_is_another_run, bdata::xrange(1, 9), seed) {
  const SimOptions options{.seed = static_cast<std::uint64_t>(seed), .fail_post_percent = 30};
  SimOptions other = options;
  other.seed += 1000;
  const std::string first = story(options);
  BOOST_TEST(first == story(options));
  BOOST_TEST(first != story(other));
}

BOOST_AUTO_TEST_CASE(posts_fail_as_often_as_told) {
  Pair pair({.seed = 3, .fail_post_percent = 50}, 16);
  unsigned refused = 0;
  BOOST_TEST(pair.a.send(0, 8, kSignalled) == Post::ok);  // nothing to wait for yet: never refused
  for (int i = 0; i < 400; ++i) {
    if (pair.a.send(1, 8, 0) == Post::queue_full) ++refused;
    if (i % 8 == 7) {
      pair.fabric.run_until_idle();
      pair.drain(*pair.b.recv_cq);
      pair.drain(*pair.a.send_cq);
      for (std::uint32_t k = 0; k < 8; ++k) (void)pair.b.post_recv(16 + static_cast<std::uint32_t>(i / 8 % 2) * 8 + k);
      BOOST_REQUIRE_EQUAL(pair.a.send(0, 8, kSignalled), Post::ok);
    }
  }
  BOOST_TEST(refused > 100u);
  BOOST_TEST(pair.fabric.counters(Side::a).refused_posts <= refused);
  BOOST_TEST(pair.fabric.counters(Side::a).refused_posts > 100u);
}

BOOST_AUTO_TEST_CASE(a_send_may_overtake_the_read_before_it) {
  // The Read's bytes are fetched when they are fetched: over many seeds both outcomes must be seen.
  std::set<bool> saw_change;
  for (std::uint64_t seed = 1; seed <= 60; ++seed) {
    Pair pair({.seed = seed});
    pair.b.fill(20, 100, 1);
    BOOST_REQUIRE_EQUAL(
        pair.a.post(WrOpcode::rdma_read, 21, 100, kSignalled, 1, pair.b.remote(pair.b.slot(20)), pair.b.memory->rkey), Post::ok);
    BOOST_REQUIRE_EQUAL(pair.a.send(22, 8, kSignalled, 2), Post::ok);
    pair.fabric.run_until([&] { return pair.b.recv_cq->maybe_ready(); });
    pair.b.fill(20, 100, 2);  // the peer thinks that the Read is over
    pair.fabric.run_until_idle();
    saw_change.insert(pair.a.holds(21, 100, 2));
    pair.drain_all();
    BOOST_TEST(pair.fabric.check() == "");
  }
  BOOST_TEST(saw_change.size() == 2u);
}

BOOST_AUTO_TEST_CASE(an_arm_without_its_fence_may_be_missed) {
  unsigned woken = 0;
  for (std::uint64_t seed = 1; seed <= 40; ++seed) {
    Pair pair({.seed = seed});
    unsigned wakes = 0;
    pair.fabric.on_wake(Side::b, [&](Cq&, std::uint8_t) { ++wakes; });
    pair.b.recv_cq->arm(kWakeWord);
    BOOST_REQUIRE_EQUAL(pair.a.send(0, 8), Post::ok);
    pair.fabric.run_until_idle();
    woken += wakes;
    pair.drain_all();
  }
  BOOST_TEST(woken > 0u);
  BOOST_TEST(woken < 40u);
}

BOOST_AUTO_TEST_CASE(an_unsolicited_send_may_or_may_not_wake) {
  unsigned woken = 0;
  for (std::uint64_t seed = 1; seed <= 40; ++seed) {
    Pair pair({.seed = seed});
    pair.b.recv_cq->arm(kWakeWord);
    pair.fabric.device(Side::b).arm_fence();
    BOOST_REQUIRE_EQUAL(pair.a.send(0, 8, kSignalled), Post::ok);
    pair.fabric.run_until_idle();
    woken += pair.fabric.counters(Side::b).announcements != 0;
    pair.drain_all();
  }
  BOOST_TEST(woken > 0u);
  BOOST_TEST(woken < 40u);
}

// --- manners

BOOST_AUTO_TEST_CASE(rnr_retries_can_run_out) {
  Pair pair({.seed = 1, .rnr_retries = 3}, 0);
  BOOST_REQUIRE_EQUAL(pair.a.send(0, 8), Post::ok);
  pair.fabric.run_until_idle();
  Wc wc;
  BOOST_REQUIRE_EQUAL(pair.a.send_cq->poll({&wc, 1}), 1u);
  BOOST_TEST(wc.status == WcStatus::rnr_retry_exceeded);
  BOOST_TEST(pair.a.qp->state() == QpState::error);
  BOOST_TEST(pair.b.qp->state() == QpState::rts);
}

BOOST_AUTO_TEST_CASE(on_an_rnic_a_send_without_a_receive_kills_both_ends) {
  Pair pair({.seed = 1, .flavour = NodeType::rnic}, 0);
  BOOST_REQUIRE_EQUAL(pair.a.send(0, 8), Post::ok);
  pair.fabric.run_until_idle();
  Wc wc;
  BOOST_REQUIRE_EQUAL(pair.a.send_cq->poll({&wc, 1}), 1u);
  BOOST_TEST(wc.status == WcStatus::rnr_retry_exceeded);
  BOOST_TEST(pair.b.qp->state() == QpState::error);
}

BOOST_AUTO_TEST_CASE(on_an_rnic_the_passive_side_must_not_send_first) {
  for (const bool wait_for_it : {false, true}) {
    Pair pair({.seed = 1, .flavour = NodeType::rnic});
    if (wait_for_it) {
      BOOST_REQUIRE_EQUAL(pair.a.send(0, 8), Post::ok);
      pair.fabric.run_until_idle();
    }
    BOOST_REQUIRE_EQUAL(pair.b.send(0, 8, kSignalled | kSolicited, 5), Post::ok);
    pair.fabric.run_until_idle();
    BOOST_TEST(pair.b.qp->state() == (wait_for_it ? QpState::rts : QpState::error));
    BOOST_TEST(pair.a.qp->state() == (wait_for_it ? QpState::rts : QpState::error));
    pair.drain_all();
    BOOST_TEST(pair.fabric.check() == "");
  }
}

BOOST_AUTO_TEST_CASE(on_infiniband_a_peers_error_is_silent_until_something_is_sent) {
  Pair pair({.seed = 1});
  BOOST_REQUIRE(pair.b.qp->modify(move_to(QpState::error)));
  pair.fabric.run_until_idle();
  BOOST_TEST(pair.a.qp->state() == QpState::rts);
  BOOST_REQUIRE_EQUAL(pair.a.send(0, 8), Post::ok);
  pair.fabric.run_until_idle();
  Wc wc;
  BOOST_REQUIRE_EQUAL(pair.a.send_cq->poll({&wc, 1}), 1u);
  BOOST_TEST(wc.status == WcStatus::retry_exceeded);
}

// --- bad days

BOOST_DATA_TEST_CASE(a_death_at_any_step_leaves_the_other_side_whole, bdata::xrange(1, 41), step) {
  for (NodeType flavour : {NodeType::ib_ca, NodeType::rnic})
    for (const bool remembers : {false, true}) {
      SimOptions options{.seed = static_cast<std::uint64_t>(step), .flavour = flavour, .remembers_sent_data = remembers};
      Pair pair(options);
      pair.fabric.at_step(static_cast<std::uint64_t>(step), [&] { pair.fabric.kill(Side::a); });
      for (std::uint32_t i = 0; i < 6; ++i) {
        pair.a.fill(20 + i, 64, i);
        BOOST_REQUIRE_EQUAL(pair.a.send(20 + i, 64), Post::ok);
      }
      pair.fabric.run_until_idle();
      if (pair.fabric.alive(Side::a)) pair.fabric.kill(Side::a);
      BOOST_TEST(pair.a.send(0, 8) == Post::qp_error);
      BOOST_TEST(pair.a.post_recv(0) == Post::qp_error);
      pair.fabric.run_until_idle();
      // What arrives is the beginning of what was sent, whole; all of it where the device remembers.
      std::uint32_t arrived = 0;
      Wc wc[16];
      const unsigned n = pair.b.recv_cq->poll(wc);
      for (unsigned i = 0; i < n; ++i) {
        if (wc[i].status != WcStatus::success) continue;
        BOOST_TEST(pair.b.holds(static_cast<std::uint32_t>(wc[i].wr_id), 64, arrived));
        ++arrived;
      }
      if (remembers) BOOST_TEST(arrived == 6u);
      // The survivor's own sends end.
      (void)pair.b.send(30, 8);
      pair.fabric.run_until_idle();
      BOOST_TEST(pair.b.qp->state() == QpState::error);
      pair.drain_all();
      BOOST_TEST(pair.fabric.check() == "");
    }
}

BOOST_DATA_TEST_CASE(a_device_removed_at_any_step_flushes_everything, bdata::xrange(1, 31), step) {
  Pair pair({.seed = static_cast<std::uint64_t>(step)});
  bool told = false;
  pair.fabric.device(Side::b).on_async_event([&](AsyncEvent e) { told = e == AsyncEvent::device_fatal; });
  pair.fabric.at_step(static_cast<std::uint64_t>(step), [&] { pair.fabric.remove_device(Side::b); });
  std::uint32_t posted = 0;
  do {
    if (posted < 12 && pair.a.qp->state() == QpState::rts && pair.a.send(20 + posted, 8) == Post::ok) ++posted;
  } while (pair.fabric.step());
  if (!told) {
    pair.fabric.remove_device(Side::b);
    pair.fabric.run_until_idle();
  }
  BOOST_TEST(told);
  BOOST_TEST(pair.drain(*pair.b.recv_cq) == 8u);
  BOOST_TEST(pair.drain(*pair.a.send_cq) + (pair.fabric.check().find("never completed") == std::string::npos ? 0u : 100u) ==
             posted);
  pair.drain_all();
  BOOST_TEST(pair.fabric.check() == "");
}

BOOST_DATA_TEST_CASE(a_broken_connection_flushes_both_ends_once, bdata::xrange(1, 31), step) {
  Pair pair({.seed = static_cast<std::uint64_t>(step)});
  pair.fabric.at_step(static_cast<std::uint64_t>(step), [&] { pair.fabric.break_qp(*pair.a.qp); });
  for (std::uint32_t i = 0; i < 8; ++i) BOOST_REQUIRE_EQUAL(pair.a.send(20 + i, 8), Post::ok);
  pair.fabric.run_until_idle();
  pair.fabric.break_qp(*pair.a.qp);
  pair.fabric.run_until_idle();
  BOOST_TEST(pair.drain(*pair.a.send_cq) == 8u);
  BOOST_TEST(pair.drain(*pair.a.recv_cq) == 8u);
  BOOST_TEST(pair.drain(*pair.b.recv_cq) == 8u);
  BOOST_TEST(pair.fabric.check() == "");
}

// --- what check() finds

BOOST_AUTO_TEST_CASE(a_send_buffer_that_changes_while_posted_is_found) {
  Pair pair({.seed = 1});
  pair.a.fill(20, 64, 1);
  BOOST_REQUIRE_EQUAL(pair.a.send(20, 64), Post::ok);
  pair.a.slot(20)[63] ^= std::byte{1};
  pair.fabric.run_until_idle();
  pair.drain_all();
  BOOST_TEST(pair.complains_of("changed while it was posted"));
}

BOOST_AUTO_TEST_CASE(a_write_into_a_posted_receive_buffer_is_found) {
  Pair pair({.seed = 1});
  pair.b.slot(0)[100] = std::byte{1};
  BOOST_REQUIRE_EQUAL(pair.a.send(20, 64), Post::ok);
  pair.fabric.run_until_idle();
  pair.drain_all();
  BOOST_TEST(pair.complains_of("wrote into the posted buffer"));
}

BOOST_AUTO_TEST_CASE(a_buffer_posted_twice_is_found) {
  Pair pair({.seed = 1});
  BOOST_REQUIRE_EQUAL(pair.b.post_recv(3), Post::ok);
  BOOST_TEST(pair.complains_of("overlaps a posted buffer"));
}

BOOST_AUTO_TEST_CASE(memory_that_goes_while_it_is_used_is_found) {
  Pair pair({.seed = 1});
  auto mr = *pair.a.pd->map_extent(4096);
  const Sge sge{mr->addr, 8, mr->lkey};
  SendWr wr;
  wr.sges = &sge;
  wr.sge_count = 1;
  BOOST_REQUIRE_EQUAL(pair.a.qp->post_send(wr), Post::ok);
  pair.fabric.break_qp(*pair.a.qp);  // home again: may go
  mr.reset();
  pair.drain_all();
  BOOST_TEST(!pair.complains_of("Mr was destroyed"));
  Pair other({.seed = 1});
  auto posted = *other.b.pd->map_extent(4096);
  const RecvWr recv{9, posted->addr + 64, 64, posted->lkey};
  BOOST_REQUIRE_EQUAL(other.b.qp->post_recv({&recv, 1}), Post::ok);
  posted.reset();
  BOOST_TEST(other.complains_of("Mr was destroyed"));
}

BOOST_AUTO_TEST_CASE(too_much_inline_is_found) {
  Pair pair({.seed = 1, .max_inline = 64});
  BOOST_TEST(pair.a.send(20, 65, kInline | kSignalled) == Post::qp_error);
  pair.drain_all();
  BOOST_TEST(pair.complains_of("posted inline"));
}

BOOST_AUTO_TEST_CASE(a_completion_that_nobody_polls_is_found) {
  Pair pair({.seed = 1});
  BOOST_REQUIRE_EQUAL(pair.a.send(20, 8), Post::ok);
  pair.fabric.run_until_idle();
  BOOST_TEST(pair.complains_of("nobody polled"));
  pair.drain_all();
  BOOST_TEST(pair.fabric.check() == "");
}

BOOST_AUTO_TEST_CASE(a_livelock_is_found) {
  SimFabric fabric;
  std::function<void()> again = [&] { fabric.after(10, again); };
  fabric.after(0, again);
  BOOST_TEST(fabric.run_until_idle(500) == 500u);
  BOOST_TEST(fabric.check().find("not idle") != std::string::npos);
}

// --- time

BOOST_AUTO_TEST_CASE(time_jumps_from_event_to_event) {
  SimFabric fabric;
  const Nanos start = fabric.clock().now();
  std::vector<Nanos> when;
  fabric.after(500, [&] { when.push_back(fabric.clock().now() - start); });
  fabric.after(100, [&] {
    when.push_back(fabric.clock().now() - start);
    fabric.after(50, [&] { when.push_back(fabric.clock().now() - start); });
  });
  fabric.run_for(120);
  BOOST_TEST(fabric.clock().now() - start == 120);
  BOOST_TEST(fabric.run_until_idle() == 2u);
  BOOST_TEST((when == std::vector<Nanos>{100, 150, 500}));
  BOOST_TEST(!fabric.step());
}

// --- the allocation guard

BOOST_AUTO_TEST_CASE(the_guard_counts_what_allocates_and_nothing_else) {
  BOOST_TEST(NoAlloc::counting());
  NoAlloc nothing;
  std::uint64_t quiet = 0, loud = 0, paused = 0;
  {
    NoAlloc guard;
    volatile int sum = 0;
    for (int i = 0; i < 10; ++i) sum = sum + i;
    quiet = guard.allocations();
  }
  {
    NoAlloc guard;
    delete new std::string(200, 'x');
    loud = guard.allocations();
  }
  {
    NoAlloc guard;
    PauseNoAlloc pause;
    delete new std::string(200, 'x');
    paused = guard.allocations();
  }
  BOOST_TEST(quiet == 0u);
  BOOST_TEST(loud >= 2u);
  BOOST_TEST(paused == 0u);
}

BOOST_AUTO_TEST_CASE(the_simulated_datapath_does_not_count) {
  Pair pair({.seed = 1});
  NoAlloc guard;
  Wc wc;
  const Post post = pair.a.send(20, 8);
  const Post posted = pair.b.post_recv(9);
  (void)pair.a.send_cq->poll({&wc, 1});
  pair.a.recv_cq->arm(kWakeWord);
  const std::uint64_t allocations = guard.allocations();
  BOOST_TEST(post == Post::ok);
  BOOST_TEST(posted == Post::ok);
  BOOST_TEST(allocations == 0u);
  pair.fabric.run_until_idle();
  pair.drain_all();
}
