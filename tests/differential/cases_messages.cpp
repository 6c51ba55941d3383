// Several messages in one call, and vectors with flags: sendmmsg, recvmmsg, preadv2, pwritev2.
#include <fcntl.h>
#include <signal.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>

#include "blocking.hpp"
#include "trace.hpp"

using namespace differential;

namespace {

constexpr std::size_t kMost = 8;

/// Up to eight messages of 100 bytes.
struct Messages {
  std::byte data[kMost][100]{};
  iovec iov[kMost]{};
  mmsghdr msgs[kMost]{};
  Messages() {
    for (std::size_t i = 0; i < kMost; ++i) {
      iov[i] = {data[i], sizeof data[i]};
      msgs[i].msg_hdr.msg_iov = &iov[i];
      msgs[i].msg_hdr.msg_iovlen = 1;
    }
  }
  int send(Conn& c, unsigned count, int flags = 0) {
    for (std::size_t i = 0; i < kMost; ++i) fill(data[i], sizeof data[i], c.tx + i * sizeof data[i]);
    const int n = sendmmsg(c.fd, msgs, count, flags);
    const int error = errno;
    for (int i = 0; i < n; ++i) c.tx += msgs[i].msg_len;
    errno = error;
    return n;
  }
  int receive(Conn& c, unsigned count, int flags = 0, timespec* timeout = nullptr) {
    for (mmsghdr& each : msgs) each.msg_len = 999;
    const int n = recvmmsg(c.fd, msgs, count, flags, timeout);
    const int error = errno;
    for (int i = 0; i < n; ++i) {
      say("  %d: %u bytes, flags %x, right %d", i, msgs[i].msg_len, static_cast<unsigned>(msgs[i].msg_hdr.msg_flags),
          matches(data[i], msgs[i].msg_len, c.rx));
      if (!(flags & MSG_PEEK)) c.rx += msgs[i].msg_len;
    }
    errno = error;
    return n;
  }
};

/// What TCP does not carry where there is a lane.
class Carried {
 public:
  explicit Carried(const Conn& c) : fd_(c.fd), before_(kernel_bytes(c.fd)) {}
  void tell() const { say("carried: %d", !lane_expected() || kernel_bytes(fd_) == before_); }

 private:
  int fd_;
  std::uint64_t before_;
};

}  // namespace

CASE(mmsg) {
  Peer peer;
  Conn c = connection(peer);
  const Carried carried(c);
  Messages m;
  told("sendmmsg", m.send(c, 2));
  say("%u %u", m.msgs[0].msg_len, m.msgs[1].msg_len);
  told("peer", peer.call(Do::recv, 0, 200));
  peer.call(Do::send, 0, 150);
  told("recvmmsg", m.receive(c, 2, MSG_DONTWAIT));
  told("none there", m.receive(c, 2, MSG_DONTWAIT));
  told("none", m.receive(c, 0));
  told("none", m.send(c, 0));
  peer.call(Do::send, 0, 250);
  told("peeked", m.receive(c, 3, MSG_PEEK | MSG_DONTWAIT));
  told("one", m.receive(c, 8, MSG_WAITFORONE));
  told("by number", syscall(SYS_recvmmsg, c.fd, m.msgs, 1, MSG_DONTWAIT, nullptr));
  carried.tell();
}

CASE(recvmmsg_waits_for_all) {
  Peer peer;
  Conn c = connection(peer);
  const Carried carried(c);
  Messages m;
  peer.call(Do::send, 0, 100);
  peer.later(150, Do::send, 0, 200);
  const Stopwatch watch;
  told("three", m.receive(c, 3));
  say("waited %d", watch.waited(100));
  peer.answer();
  peer.later(150, Do::send, 0, 200);
  told("two at once", m.receive(c, 2, MSG_WAITALL));
  peer.answer();
  peer.call(Do::send, 0, 100);
  told("for one, of three", m.receive(c, 3, MSG_WAITFORONE));
  peer.later(150, Do::send, 0, 100);
  const Stopwatch again;
  told("for one", m.receive(c, 3, MSG_WAITFORONE));
  say("waited %d", again.waited(100));
  peer.answer();
  fcntl(c.fd, F_SETFL, O_NONBLOCK);
  peer.call(Do::send, 0, 120);
  told("as many as there are", m.receive(c, 8));
  told("none", m.receive(c, 8));
  carried.tell();
}

