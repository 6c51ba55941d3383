// What poll, select and epoll say of a connection in each state: how it begins, stalls, half-closes and ends. One table; a case for
// each part of it.
#include <arpa/inet.h>
#include <fcntl.h>
#include <netinet/in.h>
#include <poll.h>
#include <signal.h>
#include <sys/epoll.h>
#include <sys/select.h>
#include <sys/socket.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstdlib>
#include <cstring>
#include <iterator>
#include <string>

#include "blocking.hpp"
#include "trace.hpp"

using namespace differential;

namespace {

constexpr std::uint32_t kEverything =
    EPOLLIN | EPOLLPRI | EPOLLOUT | EPOLLRDHUP | EPOLLRDNORM | EPOLLRDBAND | EPOLLWRNORM | EPOLLWRBAND;
constexpr std::uint32_t kMasks[] = {kEverything, EPOLLIN, EPOLLOUT, EPOLLPRI, EPOLLIN | EPOLLOUT | EPOLLRDHUP, EPOLLRDHUP, 0};

std::string polled(int fd, std::uint32_t mask) {
  pollfd p{fd, static_cast<short>(mask), 0};
  const int n = poll(&p, 1, 0);
  if ((p.revents != 0) != (n == 1)) say("poll says %d", n);
  return events(static_cast<unsigned short>(p.revents));
}
std::string selected(int fd, const char* which) {
  fd_set in, out, except;
  for (fd_set* set : {&in, &out, &except}) {
    FD_ZERO(set);
    FD_SET(fd, set);
  }
  const auto wanted = [&](char set) { return std::strchr(which, set) != nullptr; };
  timeval none{};
  const int n = select(fd + 1, wanted('r') ? &in : nullptr, wanted('w') ? &out : nullptr, wanted('x') ? &except : nullptr, &none);
  std::string text = std::to_string(n);
  if (wanted('r') && FD_ISSET(fd, &in)) text += 'r';
  if (wanted('w') && FD_ISSET(fd, &out)) text += 'w';
  if (wanted('x') && FD_ISSET(fd, &except)) text += 'x';
  return text;
}
std::uint32_t waited(int set) {
  epoll_event event{};
  const int n = epoll_wait(set, &event, 1, 0);
  if (n < 0) fail("epoll_wait");
  return n == 1 ? event.events : 0;
}

/// While a lane carries both directions its edges are TCP's. Where one ends, edges may be more than TCP's (README, Limits): but
/// what is so now has been told.
enum class Edges : std::uint8_t { exact, told };

/// Sets that have the connection in them from the beginning to the end.
class Sets {
 public:
  explicit Sets(int fd, Edges edges = Edges::told) : edges_(edges) {
    for (std::size_t i = 0; i < std::size(kMasks); ++i)
      for (const bool edge : {false, true}) {
        int& set = edge ? edge_[i] : level_[i];
        set = epoll_create1(EPOLL_CLOEXEC);
        epoll_event event{kMasks[i] | (edge ? std::uint32_t{EPOLLET} : 0), {}};
        if (epoll_ctl(set, EPOLL_CTL_ADD, fd, &event) != 0) fail("epoll_ctl");
      }
  }
  ~Sets() {
    for (std::size_t i = 0; i < std::size(kMasks); ++i) {
      close(level_[i]);
      close(edge_[i]);
    }
  }
  Sets(const Sets&) = delete;
  Sets& operator=(const Sets&) = delete;

  void show(const char* when, int fd) {
    say("%s", when);
    for (std::size_t i = 0; i < std::size(kMasks); ++i) {
      const std::uint32_t level = waited(level_[i]), again = waited(level_[i]), edge = waited(edge_[i]), more = waited(edge_[i]);
      std::string text = polled(fd, kMasks[i]) + ", epoll " + events(level);
      if (level != again) text += " then " + events(again);
      told_[i] |= edge | more;
      if (edges_ == Edges::exact) {
        text += ", edge " + events(edge);
        if (more != 0) text += " then " + events(more);
      } else if ((level & ~told_[i]) != 0) {
        text += ", no edge for " + events(level & ~told_[i]);
      }
      say("  %-50s poll %s", events(kMasks[i]).c_str(), text.c_str());
    }
    std::string text;
    for (const char* which : {"rwx", "r", "w", "x"}) text += ' ' + selected(fd, which);
    say("  select:%s", text.c_str());
  }

