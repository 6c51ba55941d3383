#include "rdma_core/cm/local_socket.hpp"

#include <fcntl.h>

#include <cstdio>

#include "rdma_core/drivers/shm/shm_device.hpp"

namespace rdma::cm {

namespace {
constexpr std::uint32_t kOverflowUid = 65534;
}  // namespace

socklen_t name_of(std::uint64_t cookie, sockaddr_un& address) noexcept {
  address = {};
  address.sun_family = AF_UNIX;
  const int n = std::snprintf(address.sun_path + 1, sizeof address.sun_path - 1, "sdpreload/1/%016llx",
                              static_cast<unsigned long long>(cookie));
  return static_cast<socklen_t>(offsetof(sockaddr_un, sun_path) + 1 + static_cast<std::size_t>(n));
}

bool proves_identity(std::uint32_t uid) noexcept {
  if (uid != kOverflowUid) return true;
  char map[128];
  const long fd = sys::call(SYS_openat, AT_FDCWD, sys::arg("/proc/self/uid_map"), O_RDONLY | O_CLOEXEC);
  if (fd < 0) return false;
  const long n = sys::call(SYS_read, fd, sys::arg(map), sizeof map - 1);
  sys::call(SYS_close, fd);
  if (n <= 0) return false;
  map[n] = '\0';
  unsigned inside = 1, outside = 1, count = 0;
  return std::sscanf(map, "%u %u %u", &inside, &outside, &count) == 3 && inside == 0 && outside == 0 && count == ~0U;
}

int new_socket() noexcept {
  return shm::move_high(static_cast<int>(sys::call(SYS_socket, AF_UNIX, SOCK_SEQPACKET | SOCK_NONBLOCK | SOCK_CLOEXEC, 0)));
}

bool peer_credentials(int fd, ucred& out) noexcept {
  socklen_t len = sizeof out;
  return sys::call(SYS_getsockopt, fd, SOL_SOCKET, SO_PEERCRED, sys::arg(&out), sys::arg(&len)) == 0;
}

long receive(int fd, Frame& frame) noexcept {
  iovec iov{frame.bytes, sizeof frame.bytes};
  alignas(cmsghdr) char control[CMSG_SPACE(sizeof frame.fds)] = {};
  msghdr msg{};
  msg.msg_iov = &iov;
  msg.msg_iovlen = 1;
  msg.msg_control = control;
  msg.msg_controllen = sizeof control;
  const long n = sys::call(SYS_recvmsg, fd, sys::arg(&msg), MSG_DONTWAIT | MSG_CMSG_CLOEXEC);
  if (n < 0) return n;
  for (cmsghdr* c = CMSG_FIRSTHDR(&msg); c != nullptr; c = CMSG_NXTHDR(&msg, c)) {
    if (c->cmsg_level != SOL_SOCKET || c->cmsg_type != SCM_RIGHTS) continue;
    const int count = static_cast<int>((c->cmsg_len - CMSG_LEN(0)) / sizeof(int));
    for (int i = 0; i < count; ++i) {
      int received = -1;
      std::memcpy(&received, CMSG_DATA(c) + static_cast<std::size_t>(i) * sizeof(int), sizeof received);
      if (frame.fd_count < 4)
        frame.fds[frame.fd_count++] = received;
      else
        sys::call(SYS_close, received);
    }
  }
  frame.size = msg.msg_flags & MSG_TRUNC ? 0 : static_cast<std::size_t>(n);
  return n;
}

bool send_bytes(int fd, const void* bytes, std::size_t size, const int* fds, int fd_count) noexcept {
  iovec iov{const_cast<void*>(bytes), size};
  alignas(cmsghdr) char control[CMSG_SPACE(4 * sizeof(int))] = {};
  msghdr msg{};
  msg.msg_iov = &iov;
  msg.msg_iovlen = 1;
  if (fd_count > 0) {
    msg.msg_control = control;
    msg.msg_controllen = CMSG_SPACE(static_cast<std::size_t>(fd_count) * sizeof(int));
    cmsghdr* c = CMSG_FIRSTHDR(&msg);
    c->cmsg_level = SOL_SOCKET;
    c->cmsg_type = SCM_RIGHTS;
    c->cmsg_len = CMSG_LEN(static_cast<std::size_t>(fd_count) * sizeof(int));
    std::memcpy(CMSG_DATA(c), fds, static_cast<std::size_t>(fd_count) * sizeof(int));
  }
  return sys::call(SYS_sendmsg, fd, sys::arg(&msg), MSG_DONTWAIT | MSG_NOSIGNAL) == static_cast<long>(size);
}

}  // namespace rdma::cm
