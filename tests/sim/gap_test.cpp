// What the kernel of the other side is told when bytes of a failed lane are lost, or are thrown away: RST, never an end in order.
#include <poll.h>

#include "tests/sim/served_pair.hpp"

namespace sdp::sim {
namespace {

Hosts& hosts() {
  static Hosts late(rdma::NodeType::ib_ca, Hosts::Order::late);
  return late;
}

/// Two ends whose directions have both gone to the lane.
class Ends {
 public:
  Ends() : ends(hosts(), LaneLimits{}, 0) {
    for (unsigned i : {0U, 1U}) ends.attach(i);
    for (int round = 0; round < 100 && !(on_lane(0) && on_lane(1)); ++round) {
      for (unsigned i : {0U, 1U}) {
        send(i, 1);
        pass();
        receive(1 - i);
      }
    }
    if (!on_lane(0) || !on_lane(1)) broken("no lane");
    while (receive(0) > 0 || receive(1) > 0) pass();
  }
  ~Ends() {
    for (unsigned i : {0U, 1U})
      if (ends.at(i).open) ends.close(i);
    for (int round = 0; round < 6; ++round) pass();
  }
  Ends(const Ends&) = delete;
  Ends& operator=(const Ends&) = delete;

  void pass() {
    hosts().release_all();
    for (unsigned i : {0U, 1U}) ends.serve(i);
  }
  std::int64_t send(unsigned i, std::size_t bytes) {
    const std::vector<std::byte> data(bytes);
    return ends.end(i).handle().send(ends.end(i).fd, data.data(), bytes, MSG_DONTWAIT | MSG_NOSIGNAL);
  }
  std::int64_t receive(unsigned i) {
    std::array<std::byte, 65536> data;
    return ends.end(i).handle().recv(ends.end(i).fd, data.data(), data.size(), MSG_DONTWAIT);
  }
  /// What the kernel itself says on that side, past us.
  long kernel_says(unsigned i) {
    pollfd end{ends.end(i).fd, POLLIN, 0};
    ::poll(&end, 1, 30'000);
    std::byte one;
    return rdma::sys::call(SYS_recvfrom, ends.end(i).fd, rdma::sys::arg(&one), 1, MSG_DONTWAIT, 0, 0);
  }

  ServedPair ends;

 private:
  bool on_lane(unsigned i) {
    const StreamImpl& s = *ends.end(i).stream;
    return s.tx.load() == TxState::lane && s.rx.load() == RxState::lane;
  }
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

}  // namespace sdp::sim
