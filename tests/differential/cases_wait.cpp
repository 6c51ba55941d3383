// Waiting: poll, select and epoll in all their manners, over one connection and several, alone and nested.
#include <fcntl.h>
#include <netinet/in.h>
#include <poll.h>
#include <signal.h>
#include <sys/epoll.h>
#include <sys/select.h>
#include <sys/socket.h>
#include <sys/wait.h>
#include <unistd.h>

#include <atomic>
#include <cerrno>
#include <csignal>
#include <thread>
#include <vector>

#include "blocking.hpp"
#include "trace.hpp"

using namespace differential;

namespace {

int polled(const char* what, int fd, short wanted, int timeout_ms) {
  pollfd p{fd, wanted, 0};
  told(what, poll(&p, 1, timeout_ms));
  say("  %s", events(static_cast<unsigned short>(p.revents)).c_str());
  return p.revents;
}
void add(int epfd, int fd, std::uint32_t wanted, std::uint64_t data) {
  epoll_event event{wanted, {.u64 = data}};
  told("epoll_ctl add", epoll_ctl(epfd, EPOLL_CTL_ADD, fd, &event));
}
void modify(int epfd, int fd, std::uint32_t wanted, std::uint64_t data) {
  epoll_event event{wanted, {.u64 = data}};
  told("epoll_ctl mod", epoll_ctl(epfd, EPOLL_CTL_MOD, fd, &event));
}
int waited(const char* what, int epfd, int timeout_ms, int max = 8) {
  std::vector<epoll_event> got(static_cast<std::size_t>(max));
  const int n = epoll_wait(epfd, got.data(), max, timeout_ms);
  told(what, n);
  for (int i = 0; i < n; ++i)
    say("  %llu: %s", static_cast<unsigned long long>(got[static_cast<std::size_t>(i)].data.u64),
        events(got[static_cast<std::size_t>(i)].events).c_str());
  return n;
}
void ignore_signal(int) {}

}  // namespace

