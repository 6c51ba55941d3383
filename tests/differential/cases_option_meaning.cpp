// What socket options mean: each set before there is a connection (on the socket that connects, or on the listener) and on a lane.
#include <time.h>  // errqueue.h needs it
//
#include <limits.h>
#include <linux/errqueue.h>
#include <linux/filter.h>
#include <linux/net_tstamp.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <poll.h>
#include <sys/epoll.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/time.h>
#include <unistd.h>

#include <cerrno>
#include <cstring>
#include <vector>

#include "blocking.hpp"
#include "trace.hpp"

using namespace differential;

namespace {

int set_int(int fd, int level, int name, int value) { return setsockopt(fd, level, name, &value, sizeof value); }
void show_int(const char* what, int fd, int level, int name) {
  int value = -1;
  socklen_t len = sizeof value;
  told(what, getsockopt(fd, level, name, &value, &len));
  say("  %d", value);
}
void polled(const char* what, int fd, int timeout_ms = 0, short wanted = POLLIN | POLLPRI | POLLRDHUP) {
  pollfd p{fd, wanted, 0};
  told(what, poll(&p, 1, timeout_ms));
  say("  %s", events(static_cast<unsigned short>(p.revents)).c_str());
}
void waited(const char* what, int fd, std::uint32_t wanted = EPOLLIN | EPOLLRDHUP) {
  const int set = epoll_create1(EPOLL_CLOEXEC);
  epoll_event event{wanted, {}};
  epoll_ctl(set, EPOLL_CTL_ADD, fd, &event);
  event.events = 0;
  told(what, epoll_wait(set, &event, 1, 0));
  say("  %s", events(event.events).c_str());
  close(set);
}

/// The next in the queue of errors.
sock_extended_err noted(Conn& c) {
  alignas(cmsghdr) char control[512];
  msghdr msg{};
  msg.msg_control = control;
  msg.msg_controllen = sizeof control;
  sock_extended_err error{};
  if (recvmsg(c.fd, &msg, MSG_ERRQUEUE) == 0 && CMSG_FIRSTHDR(&msg) != nullptr)
    std::memcpy(&error, CMSG_DATA(CMSG_FIRSTHDR(&msg)), sizeof error);
  return error;
}

/// To and fro, long enough for a lane to come up where it may.
void exchange(Peer& peer, Conn& c, long bytes = 1) {
  for (int i = 0; i < 10; ++i) {
    peer.later(0, Do::echo, c.slot, bytes);
    if (c.send_all(static_cast<std::size_t>(bytes)) != static_cast<std::size_t>(bytes) ||
        c.recv_all(static_cast<std::size_t>(bytes)) != static_cast<std::size_t>(bytes) || peer.answer().result != bytes)
      fail("an exchange");
    settle(1);
  }
}
void goes_on(Peer& peer, Conn& c, long bytes = 100'000) {
  peer.later(0, Do::recv, c.slot, bytes);
  told("sent on", static_cast<long>(c.send_all(static_cast<std::size_t>(bytes))));
  told("peer", peer.answer().result);
  peer.later(0, Do::send, c.slot, bytes);
  told("received on", static_cast<long>(c.recv_all(static_cast<std::size_t>(bytes))));
  told("peer", peer.answer().result);
}

void show_control(msghdr& msg) {
  for (cmsghdr* each = CMSG_FIRSTHDR(&msg); each != nullptr; each = CMSG_NXTHDR(&msg, each)) {
    say("  level %d type %d, %zu bytes", each->cmsg_level, each->cmsg_type, each->cmsg_len - CMSG_LEN(0));
    if (each->cmsg_level == IPPROTO_TCP && each->cmsg_type == TCP_CM_INQ) {
      int left = -1;
      std::memcpy(&left, CMSG_DATA(each), sizeof left);
      say("    %d left", left);
    }
    if ((each->cmsg_level == SOL_IP && each->cmsg_type == IP_RECVERR) ||
        (each->cmsg_level == SOL_IPV6 && each->cmsg_type == IPV6_RECVERR)) {
      sock_extended_err error{};
      std::memcpy(&error, CMSG_DATA(each), sizeof error);
      say("    error %u origin %u type %u code %u info %u data %u", error.ee_errno, error.ee_origin, error.ee_type, error.ee_code,
          error.ee_info, error.ee_data);
    }
  }
}
/// recvmsg() with room for control messages, of bytes of the stream if `flags` do not say otherwise.
ssize_t received(const char* what, Conn& c, std::size_t bytes, int flags = 0, std::size_t control_room = 512) {
  std::vector<std::byte> data(bytes + 1);
  alignas(cmsghdr) char control[512];
  iovec iov{data.data(), bytes};
  msghdr msg{};
  msg.msg_iov = &iov;
  msg.msg_iovlen = 1;
  msg.msg_control = control;
  msg.msg_controllen = control_room;
  const ssize_t n = told(what, recvmsg(c.fd, &msg, flags));
  if (n < 0) return n;
  say("  flags %#x, control of %zu bytes", static_cast<unsigned>(msg.msg_flags), msg.msg_controllen);
  show_control(msg);
  if ((flags & (MSG_ERRQUEUE | MSG_OOB)) != 0) return n;
  if (!matches(data.data(), static_cast<std::size_t>(n), c.rx)) say("  wrong bytes");
  if ((flags & MSG_PEEK) == 0) c.rx += static_cast<std::uint64_t>(n);
  return n;
}

/// `body` on a connection that had the option from the first, and on one that gets it on its lane.
void early_and_late(Prepare set, void (*body)(Peer&, Conn&), long exchanged = 1) {
  Peer peer;
  Conn early = cold(peer, 0, set);
  exchange(peer, early, exchanged);
  say("set early");
  body(peer, early);
  Conn late = connection(peer, 1);
  say("set late");
  set(late.fd);
  body(peer, late);
}

}  // namespace

