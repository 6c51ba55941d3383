// The trial of two ways of copying: it finds the faster one, stays with it, follows when that changes, and costs little.
#include "sdp/copy_trial.hpp"

#include <boost/test/unit_test.hpp>

namespace sdp {
namespace {

constexpr std::int64_t kBetween = 1 << 20, kPiece = 65536, kMegabyte = 1 << 20;

/// A stream whose bytes cost `cached` or `direct` picoseconds each.
struct Stream {
  CopyTrial trial;
  std::int64_t cached, direct;
  std::int64_t now_ps = 0, direct_bytes = 0;

  Stream(CopyPaces& paces, std::int64_t cached_ps, std::int64_t direct_ps, BulkCopy way = BulkCopy::tried)
      : trial(paces, way, kBetween), cached(cached_ps), direct(direct_ps) {}
  void send(std::int64_t bytes) {
    for (std::int64_t at = 0; at < bytes; at += kPiece) {
      if (trial.direct()) direct_bytes += kPiece;
      now_ps += kPiece * (trial.direct() ? direct : cached);
      trial.copied(kPiece, [this] { return now_ps / 1000; });
    }
  }
};

BOOST_AUTO_TEST_CASE(the_faster_way_is_found_and_kept) {
  for (const bool direct_wins : {true, false}) {
    CopyPaces paces;
    Stream stream(paces, direct_wins ? 200 : 100, direct_wins ? 100 : 200);
    stream.send(100 * kMegabyte);
    BOOST_TEST(paces.direct(!direct_wins) == direct_wins);
    stream.direct_bytes = 0;
    stream.send(10'000 * kMegabyte);
    const double share = static_cast<double>(stream.direct_bytes) / (10'000.0 * kMegabyte);
    BOOST_TEST((direct_wins ? 1 - share : share) < 0.03);
    BOOST_TEST(stream.direct_bytes != 0);  // it goes on to look
  }
}

BOOST_AUTO_TEST_CASE(what_changes_is_followed) {
  CopyPaces paces;
  Stream stream(paces, 100, 200);
  stream.send(5'000 * kMegabyte);
  BOOST_TEST(!stream.trial.direct());
  stream.cached = 400;  // the way in use: seen as soon as it is measured
  stream.send(16 * kMegabyte);
  BOOST_TEST(stream.trial.direct());
  stream.cached = 50;  // the other way: at its next trial
  stream.send(700 * kMegabyte);
  BOOST_TEST(!stream.trial.direct());
}

// A virtual machine's cores come near and go far, many times a second: what is gained while they are near is not lost again.
BOOST_AUTO_TEST_CASE(cores_that_move_are_followed) {
  CopyPaces paces;
  Stream stream(paces, 33, 80);
  std::int64_t best_ps = 0;
  for (int turn = 0; turn < 40; ++turn) {
    stream.cached = turn % 2 == 0 ? 33 : 92;
    stream.send(200 * kMegabyte);
    best_ps += 200 * kMegabyte * std::min(stream.cached, stream.direct);
  }
  BOOST_TEST(static_cast<double>(stream.now_ps) < 1.15 * static_cast<double>(best_ps));
}

BOOST_AUTO_TEST_CASE(one_interruption_changes_nothing) {
  CopyPaces paces;
  Stream stream(paces, 100, 200);
  stream.send(300 * kMegabyte);
  BOOST_TEST(!stream.trial.direct());
  stream.now_ps += 100'000'000'000;  // 100 ms
  stream.send(8 * kMegabyte);
  BOOST_TEST(!stream.trial.direct());
}

BOOST_AUTO_TEST_CASE(without_a_difference_or_with_another_limit_nothing_changes) {
  CopyPaces paces;
  Stream equal(paces, 100, 102);
  equal.send(1'000 * kMegabyte);
  BOOST_TEST(!paces.direct(false));
  CopyPaces unknown;
  Stream slow(unknown, 9'000, 4'000);  // a program that sends a byte each 9 ns
  slow.send(10'000 * kMegabyte);
  BOOST_TEST(!unknown.direct(false));
  BOOST_TEST(slow.direct_bytes < 100 * kMegabyte);
}

BOOST_AUTO_TEST_CASE(another_lane_begins_with_what_is_known) {
  CopyPaces paces;
  Stream(paces, 200, 100).send(100 * kMegabyte);
  Stream next(paces, 200, 100);
  BOOST_TEST(next.trial.direct());
}

BOOST_AUTO_TEST_CASE(a_way_that_is_given_is_not_tried) {
  CopyPaces paces;
  Stream cached(paces, 200, 100, BulkCopy::cached), direct(paces, 100, 200, BulkCopy::direct);
  cached.send(1'000 * kMegabyte);
  direct.send(1'000 * kMegabyte);
  BOOST_TEST(cached.direct_bytes == 0);
  BOOST_TEST(direct.direct_bytes == 1'000 * kMegabyte);
}

}  // namespace
}  // namespace sdp
