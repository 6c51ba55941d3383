// An unordered lane by which nothing goes any more keeps no memory to gather messages in, at either end, and goes on as before when
// something does.
#include <boost/test/unit_test.hpp>
#include <vector>

#include "tests/sim/stream_pair.hpp"

namespace sdp::sim {
namespace {

class Lanes {
 public:
  explicit Lanes(rdma::NodeType flavour) : hosts_(flavour, Hosts::Order::late, 128), pair_(hosts_, {}) {}
  Lane& operator[](unsigned side) { return *pair_[side].lane; }
  std::size_t in_use(unsigned side) const { return hosts_.host[side].context->heap->bytes_in_use(); }

  /// As many bytes from that side, in pieces; all arrive and are read.
  void carry(unsigned from, std::size_t bytes, std::size_t piece) {
    std::vector<std::byte> out(piece), in(piece);
    std::uint64_t sent = 0, received = 0;
    while (received < bytes) {
      fill(out.data(), piece, from, sent);
      iovec whole{out.data(), std::min<std::size_t>(piece, bytes - sent)};
      IovCursor left(&whole, 1);
      sent += (*this)[from].send(left);
      hosts_.release_all();
      iovec room{in.data(), in.size()};
      IovCursor to(&room, 1);
      const auto n = static_cast<std::size_t>((*this)[1 - from].recv(to, true));
      std::vector<std::byte> expected(n);
      fill(expected.data(), n, from, received);
      BOOST_REQUIRE(std::equal(expected.begin(), expected.end(), in.begin()));
      received += n;
      (*this)[1 - from].settle();
      hosts_.release_all();
      (*this)[from].drain();
      patience_.check();
    }
  }
  void look(std::int64_t after) {
    now_ += after;
    for (unsigned side : {0U, 1U}) (*this)[side].rest_if_idle(now_);
    hosts_.release_all();
    for (unsigned side : {0U, 1U}) (*this)[side].drain();
  }

 private:
  struct Patience {
    unsigned rounds = 0;
    void check() {
      if (++rounds > 1'000'000) broken("the bytes do not arrive");
    }
  };
  Hosts hosts_;
  StreamPair pair_;
  Patience patience_;
  std::int64_t now_ = 1;
};

}  // namespace

BOOST_AUTO_TEST_CASE(memory_to_send_from_comes_with_traffic_and_goes_with_it) {
  for (const auto flavour : {rdma::NodeType::ib_ca, rdma::NodeType::rnic}) {
    Lanes lanes(flavour);
    const std::size_t fresh = lanes.in_use(0);
    BOOST_TEST(lanes[0].staging_bytes() == 0U);
    for (int again = 0; again < 3; ++again) {
      lanes.carry(0, 100, 100);
      const std::size_t little = lanes[0].staging_bytes();
      BOOST_TEST(little != 0U);
      BOOST_TEST(little < LaneLimits{}.staging);
      lanes.carry(1, 100, 100);
      lanes.look(0);
      lanes.look(Lane::kIdleNs - 1);
      BOOST_TEST(lanes[0].staging_bytes() == little, "it may go on any time");
      lanes.carry(0, 8 << 20, 256 << 10);
      BOOST_TEST(lanes[0].staging_bytes() > LaneLimits{}.staging, "large messages need a large ring");
      lanes.look(Lane::kIdleNs);
      for (int i = 0; i < 3; ++i) lanes.look(Lane::kIdleNs);
      for (unsigned side : {0U, 1U}) BOOST_TEST(lanes[side].staging_bytes() == 0U);
      BOOST_TEST(lanes.in_use(0) == fresh, "the sender's end is as it was");
    }
  }
}

// Nobody acknowledges for ever that the other has acknowledged.
BOOST_AUTO_TEST_CASE(an_idle_lane_is_still) {
  Lanes lanes(rdma::NodeType::ib_ca);
  lanes.carry(0, 1000, 100);
  lanes.carry(1, 1000, 100);
  for (int i = 0; i < 5; ++i) lanes.look(Lane::kIdleNs);
  const std::array<std::uint32_t, 2> said{lanes[0].conn.credit().sent(), lanes[1].conn.credit().sent()};
  for (int i = 0; i < 10; ++i) lanes.look(Lane::kIdleNs);
  BOOST_TEST(lanes[0].conn.credit().sent() == said[0]);
  BOOST_TEST(lanes[1].conn.credit().sent() == said[1]);
}

}  // namespace sdp::sim
