// What ends a blocking call: signals, time-outs, cancellation.
#include <fcntl.h>
#include <poll.h>
#include <pthread.h>
#include <signal.h>
#include <sys/epoll.h>
#include <sys/select.h>
#include <sys/socket.h>
#include <sys/time.h>
#include <unistd.h>

#include <cerrno>

#include "blocking.hpp"
#include "trace.hpp"

using namespace differential;

// FC-07: a signal ends a blocking call, or does not, as its handler was installed.
CASE(signal_interrupts_recv) {
  Peer peer;
  Conn c = connection(peer);
  on_signal(SIGALRM, 0);
  for (int i = 0; i < 3; ++i) {
    const Stopwatch watch;
    const Alarm alarm(100);
    told("recv", c.recv(10));
    say("in time: %d", watch.waited(80));
  }
  say("signals: %d", signals >= 3);
}
CASE(signal_restarts_recv) {
  Peer peer;
  Conn c = connection(peer);
  on_signal(SIGALRM, SA_RESTART);
  const Stopwatch watch;
  const Alarm alarm(50);
  peer.later(200, Do::send, 0, 10);
  told("recv", c.recv(10));
  say("peer sent %ld, not before: %d, signals %d", peer.answer().result, watch.waited(180), signals > 0);
}
CASE(signal_interrupts_send) {
  Peer peer;
  Conn c = connection(peer);
  fill_up(c);
  on_signal(SIGALRM, 0);
  const Stopwatch watch;
  {
    const Alarm alarm(100);
    told("send", c.send(1000));
    say("in time: %d, signals %d", watch.waited(80), signals > 0);
  }
  {
    const Alarm alarm(100);
    const ssize_t n = c.send(16 << 20);  // some of it goes, or nothing: the buffers may have had room left
    say("large send ended: %d", n > 0 || (n < 0 && errno == EINTR));
  }
  const auto sent = static_cast<long>(c.tx - c.rx);
  say("all of it arrived: %d", peer.call(Do::recv, 0, sent) == sent);
}
CASE(signal_restarts_send) {
  Peer peer;
  Conn c = connection(peer);
  const std::uint64_t filled = fill_up(c);
  on_signal(SIGALRM, SA_RESTART);
  const Alarm alarm(50);
  peer.later(200, Do::recv, 0, static_cast<long>(filled));
  told("send", c.send(1000));
  say("drained: %d", peer.answer().result == static_cast<long>(filled));
  told("peer recv", peer.call(Do::recv, 0, 1000));
}
// A signal ends the call also if it comes while our side looks for bytes, before it sleeps. The timer may win against the call; not
// often.
namespace {

constexpr int kTries = 60;

/// Calls that did not end at the first signal since they began, or not by EINTR.
template <class Call>
void say_missed(const char* name, Peer& peer, Conn& c, Call call) {
  int missed = 0, others = 0;
  for (int i = 0; i < kTries; ++i) {
    for (int k = 0; k < 10; ++k) {  // a thread goes on looking as long as it often finds something
      peer.later(0, Do::echo, 0, 1);
      c.send(1);
      c.recv(1);
      peer.answer();
    }
    signals = 0;
    const itimerval soon{.it_interval = {0, 30'000}, .it_value = {0, 10 + i % 40}}, never{};
    setitimer(ITIMER_REAL, &soon, nullptr);
    const long r = call();
    setitimer(ITIMER_REAL, &never, nullptr);
    others += !(r == -1 && errno == EINTR);
    missed += signals > 1;
  }
  say("%s: not by EINTR %d, half of them by a later signal: %d", name, others, missed >= kTries / 2);
}

}  // namespace

CASE(signal_ends_a_look) {
  Peer peer;
  Conn c = connection(peer);
  on_signal(SIGALRM, 0);
  pollfd two[] = {{c.fd, POLLIN, 0}, {peer.control(), POLLIN, 0}};
  say_missed("recv", peer, c, [&] { return c.recv(1); });
  on_signal(SIGALRM, SA_RESTART);  // which is nothing to a wait for events
  say_missed("poll", peer, c, [&] { return long{poll(two, 1, -1)}; });
  say_missed("poll of two", peer, c, [&] { return long{poll(two, 2, -1)}; });
  say_missed("select", peer, c, [&] {
    fd_set set;
    FD_ZERO(&set);
    FD_SET(c.fd, &set);
    return long{select(c.fd + 1, &set, nullptr, nullptr, nullptr)};
  });
  const int ep = epoll_create1(0);
  epoll_event event{.events = EPOLLIN, .data = {}};
  epoll_ctl(ep, EPOLL_CTL_ADD, c.fd, &event);
  say_missed("epoll_wait", peer, c, [&] { return long{epoll_wait(ep, &event, 1, -1)}; });
}
CASE(recv_timeout) {
  Peer peer;
  Conn c = connection(peer);
  timeout(c.fd, SO_RCVTIMEO, 150);
  Stopwatch watch;
  told("recv", c.recv(10));
  say("in time: %d", watch.waited(140));
  peer.call(Do::send, 0, 4);
  Stopwatch again;
  told("recv waitall", c.recv(10, MSG_WAITALL));
  say("in time: %d", again.waited(140));
  on_signal(SIGALRM, SA_RESTART);
  timeout(c.fd, SO_RCVTIMEO, 9000);
  {
    const Alarm alarm(30);
    told("recv with a signal", c.recv(10));
  }
  timeout(c.fd, SO_RCVTIMEO, 0);
  peer.later(100, Do::send, 0, 5);
  told("recv", c.recv(10));
  told("peer", peer.answer().result);
}
CASE(send_timeout) {
  Peer peer;
  Conn c = connection(peer);
  timeout(c.fd, SO_SNDTIMEO, 150);
  fill_up(c);
  Stopwatch watch;
  told("send", c.send(1000));
  say("in time: %d", watch.waited(140));
  peer.call(Do::recv, 0, static_cast<long>(c.tx - c.rx));
  told("send", c.send(1000));
}
CASE(timeouts_set_before_and_read_back) {
  Peer peer;
  Conn c = cold(peer);
  timeout(c.fd, SO_RCVTIMEO, 120);
  warm(peer, c);
  Stopwatch watch;
  told("recv", c.recv(1));
  say("in time: %d", watch.waited(110));
  timeval tv{};
  socklen_t len = sizeof tv;
  told("getsockopt", getsockopt(c.fd, SOL_SOCKET, SO_RCVTIMEO, &tv, &len));
  say("%ld s %ld us", static_cast<long>(tv.tv_sec), static_cast<long>(tv.tv_usec));
  const timeval bad{0, 2'000'000};
  told("bad timeval", setsockopt(c.fd, SOL_SOCKET, SO_RCVTIMEO, &bad, sizeof bad));
  told("short timeval", setsockopt(c.fd, SOL_SOCKET, SO_RCVTIMEO, &bad, 4));
  told("recv", c.recv(1));
}

namespace {
void* cancelled_in(void* arg) {
  Conn& c = *static_cast<Conn*>(arg);
  char byte;
  (void)!recv(c.fd, &byte, 1, 0);
  return nullptr;
}
void* polling(void* arg) {
  pollfd p{static_cast<Conn*>(arg)->fd, POLLIN, 0};
  (void)!poll(&p, 1, -1);
  return nullptr;
}
void* sending(void* arg) {
  char byte = 0;
  for (;;) (void)!send(static_cast<Conn*>(arg)->fd, &byte, 1, 0);
  return nullptr;
}
/// 1: it was cancelled; 0: it ended otherwise; -1: it goes on.
int cancel(void* (*body)(void*), Conn& c) {
  pthread_t thread;
  pthread_create(&thread, nullptr, body, &c);
  settle(50);
  pthread_cancel(thread);
  timespec until{};
  clock_gettime(CLOCK_REALTIME, &until);
  until.tv_sec += 2;
  void* result = nullptr;
  if (pthread_timedjoin_np(thread, &result, &until) != 0) return -1;
  return result == PTHREAD_CANCELED;
}
}  // namespace

// FC-69
CASE(any_cancel_on_tcp) {
  // No lane here: the first bytes have not been sent.
  Peer peer;
  Conn c = cold(peer);
  told("recv", cancel(cancelled_in, c));
  told("poll", cancel(polling, c));
  warm(peer, c);
  told("usable", c.send(10));
  told("peer", peer.call(Do::recv, 0, 10));
}
CASE(cancel_recv) {
  Peer peer;
  Conn c = connection(peer);
  told("recv", cancel(cancelled_in, c));
  peer.call(Do::send, 0, 10);
  told("usable", c.recv(10));
}
CASE(cancel_poll) {
  Peer peer;
  Conn c = connection(peer);
  told("poll", cancel(polling, c));
  peer.call(Do::send, 0, 10);
  told("usable", c.recv(10));
}
CASE(cancel_send) {
  Peer peer;
  Conn c = connection(peer);
  fill_up(c);
  told("send", cancel(sending, c));
  peer.call(Do::send, 0, 10);
  told("usable", c.recv(10));
}
