// Descriptors: close, dup, fcntl, ioctl, and stdio on a socket.
#include <linux/close_range.h>
#include <linux/sockios.h>

#include <algorithm>
#include <cstdarg>
#include <cstdio>
#include <cstring>

#include "preload/dispatch.hpp"
#include "preload/epoll_set.hpp"
#include "rdma_core/base/sys.hpp"
#include "rdma_core/base/user_memory.hpp"
#include "sdp/engine.hpp"

using preload::EpollSet;
using preload::fds;
using preload::libc;
using sdp::Stream;

namespace {

/// Everything that must happen before the kernel's close of `fd`.
void before_close(int fd) noexcept {
  if (fds().kind(fd) == preload::Kind::none || sdp::engine::in_vfork_child()) return;
  const rdma::sys::ProgramCall here;
  Stream stream;
  if (fds().kind(fd) == preload::Kind::epoll_set) EpollSet::drop(fd);
  const Stream named = fds().find(fd);
  const bool last = fds().take(fd, &stream);
  if (named) EpollSet::on_closing(fd, named, last);
  if (last) stream.close(fd);
}

void duplicated(int from, int to) noexcept {
  if (fds().kind(from) == preload::Kind::none && fds().kind(to) == preload::Kind::none) return;
  // The table is the parent's. What a vfork child duplicates is for the program that it is about to run.
  if (sdp::engine::in_vfork_child()) {
    if (const sdp::Stream stream = fds().find(from)) stream.leave_to_program();
    return;
  }
  const rdma::sys::ProgramCall here;
  fds().duplicate(from, to);
  if (fds().kind(from) == preload::Kind::epoll_set) EpollSet::duplicate(from, to);
}

}  // namespace

SDP_EXPORT int close(int fd) {
  if (sdp::engine::is_helper_fd(fd)) {
    errno = EBADF;
    return -1;
  }
  if (fd >= 0) before_close(fd);
  return libc().close(fd);
}

SDP_EXPORT int dup(int fd) noexcept {
  const int to = libc().dup(fd);
  if (to >= 0) duplicated(fd, to);
  return to;
}
SDP_EXPORT int dup2(int from, int to) noexcept {
  if (sdp::engine::is_helper_fd(to)) {
    errno = EBUSY;
    return -1;
  }
  if (from != to && to >= 0 && rdma::sys::call(SYS_fcntl, from, F_GETFD) >= 0) before_close(to);
  const int r = libc().dup2(from, to);
  if (r >= 0 && from != to) duplicated(from, to);
  return r;
}
SDP_EXPORT int dup3(int from, int to, int flags) noexcept {
  if (sdp::engine::is_helper_fd(to)) {
    errno = EBUSY;
    return -1;
  }
  if (from != to && to >= 0 && (flags & ~O_CLOEXEC) == 0 && rdma::sys::call(SYS_fcntl, from, F_GETFD) >= 0) before_close(to);
  const int r = libc().dup3(from, to, flags);
  if (r >= 0) duplicated(from, to);
  return r;
}

SDP_EXPORT int fcntl(int fd, int command, ...) {
  va_list args;
  va_start(args, command);
  void* const arg = va_arg(args, void*);
  va_end(args);
  const Stream stream = fds().find(fd);
  const auto number = reinterpret_cast<long>(arg);
  if (stream && command == F_SETFL && (number & O_ASYNC)) stream.take_down(sdp::LaneReason::mode);
  const int r = libc().fcntl(fd, command, arg);
  if (r < 0) return r;
  if (command == F_DUPFD || command == F_DUPFD_CLOEXEC) duplicated(fd, r);
  if (stream && command == F_SETFL && !sdp::engine::in_vfork_child()) stream.set_nonblocking((number & O_NONBLOCK) != 0);
  return r;
}
SDP_EXPORT int fcntl64(int fd, int command, ...) {
  va_list args;
  va_start(args, command);
  void* const arg = va_arg(args, void*);
  va_end(args);
  return fcntl(fd, command, arg);
}

SDP_EXPORT int ioctl(int fd, unsigned long request, ...) noexcept {
  va_list args;
  va_start(args, request);
  void* const arg = va_arg(args, void*);
  va_end(args);
  return preload::dispatch(
      fd,
      [&](Stream stream) -> std::int64_t {
        if ((request == FIONREAD || request == SIOCOUTQ || request == SIOCATMARK) && rdma::can_overwrite(arg, sizeof(int))) {
          const int n = request == FIONREAD ? stream.inq(fd) : request == SIOCOUTQ ? stream.outq(fd) : stream.at_mark(fd);
          if (n >= 0) *static_cast<int*>(arg) = n;
          return std::min(n, 0);
        }
        if (request == FIOASYNC) stream.take_down(sdp::LaneReason::mode);
        const long r = rdma::sys::call(SYS_ioctl, fd, static_cast<long>(request), rdma::sys::arg(arg));
        if (r == 0 && request == FIONBIO && arg != nullptr) stream.set_nonblocking(*static_cast<int*>(arg) != 0);
        return r;
      },
      [&](const preload::Libc& c) { return c.ioctl(fd, request, arg); });
}

