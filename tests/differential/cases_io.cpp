// Transfer: flags, vectors, addresses, urgent data, files.
#include <arpa/inet.h>
#include <fcntl.h>
#include <linux/sockios.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <poll.h>
#include <signal.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/sendfile.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cerrno>
#include <climits>
#include <cstdlib>
#include <cstring>
#include <random>
#include <thread>

#include "blocking.hpp"
#include "trace.hpp"

using namespace differential;

// FC-55
CASE(tiny_buffers) {
  for (const int size : {0, 1, 4096}) {
    Peer peer;
    Conn c = cold(peer);
    setsockopt(c.fd, SOL_SOCKET, SO_SNDBUF, &size, sizeof size);
    setsockopt(c.fd, SOL_SOCKET, SO_RCVBUF, &size, sizeof size);
    peer.call(Do::option, 0, SOL_SOCKET, SO_RCVBUF, size);
    peer.call(Do::option, 0, SOL_SOCKET, SO_SNDBUF, size);
    warm(peer, c);
    int snd = 0, rcv = 0;
    socklen_t len = sizeof snd;
    getsockopt(c.fd, SOL_SOCKET, SO_SNDBUF, &snd, &len);
    getsockopt(c.fd, SOL_SOCKET, SO_RCVBUF, &rcv, &len);
    say("asked %d: sndbuf %d rcvbuf %d", size, snd, rcv);
    constexpr long kBytes = 100'000;
    peer.later(0, Do::recv, 0, kBytes);
    told("sent", static_cast<long>(c.send_all(kBytes)));
    told("peer received", peer.answer().result);
    peer.later(0, Do::send, 0, kBytes);
    told("received", static_cast<long>(c.recv_all(kBytes)));
    told("peer sent", peer.answer().result);
  }
}
CASE(zero_lengths) {
  Peer peer;
  Conn c = connection(peer);
  char byte = 0;
  told("send 0", send(c.fd, &byte, 0, 0));
  told("send null 0", send(c.fd, nullptr, 0, 0));
  told("write 0", write(c.fd, &byte, 0));
  told("recv 0 dontwait", recv(c.fd, &byte, 0, MSG_DONTWAIT));
  told("read 0", read(c.fd, &byte, 0));
  peer.call(Do::send, 0, 5);
  told("recv 0", recv(c.fd, &byte, 0, 0));
  told("recv 5", c.recv(10));
}

