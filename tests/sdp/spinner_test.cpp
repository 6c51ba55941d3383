#include "sdp/spinner.hpp"

#include <boost/test/unit_test.hpp>

#include "sdp/engine.hpp"

using namespace sdp;

namespace {
constexpr std::int64_t kSpinNs = 50'000;  // SDP_SPIN_US by default
struct FastAgain {
  ~FastAgain() { engine::spin_turn_takes(0); }
};
}  // namespace

BOOST_AUTO_TEST_SUITE(spinner)

BOOST_FIXTURE_TEST_CASE(a_slow_machine_spins_as_many_turns_as_a_fast_one, FastAgain) {
  BOOST_TEST(engine::spin_budget() == kSpinNs);
  engine::spin_turn_takes(300);
  BOOST_TEST(engine::spin_budget() == kSpinNs);
  engine::spin_turn_takes(12'500);
  BOOST_TEST(engine::spin_budget() == 10 * kSpinNs);
  engine::spin_turn_takes(INT64_MAX);  // a machine that stood still meanwhile
  BOOST_TEST(engine::spin_budget() == 20 * kSpinNs);
}

BOOST_FIXTURE_TEST_CASE(measuring_looks_for_what_is_not_there, FastAgain) {
  if (engine::has_one_processor()) return;
  constexpr std::int64_t kLookNs = 1'000;
  engine::spin_turn_takes(INT64_MAX);
  int looks = 0;
  Spinner::measure([&] { return ++looks == 5; });  // something was there
  BOOST_TEST(looks == 5);
  BOOST_TEST(engine::spin_budget() == 20 * kSpinNs);
  engine::spin_turn_takes(0);
  const rdma::SteadyClock clock;
  Spinner::measure([&] {
    for (const std::int64_t until = clock.now() + kLookNs; clock.now() < until;) rdma::cpu_relax();
    return false;
  });
  BOOST_TEST(engine::spin_budget() >= 20 * kSpinNs);  // 32 such looks: 32 us, 25 times a fast turn
}

// Found later than the time by the option alone, and within the time that the machine's pace gives.
BOOST_FIXTURE_TEST_CASE(a_spin_lasts_as_long_as_its_budget, FastAgain) {
  if (engine::has_one_processor()) return;
  engine::spin_turn_takes(INT64_MAX);
  const rdma::SteadyClock clock;
  const std::int64_t begun = clock.now();
  BOOST_TEST(!Spinner().run([] { return false; }));
  BOOST_TEST(clock.now() - begun >= 20 * kSpinNs);
  BOOST_TEST(Spinner().run([&] { return clock.now() - begun >= 0; }));
}

// Where others wanted the core, fewer spins in vain are put up with.
BOOST_FIXTURE_TEST_CASE(a_spin_in_vain_that_kept_others_off_counts_twice, FastAgain) {
  const auto in_vain_until_less = [](bool others_ran) {
    for (int i = 0; i < 50; ++i) engine::spin_result(true, false);
    int spins = 0;
    for (; engine::spin_budget() == kSpinNs; ++spins) engine::spin_result(false, others_ran);
    for (int i = 0; i < 50; ++i) engine::spin_result(true, false);
    return spins;
  };
  engine::spin_turn_takes(0);
  const int alone = in_vain_until_less(false), beside_others = in_vain_until_less(true);
  BOOST_TEST(beside_others > 1);
  BOOST_TEST(beside_others <= alone / 2);
}

BOOST_FIXTURE_TEST_CASE(a_turn_is_long_by_the_machines_own_measure, FastAgain) {
  engine::spin_turn_takes(0);
  const std::int64_t fast = engine::long_turn_ns();
  engine::spin_turn_takes(12'500);
  BOOST_TEST(engine::long_turn_ns() == 10 * fast);
}

BOOST_AUTO_TEST_SUITE_END()
