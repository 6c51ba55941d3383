// sendmmsg and recvmmsg: message by message, as the kernel has them.
#include <sys/socket.h>

#include <algorithm>
#include <cerrno>
#include <climits>

#include "rdma_core/base/clock.hpp"
#include "rdma_core/base/program_call.hpp"
#include "rdma_core/base/sys.hpp"
#include "rdma_core/base/user_memory.hpp"
#include "sdp/stream.hpp"
#include "sdp/stream_impl.hpp"

namespace sdp {

namespace sys = rdma::sys;

namespace {

constexpr std::int64_t kSecond = 1'000'000'000;

std::size_t length_of(const msghdr& msg) noexcept {
  std::size_t sum = 0;
  for (std::size_t i = 0; i < msg.msg_iovlen; ++i) sum += msg.msg_iov[i].iov_len;
  return sum;
}

bool set_length(mmsghdr& msg, std::int64_t bytes) noexcept {
  if (!rdma::can_overwrite(&msg.msg_len, sizeof msg.msg_len)) return false;
  msg.msg_len = static_cast<unsigned>(bytes);
  return true;
}

}  // namespace

std::int64_t Stream::sendmmsg(int fd, mmsghdr* msgs, unsigned count, int flags) const {
  unsigned sent = 0;
  std::int64_t n = 0;
  for (bool whole = true; whole && sent < std::min<unsigned>(count, IOV_MAX); ++sent) {
    mmsghdr& msg = msgs[sent];
    n = rdma::is_readable(&msg, sizeof msg) ? sendmsg(fd, &msg.msg_hdr, flags) : -EFAULT;
    if (n >= 0) whole = static_cast<std::size_t>(n) == length_of(msg.msg_hdr);
    if (n >= 0 && !set_length(msg, n)) n = -EFAULT;
    if (n < 0) break;
  }
  return sent > 0 ? sent : n;
}

// The time is looked at between messages only.
std::int64_t Stream::recvmmsg(int fd, mmsghdr* msgs, unsigned count, int flags, timespec* timeout) const {
  StreamImpl* const s = impl();
  const bool timeout_is_sound = timeout == nullptr || (rdma::is_readable(timeout, sizeof *timeout) && timeout->tv_sec >= 0 &&
                                                       timeout->tv_nsec >= 0 && timeout->tv_nsec < kSecond);
  if (!timeout_is_sound || (flags & MSG_ERRQUEUE) != 0)
    return sys::blocking_call(sys::EndedBy::nothing, SYS_recvmmsg, fd, sys::arg(msgs), count, flags, sys::arg(timeout));
  if (const auto by_kernel = s->recvmmsg_before_lane(fd, msgs, count, flags, timeout)) return *by_kernel;

  const rdma::SteadyClock clock;
  const std::int64_t end_ns = timeout != nullptr ? clock.now() + timeout->tv_sec * kSecond + timeout->tv_nsec : 0;
  std::int64_t left_ns = 1;
  unsigned got = 0;
  std::int64_t n = 0;
  int each = flags & ~MSG_WAITFORONE;
  for (bool urgent = false; got < count && !urgent && left_ns > 0; ++got) {
    mmsghdr& msg = msgs[got];
    n = rdma::is_readable(&msg, sizeof msg) ? recvmsg(fd, &msg.msg_hdr, each) : -EFAULT;
    if (n >= 0 && !set_length(msg, n)) n = -EFAULT;
    if (n < 0) break;
    if (flags & MSG_WAITFORONE) each |= MSG_DONTWAIT;
    if (timeout != nullptr) left_ns = std::max<std::int64_t>(end_ns - clock.now(), 0);
    urgent = (msg.msg_hdr.msg_flags & MSG_OOB) != 0;
  }
  if (got == 0) return n;
  s->owe(n, generation());
  if (timeout != nullptr) {
    if (!rdma::can_overwrite(timeout, sizeof *timeout)) return -EFAULT;
    *timeout = {left_ns / kSecond, left_ns % kSecond};
  }
  return got;
}

// There the kernel does it all; what it has moved is counted. Empty: there is a lane.
std::optional<std::int64_t> StreamImpl::recvmmsg_before_lane(int at, mmsghdr* msgs, unsigned count, int flags, timespec* timeout) {
  if (phase.load(std::memory_order_acquire) == Phase::laned) return {};
  if (may_have_to_await_lane())
    if (const int r = await_lane(at, flags, false); r != 0) return r;
  kernel_receivers.fetch_add(1, std::memory_order_seq_cst);
  const Counted here(kernel_receivers);
  if (phase.load(std::memory_order_seq_cst) == Phase::laned) return {};
  const long n = sys::blocking_call(sys::EndedBy::nothing, SYS_recvmmsg, at, sys::arg(msgs), count, flags, sys::arg(timeout));
  if (n <= 0) return n;
  if (msgs[0].msg_len == 0 && length_of(msgs[0].msg_hdr) != 0)
    if (const int error = end_of_stream(); error != 0) return error;
  if ((flags & (MSG_PEEK | MSG_OOB)) != 0) return n;
  if (flags & MSG_TRUNC) transcript.received.close();
  std::uint64_t bytes = 0;
  for (long i = 0; i < n; ++i) {
    const msghdr& msg = msgs[i].msg_hdr;
    if (transcript.received.is_open() && msgs[i].msg_len != 0)
      transcript.received.add({msg.msg_iov, msg.msg_iovlen}, msgs[i].msg_len, kernel_receivers.load(std::memory_order_acquire));
    bytes += msgs[i].msg_len;
  }
  count_tcp(false, static_cast<std::int64_t>(bytes));
  return n;
}

}  // namespace sdp
