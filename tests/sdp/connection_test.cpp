#include "sdp/connection.hpp"

#include <array>
#include <boost/test/unit_test.hpp>
#include <deque>
#include <random>
#include <vector>

using namespace sdp;
using Message = std::vector<std::byte>;

namespace {

constexpr ConnLimits kLimits{2048, 65536, 6};

/// Two connections and the messages on their way: what a lane does, without a device.
struct Pair {
  Connection a{kLimits}, b{kLimits};
  std::deque<Message> to_a, to_b;

  Pair() {
    std::array<std::byte, wire::kHelloBytes> hello;
    b.await_hello();
    wire::HelloHeader addresses;
    a.emit_hello(addresses, hello);
    BOOST_REQUIRE(b.on_message(hello) == Rx::established);
    std::array<std::byte, wire::kHelloAckBytes> ack;
    b.emit_hello_ack(ack);
    BOOST_REQUIRE(a.on_message(ack) == Rx::established);
  }
  static Message data(Connection& from, std::size_t payload) {
    Message m(wire::kBsdhBytes + payload, std::byte{7});
    from.emit_data(static_cast<std::uint32_t>(payload), m.data());
    return m;
  }
  static void control(Connection& from, std::deque<Message>& to) {
    std::array<std::byte, Connection::kControlBytes> out;
    while (const std::size_t n = from.next_control(out)) to.emplace_back(out.begin(), out.begin() + static_cast<std::ptrdiff_t>(n));
  }
};

}  // namespace

BOOST_AUTO_TEST_CASE(hello_establishes_both_ends) {
  Pair p;
  BOOST_CHECK(p.a.state() == ConnState::established);
  BOOST_CHECK(p.b.state() == ConnState::established);
  BOOST_TEST(p.a.max_payload() == 2048 - wire::kBsdhBytes);
  BOOST_TEST(p.a.credit().credits() == 6);
}

BOOST_AUTO_TEST_CASE(a_hello_of_the_length_of_native_private_data_is_taken) {
  Connection a{{}}, b{{}};
  std::array<std::byte, wire::kNativeHelloBytes> padded{};
  wire::HelloHeader addresses;
  addresses.local_port = 1;
  a.emit_hello(addresses, std::span<std::byte, wire::kHelloBytes>(padded.data(), wire::kHelloBytes));
  rdma::store_be32(padded.data() + 4, wire::kNativeHelloBytes);
  b.await_hello();
  BOOST_TEST((b.on_message(padded) == Rx::established), b.error());
}

BOOST_AUTO_TEST_CASE(a_peer_that_says_it_takes_four_gigabytes_is_not_believed) {
  Connection a{{}}, b{{}};
  std::array<std::byte, wire::kHelloBytes> hello{};
  a.emit_hello({}, hello);
  rdma::store_be32(hello.data() + 24, UINT32_MAX);
  b.await_hello();
  BOOST_TEST((b.on_message(hello) == Rx::established), b.error());
  BOOST_TEST(b.max_payload() <= (16U << 20));
}

BOOST_AUTO_TEST_CASE(another_major_version_aborts) {
  Connection a{kLimits}, b{kLimits};
  std::array<std::byte, wire::kHelloBytes> hello;
  b.await_hello();
  a.emit_hello({}, hello);
  hello[16] = std::byte{0x11};
  BOOST_CHECK(b.on_message(hello) == Rx::abort);
  BOOST_CHECK(b.state() == ConnState::aborted);
}

BOOST_AUTO_TEST_CASE(disconn_closes_one_half_and_data_after_it_aborts) {
  Pair p;
  p.a.want_disconn();
  Pair::control(p.a, p.to_b);
  BOOST_REQUIRE(p.to_b.size() == 1);
  BOOST_CHECK(p.b.on_message(p.to_b.front()) == Rx::disconn);
  BOOST_CHECK(p.b.state() == ConnState::disconn_rcvd);
  BOOST_TEST(!p.a.may_send_payload());
  BOOST_TEST(p.b.may_send_payload());
  const Message late = Pair::data(p.a, 1);
  BOOST_CHECK(p.b.on_message(late) == Rx::abort);
}

BOOST_AUTO_TEST_CASE(illegal_messages_abort_with_a_reason) {
  const auto with = [](auto change) {
    Pair p;
    Message m = Pair::data(p.a, 10);
    change(m);
    BOOST_CHECK(p.b.on_message(m) == Rx::abort);
    BOOST_TEST(std::string(p.b.error()) != "");
  };
  with([](Message& m) { m[0] = std::byte{0x41}; });  // experimental identifier
  with([](Message& m) { m[1] = std::byte{0x80}; });  // reserved flag
  with([](Message& m) { m[7] = std::byte{99}; });    // length
  with([](Message& m) { m[11] = std::byte{9}; });    // sequence
  with([](Message& m) { m[15] = std::byte{9}; });    // acknowledges the future
  with([](Message& m) { m.resize(8); });             // truncated
  with([](Message& m) { m[0] = static_cast<std::byte>(wire::Mid::hello); });
}

BOOST_AUTO_TEST_CASE(buffers_grow_on_request) {
  Pair p;
  p.a.want_peer_recv_size(65536);
  Pair::control(p.a, p.to_b);
  BOOST_REQUIRE(p.to_b.size() == 1);
  BOOST_CHECK(p.b.on_message(p.to_b.front()) == Rx::resize);
  p.b.on_posted(1);
  BOOST_TEST(p.b.wanted_recv_size() == 65536u);
  p.b.resize_done(65536);
  Pair::control(p.b, p.to_a);
  BOOST_REQUIRE(!p.to_a.empty());
  BOOST_CHECK(p.a.on_message(p.to_a.front()) == Rx::resized);
  BOOST_TEST(p.a.max_payload() == 65536 - wire::kBsdhBytes);
}

// Whatever the order in which both sides send, read and hand buffers back: no illegal message, no deadlock, nothing lost.
BOOST_AUTO_TEST_CASE(random_traffic_both_ways_always_drains) {
  for (unsigned seed = 1; seed <= 2000; ++seed) {
    std::mt19937 rng(seed);
    Pair p;
    struct End {
      Connection& conn;
      std::deque<Message>&in, &out;
      unsigned to_send, unread = 0, got = 0;
    };
    End ends[2] = {{p.a, p.to_a, p.to_b, 50}, {p.b, p.to_b, p.to_a, 50}};
    for (int step = 0; step < 100000; ++step) {
      End& e = ends[rng() % 2];
      switch (rng() % 3) {
        case 0:
          if (e.to_send > 0 && e.conn.may_send_payload()) {
            e.out.push_back(Pair::data(e.conn, 1 + rng() % 100));
            --e.to_send;
          }
          break;
        case 1:
          if (!e.in.empty()) {
            const Rx rx = e.conn.on_message(e.in.front());
            e.in.pop_front();
            BOOST_REQUIRE_MESSAGE(rx == Rx::payload || rx == Rx::control, "seed " << seed << ": " << e.conn.error());
            if (rx == Rx::payload)
              ++e.unread;
            else
              e.conn.on_posted(1);
          }
          break;
        case 2:
          if (e.unread > 0) {
            --e.unread;
            ++e.got;
            e.conn.on_posted(1);
          }
          break;
      }
      Pair::control(e.conn, e.out);
      if (ends[0].got == 50 && ends[1].got == 50) break;
    }
    BOOST_REQUIRE_MESSAGE(ends[0].got == 50 && ends[1].got == 50, "seed " << seed << " deadlocked");
  }
}
