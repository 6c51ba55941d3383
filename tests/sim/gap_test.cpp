// What the kernel of the other side is told when bytes of a failed lane are lost, or are thrown away: RST, never an end in order.
#include "tests/sim/laned_ends.hpp"

namespace sdp::sim {
namespace {

Hosts& hosts() {
  static Hosts late(rdma::NodeType::ib_ca, Hosts::Order::late);
  return late;
}

class Ends : public LanedEnds {
 public:
  Ends() : LanedEnds(hosts()) {}
};

}  // namespace

BOOST_AUTO_TEST_CASE(bytes_of_a_failed_lane_that_are_closed_unread_reset_the_connection) {
  for (const bool device_goes : {false, true}) {
    Ends e;
    BOOST_TEST(e.send(0, 5000) == 5000);
    hosts().release_all();
    (void)e.ends.end(1).handle().inq(e.ends.end(1).fd);  // they have arrived
    BOOST_TEST((device_goes ? e.ends.lose_device(1) : e.ends.fail(1)));
    for (int round = 0; round < 10; ++round) e.pass();
    BOOST_TEST(e.ends.end(1).handle().inq(e.ends.end(1).fd) == 5000);
    e.ends.close(1);
    BOOST_TEST(e.kernel_says(0) == -ECONNRESET);
  }
}

BOOST_AUTO_TEST_CASE(a_gap_is_a_reset_on_both_sides) {
  Ends e;
  BOOST_TEST(e.send(0, 5000) == 5000);  // they never leave
  StreamImpl& s = *e.ends.end(0).stream;
  BOOST_TEST(e.ends.fail(0));
  (void)s.lock.lock();
  s.lane->drain();
  BOOST_TEST(s.begin_recovery());
  s.give_up_recovery();  // the peer cannot be asked
  s.lock.unlock();
  BOOST_TEST(e.kernel_says(1) == -ECONNRESET);
  BOOST_TEST(e.receive(0) == -ECONNRESET);
  BOOST_TEST(e.receive(0) == 0);
  BOOST_TEST(e.send(0, 1) == -EPIPE);
}

BOOST_AUTO_TEST_CASE(what_has_arrived_is_read_before_a_gap_is_told) {
  Ends e;
  BOOST_TEST(e.send(1, 700) == 700);
  hosts().release_all();
  (void)e.ends.end(0).handle().inq(e.ends.end(0).fd);
  BOOST_TEST(e.send(0, 5000) == 5000);
  StreamImpl& s = *e.ends.end(0).stream;
  (void)s.lock.lock();
  BOOST_TEST(s.begin_recovery());
  s.give_up_recovery();
  s.lock.unlock();
  BOOST_TEST(e.receive(0) == 700);
  BOOST_TEST(e.receive(0) == -ECONNRESET);
  BOOST_TEST(e.receive(0) == 0);
}

BOOST_AUTO_TEST_CASE(a_message_that_breaks_the_protocol_costs_the_lane_and_no_byte) {
  Ends e;
  BOOST_TEST(e.send(0, 5000) == 5000);
  e.pass();
  BOOST_TEST(e.receive(1, 100) == 100);
  e.stream(1).lane->conn.abort("a test");  // whatever comes now is refused
  BOOST_TEST(e.send(0, 3000) == 3000);
  for (int round = 0; round < 20; ++round) {
    e.pass();
    if (e.sent[1] < 700) (void)e.send(1, 700);
    for (unsigned i : {0U, 1U}) BOOST_TEST(e.receive_all(i) == -EAGAIN);
  }
  for (unsigned i : {0U, 1U}) BOOST_TEST(e.received[1 - i] == e.sent[i]);
  BOOST_TEST(e.sent[1] >= 700U);
}

// What Soft-RoCE may make of two messages (DRIVERS.md, "Known faults"); no header tells.
BOOST_AUTO_TEST_CASE(a_message_with_packets_of_another_costs_the_lane_and_no_byte) {
  constexpr std::size_t kPacket = 1024;
  for (const std::size_t bytes : {1500U, 2000U}) {
    Ends e;
    for (int i = 0; i < 3; ++i) BOOST_TEST(e.send(0, bytes) == static_cast<std::int64_t>(bytes));
    BOOST_TEST(hosts().late[0]->mix(kPacket));
    for (int round = 0; round < 20; ++round) {
      e.pass();
      BOOST_TEST(e.receive_all(1) == -EAGAIN);
    }
    BOOST_TEST(e.received[1] == e.sent[0]);
    BOOST_TEST(e.stream(1).stats->lanes_failed.get() == 1U);
  }
}

}  // namespace sdp::sim
