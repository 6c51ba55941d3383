// Memory that is not there, and a proof that a connection goes on after it was named.
#pragma once

#include <sys/mman.h>

#include <cstddef>
#include <cstdint>

#include "trace.hpp"

namespace differential {

inline constexpr std::size_t kPage = 4096;

/// Pages of which the last cannot be touched.
class Edge {
 public:
  explicit Edge(std::size_t pages) : good_(pages * kPage) {
    start_ = static_cast<char*>(mmap(nullptr, good_ + kPage, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
    if (start_ == MAP_FAILED || mprotect(end(), kPage, PROT_NONE) != 0) fail("mmap");
  }
  ~Edge() { munmap(start_, good_ + kPage); }
  Edge(const Edge&) = delete;
  Edge& operator=(const Edge&) = delete;
  char* end() const { return start_ + good_; }

 private:
  std::size_t good_;
  char* start_;
};

inline char* nowhere() {
  static const Edge edge(1);
  return edge.end();
}
template <class T>
T* nowhere_as() {
  return static_cast<T*>(static_cast<void*>(nowhere()));
}

/// The connection carries bytes to and fro, and a lane does where there shall be one.
inline void works(Peer& peer, Conn& c) {
  const std::uint64_t before = kernel_bytes(c.fd);
  told("send", c.send(100));
  told("peer", peer.call(Do::echo, 0, 100));
  told("recv", static_cast<long>(c.recv_all(100)));
  say("carried: %d", !lane_expected() || kernel_bytes(c.fd) == before);
}

}  // namespace differential