CASE(option_rcvlowat) {
  early_and_late([](int fd) { told("set", set_int(fd, SOL_SOCKET, SO_RCVLOWAT, 10)); },
                 [](Peer& peer, Conn& c) {
                   peer.call(Do::send, c.slot, 5);
                   polled("too few", c.fd, 15);
                   waited("too few", c.fd);
                   told("recv at once", c.recv(3, MSG_DONTWAIT));
                   peer.later(20, Do::send, c.slot, 12);
                   told("recv", c.recv(100));
                   peer.answer();
                   peer.later(10, Do::send, c.slot, 6);
                   peer.later(20, Do::send, c.slot, 6);
                   polled("sleeps", c.fd, 3000);
                   peer.answer();
                   peer.answer();
                   told("recv", c.recv(100));
                   peer.call(Do::send, c.slot, 5);
                   told("set to 1", set_int(c.fd, SOL_SOCKET, SO_RCVLOWAT, 1));
                   polled("enough", c.fd, 1000);
                   told("recv", c.recv(100));
                 },
                 10);
}
CASE(option_rcvlowat_negative) {
  Peer peer;
  Conn c = connection(peer);
  told("set", set_int(c.fd, SOL_SOCKET, SO_RCVLOWAT, -1));
  show_int("get", c.fd, SOL_SOCKET, SO_RCVLOWAT);
  peer.call(Do::send, 0, 5);
  settle(12);
  polled("too few", c.fd, 30);
  told("set to 0", set_int(c.fd, SOL_SOCKET, SO_RCVLOWAT, 0));
  polled("enough", c.fd, 1000);
  told("recv", c.recv(100));
}
CASE(option_oobinline) {
  early_and_late([](int fd) { told("set", set_int(fd, SOL_SOCKET, SO_OOBINLINE, 1)); },
                 [](Peer& peer, Conn& c) {
                   peer.call(Do::send, c.slot, 10);
                   settle(12);
                   told("peer oob", peer.call(Do::oob, c.slot));
                   settle(12);
                   polled("urgent", c.fd, 1000);
                   told("recv before the mark", c.recv(100));
                   polled("at the mark", c.fd);
                   char byte = 0;
                   told("recv oob", recv(c.fd, &byte, 1, MSG_OOB));
                   told("recv", recv(c.fd, &byte, 1, 0));
                   say("right byte: %d", byte == static_cast<char>(pattern(c.rx)));
                   polled("behind it", c.fd);
                   told("set to 0", set_int(c.fd, SOL_SOCKET, SO_OOBINLINE, 0));
                   told("peer sends", peer.call(Do::send, c.slot, 10));
                   told("recv", c.recv(100));
                 });
}
CASE(option_timestamps) {
  static int name = 0;
  // Of the six options one of each kind and of each numbering; socket_modes.cpp knows them all.
  for (const int each : {SO_TIMESTAMP, 64 /* SO_TIMESTAMPNS_NEW */, SO_TIMESTAMPING}) {
    name = each;
    early_and_late(
        [](int fd) {
          const int value = name == SO_TIMESTAMPING ? SOF_TIMESTAMPING_RX_SOFTWARE | SOF_TIMESTAMPING_SOFTWARE : 1;
          told("set", set_int(fd, SOL_SOCKET, name, value));
        },
        [](Peer& peer, Conn& c) {
          exchange(peer, c);  // set late: what was on the lane has no time
          peer.call(Do::send, c.slot, 10);
          settle(12);
          received("recvmsg", c, 4);
          received("recvmsg", c, 100);
          peer.call(Do::send, c.slot, 10);
          settle(12);
          received("peek", c, 100, MSG_PEEK);
          received("small control", c, 100, 0, sizeof(cmsghdr) + 4);
        });
  }
}
CASE(option_timestamps_sent) {
  early_and_late(
      [](int fd) {
        told("set", set_int(fd, SOL_SOCKET, SO_TIMESTAMPING,
                            SOF_TIMESTAMPING_TX_SOFTWARE | SOF_TIMESTAMPING_TX_ACK | SOF_TIMESTAMPING_SOFTWARE |
                                SOF_TIMESTAMPING_OPT_TSONLY));
      },
      [](Peer& peer, Conn& c) {
        settle(12);
        Conn none;  // of the exchange before
        none.fd = c.fd;
        alignas(cmsghdr) char control[512];
        msghdr msg{};
        msg.msg_control = control;
        for (msg.msg_controllen = sizeof control; recvmsg(c.fd, &msg, MSG_ERRQUEUE) >= 0;) msg.msg_controllen = sizeof control;
        told("send", c.send(10));
        told("peer", peer.call(Do::recv, c.slot, 10));
        for (const char* of : {"of the send", "of the acknowledgement"}) {  // which may be a delayed one
          polled("an error", c.fd, 3000);
          received(of, c, 100, MSG_ERRQUEUE);
        }
        received("nothing left", c, 100, MSG_ERRQUEUE);
        polled("no error", c.fd);
      });
}
CASE(option_zerocopy) {
  early_and_late([](int fd) { told("set", set_int(fd, SOL_SOCKET, SO_ZEROCOPY, 1)); },
                 [](Peer& peer, Conn& c) {
                   for (const std::size_t bytes : {10, 20'000}) {
                     told("send", c.send(bytes, MSG_ZEROCOPY));
                     told("peer", peer.call(Do::recv, c.slot, static_cast<long>(bytes)));
                   }
                   // One note for both or one for each, as they are acknowledged.
                   for (std::uint32_t next = 0; next < 2;) {
                     pollfd p{c.fd, 0, 0};
                     if (poll(&p, 1, 3000) != 1) return say("no note of %u", next);
                     const sock_extended_err note = noted(c);
                     if (note.ee_origin != SO_EE_ORIGIN_ZEROCOPY || note.ee_info != next) return say("a wrong note");
                     if (p.revents != POLLERR || note.ee_code != SO_EE_CODE_ZEROCOPY_COPIED) say("told otherwise");
                     next = note.ee_data + 1;
                   }
                   received("nothing left", c, 100, MSG_ERRQUEUE);
                   polled("no note", c.fd);
                   goes_on(peer, c);
                 });
}
// Without the option the flag means nothing.
CASE(flag_zerocopy_alone) {
  Peer peer;
  Conn c = connection(peer);
  told("send", c.send(20'000, MSG_ZEROCOPY));
  told("peer", peer.call(Do::recv, 0, 20'000));
  received("no note", c, 100, MSG_ERRQUEUE);
  told("nor by recv", c.recv(10, MSG_ERRQUEUE));
  goes_on(peer, c);
}
CASE(option_inq) {
  early_and_late([](int fd) { told("set", set_int(fd, IPPROTO_TCP, TCP_INQ, 1)); },
                 [](Peer& peer, Conn& c) {
                   show_int("get", c.fd, IPPROTO_TCP, TCP_INQ);
                   exchange(peer, c);
                   peer.call(Do::send, c.slot, 100);
                   settle(12);
                   received("recvmsg", c, 30);
                   received("recvmsg", c, 70);
                   peer.call(Do::send, c.slot, 10);
                   told("peer shuts down", peer.call(Do::shutdown, c.slot, SHUT_WR));
                   settle(12);
                   received("recvmsg", c, 10);
                   received("the end", c, 10);
                 });
}
CASE(option_peek_off) {
  early_and_late([](int fd) { told("set", set_int(fd, SOL_SOCKET, SO_PEEK_OFF, 0)); },
                 [](Peer& peer, Conn& c) {
                   exchange(peer, c);
                   peer.call(Do::send, c.slot, 30);
                   settle(12);
                   std::uint64_t at = c.rx;
                   std::byte bytes[30];
                   for (int i = 0; i < 2; ++i) {
                     const ssize_t n = told("peek", recv(c.fd, bytes, 10, MSG_PEEK));
                     say("  right bytes: %d", matches(bytes, 10, at));
                     at += static_cast<std::uint64_t>(n > 0 ? n : 0);
                   }
                   show_int("offset", c.fd, SOL_SOCKET, SO_PEEK_OFF);
                   told("recv", c.recv(5));
                   show_int("offset", c.fd, SOL_SOCKET, SO_PEEK_OFF);
                   told("set to -1", set_int(c.fd, SOL_SOCKET, SO_PEEK_OFF, -1));
                   told("peek", c.recv(30, MSG_PEEK));
                   told("recv", c.recv(30));
                 });
}
CASE(option_filter) {
  Peer peer;
  Conn c = connection(peer);
  sock_filter all[] = {BPF_STMT(BPF_RET | BPF_K, 0xffffffff)}, none[] = {BPF_STMT(BPF_RET | BPF_K, 0)};
  const sock_fprog pass{1, all}, drop{1, none};
  told("pass all", setsockopt(c.fd, SOL_SOCKET, SO_ATTACH_FILTER, &pass, sizeof pass));
  exchange(peer, c);
  told("drop all", setsockopt(c.fd, SOL_SOCKET, SO_ATTACH_FILTER, &drop, sizeof drop));
  peer.later(0, Do::send, 0, 10);
  polled("nothing comes", c.fd, 30);
  told("detach", set_int(c.fd, SOL_SOCKET, SO_DETACH_FILTER, 0));
  polled("it is sent again", c.fd, 5000);
  peer.answer();
  told("recv", c.recv(100));
  goes_on(peer, c);
}
CASE(option_filter_early) {
  Peer peer;
  Conn with_filter = cold(peer, 0, [](int fd) {
    sock_filter all[] = {BPF_STMT(BPF_RET | BPF_K, 0xffffffff)};
    const sock_fprog pass{1, all};
    told("pass all", setsockopt(fd, SOL_SOCKET, SO_ATTACH_FILTER, &pass, sizeof pass));
  });
  exchange(peer, with_filter);
  const std::uint64_t before = kernel_bytes(with_filter.fd);
  exchange(peer, with_filter);
  say("packets pass it: %d", kernel_bytes(with_filter.fd) != before);
  connection(peer, 1);
}
CASE(option_repair) {
  Peer peer;
  Conn c = connection(peer);
  told("on", set_int(c.fd, IPPROTO_TCP, TCP_REPAIR, 1));
  told("queue", set_int(c.fd, IPPROTO_TCP, TCP_REPAIR_QUEUE, 1));
  int sequence = 0;
  socklen_t len = sizeof sequence;
  told("sequence", getsockopt(c.fd, IPPROTO_TCP, TCP_QUEUE_SEQ, &sequence, &len));
  told("off", set_int(c.fd, IPPROTO_TCP, TCP_REPAIR, 0));
  goes_on(peer, c);
}
CASE(option_ulp) {
  Peer peer;
  Conn c = connection(peer);
  told("set", setsockopt(c.fd, IPPROTO_TCP, TCP_ULP, "tls", 3));
  char name[16]{};
  socklen_t len = sizeof name;
  told("get", getsockopt(c.fd, IPPROTO_TCP, TCP_ULP, name, &len));
  say("  %u: %s", len, name);
  goes_on(peer, c);
}
CASE(option_zerocopy_receive) {
  Peer peer;
  Conn c = connection(peer);
  peer.call(Do::send, 0, 500);
  struct {  // of the kernel's tcp_zerocopy_receive
    std::uint64_t address;
    std::uint32_t length, recv_skip_hint, inq;
    std::int32_t err;
    std::uint64_t copybuf_address;
    std::int32_t copybuf_len;
    std::uint32_t flags;
  } asked;
  std::byte bytes[4096];
  std::int32_t got = 0;
  const Stopwatch watch;
  while (got < 500 && watch.ms() < 3000) {
    pollfd p{c.fd, POLLIN, 0};
    if (poll(&p, 1, 100) != 1) continue;
    asked = {};
    asked.copybuf_address = reinterpret_cast<std::uintptr_t>(bytes + got);
    asked.copybuf_len = static_cast<std::int32_t>(sizeof bytes) - got;
    socklen_t len = sizeof asked;
    if (getsockopt(c.fd, IPPROTO_TCP, 35 /* TCP_ZEROCOPY_RECEIVE */, &asked, &len) != 0) fail("zero-copy receive");
    got += asked.copybuf_len;
  }
  say("got %d, right: %d", got, matches(bytes, static_cast<std::size_t>(got), c.rx));
  c.rx += static_cast<std::uint64_t>(got);
  goes_on(peer, c);
}

namespace {
void timed_recv(Conn& c, int least_ms) {
  const Stopwatch watch;
  told("recv", c.recv(10));
  say("  in time: %d", watch.waited(least_ms));
}
constexpr int kRcvTimeoNew = 66, kSndTimeoNew = 67;
}  // namespace

CASE(option_timeouts) {
  early_and_late([](int fd) { timeout(fd, SO_RCVTIMEO, 40); }, [](Peer&, Conn& c) { timed_recv(c, 30); });
}
CASE(option_timeouts_new) {
  static_assert(sizeof(timeval) == 16);
  early_and_late([](int fd) { timeout(fd, kRcvTimeoNew, 40); },
                 [](Peer& peer, Conn& c) {
                   timed_recv(c, 30);
                   timeout(c.fd, kRcvTimeoNew, 0);
                   peer.later(60, Do::send, c.slot, 5);
                   told("recv", c.recv(10));
                   peer.answer();
                   timeout(c.fd, kSndTimeoNew, 40);
                   fill_up(c);
                   const Stopwatch watch;
                   told("send", c.send(1000));
                   say("  in time: %d", watch.waited(30));
                 });
}
CASE(option_timeouts_odd) {
  Peer peer;
  Conn c = connection(peer);
  for (const int name : {SO_RCVTIMEO, kRcvTimeoNew})
    for (const timeval& tv : {timeval{-1, 0}, timeval{-1, 999'999}, timeval{0, 1'000'000}, timeval{0, -1}, timeval{LONG_MAX, 0},
                              timeval{LONG_MAX / 1000, 999'999}, timeval{20'000'000'000, 0}}) {
      told("set", setsockopt(c.fd, SOL_SOCKET, name, &tv, sizeof tv));
      peer.later(10, Do::send, 0, 5);
      told("recv", c.recv(10));
      peer.answer();
      told("recv at once", c.recv(10, MSG_DONTWAIT));
      timeval back{};
      socklen_t len = sizeof back;
      told("get", getsockopt(c.fd, SOL_SOCKET, name, &back, &len));
      say("  %u: %ld s %ld us", len, static_cast<long>(back.tv_sec), static_cast<long>(back.tv_usec));
    }
}
CASE(option_buffers_shrink) {
  Peer peer;
  Conn c = connection(peer);
  told("peer sends", peer.call(Do::send, 0, 50'000));
  for (const int name : {SO_RCVBUF, SO_SNDBUF}) {
    told("set", set_int(c.fd, SOL_SOCKET, name, 1));
    show_int("get", c.fd, SOL_SOCKET, name);
    told("peer's", peer.call(Do::option, 0, SOL_SOCKET, name, 1));
  }
  told("recv", static_cast<long>(c.recv_all(50'000)));
  goes_on(peer, c, 30'000);
}
CASE(option_nagle) {
  Peer peer;
  Conn c = connection(peer);
  for (const int on : {0, 1}) {
    told("set", set_int(c.fd, IPPROTO_TCP, TCP_NODELAY, on));
    show_int("get", c.fd, IPPROTO_TCP, TCP_NODELAY);
    for (int i = 0; i < 3; ++i) told("send", c.send(10));
    told("peer", peer.call(Do::recv, 0, 30));
  }
  told("cork", set_int(c.fd, IPPROTO_TCP, TCP_CORK, 1));
  for (int i = 0; i < 3; ++i) told("send", c.send(10));
  polled("writable", c.fd, 0, POLLOUT);
  told("shutdown", shutdown(c.fd, SHUT_WR));
  told("peer drains", peer.call(Do::drain));
}
CASE(option_user_timeout) {
  Peer peer;
  Conn c = connection(peer);
  told("set", set_int(c.fd, IPPROTO_TCP, TCP_USER_TIMEOUT, 100));
  show_int("get", c.fd, IPPROTO_TCP, TCP_USER_TIMEOUT);
  // A peer that reads nothing for that long: README, Limits.
  goes_on(peer, c);
  settle(110);
  goes_on(peer, c);
}
CASE(option_addrform) {
  Peer peer;
  Conn c = connection(peer);
  told("set", set_int(c.fd, IPPROTO_IPV6, IPV6_ADDRFORM, AF_INET));
  show_int("domain", c.fd, SOL_SOCKET, SO_DOMAIN);
  goes_on(peer, c);
}
CASE(option_linger_kept) {
  // The kernel takes no more than a little, so that what the lane leaves behind is still here when the program looks.
  Peer peer;
  Conn c = cold(peer);
  set_int(c.fd, SOL_SOCKET, SO_SNDBUF, 1);
  peer.call(Do::option, 0, SOL_SOCKET, SO_RCVBUF, 1);
  warm(peer, c);
  const auto filled = static_cast<long>(fill_up(c));
  told("peer's", peer.call(Do::option, 0, SOL_SOCKET, SO_RCVLOWAT, 2));
  settle(12);
  pollfd p{c.fd, POLLOUT, 0};
  poll(&p, 1, 0);  // now it goes back to TCP
  const auto show = [&] {
    linger got{-1, -1};
    socklen_t len = sizeof got;
    told("get", getsockopt(c.fd, SOL_SOCKET, SO_LINGER, &got, &len));
    say("  %u: %d %d", len, got.l_onoff, got.l_linger);
  };
  show();
  const linger mine{1, 7};
  told("short", setsockopt(c.fd, SOL_SOCKET, SO_LINGER, &mine, 4));
  show();
  told("set", setsockopt(c.fd, SOL_SOCKET, SO_LINGER, &mine, sizeof mine));
  show();
  say("all came: %d", peer.call(Do::recv, 0, filled) == filled);
  show();
  goes_on(peer, c, 1000);
  show();
}
CASE(message_flags) {
  Peer peer;
  Conn c = connection(peer);
  peer.call(Do::send, 0, 10);
  received("close on exec", c, 5, MSG_CMSG_CLOEXEC);
  received("truncated", c, 5, 0);
  told("peer oob", peer.call(Do::oob));
  settle(12);
  received("urgent", c, 1, MSG_OOB);
  told("peer sends", peer.call(Do::send, 0, 10));
  received("behind it", c, 10, MSG_CMSG_CLOEXEC);
}
