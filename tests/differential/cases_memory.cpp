// Buffers that are not there.
#include <fcntl.h>
#include <linux/sockios.h>
#include <poll.h>
#include <sys/epoll.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/select.h>
#include <sys/socket.h>
#include <sys/uio.h>
#include <unistd.h>

#include <cerrno>
#include <cstdio>
#include <cstdlib>

#include "bad_memory.hpp"
#include "trace.hpp"

using namespace differential;

namespace {

char* in_the_kernel() { return reinterpret_cast<char*>(0xffff'8880'0000'0000); }

CASE(bad_buffers) {
  Peer peer;
  Conn c = connection(peer);
  for (char* const at : {nowhere(), in_the_kernel(), static_cast<char*>(nullptr), reinterpret_cast<char*>(1)}) {
    told("send", send(c.fd, at, 100, 0));
    told("write", write(c.fd, at, 100));
    told("large", send(c.fd, at, 100000, MSG_DONTWAIT));
    told("nothing there", recv(c.fd, nowhere(), 100, MSG_DONTWAIT));
    peer.call(Do::send, 0, 50);
    pollfd p{c.fd, POLLIN, 0};
    told("poll", poll(&p, 1, 5000));
    told("recv", recv(c.fd, at, 100, 0));
    told("recv all", recv(c.fd, at, 50, MSG_WAITALL));
    told("peek", recv(c.fd, at, 100, MSG_PEEK));
    told("read", read(c.fd, at, 100));
    told("still there", c.recv(100));
    told("of no bytes", send(c.fd, at == in_the_kernel() ? nullptr : at, 0, 0));
  }
  works(peer, c);
}
CASE(bad_messages) {
  Peer peer;
  Conn c = connection(peer);
  auto* const message = nowhere_as<msghdr>();
  auto* const pieces = nowhere_as<iovec>();
  told("sendmsg", sendmsg(c.fd, message, 0));
  told("sendmsg null", sendmsg(c.fd, nullptr, 0));
  told("recvmsg", recvmsg(c.fd, message, MSG_DONTWAIT));
  told("recvmsg null", recvmsg(c.fd, nullptr, MSG_DONTWAIT));
  told("writev", writev(c.fd, pieces, 3));
  told("readv", readv(c.fd, pieces, 3));
  char good[100];
  fill(good, sizeof good, c.tx);
  iovec mixed[2] = {{good, sizeof good}, {nowhere(), 100}};
  msghdr of_mixed{};
  of_mixed.msg_iov = mixed;
  of_mixed.msg_iovlen = 2;
  told("sendmsg of a good and a bad piece", sendmsg(c.fd, &of_mixed, 0));
  told("writev", writev(c.fd, mixed, 2));
  msghdr of_nowhere{};
  of_nowhere.msg_iov = pieces;
  of_nowhere.msg_iovlen = 2;
  told("sendmsg of pieces nowhere", sendmsg(c.fd, &of_nowhere, 0));
  peer.call(Do::send, 0, 150);
  told("recvmsg of pieces nowhere", recvmsg(c.fd, &of_nowhere, 0));
  pollfd p{c.fd, POLLIN, 0};
  told("poll", poll(&p, 1, 5000));
  told("still there", static_cast<long>(c.recv_all(150)));
  works(peer, c);
}
CASE(bad_arguments) {
  Peer peer;
  Conn c = connection(peer);
  told("poll", poll(nowhere_as<pollfd>(), 1, 0));
  auto* const set = nowhere_as<fd_set>();
  timeval at_once{};
  told("select", select(c.fd + 1, set, nullptr, nullptr, &at_once));
  const int epoll = epoll_create1(EPOLL_CLOEXEC);
  auto* const event = nowhere_as<epoll_event>();
  epoll_event good{};
  good.events = EPOLLIN;
  told("epoll_ctl", epoll_ctl(epoll, EPOLL_CTL_ADD, c.fd, event));
  told("epoll_ctl", epoll_ctl(epoll, EPOLL_CTL_ADD, c.fd, &good));
  told("epoll_ctl", epoll_ctl(epoll, EPOLL_CTL_MOD, c.fd, event));
  told("epoll_wait, nothing there", epoll_wait(epoll, event, 1, 0));
  peer.call(Do::send, 0, 5);
  pollfd p{c.fd, POLLIN, 0};
  told("poll", poll(&p, 1, 5000));
  told("epoll_wait", epoll_wait(epoll, event, 1, 1000));
  told("epoll_wait", epoll_wait(epoll, &good, 1, 1000));
  told("recv", c.recv(5));
  auto* const number = nowhere_as<int>();
  for (const unsigned long request : {static_cast<unsigned long>(FIONREAD), static_cast<unsigned long>(SIOCOUTQ),
                                      static_cast<unsigned long>(SIOCATMARK), static_cast<unsigned long>(FIONBIO)})
    told("ioctl", ioctl(c.fd, request, number));
  told("setsockopt", setsockopt(c.fd, SOL_SOCKET, SO_RCVLOWAT, number, sizeof *number));
  told("setsockopt", setsockopt(c.fd, SOL_SOCKET, SO_RCVTIMEO, number, sizeof(timeval)));
  socklen_t len = sizeof *number;
  told("getsockopt", getsockopt(c.fd, SOL_SOCKET, SO_ERROR, number, &len));
  told("getpeername", getpeername(c.fd, nowhere_as<sockaddr>(), &len));
  peer.call(Do::send, 0, 20);
  char bytes[10];
  sockaddr_storage from;
  told("recvfrom", recvfrom(c.fd, bytes, 10, 0, reinterpret_cast<sockaddr*>(&from), nowhere_as<socklen_t>()));
  c.rx += 10;
  told("the rest", c.recv(10));
  works(peer, c);
}
// How much of it goes is the carrier's choice, as long as it is not more than there is.
CASE(half_a_buffer) {
  Peer peer;
  Conn c = connection(peer);
  const Edge edge(64);
  for (const std::size_t good : {std::size_t{1}, std::size_t{100}, std::size_t{2048}, kPage, std::size_t{20000}}) {
    fill(edge.end() - good, good, c.tx);
    told("send", send(c.fd, edge.end() - good, good + 1000, 0));
  }
  for (const std::size_t good : {std::size_t{70000}, std::size_t{200000}}) {
    fill(edge.end() - good, good, c.tx);
    const ssize_t n = send(c.fd, edge.end() - good, good + 100000, 0);
    say("%zu: %d", good, n > 0 && static_cast<std::size_t>(n) <= good && static_cast<std::size_t>(n) >= good / 2);
    if (n > 0) c.tx += static_cast<std::uint64_t>(n);
    say("peer: %d", peer.call(Do::recv, 0, n) == n);
  }
  peer.call(Do::send, 0, 50);
  pollfd p{c.fd, POLLIN, 0};
  told("poll", poll(&p, 1, 5000));
  told("recv", recv(c.fd, edge.end() - 20, 100, 0));
  told("recv of what there is room for", recv(c.fd, edge.end() - 50, 100, 0));
  c.rx += 50;
  works(peer, c);
}
// A server that sends a mapped file which somebody has cut meanwhile.
CASE(cut_file) {
  Peer peer;
  Conn c = connection(peer);
  const int file = memfd_create("cut", MFD_CLOEXEC);
  if (file < 0 || ftruncate(file, 2 * kPage) != 0) fail("memfd");
  auto* const map = static_cast<char*>(mmap(nullptr, 2 * kPage, PROT_READ | PROT_WRITE, MAP_SHARED, file, 0));
  told("ftruncate", ftruncate(file, kPage));
  told("send", send(c.fd, map + kPage, 1000, 0));
  told("send from before", send(c.fd, map, 2 * kPage, 0));
  told("ftruncate", ftruncate(file, 2 * kPage));
  fill(map, 2 * kPage, c.tx);
  told("send", send(c.fd, map, 2 * kPage, 0));
  c.tx += 2 * kPage;
  told("peer", peer.call(Do::recv, 0, 2 * kPage));
  const auto* const read_only = static_cast<char*>(mmap(nullptr, kPage, PROT_READ, MAP_SHARED, file, 0));
  peer.call(Do::send, 0, 50);
  pollfd p{c.fd, POLLIN, 0};
  told("poll", poll(&p, 1, 5000));
  told("recv", recv(c.fd, const_cast<char*>(read_only), 100, 0));
  told("still there", c.recv(100));
  works(peer, c);
}
CASE(shut_and_bad) {
  Peer peer;
  Conn c = connection(peer);
  told("shutdown", shutdown(c.fd, SHUT_WR));
  told("send", send(c.fd, nowhere(), 100, MSG_NOSIGNAL));
  told("large", send(c.fd, nowhere() - kPage, 2 * kPage, MSG_NOSIGNAL));
  peer.call(Do::close);
  settle();
  told("recv at the end", recv(c.fd, nowhere(), 100, 0));
}

}  // namespace
