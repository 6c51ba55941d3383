// How connections end: half-closes, resets, deaths, linger.
#include <fcntl.h>
#include <poll.h>
#include <signal.h>
#include <sys/ioctl.h>
#include <sys/socket.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cerrno>
#include <cstdlib>
#include <thread>

#include "blocking.hpp"
#include "trace.hpp"

using namespace differential;

CASE(sigpipe) {
  Peer peer;
  Conn c = connection(peer);
  on_signal(SIGPIPE, 0);
  told("shutdown", shutdown(c.fd, SHUT_WR));
  told("send", c.send(1));
  say("signals %d", signals.load());
  told("send nosignal", c.send(1, MSG_NOSIGNAL));
  say("signals %d", signals.load());
  const char byte = 0;
  told("write", write(c.fd, &byte, 1));
  say("signals %d", signals.load());
  told("peer drains", peer.call(Do::drain));
  told("peer sends", peer.call(Do::send, 0, 10));
  told("recv", c.recv(100));
}
CASE(sigpipe_after_peer_closed) {
  Peer peer;
  Conn c = connection(peer);
  on_signal(SIGPIPE, 0);
  peer.call(Do::close);
  settle();
  told("recv", c.recv(1));
  told("first send", c.send(10));
  settle();
  told("second send", c.send(10));
  say("signals %d", signals.load());
  told("third send", c.send(10, MSG_NOSIGNAL));
  told("recv", c.recv(1));
  say("signals %d", signals.load());
}
CASE(peer_closes_with_unread) {
  Peer peer;
  Conn c = connection(peer);
  told("send", c.send(1000));
  told("peer sends", peer.call(Do::send, 0, 500));
  peer.call(Do::close);
  settle();
  told("recv", c.recv(2000));
  told("recv", c.recv(2000));
  told("recv", c.recv(2000));
  told("send", c.send(1, MSG_NOSIGNAL));
}
CASE(peer_resets) {
  Peer peer;
  Conn c = connection(peer);
  peer.call(Do::reset);
  settle();
  told("recv", c.recv(2000));
  told("recv", c.recv(2000));
  told("send", c.send(1, MSG_NOSIGNAL));
  int error = -1;
  socklen_t len = sizeof error;
  told("SO_ERROR", getsockopt(c.fd, SOL_SOCKET, SO_ERROR, &error, &len));
  say("error %s", error_name(error).c_str());
}
CASE(peer_resets_so_error) {
  Peer peer;
  Conn c = connection(peer);
  peer.call(Do::reset);
  settle();
  for (int i = 0; i < 2; ++i) {
    int error = -1;
    socklen_t len = sizeof error;
    told("SO_ERROR", getsockopt(c.fd, SOL_SOCKET, SO_ERROR, &error, &len));
    say("error %s", error_name(error).c_str());
  }
  told("recv", c.recv(1));
}
CASE(reset_wakes_recv) {
  Peer peer;
  Conn c = connection(peer);
  peer.later(100, Do::reset);
  told("recv", c.recv(10));
  told("recv", c.recv(10));
  peer.answer();
}
CASE(close_wakes_recv) {
  Peer peer;
  Conn c = connection(peer);
  peer.later(100, Do::close);
  told("recv", c.recv(10));
  told("recv", c.recv(10));
  peer.answer();
}
CASE(peer_dies) {
  Peer peer;
  Conn c = connection(peer);
  told("peer sends", peer.call(Do::send, 0, 3000));
  kill(peer.pid(), SIGKILL);
  settle(50);
  told("recv", static_cast<long>(c.recv_all(3000)));
  told("recv", c.recv(1));
  told("send", c.send(1, MSG_NOSIGNAL));
  settle();
  told("send", c.send(1, MSG_NOSIGNAL));
  exit(0);  // there is no peer to end
}

