// read, write, send, recv and their kin.
#include <aio.h>
#include <dlfcn.h>
#include <limits.h>
#include <sys/sendfile.h>
#include <sys/uio.h>

#include <cstring>

#include "preload/dispatch.hpp"
#include "rdma_core/base/sys.hpp"
#include "rdma_core/base/user_memory.hpp"

using preload::dispatch;
using preload::dispatch_cancellable;
using preload::fds;
using preload::leave_lane;
using preload::leave_lane_to_send;
using preload::Libc;
using sdp::Stream;
namespace sys = rdma::sys;

namespace {
/// False: the kernel has an error for these iovecs, or nothing to do.
bool moves_bytes(const iovec* iov, int count) noexcept {
  if (count <= 0 || count > IOV_MAX || !rdma::is_readable(iov, static_cast<size_t>(count) * sizeof *iov)) return false;
  size_t sum = 0;
  for (int i = 0; i < count; ++i) {
    if (static_cast<ssize_t>(iov[i].iov_len) < 0) return false;
    sum |= iov[i].iov_len;
  }
  return sum != 0;
}

template <class F>
F next(const char* name) noexcept {
  return reinterpret_cast<F>(preload::next_symbol(name));
}
}  // namespace

SDP_EXPORT ssize_t read(int fd, void* buf, size_t len) {
  if (len == 0) [[unlikely]]
    return preload::libc().read(fd, buf, len);  // unlike recv, it waits for nothing then
  return dispatch_cancellable(
      fd, [&](Stream s) { return s.recv(fd, buf, len, 0); }, [&](const Libc& c) { return c.read(fd, buf, len); });
}
SDP_EXPORT ssize_t write(int fd, const void* buf, size_t len) {
  return dispatch_cancellable(
      fd, [&](Stream s) { return s.send(fd, buf, len, 0); }, [&](const Libc& c) { return c.write(fd, buf, len); });
}
SDP_EXPORT ssize_t recv(int fd, void* buf, size_t len, int flags) {
  return dispatch_cancellable(
      fd, [&](Stream s) { return s.recv(fd, buf, len, flags); }, [&](const Libc& c) { return c.recv(fd, buf, len, flags); });
}
SDP_EXPORT ssize_t send(int fd, const void* buf, size_t len, int flags) {
  return dispatch_cancellable(
      fd, [&](Stream s) { return s.send(fd, buf, len, flags); }, [&](const Libc& c) { return c.send(fd, buf, len, flags); });
}
SDP_EXPORT ssize_t recvfrom(int fd, void* buf, size_t len, int flags, sockaddr* from, socklen_t* from_len) {
  return dispatch_cancellable(
      fd,
      [&](Stream s) -> std::int64_t {
        if (flags & MSG_ERRQUEUE) return sys::call(SYS_recvfrom, fd, sys::arg(buf), len, flags, sys::arg(from), sys::arg(from_len));
        const auto n = s.recv(fd, buf, len, flags);
        if (n < 0 || from == nullptr) return n;
        if (!rdma::is_readable(from_len, sizeof *from_len)) return -EFAULT;
        if (static_cast<int>(*from_len) < 0) return -EINVAL;
        *from_len = 0;
        return n;
      },
      [&](const Libc& c) { return c.recvfrom(fd, buf, len, flags, from, from_len); });
}
SDP_EXPORT ssize_t sendto(int fd, const void* buf, size_t len, int flags, const sockaddr* to, socklen_t to_len) {
  return dispatch_cancellable(
      fd, [&](Stream s) { return s.send(fd, buf, len, flags); },
      [&](const Libc& c) { return c.sendto(fd, buf, len, flags, to, to_len); });
}
SDP_EXPORT ssize_t recvmsg(int fd, msghdr* msg, int flags) {
  return dispatch_cancellable(
      fd, [&](Stream s) { return s.recvmsg(fd, msg, flags); }, [&](const Libc& c) { return c.recvmsg(fd, msg, flags); });
}
namespace {
/// Connections that go to another process by SCM_RIGHTS: it has no lane of theirs, and may use them at once. False: errno is set.
bool leave_lanes_to_receiver(const msghdr* msg) noexcept {
  if (!rdma::is_readable(msg, sizeof *msg) || msg->msg_control == nullptr ||
      !rdma::is_readable(msg->msg_control, msg->msg_controllen))
    return true;
  auto* const head = const_cast<msghdr*>(msg);
  for (cmsghdr* each = CMSG_FIRSTHDR(head); each != nullptr; each = CMSG_NXTHDR(head, each)) {
    if (each->cmsg_level != SOL_SOCKET || each->cmsg_type != SCM_RIGHTS || each->cmsg_len < CMSG_LEN(0)) continue;
    const auto* const data = CMSG_DATA(each);
    for (std::size_t at = 0; at + sizeof(int) <= each->cmsg_len - CMSG_LEN(0); at += sizeof(int)) {
      int passed;
      std::memcpy(&passed, data + at, sizeof passed);
      if (!preload::leave_lane_to_libc(passed, sdp::LaneReason::second_process)) return false;
    }
  }
  return true;
}
}  // namespace

