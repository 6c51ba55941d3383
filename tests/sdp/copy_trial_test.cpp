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

  Stream(CopyVote& vote, std::int64_t cached_ps, std::int64_t direct_ps, BulkCopy way = BulkCopy::tried)
      : trial(vote, way, kBetween), cached(cached_ps), direct(direct_ps) {}
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
    CopyVote vote;
    Stream stream(vote, direct_wins ? 200 : 100, direct_wins ? 100 : 200);
    stream.send(100 * kMegabyte);
    BOOST_TEST(vote.direct() == direct_wins);
    stream.direct_bytes = 0;
    stream.send(10'000 * kMegabyte);
    const double share = static_cast<double>(stream.direct_bytes) / (10'000.0 * kMegabyte);
    BOOST_TEST((direct_wins ? 1 - share : share) < 0.03);
    BOOST_TEST(stream.direct_bytes != 0);  // it goes on to look
  }
}

BOOST_AUTO_TEST_CASE(what_changes_is_followed) {
  CopyVote vote;
  Stream stream(vote, 100, 200);
  stream.send(5'000 * kMegabyte);
  BOOST_TEST(!vote.direct());
  stream.cached = 400;
  stream.send(2'000 * kMegabyte);
  BOOST_TEST(vote.direct());
  stream.cached = 50;
  stream.send(2'000 * kMegabyte);
  BOOST_TEST(!vote.direct());
}

BOOST_AUTO_TEST_CASE(without_a_difference_or_with_another_limit_nothing_changes) {
  CopyVote vote;
  Stream equal(vote, 100, 102);
  equal.send(1'000 * kMegabyte);
  BOOST_TEST(!vote.direct());
  Stream slow(vote, 9'000, 4'000);  // a program that sends a byte each 9 ns
  slow.send(1'000 * kMegabyte);
  BOOST_TEST(!vote.direct());
}

BOOST_AUTO_TEST_CASE(another_lane_begins_with_what_is_known) {
  CopyVote vote;
  Stream(vote, 200, 100).send(100 * kMegabyte);
  Stream next(vote, 200, 100);
  BOOST_TEST(next.trial.direct());
}

BOOST_AUTO_TEST_CASE(a_way_that_is_given_is_not_tried) {
  CopyVote vote;
  Stream cached(vote, 200, 100, BulkCopy::cached), direct(vote, 100, 200, BulkCopy::direct);
  cached.send(1'000 * kMegabyte);
  direct.send(1'000 * kMegabyte);
  BOOST_TEST(cached.direct_bytes == 0);
  BOOST_TEST(direct.direct_bytes == 1'000 * kMegabyte);
}

}  // namespace
}  // namespace sdp
