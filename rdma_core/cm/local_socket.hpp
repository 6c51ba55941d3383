// The Unix sockets over which two processes of one host meet: their names, the kernel's word for who is at the other end, and
// frames with descriptors.
#pragma once

#include <sys/socket.h>
#include <sys/un.h>

#include <cstddef>
#include <cstdint>
#include <cstring>

#include "rdma_core/base/sys.hpp"
#include "rdma_core/cm/local_wire.hpp"

namespace rdma::cm {

/// "\0sdpreload/1/COOKIE": abstract, so it belongs to the network namespace and leaves nothing behind.
socklen_t name_of(std::uint64_t cookie, sockaddr_un& address) noexcept;

/// Does `uid` name one user? The overflow uid stands for every user that this user namespace does not map; where all are mapped it
/// is the ordinary user nobody.
bool proves_identity(std::uint32_t uid) noexcept;

/// Out of the program's way; the caller closes it. Negative: -errno.
int new_socket() noexcept;

bool peer_credentials(int fd, ucred& out) noexcept;

/// A frame as received. Descriptors that nobody took are closed with it.
struct Frame {
  std::byte bytes[wire::kMaxFrame];
  std::size_t size = 0;
  int fds[4] = {-1, -1, -1, -1};
  int fd_count = 0;

  ~Frame() {
    for (int i = 0; i < fd_count; ++i)
      if (fds[i] >= 0) sys::call(SYS_close, fds[i]);
  }
  int take(int i) noexcept {
    const int fd = fds[i];
    fds[i] = -1;
    return fd;
  }
  template <class T>
  bool as(wire::Type type, T& out) const noexcept {
    if (size != sizeof(T)) return false;
    std::memcpy(&out, bytes, sizeof out);
    return out.head.magic == wire::kMagic && out.head.version == wire::kVersion &&
           out.head.type == static_cast<std::uint16_t>(type) && out.head.bytes == sizeof(T);
  }
};

/// >0: a frame; 0: the peer is gone; <0: -errno.
long receive(int fd, Frame& frame) noexcept;

/// False: not sent, nor any part of it. The descriptors stay the caller's.
bool send_bytes(int fd, const void* bytes, std::size_t size, const int* fds, int fd_count) noexcept;
template <class T>
bool send_frame(int fd, const T& frame, const int* fds = nullptr, int fd_count = 0) noexcept {
  return send_bytes(fd, &frame, sizeof frame, fds, fd_count);
}

}  // namespace rdma::cm
