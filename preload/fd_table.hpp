// Descriptor → what we know of it. One load for the common case: a descriptor that is no TCP connection of ours.
//
// Threads: lookups are lock-free; the rare changes (dup, close, fork) of entries are atomic stores. A stale Stream is harmless: it
// carries a generation and answers EBADF.
#pragma once

#include <atomic>
#include <cstdint>

#include "sdp/stream.hpp"

namespace preload {

enum class Kind : std::uint8_t { none, tcp_socket, epoll_set };

class FdTable {
 public:
  static constexpr int kMax = 1 << 20;

  sdp::Stream find(int fd) const noexcept {
    if (static_cast<unsigned>(fd) >= kMax) return {};
    return sdp::Stream::from_word(streams_[fd].load(std::memory_order_relaxed));
  }
  Kind kind(int fd) const noexcept {
    return static_cast<unsigned>(fd) < kMax ? kinds_[fd].load(std::memory_order_relaxed) : Kind::none;
  }

  void set_kind(int fd, Kind kind) noexcept {
    if (static_cast<unsigned>(fd) < kMax) kinds_[fd].store(kind, std::memory_order_relaxed);
  }
  void set(int fd, sdp::Stream stream) noexcept;
  /// `to` names the same connection as `from` now.
  void duplicate(int from, int to) noexcept;
  /// Takes the entry out. True if the stream lost its last descriptor in this process.
  bool take(int fd, sdp::Stream* stream) noexcept;
  /// Before fork, in the parent: notes what each stream is at this moment.
  void before_fork() noexcept;
  /// After fork, in the child: every stream is exchanged for the child's own.
  void inherit() noexcept;
  /// After inherit(): the child's own stream in the place of one of the parent's; none of one that no descriptor names.
  sdp::Stream heir_of(sdp::Stream parents) const noexcept;
  /// Has there been a stream at all? Most processes have none.
  bool ever_used() const noexcept { return used_.load(std::memory_order_relaxed); }
  int highest() const noexcept { return highest_.load(std::memory_order_relaxed); }

 private:
  std::atomic<std::uint64_t> streams_[kMax];
  std::atomic<Kind> kinds_[kMax];
  std::atomic<int> highest_;
  std::atomic<bool> used_;
  std::atomic<bool> duplicates_;  ///< some stream has had two descriptors: closing must search
};

extern constinit FdTable fd_table;  // zero pages until touched
inline FdTable& fds() noexcept { return fd_table; }

}  // namespace preload