// FC-53
CASE(half_close_large) {
  Peer peer;
  Conn c = connection(peer);
  constexpr long kBytes = 8 << 20;
  peer.later(0, Do::drain);
  told("sent", static_cast<long>(c.send_all(kBytes)));
  told("shutdown", shutdown(c.fd, SHUT_WR));
  told("peer drained", peer.answer().result);
  peer.later(0, Do::send, 0, kBytes);
  told("received", static_cast<long>(c.recv_all(kBytes)));
  told("peer sent", peer.answer().result);
  told("peer shutdown", peer.call(Do::shutdown, 0, SHUT_WR));
  told("recv", c.recv(1));
  told("send", c.send(1, MSG_NOSIGNAL));
  told("shutdown again", shutdown(c.fd, SHUT_WR));
  told("shutdown both", shutdown(c.fd, SHUT_RDWR));
}
CASE(shutdown_kinds) {
  Peer peer;
  Conn c = connection(peer);
  told("peer sends", peer.call(Do::send, 0, 10));
  told("SHUT_RD", shutdown(c.fd, SHUT_RD));
  told("recv", c.recv(100));
  told("recv", c.recv(100));
  told("peer sends more", peer.call(Do::send, 0, 10));
  told("recv", c.recv(100));
  told("recv", c.recv(100));
  told("bad how", shutdown(c.fd, 7));
  told("send", c.send(10));
  told("peer recv", peer.call(Do::recv, 0, 10));
  told("SHUT_RDWR", shutdown(c.fd, SHUT_RDWR));
  told("recv", c.recv(100));
  told("send", c.send(10, MSG_NOSIGNAL));
}
CASE(any_shutdown_unconnected) {
  const int fd = socket(AF_INET, SOCK_STREAM, 0);
  told("shutdown", shutdown(fd, SHUT_RDWR));
  char byte = 0;
  told("recv", recv(fd, &byte, 1, 0));
  told("send", send(fd, &byte, 1, MSG_NOSIGNAL));
}
CASE(shutdown_wakes_own_recv) {
  Peer peer;
  Conn c = connection(peer);
  std::thread other([&] {
    settle(100);
    shutdown(c.fd, SHUT_RDWR);
  });
  const Stopwatch watch;
  told("recv", c.recv(10));
  say("in time: %d", watch.waited(80));
  other.join();
  told("recv", c.recv(10));
}
CASE(shutdown_rd_wakes_own_recv) {
  Peer peer;
  Conn c = connection(peer);
  std::thread other([&] {
    settle(100);
    shutdown(c.fd, SHUT_RD);
  });
  told("recv", c.recv(10));
  other.join();
  told("send", c.send(10));
  told("peer", peer.call(Do::recv, 0, 10));
}
// Behind SHUT_RDWR the first byte that comes resets the connection; what had come before is still read.
namespace {
void show_reset(Peer& peer, Conn& c) {
  pollfd p{c.fd, POLLIN | POLLOUT | POLLRDHUP, 0};
  told("poll", poll(&p, 1, 0));
  say("  %s", events(static_cast<unsigned short>(p.revents)).c_str());
  say("peer polls in %s", events(static_cast<std::uint32_t>(peer.call(Do::poll_in, 0, 0))).c_str());
  say("peer polls out %s", events(static_cast<std::uint32_t>(peer.call(Do::poll_out, 0, 0))).c_str());
  told("peer sends", peer.call(Do::push, 0, 5));
  told("peer recv", peer.call(Do::drain));
  for (int i = 0; i < 4; ++i) told("recv", c.recv(60));
  told("send", c.send(5, MSG_NOSIGNAL));
  told("shutdown", shutdown(c.fd, SHUT_RDWR));
  told("close", close(c.fd));
}
/// The peer is full, and waits in a call that may begin before or after we have shut the socket. TCP does not send to a full
/// window: it resets when we read.
void shut_both_when_full(Do waits, long argument, long limit) {
  for (const int delay : {100, 0}) {
    Peer peer;
    Conn c = connection(peer);
    told("send", c.send(7));
    told("peer fills", peer.call(Do::fill) > 0);
    peer.later(delay == 0 ? 100 : 0, waits, 0, argument);
    settle(delay);
    told("shutdown", shutdown(c.fd, SHUT_RDWR));
    settle(300);
    const Stopwatch watch;
    ssize_t n = 0;
    while (n >= 0 && watch.ms() < 5000)
      if (n = c.recv(65536, MSG_DONTWAIT); n == 0) settle(1);
    told("recv", n);
    told("recv", c.recv(1));
    told("ended", peer.answer().result < limit);
    told("peer sends", peer.call(Do::push, 0, 5));
    told("peer recv", peer.call(Do::drain));
    say("peer polls out %s", events(static_cast<std::uint32_t>(peer.call(Do::poll_out, 0, 0))).c_str());
  }
}
}  // namespace

