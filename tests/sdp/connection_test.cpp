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

BOOST_AUTO_TEST_CASE(buffers_shrink_on_request_unless_the_peer_keeps_them) {
  for (const bool keeps : {false, true}) {
    Pair p;
    const std::uint32_t first = p.a.max_payload() + wire::kBsdhBytes;
    const auto ask = [&](std::uint32_t size, Rx expected) {
      Pair::control(p.a, p.to_b);
      BOOST_REQUIRE(p.to_b.size() == 1);
      BOOST_CHECK(p.b.on_message(p.to_b.front()) == expected);
      p.to_b.clear();
      p.b.on_posted(1);
      BOOST_TEST(p.b.wanted_recv_size() == size);
    };
    const auto answer = [&](std::uint32_t size) {
      p.b.resize_done(size);
      Pair::control(p.b, p.to_a);
      BOOST_REQUIRE(!p.to_a.empty());
      for (const Message& m : p.to_a) (void)p.a.on_message(m);
      p.to_a.clear();
      BOOST_TEST(p.a.max_payload() == size - wire::kBsdhBytes);
      BOOST_TEST(!p.a.resize_pending());
    };
    BOOST_TEST(!p.a.peer_has_grown());
    p.a.want_peer_recv_size(65536);
    ask(65536, Rx::resize);
    answer(65536);
    BOOST_TEST(p.a.peer_has_grown());
    p.a.want_peer_to_shrink();
    ask(first, Rx::shrink);
    BOOST_TEST(p.a.peer_shrinks());
    BOOST_TEST(p.a.max_payload() == first - wire::kBsdhBytes, "it has promised that");
    answer(keeps ? 65536 : first);
    BOOST_TEST(p.a.peer_has_grown() == keeps);
    BOOST_TEST(!p.a.peer_shrinks());
  }
}

// No smaller than they were at first.
BOOST_AUTO_TEST_CASE(buffers_shrink_to_their_first_size_at_the_most) {
  Pair p;
  const std::uint32_t first = p.a.max_payload() + wire::kBsdhBytes;
  p.a.want_peer_recv_size(100);
  Pair::control(p.a, p.to_b);
  BOOST_CHECK(p.b.on_message(p.to_b.front()) == Rx::shrink);
  BOOST_TEST(p.b.wanted_recv_size() == first);
}

namespace {
Message advert(Connection& from, std::uint32_t bytes, std::uint32_t in_line) {
  Message m(wire::payload_offset(wire::Mid::src_avail) + in_line, std::byte{7});
  from.emit_src_avail(
      {bytes, 0x77, 0x10000}, in_line,
      std::span<std::byte, wire::payload_offset(wire::Mid::src_avail)>(m.data(), wire::payload_offset(wire::Mid::src_avail)));
  return m;
}
std::vector<wire::Mid> mids(const std::deque<Message>& messages) {
  std::vector<wire::Mid> all;
  for (const Message& m : messages) all.push_back(static_cast<wire::Mid>(m[0]));
  return all;
}
}  // namespace

BOOST_AUTO_TEST_CASE(an_advert_is_read_and_reported_and_nothing_passes_it) {
  Pair p;
  BOOST_TEST(p.a.may_advertise());
  const Message m = advert(p.a, 5000, 1000);
  BOOST_TEST(!p.a.may_send_payload());
  BOOST_TEST((p.b.on_message(m) == Rx::advert), p.b.error());
  BOOST_TEST(p.b.sink().next_read().address == 0x10000U + 1000);
  BOOST_TEST(p.b.sink().next_read().left == 4000U);
  p.b.read_started(4000);
  p.b.read_done(4000, 4000);
  Pair::control(p.b, p.to_a);
  BOOST_TEST((mids(p.to_a) == std::vector{wire::Mid::rdma_rd_compl}));
  BOOST_TEST((p.a.on_message(p.to_a.front()) == Rx::answered));
  BOOST_TEST(p.a.source().moved() == 4000U);
  BOOST_TEST(p.a.may_send_payload());
}

