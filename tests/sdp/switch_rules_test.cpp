// The sixteen rules of the switch between TCP and a lane, each with a case that fails without it. Rules that other parts keep have
// their tests there:
//
//   10  every call that runs a program or does stdio    differential/fcntl_ioctl, differential/by_syscall, apps/ends (exec, fork)
//   12  epoll entries, edges, EPOLLEXCLUSIVE            here in part; differential/epoll_*
//   13  identity of the other end                       rdma_core/local_cm_test, rdma_core/hostile_test
//   14  received memory                                 rdma_core/hostile_test, rdma_core/shm_datapath_test
//   15  options read back, limits                       differential/timeouts_set_before_and_read_back, rdma_core/local_cm_test
//   16  what changes is said                            README, "Limits"
#include <linux/sockios.h>
#include <poll.h>
#include <sys/ioctl.h>
#include <sys/mman.h>

#include <cerrno>
#include <string>
#include <thread>
#include <vector>

#include "sdp/socket_modes.hpp"
#include "tests/sim/stream_pair.hpp"

namespace sdp::sim {
namespace {

struct Rig {
  Hosts hosts{rdma::NodeType::ib_ca};
  StreamPair pair;
  std::uint64_t sent[2] = {}, received[2] = {};

  explicit Rig(int kernel_buffer = 0) : pair(hosts, LaneLimits{}, kernel_buffer) {}
  explicit Rig(Hosts::Order order, int kernel_buffer = 0)
      : hosts(rdma::NodeType::ib_ca, order), pair(hosts, LaneLimits{}, kernel_buffer) {}
  StreamImpl& stream(unsigned side) { return *pair[side].stream; }
  std::int64_t send(unsigned side, std::size_t bytes) {
    std::vector<std::byte> data(bytes);
    fill(data.data(), bytes, side, sent[side]);
    const std::int64_t n = pair[side].handle().send(pair[side].fd, data.data(), bytes, MSG_NOSIGNAL);
    if (n > 0) sent[side] += static_cast<std::uint64_t>(n);
    return n;
  }
  std::int64_t recv(unsigned side, std::size_t bytes, int flags = 0) {
    std::vector<std::byte> data(bytes);
    const std::int64_t n = pair[side].handle().recv(pair[side].fd, data.data(), bytes, flags);
    if (n > 0) verify(data.data(), static_cast<std::size_t>(n), 1 - side, received[side], "recv");
    if (n > 0 && !(flags & MSG_PEEK)) received[side] += static_cast<std::uint64_t>(n);
    return n;
  }
  /// Both directions by the lane: each side enters a receive (READY), then a send (SWITCH).
  void up() {
    for (unsigned side : {0U, 1U}) pair.attach(side);
    hosts.release_all();
    for (unsigned side : {0U, 1U}) BOOST_REQUIRE(recv(side, 100) == -EAGAIN);
    hosts.release_all();
    for (unsigned side : {0U, 1U}) BOOST_REQUIRE(send(side, 10) == 10);
    hosts.release_all();
    for (unsigned side : {0U, 1U}) BOOST_REQUIRE(recv(side, 100) == 10);
    for (unsigned side : {0U, 1U}) {
      BOOST_REQUIRE((stream(side).tx.load() == TxState::lane));
      BOOST_REQUIRE((stream(side).rx.load() == RxState::lane));
    }
  }
  void serve(unsigned side) {
    StreamImpl& s = stream(side);
    (void)s.lock.lock();
    if (s.tx.load() != TxState::ended && s.lane->said(kAbandon)) s.handle_abandon(pair[side].fd);
    if (!s.resend.empty()) (void)s.flush_resend(pair[side].fd);
    s.lock.unlock();
  }
  /// This direction goes back to TCP, the other stays on the lane.
  void end_sending(unsigned side) {
    StreamImpl& s = stream(side);
    (void)s.lock.lock();
    s.end_tx_locked();
    s.lock.unlock();
  }
  /// As the service thread does, of its own accord.
  void tend(unsigned side) {
    StreamImpl& s = stream(side);
    (void)s.lock.lock();
    s.tend();
    s.lock.unlock();
  }
  /// Unordered: side 1 has said READY, and SWITCH with bytes behind it is on its way to it.
  void switch_under_way() {
    for (unsigned side : {0U, 1U}) pair.attach(side);
    hosts.release_all();
    BOOST_REQUIRE(send(0, 30) == 30);
    BOOST_REQUIRE(recv(1, 10) == 10);  // READY
    hosts.release_all();
    BOOST_REQUIRE(send(0, 100) == 100);
    BOOST_REQUIRE((stream(0).tx.load() == TxState::lane));
    BOOST_REQUIRE((stream(1).rx.load() == RxState::ready));
  }
  /// kill -9 of side 0: what it has posted and not gone is lost.
  void kill_0() {
    hosts.late[0]->die();
    ::close(pair[0].fd);
    pair[0].fd = -1;
    stream(1).anchor_event = true;  // the service thread saw FIN
  }
  void close_0() {
    pair[0].handle().close(pair[0].fd);
    pair[0].stream = nullptr;
    ::close(pair[0].fd);
    pair[0].fd = -1;
    stream(1).anchor_event = true;
  }
  /// Side 1 leaves the lane with so much unread that side 0 cannot send all of it again at once.
  void leave_with_much_unread() {
    up();
    while (send(0, 10'000) > 0) {
    }
    pair[1].handle().take_down(LaneReason::mode);
    serve(0);
    BOOST_REQUIRE(!stream(0).resend.empty());
  }
  /// What side 1 became by exec reads to the end, without a library and its lane; `between` is done after each read.
  template <class Between>
  void read_to_the_end_by_tcp(Between between) {
    std::vector<std::byte> data(1 << 20);
    std::int64_t n = -1;
    for (int patience = 0; n != 0 && patience < 100; ++patience) {
      n = ::recv(pair[1].fd, data.data(), data.size(), 0);
      BOOST_REQUIRE((n >= 0 || errno == EAGAIN));
      if (n > 0) {
        verify(data.data(), static_cast<std::size_t>(n), 0, received[1], "plain recv");
        received[1] += static_cast<std::uint64_t>(n);
        patience = 0;
      }
      between();
      pollfd wait{pair[1].fd, POLLIN, 0};
      if (n < 0) ::poll(&wait, 1, 100);
    }
    BOOST_TEST(n == 0);
    BOOST_TEST(received[1] == sent[0]);
  }
  std::uint64_t by_tcp(unsigned side) { return anchor_counts(pair[side].fd).sent; }
};

BOOST_AUTO_TEST_CASE(rule_1_only_the_programs_bytes_go_by_tcp) {
  Rig r;
  BOOST_TEST(r.send(0, 500) == 500);
  BOOST_TEST(r.recv(1, 1000) == 500);
  r.up();
  BOOST_TEST(r.send(0, 3000) == 3000);
  BOOST_TEST(r.by_tcp(0) == 500U);  // PREPARE, READY and SWITCH are no bytes of the stream
  BOOST_TEST(r.recv(1, 1000) == 1000);
  r.pair[1].handle().take_down(LaneReason::mode);
  r.serve(0);
  BOOST_TEST(r.by_tcp(0) == 500U + 2000U);  // what the reader had not read, and nothing else
  BOOST_TEST(r.recv(1, 5000) == 2000);
}

BOOST_AUTO_TEST_CASE(rule_2_a_switch_blocks_nobody) {
  Rig r;
  for (unsigned side : {0U, 1U}) r.pair.attach(side);
  BOOST_TEST(r.send(0, 100) == 100);  // PREPARE is said, READY is not: TCP carries on
  BOOST_TEST(r.by_tcp(0) == 100U);
  BOOST_TEST(r.recv(1, 50) == 50);  // this entry says READY, and reads
  BOOST_TEST(r.send(0, 100) == 100);
  BOOST_TEST(r.by_tcp(0) == 100U);
  BOOST_TEST(r.recv(1, 1000) == 50);  // never past P
  BOOST_TEST(r.recv(1, 1000) == 100);
}

BOOST_AUTO_TEST_CASE(rule_2_a_thread_in_the_kernel_holds_the_switch_up) {
  Rig r;
  for (unsigned side : {0U, 1U}) r.pair.attach(side);
  r.stream(1).kernel_receivers = 1;
  BOOST_TEST(r.recv(1, 10) == -EAGAIN);
  BOOST_TEST(r.send(0, 10) == 10);
  BOOST_TEST(r.by_tcp(0) == 10U);  // no READY while another thread reads the anchor
  r.stream(1).kernel_receivers = 0;
  BOOST_TEST(r.recv(1, 10) == 10);
  r.stream(0).kernel_senders = 1;
  BOOST_TEST(r.send(0, 10) == 10);
  BOOST_TEST(r.by_tcp(0) == 20U);  // no SWITCH while another thread writes to it
  r.stream(0).kernel_senders = 0;
  BOOST_TEST(r.send(0, 10) == 10);
  BOOST_TEST(r.by_tcp(0) == 20U);
}

BOOST_AUTO_TEST_CASE(rule_2_bytes_read_past_p_wait_for_the_lanes) {
  Rig r;
  for (unsigned side : {0U, 1U}) r.pair.attach(side);
  BOOST_TEST(r.send(0, 100) == 100);
  BOOST_TEST(r.recv(1, 10) == 10);
  BOOST_TEST(r.send(0, 200) == 200);  // by the lane
  r.pair[0].handle().take_down(LaneReason::mode);
  BOOST_TEST(r.send(0, 300) == 300);  // by TCP again
  BOOST_TEST(r.by_tcp(0) == 400U);
  std::int64_t total = 10;
  while (total < 600) {
    const std::int64_t n = r.recv(1, 1000);  // checks the order of the bytes
    BOOST_REQUIRE(n > 0);
    total += n;
  }
}

BOOST_AUTO_TEST_CASE(rule_2_bytes_past_p_are_neither_dropped_nor_read_too_early) {
  for (const bool drop : {false, true}) {
    Rig r;
    for (unsigned side : {0U, 1U}) r.pair.attach(side);
    BOOST_TEST(r.send(0, 100) == 100);
    BOOST_TEST(r.recv(1, 10) == 10);
    BOOST_TEST(r.send(0, 200) == 200);  // by the lane
    r.pair[0].handle().take_down(LaneReason::mode);
    BOOST_TEST(r.send(0, 300) == 300);  // by TCP again
    BOOST_REQUIRE((r.stream(1).rx.load() == RxState::ready));
    std::array<std::byte, 600> data{};
    std::int64_t n = 0;
    if (drop) {
      n = r.pair[1].handle().recv(r.pair[1].fd, nullptr, 600, MSG_TRUNC);
    } else {
      iovec parts[3] = {{data.data(), 50}, {data.data() + 50, 500}, {data.data() + 550, 50}};
      msghdr msg{};
      msg.msg_iov = parts;
      msg.msg_iovlen = 3;
      n = r.pair[1].handle().recvmsg(r.pair[1].fd, &msg, 0);
      verify(data.data(), static_cast<std::size_t>(n), 0, r.received[1], "recvmsg");
    }
    BOOST_TEST(n == 90);
    r.received[1] += static_cast<std::uint64_t>(n);
    while (r.received[1] < 600) BOOST_REQUIRE(r.recv(1, 1000) > 0);  // checks the order of the bytes
  }
}

constexpr auto kLate = Hosts::Order::late;

BOOST_AUTO_TEST_CASE(rule_3_off_tcp_until_the_end_is_acknowledged) {
  Rig r(kLate);
  r.up();
  BOOST_TEST(r.send(0, 100) == 100);
  r.pair[0].handle().take_down(LaneReason::mode);
  BOOST_TEST(r.send(0, 50) == 50);
  BOOST_TEST(r.send(0, 60) == 60);
  r.tend(0);
  BOOST_TEST(r.by_tcp(0) == 0U);
  BOOST_TEST(r.pair[0].handle().outq(r.pair[0].fd) == 110);
  BOOST_TEST(r.recv(1, 1000) == -EAGAIN);
  r.hosts.release(0);
  BOOST_TEST(r.recv(1, 1000) == 100);
  BOOST_TEST(r.recv(1, 1000) == -EAGAIN);  // END is acknowledged
  r.tend(0);
  BOOST_TEST(r.by_tcp(0) == 0U);
  r.hosts.release(1);
  r.tend(0);
  BOOST_TEST(r.by_tcp(0) == 110U);
  BOOST_TEST(r.recv(1, 1000) == 110);
  BOOST_TEST(r.send(0, 5) == 5);
  BOOST_TEST(r.by_tcp(0) == 115U);
  BOOST_TEST(r.recv(1, 1000) == 5);
}

BOOST_AUTO_TEST_CASE(rule_3_the_end_is_acknowledged_though_nobody_reads) {
  Rig r(kLate);
  r.up();
  BOOST_TEST(r.send(0, 100) == 100);
  r.pair[0].handle().take_down(LaneReason::mode);
  BOOST_TEST(r.send(0, 50) == 50);
  r.hosts.release(0);
  r.tend(1);
  r.hosts.release(1);
  r.tend(0);
  BOOST_TEST(r.by_tcp(0) == 50U);
  BOOST_TEST(r.recv(1, 1000) == 100);
  BOOST_TEST(r.recv(1, 1000) == 50);
}

BOOST_AUTO_TEST_CASE(rule_3_what_waits_for_the_acknowledgement_is_bounded) {
  Rig r(kLate);
  r.up();
  r.end_sending(0);
  const std::uint64_t before = r.sent[0];
  const auto writable = [&r] {
    const std::uint32_t by_lane = r.pair[0].handle().poll(POLLOUT);
    return ((by_lane | r.pair[0].handle().kernel_events(POLLOUT)) & POLLOUT) != 0;
  };
  BOOST_TEST(r.send(0, 10'000) == 10'000);
  BOOST_TEST(writable());
  while (r.send(0, 10'000) > 0) {
  }
  BOOST_TEST(r.sent[0] - before == StreamImpl::kBufferAhead);
  BOOST_TEST(r.send(0, 1) == -EAGAIN);
  BOOST_TEST(!writable());
  const std::uint64_t edges = r.pair[0].handle().tx_edges();
  r.hosts.release(0);
  BOOST_TEST(r.recv(1, 1000) == -EAGAIN);
  const auto has_news = [&r] { return r.pair[0].handle().maybe_ready(Grace::Look(engine::grace()), POLLOUT); };
  r.pair[0].lane->drain();
  BOOST_TEST(!has_news());
  r.hosts.release(1);
  r.pair[0].lane->drain();
  BOOST_TEST(has_news());
  BOOST_TEST(writable());
  BOOST_TEST(r.pair[0].handle().tx_edges() != edges);
  BOOST_TEST(r.send(0, 1) == 1);
  while (r.received[1] < r.sent[0]) BOOST_REQUIRE(r.recv(1, 100'000) > 0);
}

BOOST_AUTO_TEST_CASE(rule_3_neither_sendfile_nor_urgent_bytes_overtake_the_end) {
  Rig r(kLate);
  r.up();
  BOOST_TEST(r.send(0, 100) == 100);
  r.pair[0].handle().take_down(LaneReason::mode);
  std::vector<std::byte> data(100);
  fill(data.data(), data.size(), 0, r.sent[0]);
  const int file = memfd_create("bytes", MFD_CLOEXEC);
  BOOST_REQUIRE(write(file, data.data(), data.size()) == 100);
  std::int64_t offset = 0;
  BOOST_TEST(r.pair[0].handle().sendfile(r.pair[0].fd, file, &offset, data.size()) == 100);
  close(file);
  BOOST_TEST(r.pair[0].handle().send(r.pair[0].fd, data.data(), 1, MSG_OOB) == -EAGAIN);
  BOOST_TEST(r.by_tcp(0) == 0U);
  r.hosts.release(0);
  BOOST_TEST(r.recv(1, 1000) == 100);
  BOOST_TEST(r.recv(1, 1000) == -EAGAIN);
  r.hosts.release(1);
  r.tend(0);
  r.sent[0] += 100;
  BOOST_TEST(r.recv(1, 1000) == 100);
  BOOST_TEST(r.pair[0].handle().send(r.pair[0].fd, data.data(), 1, MSG_OOB) == 1);
}

BOOST_AUTO_TEST_CASE(rule_3_a_reader_that_is_gone_acknowledges_nothing) {
  Rig r(kLate);
  r.up();
  r.pair[0].handle().take_down(LaneReason::mode);
  BOOST_TEST(r.send(0, 50) == 50);
  close(r.pair[1].fd);
  r.pair[1].fd = -1;
  r.stream(0).peer_gone = true;
  r.tend(0);
  BOOST_TEST(r.stream(0).resend.empty());
  BOOST_TEST(r.send(0, 50) < 0);
}

BOOST_AUTO_TEST_CASE(rule_4_a_foreign_writer_keeps_the_stream_on_tcp) {
  Rig r;
  for (unsigned side : {0U, 1U}) r.pair.attach(side);
  BOOST_TEST(r.recv(1, 10) == -EAGAIN);
  std::byte x[5];
  fill(x, sizeof x, 0, 0);
  BOOST_TEST(::send(r.pair[0].fd, x, sizeof x, 0) == 5);  // past the library
  r.sent[0] += 5;
  BOOST_TEST(r.send(0, 10) == 10);
  BOOST_TEST(r.by_tcp(0) == 15U);
  BOOST_TEST((r.stream(0).tx.load() == TxState::ended));
  BOOST_TEST(r.recv(1, 100) == 15);
}

BOOST_AUTO_TEST_CASE(rule_4_a_foreign_reader_keeps_the_stream_on_tcp) {
  Rig r;
  for (unsigned side : {0U, 1U}) r.pair.attach(side);
  BOOST_TEST(r.send(0, 10) == 10);
  std::byte x[4];
  BOOST_TEST(::recv(r.pair[1].fd, x, sizeof x, 0) == 4);
  r.received[1] += 4;
  for (int i = 0; i < 20 && r.stream(1).rx.load() == RxState::tcp; ++i) (void)r.recv(1, 1, MSG_PEEK);
  BOOST_TEST((r.stream(1).rx.load() == RxState::ended));
  BOOST_TEST(r.recv(1, 100) == 6);
}

BOOST_AUTO_TEST_CASE(rule_5_one_predicate_names_the_modes_without_a_lane) {
  const int one = 1, two = 2, zero = 0, minus_one = -1;
  const auto refuses = [](int level, int name, const int& value) {
    return is_mode_without_lane(level, name, &value, sizeof value);
  };
  BOOST_TEST(refuses(SOL_SOCKET, SO_RCVLOWAT, two));
  BOOST_TEST(!refuses(SOL_SOCKET, SO_RCVLOWAT, one));
  BOOST_TEST(refuses(SOL_SOCKET, SO_RCVLOWAT, minus_one));
  for (const int name : {SO_PEEK_OFF, SO_ZEROCOPY, SO_TIMESTAMP, SO_TIMESTAMPNS, SO_TIMESTAMPING, 63, 64, 65})
    BOOST_TEST(refuses(SOL_SOCKET, name, one), name);
  for (const int name : {SO_ZEROCOPY, SO_TIMESTAMP}) BOOST_TEST(!refuses(SOL_SOCKET, name, zero), name);
  BOOST_TEST(!refuses(SOL_SOCKET, SO_PEEK_OFF, minus_one));
  BOOST_TEST(refuses(IPPROTO_TCP, TCP_INQ, one));
  BOOST_TEST(refuses(IPPROTO_TCP, TCP_ULP, zero));
  BOOST_TEST(refuses(IPPROTO_TCP, TCP_REPAIR, one));
  BOOST_TEST(!refuses(IPPROTO_TCP, 1 /* TCP_NODELAY */, one));
  BOOST_TEST(!refuses(SOL_SOCKET, SO_KEEPALIVE, one));
}

BOOST_AUTO_TEST_CASE(rule_6_bytes_beside_the_lane_come_after_what_it_holds) {
  Rig r;
  r.up();
  BOOST_TEST(r.send(0, 100) == 100);
  std::byte x[7];
  fill(x, sizeof x, 0, r.sent[0]);
  BOOST_TEST(::send(r.pair[0].fd, x, sizeof x, 0) == 7);  // past the library
  r.sent[0] += 7;
  r.stream(1).anchor_event = true;  // the service thread saw it
  BOOST_TEST(r.recv(1, 1000) == 100);
  BOOST_TEST(r.recv(1, 1000) == -EAGAIN);  // ABANDON: what the other sends by the lane now has to come behind them
  BOOST_TEST(r.send(0, 50) == 50);
  BOOST_TEST(r.recv(1, 7) == 7);
  BOOST_TEST(r.recv(1, 1000) == 50);
  BOOST_TEST(r.send(1, 5) == 5);
  BOOST_TEST(r.recv(0, 100) == 5);
}

BOOST_AUTO_TEST_CASE(rule_7_fin_with_the_lanes_end_reached_is_the_end) {
  Rig r;
  r.up();
  BOOST_TEST(r.send(0, 100) == 100);
  BOOST_TEST(r.pair[0].handle().shutdown(r.pair[0].fd, SHUT_WR) == 0);
  r.stream(1).anchor_event = true;
  BOOST_TEST(r.recv(1, 40) == 40);
  BOOST_TEST(r.recv(1, 100) == 60);
  BOOST_TEST(r.recv(1, 100) == 0);
  BOOST_TEST(r.send(1, 5) == 5);  // the other half is open
  BOOST_TEST(r.recv(0, 100) == 5);
}

BOOST_AUTO_TEST_CASE(rule_7_an_end_with_bytes_missing_is_a_reset) {
  Rig r;
  r.up();
  r.pair[0].lane->write_word(kEnd, 1'000'000);  // a position that no message reaches
  BOOST_TEST(r.recv(1, 100) == -ECONNRESET);
}

BOOST_AUTO_TEST_CASE(rule_7_closing_with_bytes_unread_is_a_reset) {
  Rig r;
  r.up();
  BOOST_TEST(r.send(0, 50) == 50);
  BOOST_TEST(r.send(1, 30) == 30);
  r.pair[1].handle().close(r.pair[1].fd);  // 50 bytes unread
  r.pair[1].stream = nullptr;
  close(r.pair[1].fd);
  r.pair[1].fd = -1;
  r.stream(0).anchor_event = true;
  BOOST_TEST(r.recv(0, 100) == 30);
  BOOST_TEST(r.recv(0, 100) == -ECONNRESET);
  BOOST_TEST(r.recv(0, 100) == 0);
  BOOST_TEST(r.send(0, 1) == -EPIPE);
}

BOOST_AUTO_TEST_CASE(rule_7_a_reset_comes_behind_the_bytes_of_the_anchor) {
  Rig r;
  r.up();
  BOOST_TEST(r.send(0, 50) == 50);
  BOOST_TEST(r.send(1, 30) == 30);
  r.pair[1].handle().shutdown(r.pair[1].fd, SHUT_RD);
  r.end_sending(1);
  BOOST_TEST(r.send(1, 20) == 20);
  BOOST_TEST(r.by_tcp(1) == 20U);
  (void)r.pair[1].handle().poll(POLLIN);  // takes the 50 bytes in
  r.pair[1].handle().close(r.pair[1].fd);
  r.pair[1].stream = nullptr;
  close(r.pair[1].fd);
  r.pair[1].fd = -1;
  BOOST_TEST(r.recv(0, 100) == 30);
  BOOST_TEST(r.recv(0, 100) == 20);
  BOOST_TEST(r.recv(0, 100) == -ECONNRESET);
  BOOST_TEST(r.recv(0, 100) == 0);
}

BOOST_AUTO_TEST_CASE(rule_7_a_half_closed_before_the_lane_stays_closed) {
  Rig r(4096);
  while (r.send(0, 1000) > 0) {  // FIN has to wait behind what the kernel could not deliver
  }
  BOOST_TEST(r.pair[0].handle().shutdown(r.pair[0].fd, SHUT_WR) == 0);
  for (unsigned side : {0U, 1U}) r.pair.attach(side);
  BOOST_TEST(r.recv(1, 5) == 5);  // READY
  BOOST_TEST(r.send(0, 10) == -EPIPE);
  BOOST_TEST((r.stream(0).tx.load() != TxState::lane));
  std::int64_t n = 1;
  while (n > 0) {
    pollfd wait{r.pair[1].fd, POLLIN, 0};
    BOOST_REQUIRE(::poll(&wait, 1, 10'000) == 1);
    n = r.recv(1, 100'000);
  }
  BOOST_TEST(n == 0);
  BOOST_TEST(r.received[1] == r.sent[0]);
}

BOOST_AUTO_TEST_CASE(rule_7_an_end_that_overtakes_the_lane_is_not_the_end) {
  for (const bool closed : {false, true}) {
    Rig r(kLate);
    r.up();
    BOOST_TEST(r.send(0, 100) == 100);
    if (closed)
      r.close_0();
    else
      BOOST_TEST(r.pair[0].handle().shutdown(r.pair[0].fd, SHUT_WR) == 0);
    r.stream(1).anchor_event = true;
    BOOST_TEST(r.recv(1, 1000) == -EAGAIN);
    BOOST_TEST((r.pair[1].handle().poll(POLLIN) & POLLIN) == 0U);
    BOOST_TEST((r.pair[1].handle().kernel_events(POLLIN) & POLLIN) == 0U);
    r.hosts.release(0);
    BOOST_TEST((r.pair[1].handle().poll(POLLIN) & POLLIN) != 0U);
    BOOST_TEST(r.recv(1, 1000) == 100);
    BOOST_TEST(r.recv(1, 1000) == 0);
    BOOST_TEST(r.recv(1, 1000) == 0);
  }
}

BOOST_AUTO_TEST_CASE(rule_7_an_end_that_overtakes_the_switch_is_not_the_end) {
  Rig r(kLate);
  r.switch_under_way();
  r.close_0();
  BOOST_TEST(r.recv(1, 1000) == 20);
  BOOST_TEST(r.recv(1, 1000) == -EAGAIN);
  BOOST_TEST((r.pair[1].handle().kernel_events(POLLIN) & POLLIN) == 0U);
  r.hosts.release(0, 2);  // SWITCH and the message
  BOOST_TEST(r.recv(1, 1000) == 100);
  BOOST_TEST(r.recv(1, 1000) == -EAGAIN);
  r.hosts.release(0);
  BOOST_TEST(r.recv(1, 1000) == 0);
}

BOOST_AUTO_TEST_CASE(rule_7_a_half_closed_before_an_unordered_lane_is_the_end) {
  Rig r(kLate, 4096);
  while (r.send(0, 1000) > 0) {  // FIN has to wait behind what the kernel could not deliver
  }
  BOOST_TEST(r.pair[0].handle().shutdown(r.pair[0].fd, SHUT_WR) == 0);
  for (unsigned side : {0U, 1U}) r.pair.attach(side);
  r.hosts.release_all();
  std::int64_t n = r.recv(1, 5);  // READY
  BOOST_REQUIRE((r.stream(1).rx.load() != RxState::tcp));
  while (n > 0) {
    pollfd wait{r.pair[1].fd, POLLIN, 0};
    BOOST_REQUIRE(::poll(&wait, 1, 10'000) == 1);
    n = r.recv(1, 100'000);
  }
  BOOST_TEST(n == 0);
  BOOST_TEST(r.received[1] == r.sent[0]);
}

// A request, an end, and a long answer. The kernel counts FIN among the bytes received: no foreign reader has taken one.
BOOST_AUTO_TEST_CASE(rule_7_an_end_before_the_lane_leaves_it_to_the_other_half) {
  const auto answer = [](Rig& r) {
    BOOST_TEST(r.send(0, 100) == 100);
    BOOST_TEST(r.pair[0].handle().shutdown(r.pair[0].fd, SHUT_WR) == 0);
    for (unsigned side : {0U, 1U}) r.pair.attach(side);
    r.hosts.release_all();
    for (int i = 0; i < 50; ++i) BOOST_TEST(r.recv(1, 2) == 2);
    BOOST_TEST(r.recv(1, 2) == 0);
    BOOST_TEST(r.recv(0, 100) == -EAGAIN);  // READY
    r.hosts.release_all();
    BOOST_TEST(r.send(1, 500) == 500);
    BOOST_TEST(r.by_tcp(1) == 0U);
    r.hosts.release_all();
    BOOST_TEST(r.recv(0, 1000) == 500);
    r.end_sending(1);
    r.hosts.release_all();
    BOOST_TEST(r.recv(0, 1000) == -EAGAIN);
    BOOST_TEST((r.stream(0).rx.load() == RxState::ended));
    BOOST_TEST((r.stream(1).rx.load() == RxState::ended));
  };
  Rig at_once;
  answer(at_once);
  Rig late(kLate);
  answer(late);
}

BOOST_AUTO_TEST_CASE(rule_7_no_byte_follows_a_shutdown_behind_an_end_under_way) {
  for (const bool kept : {false, true}) {
    Rig r(kLate);
    r.up();
    BOOST_TEST(r.send(0, 100) == 100);
    r.pair[0].handle().take_down(LaneReason::mode);
    if (kept) BOOST_TEST(r.send(0, 50) == 50);
    BOOST_TEST(r.pair[0].handle().shutdown(r.pair[0].fd, SHUT_WR) == 0);
    BOOST_TEST(r.send(0, 1) == -EPIPE);
    r.hosts.release(0);
    BOOST_TEST(r.recv(1, 1000) == 100);
    if (kept) {
      BOOST_TEST(r.recv(1, 1000) == -EAGAIN);
      r.hosts.release(1);
      r.tend(0);
      BOOST_TEST(r.recv(1, 1000) == 50);
    }
    BOOST_TEST(r.recv(1, 1000) == 0);
  }
}

BOOST_AUTO_TEST_CASE(rule_7_what_a_killed_sender_had_under_way_is_missed) {
  for (const bool word_of_it : {false, true}) {  // the CM may say so, or nobody
    Rig r(kLate);
    r.up();
    BOOST_TEST(r.send(0, 100) == 100);
    r.hosts.release(0);
    BOOST_TEST(r.send(0, 50) == 50);
    r.kill_0();
    BOOST_TEST(r.recv(1, 60) == 60);
    if (word_of_it) r.stream(1).peer_gone = true;
    BOOST_TEST(r.recv(1, 1000) == 40);
    if (!word_of_it) {
      BOOST_TEST(r.recv(1, 1000) == -EAGAIN);
      BOOST_TEST(r.stream(1).end_due_ns.load() != 0);
      r.tend(1);
      BOOST_TEST(r.recv(1, 1000) == -EAGAIN);
      r.stream(1).end_due_ns = 1;  // long ago
      r.tend(1);
    }
    BOOST_TEST((r.pair[1].handle().poll(POLLIN) & POLLIN) != 0U);
    BOOST_TEST(r.recv(1, 1000) == -ECONNRESET);
    BOOST_TEST(r.recv(1, 1000) == 0);
  }
}

BOOST_AUTO_TEST_CASE(rule_7_a_switch_lost_with_its_sender_is_missed) {
  Rig r(kLate);
  r.switch_under_way();
  r.kill_0();
  BOOST_TEST(r.recv(1, 5) == 5);
  r.stream(1).peer_gone = true;
  BOOST_TEST(r.recv(1, 1000) == 15);  // what TCP brought
  BOOST_TEST(r.recv(1, 1000) == -ECONNRESET);
  BOOST_TEST(r.recv(1, 1000) == 0);
}

BOOST_AUTO_TEST_CASE(rule_7_a_sender_killed_after_its_end_is_an_end) {
  Rig r(kLate);
  r.up();
  BOOST_TEST(r.send(0, 100) == 100);
  BOOST_TEST(r.pair[0].handle().shutdown(r.pair[0].fd, SHUT_WR) == 0);
  r.hosts.release(0);
  r.kill_0();
  r.stream(1).peer_gone = true;
  BOOST_TEST(r.recv(1, 1000) == 100);
  BOOST_TEST(r.recv(1, 1000) == 0);
}

/// The QP of side 1 goes to error, as it does when the other end of the wire vanishes.
void fail_lane_of_1(Rig& r) {
  rdma::QpAttributes attr;
  attr.state = rdma::QpState::error;
  BOOST_REQUIRE(r.pair[1].lane->qp().modify(attr));
}

BOOST_AUTO_TEST_CASE(rule_7_a_lane_that_fails_is_read_as_far_as_it_came) {
  Rig r(kLate);
  r.up();
  BOOST_TEST(r.send(0, 100) == 100);
  r.hosts.release(0);
  BOOST_TEST(r.recv(1, 60) == 60);
  fail_lane_of_1(r);
  BOOST_TEST(r.recv(1, 1000) == 40);
  BOOST_TEST(r.recv(1, 1000) == -ECONNRESET);
  BOOST_TEST(r.recv(1, 1000) <= 0);
}

BOOST_AUTO_TEST_CASE(rule_7_a_lane_that_fails_after_its_end_was_said_and_seen_is_no_reset) {
  Rig r(kLate);
  r.up();
  BOOST_TEST(r.send(0, 100) == 100);
  for (unsigned side : {1U, 0U}) BOOST_TEST(r.pair[side].handle().shutdown(r.pair[side].fd, SHUT_WR) == 0);
  r.hosts.release_all();
  r.tend(0);
  r.hosts.release(0);  // END_SEEN
  fail_lane_of_1(r);
  BOOST_TEST(r.recv(1, 1000) == 100);
  BOOST_TEST(r.recv(1, 1000) == 0);
}

BOOST_AUTO_TEST_CASE(rule_8_a_take_down_waits_for_nobody_and_loses_nothing) {
  Rig r;
  r.up();
  BOOST_TEST(r.send(0, 1000) == 1000);
  BOOST_TEST(r.send(1, 2000) == 2000);
  BOOST_TEST(r.recv(1, 300) == 300);
  r.pair[1].handle().take_down(LaneReason::mode);  // side 0 does nothing meanwhile
  BOOST_TEST(r.recv(1, 5000) == -EAGAIN);
  BOOST_TEST(r.send(1, 10) == 10);
  BOOST_TEST(r.recv(0, 5000) == 2000);  // END does not cut off what was sent before
  BOOST_TEST(r.recv(0, 5000) == 10);
  BOOST_TEST(r.recv(1, 5000) == 700);  // side 0 saw ABANDON as it entered a call
}

BOOST_AUTO_TEST_CASE(rule_8_both_ends_at_once) {
  Rig r;
  r.up();
  BOOST_TEST(r.send(0, 1000) == 1000);
  BOOST_TEST(r.send(1, 2000) == 2000);
  for (unsigned side : {0U, 1U}) r.pair[side].handle().take_down(LaneReason::mode);
  for (unsigned side : {0U, 1U}) r.serve(side);
  BOOST_TEST(r.send(0, 5) == 5);
  BOOST_TEST(r.recv(1, 5000) == 1000);
  BOOST_TEST(r.recv(1, 5000) == 5);
  BOOST_TEST(r.recv(0, 5000) == 2000);
}

BOOST_AUTO_TEST_CASE(rule_8_a_burst_that_is_half_read) {
  for (const bool by_tcp : {false, true}) {
    Rig r;
    r.up();
    const std::uint64_t messages = r.stream(0).lane->tx_messages();
    for (int i = 0; i < 300; ++i) BOOST_REQUIRE(r.send(0, 100) == 100);
    BOOST_TEST(r.stream(0).lane->tx_messages() - messages < 20U);  // the rest is fetched
    BOOST_TEST(r.pair[1].handle().inq(r.pair[1].fd) == 30'000);    // all of it is there, with nobody's help
    BOOST_TEST(r.recv(1, 100'000, MSG_PEEK) == 30'000);
    BOOST_TEST(r.recv(1, 17'777) == 17'777);
    if (by_tcp) {
      r.pair[1].handle().take_down(LaneReason::mode);
      r.serve(0);
      BOOST_TEST(r.by_tcp(0) == 12'223U);
    }
    BOOST_TEST(r.recv(1, 100'000) == 12'223);
    BOOST_TEST(r.recv(1, 1) == -EAGAIN);
    BOOST_TEST(r.send(0, 100) == 100);
    BOOST_TEST(r.recv(1, 200) == 100);
  }
}

BOOST_AUTO_TEST_CASE(rule_8_the_rest_of_a_burst_outlives_its_writer) {
  Rig r;
  r.up();
  for (int i = 0; i < 300; ++i) BOOST_REQUIRE(r.send(0, 1000) == 1000);  // into the large ring
  BOOST_TEST(r.stream(0).lane->has_large_buffer());
  close(r.pair[0].fd);
  r.pair[0].fd = -1;
  r.stream(1).peer_gone = true;
  r.stream(1).anchor_event = true;
  BOOST_TEST(r.recv(1, 1 << 20) == 300'000);
  BOOST_TEST(r.recv(1, 1) == 0);
}

BOOST_AUTO_TEST_CASE(rule_14_a_buffer_that_is_not_where_it_says_ends_the_lane) {
  Rig r;
  r.up();
  for (int i = 0; i < 20; ++i) BOOST_REQUIRE(r.send(0, 100) == 100);
  const LaneProposal words = r.stream(1).lane->proposal();
  const std::uint64_t nowhere[2] = {64, std::uint64_t{65536} << 32 | 0xABCD};
  const rdma::Sge sge{reinterpret_cast<const std::byte*>(nowhere), sizeof nowhere, {}};
  rdma::SendWr wr;
  wr.opcode = rdma::WrOpcode::rdma_write;
  wr.flags = rdma::kInline;
  wr.sge_count = 1;
  wr.sges = &sge;
  wr.remote_addr = words.address() + offsetof(LaneBlock, cursors);
  wr.rkey = static_cast<rdma::Rkey>(words.words_rkey);
  BOOST_REQUIRE((r.stream(0).lane->qp().post_send(wr) == rdma::Post::ok));
  std::int64_t n = 1;
  while (n > 0) n = r.recv(1, 10'000);  // the messages before it
  BOOST_TEST(n == -EAGAIN);
  r.serve(0);  // what the reader could not find comes by TCP
  while ((n = r.recv(1, 10'000)) > 0) {
  }
  BOOST_TEST(n == -EAGAIN);
  BOOST_TEST(r.received[1] == r.sent[0]);
  BOOST_TEST(r.by_tcp(0) != 0U);
}

BOOST_AUTO_TEST_CASE(rule_8_a_reader_that_leaves_after_the_writer_shut_down) {
  Rig r;
  r.up();
  BOOST_TEST(r.send(0, 1000) == 1000);
  BOOST_TEST(r.pair[0].handle().shutdown(r.pair[0].fd, SHUT_WR) == 0);
  r.pair[1].handle().take_down(LaneReason::mode);
  BOOST_TEST(r.recv(1, 5000) == 1000);
  BOOST_TEST(r.recv(1, 5000) == 0);
}

BOOST_AUTO_TEST_CASE(rule_8_shutdown_follows_what_is_sent_again) {
  Rig r(4096);
  r.leave_with_much_unread();
  BOOST_TEST(r.pair[0].handle().shutdown(r.pair[0].fd, SHUT_WR) == 0);
  BOOST_TEST(r.send(0, 1) == -EPIPE);
  r.read_to_the_end_by_tcp([&] { r.serve(0); });
}

BOOST_AUTO_TEST_CASE(rule_8_the_end_after_close_follows_what_is_sent_again) {
  Rig r(4096);
  r.leave_with_much_unread();
  r.pair[0].handle().close(r.pair[0].fd);
  r.pair[0].stream = nullptr;
  close(r.pair[0].fd);
  r.pair[0].fd = -1;
  r.read_to_the_end_by_tcp([] { engine::flush_lingering(); });
  BOOST_TEST(engine::flush_lingering());
}

BOOST_AUTO_TEST_CASE(rule_8_the_end_after_close_follows_what_waits_for_the_acknowledgement) {
  for (const bool lane_goes : {false, true}) {
    Rig r(kLate);
    r.up();
    BOOST_TEST(r.send(0, 100) == 100);
    r.pair[0].handle().take_down(LaneReason::mode);
    BOOST_TEST(r.send(0, 50) == 50);
    r.close_0();
    BOOST_TEST(!engine::flush_lingering());
    r.hosts.release(0);
    BOOST_TEST(r.recv(1, 1000) == 100);
    BOOST_TEST(r.recv(1, 1000) == -EAGAIN);
    BOOST_TEST(!engine::flush_lingering());
    if (lane_goes)
      engine::release_lingering(r.pair[0].lane);
    else
      r.hosts.release(1);
    BOOST_TEST(engine::flush_lingering());
    BOOST_TEST(r.recv(1, 1000) == 50);
    BOOST_TEST(r.recv(1, 1000) == 0);
  }
}

BOOST_AUTO_TEST_CASE(rule_8_what_cannot_be_read_back_is_read_where_it_lies) {
  for (const unsigned writer : {0U, 1U}) {
    const unsigned reader = 1 - writer;
    Rig r(kLate);
    r.up();
    BOOST_TEST(r.send(writer, 1000) == 1000);
    r.hosts.release(writer);
    BOOST_TEST(r.recv(reader, 300) == 300);
    BOOST_TEST(r.send(writer, 200) == 200);
    r.pair[reader].handle().take_down(LaneReason::mode);
    BOOST_TEST(r.recv(reader, 5000) == -EAGAIN);
    r.hosts.release(reader);
    r.tend(writer);
    BOOST_TEST(r.send(writer, 10) == 10);
    r.hosts.release(writer);
    std::int64_t n = 0;
    while ((n = r.recv(reader, 5000)) > 0) {
    }
    BOOST_TEST(n == -EAGAIN);
    BOOST_TEST(r.received[reader] == 10U + 1200U);
    BOOST_TEST(r.by_tcp(writer) == 0U);
    r.hosts.release(reader);
    r.tend(writer);
    BOOST_TEST(r.recv(reader, 5000) == 10);
    BOOST_TEST(r.by_tcp(writer) == 10U);
  }
}

BOOST_AUTO_TEST_CASE(rule_8_an_unordered_lane_that_was_read_up_ends_with_its_end) {
  Rig r(kLate);
  r.up();
  r.pair[1].handle().take_down(LaneReason::mode);
  r.hosts.release(1);
  r.tend(0);
  BOOST_TEST(r.send(0, 10) == 10);
  BOOST_TEST(r.by_tcp(0) == 0U);
  r.kill_0();  // with END under way
  r.stream(1).peer_gone = true;
  BOOST_TEST(r.recv(1, 5000) == -ECONNRESET);
}

BOOST_AUTO_TEST_CASE(rule_8_sendfile_does_not_overtake_what_is_sent_again) {
  Rig r(4096);
  r.leave_with_much_unread();
  std::vector<std::byte> data(100);
  fill(data.data(), data.size(), 0, r.sent[0]);
  const int file = memfd_create("bytes", MFD_CLOEXEC);
  BOOST_REQUIRE(write(file, data.data(), data.size()) == 100);
  // Room in the socket, and bytes of the lane still to come: the moment to overtake.
  std::int64_t n = -EAGAIN;
  const auto try_it = [&] {
    std::int64_t offset = 0;
    if (n == -EAGAIN) n = r.pair[0].handle().sendfile(r.pair[0].fd, file, &offset, data.size());
    if (n <= 0) return;
    r.sent[0] += static_cast<std::uint64_t>(n);
    n = 0;
    r.pair[0].handle().shutdown(r.pair[0].fd, SHUT_WR);
  };
  r.read_to_the_end_by_tcp(try_it);
  close(file);
}

BOOST_AUTO_TEST_CASE(rule_8_a_writer_that_dies_before_it_has_sent_the_rest_again) {
  Rig r;
  r.up();
  BOOST_TEST(r.send(0, 1000) == 1000);
  r.pair[1].handle().take_down(LaneReason::mode);
  close(r.pair[0].fd);  // kill -9
  r.pair[0].fd = -1;
  r.stream(1).peer_gone = true;
  BOOST_TEST(r.recv(1, 5000) == 1000);
  BOOST_TEST(r.recv(1, 5000) == 0);
}

BOOST_AUTO_TEST_CASE(a_violation_of_the_protocol_loses_nothing) {
  Rig r;
  r.up();
  BOOST_TEST(r.send(0, 1000) == 1000);
  std::byte bad[16] = {std::byte{0x33}};  // no such message
  const rdma::Sge sge{bad, sizeof bad, {}};
  rdma::SendWr wr;
  wr.flags = rdma::kInline;
  wr.sge_count = 1;
  wr.sges = &sge;
  BOOST_REQUIRE((r.pair[0].lane->qp().post_send(wr) == rdma::Post::ok));
  BOOST_TEST(r.recv(1, 400) == 400);
  std::int64_t total = 400;
  for (int i = 0; i < 10 && total < 1000; ++i) {
    const std::int64_t n = r.recv(1, 5000);
    if (n > 0) total += n;
    r.serve(0);
  }
  BOOST_TEST(total == 1000);
  BOOST_TEST((r.stream(1).tx.load() == TxState::ended));
  BOOST_TEST(r.send(0, 10) == 10);
  BOOST_TEST(r.recv(1, 100) == 10);
}

BOOST_AUTO_TEST_CASE(rule_9_the_first_use_by_a_second_process_takes_the_lane_down) {
  Rig r;
  r.up();
  r.stream(0).owner = ~0U;  // as a fork's child sees it
  BOOST_TEST(r.send(0, 10) == 10);
  BOOST_TEST((r.stream(0).tx.load() == TxState::ended));
  BOOST_TEST(r.by_tcp(0) == 10U);
  BOOST_TEST(r.recv(1, 100) == 10);
}

BOOST_AUTO_TEST_CASE(rule_9_a_child_asks_its_parent_to_take_an_unordered_lane_down) {
  for (const bool unread : {false, true}) {
    Rig r(kLate);
    r.up();
    BOOST_TEST(r.send(0, 100) == 100);
    if (unread) BOOST_TEST(r.send(1, 70) == 70);
    const Stream child = engine::inherit(r.pair[0].handle().snapshot());
    std::atomic<bool> over{false};
    std::thread services([&] {  // both sides' service threads, and the wire
      while (!over)
        for (unsigned side : {0U, 1U}) {
          StreamImpl& s = r.stream(side);
          (void)s.lock.lock();
          r.hosts.release(side);
          s.tend();
          s.lock.unlock();
        }
    });
    std::vector<std::byte> data(50);
    fill(data.data(), data.size(), 0, r.sent[0]);
    const std::int64_t n = child.send(r.pair[0].fd, data.data(), data.size(), MSG_NOSIGNAL);
    std::int64_t got = 1;
    if (unread) got = child.recv(r.pair[0].fd, data.data(), data.size(), 0);
    over = true;
    services.join();
    if (unread) {  // 70 bytes lie in the parent
      BOOST_TEST((n == -ECONNRESET || n == -EPIPE));
      BOOST_TEST(got < 0);
      BOOST_TEST(r.recv(1, 1000) == 100);
      BOOST_TEST(r.recv(1, 1000) == -ECONNRESET);
    } else {
      BOOST_TEST(n == 50);
      r.sent[0] += 50;
      BOOST_TEST(r.by_tcp(0) == 50U);
      BOOST_TEST(r.recv(1, 1000) == 100);
      BOOST_TEST(r.recv(1, 1000) == 50);
    }
  }
}

BOOST_AUTO_TEST_CASE(rule_9_a_child_that_ends_leaves_its_own_children_counted) {
  for (const bool child_ends_first : {false, true}) {
    Rig r;
    const StreamImpl& parent = r.stream(0);
    const Stream child = engine::inherit(r.pair[0].handle().snapshot());
    const Stream grandchild = engine::inherit(child.snapshot());
    (child_ends_first ? child : grandchild).leave_heirs();
    BOOST_TEST(parent.heirs == 1U);
    (child_ends_first ? grandchild : child).leave_heirs();
    if (!child_ends_first) BOOST_TEST(parent.heirs == 0U);
  }
}

/// Side 0's descriptor names another connection from here on, behind our back; its far end sees nothing of ours.
void expect_a_stranger_is_left_alone(Rig& r) {
  std::array<int, 2> stranger{};
  connected_pair(stranger);
  const int real = dup(r.pair[0].fd);
  dup2(stranger[0], r.pair[0].fd);
  r.serve(0);
  std::byte x[10];
  BOOST_TEST(::recv(stranger[1], x, sizeof x, 0) == -1);
  BOOST_TEST(errno == EAGAIN);
  close(real);
  for (const int fd : stranger) close(fd);
}

BOOST_AUTO_TEST_CASE(rule_9_a_second_process_reads_on_where_the_switch_was_seen_by_nobody) {
  Rig r;
  for (unsigned side : {0U, 1U}) r.pair.attach(side);
  BOOST_TEST(r.send(0, 100) == 100);
  BOOST_TEST(r.recv(1, 10) == 10);    // READY
  BOOST_TEST(r.send(0, 200) == 200);  // SWITCH
  r.pair[0].handle().take_down(LaneReason::mode);
  BOOST_TEST(r.send(0, 300) == 300);
  r.stream(1).owner = ~0U;
  while (r.received[1] < 600) BOOST_REQUIRE(r.recv(1, 1000) > 0);  // checks the order of the bytes
}

BOOST_AUTO_TEST_CASE(rule_11_another_socket_under_the_number_gets_no_byte_of_ours) {
  Rig r;
  r.up();
  BOOST_TEST(r.send(0, 1000) == 1000);
  r.pair[1].handle().take_down(LaneReason::mode);
  expect_a_stranger_is_left_alone(r);
}

BOOST_AUTO_TEST_CASE(rule_11_another_socket_under_the_number_is_not_shut_down_for_us) {
  Rig r(4096);
  r.leave_with_much_unread();
  BOOST_TEST(r.pair[0].handle().shutdown(r.pair[0].fd, SHUT_WR) == 0);  // FIN is to follow what is sent again
  expect_a_stranger_is_left_alone(r);
}

BOOST_AUTO_TEST_CASE(a_closed_streams_cell_is_not_reused_while_a_thread_is_inside) {
  StreamImpl* const s = engine::new_stream();
  s->kernel_receivers = 1;  // it sits in recv(), which goes on after another thread's close()
  engine::free_stream(s);
  StreamImpl* const other = engine::new_stream();
  BOOST_TEST((other != s));
  s->kernel_receivers = 0;
  engine::free_stream(other);
  BOOST_TEST((engine::new_stream() == s || engine::new_stream() == s));
}

BOOST_AUTO_TEST_CASE(rule_12_the_kernels_entry_keeps_what_the_lane_does_not_carry) {
  Rig r;
  constexpr std::uint32_t kAll = POLLIN | POLLOUT | POLLRDHUP;
  BOOST_TEST(r.pair[0].handle().kernel_events(kAll) == kAll);
  r.up();
  BOOST_TEST(r.pair[0].handle().kernel_events(kAll) == static_cast<std::uint32_t>(POLLRDHUP));
  r.pair[1].handle().take_down(LaneReason::mode);
  (void)r.pair[0].handle().poll(kAll);
  BOOST_TEST((r.pair[0].handle().kernel_events(kAll) & POLLIN) != 0U);
}

BOOST_AUTO_TEST_CASE(rule_12_a_direction_that_waits_for_its_peer_is_not_readable) {
  Rig r;
  for (unsigned side : {0U, 1U}) r.pair.attach(side);
  BOOST_TEST(r.recv(1, 10) == -EAGAIN);  // READY
  BOOST_TEST(r.send(0, 10) == 10);       // SWITCH
  BOOST_TEST(r.send(0, 10) == 10);
  std::byte x[7];
  fill(x, sizeof x, 0, r.sent[0]);
  BOOST_TEST(::send(r.pair[0].fd, x, sizeof x, 0) == 7);  // something lies on the anchor
  r.pair[1].handle().take_down(LaneReason::mode);
  BOOST_TEST(r.recv(1, 100) == -EAGAIN);
  BOOST_TEST((r.pair[1].handle().poll(POLLIN) & POLLIN) == 0U);
  BOOST_TEST((r.pair[1].handle().kernel_events(POLLIN) & POLLIN) == 0U);
  r.serve(0);
  const std::uint32_t by_lane = r.pair[1].handle().poll(POLLIN);
  BOOST_TEST(((by_lane | r.pair[1].handle().kernel_events(POLLIN)) & POLLIN) != 0U);
}

BOOST_AUTO_TEST_CASE(rule_12_no_ready_while_somebody_waits_without_the_bell) {
  Rig r;
  for (unsigned side : {0U, 1U}) r.pair.attach(side);
  r.pair[1].handle().enter_plain_wait();
  BOOST_TEST(r.recv(1, 10) == -EAGAIN);
  BOOST_TEST(r.send(0, 10) == 10);
  BOOST_TEST(r.by_tcp(0) == 10U);
  r.pair[1].handle().leave_plain_wait();
  BOOST_TEST(r.recv(1, 10) == 10);
  BOOST_TEST(r.send(0, 10) == 10);
  BOOST_TEST(r.by_tcp(0) == 10U);
}

}  // namespace
}  // namespace sdp::sim
