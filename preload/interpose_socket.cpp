// Where connections begin and end: the anchor is the kernel's; we only learn of it.
#include <linux/tcp.h>
#include <netinet/in.h>
#include <sys/time.h>

#include "preload/dispatch.hpp"
#include "preload/epoll_set.hpp"
#include "preload/runtime.hpp"
#include "rdma_core/base/sys.hpp"
#include "sdp/engine.hpp"
#include "sdp/socket_modes.hpp"

using preload::fds;
using preload::Kind;
using preload::libc;
using sdp::Stream;

namespace preload {

void remember_new(int fd, Kind kind) noexcept {
  Stream stale;
  if (fds().take(fd, &stale)) stale.close(-1);
  if (EpollSet::find(fd) != nullptr) EpollSet::drop(fd);
  fds().set_kind(fd, kind);
}

}  // namespace preload

using preload::remember_new;

namespace {

void track(int fd, sdp::Role role) noexcept {
  const Stream stream = preload::track(fd, role);
  if (!stream) return;
  fds().set(fd, stream);
}

int accepted(int listener, int fd) noexcept {
  if (fd < 0) return fd;
  const bool tcp = fds().kind(listener) == Kind::tcp_socket;
  remember_new(fd, tcp ? Kind::tcp_socket : Kind::none);
  if (tcp) track(fd, sdp::Role::acceptor);
  return fd;
}

/// A listener that came by exec or from another process: we never saw its socket().
void learn(int fd) noexcept {
  if (fds().kind(fd) != Kind::none) return;
  int domain = 0, type = 0, protocol = 0;
  socklen_t len = sizeof(int);
  const auto get = [&](int name, int& value) {
    return rdma::sys::call(SYS_getsockopt, fd, SOL_SOCKET, name, rdma::sys::arg(&value), rdma::sys::arg(&len)) == 0;
  };
  if (get(SO_DOMAIN, domain) && get(SO_TYPE, type) && get(SO_PROTOCOL, protocol) && (domain == AF_INET || domain == AF_INET6) &&
      type == SOCK_STREAM && protocol == IPPROTO_TCP)
    fds().set_kind(fd, Kind::tcp_socket);
}

}  // namespace

SDP_EXPORT int socket(int domain, int type, int protocol) noexcept {
  const int fd = libc().socket(domain, type, protocol);
  if (fd < 0) return fd;
  const bool tcp = (domain == AF_INET || domain == AF_INET6) && (type & ~(SOCK_NONBLOCK | SOCK_CLOEXEC)) == SOCK_STREAM &&
                   (protocol == 0 || protocol == IPPROTO_TCP);
  remember_new(fd, tcp ? Kind::tcp_socket : Kind::none);
  return fd;
}

SDP_EXPORT int connect(int fd, const sockaddr* address, socklen_t len) {
  const int r = libc().connect(fd, address, len);
  if ((r == 0 || errno == EINPROGRESS || errno == EINTR) && fds().kind(fd) == Kind::tcp_socket && !fds().find(fd)) {
    const int saved = errno;
    track(fd, sdp::Role::connector);
    errno = saved;
  }
  return r;
}

SDP_EXPORT int __connect(int fd, const sockaddr* address, socklen_t len) { return connect(fd, address, len); }

SDP_EXPORT int accept(int fd, sockaddr* address, socklen_t* len) {
  learn(fd);
  return accepted(fd, libc().accept(fd, address, len));
}
SDP_EXPORT int accept4(int fd, sockaddr* address, socklen_t* len, int flags) {
  learn(fd);
  return accepted(fd, libc().accept4(fd, address, len, flags));
}

SDP_EXPORT int shutdown(int fd, int how) noexcept {
  return preload::dispatch(
      fd, [&](Stream s) { return s.shutdown(fd, how); }, [&](const preload::Libc& c) { return c.shutdown(fd, how); });
}

SDP_EXPORT int setsockopt(int fd, int level, int name, const void* value, socklen_t len) noexcept {
  const Stream stream = fds().find(fd);
  if (!stream) return libc().setsockopt(fd, level, name, value, len);
  const rdma::sys::ProgramCall here;
  if (sdp::is_mode_without_lane(level, name, value, len)) stream.take_down(sdp::LaneReason::mode);
  const int r = libc().setsockopt(fd, level, name, value, len);
  if (r != 0 || level != SOL_SOCKET) return r;
  const bool receives = name == SO_RCVTIMEO || name == sdp::kRcvTimeoNew;
  if (receives || name == SO_SNDTIMEO || name == sdp::kSndTimeoNew)
    stream.set_timeout(receives, sdp::timeout_ns(*static_cast<const timeval*>(value)));
  if (name == SO_LINGER) stream.set_linger(fd);
  return r;
}

// The kernel knows the options. Not all of its answers are about the connection alone.
SDP_EXPORT int getsockopt(int fd, int level, int name, void* value, socklen_t* len) noexcept {
  const Stream stream = fds().find(fd);
  if (!stream) return libc().getsockopt(fd, level, name, value, len);
  const rdma::sys::ProgramCall here;
  // It receives.
  if (level == IPPROTO_TCP && name == TCP_ZEROCOPY_RECEIVE) stream.take_down(sdp::LaneReason::mode);
  const int r = libc().getsockopt(fd, level, name, value, len);
  if (r == 0 && level == SOL_SOCKET && name == SO_LINGER) stream.show_linger(value, *len);
  return r;
}