BOOST_AUTO_TEST_CASE(what_nobody_reads_comes_as_data) {
  Pair p;
  BOOST_TEST((p.b.on_message(advert(p.a, 5000, 1)) == Rx::advert));
  p.a.want_disconn();
  Pair::control(p.a, p.to_b);
  BOOST_TEST(p.to_b.empty());  // not before the end of the advert
  p.b.want_send_sm();
  Pair::control(p.b, p.to_a);
  BOOST_TEST((mids(p.to_a) == std::vector{wire::Mid::send_sm}));
  BOOST_TEST((p.a.on_message(p.to_a.front()) == Rx::answered));
  BOOST_TEST((p.b.on_message(Pair::data(p.a, 100)) == Rx::payload), p.b.error());
  Pair::control(p.a, p.to_b);
  BOOST_TEST((mids(p.to_b) == std::vector{wire::Mid::disconn}));
}

BOOST_AUTO_TEST_CASE(two_that_advertise_to_each_other_come_down_to_data) {
  Pair p;
  const Message from_a = advert(p.a, 5000, 1), from_b = advert(p.b, 5000, 1);
  BOOST_TEST((p.a.on_message(from_b) == Rx::advert));
  BOOST_TEST((p.b.on_message(from_a) == Rx::advert));
  for (int round = 0; round < 3; ++round) {
    Pair::control(p.a, p.to_b);
    Pair::control(p.b, p.to_a);
    for (; !p.to_a.empty(); p.to_a.pop_front()) BOOST_TEST((p.a.on_message(p.to_a.front()) != Rx::abort), p.a.error());
    for (; !p.to_b.empty(); p.to_b.pop_front()) BOOST_TEST((p.b.on_message(p.to_b.front()) != Rx::abort), p.b.error());
  }
  BOOST_TEST(p.a.may_send_payload());
  BOOST_TEST(p.b.may_send_payload());
}

BOOST_AUTO_TEST_CASE(adverts_that_break_the_rules_abort) {
  const auto refused = [](auto break_it) {
    Pair p;
    BOOST_TEST((break_it(p) == Rx::abort));
    BOOST_TEST(std::string(p.b.error()) != "");
  };
  refused([](Pair& p) {  // Data that passes one
    Message data = Pair::data(p.a, 10);
    rdma::store_be32(data.data() + 8, 2);
    Pair other;
    BOOST_TEST((p.b.on_message(advert(other.a, 5000, 1)) == Rx::advert));
    return p.b.on_message(data);
  });
  refused([](Pair& p) { return p.b.on_message(advert(p.a, 5000, 0)); });  // nothing in line
  refused([](Pair& p) {                                                   // all of it in line
    Message m = advert(p.a, 5000, 10);
    rdma::store_be32(m.data() + 16, 10);
    return p.b.on_message(m);
  });
  refused([](Pair& p) {  // a report of more than there is
    Message m = advert(p.b, 5000, 10);
    BOOST_TEST((p.a.on_message(m) == Rx::advert));
    p.a.read_started(4990);
    p.a.read_done(4990, 4990);
    Pair::control(p.a, p.to_b);
    rdma::store_be32(p.to_b.front().data() + 16, 4991);
    return p.b.on_message(p.to_b.front());
  });
  refused([](Pair& p) {  // after DisConn
    Pair other;
    other.a.want_disconn();
    Pair::control(other.a, other.to_b);
    BOOST_TEST((p.b.on_message(other.to_b.front()) == Rx::disconn));
    Message m = advert(p.a, 5000, 10);
    rdma::store_be32(m.data() + 8, 2);
    return p.b.on_message(m);
  });
}

BOOST_AUTO_TEST_CASE(nothing_is_advertised_to_a_peer_that_holds_one_advert) {
  Connection a{kLimits}, b{kLimits};
  std::array<std::byte, wire::kHelloBytes> hello;
  std::array<std::byte, wire::kHelloAckBytes> ack;
  b.await_hello();
  a.emit_hello({}, hello);
  BOOST_TEST((b.on_message(hello) == Rx::established));
  b.emit_hello_ack(ack);
  ack[19] = std::byte{1};  // as others say, among them one that takes a SrcAvail for Data
  BOOST_TEST((a.on_message(ack) == Rx::established));
  BOOST_TEST(a.may_send_payload());
  BOOST_TEST(!a.may_advertise());
  BOOST_TEST(b.may_advertise());
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