 private:
  Edges edges_;
  std::uint32_t told_[std::size(kMasks)]{};
  int level_[std::size(kMasks)], edge_[std::size(kMasks)];
};

int so_error(int fd) {
  int error = -1;
  socklen_t len = sizeof error;
  getsockopt(fd, SOL_SOCKET, SO_ERROR, &error, &len);
  return error;
}

/// A connection, on its lane where it has one, that goes from state to state.
struct Walk {
  Peer peer;
  Conn c = connection(peer);
  Sets sets;

  explicit Walk(Edges edges = Edges::told) : sets(c.fd, edges) { show("idle"); }
  void show(const char* when) {
    settle(12);
    sets.show(when, c.fd);
  }
  void peer_sends(long bytes) { peer.call(Do::send, 0, bytes); }
  void peer_shuts(int how) { peer.call(Do::shutdown, 0, how); }
  void recv(std::size_t bytes) { told("recv", c.recv(bytes, MSG_DONTWAIT)); }
  void send() { told("send", c.send(10, MSG_DONTWAIT | MSG_NOSIGNAL)); }
  void shut(int how) { told("shutdown", shutdown(c.fd, how)); }
  void error() { say("SO_ERROR %s", error_name(so_error(c.fd)).c_str()); }
};

}  // namespace