SDP_EXPORT int close_range(unsigned first, unsigned last, int flags) noexcept {
  const auto real = libc().close_range;
  if (first > last || (flags & ~CLOSE_RANGE_UNSHARE) != 0) return real(first, last, flags);
  const unsigned high = std::min(last, 4096U);
  for (unsigned fd = first; fd <= std::min<unsigned>(last, static_cast<unsigned>(fds().highest())) && fd < preload::FdTable::kMax;
       ++fd)
    before_close(static_cast<int>(fd));
  // Our own descriptors are left out: the range is closed in pieces around them.
  unsigned from = first;
  for (unsigned fd = first; fd < high; ++fd) {
    if (!sdp::engine::is_helper_fd(static_cast<int>(fd))) continue;
    if (fd > from && real(from, fd - 1, flags) != 0) return -1;
    from = fd + 1;
  }
  return from <= last ? real(from, last, flags) : 0;
}
SDP_EXPORT void closefrom(int first) noexcept { close_range(static_cast<unsigned>(std::max(first, 0)), ~0U, 0); }

// --- stdio reads, writes and closes inside libc, out of our sight

namespace {
/// What close() does before the kernel's close, for the descriptor of a stdio stream that is about to lose it.
void before_stdio_close(FILE* file) noexcept {
  if (file == nullptr) return;
  const int saved = errno;
  const int fd = fileno(file);
  if (fd >= 0 && fds().kind(fd) != preload::Kind::none) {
    std::fflush(file);
    before_close(fd);
  }
  errno = saved;
}
}  // namespace

SDP_EXPORT int fclose(FILE* file) {
  before_stdio_close(file);
  return libc().fclose(file);
}
SDP_EXPORT int _IO_fclose(FILE* file) { return fclose(file); }
SDP_EXPORT FILE* freopen(const char* path, const char* mode, FILE* file) {
  before_stdio_close(file);
  return libc().freopen(path, mode, file);
}
SDP_EXPORT FILE* freopen64(const char* path, const char* mode, FILE* file) { return freopen(path, mode, file); }

SDP_EXPORT FILE* fdopen(int fd, const char* mode) noexcept {
  static const auto real = reinterpret_cast<decltype(&::fdopen)>(preload::next_symbol("fdopen"));
  const bool writes = rdma::is_readable(mode, 1) && (mode[0] != 'r' || std::strchr(mode, '+') != nullptr);
  if (writes && !preload::leave_lane_to_libc(fd)) return nullptr;
  preload::leave_lane(fd, sdp::LaneReason::mode);
  return real(fd, mode);
}
SDP_EXPORT FILE* _IO_fdopen(int fd, const char* mode) noexcept { return fdopen(fd, mode); }
SDP_EXPORT int vdprintf(int fd, const char* format, va_list args) {
  static const auto real = reinterpret_cast<decltype(&::vdprintf)>(preload::next_symbol("vdprintf"));
  if (!preload::leave_lane_to_send(fd)) return -1;
  return real(fd, format, args);
}
SDP_EXPORT int dprintf(int fd, const char* format, ...) {
  va_list args;
  va_start(args, format);
  const int r = vdprintf(fd, format, args);
  va_end(args);
  return r;
}
// The fortified ones look at the format as well: with libc's eyes.
SDP_EXPORT int __vdprintf_chk(int fd, int flag, const char* format, va_list args) {
  static const auto real = reinterpret_cast<int (*)(int, int, const char*, va_list)>(preload::next_symbol("__vdprintf_chk"));
  if (!preload::leave_lane_to_send(fd)) return -1;
  return real(fd, flag, format, args);
}
SDP_EXPORT int __dprintf_chk(int fd, int flag, const char* format, ...) {
  va_list args;
  va_start(args, format);
  const int r = __vdprintf_chk(fd, flag, format, args);
  va_end(args);
  return r;
}

// --- names of libc's own, which some old libraries use

SDP_EXPORT int __close(int fd) { return close(fd); }
SDP_EXPORT int __dup2(int from, int to) noexcept { return dup2(from, to); }
SDP_EXPORT int __fcntl(int fd, int command, ...) {
  va_list args;
  va_start(args, command);
  const long argument = va_arg(args, long);
  va_end(args);
  return fcntl(fd, command, argument);
}
