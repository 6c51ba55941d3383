// Calls that send past the stream, once a lane between hosts is taken down: they overtake nothing that send() took.
#include <sys/uio.h>

#include "tests/sim/laned_ends.hpp"

namespace sdp::sim {
namespace {

/// With a control message, which only the kernel has: one that TCP does not mind.
std::int64_t send_with_control(LanedEnds& e, std::size_t bytes) {
  std::vector<std::byte> data(bytes);
  fill(data.data(), bytes, 0, e.sent[0]);
  iovec iov{data.data(), bytes};
  alignas(cmsghdr) std::array<std::byte, CMSG_SPACE(sizeof(int))> control{};
  msghdr msg{};
  msg.msg_iov = &iov;
  msg.msg_iovlen = 1;
  msg.msg_control = control.data();
  msg.msg_controllen = control.size();
  cmsghdr* const head = CMSG_FIRSTHDR(&msg);
  head->cmsg_level = IPPROTO_IP;  // of another protocol: TCP looks at SOL_SOCKET's alone
  head->cmsg_type = 0;
  head->cmsg_len = CMSG_LEN(sizeof(int));
  const std::int64_t n = e.handle(0).sendmsg(e.fd(0), &msg, MSG_NOSIGNAL);
  if (n > 0) e.sent[0] += static_cast<std::uint64_t>(n);
  return n;
}

}  // namespace

BOOST_AUTO_TEST_CASE(they_follow_what_waits_behind_the_end_of_the_lane) {
  for (const bool late : {false, true}) {
    Hosts hosts(rdma::NodeType::ib_ca, late ? Hosts::Order::late : Hosts::Order::at_once);
    LanedEnds e(hosts);
    BOOST_TEST(e.send(0, 1000) == 1000);
    e.handle(0).take_down(LaneReason::mode);
    BOOST_TEST(e.send(0, 500) == 500);  // on an unordered lane behind END, which is not acknowledged
    if (late) BOOST_TEST(send_with_control(e, 100) == -EAGAIN);
    for (int round = 0; round < 6; ++round) e.pass();
    BOOST_TEST(send_with_control(e, 100) == 100);
    for (int round = 0; round < 20 && e.received[1] < e.sent[0]; ++round) {
      e.pass();
      (void)e.receive(1);
    }
    BOOST_TEST(e.received[1] == e.sent[0]);
  }
}

BOOST_AUTO_TEST_CASE(they_follow_what_is_sent_again) {
  Hosts hosts(rdma::NodeType::ib_ca);
  LanedEnds e(hosts, 4096);
  while (e.send(0, 60'000) > 0) {
  }
  e.handle(1).take_down(LaneReason::mode);
  e.ends.serve(0);
  BOOST_TEST(send_with_control(e, 100) == -EAGAIN);
  BOOST_TEST(!e.stream(0).resend.empty());
  int refused = 0;
  while (send_with_control(e, 100) == -EAGAIN && ++refused < 100'000) {
    (void)e.receive(1);
    e.pass();
  }
  BOOST_TEST(refused > 1);
  for (int round = 0; round < 100'000 && e.received[1] < e.sent[0]; ++round) {
    (void)e.receive(1);
    e.pass();
  }
  BOOST_TEST(e.received[1] == e.sent[0]);
}

}  // namespace sdp::sim