CASE(shut_both_and_peer_sends) {
  for (const int unread : {0, 100})
    for (const bool at_once : {true, false}) {
      Peer peer;
      Conn c = connection(peer);
      told("send", c.send(7));
      if (unread != 0) told("peer sends", peer.call(Do::send, 0, unread));
      if (!at_once) told("shutdown", shutdown(c.fd, SHUT_RD));
      told("shutdown", shutdown(c.fd, at_once ? SHUT_RDWR : SHUT_WR));
      settle();
      told("peer sends", peer.call(Do::push, 0, 5));
      settle();
      show_reset(peer, c);
    }
}
CASE(shut_both_and_peer_sends_at_once) {
  Peer peer;
  Conn c = connection(peer);
  told("shutdown", shutdown(c.fd, SHUT_RDWR));
  told("peer sends", peer.call(Do::push, 0, 5));
  told("recv", c.recv(60));
  told("recv", c.recv(60));
  told("peer sends", peer.call(Do::push, 0, 5));
}
CASE(shut_both_and_error) {
  Peer peer;
  Conn c = connection(peer);
  told("shutdown", shutdown(c.fd, SHUT_RDWR));
  told("peer sends", peer.call(Do::push, 0, 5));
  settle();
  int error = -1;
  socklen_t len = sizeof error;
  told("SO_ERROR", getsockopt(c.fd, SOL_SOCKET, SO_ERROR, &error, &len));
  say("error %s", error_name(error).c_str());
  told("recv", c.recv(60));
}
CASE(shut_both_and_peer_waits_to_send) { shut_both_when_full(Do::push, 64 << 20, 64 << 20); }
CASE(shut_both_and_peer_polls) { shut_both_when_full(Do::poll_out, 10'000, 1L << 62); }
CASE(shut_both_and_close_with_unread) {
  Peer peer;
  Conn c = connection(peer);
  told("send", c.send(7));
  told("peer sends", peer.call(Do::send, 0, 100));
  told("shutdown", shutdown(c.fd, SHUT_RDWR));
  settle(300);
  int queued = 0;
  told("FIONREAD", ioctl(c.fd, FIONREAD, &queued));
  say("  %d", queued);
  told("recv", c.recv(60, MSG_PEEK));
  told("recv", c.recv(60));
  told("close", close(c.fd));
  settle();
  told("peer recv", peer.call(Do::drain));
  told("peer sends", peer.call(Do::push, 0, 5));
}
CASE(shut_both_and_peer_ends) {
  for (const int unread : {0, 100}) {
    Peer peer;
    Conn c = connection(peer);
    told("shutdown", shutdown(c.fd, SHUT_RDWR));
    settle(300);
    told("peer recv", peer.call(Do::drain));
    if (unread != 0) told("peer sends", peer.call(Do::send, 0, unread));
    told("peer closes", peer.call(Do::close));
    settle();
    told("recv", c.recv(60));
    told("recv", c.recv(60));
    told("send", c.send(5, MSG_NOSIGNAL));
  }
}
// Before the first message that goes by a lane.
CASE(any_shut_before_the_lane) {
  for (const int how : {SHUT_RD, SHUT_RDWR}) {
    Peer peer;
    Conn c = cold(peer);
    told("shutdown", shutdown(c.fd, how));
    std::size_t received = 0;
    long sent = 0;
    for (int i = 0; i < 30; ++i) {
      const long n = peer.call(Do::push, 0, 100);
      sent += n > 0 ? n : 0;
      settle(5);
      const ssize_t got = c.recv(1000, MSG_DONTWAIT);
      received += got > 0 ? static_cast<std::size_t>(got) : 0;
      if (how == SHUT_RD && (c.send(1) != 1 || peer.call(Do::recv, 0, 1) != 1)) fail("send");
    }
    say("sent %ld, received %zu", sent, received);
  }
}
CASE(shut_for_reading_and_peer_waits_to_send) {
  Peer peer;
  Conn c = connection(peer);
  told("shutdown", shutdown(c.fd, SHUT_RD));
  constexpr long kBytes = 5 << 20;
  peer.later(0, Do::push, 0, kBytes);
  settle(300);
  const Stopwatch watch;
  long received = 0;
  while (received < kBytes && watch.ms() < 20'000) {
    const ssize_t n = c.recv(1 << 20);  // 0, when there is nothing
    if (n < 0) fail("recv");
    if (n == 0) settle(1);
    received += n;
  }
  told("recv", received);
  told("peer sends", peer.answer().result);
  told("recv", c.recv(2000));
}
CASE(shutdown_while_sending) {
  Peer peer;
  Conn c = connection(peer);
  fill_up(c);
  signal(SIGPIPE, SIG_IGN);
  std::thread other([&] {
    settle(100);
    shutdown(c.fd, SHUT_WR);
  });
  told("send", c.send(1000));
  other.join();
  told("peer drains all", peer.call(Do::drain) == static_cast<long>(c.tx - c.rx));
}

CASE(linger) {
  Peer peer;
  Conn c = connection(peer);
  const struct linger on { 1, 60 };
  told("setsockopt", setsockopt(c.fd, SOL_SOCKET, SO_LINGER, &on, sizeof on));
  told("send", c.send(1000));
  const Stopwatch watch;
  told("close", close(c.fd));
  say("at once: %d", watch.waited(0));
  told("peer drains", peer.call(Do::drain));
}
CASE(linger_zero_resets) {
  Peer peer;
  Conn c = connection(peer);
  const struct linger now { 1, 0 };
  told("setsockopt", setsockopt(c.fd, SOL_SOCKET, SO_LINGER, &now, sizeof now));
  told("close", close(c.fd));
  told("peer drains", peer.call(Do::drain));
}
CASE(close_with_unread) {
  Peer peer;
  Conn c = connection(peer);
  peer.call(Do::send, 0, 100);
  told("recv", c.recv(10));
  told("send", c.send(20));
  told("close", close(c.fd));
  settle();
  told("peer recv", peer.call(Do::recv, 0, 20));
  told("peer drains", peer.call(Do::drain));
}
CASE(send_then_close) {
  Peer peer;
  Conn c = connection(peer);
  told("send", static_cast<long>(c.send_all(100'000)));
  told("close", close(c.fd));
  told("peer drains", peer.call(Do::drain));
}
CASE(send_then_exit) {
  const pid_t child = fork();
  if (child == 0) {
    Peer peer;
    Conn c = connection(peer);
    peer.later(100, Do::drain);
    told("send", static_cast<long>(c.send_all(100'000)));
    shutdown(c.fd, SHUT_WR);
    told("peer drained", peer.answer().result);
    exit(0);
  }
  settle(0);
  int status = 0;
  while (waitpid(child, &status, 0) < 0 && errno == EINTR) {
  }
  say("status %#x", static_cast<unsigned>(status));
}