SDP_EXPORT ssize_t sendmsg(int fd, const msghdr* msg, int flags) {
  if (!fds().find(fd) && !leave_lanes_to_receiver(msg)) return -1;
  return dispatch_cancellable(
      fd, [&](Stream s) { return s.sendmsg(fd, msg, flags); }, [&](const Libc& c) { return c.sendmsg(fd, msg, flags); });
}
SDP_EXPORT int recvmmsg(int fd, mmsghdr* msgs, unsigned count, int flags, timespec* timeout) {
  static const auto real = next<decltype(&::recvmmsg)>("recvmmsg");
  return dispatch_cancellable(
      fd, [&](Stream s) { return s.recvmmsg(fd, msgs, count, flags, timeout); },
      [&](const Libc&) { return real(fd, msgs, count, flags, timeout); });
}
SDP_EXPORT int sendmmsg(int fd, mmsghdr* msgs, unsigned count, int flags) {
  static const auto real = next<decltype(&::sendmmsg)>("sendmmsg");
  if (!fds().find(fd) && rdma::is_readable(msgs, count * sizeof *msgs))
    for (unsigned i = 0; i < count; ++i)
      if (!leave_lanes_to_receiver(&msgs[i].msg_hdr)) return -1;
  if (const Stream s = fds().find(fd); !s || s.stays_on_tcp()) return real(fd, msgs, count, flags);
  return dispatch_cancellable(
      fd, [&](Stream s) { return s.sendmmsg(fd, msgs, count, flags); }, [&](const Libc&) { return real(fd, msgs, count, flags); });
}

namespace {
std::int64_t receive_vector(Stream s, int fd, const iovec* iov, int count, int flags) {
  if (!moves_bytes(iov, count)) return sys::call(SYS_readv, fd, sys::arg(iov), count);
  msghdr msg{};
  msg.msg_iov = const_cast<iovec*>(iov);
  msg.msg_iovlen = static_cast<size_t>(count);
  return s.recvmsg(fd, &msg, flags);
}
std::int64_t send_vector(Stream s, int fd, const iovec* iov, int count, int flags) {
  if (!moves_bytes(iov, count)) return sys::call(SYS_writev, fd, sys::arg(iov), count);
  msghdr msg{};
  msg.msg_iov = const_cast<iovec*>(iov);
  msg.msg_iovlen = static_cast<size_t>(count);
  return s.sendmsg(fd, &msg, flags);
}

constexpr int kNothingOnSockets = RWF_HIPRI | RWF_DSYNC | RWF_SYNC | RWF_APPEND;
/// The kernel has another answer, or we do not know what the flags mean: it is the kernel's call.
bool is_for_kernel(off_t at, int flags) noexcept { return at != -1 || (flags & ~(kNothingOnSockets | RWF_NOWAIT)) != 0; }

/// Linux 6.5 and later.
bool sockets_take_nowait() noexcept {
  static const bool take = [] {
    int ends[2] = {-1, -1};
    if (sys::call(SYS_socketpair, AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, sys::arg(ends)) != 0) return false;
    char byte = 0;
    const iovec one{&byte, 1};
    const long r = sys::call(SYS_preadv2, ends[0], sys::arg(&one), 1, -1, -1, RWF_NOWAIT);
    for (const int fd : ends) sys::call(SYS_close, fd);
    return r == -EAGAIN;
  }();
  return take;
}

template <class Move>
std::int64_t move_vector(Move move, Stream s, int fd, const iovec* iov, int count, int flags) {
  const bool nowait = (flags & RWF_NOWAIT) != 0;
  if (nowait && moves_bytes(iov, count) && !sockets_take_nowait()) return -EOPNOTSUPP;
  return move(s, fd, iov, count, nowait ? MSG_DONTWAIT : 0);
}
}  // namespace

SDP_EXPORT ssize_t readv(int fd, const iovec* iov, int count) {
  return dispatch_cancellable(
      fd, [&](Stream s) { return receive_vector(s, fd, iov, count, 0); }, [&](const Libc& c) { return c.readv(fd, iov, count); });
}
SDP_EXPORT ssize_t writev(int fd, const iovec* iov, int count) {
  return dispatch_cancellable(
      fd, [&](Stream s) { return send_vector(s, fd, iov, count, 0); }, [&](const Libc& c) { return c.writev(fd, iov, count); });
}
SDP_EXPORT ssize_t preadv2(int fd, const iovec* iov, int count, off_t at, int flags) {
  static const auto real = next<decltype(&::preadv2)>("preadv2");
  if (is_for_kernel(at, flags)) {
    if (at == -1) leave_lane(fd, sdp::LaneReason::mode);
    return real(fd, iov, count, at, flags);
  }
  return dispatch_cancellable(
      fd, [&](Stream s) { return move_vector(receive_vector, s, fd, iov, count, flags); },
      [&](const Libc&) { return real(fd, iov, count, at, flags); });
}
SDP_EXPORT ssize_t pwritev2(int fd, const iovec* iov, int count, off_t at, int flags) {
  static const auto real = next<decltype(&::pwritev2)>("pwritev2");
  if (is_for_kernel(at, flags)) {
    if (at == -1 && !leave_lane_to_send(fd, (flags & RWF_NOWAIT) != 0)) return -1;
    return real(fd, iov, count, at, flags);
  }
  return dispatch_cancellable(
      fd, [&](Stream s) { return move_vector(send_vector, s, fd, iov, count, flags); },
      [&](const Libc&) { return real(fd, iov, count, at, flags); });
}
SDP_EXPORT ssize_t preadv64v2(int fd, const iovec* iov, int count, off64_t at, int flags) {
  return preadv2(fd, iov, count, at, flags);
}
SDP_EXPORT ssize_t pwritev64v2(int fd, const iovec* iov, int count, off64_t at, int flags) {
  return pwritev2(fd, iov, count, at, flags);
}
SDP_EXPORT ssize_t sendfile(int out, int in, off_t* offset, size_t count) {
  leave_lane(in, sdp::LaneReason::mode);
  return dispatch(
      out, [&](Stream s) { return s.sendfile(out, in, offset, count); },
      [&](const Libc& c) { return c.sendfile(out, in, offset, count); });
}
SDP_EXPORT ssize_t sendfile64(int out, int in, off64_t* offset, size_t count) { return sendfile(out, in, offset, count); }

