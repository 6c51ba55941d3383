#include "sdp/return_pace.hpp"

#include <boost/test/unit_test.hpp>

namespace sdp {
namespace {
constexpr std::int64_t kSecond = ReturnPace::kSecond;
}

BOOST_AUTO_TEST_CASE(one_attempt_at_a_time_and_fewer_as_they_fail) {
  ReturnPace pace;
  std::int64_t now = 1000 * kSecond;
  pace.on_lane_lost(now, ReturnPace::kShortLife);
  BOOST_TEST(!pace.may_begin(now));
  BOOST_TEST(pace.due() == now + ReturnPace::kFirst);
  std::int64_t before = 0;
  for (int attempt = 0; attempt < 12; ++attempt) {
    now = pace.due();
    BOOST_TEST(pace.may_begin(now));
    pace.begin();
    BOOST_TEST(!pace.may_begin(now));
    pace.fail(now);
    const std::int64_t wait = pace.due() - now;
    BOOST_TEST(wait >= before);
    BOOST_TEST(wait <= ReturnPace::kLongest);
    before = wait;
  }
  BOOST_TEST(before == ReturnPace::kLongest);
  pace.hurry();
  BOOST_TEST(pace.may_begin(now));
}

BOOST_AUTO_TEST_CASE(the_others_follow_the_first_that_succeeds) {
  ReturnPace pace;
  const std::int64_t now = kSecond;
  unsigned together = 1;
  for (int wave = 0; wave < 6; ++wave) {
    unsigned begun = 0;
    for (; pace.may_begin(now); ++begun) pace.begin();
    BOOST_TEST(begun == together);
    for (unsigned i = 0; i < begun; ++i) pace.succeed();
    together = ReturnPace::kMost;
    if (wave == 0) together = 2;
    if (wave == 1) together = 8;
  }
  unsigned begun = 0;
  for (; pace.may_begin(now); ++begun) pace.begin();
  BOOST_TEST(begun == ReturnPace::kMost);
  for (unsigned i = 0; i < begun; ++i) pace.fail(now);
  BOOST_TEST(pace.due() == now + ReturnPace::kFirst);  // they failed together, and count once
  BOOST_TEST(pace.may_begin(pace.due()));
  pace.begin();
  BOOST_TEST(!pace.has_room());
}

BOOST_AUTO_TEST_CASE(lanes_that_fail_soon_are_waited_for_longer_each_time) {
  ReturnPace pace;
  std::int64_t now = 1000 * kSecond, before = 0;
  for (int life = 0; life < 15; ++life) {
    for (int lane = 0; lane < 100; ++lane) pace.on_lane_lost(now, kSecond);  // all of one failure
    const std::int64_t wait = pace.due() - now;
    BOOST_TEST(wait >= before);
    BOOST_TEST(wait <= 2 * before + ReturnPace::kFirst);
    before = wait;
    now = pace.due();
    pace.begin();
    pace.succeed();
  }
  BOOST_TEST(before == ReturnPace::kLongestFlaw);
  pace.on_lane_lost(now, ReturnPace::kShortLife);
  BOOST_TEST(pace.due() == now + ReturnPace::kFirst);
}

BOOST_AUTO_TEST_CASE(a_pace_with_nothing_to_remember_is_idle) {
  ReturnPace pace;
  pace.on_lane_lost(kSecond, kSecond);
  BOOST_TEST(!pace.is_idle(2 * kSecond));
  BOOST_TEST(pace.is_idle(pace.due() + ReturnPace::kLongestFlaw));
  pace.begin();
  BOOST_TEST(!pace.is_idle(pace.due() + ReturnPace::kLongestFlaw));
}

}  // namespace sdp
