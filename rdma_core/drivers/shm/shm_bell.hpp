// Bells: how a completion channel of one process is rung, from inside and by peers. An eventfd, never read.
//
// Between processes of one user the ringer writes to the peer's eventfd. Between users it must not: the peer shares the file's
// O_NONBLOCK and could make our write() sleep for ever. There the ringer sends a frame without waiting on the link's socket, and
// the peer's own service thread rings.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>

namespace rdma::shm {

/// Moves `fd` to a high number where the program does not stumble over it; CLOEXEC. Takes it over; returns it, or fd itself if no
/// number is free.
int move_high(int fd) noexcept;

/// A bell of our own.
class OwnBell {
 public:
  OwnBell() = default;
  ~OwnBell();
  OwnBell(const OwnBell&) = delete;
  OwnBell& operator=(const OwnBell&) = delete;
  int open() noexcept;  ///< 0 or -errno
  /// Puts a new eventfd under the same number: the old one is shared with the parent.
  void renew_in_child() noexcept;
  int fd() const noexcept { return fd_; }
  void ring() const noexcept;

 private:
  int fd_ = -1;
};

/// A peer's bell. Ringing never blocks, never raises a signal, and is rare.
class PeerBell {
 public:
  PeerBell() = default;
  ~PeerBell();
  PeerBell(const PeerBell&) = delete;
  PeerBell& operator=(const PeerBell&) = delete;
  /// Takes `fd` over, whatever a stranger sent. False (and closed) if it is no eventfd.
  bool adopt_eventfd(int fd) noexcept;
  /// Rings by sending `frame` on a connected Unix socket. Both belong to somebody else and outlive this.
  void use_socket(int fd, std::span<const std::byte> frame) noexcept {
    socket_ = fd;
    frame_ = frame;
  }
  void use_own(const OwnBell& bell) noexcept { own_ = &bell; }
  void forget_socket() noexcept { socket_ = -1; }
  void ring() const noexcept;

 private:
  int fd_ = -1;
  int socket_ = -1;
  std::span<const std::byte> frame_;
  const OwnBell* own_ = nullptr;
};

}  // namespace rdma::shm
