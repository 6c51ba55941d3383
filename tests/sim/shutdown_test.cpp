// A connection that is shut for both directions while its descriptor stays open: what had come is read, and the first byte behind
// it resets the connection, as TCP's own does. On lanes whose words and bytes arrive at once, and on those where they do not.
#include <sys/ioctl.h>

#include "tests/sim/laned_ends.hpp"

namespace sdp::sim {
namespace {

Hosts& hosts(bool late) {
  static Hosts at_once(rdma::NodeType::ib_ca), wire(rdma::NodeType::ib_ca, Hosts::Order::late);
  return late ? wire : at_once;
}

/// Side 1 is the one that shuts.
class Ends : public LanedEnds {
 public:
  explicit Ends(bool late) : LanedEnds(hosts(late)) {}
  Ends(bool late, int how) : LanedEnds(hosts(late), 0, false) {
    shut(how);
    for (unsigned i : {0U, 1U}) ends.attach(i);
  }
  void shut(int how = SHUT_RDWR) { BOOST_TEST(handle(1).shutdown(fd(1), how) == 0); }
  void settle() {
    for (int round = 0; round < 10; ++round) pass();
  }
  /// Side 0 sends on until it is told; at most so many.
  std::int64_t send_until_told(int most = 20) {
    std::int64_t n = 0;
    for (int i = 0; i < most && (n >= 0 || n == -EAGAIN); ++i) {
      n = send(0, 1000);
      pass();
    }
    return n;
  }
  /// Both end as TCP's would: side 1 reads what had come before, `whole` bytes at least.
  void check_reset(std::uint64_t whole) {
    BOOST_TEST(receive_all(1) == -ECONNRESET);
    BOOST_TEST(received[1] >= whole);
    BOOST_TEST(receive(1) == 0);
    BOOST_TEST(send(1, 1) == -EPIPE);
    BOOST_TEST(receive_all(0) == 0);  // the end came before the reset
    BOOST_TEST(received[0] == sent[1]);
    settle();
    for (unsigned i : {0U, 1U}) BOOST_TEST((ends.end(i).stream->lane == nullptr), "side " << i << " keeps its lane");
  }
};

}  // namespace

BOOST_AUTO_TEST_CASE(the_first_byte_behind_it_resets_the_connection) {
  for (const bool late : {false, true})
    for (const std::size_t unread : {0U, 5000U}) {
      Ends e(late);
      BOOST_TEST(e.send(1, 70) == 70);
      if (unread != 0) BOOST_TEST(e.send(0, unread) == static_cast<std::int64_t>(unread));
      e.settle();
      e.shut();
      e.settle();
      BOOST_TEST(e.handle(1).inq(e.fd(1)) == static_cast<int>(unread));
      BOOST_TEST(e.receive(1, 100, MSG_PEEK) == (unread != 0 ? 100 : 0));
      const std::uint64_t before = e.sent[0];
      BOOST_TEST(e.send(0, 10) == 10);
      BOOST_TEST(e.send_until_told() == -EPIPE);
      e.check_reset(before);
      BOOST_TEST(e.received[1] == before);
    }
}

BOOST_AUTO_TEST_CASE(a_byte_under_way_by_the_lane_resets_it_too) {
  Ends e(true);
  BOOST_TEST(e.send(0, 5000) == 5000);
  e.settle();
  e.shut();
  for (unsigned i : {1U, 0U}) {  // END, and its acknowledgement: then FIN and ABANDON go
    e.ends.hosts().release(i);
    e.ends.serve(1 - i);
  }
  BOOST_TEST((e.stream(1).rx.load() == RxState::refused));
  BOOST_TEST(e.send(0, 10) == 10);
  BOOST_TEST((e.stream(0).tx.load() == TxState::lane));
  e.settle();
  BOOST_TEST(e.send(0, 1) == -EPIPE);
  e.check_reset(e.sent[0] - 10);
}

BOOST_AUTO_TEST_CASE(a_peer_whose_lane_is_full_is_reset) {
  for (const bool late : {false, true}) {
    Ends e(late);
    while (e.send(0, 60'000) > 0) e.pass();
    e.settle();
    e.shut();
    e.settle();
    BOOST_TEST((e.handle(0).poll(POLLOUT) | e.handle(0).kernel_events(POLLOUT)) == std::uint32_t{POLLOUT});
    BOOST_TEST(e.send_until_told() == -EPIPE);
    e.check_reset(10'000);
    BOOST_TEST(e.received[1] < e.sent[0]);
  }
}

BOOST_AUTO_TEST_CASE(a_peer_that_sends_nothing_may_end_in_order) {
  for (const bool late : {false, true}) {
    Ends e(late);
    BOOST_TEST(e.send(0, 5000) == 5000);
    e.settle();
    e.shut();
    e.settle();
    e.ends.close(0);
    e.settle();
    BOOST_TEST(e.receive_all(1) == 0);
    BOOST_TEST(e.received[1] == e.sent[0]);
  }
}

BOOST_AUTO_TEST_CASE(bytes_of_tcp_that_came_before_are_read_before_those_of_the_lane) {
  for (const bool late : {false, true}) {
    Ends e(late, SHUT_RD);  // which stops nothing
    e.settle();
    BOOST_TEST(e.send(0, 300) == 300);
    BOOST_TEST(e.receive(1, 100) == 100);  // READY
    e.settle();
    BOOST_TEST(e.send(0, 500) == 500);
    BOOST_TEST((e.stream(0).tx.load() == TxState::lane));
    e.settle();
    e.shut(SHUT_WR);
    e.settle();
    BOOST_TEST((e.stream(1).rx.load() == RxState::refused));
    BOOST_TEST(e.send_until_told() == -EPIPE);
    e.settle();
    e.check_reset(800);
  }
}

BOOST_AUTO_TEST_CASE(a_socket_that_is_shut_before_its_lane_is_up_takes_none) {
  for (const bool late : {false, true}) {
    Ends e(late, SHUT_RDWR);
    e.settle();
    BOOST_TEST(e.receive(1) == 0);
    e.settle();
    BOOST_TEST(e.send_until_told() == -EPIPE);
    e.settle();
    e.check_reset(0);
  }
}

BOOST_AUTO_TEST_CASE(shut_for_reading_before_its_lane_is_up_it_reads_on) {
  Ends e(false, SHUT_RD);
  for (int i = 0; i < 5; ++i) {
    BOOST_TEST(e.send(0, 100) == 100);
    e.pass();
    BOOST_TEST(e.receive(1) == 100);
    e.pass();
  }
  BOOST_TEST((e.stream(1).rx.load() == RxState::lane));
  e.stream(1).anchor_event = true;  // as at any event of the kernel's: a receive says 0 there ever since
  BOOST_TEST(e.receive(1) == 0);
  BOOST_TEST(e.send(0, 100) == 100);
  BOOST_TEST(e.receive(1) == 100);
}

BOOST_AUTO_TEST_CASE(closed_with_bytes_unread_it_is_reset) {
  for (const bool late : {false, true}) {
    Ends e(late);
    BOOST_TEST(e.send(1, 70) == 70);
    BOOST_TEST(e.send(0, 5000) == 5000);
    e.settle();
    e.shut();
    e.settle();
    e.ends.close(1);
    e.settle();
    BOOST_TEST(e.receive_all(0) == 0);
    BOOST_TEST(e.received[0] == e.sent[1]);
    BOOST_TEST(e.send(0, 1) == -EPIPE);
  }
}

BOOST_AUTO_TEST_CASE(a_lane_that_fails_meanwhile_takes_nothing_away) {
  for (const bool answered : {false, true}) {
    Ends e(true);
    BOOST_TEST(e.send(0, 5000) == 5000);
    e.settle();
    e.shut();
    if (answered) e.settle();
    BOOST_TEST(e.ends.fail(0));
    e.settle();
    BOOST_TEST(e.send_until_told() == -EPIPE);
    BOOST_TEST(e.receive_all(1) == -ECONNRESET);
    BOOST_TEST(e.receive(1) == 0);
  }
}

}  // namespace sdp::sim