CASE(poll_ready_and_not) {
  Peer peer;
  Conn c = connection(peer);
  polled("nothing to read", c.fd, POLLIN, 0);
  polled("room to write", c.fd, POLLIN | POLLOUT, 0);
  peer.call(Do::send, 0, 10);
  polled("something to read", c.fd, POLLIN | POLLRDNORM | POLLPRI | POLLRDHUP, 1000);
  told("recv", c.recv(4));
  polled("the rest", c.fd, POLLIN, 0);
  told("recv", c.recv(100));
  polled("nothing left", c.fd, POLLIN, 0);
}
CASE(poll_sleeps_until_it_comes) {
  Peer peer;
  Conn c = connection(peer);
  for (const int delay : {1, 60, 200}) {
    const Stopwatch watch;
    peer.later(delay, Do::send, 0, 3);
    polled("poll", c.fd, POLLIN, 3000);
    say("in time: %d", watch.waited(delay - 1));
    told("peer", peer.answer().result);
    told("recv", c.recv(10));
  }
  const Stopwatch watch;
  polled("in vain", c.fd, POLLIN, 120);
  say("in time: %d", watch.waited(115));
}
CASE(poll_writable_again) {
  Peer peer;
  Conn c = connection(peer);
  fill_up(c);
  polled("full", c.fd, POLLOUT, 0);
  const auto filled = static_cast<long>(c.tx - c.rx);
  peer.later(100, Do::recv, 0, filled);
  polled("drained", c.fd, POLLOUT, 3000);
  say("all arrived: %d", peer.answer().result == filled);
  told("send", c.send(10, MSG_DONTWAIT));
}
CASE(poll_sees_the_end) {
  Peer peer;
  Conn c = connection(peer);
  peer.call(Do::send, 0, 10);
  told("peer shuts down", peer.call(Do::shutdown, 0, SHUT_WR));
  settle();
  polled("bytes and end", c.fd, POLLIN | POLLRDHUP, 1000);
  told("recv", c.recv(100));
  polled("end", c.fd, POLLIN | POLLRDHUP | POLLOUT, 1000);
  told("recv", c.recv(100));
  told("send", c.send(10));
  told("peer", peer.call(Do::recv, 0, 10));
  told("peer closes", peer.call(Do::close));
  settle();
  polled("closed", c.fd, POLLIN | POLLRDHUP, 1000);
}
CASE(poll_wakes_for_the_end) {
  Peer peer;
  Conn c = connection(peer);
  peer.later(100, Do::close, 0);
  polled("poll", c.fd, POLLIN | POLLRDHUP, 3000);
  peer.answer();
  told("recv", c.recv(10));
}
// A wait for one connection alone; everything that can end it comes while it sleeps.
CASE(poll_alone) {
  Peer peer;
  Conn c = connection(peer);
  struct sigaction action {};
  action.sa_handler = ignore_signal;
  action.sa_flags = SA_RESTART;
  sigaction(SIGALRM, &action, nullptr);
  for (const int limit : {-1, 5000}) {
    const itimerval soon{.it_interval = {1, 0}, .it_value = {0, 80'000}}, never{};
    setitimer(ITIMER_REAL, &soon, nullptr);
    polled("a signal", c.fd, POLLIN, limit);
    setitimer(ITIMER_REAL, &never, nullptr);
    peer.later(80, Do::send, 0, 5);
    polled("bytes", c.fd, POLLIN, limit);
    peer.answer();
    told("recv", c.recv(10));
  }
  const Stopwatch watch;
  polled("nothing", c.fd, POLLIN | POLLPRI | POLLRDHUP, 200);
  say("waited: %d", watch.waited(200));
  {
    std::thread reader([&] {
      settle(80);
      peer.call(Do::send, 0, 5);
    });
    polled("and another thread that sends a little later", c.fd, POLLIN, 3000);
    reader.join();
    told("recv", c.recv(10));
  }
  peer.later(80, Do::shutdown, 0, SHUT_WR);
  polled("half an end", c.fd, POLLIN | POLLRDHUP, -1);
  peer.answer();
  told("recv", c.recv(10));
  Conn other = connection(peer, 1);
  peer.later(80, Do::reset, 1);
  polled("reset", other.fd, POLLIN, -1);
  peer.answer();
  told("recv", other.recv(10));
  Conn third = connection(peer, 2);
  peer.later(80, Do::oob, 2);
  polled("urgent", third.fd, POLLIN | POLLPRI, 3000);
  peer.answer();
  told("recv", third.recv(10, MSG_DONTWAIT));
}
CASE(poll_many) {
  Peer peer;
  Conn a = connection(peer, 0), b = connection(peer, 1), c = connection(peer, 2);
  int pipes[2];
  told("pipe", pipe(pipes));
  pollfd set[6] = {{a.fd, POLLIN, 0},     {-1, POLLIN, 7},   {b.fd, POLLIN | POLLOUT, 0},
                   {pipes[0], POLLIN, 0}, {c.fd, POLLIN, 0}, {600, POLLIN, 0}};
  const auto look = [&](const char* what, int ms, int count) {
    told(what, poll(set, static_cast<nfds_t>(count), ms));
    for (int i = 0; i < count; ++i) say("  %d: %s", i, events(static_cast<unsigned short>(set[i].revents)).c_str());
  };
  look("writable one", 0, 5);
  peer.call(Do::send, 2, 5);
  look("and a readable one", 0, 5);
  told("write", write(pipes[1], "x", 1));
  look("and the pipe", 0, 5);
  look("and no descriptor", 0, 6);
  set[2].events = POLLIN;
  told("recv", c.recv(10));
  char byte = 0;
  told("read", read(pipes[0], &byte, 1));
  look("none", 0, 5);
  peer.later(80, Do::send, 1, 5);
  look("one of three", 3000, 5);
  told("peer", peer.answer().result);
  told("recv", b.recv(10));
}
CASE(poll_and_signals) {
  Peer peer;
  Conn c = connection(peer);
  struct sigaction action {};
  action.sa_handler = ignore_signal;
  sigaction(SIGALRM, &action, nullptr);
  sigset_t blocked, before;
  sigemptyset(&blocked);
  sigaddset(&blocked, SIGALRM);
  sigprocmask(SIG_BLOCK, &blocked, &before);
  raise(SIGALRM);
  pollfd p{c.fd, POLLIN, 0};
  const timespec second{1, 0}, none{};
  told("poll with it blocked", poll(&p, 1, 50));
  told("ppoll that lets it in", ppoll(&p, 1, &second, &before));
  raise(SIGALRM);
  fd_set in;
  FD_ZERO(&in);
  FD_SET(c.fd, &in);
  told("pselect that lets it in", pselect(c.fd + 1, &in, nullptr, nullptr, &second, &before));
  told("ppoll at once", ppoll(&p, 1, &none, nullptr));
  const int ep = epoll_create1(0);
  add(ep, c.fd, EPOLLIN, 1);
  raise(SIGALRM);
  epoll_event event{};
  told("epoll_pwait that lets it in", epoll_pwait(ep, &event, 1, 1000, &before));
  sigprocmask(SIG_SETMASK, &before, nullptr);
}
CASE(select_all_three) {
  Peer peer;
  Conn c = connection(peer);
  fd_set in, out, except;
  const auto look = [&](const char* what, int ms) {
    for (fd_set* set : {&in, &out, &except}) {
      FD_ZERO(set);
      FD_SET(c.fd, set);
    }
    timeval left{ms / 1000, static_cast<suseconds_t>(ms % 1000) * 1000};
    told(what, select(c.fd + 1, &in, &out, &except, &left));
    say("  in %d out %d except %d", FD_ISSET(c.fd, &in) != 0, FD_ISSET(c.fd, &out) != 0, FD_ISSET(c.fd, &except) != 0);
  };
  look("writable", 0);
  peer.call(Do::send, 0, 10);
  look("readable too", 100);
  told("recv", c.recv(10));
  fill_up(c);
  FD_ZERO(&in);
  FD_SET(c.fd, &in);
  timeval left{0, 150'000};
  const Stopwatch watch;
  told("in vain", select(c.fd + 1, &in, nullptr, nullptr, &left));
  say("in time: %d, left %d", watch.waited(140), left.tv_sec != 0 || left.tv_usec != 0);
  peer.later(80, Do::send, 0, 5);
  FD_SET(c.fd, &in);
  left = {3, 0};
  told("sleeps", select(c.fd + 1, &in, nullptr, nullptr, &left));
  say("time is left: %d", left.tv_sec >= 1);
  told("peer", peer.answer().result);
  told("recv", c.recv(10));
}
CASE(epoll_level) {
  Peer peer;
  Conn c = connection(peer);
  const int ep = epoll_create1(EPOLL_CLOEXEC);
  add(ep, c.fd, EPOLLIN, 42);
  waited("nothing", ep, 0);
  peer.call(Do::send, 0, 10);
  waited("something", ep, 1000);
  waited("still", ep, 0);
  told("recv", c.recv(4));
  waited("the rest", ep, 0);
  told("recv", c.recv(100));
  waited("nothing left", ep, 0);
  modify(ep, c.fd, EPOLLIN | EPOLLOUT, 43);
  waited("writable", ep, 0);
  modify(ep, c.fd, 0, 44);
  peer.call(Do::send, 0, 10);
  waited("asked for nothing", ep, 0);
  modify(ep, c.fd, EPOLLIN | EPOLLRDHUP, 45);
  waited("asked again", ep, 0);
  told("recv", c.recv(100));
  peer.later(80, Do::send, 0, 3);
  waited("sleeps", ep, 3000);
  peer.answer();
  told("recv", c.recv(100));
  epoll_event unused{};
  told("add twice", epoll_ctl(ep, EPOLL_CTL_ADD, c.fd, &unused));
  told("del", epoll_ctl(ep, EPOLL_CTL_DEL, c.fd, nullptr));
  told("del twice", epoll_ctl(ep, EPOLL_CTL_DEL, c.fd, nullptr));
  told("mod of none", epoll_ctl(ep, EPOLL_CTL_MOD, c.fd, &unused));
  peer.call(Do::send, 0, 3);
  waited("not in it any more", ep, 0);
  told("no room", epoll_wait(ep, &unused, 0, 0));
}
CASE(epoll_edge) {
  Peer peer;
  Conn c = connection(peer);
  const int ep = epoll_create1(0);
  add(ep, c.fd, EPOLLIN | EPOLLET, 1);
  peer.call(Do::send, 0, 10);
  waited("an edge", ep, 1000);
  waited("no second", ep, 0);
  told("recv", c.recv(4));
  waited("none for the rest", ep, 0);
  peer.call(Do::send, 0, 10);
  waited("an edge by more bytes", ep, 1000);
  told("recv", c.recv(100));
  waited("none", ep, 0);
  modify(ep, c.fd, EPOLLIN | EPOLLET, 2);
  waited("none by a change", ep, 0);
  peer.call(Do::send, 0, 1);
  waited("an edge", ep, 1000);
  modify(ep, c.fd, EPOLLIN | EPOLLET, 3);
  waited("an edge by a change, with bytes there", ep, 0);
  told("recv", c.recv(100));
  peer.later(60, Do::send, 0, 1);
  waited("an edge wakes", ep, 3000);
  peer.answer();
  told("recv", c.recv(100));
  told("peer closes", peer.call(Do::close));
  settle();
  epoll_event event{};
  told("the end is an edge", epoll_wait(ep, &event, 1, 1000));
  say("  in %d", (event.events & EPOLLIN) != 0);
  told("recv", c.recv(100));
}
CASE(epoll_edge_out) {
  Peer peer;
  Conn c = connection(peer);
  const int ep = epoll_create1(0);
  add(ep, c.fd, EPOLLOUT | EPOLLET, 1);
  waited("writable", ep, 0);
  waited("once", ep, 0);
  fill_up(c);
  const auto filled = static_cast<long>(c.tx - c.rx);
  peer.later(80, Do::recv, 0, filled);
  waited("again", ep, 3000);
  say("all arrived: %d", peer.answer().result == filled);
}
CASE(epoll_oneshot) {
  Peer peer;
  Conn c = connection(peer);
  const int ep = epoll_create1(0);
  add(ep, c.fd, EPOLLIN | EPOLLONESHOT, 1);
  peer.call(Do::send, 0, 10);
  waited("fires", ep, 1000);
  waited("once", ep, 0);
  peer.call(Do::send, 0, 10);
  waited("not by more", ep, 0);
  modify(ep, c.fd, EPOLLIN | EPOLLONESHOT, 2);
  waited("armed anew", ep, 1000);
  told("recv", c.recv(100));
  modify(ep, c.fd, EPOLLIN | EPOLLONESHOT, 3);
  peer.later(60, Do::send, 0, 3);
  waited("wakes", ep, 3000);
  peer.answer();
  waited("once", ep, 50);
}
CASE(epoll_many) {
  Peer peer;
  std::vector<Conn> conns;
  const int ep = epoll_create1(0);
  for (std::uint64_t i = 0; i < 6; ++i) {
    conns.push_back(connection(peer, static_cast<int>(i)));
    add(ep, conns.back().fd, EPOLLIN, 100 + i);
  }
  for (const int i : {4, 1, 5}) peer.call(Do::send, i, 3);
  int seen = 0;
  for (int round = 0; round < 3; ++round) {  // which comes first is nobody's promise
    epoll_event event{};
    if (epoll_wait(ep, &event, 1, 1000) == 1) seen |= 1 << (event.data.u64 - 100);
    if (event.data.u64 >= 100 && event.data.u64 < 106) conns[event.data.u64 - 100].recv(3);
  }
  say("seen one at a time: %#x", seen);
  waited("none left", ep, 0);
  close(conns[2].fd);
  peer.later(60, Do::send, 3, 3);
  waited("another wakes", ep, 3000);
  peer.answer();
}
CASE(epoll_nested) {
  Peer peer;
  Conn c = connection(peer);
  const int inner = epoll_create1(0), outer = epoll_create1(0);
  add(outer, inner, EPOLLIN, 7);
  add(inner, c.fd, EPOLLIN, 1);
  waited("nothing inside", inner, 0);
  waited("nothing outside", outer, 0);
  peer.call(Do::send, 0, 5);
  waited("outer", outer, 1000);
  waited("inner", inner, 0);
  told("recv", c.recv(10));
  waited("inner again", inner, 0);
  waited("outer again", outer, 0);
  for (const int delay : {20, 80}) {
    peer.later(delay, Do::send, 0, 5);
    waited("outer sleeps", outer, 3000);
    peer.answer();
    waited("inner", inner, 0);
    told("recv", c.recv(10));
    waited("inner is empty", inner, 0);
  }
  peer.later(60, Do::send, 0, 5);
  polled("poll of the set", inner, POLLIN, 3000);
  peer.answer();
  waited("inner", inner, 0);
}
CASE(epoll_two_sets_and_threads) {
  Peer peer;
  Conn c = connection(peer);
  const int one = epoll_create1(0), two = epoll_create1(0);
  add(one, c.fd, EPOLLIN, 1);
  add(two, c.fd, EPOLLIN, 2);
  int got[2] = {-1, -1};
  std::thread first([&] {
    epoll_event event{};
    got[0] = epoll_wait(one, &event, 1, 3000);
  });
  std::thread second([&] {
    epoll_event event{};
    got[1] = epoll_wait(two, &event, 1, 3000);
  });
  settle(60);
  peer.call(Do::send, 0, 5);
  first.join();
  second.join();
  say("both woke: %d %d", got[0], got[1]);
  told("recv", c.recv(10));
}
CASE(epoll_changed_while_it_sleeps) {
  Peer peer;
  Conn a = connection(peer, 0), b = connection(peer, 1);
  const int ep = epoll_create1(0);
  add(ep, a.fd, EPOLLIN, 1);
  epoll_event event{};
  int n = -1;
  std::thread sleeper([&] { n = epoll_wait(ep, &event, 1, 3000); });
  settle(60);
  peer.call(Do::send, 1, 5);
  epoll_event more{EPOLLIN, {.u64 = 2}};
  epoll_ctl(ep, EPOLL_CTL_ADD, b.fd, &more);
  sleeper.join();
  told("woke", n);
  say("  by %llu", static_cast<unsigned long long>(event.data.u64));
}
CASE(epoll_waits_since_before_the_first_member) {
  Peer peer;
  const int ep = epoll_create1(0);
  epoll_event event{};
  int n = -1;
  std::thread sleeper([&] { n = epoll_wait(ep, &event, 1, 3000); });
  settle(60);
  Conn c = connection(peer);
  add(ep, c.fd, EPOLLIN | EPOLLONESHOT, 7);
  settle();
  peer.call(Do::send, 0, 5);
  sleeper.join();
  told("woke", n);
  say("  by %llu", static_cast<unsigned long long>(event.data.u64));
  waited("once", ep, 50);
}
CASE(epoll_oneshot_fires_before_the_lane) {
  Peer peer;
  Conn c = cold(peer, 0);
  const int ep = epoll_create1(0);
  add(ep, c.fd, EPOLLIN | EPOLLONESHOT, 1);
  peer.call(Do::send, 0, 5);
  waited("fires", ep, 1000);
  told("recv", c.recv(5));
  warm(peer, c);
  peer.call(Do::send, 0, 5);
  waited("not again", ep, 100);
  modify(ep, c.fd, EPOLLIN | EPOLLONESHOT, 2);
  waited("armed anew", ep, 1000);
  told("recv", c.recv(5));
}
namespace {
/// A child's part, which goes into the trace; the parent waits for its end.
template <class Part>
void in_child(Part part) {
  const pid_t pid = fork();
  if (pid == 0) {
    part();
    _exit(0);
  }
  int status = -1;
  if (waitpid(pid, &status, 0) != pid) fail("waitpid");
  told("child", status);
}
}  // namespace
CASE(epoll_child_goes_on_with_the_set) {
  Peer peer;
  Conn c = connection(peer);
  const int ep = epoll_create1(0);
  add(ep, c.fd, EPOLLIN, 7);
  waited("nothing yet", ep, 0);
  in_child([&] {
    peer.call(Do::send, 0, 5);
    waited("readable", ep, 3000);
    told("recv", c.recv(10));
    waited("nothing left", ep, 50);
    modify(ep, c.fd, EPOLLOUT, 8);
    waited("writable", ep, 1000);
    told("send", c.send(3));
  });
  c.rx += 5;
  c.tx += 3;
  told("peer", peer.call(Do::recv, 0, 3));
  modify(ep, c.fd, EPOLLIN, 9);
  peer.call(Do::send, 0, 5);
  waited("readable", ep, 3000);
  told("recv", c.recv(10));
}
CASE(epoll_child_goes_on_with_one_shots) {
  Peer peer;
  Conn c = connection(peer);
  Conn other = cold(peer, 1);
  const int ep = epoll_create1(0);
  add(ep, c.fd, EPOLLIN | EPOLLONESHOT, 7);
  add(ep, other.fd, EPOLLIN | EPOLLONESHOT, 8);
  in_child([&] {
    peer.call(Do::send, 0, 5);
    waited("by the lane", ep, 3000);
    waited("once", ep, 50);
    told("recv", c.recv(10));
    peer.call(Do::send, 1, 5);
    waited("by TCP", ep, 3000);
    waited("once", ep, 50);
    modify(ep, other.fd, EPOLLIN | EPOLLONESHOT, 9);
    waited("armed anew", ep, 1000);
    told("recv", other.recv(10));
    modify(ep, c.fd, EPOLLIN | EPOLLONESHOT, 10);
    peer.call(Do::send, 0, 5);
    waited("the first one, too", ep, 3000);
    told("recv", c.recv(10));
  });
}
CASE(epoll_child_goes_on_with_a_set_that_names_a_closed_number) {
  Peer peer;
  Conn c = connection(peer);
  const int ep = epoll_create1(0);
  const int copy = dup(c.fd);
  add(ep, c.fd, EPOLLIN, 7);
  told("close the first", close(c.fd));
  c.fd = copy;
  in_child([&] {
    peer.call(Do::send, 0, 5);
    waited("still in the set", ep, 3000);
    told("recv", c.recv(10));
    waited("nothing left", ep, 50);
    told("send", c.send(3));
  });
  c.rx += 5;
  c.tx += 3;
  told("peer", peer.call(Do::recv, 0, 3));
  peer.call(Do::send, 0, 5);
  waited("here, too", ep, 3000);
  told("recv", c.recv(10));
}
CASE(epoll_parent_closes_and_the_child_goes_on_with_the_set) {
  Peer peer;
  Conn c = connection(peer);
  const int ep = epoll_create1(0);
  add(ep, c.fd, EPOLLIN, 7);
  int gate[2];
  told("pipe", pipe(gate));
  const pid_t pid = fork();
  if (pid == 0) {
    char byte = 0;
    if (read(gate[0], &byte, 1) != 1) _exit(1);
    peer.call(Do::send, 0, 5);
    if (read(gate[0], &byte, 1) != 1) _exit(1);
    waited("and in the child", ep, 3000);
    told("recv", c.recv(10));
    _exit(0);
  }
  told("close", close(c.fd));
  told("write", write(gate[1], "x", 1));
  waited("told here, for it is one set", ep, 3000);
  told("write", write(gate[1], "x", 1));
  int status = -1;
  told("wait", waitpid(pid, &status, 0) == pid);
  told("child", status);
  waited("gone with the last of its copies", ep, 50);
}
CASE(epoll_duplicates) {
  Peer peer;
  Conn c = connection(peer);
  const int ep = epoll_create1(0);
  const int copy = dup(c.fd);
  add(ep, c.fd, EPOLLIN, 1);
  peer.call(Do::send, 0, 5);
  waited("by the first number", ep, 1000);
  told("close the first", close(c.fd));
  waited("the connection is still in the set", ep, 0);
  c.fd = copy;
  told("recv", c.recv(10));
  told("send", c.send(3));
  told("peer", peer.call(Do::recv, 0, 3));
}
CASE(epoll_exclusive) {
  Peer peer;
  Conn c = connection(peer);
  const int ep = epoll_create1(0);
  add(ep, c.fd, EPOLLIN | EPOLLEXCLUSIVE, 1);
  peer.call(Do::send, 0, 5);
  settle();
  waited("something", ep, 1000);
  told("recv", c.recv(10));
  waited("nothing", ep, 0);
}
CASE(epoll_copy_of_the_set) {
  Peer peer;
  Conn c = connection(peer);
  const int ep = epoll_create1(0);
  add(ep, c.fd, EPOLLIN, 1);
  const int copy = dup(ep);
  told("close", close(ep));
  peer.later(50, Do::send, 0, 5);
  waited("by the copy", copy, 3000);
  peer.answer();
  told("recv", c.recv(10));
}