CASE(recvmmsg_timeout) {
  Peer peer;
  Conn c = connection(peer);
  Messages m;
  for (const timespec wrong : {timespec{-1, 0}, timespec{0, -1}, timespec{0, 1'000'000'000}}) {
    timespec t = wrong;
    told("wrong", m.receive(c, 2, 0, &t));
  }
  told("bad address", m.receive(c, 2, MSG_DONTWAIT, reinterpret_cast<timespec*>(16)));
  peer.call(Do::send, 0, 300);
  timespec none{0, 0};
  told("no time", m.receive(c, 2, 0, &none));  // it is looked at after the first
  say("left %ld %ld", static_cast<long>(none.tv_sec), none.tv_nsec);
  timespec enough{30, 0};
  told("enough", m.receive(c, 2, 0, &enough));
  say("left %d", enough.tv_sec >= 20 && enough.tv_sec < 30);
  timespec unused{5, 77};
  told("none there", m.receive(c, 2, MSG_DONTWAIT, &unused));
  say("left %ld %ld", static_cast<long>(unused.tv_sec), unused.tv_nsec);
  peer.later(200, Do::send, 0, 100);  // the time does not end a wait
  timespec little{0, 1'000'000};
  const Stopwatch watch;
  told("over", m.receive(c, 2, 0, &little));
  say("waited %d, left %ld %ld", watch.waited(150), static_cast<long>(little.tv_sec), little.tv_nsec);
  peer.answer();
}

CASE(recvmmsg_behind_shutdown) {
  Peer peer;
  Conn c = connection(peer);
  const Carried carried(c);
  Messages m;
  peer.call(Do::send, 0, 250);
  carried.tell();
  peer.call(Do::shutdown, 0, SHUT_WR);
  settle(60);
  told("recvmmsg", m.receive(c, 2));
  std::byte bytes[200];
  iovec iov[2] = {{bytes, 30}, {bytes + 30, 170}};
  const ssize_t n = preadv2(c.fd, iov, 2, -1, 0);
  told("preadv2", n);
  say("right %d", n > 0 && matches(bytes, static_cast<std::size_t>(n), c.rx));
  told("the end", preadv2(c.fd, iov, 2, -1, 0));
  told("the end, three times", m.receive(c, 3));
}

CASE(recvmmsg_end_between) {
  Peer peer;
  Conn c = connection(peer);
  Messages m;
  peer.call(Do::send, 0, 150);
  peer.later(150, Do::shutdown, 0, SHUT_WR);
  told("bytes and the end", m.receive(c, 4));
  peer.answer();
  told("sendmmsg", m.send(c, 3));
  told("peer", peer.call(Do::recv, 0, 300));
}

CASE(recvmmsg_before_a_reset) {
  Peer peer;
  Conn c = connection(peer);
  Messages m;
  peer.call(Do::send, 0, 100);
  c.send(10);
  settle();
  peer.later(150, Do::close, 0);  // with bytes unread
  told("until the reset", m.receive(c, 3));
  peer.answer();
  told("the reset", m.receive(c, 3));
  told("the end", m.receive(c, 1));
}

CASE(recvmmsg_is_interrupted) {
  Peer peer;
  Conn c = connection(peer);
  Messages m;
  on_signal(SIGALRM, 0);
  {
    const Alarm alarm(100);
    told("at first", m.receive(c, 3));
  }
  peer.call(Do::send, 0, 100);
  {
    const Alarm alarm(100);
    told("behind one", m.receive(c, 3));
  }
}

CASE(sendmmsg_ends) {
  Peer peer;
  Conn c = connection(peer);
  signal(SIGPIPE, SIG_IGN);
  Messages m;
  told("eight", m.send(c, 8, MSG_NOSIGNAL));
  m.msgs[2].msg_hdr.msg_iov = reinterpret_cast<iovec*>(16);
  told("before a bad vector", m.send(c, 4));
  told("a bad vector", sendmmsg(c.fd, m.msgs + 2, 1, 0));
  told("bad messages", sendmmsg(c.fd, reinterpret_cast<mmsghdr*>(16), 1, 0));
  m.msgs[2].msg_hdr.msg_iov = &m.iov[2];
  told("peer", peer.call(Do::recv, 0, 1000));
  shutdown(c.fd, SHUT_WR);
  told("behind the end", sendmmsg(c.fd, m.msgs, 2, 0));
}

CASE(sendmmsg_full) {
  Peer peer;
  Conn c = connection(peer);
  const Carried carried(c);
  fcntl(c.fd, F_SETFL, O_NONBLOCK);
  std::vector<std::byte> bulk(1 << 20);
  Messages m;
  for (iovec& each : m.iov) each = {bulk.data(), bulk.size()};
  int n = 0;
  long sent = 0;
  bool partial_was_last = true;
  for (;;) {
    std::fill(bulk.begin(), bulk.end(), std::byte{7});
    if ((n = sendmmsg(c.fd, m.msgs, kMost, 0)) < 0) break;
    for (int i = 0; i < n; ++i) {
      sent += m.msgs[i].msg_len;
      partial_was_last = partial_was_last && (m.msgs[i].msg_len == bulk.size() || i == n - 1);
    }
  }
  told("full", n);
  say("some was sent %d, a part of a message ends the call %d", sent > 0, partial_was_last);
  carried.tell();
}

CASE(vectors_with_flags) {
  Peer peer;
  Conn c = connection(peer);
  const Carried carried(c);
  std::byte bytes[300];
  iovec iov[2] = {{bytes, 100}, {bytes + 100, 100}};
  fill(bytes, 200, c.tx);
  told("pwritev2", pwritev2(c.fd, iov, 2, -1, 0));
  c.tx += 200;
  fill(bytes, 200, c.tx);
  told("pwritev2 nowait", pwritev2(c.fd, iov, 2, -1, RWF_NOWAIT));
  c.tx += 200;
  told("peer", peer.call(Do::recv, 0, 400));
  told("preadv2 nowait, none there", preadv2(c.fd, iov, 2, -1, RWF_NOWAIT));
  peer.call(Do::send, 0, 350);
  told("preadv2", preadv2(c.fd, iov, 2, -1, RWF_HIPRI));
  say("right %d", matches(bytes, 200, c.rx));
  c.rx += 200;
  told("by number", syscall(SYS_preadv2, c.fd, iov, 1, -1L, -1L, RWF_NOWAIT));
  say("right %d", matches(bytes, 100, c.rx));
  c.rx += 100;
  peer.later(150, Do::send, 0, 10);
  told("what is left", preadv2(c.fd, iov, 2, -1, 0));
  told("after a while", preadv2(c.fd, iov, 2, -1, 0));
  peer.answer();
  carried.tell();
  told("a place", preadv2(c.fd, iov, 2, 0, 0));
  told("a place", pwritev2(c.fd, iov, 2, 5, 0));
  told("a wrong place", preadv2(c.fd, iov, 2, -2, 0));
  told("no vectors", preadv2(c.fd, iov, 0, -1, RWF_NOWAIT));
  told("bad vectors", syscall(SYS_preadv2, c.fd, 16L, 1L, -1L, -1L, 0L));
  carried.tell();
  told("unknown flags", preadv2(c.fd, iov, 1, -1, 0x40000000));
  told("unknown flags", pwritev2(c.fd, iov, 1, -1, 0x40000000));
  iov[0].iov_len = 0;
  told("no bytes", preadv2(c.fd, iov, 1, -1, 0x40000000));
}
