// One end of a connection as a test's program has it: plays ball, and exchanges bytes that tell their place in the stream.
#pragma once

#include <arpa/inet.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <sys/socket.h>

#include <chrono>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <vector>

#include "ring.hpp"

[[noreturn]] inline void fail(const char* what) {
  std::perror(what);
  std::exit(1);
}

inline int connected(bool is_server, std::uint16_t port) {
  const int fd = socket(AF_INET, SOCK_STREAM, 0);
  sockaddr_in address{};
  address.sin_family = AF_INET;
  address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
  address.sin_port = htons(port);
  socklen_t size = sizeof address;
  auto* const any = reinterpret_cast<sockaddr*>(&address);
  if (!is_server) {
    if (connect(fd, any, size) != 0) fail("connect");
    return fd;
  }
  if (bind(fd, any, size) != 0 || listen(fd, 1) != 0 || getsockname(fd, any, &size) != 0) fail("listen");
  std::printf("%d\n", ntohs(address.sin_port));
  std::fflush(stdout);
  return accept(fd, nullptr, nullptr);
}

/// One end's calls, by libc or by the ring.
struct End {
  int fd;
  Ring* ring = nullptr;
  void put(const void* bytes, std::size_t count) const {
    for (std::size_t done = 0; done < count;) {
      const char* from = static_cast<const char*>(bytes) + done;
      const auto left = static_cast<unsigned>(count - done);
      const ssize_t n = ring != nullptr ? ring->send(fd, from, left) : send(fd, from, left, 0);
      if (n <= 0) fail("send");
      done += static_cast<std::size_t>(n);
    }
  }
  /// False: the end came first.
  bool get(void* bytes, std::size_t count) const {
    const ssize_t n = ring != nullptr ? ring->recv(fd, bytes, static_cast<unsigned>(count)) : recv(fd, bytes, count, MSG_WAITALL);
    if (n < 0) fail("recv");
    if (n != 0 && static_cast<std::size_t>(n) != count) fail("a short receive");
    return n != 0;
  }
};

/// Bytes that TCP has sent for this connection, acknowledged or not, which the last of them may not be for a while.
inline std::uint64_t by_tcp(int fd) {
  std::uint64_t sent = 0, again = 0;
  char all[256] = {};
  socklen_t size = sizeof all;
  if (getsockopt(fd, IPPROTO_TCP, TCP_INFO, all, &size) != 0) fail("TCP_INFO");
  std::memcpy(&sent, all + 200, sizeof sent);    // tcpi_bytes_sent
  std::memcpy(&again, all + 208, sizeof again);  // tcpi_bytes_retrans
  return sent - again;
}

/// Plays ball until the client, who is asked before each, says that it is the last.
template <class IsLast>
void play_ball(const End& end, bool is_server, IsLast is_last) {
  for (char ball = 'b'; ball != '!';) {
    if (is_server) {
      if (!end.get(&ball, 1)) fail("the ball");
      if (ball == '!' && end.ring != nullptr) end.ring->rest();
      end.put(&ball, 1);
      continue;
    }
    ball = is_last() ? '!' : 'b';
    end.put(&ball, 1);
    if (!end.get(&ball, 1)) fail("the ball");
  }
  if (end.ring != nullptr) end.ring->rest();
}

/// Until TCP stands still, which is when a lane carries the balls, or for that long.
inline void warm_up(const End& end, bool is_server, std::chrono::milliseconds longest) {
  const auto until = std::chrono::steady_clock::now() + longest;
  std::uint64_t before = 0;
  unsigned still = 0;
  play_ball(end, is_server, [&] {
    const std::uint64_t now = by_tcp(end.fd);
    still = now == before ? still + 1 : 0;
    before = now;
    return still >= 20 || std::chrono::steady_clock::now() > until;
  });
}

inline unsigned char byte_at(std::uint64_t position) { return static_cast<unsigned char>((position * 2654435761U) >> 13); }

/// The client sends, the server sends the same back; of every size.
inline void exchange(const End& end, bool is_server, std::uint64_t& position) {
  constexpr unsigned kRounds = 60;
  for (unsigned round = 1, size = 1; round <= kRounds; ++round, size = size * 7 % 65521) {
    std::vector<unsigned char> sent(size), got(size);
    for (auto& each : sent) each = byte_at(position++);
    if (!is_server) end.put(sent.data(), size);
    if (!end.get(got.data(), size)) fail("the end, too early");
    if (got != sent) fail("other bytes");
    if (round == kRounds && end.ring != nullptr) end.ring->rest();  // what comes next is for the other's calls
    if (is_server) end.put(got.data(), size);
  }
}
