// Every socket option by number: what getsockopt and setsockopt say of it with right and wrong arguments, on a socket that is
// fresh, listening and connected, and that the stream goes on after each.
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <poll.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <string>
#include <vector>

#include "trace.hpp"

using namespace differential;

namespace {

constexpr int kHighest = 100;
constexpr int kLevels[] = {SOL_SOCKET, IPPROTO_TCP, IPPROTO_IP, IPPROTO_IPV6};
constexpr socklen_t kLengths[] = {0, 1, 3, 4, 8, 16, 256};
constexpr socklen_t kLarge = 256;

struct Option {
  int level, name;
  const char* why;
};
bool is_in(const Option& o, int level, int name) { return o.level == level && o.name == name; }
const char* level_name(int level) {
  return level == SOL_SOCKET ? "SOCKET" : level == IPPROTO_TCP ? "TCP" : level == IPPROTO_IP ? "IP" : "IPV6";
}

// Two runs over kernel TCP differ in these: the length alone is compared.
constexpr Option kVarying[] = {
    {SOL_SOCKET, SO_SNDBUF, "grows with what TCP has carried"},
    {SOL_SOCKET, SO_RCVBUF, "grows with what TCP has carried"},
    {SOL_SOCKET, 28 /* SO_PEERNAME */, "a port that the kernel chose"},
    {SOL_SOCKET, 49 /* SO_INCOMING_CPU */, "where the scheduler put the peer"},
    {SOL_SOCKET, 55 /* SO_MEMINFO */, "counters"},
    {SOL_SOCKET, 56 /* SO_INCOMING_NAPI_ID */, "which queue a packet came by"},
    {SOL_SOCKET, 57 /* SO_COOKIE */, "a number of each socket's own"},
    {IPPROTO_TCP, TCP_INFO, "times and counters"},
    {IPPROTO_TCP, TCP_QUICKACK, "turns with the traffic"},
    {IPPROTO_TCP, TCP_WINDOW_CLAMP, "follows SO_RCVBUF"},
    {IPPROTO_TCP, TCP_TIMESTAMP, "a clock"},
    {IPPROTO_TCP, TCP_CC_INFO, "round-trip times"},
    {IPPROTO_TCP, TCP_FASTOPEN_KEY, "random"},
    {IPPROTO_TCP, TCP_REPAIR_WINDOW, "sequence numbers"},
    {IPPROTO_TCP, 35 /* TCP_ZEROCOPY_RECEIVE */, "addresses"},
    {IPPROTO_IP, 52 /* IP_PROTOCOL */, "a port that the kernel chose"},
};

// Setting one of these takes the lane down (README, Limits: a few socket modes), also where the kernel then refuses the value.
constexpr Option kNoLaneWith[] = {
    {SOL_SOCKET, SO_RCVLOWAT, "a receive waits for more than one byte"},
    {SOL_SOCKET, SO_TIMESTAMP, "packets have a time, messages none"},
    {SOL_SOCKET, SO_TIMESTAMPNS, "the same"},
    {SOL_SOCKET, SO_TIMESTAMPING, "the same"},
    {SOL_SOCKET, 63 /* SO_TIMESTAMP_NEW */, "the same"},
    {SOL_SOCKET, 64 /* SO_TIMESTAMPNS_NEW */, "the same"},
    {SOL_SOCKET, 65 /* SO_TIMESTAMPING_NEW */, "the same"},
    {SOL_SOCKET, SO_ATTACH_FILTER, "sees packets"},
    {SOL_SOCKET, SO_ATTACH_BPF, "sees packets"},
    {SOL_SOCKET, SO_PEEK_OFF, "a place in the kernel's queue"},
    {SOL_SOCKET, SO_ZEROCOPY, "pages of the program's in the kernel's queue"},
    {IPPROTO_TCP, TCP_MD5SIG, "signs packets"},
    {IPPROTO_TCP, TCP_REPAIR, "the kernel's queues"},
    {IPPROTO_TCP, TCP_ULP, "another protocol takes the socket over"},
    {IPPROTO_TCP, 35 /* TCP_ZEROCOPY_RECEIVE */, "pages of the kernel's queue"},
    {IPPROTO_TCP, TCP_INQ, "a control message with each receive"},
};

template <std::size_t kCount>
bool is_listed(const Option (&list)[kCount], int level, int name) {
  return std::any_of(list, list + kCount, [&](const Option& o) { return is_in(o, level, name); });
}

std::string said(int result) { return result == 0 ? "ok" : error_name(errno); }

/// A page that cannot be touched.
void* bad_address() {
  static void* const page = mmap(nullptr, 4096, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  return page;
}

std::string hex(const unsigned char* bytes, std::size_t count) {
  std::string text;
  for (std::size_t i = 0; i < count; ++i) {
    char two[3];
    std::snprintf(two, sizeof two, "%02x", bytes[i]);
    text += two;
  }
  return text;
}

void get_with_each_length(int fd, int level, int name) {
  std::string line;
  for (const socklen_t length : kLengths) {
    unsigned char value[kLarge];
    std::memset(value, 0x5a, sizeof value);
    socklen_t len = length;
    const int r = getsockopt(fd, level, name, value, &len);
    line += ' ' + said(r);
    if (len != length) line += '/' + std::to_string(len);
    if (r == 0 && !is_listed(kVarying, level, name)) line += '=' + hex(value, std::min(len, length));
    if (std::any_of(value + length, value + sizeof value, [](unsigned char byte) { return byte != 0x5a; })) line += " OVERRUN";
  }
  say("get %s %d:%s", level_name(level), name, line.c_str());
}
void get_with_bad_pointers(int fd, int level, int name) {
  unsigned char value[kLarge]{};
  socklen_t len = sizeof(int), negative = static_cast<socklen_t>(-1);  // some take that for a large one
  std::string line = ' ' + said(getsockopt(fd, level, name, value, nullptr));
  line += ' ' + said(getsockopt(fd, level, name, value, static_cast<socklen_t*>(bad_address())));
  line += ' ' + said(getsockopt(fd, level, name, bad_address(), &len));
  line += ' ' + said(getsockopt(fd, level, name, nullptr, &len));
  line += ' ' + said(getsockopt(fd, level, name, value, &negative));
  say("get %s %d badly:%s", level_name(level), name, line.c_str());
}
void get_all(int fd) {
  for (const int level : kLevels)
    for (int name = 0; name <= kHighest; ++name) {
      get_with_each_length(fd, level, name);
      get_with_bad_pointers(fd, level, name);
    }
}

/// Sets it in each way, and then to what it was.
void set_in_each_way(int fd, int level, int name) {
  unsigned char before[kLarge];
  socklen_t had = sizeof before;
  const bool known = getsockopt(fd, level, name, before, &had) == 0;
  std::string line;
  for (const int number : {1, 0}) {
    unsigned char value[kLarge]{};
    std::memcpy(value, &number, sizeof number);
    for (const socklen_t length : kLengths) line += ' ' + said(setsockopt(fd, level, name, value, length));
    line += ',';
  }
  line += ' ' + said(setsockopt(fd, level, name, nullptr, sizeof(int)));
  line += ' ' + said(setsockopt(fd, level, name, bad_address(), sizeof(int)));
  line += ' ' + said(setsockopt(fd, level, name, before, static_cast<socklen_t>(-1)));
  if (known) setsockopt(fd, level, name, before, had);
  say("set %s %d:%s", level_name(level), name, line.c_str());
}
void set_all(int fd) {
  for (const int level : kLevels)
    for (int name = 0; name <= kHighest; ++name) set_in_each_way(fd, level, name);
}

/// A byte to the peer and back. False: it does not come.
bool goes_on(Peer& peer, Conn& c) {
  peer.later(0, Do::echo, c.slot, 1);
  if (c.send(1, MSG_NOSIGNAL) != 1) return false;
  pollfd p{c.fd, POLLIN, 0};
  return poll(&p, 1, 3000) == 1 && c.recv(1) == 1 && peer.answer().result == 1;
}

}  // namespace

CASE(any_options_got) {
  const int fresh = unconnected();
  get_all(fresh);
  close(fresh);
  int port = 0;
  const int listening = listener(&port);
  get_all(listening);
  close(listening);
}
CASE(any_options_set) {
  const int fresh = unconnected();
  set_all(fresh);
  close(fresh);
  int port = 0;
  const int listening = listener(&port);
  set_all(listening);
  close(listening);
}
CASE(options_got_connected) {
  Peer peer;
  Conn c = connection(peer);
  get_all(c.fd);
  say("goes on: %d", goes_on(peer, c));
}
CASE(options_set_connected) {
  Peer peer;
  int slot = 0;
  Conn c = connection(peer, slot);
  for (const int level : kLevels)
    for (int name = 0; name <= kHighest; ++name) {
      const std::uint64_t before = kernel_bytes(c.fd);
      set_in_each_way(c.fd, level, name);
      say("  goes on: %d", goes_on(peer, c));
      if (is_listed(kNoLaneWith, level, name)) {
        close(c.fd);
        c = connection(peer, ++slot);
      } else if (lane_expected() && kernel_bytes(c.fd) != before) {
        say("  THE LANE IS LOST");
        c = connection(peer, ++slot);
      }
    }
}
