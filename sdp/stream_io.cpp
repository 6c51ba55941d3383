// send and recv of a stream, by whichever carrier the byte belongs to.
#include <fcntl.h>
#include <linux/futex.h>
#include <linux/sockios.h>
#include <poll.h>
#include <sys/ioctl.h>
#include <sys/socket.h>

#include <cerrno>
#include <climits>
#include <csignal>
#include <cstring>

#include "rdma_core/base/clock.hpp"
#include "rdma_core/base/log.hpp"
#include "rdma_core/base/program_call.hpp"
#include "rdma_core/base/sys.hpp"
#include "rdma_core/base/user_memory.hpp"
#include "sdp/engine.hpp"
#include "sdp/socket_modes.hpp"
#include "sdp/spinner.hpp"
#include "sdp/stream_impl.hpp"

namespace sdp {

namespace sys = rdma::sys;

namespace {

std::int64_t now_ns() noexcept { return rdma::SteadyClock{}.now(); }
constexpr std::size_t kMaxIov = 64;

/// As recvmsg().
template <class Call>
long receive_message(std::span<iovec> pieces, MessageExtras* extras, Call call) {
  msghdr msg{};
  msg.msg_iov = pieces.data();
  msg.msg_iovlen = pieces.size();
  if (extras != nullptr) {
    msg.msg_control = extras->control;
    msg.msg_controllen = extras->room;
  }
  const long n = call(sys::arg(&msg));
  if (extras != nullptr && n >= 0) {
    extras->used = msg.msg_controllen;
    extras->flags = msg.msg_flags | (extras->flags & MSG_CMSG_CLOEXEC);
  }
  return n;
}

/// Of a receive: it ends the connection, rather than the call alone.
bool is_fatal(std::int64_t error) noexcept {
  return error < 0 && error != -EAGAIN && error != -EINTR && error != -EFAULT && error != -EINVAL && error != -EBADF;
}

/// Of what is left, up to the first page that cannot be read.
std::size_t readable_bytes(IovCursor from) noexcept {
  std::size_t total = 0;
  while (!from.done()) {
    const std::size_t n = rdma::readable_bytes(from.data(), from.chunk());
    total += n;
    if (n != from.chunk()) break;
    from.advance(n);
  }
  return total;
}

}  // namespace

void StreamImpl::owe(std::int64_t error, std::uint16_t gen) noexcept {
  if (!is_fatal(error) || !lock.enter()) return;
  if (generation.load(std::memory_order_relaxed) == gen) error_due = static_cast<int>(error);
  lock.unlock();
}

void StreamImpl::count_tcp(bool sent, std::int64_t bytes) noexcept {
  if (bytes <= 0) return;
  const auto n = static_cast<std::uint64_t>(bytes);
  (sent ? tcp_sent : tcp_received).fetch_add(n, std::memory_order_relaxed);
  if (stats != nullptr) {
    (sent ? stats->tcp.bytes_sent : stats->tcp.bytes_received).add(n);
    (sent ? stats->tcp.messages_sent : stats->tcp.messages_received).add(1);
  }
  if (phase.load(std::memory_order_relaxed) != Phase::plain || is_parents_too()) return;
  const Options& options = engine::options();
  const std::uint32_t messages = tcp_messages.fetch_add(1, std::memory_order_relaxed) + 1;
  if (messages >= options.upgrade_messages ||
      tcp_sent.load(std::memory_order_relaxed) + tcp_received.load(std::memory_order_relaxed) >= options.upgrade_bytes) {
    Phase expected = Phase::plain;
    if (phase.compare_exchange_strong(expected, Phase::pursued, std::memory_order_acq_rel)) engine::pursue(this);
  }
}

// The count goes up before the phase is looked at and the switch looks at the count after it set the phase: either the caller sees
// the lane, or the switch sees the caller.
std::int64_t StreamImpl::kernel_send(int at, IovCursor& from, int flags) {
  const Counted here(kernel_senders);
  return from.with_rest([&](std::span<iovec> pieces) -> std::int64_t {
    msghdr msg{};
    msg.msg_iov = pieces.data();
    msg.msg_iovlen = pieces.size();
    const iovec& first = pieces[0];
    const long n = pieces.size() == 1 ? sys::blocking_call(sys::EndedBy::nothing, SYS_sendto, at, sys::arg(first.iov_base),
                                                           static_cast<long>(first.iov_len), flags)
                                      : sys::blocking_call(sys::EndedBy::nothing, SYS_sendmsg, at, sys::arg(&msg), flags);
    if (n > 0 && transcript.sent.is_open()) {
      if (flags & MSG_OOB) transcript.sent.close();
      transcript.sent.add(pieces, static_cast<std::size_t>(n), kernel_senders.load(std::memory_order_acquire));
    }
    count_tcp(true, n);
    return n;
  });
}

std::int64_t StreamImpl::kernel_recv(int at, IovCursor& to, int flags, MessageExtras* extras) {
  const Counted here(kernel_receivers);
  const std::size_t wants = to.remaining();
  return to.with_rest([&](std::span<iovec> pieces) -> std::int64_t {
    const iovec& first = pieces[0];
    const long n = pieces.size() == 1 && extras == nullptr
                       ? sys::blocking_call(sys::EndedBy::nothing, SYS_recvfrom, at, sys::arg(first.iov_base),
                                            static_cast<long>(first.iov_len), flags)
                       : receive_message(pieces, extras, [&](long msg) {
                           return sys::blocking_call(sys::EndedBy::nothing, SYS_recvmsg, at, msg, flags);
                         });
    if (n == 0 && wants != 0) return end_of_stream();
    if (is_fatal(n)) error_due.store(0, std::memory_order_relaxed);
    if (flags & (MSG_PEEK | MSG_OOB)) return n;
    if (n > 0 && transcript.received.is_open()) {
      if (flags & MSG_TRUNC) transcript.received.close();
      transcript.received.add(pieces, static_cast<std::size_t>(n), kernel_receivers.load(std::memory_order_acquire));
    }
    count_tcp(false, n);
    return n;
  });
}

bool StreamImpl::usable_here() noexcept {
  if (owner == engine::process_id()) return true;
  take_down_locked(LaneReason::second_process);
  return false;
}

// The program may set the flag meanwhile: what it says last counts, and it says so after the kernel knows.
Blocking StreamImpl::ask_blocking(int at) noexcept {
  const long flags = sys::call(SYS_fcntl, at, F_GETFL);
  const Blocking now = flags >= 0 && (flags & O_NONBLOCK) != 0 ? Blocking::no : Blocking::yes;
  Blocking expected = Blocking::unknown;
  return blocking.compare_exchange_strong(expected, now) ? now : expected;
}

int StreamImpl::await_lane(int at, int flags, bool for_send) {
  if (phase.load(std::memory_order_acquire) == Phase::unjudged) judge(at);
  if (!strict.load(std::memory_order_relaxed)) return 0;
  const bool nowait = (flags & MSG_DONTWAIT) != 0 || is_nonblocking(at);
  const std::int64_t timeout_ns = for_send ? snd_timeout_ns : rcv_timeout_ns;
  const std::int64_t deadline = timeout_ns != 0 ? now_ns() + timeout_ns : 0;
  for (;;) {
    const std::uint32_t seen = phase_word.load(std::memory_order_acquire);
    const Phase now = phase.load(std::memory_order_acquire);
    if (now == Phase::laned || lane_was_up.load(std::memory_order_relaxed)) return 0;
    if (now != Phase::pursued) {
      if (!strict_failed.exchange(true))
        RDMA_LOG(error, "fd %d: policy sdp, but no lane: %s. The connection is closed.", at,
                 stats != nullptr ? to_string(stats->reason.load(std::memory_order_relaxed)) : "no memory");
      sys::call(SYS_shutdown, at, SHUT_RDWR);
      return -ECONNREFUSED;
    }
    if (nowait || (deadline != 0 && now_ns() >= deadline)) return -EAGAIN;
    timespec left{};
    if (deadline != 0) {
      const std::int64_t ns = deadline - now_ns();
      left.tv_sec = ns > 0 ? ns / 1'000'000'000 : 0;
      left.tv_nsec = ns > 0 ? ns % 1'000'000'000 : 0;
    }
    const bool has_limit = deadline != 0;
    const long r = sys::blocking_call(has_limit ? sys::EndedBy::any : sys::EndedBy::no_restart, SYS_futex, sys::arg(&phase_word),
                                      FUTEX_WAIT, seen, has_limit ? sys::arg(&left) : 0);
    if (r == -EINTR) return -EINTR;
  }
}

void StreamImpl::read_timeouts(int at) noexcept {
  for (const bool receives : {true, false}) {
    timeval value{};
    socklen_t len = sizeof value;
    const int name = receives ? SO_RCVTIMEO : SO_SNDTIMEO;
    if (sys::call(SYS_getsockopt, at, SOL_SOCKET, name, sys::arg(&value), sys::arg(&len)) != 0) continue;
    // None is also what the kernel says of one that is over at once.
    if (const std::int64_t ns = timeout_ns(value); ns != 0)
      (receives ? rcv_timeout_ns : snd_timeout_ns).store(ns, std::memory_order_relaxed);
  }
}

void StreamImpl::judge(int at) noexcept {
  if (inherited.is_unused) {
    (void)lock.lock();
    if (inherited.is_unused) take_down_inherited(LaneReason::second_process);
    lock.unlock();
  }
  sockaddr_storage local{}, remote{};
  socklen_t len = sizeof local;
  if (sys::call(SYS_getsockname, at, sys::arg(&local), sys::arg(&len)) != 0) return;
  len = sizeof remote;
  if (sys::call(SYS_getpeername, at, sys::arg(&remote), sys::arg(&len)) != 0) return;  // not connected yet: no byte can go
  Phase expected = Phase::unjudged;
  switch (engine::policy_for(role, local, remote)) {
    case Family::tcp:
      if (phase.compare_exchange_strong(expected, Phase::final) && stats != nullptr) stats->set_reason(engine::policy_reason());
      break;
    case Family::both:
      phase.compare_exchange_strong(expected, Phase::plain);
      break;
    case Family::sdp:
      strict.store(true);
      read_timeouts(at);
      asks_no_proof = true;
      if (phase.compare_exchange_strong(expected, Phase::pursued)) engine::pursue(this);
      break;
  }
}

std::int64_t StreamImpl::send(int at, IovCursor& from, int flags, std::uint16_t gen) {
  if (phase.load(std::memory_order_acquire) != Phase::laned) {
    if (may_have_to_await_lane())
      if (const int r = await_lane(at, flags, true); r != 0) return r;
    kernel_senders.fetch_add(1, std::memory_order_seq_cst);
    if (phase.load(std::memory_order_seq_cst) != Phase::laned) return kernel_send(at, from, flags);
    kernel_senders.fetch_sub(1, std::memory_order_release);
  }
  const std::size_t readable = readable_bytes(from);
  return readable == from.remaining() ? lane_send(at, from, flags, gen) : send_readable(at, from, readable, flags, gen);
}

std::size_t StreamImpl::keep_unsent(IovCursor& from, std::size_t limit) noexcept {
  const std::size_t kept = lane->buffer(from, limit);
  full_at.store(static_cast<std::uint32_t>(limit), std::memory_order_relaxed);
  if (kept == 0) return 0;
  if (stats != nullptr) {
    stats->lane.bytes_sent.add(kept);
    stats->lane.messages_sent.add(1);
  }
  if (lane->has_large_buffer() && !has_large_buffer.load(std::memory_order_relaxed)) {
    has_large_buffer.store(true, std::memory_order_seq_cst);
    engine::buffer_is_large();
  }
  return kept;
}

// As the kernel does, which takes what it copies in pieces of about that size, whole or not at all.
[[gnu::noinline]] std::int64_t StreamImpl::send_readable(int at, IovCursor& from, std::size_t bytes, int flags, std::uint16_t gen) {
  constexpr std::size_t kPiece = 32768;
  // Of a direction that is shut the kernel says so first, and touches nothing.
  if (bytes < kPiece) return tx_shut ? lane_send(at, from, flags, gen) : -EFAULT;
  iovec part[IovCursor::kMost];
  std::size_t count = 0;
  for (std::size_t left = bytes - bytes % kPiece; left != 0; left -= part[count++].iov_len) {
    part[count] = {from.data(), std::min(left, from.chunk())};
    from.advance(part[count].iov_len);
  }
  IovCursor readable(part, count);
  return lane_send(at, readable, flags, gen);
}

/// Takes what credits allow; returns the bytes. Inlined, for this is the path of every message.
[[gnu::always_inline]] inline std::int64_t StreamImpl::send_by_messages(IovCursor& from) noexcept {
  const std::size_t n = lane->send(from);
  if (n != 0 && tx_blocked) {
    tx_blocked = false;
    tx_edge_count.fetch_add(1, std::memory_order_relaxed);
  }
  if (stats != nullptr && n != 0) {
    stats->lane.bytes_sent.add(n);
    stats->lane.messages_sent.add(1);
  }
  if (lane->held() != 0) engine::bytes_are_held();
  return static_cast<std::int64_t>(n);
}

std::int64_t StreamImpl::lane_send(int at, IovCursor& from, int flags, std::uint16_t gen) {
  const bool nowait = (flags & MSG_DONTWAIT) != 0 || is_nonblocking(at);
  std::int64_t deadline = 0;
  std::int64_t total = 0;
  if (!lock.enter()) return -EAGAIN;
  const bool was_full = tx_blocked;
  for (;;) {
    if (generation.load(std::memory_order_relaxed) != gen) {
      lock.unlock();
      return total > 0 ? total : -EBADF;
    }
    if (phase.load(std::memory_order_relaxed) == Phase::laned && usable_here()) {
      if (flags & MSG_OOB) take_down_locked(LaneReason::mode);
      leave_dead_lane(at);
      if (tx.load(std::memory_order_relaxed) == TxState::prepared) try_switch(at);
    }
    if (strict.load(std::memory_order_relaxed) && phase.load(std::memory_order_relaxed) == Phase::laned &&
        tx.load(std::memory_order_relaxed) == TxState::prepared && !lane_is_over()) {
      advance_rx(at);  // the peer may wait here, too, for our word that it may begin
      if (nowait) {
        lock.unlock();
        return -EAGAIN;
      }
      if (const int r = wait(For::room, 0, false); r != 0) {
        lock.unlock();
        return r;
      }
      continue;
    }
    if (phase.load(std::memory_order_relaxed) != Phase::laned || tx.load(std::memory_order_relaxed) != TxState::lane) {
      if (tx.load(std::memory_order_relaxed) == TxState::ending && !tx_shut && !end_is_settled()) {
        lane->drain();
        if ((flags & MSG_OOB) == 0) total += static_cast<std::int64_t>(keep_behind_end(from));
        if (from.done()) break;
        const int r = wait_for_room(nowait, deadline);
        if (r == 0) continue;
        if (total == 0) total = r;
        break;
      }
      if ((fin_due || !resend.empty()) && !flush_resend(at)) {
        const bool shut = fin_due;
        lock.unlock();
        if (shut) {
          if (!(flags & MSG_NOSIGNAL)) sys::call(SYS_tgkill, sys::call(SYS_getpid), sys::call(SYS_gettid), SIGPIPE);
          return total > 0 ? total : -EPIPE;
        }
        if (nowait) return total > 0 ? total : -EAGAIN;
        if (const int r = await_anchor(at, deadline); r != 0) return total > 0 ? total : r;
        (void)lock.lock();
        continue;
      }
      kernel_senders.fetch_add(1, std::memory_order_seq_cst);
      lock.unlock();
      const std::int64_t n = kernel_send(at, from, flags);
      if (total > 0) return n > 0 ? total + n : total;
      return n;
    }
    if (lane->said(kAbandon)) {
      handle_abandon(at);
      lane->drain();  // another thread's send in place ends first
      const int r = has_said_end() ? 0 : wait_for_room(nowait, deadline);
      if (r == 0) continue;
      if (total == 0) total = r;
      break;
    }
    if (lane_is_over()) {
      tx.store(TxState::ended, std::memory_order_release);  // the kernel says how a write to a closed connection ends
      continue;
    }
    if (!nowait && from.chunk() >= lane->zero_copy_from()) [[unlikely]] {
      if (const InPlace sent = send_in_place(at, from, gen, deadline); sent.was_offered) {
        total += sent.bytes;
        if (total == 0) total = sent.result;
        if (sent.result != 0 || from.done()) break;
        continue;
      }
    }
    total += send_by_messages(from);
    if (from.done()) break;
    lane->drain();
    if (lane->may_send()) continue;
    // No credits, or bytes that no message may overtake. What is small, or would have to sleep, is taken all the same, as far as a
    // TCP socket would.
    const std::size_t left = from.remaining();
    // A socket that was full stays so for small sends too, until it has room again.
    const bool full = was_full && tx_blocked && lane->buffered() >= kBufferAhead;
    const std::size_t most = full || (nowait && left > kSmallSend) ? kBufferAhead : SendBuffer::kCapacity;
    if (!nowait && left > kSmallSend && lane->buffered() == 0 && wait(For::room, 0, false, Patience::spin) != kNothingYet) continue;
    if (phase.load(std::memory_order_relaxed) == Phase::laned && tx.load(std::memory_order_relaxed) == TxState::lane &&
        generation.load(std::memory_order_relaxed) == gen && !lane_is_over() && !lane->said(kAbandon))
      total += static_cast<std::int64_t>(keep_unsent(from, most));
    if (from.done()) break;
    if (const int r = wait_for_room(nowait, deadline); r != 0) {
      if (total == 0) total = r;
      break;
    }
  }
  lock.unlock();
  return total;
}

int StreamImpl::await_end_of_lane(int at, bool nowait, std::uint16_t gen) {
  nowait = nowait || is_nonblocking(at);
  std::int64_t deadline = 0;
  int result = 0;
  if (!lock.enter()) return -EAGAIN;
  while (result == 0 && generation.load(std::memory_order_relaxed) == gen &&
         phase.load(std::memory_order_relaxed) == Phase::laned) {
    leave_dead_lane(at);
    if (!end_is_settled()) {
      lane->drain();
      result = tx_shut ? -EPIPE : end_is_settled() ? 0 : wait_for_room(nowait, deadline);
    } else if (fin_due || resend.empty() || flush_resend(at)) {
      break;  // behind FIN the kernel has an error for it
    } else if (nowait) {
      result = -EAGAIN;
    } else {
      lock.unlock();
      result = await_anchor(at, deadline);
      (void)lock.lock();
    }
  }
  if (result == 0 && fin_due) result = -EPIPE;
  lock.unlock();
  return result;
}

int StreamImpl::await_anchor(int at, std::int64_t& deadline) {
  if (deadline == 0 && snd_timeout_ns != 0) deadline = now_ns() + snd_timeout_ns;
  const bool limited = deadline != 0;
  const std::int64_t left_ns = limited ? std::max<std::int64_t>(deadline - now_ns(), 0) : 0;
  const timespec left{left_ns / 1'000'000'000, left_ns % 1'000'000'000};
  pollfd p{at, POLLOUT, 0};
  const long r = sys::blocking_call(limited ? sys::EndedBy::any : sys::EndedBy::no_restart, SYS_ppoll, sys::arg(&p), 1,
                                    limited ? sys::arg(&left) : 0);
  return r == -EINTR ? -EINTR : r == 0 ? -EAGAIN : 0;
}

int StreamImpl::wait_for_room(bool nowait, std::int64_t& deadline) {
  tx_blocked = true;
  if (nowait) return -EAGAIN;
  // Nobody may wait here for a reader that waits for this call to end.
  if (lane->is_offering()) [[unlikely]]
    lane->cancel_offer();
  if (lane->has_advert()) [[unlikely]]
    lane->refuse_advert();
  if (deadline == 0 && snd_timeout_ns != 0) deadline = now_ns() + snd_timeout_ns;
  return wait(For::room, deadline, snd_timeout_ns != 0);
}

std::int64_t StreamImpl::recv(int at, IovCursor& to, int flags, std::uint16_t gen, MessageExtras* extras) {
  if (phase.load(std::memory_order_acquire) != Phase::laned) {
    if (may_have_to_await_lane())
      if (const int r = await_lane(at, flags, false); r != 0) return r;
    kernel_receivers.fetch_add(1, std::memory_order_seq_cst);
    if (phase.load(std::memory_order_seq_cst) != Phase::laned) return kernel_recv(at, to, flags, extras);
    kernel_receivers.fetch_sub(1, std::memory_order_release);
  }
  return lane_recv(at, to, flags, gen, extras);
}

// After READY the anchor is read with the lock held and never waited for inside the kernel.
std::int64_t StreamImpl::anchor_recv_nowait(int at, IovCursor& to, std::size_t cap, int flags, MessageExtras* extras) noexcept {
  iovec iov[kMaxIov];
  const std::size_t count = to.rest(iov, kMaxIov, cap);
  const int kernel_flags = MSG_DONTWAIT | (flags & (MSG_PEEK | MSG_TRUNC));
  const long n = receive_message({iov, count}, extras, [&](long msg) { return sys::call(SYS_recvmsg, at, msg, kernel_flags); });
  if (n <= 0) return n;
  if (!(flags & MSG_PEEK)) {
    if (flags & MSG_TRUNC) transcript.received.close();
    transcript.received.add({iov, count}, static_cast<std::size_t>(n), kernel_receivers.load(std::memory_order_acquire) + 1);
    count_tcp(false, n);
  }
  to.skip(static_cast<std::size_t>(n));
  return n;
}

// SWITCH, END and bytes by TCP that follow the lane's may all come between a look at the words and a read. So first what is there,
// then the words: bytes that belong behind P come after SWITCH was said. At least 1, or what a read would say: 0, -errno.
std::int64_t StreamImpl::anchor_bytes_before_switch(int at) noexcept {
  int queued = 0;
  if (sys::call(SYS_ioctl, at, SIOCINQ, sys::arg(&queued)) == 0 && queued > 0) return queued;
  std::byte one;  // an end, an error, or bytes behind an urgent one
  return sys::call(SYS_recvfrom, at, sys::arg(&one), 1, MSG_PEEK | MSG_DONTWAIT);
}

/// One recv under way on a stream that has a lane.
struct StreamImpl::Receiving {
  int at;
  IovCursor& to;
  const IovCursor start;  ///< a peek begins here each time that it looks
  int flags;
  bool nowait;
  MessageExtras* extras;  ///< nullptr: it is no recvmsg()
  bool peek = (flags & MSG_PEEK) != 0;
  bool all = (flags & MSG_WAITALL) != 0;
  std::int64_t total = 0;  ///< bytes so far
  int result = 0;          ///< if there are none
};

// 0: nothing there yet. A peek that wants everything goes on waiting while more can come.
// Inlined, for this is the path of every message.
[[gnu::always_inline]] inline std::int64_t StreamImpl::take_from_lane(Receiving& r) noexcept {
  std::int64_t n = 0;
  if (r.flags & MSG_TRUNC) {
    n = static_cast<std::int64_t>(lane->discard(r.to.remaining()));
    r.to.skip(static_cast<std::size_t>(n));
  } else {
    if (r.peek) r.to = r.start;
    n = lane->recv(r.to, !r.peek);
    if (r.peek && n > 0) {
      r.total = 0;
      if (r.all && !r.to.done() && !r.nowait && !end_reached() && !peer_gone) n = 0;
    }
  }
  if (n > 0 && !r.peek && stats != nullptr) {
    stats->lane.bytes_received.add(static_cast<std::uint64_t>(n));
    stats->lane.messages_received.add(1);
  }
  return n;
}

// Up to P, and after RESEND, the bytes come by the anchor. 0: nothing there yet; kEndsHere: with the result set.
std::int64_t StreamImpl::take_from_anchor(Receiving& r, RxState state) noexcept {
  if (state == RxState::abandoned) return 0;  // RESEND or END comes before any further byte of the anchor
  if (r.peek) r.to = r.start;
  anchor_event.store(false, std::memory_order_release);  // before the read: what comes after it sets it again
  const std::uint64_t received = tcp_received.load(std::memory_order_relaxed);
  std::int64_t n = SSIZE_MAX;
  if (state == RxState::ready) {
    n = anchor_bytes_before_switch(r.at);
    if (lane->said(kSwitch)) {
      if (is_fatal(n)) error_due = static_cast<int>(n);
      return kLookAgain;
    }
  }
  if (n > 0) {
    const std::uint64_t cap = state == RxState::draining ? switch_at - received
                              : state == RxState::resent ? resent_to - received
                                                         : static_cast<std::uint64_t>(n);
    n = anchor_recv_nowait(r.at, r.to, cap, r.flags, r.extras);
  }
  if (n > 0) return n;
  if (n == -EAGAIN) return 0;
  if (state == RxState::resent && resume_after_resend()) {
    if (n < 0) error_due = static_cast<int>(n);  // the kernel has told it, and we owe it behind the lane's bytes
    return kLookAgain;
  }
  if (state == RxState::ready && end_is_awaited()) {  // SWITCH may be on its way, with bytes behind it
    if (n < 0) error_due = static_cast<int>(n);
    return 0;
  }
  if (n < 0)
    r.result = static_cast<int>(n);
  else if ((state == RxState::draining || state == RxState::resent) && r.total == 0 && lane->said(kSwitch) && !end_reached())
    r.result = -ECONNRESET;  // the stream ends before the bytes that were promised
  return kEndsHere;
}

// Before SHUT_RDWR it came: the anchor's up to P, then the lane's.
std::int64_t StreamImpl::take_rest(Receiving& r) noexcept {
  if (r.peek) r.to = r.start;
  if (const std::uint64_t received = tcp_received.load(std::memory_order_relaxed); received < switch_at) {
    const std::int64_t n = anchor_recv_nowait(r.at, r.to, switch_at - received, r.flags, r.extras);
    if (n > 0) return n;
    switch_at = rest_end = 0;  // the connection ended before it had brought them, and nothing may take their place
    r.result = n < 0 ? static_cast<int>(n) : -ECONNRESET;
    return kEndsHere;
  }
  const std::size_t bytes = std::min<std::size_t>(lane_rest(), r.to.remaining());
  std::int64_t n = 0;
  if (r.flags & MSG_TRUNC) {
    n = static_cast<std::int64_t>(lane->discard(bytes));
  } else {
    iovec iov[kMaxIov];
    IovCursor part(iov, r.to.rest(iov, kMaxIov, bytes));
    n = lane->recv(part, !r.peek);
  }
  if (n == 0) rest_end = 0;
  if (n <= 0) return n == 0 ? kLookAgain : n;
  r.to.skip(static_cast<std::size_t>(n));
  if (r.peek) {
    r.total = 0;
  } else if (stats != nullptr) {
    stats->lane.bytes_received.add(static_cast<std::uint64_t>(n));
    stats->lane.messages_received.add(1);
  }
  return n;
}

std::int64_t StreamImpl::lane_recv(int at, IovCursor& to, int flags, std::uint16_t gen, MessageExtras* extras) {
  const bool nowait = (flags & MSG_DONTWAIT) != 0 || is_nonblocking(at);
  Receiving r{.at = at, .to = to, .start = to, .flags = flags, .nowait = nowait, .extras = extras};
  std::int64_t deadline = 0;
  bool in_place = (flags & (MSG_PEEK | MSG_TRUNC)) == 0;  ///< the peer may write into `to`
  if (!lock.enter()) return -EAGAIN;
  while (!to.done()) {
    if (generation.load(std::memory_order_relaxed) != gen) {
      r.result = -EBADF;
      break;
    }
    const bool here = phase.load(std::memory_order_relaxed) == Phase::laned && usable_here();
    if (here && (flags & MSG_OOB)) take_down_locked(LaneReason::mode);
    if (here) {
      if (abandoned()) handle_abandon(at);
      leave_dead_lane(at);
    }
    // Also where the lane is not ours: what the peer has said is read on, and below we look again until the state has followed it.
    if (phase.load(std::memory_order_relaxed) == Phase::laned) advance_rx(at);
    const RxState state = rx.load(std::memory_order_relaxed);
    std::int64_t n = 0;
    // A strict reader does not go to sleep in the kernel before the switch: nothing would wake it for the lane.
    const bool tcp_alone = (state == RxState::tcp && !strict.load(std::memory_order_relaxed)) || (flags & MSG_OOB) != 0;
    const bool ended = state == RxState::ended || (state == RxState::refused && !holds_rest());
    if (phase.load(std::memory_order_relaxed) != Phase::laned || tcp_alone || ended) {
      if (bytes_missing) {
        if (r.total > 0) break;  // it is the next call's
        bytes_missing = false;
        error_due = 0;
        r.result = -ECONNRESET;
        break;
      }
      // Bytes already taken: the kernel only adds what is there at once.
      const int kernel_flags = r.total > 0 && !r.all ? flags | MSG_DONTWAIT : flags;
      kernel_receivers.fetch_add(1, std::memory_order_seq_cst);
      lock.unlock();
      n = kernel_recv(at, to, kernel_flags, extras);
      if (n > 0) return r.total + n;
      if (r.total > 0) owe(n, gen);
      return r.total > 0 ? r.total : n;
    } else if (state == RxState::lane) {
      n = take_from_lane(r);
      if (n >= 0 && lane->has_advert() && !to.done()) [[unlikely]]
        n += read_in_place(at, to, !nowait && !r.peek && (flags & MSG_TRUNC) == 0, gen);
    } else {
      n = state == RxState::refused ? take_rest(r) : take_from_anchor(r, state);
      if (n == kLookAgain) continue;
      if (n == kEndsHere) break;
    }
    if (n > 0) {
      r.total += n;
      if (!r.all || r.peek) break;
      continue;
    }
    if (n < 0) {
      r.result = static_cast<int>(n);
      break;
    }
    // Nothing there. Was it the end?
    if (rx.load(std::memory_order_relaxed) == RxState::lane) {
      if (!is_recovering() && (lane->said(kEnd) || peer_gone || lane->dead())) continue;
      if (anchor_event.load(std::memory_order_acquire)) {
        look_at_anchor(at);
        if (rx.load(std::memory_order_relaxed) != RxState::lane || lane->unread() != 0) continue;
      }
      if (rx_shut) break;
    } else if (lane->unordered()) {
      lane->drain();  // a lane that failed shows it there only
    }
    if (r.total > 0 && !r.all) break;
    if (nowait) {
      if (here && rx.load(std::memory_order_relaxed) == RxState::lane) lane->settle();  // some programs never wait
      r.result = -EAGAIN;
      break;
    }
    if (deadline == 0 && rcv_timeout_ns != 0) deadline = now_ns() + rcv_timeout_ns;
    if (in_place && to.chunk() >= lane->sink_from()) [[unlikely]] {
      const InPlace got = receive_in_place(at, to, gen, deadline);
      if (got.was_offered) {
        r.total += got.bytes;
        r.result = got.result;
        if (r.result != 0 || (got.bytes != 0 && !r.all)) break;
        in_place = got.bytes != 0;  // it has waited long enough, or something else has come
        continue;
      }
    }
    r.result = wait(For::bytes, deadline, rcv_timeout_ns != 0);
    if (r.result != 0) break;
    if (r.total == 0 && !r.peek && !r.all && (flags & MSG_TRUNC) == 0 && to.chunk() == to.remaining()) {
      r.total = take_at_once(to.data(), to.chunk(), gen);
      if (r.total != 0) break;
    }
  }
  // The read that reached P changes the carrier: a waiter must see that now, for the lane's messages may have been taken in
  // already.
  const RxState now = rx.load(std::memory_order_relaxed);
  if (phase.load(std::memory_order_relaxed) == Phase::laned && (now == RxState::draining || now == RxState::resent)) advance_rx(at);
  if (r.total > 0 && is_fatal(r.result)) error_due = r.result;
  lock.unlock();
  return r.total > 0 ? r.total : r.result;
}

bool StreamImpl::changed(For what) const noexcept {
  if (lane->maybe_ready()) return true;
  if (tx.load(std::memory_order_relaxed) == TxState::lane && lane->said(kAbandon) && !lane->is_lent()) return true;
  // Another thread may have taken the message in: what it brought counts, not only what is still in the CQ.
  if (what == For::target)
    return tx.load(std::memory_order_relaxed) != TxState::lane || failed_unseen() || lane_is_over() || lane->has_target() ||
           !lane->writes_in_place();
  if (what == For::room) {
    const TxState now = tx.load(std::memory_order_relaxed);
    if (now == TxState::prepared) return lane->said(kReady) || lane_is_over();
    if (now == TxState::ending) return lane->said(kEndSeen) || lane_is_over();
    const std::uint64_t buffered = lane->buffered();
    return failed_unseen() || lane_is_over() || lane->may_send() || lane->has_offer_end() || lane->has_written() ||
           lane->may_cancel_for(kAbandon) || (buffered != 0 && buffered < full_at / 2);
  }
  if (anchor_event.load(std::memory_order_acquire) || lane->has_sink_end()) return true;
  switch (rx.load(std::memory_order_relaxed)) {
    case RxState::tcp:
      return strict.load(std::memory_order_relaxed) && (lane->said(kPrepare) || lane_is_over());
    case RxState::abandoned:
      return lane->said(kResend) || lane->said(kEnd) || no_word_comes();
    case RxState::ready:
      return lane->said(kSwitch) || lane->said(kEnd) || peer_gone.load(std::memory_order_relaxed) ||
             (lane->unordered() && failed_unseen());
    case RxState::lane:
      return lane->unread() != 0 || lane->has_read() ||
             (!is_recovering() && (lane->said(kEnd) || peer_gone.load(std::memory_order_relaxed))) || failed_unseen();
    default:
      return false;
  }
}

/// A thread that has left the lock for a wait. It comes back with the lock; a cancelled one does not come back.
class StreamImpl::Waiting {
 public:
  explicit Waiting(StreamImpl& stream) noexcept : stream_(stream) {
    count(1);
    stream_.lock.unlock();
  }
  ~Waiting() {
    if (over_) return;
    over();
    stream_.lock.unlock();
  }
  Waiting(const Waiting&) = delete;
  Waiting& operator=(const Waiting&) = delete;
  void over() noexcept {
    (void)stream_.lock.lock();
    count(-1);
    over_ = true;
  }

