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
    for (const std::uint64_t end = sent_[from] + bytes; read_[from] < end;) {
      (void)send(from, std::min<std::size_t>(piece, end - sent_[from]));
      read(from, piece);
    }
  }
  /// Likewise, but that its reader reads only when no more can be sent.
  void pile_up(unsigned from, std::size_t bytes, std::size_t piece) {
    for (const std::uint64_t end = sent_[from] + bytes; read_[from] < end;) {
      if (sent_[from] < end && send(from, std::min<std::size_t>(piece, end - sent_[from])) != 0) continue;
      while (read_[from] < sent_[from]) read(from, piece);
    }
  }
  /// Of the bytes what the peer's buffers take.
  void leave_unread(unsigned from, std::size_t bytes) {
    if (bytes != 0 && send(from, bytes) == 0) broken("nothing is taken");
  }
  void read_all(unsigned from) {
    while (read_[from] < sent_[from]) read(from, 10'000);
  }
  void look(std::int64_t after) {
    now_ += after;
    for (unsigned side : {0U, 1U}) (*this)[side].rest_if_idle(now_);
    hosts_.release_all();
    for (unsigned side : {0U, 1U}) (*this)[side].drain();
  }
  /// Nothing is said any more.
  void stays_still() {
    const std::array<std::uint32_t, 2> said{(*this)[0].conn.credit().sent(), (*this)[1].conn.credit().sent()};
    for (int i = 0; i < 10; ++i) look(Lane::kIdleNs);
    for (unsigned side : {0U, 1U}) BOOST_TEST((*this)[side].conn.credit().sent() == said[side]);
  }

 private:
  std::size_t send(unsigned from, std::size_t bytes) {
    std::vector<std::byte> out(bytes);
    fill(out.data(), bytes, from, sent_[from]);
    iovec whole{out.data(), bytes};
    IovCursor left(&whole, 1);
    const std::size_t n = (*this)[from].send(left);
    sent_[from] += n;
    hosts_.release_all();
    (*this)[1 - from].drain();
    hosts_.release_all();
    (*this)[from].drain();
    return n;
  }
  void read(unsigned from, std::size_t most) {
    if (++rounds_ > 1'000'000) broken("the bytes do not arrive");
    std::vector<std::byte> in(most), expected(most);
    iovec room{in.data(), in.size()};
    IovCursor to(&room, 1);
    const auto n = static_cast<std::size_t>((*this)[1 - from].recv(to, true));
    fill(expected.data(), n, from, read_[from]);
    BOOST_REQUIRE(std::equal(in.begin(), in.begin() + static_cast<std::ptrdiff_t>(n), expected.begin()));
    read_[from] += n;
    (*this)[1 - from].settle();
    hosts_.release_all();
    (*this)[from].drain();
  }

  Hosts hosts_;
  StreamPair pair_;
  std::array<std::uint64_t, 2> sent_{}, read_{};
  unsigned rounds_ = 0;
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

// What they grew by is registered for the lane alone, and goes back. Then a load makes them grow again.
BOOST_AUTO_TEST_CASE(receive_buffers_that_grew_shrink_when_the_lane_is_idle) {
  for (const auto flavour : {rdma::NodeType::ib_ca, rdma::NodeType::rnic}) {
    Lanes lanes(flavour);
    lanes.carry(0, 100, 100);
    const std::size_t first = lanes[1].memory_bytes(), in_heap = lanes.in_use(1);
    for (int again = 0; again < 3; ++again) {
      for (const unsigned from : {0U, 1U}) {
        Lane &sender = lanes[from], &reader = lanes[1 - from];
        lanes.pile_up(from, 8 << 20, 256 << 10);
        BOOST_TEST(sender.conn.max_payload() == ConnLimits{}.recv_size_max - wire::kBsdhBytes);
        BOOST_TEST(reader.recv_credits() == LaneLimits{}.recv_buffers_max);
        BOOST_TEST(reader.grown_bytes() >= std::size_t{LaneLimits{}.recv_buffers_max} * ConnLimits{}.recv_size_max);
      }
      lanes.look(0);
      lanes.look(Lane::kIdleNs - 1);
      for (const unsigned side : {0U, 1U}) BOOST_TEST(lanes[side].grown_bytes() != 0U, "it may go on any time");
      for (int i = 0; i < 6; ++i) lanes.look(Lane::kIdleNs);
      for (const unsigned side : {0U, 1U}) {
        BOOST_TEST(lanes[side].grown_bytes() == 0U);
        BOOST_TEST(lanes[side].memory_bytes() == first);
        BOOST_TEST(lanes[side].recv_credits() <= ConnLimits{}.recv_buffers);
        BOOST_TEST(lanes[side].conn.max_payload() == ConnLimits{}.recv_size - wire::kBsdhBytes);
        BOOST_TEST(!lanes[side].conn.resize_pending());
      }
      BOOST_TEST(lanes.in_use(1) <= in_heap);
    }
    lanes.stays_still();
  }
}

// More buffers of the first size go likewise.
BOOST_AUTO_TEST_CASE(receive_buffers_that_became_more_become_fewer_when_the_lane_is_idle) {
  Lanes lanes(rdma::NodeType::ib_ca);
  lanes.pile_up(0, 1 << 20, 1000);
  BOOST_TEST(lanes[1].recv_credits() > ConnLimits{}.recv_buffers);
  BOOST_TEST(lanes[1].grown_bytes() != 0U);
  lanes.look(0);
  for (int i = 0; i < 6; ++i) lanes.look(Lane::kIdleNs);
  BOOST_TEST(lanes[1].recv_credits() <= ConnLimits{}.recv_buffers);
  BOOST_TEST(lanes[1].grown_bytes() == 0U);
  lanes.stays_still();
  lanes.carry(0, 8 << 20, 256 << 10);
}

// What the program has not read stays where it is, and what it sends meanwhile waits for nothing.
BOOST_AUTO_TEST_CASE(a_lane_that_shrinks_carries_what_comes_meanwhile) {
  for (unsigned looks = 0; looks < 8; ++looks)
    for (const std::size_t unread : {std::size_t{0}, std::size_t{100'000}}) {
      Lanes lanes(rdma::NodeType::ib_ca);
      lanes.pile_up(0, 8 << 20, 256 << 10);
      lanes.carry(1, 5000, 500);
      lanes.leave_unread(0, unread);
      lanes.look(0);
      for (unsigned i = 0; i < looks; ++i) lanes.look(Lane::kIdleNs);
      lanes.read_all(0);
      lanes.carry(0, 4 << 20, 256 << 10);
      BOOST_TEST(lanes[0].conn.max_payload() == ConnLimits{}.recv_size_max - wire::kBsdhBytes, "it has grown again");
      lanes.look(0);
      for (int i = 0; i < 6; ++i) lanes.look(Lane::kIdleNs);
      BOOST_TEST(lanes[1].grown_bytes() == 0U);
    }
}

// Nobody acknowledges for ever that the other has acknowledged.
BOOST_AUTO_TEST_CASE(an_idle_lane_is_still) {
  Lanes lanes(rdma::NodeType::ib_ca);
  lanes.carry(0, 1000, 100);
  lanes.carry(1, 1000, 100);
  lanes.look(0);
  for (int i = 0; i < 6; ++i) lanes.look(Lane::kIdleNs);
  lanes.stays_still();
}

}  // namespace sdp::sim
