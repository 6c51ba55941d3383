// Who closes a connection with bytes unread resets it, on a lane as on TCP: the peer reads what it was sent, then gets ECONNRESET,
// however late the lane's last words come.
#include "tests/sim/laned_ends.hpp"

namespace sdp::sim {
namespace {

Hosts& hosts(bool late) {
  static Hosts at_once(rdma::NodeType::ib_ca), wire(rdma::NodeType::ib_ca, Hosts::Order::late);
  return late ? wire : at_once;
}

/// Side 1 closes with bytes unread, and what it has sent is still to be read, too.
class Ends : public LanedEnds {
 public:
  explicit Ends(bool late, bool may_recover = true) : LanedEnds(hosts(late)) {
    if (!may_recover)
      for (unsigned i : {0U, 1U}) stream(i).recovery = Recovery::none;
    BOOST_TEST(send(0, 5000) == 5000);
    pass();
    BOOST_TEST(handle(1).inq(fd(1)) == 5000);
    BOOST_TEST(send(1, 700) == 700);
  }
  void settle() {
    for (int round = 0; round < 10; ++round) pass();
  }
  void check_reset() {
    BOOST_TEST(receive_all(0) == -ECONNRESET);
    BOOST_TEST(received[0] == sent[1]);
    BOOST_TEST(receive(0) == 0);
    BOOST_TEST(send(0, 1) == -EPIPE);
    settle();
    BOOST_TEST(ends.end(0).stream->lane == nullptr);
  }
};

}  // namespace

BOOST_AUTO_TEST_CASE(its_peer_is_told_of_a_reset_whichever_word_it_looks_behind) {
  constexpr std::size_t kPosts = 8;  // more than side 1 makes
  for (const bool may_recover : {true, false})
    for (std::size_t arrived = 0; arrived <= kPosts; ++arrived) {
      BOOST_TEST_CONTEXT(arrived << " posts arrived" << (may_recover ? "" : ", no recovery")) {
        Ends e(true, may_recover);
        e.ends.close(1);
        hosts(true).release(1, arrived);
        BOOST_TEST(e.receive_all(0) == -EAGAIN);
        e.settle();
        e.check_reset();
      }
    }
}

BOOST_AUTO_TEST_CASE(so_it_is_where_words_arrive_at_once) {
  Ends e(false);
  e.ends.close(1);
  e.check_reset();
}

BOOST_AUTO_TEST_CASE(its_peers_kernel_hears_of_it_when_everything_has_arrived) {
  Ends e(true);
  e.ends.close(1);
  e.ends.serve(1);
  pollfd end{e.fd(0), POLLIN | POLLRDHUP, 0};
  BOOST_TEST(::poll(&end, 1, 0) == 0);
  hosts(true).release(1);
  e.ends.serve(0);
  hosts(true).release(0);
  e.ends.serve(1);
  BOOST_TEST(::poll(&end, 1, 30'000) == 1);
  BOOST_TEST((end.revents & (POLLERR | POLLHUP)) == (POLLERR | POLLHUP));
  e.check_reset();
}

BOOST_AUTO_TEST_CASE(it_is_reset_though_the_lane_fails_meanwhile) {
  Ends e(true);
  e.ends.close(1);
  BOOST_TEST(e.ends.fail(0));
  e.settle();
  BOOST_TEST(e.receive_all(0) == -ECONNRESET);
  BOOST_TEST(e.received[0] == e.sent[1]);
}

}  // namespace sdp::sim