// --- what no lane carries (yet): the stream goes on by TCP

SDP_EXPORT ssize_t splice(int in, off64_t* in_at, int out, off64_t* out_at, size_t len, unsigned flags) {
  static const auto real = next<decltype(&::splice)>("splice");
  leave_lane(in, sdp::LaneReason::mode);
  if (!leave_lane_to_send(out, (flags & SPLICE_F_NONBLOCK) != 0)) return -1;
  return real(in, in_at, out, out_at, len, flags);
}
namespace {
/// libc's threads are about to read or write for the program. False: errno is EAGAIN.
bool leave_for(const aiocb* request, bool writes) noexcept {
  if (!rdma::is_readable(request, sizeof *request)) return true;
  if (writes) return preload::leave_lane_to_libc(request->aio_fildes);
  leave_lane(request->aio_fildes, sdp::LaneReason::mode);
  return true;
}
}  // namespace

SDP_EXPORT int aio_read(aiocb* request) noexcept {
  static const auto real = next<decltype(&::aio_read)>("aio_read");
  (void)leave_for(request, false);
  return real(request);
}
SDP_EXPORT int aio_write(aiocb* request) noexcept {
  static const auto real = next<decltype(&::aio_write)>("aio_write");
  return leave_for(request, true) ? real(request) : -1;
}
SDP_EXPORT int lio_listio(int mode, aiocb* const* requests, int count, sigevent* event) noexcept {
  static const auto real = next<int (*)(int, aiocb* const*, int, sigevent*)>("lio_listio");
  const bool sound = count > 0 && rdma::is_readable(requests, static_cast<size_t>(count) * sizeof(void*));
  bool ready = true;
  for (int i = 0; sound && i < count; ++i)
    if (requests[i] != nullptr) ready = leave_for(requests[i], requests[i]->aio_lio_opcode == LIO_WRITE) && ready;
  if (ready) return real(mode, requests, count, event);
  for (int i = 0; i < count; ++i)
    if (requests[i] != nullptr) requests[i]->__error_code = EAGAIN;  // aio_error(): none has been queued
  return -1;
}
static_assert(sizeof(aiocb) == sizeof(aiocb64));
SDP_EXPORT int aio_read64(aiocb64* request) noexcept { return aio_read(reinterpret_cast<aiocb*>(request)); }
SDP_EXPORT int aio_write64(aiocb64* request) noexcept { return aio_write(reinterpret_cast<aiocb*>(request)); }
SDP_EXPORT int lio_listio64(int mode, aiocb64* const* requests, int count, sigevent* event) noexcept {
  return lio_listio(mode, reinterpret_cast<aiocb* const*>(requests), count, event);
}

// --- names of libc's own, which some old libraries use

SDP_EXPORT ssize_t __read(int fd, void* buf, size_t len) { return read(fd, buf, len); }
SDP_EXPORT ssize_t __write(int fd, const void* buf, size_t len) { return write(fd, buf, len); }
SDP_EXPORT ssize_t __send(int fd, const void* buf, size_t len, int flags) { return send(fd, buf, len, flags); }

// --- fortified names: the check, then the plain call

extern "C" void __chk_fail(void) __attribute__((noreturn));

SDP_EXPORT ssize_t __read_chk(int fd, void* buf, size_t len, size_t room) {
  if (len > room) __chk_fail();
  return read(fd, buf, len);
}
SDP_EXPORT ssize_t __recv_chk(int fd, void* buf, size_t len, size_t room, int flags) {
  if (len > room) __chk_fail();
  return recv(fd, buf, len, flags);
}
SDP_EXPORT ssize_t __recvfrom_chk(int fd, void* buf, size_t len, size_t room, int flags, sockaddr* from, socklen_t* from_len) {
  if (len > room) __chk_fail();
  return recvfrom(fd, buf, len, flags, from, from_len);
}