CASE(revents_bytes) {
  Walk w(Edges::exact);
  w.peer_sends(10);
  w.show("bytes");
  w.peer_sends(10);
  w.show("more bytes");
  w.recv(15);
  w.show("the rest");
  w.recv(100);
  w.show("none");
  w.peer_sends(10);
  w.recv(10);
  w.show("come and taken");
  w.send();
  w.peer.call(Do::recv, 0, 10);
  w.show("sent and taken");
}
CASE(revents_full) {
  Walk w(Edges::exact);
  fill_up(w.c);
  w.show("full");
  w.peer_sends(10);
  w.show("full, with bytes");
  const auto filled = static_cast<long>(w.c.tx - w.c.rx);
  w.peer.call(Do::recv, 0, filled);
  w.show("taken");
  w.recv(100);
  w.show("nothing in it");
}
CASE(revents_full_and_shut) {
  Walk w;
  fill_up(w.c);
  w.shut(SHUT_WR);
  w.show("full and shut");
  w.peer.call(Do::drain);
  w.show("taken to its end");
}
CASE(revents_urgent) {
  Walk w;
  w.peer_sends(10);
  w.peer.call(Do::oob);
  w.show("urgent behind bytes");
  w.recv(100);
  w.show("at the mark");
  char byte = 0;
  told("recv oob", recv(w.c.fd, &byte, 1, MSG_OOB));
  w.show("read out of band");
  w.peer_sends(10);
  w.show("bytes behind it");
  w.recv(100);
  w.show("all read");
}
CASE(revents_peer_half_closes) {
  Walk w;
  w.peer_sends(10);
  w.peer_shuts(SHUT_WR);
  w.show("bytes and the end");
  w.recv(100);
  w.show("the end");
  w.recv(100);
  w.show("the end, read");
  w.send();
  w.peer.call(Do::recv, 0, 10);
  w.show("sent after it");
  w.shut(SHUT_WR);
  w.show("both halves closed");
  w.recv(1);
  w.send();
  w.error();
}
CASE(revents_we_half_close) {
  Walk w;
  w.send();
  w.shut(SHUT_WR);
  w.show("half closed");
  w.send();
  w.peer.call(Do::drain);
  w.show("the peer knows");
  w.peer_sends(10);
  w.show("bytes after it");
  w.peer_shuts(SHUT_WR);
  w.show("bytes and the end");
  w.recv(100);
  w.show("the end");
}
CASE(revents_shut_for_reading) {
  Walk w;
  w.peer_sends(10);
  w.shut(SHUT_RD);
  w.show("shut, with bytes");
  w.recv(100);
  w.show("shut");
  w.recv(100);
  w.peer_sends(10);
  w.show("bytes all the same");
  w.recv(100);
  w.send();
  w.peer.call(Do::recv, 0, 10);
  w.shut(SHUT_WR);
  w.show("shut for both");
}
CASE(revents_shut_for_both) {
  Walk w;
  w.shut(SHUT_RDWR);
  w.show("shut");
  w.recv(1);
  w.send();
  w.peer.call(Do::close);
  w.show("and closed by the peer");
  w.error();
}
CASE(revents_peer_closes) {
  Walk w;
  w.peer_sends(10);
  w.peer.call(Do::close);
  w.show("closed, with bytes");
  w.recv(100);
  w.show("closed");
  w.send();
  w.show("the kernel answers RST");
  w.send();
  w.show("EPIPE");
  w.error();
  w.show("asked");
  w.recv(1);
}
CASE(revents_peer_resets) {
  Walk w;
  w.peer.call(Do::reset);
  w.show("reset");
  w.error();
  w.show("SO_ERROR read");
  w.recv(1);
  w.show("the end read");
}
CASE(revents_peer_resets_recv) {
  Walk w;
  w.peer.call(Do::reset);
  w.show("reset");
  w.recv(1);
  w.show("the error read");
  w.error();
  w.recv(1);
  w.send();
  w.show("EPIPE");
}
CASE(revents_peer_resets_send) {
  Walk w;
  w.peer.call(Do::reset);
  w.show("reset");
  w.send();
  w.show("the error told by send");
  w.error();
  w.send();
  w.recv(1);
}
CASE(revents_peer_resets_behind_bytes) {
  Walk w;
  w.peer_sends(10);
  w.peer.call(Do::reset);
  w.show("bytes and a reset");
  w.error();
  w.show("SO_ERROR read");
  w.recv(100);
  w.show("bytes read");
  w.recv(1);
}
CASE(revents_peer_resets_when_full) {
  Walk w;
  fill_up(w.c);
  w.show("full");
  w.peer.call(Do::reset);
  w.show("reset");
  w.error();
  w.send();
}
CASE(revents_peer_is_killed) {
  Walk w;
  w.peer_sends(10);
  kill(w.peer.pid(), SIGKILL);
  w.show("dead, with bytes");
  w.recv(100);
  w.show("dead");
  w.recv(100);
  w.send();
  w.show("sent to the dead");
  w.error();
  std::exit(0);  // there is no peer to end
}
// An exception is urgent data and nothing else: no end, hang-up or error wakes who waits for that alone.
namespace {
void wait_for_exceptions(int fd, int other) {
  fd_set in, except;
  FD_ZERO(&in);
  FD_ZERO(&except);
  FD_SET(fd, &except);
  if (other >= 0) FD_SET(other, &in);
  timeval limit{0, 60'000};
  const Stopwatch watch;
  told("select", select(std::max(fd, other) + 1, &in, nullptr, &except, &limit));
  say("  exception %d, other %d, in time %d", FD_ISSET(fd, &except), other >= 0 && FD_ISSET(other, &in),
      other >= 0 || watch.waited(60));
}
}  // namespace

CASE(select_exceptions_alone) {
  int ends[2];
  if (pipe(ends) != 0 || write(ends[1], "x", 1) != 1) fail("pipe");
  Walk w;
  wait_for_exceptions(w.c.fd, -1);
  w.peer_shuts(SHUT_WR);
  settle();
  wait_for_exceptions(w.c.fd, -1);
  w.shut(SHUT_WR);
  w.peer.call(Do::drain);
  settle();
  wait_for_exceptions(w.c.fd, -1);
  wait_for_exceptions(w.c.fd, ends[0]);
}
CASE(select_exceptions_of_a_reset) {
  Walk w;
  w.peer_sends(10);  // the lane stays while they are there
  w.peer.call(Do::reset);
  settle();
  wait_for_exceptions(w.c.fd, -1);
  w.recv(100);
  wait_for_exceptions(w.c.fd, -1);
}
CASE(select_exceptions_when_shut) {
  Walk w;
  w.shut(SHUT_RDWR);
  wait_for_exceptions(w.c.fd, -1);
  w.peer.later(20, Do::close);
  wait_for_exceptions(w.c.fd, -1);
  w.peer.answer();
}
CASE(select_exceptions_of_urgent_data) {
  Walk w;
  w.peer.later(20, Do::oob);
  fd_set except;
  FD_ZERO(&except);
  FD_SET(w.c.fd, &except);
  timeval limit{10, 0};
  told("select", select(w.c.fd + 1, nullptr, nullptr, &except, &limit));
  w.peer.answer();
}

// What the peer sees of our end.
CASE(revents_we_end) {
  const linger now{1, 0};
  for (const bool hard : {false, true})
    for (const bool bytes : {false, true}) {
      Peer peer;
      Conn c = connection(peer);
      if (bytes) told("send", c.send(10));
      if (hard) told("linger", setsockopt(c.fd, SOL_SOCKET, SO_LINGER, &now, sizeof now));
      told("close", close(c.fd));
      settle();
      say("%s, %s: %s", hard ? "reset" : "closed", bytes ? "with bytes" : "without",
          events(static_cast<std::uint32_t>(peer.call(Do::poll_in, 0, 100))).c_str());
      told("peer drains", peer.call(Do::drain));
    }
}

// --- before there is a connection

namespace {
int started(const sockaddr_in& to) {
  const int fd = socket(AF_INET, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0);
  told("connect", connect(fd, reinterpret_cast<const sockaddr*>(&to), sizeof to));
  return fd;
}
}  // namespace

CASE(any_revents_unconnected) {
  const int fresh = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
  Sets sets(fresh, Edges::exact);
  sets.show("fresh", fresh);
  int port = 0;
  const int listening = listener(&port);
  Sets of_listener(listening, Edges::exact);
  of_listener.show("listening", listening);
  close(socket_to(port));
  settle();
  of_listener.show("one to accept", listening);
  told("accept", accept(listening, nullptr, nullptr) >= 0);
  of_listener.show("accepted", listening);
}
CASE(any_revents_refused) {
  const int nobody = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
  sockaddr_in to{};
  to.sin_family = AF_INET;
  to.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
  socklen_t len = sizeof to;
  if (bind(nobody, reinterpret_cast<sockaddr*>(&to), len) != 0 || getsockname(nobody, reinterpret_cast<sockaddr*>(&to), &len) != 0)
    fail("bind");
  const int fd = started(to);
  Sets sets(fd, Edges::exact);
  settle();
  sets.show("refused", fd);
  say("SO_ERROR %s", error_name(so_error(fd)).c_str());
  sets.show("asked", fd);
  char byte = 0;
  told("recv", recv(fd, &byte, 1, 0));
  told("send", send(fd, &byte, 1, MSG_NOSIGNAL));
  sets.show("told", fd);
}
CASE(any_revents_connecting) {
  // A queue for one that has two: the next one's SYN is dropped.
  const int full = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
  sockaddr_in to{};
  to.sin_family = AF_INET;
  to.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
  socklen_t len = sizeof to;
  if (bind(full, reinterpret_cast<sockaddr*>(&to), len) != 0 || listen(full, 0) != 0 ||
      getsockname(full, reinterpret_cast<sockaddr*>(&to), &len) != 0)
    fail("listen");
  const int first = started(to);
  settle();
  const int fd = started(to);
  Sets sets(fd, Edges::exact);
  sets.show("connecting", fd);
  say("SO_ERROR %s", error_name(so_error(fd)).c_str());
  char byte = 0;
  told("recv", recv(fd, &byte, 1, 0));
  told("send", send(fd, &byte, 1, MSG_NOSIGNAL));
  close(first);
}