 private:
  /// Changed only under the lock.
  void count(int by) noexcept {
    stream_.waiters.store(stream_.waiters.load(std::memory_order_relaxed) + static_cast<std::uint32_t>(by),
                          std::memory_order_relaxed);
  }
  StreamImpl& stream_;
  bool over_ = false;
};

int StreamImpl::wait(For what, std::int64_t deadline, bool has_timeout, Patience patience) {
  const std::uint64_t edges = state_edges.load(std::memory_order_relaxed);
  const std::uint16_t gen = generation.load(std::memory_order_relaxed);
  Lane* const l = lane;
  const auto woken = [&](bool if_busy) noexcept {
    if (state_edges.load(std::memory_order_acquire) != edges || generation.load(std::memory_order_acquire) != gen) return true;
    if (!lock.try_lock()) return if_busy;
    const bool found = changed(what);
    lock.unlock();
    return found;
  };
  if (changes_lane) {
    lock.unlock();
    sys::call(SYS_poll, 0, 0, 1);
    (void)lock.lock();
    return patience == Patience::spin ? kNothingYet : 0;
  }
  l->settle();
  if (what == For::bytes) l->burst_is_over();
  Waiting waiting(*this);
  int result = 0;
  // Nearly always it is a message that ends the wait, and each look at all the rest is time in which one may have come, with the
  // lock taken, so that a handler that interrupts it finds the stream in use.
  constexpr unsigned kGlances = 64;
  unsigned looks = 0;
  const bool found = patience != Patience::sleep &&
                     Spinner().run([&]() noexcept { return l->maybe_ready() || (++looks % kGlances == 0 && woken(false)); });
  if (!found && patience == Patience::spin) result = kNothingYet;
  if (!found && patience != Patience::spin) {
    std::atomic<std::uint32_t>* word = l->wake_word();
    const std::uint32_t seen = word->load(std::memory_order_acquire);
    l->arm(rdma::kWakeWord);
    if (rdma::Device* const device = l->device()) device->arm_fence();
    if (!woken(true)) {  // whoever has the lock may be changing what we wait for
      timespec left{};
      bool expired = false;
      if (has_timeout) {
        const std::int64_t ns = deadline - now_ns();
        expired = ns <= 0;
        left.tv_sec = ns / 1'000'000'000;
        left.tv_nsec = ns % 1'000'000'000;
      }
      const long until = has_timeout ? sys::arg(&left) : 0;
      const auto by = has_timeout ? sys::EndedBy::any : sys::EndedBy::no_restart;
      const auto sleep = patience == Patience::spin_and_sleep_uncancelled ? sys::sleeping_call : sys::blocking_call;
      const long r = expired ? -ETIMEDOUT : sleep(by, SYS_futex, sys::arg(word), FUTEX_WAIT, seen, until, 0, 0);
      if (r == -EINTR) result = -EINTR;
      if (r == -ETIMEDOUT) result = -EAGAIN;
    }
  }
  waiting.over();
  return result;
}

}  // namespace sdp
