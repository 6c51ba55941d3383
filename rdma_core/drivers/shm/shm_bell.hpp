// Bells: how a completion channel of one process is rung, from inside and by peers, also by those of other users.
//
// A bell is a connected pair of Unix stream sockets. The process polls the near one; whoever has a copy of the far one rings by
// shutting it down for writing, once more each time, for the kernel tells the near one's pollers of each of these calls (Linux,
// unix_shutdown(); OwnBell::open() looks that it does). Such a call never waits, whatever a stranger does to the socket, leaves
// nothing behind that somebody would have to read, and nothing can be sent through an end that was shut down. An eventfd would be
// neither: who shares one can fill it and take its O_NONBLOCK away, and the next write() sleeps for ever.
#pragma once

#include <sys/types.h>

namespace rdma::shm {

/// Moves `fd` to a high number where the program does not stumble over it; CLOEXEC. Takes it over; returns it, or fd itself if no
/// number is free.
int move_high(int fd) noexcept;

/// The end by which a bell is rung; owns the descriptor.
class FarEnd {
 public:
  FarEnd() = default;
  ~FarEnd() { drop(); }
  FarEnd(const FarEnd&) = delete;
  FarEnd& operator=(const FarEnd&) = delete;
  /// Takes `fd` over, whatever a stranger sent. False (and closed) if it is no Unix stream socket.
  bool adopt(int fd) noexcept;
  /// Puts that socket under the number of the one before; takes `fd` over.
  bool replace(int fd) noexcept;
  void drop() noexcept;
  int fd() const noexcept { return fd_; }
  /// Never blocks, never raises a signal.
  void ring() const noexcept;

 private:
  bool remember() noexcept;

  int fd_ = -1;
  dev_t device_ = 0;  ///< what was under the number; a socket's inode is its alone
  ino_t inode_ = 0;
};

/// A bell of our own.
class OwnBell {
 public:
  OwnBell() = default;
  ~OwnBell();
  OwnBell(const OwnBell&) = delete;
  OwnBell& operator=(const OwnBell&) = delete;
  /// 0 or -errno; ENOTSUP: this kernel does not ring so.
  int open() noexcept;
  /// Puts a new pair under the same numbers: the old one is shared with the parent. Where none is to be had both are -1, and peers
  /// cannot be given one.
  void renew_in_child() noexcept;
  int fd() const noexcept { return fd_; }            ///< to be polled, for edges; ready at once
  int far_fd() const noexcept { return far_.fd(); }  ///< for peers
  void ring() const noexcept { far_.ring(); }

 private:
  int fd_ = -1;
  FarEnd far_;
};

/// A peer's bell. Ringing is rare.
class PeerBell {
 public:
  bool adopt(int fd) noexcept { return far_.adopt(fd); }
  void use_own(const OwnBell& bell) noexcept { own_ = &bell; }
  void ring() const noexcept { own_ != nullptr ? own_->ring() : far_.ring(); }

 private:
  FarEnd far_;
  const OwnBell* own_ = nullptr;
};

}  // namespace rdma::shm