// FC-56: random flags against what must be there.
CASE(flag_model) {
  Peer peer;
  Conn c = connection(peer);
  std::mt19937 random(7);
  long there = 0;
  for (int i = 0; i < 600; ++i) {
    switch (random() % 6) {
      case 0: {
        const long n = static_cast<long>(random() % 9000) + 1;
        if (there > 60'000) break;
        there += peer.call(Do::send, 0, n);
        break;
      }
      case 1:
      case 2: {
        const std::size_t want = random() % 5000 + 1;
        const ssize_t n = c.recv(want, MSG_DONTWAIT);
        if (n < 0 ? there != 0 || errno != EAGAIN : n != std::min<long>(there, static_cast<long>(want)))
          say("%d: recv %zu of %ld said %zd", i, want, there, n);
        if (n > 0) there -= n;
        break;
      }
      case 3: {
        const std::size_t want = random() % 5000 + 1;
        const ssize_t n = c.recv(want, MSG_DONTWAIT | MSG_PEEK);
        if (n < 0 ? there != 0 : n != std::min<long>(there, static_cast<long>(want)))
          say("%d: peek %zu of %ld said %zd", i, want, there, n);
        break;
      }
      case 4: {
        if (there == 0) break;
        const std::size_t want = random() % static_cast<unsigned>(there) + 1;
        const int flags = MSG_WAITALL | (random() % 2 ? MSG_PEEK : 0);
        const ssize_t n = c.recv(want, flags);
        if (n != static_cast<ssize_t>(want)) say("%d: waitall %zu of %ld said %zd", i, want, there, n);
        if (!(flags & MSG_PEEK)) there -= static_cast<long>(want);
        break;
      }
      case 5: {
        const std::size_t want = random() % 3000 + 1;
        const ssize_t n = c.recv(want, MSG_DONTWAIT | MSG_TRUNC);
        if (n < 0 ? there != 0 : n != std::min<long>(there, static_cast<long>(want)))
          say("%d: trunc %zu of %ld said %zd", i, want, there, n);
        if (n > 0) there -= n;
        break;
      }
    }
    int queued = -1;
    if (ioctl(c.fd, FIONREAD, &queued) != 0 || queued != there) say("%d: FIONREAD %d of %ld", i, queued, there);
  }
  told("the rest", static_cast<long>(c.recv_all(static_cast<std::size_t>(there))) - there);
}
CASE(waitall) {
  Peer peer;
  Conn c = connection(peer);
  peer.later(0, Do::send, 0, 50);
  peer.later(100, Do::send, 0, 50);
  told("recv", c.recv(100, MSG_WAITALL));
  peer.answer();
  peer.answer();
  peer.later(0, Do::send, 0, 50);
  peer.later(100, Do::send, 0, 50);
  told("peek waitall", c.recv(100, MSG_WAITALL | MSG_PEEK));
  told("recv", c.recv(100, MSG_WAITALL));
  peer.answer();
  peer.answer();
  peer.call(Do::send, 0, 30);
  told("waitall dontwait", c.recv(100, MSG_WAITALL | MSG_DONTWAIT));
  on_signal(SIGALRM, 0);
  peer.call(Do::send, 0, 20);
  {
    const Alarm alarm(100);
    told("interrupted", c.recv(100, MSG_WAITALL));
  }
  peer.later(0, Do::send, 0, 40);
  peer.later(100, Do::shutdown, 0, SHUT_WR);
  told("to the end", c.recv(100, MSG_WAITALL));
  told("after", c.recv(100, MSG_WAITALL));
  peer.answer();
  peer.answer();
}
CASE(waitall_before_a_reset) {
  Peer peer;
  Conn c = connection(peer);
  c.send(10);
  settle();
  peer.later(0, Do::send, 0, 50);
  peer.later(100, Do::close, 0);  // with bytes unread
  told("recv", c.recv(100, MSG_WAITALL));
  peer.answer();
  peer.answer();
  told("the reset", c.recv(100));
  told("the end", c.recv(100));
}
CASE(msg_more) {
  Peer peer;
  Conn c = connection(peer);
  told("send more", c.send(100, MSG_MORE));
  told("send more", c.send(100, MSG_MORE));
  told("send", c.send(100));
  told("peer", peer.call(Do::recv, 0, 300));
  told("send more", c.send(10, MSG_MORE));
  told("peer, without the rest", peer.call(Do::recv, 0, 10));  // 200 ms on TCP
  const int on = 1, off = 0;
  told("cork", setsockopt(c.fd, IPPROTO_TCP, TCP_CORK, &on, sizeof on));
  told("send", c.send(10));
  told("uncork", setsockopt(c.fd, IPPROTO_TCP, TCP_CORK, &off, sizeof off));
  told("peer", peer.call(Do::recv, 0, 10));
}

// FC-37
CASE(vectors) {
  Peer peer;
  Conn c = connection(peer);
  std::mt19937 random(3);
  for (int round = 0; round < 100; ++round) {
    std::vector<std::byte> data(random() % 20'000 + 1);
    std::vector<iovec> iov;
    for (std::size_t at = 0; at < data.size();) {
      const std::size_t n = std::min<std::size_t>(random() % 4 == 0 ? 0 : random() % 3000, data.size() - at);
      iov.push_back({n == 0 && random() % 2 ? nullptr : data.data() + at, n});
      at += n;
    }
    if (iov.size() > IOV_MAX) continue;
    fill(data.data(), data.size(), c.tx);
    peer.later(0, Do::echo, 0, static_cast<long>(data.size()));
    msghdr out{};
    out.msg_iov = iov.data();
    out.msg_iovlen = iov.size();
    const ssize_t sent = random() % 2 ? sendmsg(c.fd, &out, 0) : writev(c.fd, iov.data(), static_cast<int>(iov.size()));
    if (sent != static_cast<ssize_t>(data.size())) say("%d: sent %zd of %zu", round, sent, data.size());
    c.tx += data.size();
    peer.answer();
    std::fill(data.begin(), data.end(), std::byte{0});
    char name[64], control[64];
    msghdr in{};
    in.msg_name = name;
    in.msg_namelen = sizeof name;
    in.msg_iov = iov.data();
    in.msg_iovlen = iov.size();
    in.msg_control = control;
    in.msg_controllen = sizeof control;
    in.msg_flags = 0x7fff;
    const ssize_t got = recvmsg(c.fd, &in, MSG_WAITALL);
    if (got != static_cast<ssize_t>(data.size()) || !matches(data.data(), data.size(), c.rx))
      say("%d: received %zd of %zu", round, got, data.size());
    c.rx += data.size();
    if (round == 0)
      say("namelen %u controllen %zu flags %#x", in.msg_namelen, in.msg_controllen, static_cast<unsigned>(in.msg_flags));
  }
  msghdr empty{};
  told("recvmsg dontwait", recvmsg(c.fd, &empty, MSG_DONTWAIT));
  std::byte one[1];
  iovec single{one, 1};
  msghdr msg{};
  msg.msg_iov = &single;
  msg.msg_iovlen = 1;
  told("recvmsg empty dontwait", recvmsg(c.fd, &msg, MSG_DONTWAIT));
  std::vector<iovec> many(IOV_MAX + 1, single);
  msg.msg_iov = many.data();
  msg.msg_iovlen = many.size();
  told("sendmsg IOV_MAX+1", sendmsg(c.fd, &msg, 0));
  told("recvmsg IOV_MAX+1", recvmsg(c.fd, &msg, MSG_DONTWAIT));
  told("writev IOV_MAX+1", writev(c.fd, many.data(), IOV_MAX + 1));
  told("readv IOV_MAX+1", readv(c.fd, many.data(), IOV_MAX + 1));
  const volatile int minus_one = -1;  // else the compiler warns of what is tested
  told("writev -1", writev(c.fd, many.data(), minus_one));
  told("writev 0", writev(c.fd, many.data(), 0));
  told("readv 0", readv(c.fd, many.data(), 0));
  iovec huge[2] = {{one, 1}, {one, static_cast<std::size_t>(-1)}};
  told("writev negative length", writev(c.fd, huge, 2));
  fill(one, 1, c.tx);
  msg.msg_iov = many.data();
  msg.msg_iovlen = 0;
  told("sendmsg 0", sendmsg(c.fd, &msg, 0));
}
CASE(addresses) {
  Peer peer;
  Conn c = connection(peer);
  sockaddr_in other{};
  other.sin_family = AF_INET;
  other.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
  other.sin_port = htons(9);
  std::byte data[10];
  fill(data, 10, c.tx);
  const ssize_t n = told("sendto with an address", sendto(c.fd, data, 10, 0, reinterpret_cast<sockaddr*>(&other), sizeof other));
  if (n > 0) c.tx += static_cast<std::uint64_t>(n);
  told("peer", peer.call(Do::recv, 0, 10));
  peer.call(Do::send, 0, 10);
  sockaddr_storage from{};
  std::memset(&from, 0x5a, sizeof from);
  socklen_t len = sizeof from;
  told("recvfrom", recvfrom(c.fd, data, 10, 0, reinterpret_cast<sockaddr*>(&from), &len));
  say("length %u first byte %#x", len, reinterpret_cast<unsigned char&>(from));
  len = static_cast<socklen_t>(-1);
  peer.call(Do::send, 0, 10);
  told("recvfrom with a negative length", recvfrom(c.fd, data, 10, 0, reinterpret_cast<sockaddr*>(&from), &len));
}
CASE(huge_count) {
  Peer peer;
  Conn c = connection(peer);
  peer.call(Do::send, 0, 50);
  std::vector<std::byte> data(4096);
  told("read", read(c.fd, data.data(), 4096));
  c.rx += 50;
  peer.call(Do::send, 0, 50);
  iovec iov[1] = {{data.data(), 4096}};
  told("readv", readv(c.fd, iov, 1));
}

// MSG_OOB takes the lane down; SIOCATMARK and the bytes around the mark are TCP's.
CASE(urgent) {
  Peer peer;
  Conn c = connection(peer);
  peer.call(Do::send, 0, 10);
  told("peer oob", peer.call(Do::oob));
  settle();
  pollfd p{c.fd, POLLIN | POLLPRI, 0};
  told("poll", poll(&p, 1, 1000));
  say("%s", events(static_cast<unsigned short>(p.revents)).c_str());
  int mark = -1;
  told("SIOCATMARK", ioctl(c.fd, SIOCATMARK, &mark));
  say("mark %d", mark);
  told("recv", c.recv(100));
  told("SIOCATMARK", ioctl(c.fd, SIOCATMARK, &mark));
  say("mark %d", mark);
  char byte = 0;
  told("recv oob", recv(c.fd, &byte, 1, MSG_OOB));
  say("right byte: %d", byte == static_cast<char>(pattern(c.rx)));
  told("recv oob again", recv(c.fd, &byte, 1, MSG_OOB));
  told("peer sends", peer.call(Do::send, 0, 10));
  told("recv", c.recv(100));
}
CASE(urgent_sent) {
  Peer peer;
  Conn c = connection(peer);
  told("send", c.send(10));
  const char byte = 'u';
  told("send oob", send(c.fd, &byte, 1, MSG_OOB));
  told("send", c.send(10));
  told("peer", peer.call(Do::recv, 0, 10));
  told("peer", peer.call(Do::recv, 0, 10));
}

// sendfile
CASE(sendfile_offsets) {
  Peer peer;
  Conn c = connection(peer);
  char name[] = "diff-file-XXXXXX";
  const int file = mkstemp(name);
  unlink(name);
  std::vector<std::byte> data(300'000);
  fill(data.data(), data.size(), 0);
  told("file", write(file, data.data(), data.size()));
  // The peer checks against the connection's own sequence, so the file is read at the positions that continue it.
  off_t at = static_cast<off_t>(c.tx);
  lseek(file, 17, SEEK_SET);
  peer.later(0, Do::recv, 0, 100'000);
  long left = 100'000;
  while (left > 0) {
    const ssize_t n = sendfile(c.fd, file, &at, static_cast<std::size_t>(left));
    if (n <= 0) {
      told("sendfile", n);
      break;
    }
    left -= n;
  }
  told("peer", peer.answer().result);
  say("moved offset: %d, file position %ld", at == static_cast<off_t>(c.tx + 100'000), static_cast<long>(lseek(file, 0, SEEK_CUR)));
  c.tx += 100'000;
  lseek(file, static_cast<off_t>(c.tx), SEEK_SET);
  peer.later(0, Do::recv, 0, 50'000);
  for (left = 50'000; left > 0;) {
    const ssize_t n = sendfile(c.fd, file, nullptr, static_cast<std::size_t>(left));
    if (n <= 0) {
      told("sendfile", n);
      break;
    }
    left -= n;
  }
  told("peer", peer.answer().result);
  say("file position: %d", lseek(file, 0, SEEK_CUR) == static_cast<off_t>(c.tx + 50'000));
  at = 300'000;
  told("at the end", sendfile(c.fd, file, &at, 100));
  at = 299'990;
  told("past the end", sendfile(c.fd, file, &at, 100));
  at = -5;
  told("negative", sendfile(c.fd, file, &at, 100));
  told("bad file", sendfile(c.fd, -1, nullptr, 100));
  told("count 0", sendfile(c.fd, file, nullptr, 0));
  int ends[2];
  if (pipe(ends) != 0) fail("pipe");
  told("from a pipe", sendfile(c.fd, ends[0], nullptr, 10));
}
CASE(splice_falls_back) {
  Peer peer;
  Conn c = connection(peer);
  int ends[2];
  if (pipe(ends) != 0) fail("pipe");
  peer.call(Do::send, 0, 1000);
  long got = 0;
  while (got < 1000) {
    const ssize_t n = splice(c.fd, nullptr, ends[1], nullptr, 1000 - static_cast<std::size_t>(got), 0);
    if (n <= 0) {
      told("splice", n);
      break;
    }
    got += n;
  }
  std::vector<std::byte> data(1000);
  told("from the pipe", read(ends[0], data.data(), 1000));
  say("right bytes: %d", matches(data.data(), 1000, c.rx));
  c.rx += 1000;
  fill(data.data(), 1000, c.tx);
  told("to the pipe", write(ends[1], data.data(), 1000));
  for (got = 0; got < 1000;) {
    const ssize_t n = splice(ends[0], nullptr, c.fd, nullptr, 1000 - static_cast<std::size_t>(got), 0);
    if (n <= 0) break;
    got += n;
  }
  told("peer", peer.call(Do::recv, 0, 1000));
}
// The lane goes with bytes of an idle peer on it: they come all the same.
CASE(mode_behind_bytes) {
  Peer peer;
  for (const bool waits : {true, false}) {
    Conn c = connection(peer, waits);
    settle(60);  // the service threads have nothing more to do
    peer.call(Do::send, waits, 500);
    const int from = 0;
    told("SO_PEEK_OFF", setsockopt(c.fd, SOL_SOCKET, SO_PEEK_OFF, &from, sizeof from));
    pollfd p{c.fd, POLLIN, 0};
    if (waits) told("poll", poll(&p, 1, 3000));
    told("recv", c.recv(1000));
  }
}

// FC-66
CASE(fcntl_ioctl) {
  Peer peer;
  Conn c = connection(peer);
  told("F_GETFD", fcntl(c.fd, F_GETFD));
  told("F_GETFL", fcntl(c.fd, F_GETFL));
  told("F_SETFL", fcntl(c.fd, F_SETFL, O_NONBLOCK));
  told("F_GETFL", fcntl(c.fd, F_GETFL));
  told("recv", c.recv(1));
  int on = 0;
  told("FIONBIO 0", ioctl(c.fd, FIONBIO, &on));
  told("F_GETFL", fcntl(c.fd, F_GETFL));
  on = 1;
  told("FIONBIO 1", ioctl(c.fd, FIONBIO, &on));
  told("recv", c.recv(1));
  told("F_GETOWN", fcntl(c.fd, F_GETOWN));
  told("F_SETOWN", fcntl(c.fd, F_SETOWN, 1));
  told("F_GETOWN", fcntl(c.fd, F_GETOWN));
  told("F_SETOWN", fcntl(c.fd, F_SETOWN, 0));
  told("bad command", fcntl(c.fd, 9999, 1));
  told("F_SETFD", fcntl(c.fd, F_SETFD, 0));
  told("F_GETFD", fcntl(c.fd, F_GETFD));
  peer.call(Do::send, 0, 77);
  int value = -1;
  told("FIONREAD", ioctl(c.fd, FIONREAD, &value));
  say("%d", value);
  c.recv(70);
  told("FIONREAD", ioctl(c.fd, FIONREAD, &value));
  say("%d", value);
  told("SIOCOUTQ", ioctl(c.fd, SIOCOUTQ, &value));
  say("plausible: %d", value >= 0 && value < 1000);
  told("FIONREAD null", ioctl(c.fd, FIONREAD, nullptr));
  told("unknown ioctl", ioctl(c.fd, 0x1234, &value));
  told("FIOCLEX", ioctl(c.fd, FIOCLEX));
  told("F_GETFD", fcntl(c.fd, F_GETFD));
  told("lseek", lseek(c.fd, 0, SEEK_SET));
  told("fsync", fsync(c.fd));
}
CASE(async_signal) {
  Peer peer;
  Conn c = connection(peer);
  on_signal(SIGIO, SA_RESTART);
  fcntl(c.fd, F_SETOWN, getpid());
  told("O_ASYNC", fcntl(c.fd, F_SETFL, O_ASYNC));
  peer.call(Do::send, 0, 10);
  settle(50);
  say("signalled: %d", signals.load() > 0);
  told("recv", c.recv(10));
}

// FC-34
CASE(by_syscall) {
  Peer peer;
  Conn c = connection(peer);
  std::byte data[100];
  fill(data, 100, c.tx);
  told("write", syscall(SYS_write, c.fd, data, 10L));
  told("sendto", syscall(SYS_sendto, c.fd, data + 10, 10L, 0L, nullptr, 0L));
  iovec iov{data + 20, 10};
  told("writev", syscall(SYS_writev, c.fd, &iov, 1L));
  msghdr msg{};
  iov.iov_base = data + 30;
  msg.msg_iov = &iov;
  msg.msg_iovlen = 1;
  told("sendmsg", syscall(SYS_sendmsg, c.fd, &msg, 0L));
  told("peer", peer.call(Do::recv, 0, 40));
  c.tx += 40;
  peer.call(Do::send, 0, 40);
  told("read", syscall(SYS_read, c.fd, data, 10L));
  told("recvfrom", syscall(SYS_recvfrom, c.fd, data + 10, 10L, 0L, nullptr, nullptr));
  iov.iov_base = data + 20;
  told("readv", syscall(SYS_readv, c.fd, &iov, 1L));
  iov.iov_base = data + 30;
  told("recvmsg", syscall(SYS_recvmsg, c.fd, &msg, 0L));
  say("right bytes: %d", matches(data, 40, c.rx));
  c.rx += 40;
  const long copy = syscall(SYS_dup, c.fd);
  told("close", syscall(SYS_close, c.fd));
  c.fd = static_cast<int>(copy);
  pollfd p{c.fd, POLLIN | POLLOUT, 0};
  told("poll", syscall(SYS_poll, &p, 1L, 0L));
  say("%s", events(static_cast<unsigned short>(p.revents)).c_str());
  const long ep = syscall(SYS_epoll_create1, 0L);
  struct {
    std::uint32_t events;
    std::uint64_t data;
  } __attribute__((packed)) event{POLLIN, 5};
  told("epoll_ctl", syscall(SYS_epoll_ctl, ep, 1L, c.fd, &event));
  peer.call(Do::send, 0, 3);
  event = {};
  told("epoll_wait", syscall(SYS_epoll_pwait, ep, &event, 1L, 1000L, nullptr, 8L));
  say("%s %llu", events(event.events).c_str(), static_cast<unsigned long long>(event.data));
  told("recv", c.recv(10));
  told("shutdown", syscall(SYS_shutdown, c.fd, static_cast<long>(SHUT_WR)));
  told("peer drains", peer.call(Do::drain));
  void* map = reinterpret_cast<void*>(syscall(SYS_mmap, nullptr, 4096L, static_cast<long>(PROT_READ | PROT_WRITE),
                                              static_cast<long>(MAP_PRIVATE | MAP_ANONYMOUS), -1L, 0L));
  say("mmap: %d, gettid: %d", map != MAP_FAILED, syscall(SYS_gettid) == getpid());
  told("bad number", syscall(100'000L));
}

// FC-57
CASE(self_threads_frame_records) {
  Pair pair = self_pair();
  constexpr int kThreads = 4, kRecords = 500;
  std::vector<std::thread> threads;
  threads.reserve(kThreads);
  for (int t = 0; t < kThreads; ++t)
    threads.emplace_back([&, t] {
      std::mt19937 random(static_cast<unsigned>(t));
      std::vector<char> record(4096);
      for (int i = 0; i < kRecords; ++i) {
        const auto n = static_cast<unsigned short>(random() % 4000 + 4);
        std::memset(record.data(), 'a' + t, n);
        std::memcpy(record.data(), &n, 2);
        if (send(pair.a.fd, record.data(), n, 0) != n) say("short send");
      }
    });
  int good[kThreads]{};
  std::vector<char> record(4096);
  for (int i = 0; i < kThreads * kRecords; ++i) {
    unsigned short n = 0;
    if (recv(pair.b.fd, &n, 2, MSG_WAITALL) != 2 || n < 4 || n > 4003) {
      say("a torn record");
      break;
    }
    if (recv(pair.b.fd, record.data(), static_cast<std::size_t>(n) - 2, MSG_WAITALL) != n - 2) say("short record");
    bool whole = true;
    for (int k = 1; k < n - 2; ++k) whole = whole && record[static_cast<std::size_t>(k)] == record[0];
    if (whole && record[0] >= 'a' && record[0] < 'a' + kThreads) ++good[record[0] - 'a'];
  }
  for (std::thread& t : threads) t.join();
  say("%d %d %d %d", good[0], good[1], good[2], good[3]);
}
CASE(threads_read_one_socket) {
  Peer peer;
  Conn c = connection(peer);
  constexpr long kBytes = 2'000'000;
  std::atomic<long> got{0};
  std::vector<std::thread> threads;
  threads.reserve(4);
  for (int t = 0; t < 4; ++t)
    threads.emplace_back([&] {
      std::vector<char> buffer(10'000);
      for (;;) {
        const ssize_t n = recv(c.fd, buffer.data(), buffer.size(), 0);
        if (n <= 0) break;
        got += n;
      }
    });
  told("peer sends", peer.call(Do::send, 0, kBytes));
  peer.call(Do::shutdown, 0, SHUT_WR);
  for (std::thread& t : threads) t.join();
  told("received", got.load());
}
