// The handle: what the shim sees of a stream.
#include "sdp/stream.hpp"

#include <linux/sockios.h>
#include <poll.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/stat.h>

#include <algorithm>
#include <cerrno>
#include <climits>
#include <cstring>

#include "rdma_core/base/clock.hpp"
#include "rdma_core/base/program_call.hpp"
#include "rdma_core/base/sys.hpp"
#include "rdma_core/base/user_memory.hpp"
#include "sdp/engine.hpp"
#include "sdp/stream_impl.hpp"

namespace sdp {

namespace sys = rdma::sys;

namespace {

/// A writer that was refused waits for a quarter of the peer's window, so that it is not woken for every message. Never for more
/// than the peer is sure to grant: its own rule keeps it silent while two thirds of its buffers are still ours to use.
bool writable(const StreamImpl& s, const Lane& lane) noexcept {
  const CreditWindow& credit = lane.conn.credit();
  const auto quarter = static_cast<std::int32_t>(credit.peer_posted() / 4);
  if (lane.buffered() != 0) return lane.buffered() < StreamImpl::kBufferAhead / 2;
  return lane.may_send() && credit.credits() >= (s.tx_blocked ? std::max(kReservedCredits + 1, quarter) : kReservedCredits + 1);
}

/// END, and SDP's DisConn if every byte is on its way as a message. What is buffered the peer fetches itself.
void end_sending(StreamImpl& s) noexcept {
  s.lane->drain();
  s.end_tx_locked();
  if (s.lane->buffered() == 0) s.lane->conn.want_disconn();
  s.lane->send_due_control();
}

/// Else the kernel has an error for it.
bool is_sound(const msghdr* msg) noexcept {
  return rdma::is_readable(msg, sizeof *msg) && msg->msg_iovlen <= IOV_MAX &&
         (msg->msg_name == nullptr || static_cast<int>(msg->msg_namelen) >= 0) &&
         rdma::is_readable(msg->msg_iov, msg->msg_iovlen * sizeof *msg->msg_iov);
}

}  // namespace

std::int64_t Stream::send(int fd, const void* buf, std::size_t len, int flags) const {
  if (const std::int64_t n = impl()->send_at_once(buf, len, flags, generation()); n != 0) [[likely]]
    return n;
  const iovec iov{const_cast<void*>(buf), len};
  IovCursor from(&iov, 1);
  if (from.done()) return sys::blocking_call(sys::EndedBy::nothing, SYS_sendto, fd, sys::arg(buf), 0, flags);
  return impl()->send(fd, from, flags, generation());
}

std::int64_t Stream::recv(int fd, void* buf, std::size_t len, int flags) const {
  if (const std::int64_t n = impl()->recv_at_once(buf, len, flags, generation()); n != 0) [[likely]]
    return n;
  if (flags & MSG_ERRQUEUE) return sys::call(SYS_recvfrom, fd, sys::arg(buf), static_cast<long>(len), flags);
  const iovec iov{buf, len};
  IovCursor to(&iov, 1);
  if (to.done()) return recv_nothing(fd, flags);
  return impl()->recv(fd, to, flags, generation());
}

// A receive of no bytes waits, as TCP does, until there is something to receive, and takes none of it.
std::int64_t Stream::recv_nothing(int fd, int flags) const {
  if (flags & MSG_OOB) return sys::call(SYS_recvfrom, fd, 0, 0, flags);
  std::byte one;
  const std::int64_t n = recv(fd, &one, 1, flags | MSG_PEEK);
  return n > 0 ? 0 : n;
}

std::int64_t Stream::sendmsg(int fd, const msghdr* msg, int flags) const {
  const bool sound = is_sound(msg);
  if (!sound || (msg->msg_controllen != 0 && msg->msg_control != nullptr)) {
    if (sound)
      if (const int r = await_tcp(fd, LaneReason::mode, (flags & MSG_DONTWAIT) != 0); r != 0) return r;
    return sys::blocking_call(sys::EndedBy::nothing, SYS_sendmsg, fd, sys::arg(msg), flags);
  }
  IovCursor from(msg->msg_iov, msg->msg_iovlen);
  if (from.done()) return sys::blocking_call(sys::EndedBy::nothing, SYS_sendmsg, fd, sys::arg(msg), flags);
  return impl()->send(fd, from, flags, generation());
}

std::int64_t Stream::recvmsg(int fd, msghdr* msg, int flags) const {
  // The queue of errors is no part of the stream, and never waited for.
  if (!is_sound(msg) || (flags & MSG_ERRQUEUE) != 0)
    return sys::blocking_call(sys::EndedBy::nothing, SYS_recvmsg, fd, sys::arg(msg), flags);
  IovCursor to(msg->msg_iov, msg->msg_iovlen);
  MessageExtras extras{msg->msg_control, msg->msg_control != nullptr ? msg->msg_controllen : 0, 0, flags & MSG_CMSG_CLOEXEC};
  const std::int64_t n = to.done() ? recv_nothing(fd, flags) : impl()->recv(fd, to, flags, generation(), &extras);
  if (n >= 0) {
    if (msg->msg_name != nullptr) msg->msg_namelen = 0;
    msg->msg_controllen = extras.used;
    msg->msg_flags = extras.flags;
  }
  return n;
}

namespace {

/// `n` bytes of the file, which end at `offset` or at the file's own position, have been sent by TCP. Should the file have changed
/// since, what is read is not what was sent: then the connection stays on TCP.
void note_sent_from_file(StreamImpl& s, int in_fd, const std::int64_t* offset, std::size_t n) noexcept {
  const std::int64_t end = offset != nullptr ? *offset : sys::call(SYS_lseek, in_fd, 0, 1 /* SEEK_CUR */);
  std::array<std::byte, Transcript::kMost> bytes;
  const std::size_t wanted = std::min(n, bytes.size());
  const long got =
      sys::call(SYS_pread64, in_fd, sys::arg(bytes.data()), static_cast<long>(wanted), end - static_cast<std::int64_t>(n));
  if (got != static_cast<long>(wanted)) return s.transcript.sent.close();
  const iovec all{bytes.data(), wanted};
  s.transcript.sent.add({&all, 1}, wanted, s.kernel_senders.load(std::memory_order_acquire));
}

}  // namespace

// On a lane the file's bytes are read straight into a bounce buffer and sent from there; on TCP it is the kernel's sendfile.
std::int64_t Stream::sendfile(int fd, int in_fd, std::int64_t* offset, std::size_t count) const {
  StreamImpl* s = impl();
  bool resending = false;
  if (s->phase.load(std::memory_order_acquire) == Phase::laned && s->lock.enter()) {
    if (s->generation.load(std::memory_order_relaxed) == generation() && s->phase.load(std::memory_order_relaxed) == Phase::laned &&
        s->usable_here()) {
      s->try_switch(fd);
      resending = !s->end_is_settled() || (!s->resend.empty() && !s->flush_resend(fd));  // then send() knows what comes first
    }
    s->lock.unlock();
  }
  if (s->phase.load(std::memory_order_acquire) == Phase::unjudged) s->judge(fd);
  const auto off_tcp = [s](std::memory_order order) noexcept {
    const TxState tx = s->tx.load(order);
    return tx == TxState::lane || tx == TxState::ending;
  };
  const bool by_tcp =
      !resending && (s->phase.load(std::memory_order_acquire) != Phase::laned || !off_tcp(std::memory_order_acquire));
  if (by_tcp && !(s->strict.load(std::memory_order_relaxed) && s->tx.load(std::memory_order_acquire) != TxState::ended)) {
    s->kernel_senders.fetch_add(1, std::memory_order_seq_cst);
    if (!off_tcp(std::memory_order_seq_cst)) {
      const long n = sys::sleeping_call(sys::EndedBy::nothing, SYS_sendfile, fd, in_fd, sys::arg(offset), static_cast<long>(count));
      if (n > 0 && s->transcript.sent.is_open()) note_sent_from_file(*s, in_fd, offset, static_cast<std::size_t>(n));
      s->count_tcp(true, n);
      s->kernel_senders.fetch_sub(1, std::memory_order_release);
      return n;
    }
    s->kernel_senders.fetch_sub(1, std::memory_order_release);
  }
  constexpr std::size_t kBounce = 64 * 1024;
  alignas(64) std::byte bounce[kBounce];
  std::int64_t total = 0;
  while (static_cast<std::size_t>(total) < count) {
    const std::size_t want = std::min(kBounce, count - static_cast<std::size_t>(total));
    const std::int64_t at = offset != nullptr ? *offset : sys::call(SYS_lseek, in_fd, 0, 1 /* SEEK_CUR */);
    if (at < 0) return total > 0 ? total : at == -EBADF ? at : -EINVAL;
    const long got = sys::call(SYS_pread64, in_fd, sys::arg(bounce), static_cast<long>(want), at);
    if (got < 0) return total > 0 ? total : got;
    if (got == 0) break;
    const std::int64_t n = send(fd, bounce, static_cast<std::size_t>(got), 0);
    if (n < 0) return total > 0 ? total : n;
    total += n;
    if (offset != nullptr)
      *offset += n;
    else
      sys::call(SYS_lseek, in_fd, at + n, 0 /* SEEK_SET */);
    if (n < got) break;
  }
  return total;
}

// What TCP does to a socket that is shut for both begins when the kernel knows of it.
int Stream::shutdown(int fd, int how) const noexcept {
  StreamImpl* s = impl();
  const bool known = how == SHUT_RD || how == SHUT_WR || how == SHUT_RDWR;
  bool fin_waits = false;
  if (known && s->phase.load(std::memory_order_acquire) == Phase::laned && s->lock.enter()) {
    if (s->generation.load(std::memory_order_relaxed) == generation() && s->phase.load(std::memory_order_relaxed) == Phase::laned &&
        s->usable_here()) {
      if (how != SHUT_RD && !s->has_said_end()) end_sending(*s);
      if (how != SHUT_RD) s->tx_shut = true;
      s->lane->wake_sleepers();
    }
    if (how != SHUT_RD && s->phase.load(std::memory_order_relaxed) == Phase::laned && s->fin_has_to_wait()) s->fin_due = true;
    fin_waits = how != SHUT_RD && (s->fin_due || !s->resend.empty());
    if (fin_waits) {
      s->fin_due = true;  // what send() took goes before the end
      (void)s->flush_resend(fd);
    }
    s->lock.unlock();
  }
  if (fin_waits) engine::nudge();
  const int result =
      fin_waits && how == SHUT_WR ? 0 : static_cast<int>(sys::call(SYS_shutdown, fd, fin_waits ? int{SHUT_RD} : how));
  if (result != 0 || !s->lock.enter()) return result;
  if (s->generation.load(std::memory_order_relaxed) == generation()) {
    if (how != SHUT_RD) s->tx_shut = true;
    if (how != SHUT_WR) s->rx_shut = true;
    if (s->phase.load(std::memory_order_relaxed) == Phase::laned && s->usable_here()) {
      // The lane may have come up meanwhile. Its peer, if it is unordered, waits for END; see attach().
      if (how != SHUT_RD) s->end_if_half_closed(fd);
      s->refuse_late(fd);
      s->lane->wake_sleepers();
    }
  }
  s->lock.unlock();
  return result;
}

Phase StreamImpl::close(int at) noexcept {
  leave_heirs();
  inherited.from = Stream();  // a child that only inherits changes nothing
  inherited.is_unused = false;
  const bool laned = lane != nullptr && phase.load(std::memory_order_relaxed) == Phase::laned;
  if (laned) {
    // It may not be the end for a child: what is unread is to come by TCP, where the kernel knows whether it is.
    if (heirs.load(std::memory_order_relaxed) != 0 && !lane->unordered() && !lane->said(kEnd))
      take_down_locked(LaneReason::second_process);
    if (abandoned()) handle_abandon(at);
    if (!has_said_end()) end_sending(*this);
    lane->end_read();
    lane->end_sink();
    lane->drain();
    if (lane->unordered()) acknowledge_end();
    lane->write_word(kGone, 0);
  }
  const Lane* const behind = tx.load(std::memory_order_relaxed) == TxState::ending ? lane : nullptr;
  const bool is_reset = laned && reset_if_unread(at, behind);
  if (!is_reset && ((laned && fin_has_to_wait()) || (!resend.empty() && !flush_resend(at)))) {
    unguard_resend();
    engine::linger(at, resend.take(), behind);
  }
  generation.fetch_add(1, std::memory_order_acq_rel);
  const Phase was = phase.exchange(Phase::final, std::memory_order_acq_rel);
  if (lane != nullptr) lane->wake_sleepers();
  return was;
}

StreamSnapshot Stream::snapshot() const noexcept { return impl()->snapshot(); }
bool Stream::has_heirs() const noexcept { return impl()->heirs.load(std::memory_order_relaxed) != 0; }
void Stream::leave_heirs() const noexcept { impl()->leave_heirs(); }

void Stream::close(int fd) const noexcept {
  StreamImpl* s = impl();
  if (!s->lock.enter()) {  // a handler closes what its own thread is using: the service thread ends the lane
    s->generation.fetch_add(1, std::memory_order_acq_rel);
    engine::closed(s, fd);
    return;
  }
  if (s->generation.load(std::memory_order_relaxed) != generation()) {
    s->lock.unlock();
    return;
  }
  const Phase was = s->close(fd);
  s->lock.unlock();
  // Most connections are over before they are worth a lane: the service thread has never heard of them and is not woken.
  if ((was == Phase::plain || was == Phase::unjudged) && engine::free_at_once(s)) return;
  engine::closed(s, fd);
}

// The number that it had is closed next: who works for the stream by it has to be done with it.
void Stream::renumber(int fd) const noexcept {
  StreamImpl* s = impl();
  const bool locked = s->lock.enter();
  s->fd.store(fd, std::memory_order_relaxed);
  if (locked) s->lock.unlock();
}

void Stream::set_nonblocking(bool on) const noexcept {
  impl()->blocking.store(on ? Blocking::no : Blocking::yes, std::memory_order_relaxed);
}

void Stream::set_timeout(bool receives, std::int64_t ns) const noexcept {
  StreamImpl* s = impl();
  const bool inside = s->lock.enter();
  (receives ? s->rcv_timeout_ns : s->snd_timeout_ns).store(ns, std::memory_order_relaxed);
  if (inside) s->lock.unlock();
}

// close() never waits: what send() accepted lies in the peer's memory already, so that a lingering close has nothing to linger for.
// The kernel keeps the option and applies it to the anchor, but for the moments in which bytes lie in our hands.
void Stream::set_linger(int fd) const noexcept {
  StreamImpl* s = impl();
  if (!s->lock.enter()) return;
  if (s->resend_guarded) KeptBytes::reset_if_killed(fd, s->linger_option);
  s->lock.unlock();
}

void Stream::show_linger(void* value, socklen_t len) const noexcept {
  StreamImpl* s = impl();
  if (!s->lock.enter()) return;
  if (s->resend_guarded) std::memcpy(value, &s->linger_option, std::min<std::size_t>(len, sizeof s->linger_option));
  s->lock.unlock();
}

int Stream::inq(int fd) const noexcept {
  StreamImpl* s = impl();
  int queued = 0;
  const long r = sys::call(SYS_ioctl, fd, SIOCINQ, sys::arg(&queued));
  if (r < 0) return static_cast<int>(r);
  if (s->phase.load(std::memory_order_acquire) != Phase::laned || !s->lock.enter()) return queued;
  if (s->phase.load(std::memory_order_relaxed) == Phase::laned && s->usable_here()) {
    s->advance_rx(fd);
    s->lane->drain();
    if (s->lane->unread() == 0) s->lane->refuse_advert();
    const RxState rx = s->rx.load(std::memory_order_relaxed);
    if (rx == RxState::draining || rx == RxState::lane) queued += static_cast<int>(s->lane->unread());
    queued += static_cast<int>(s->lane_rest());
  }
  s->lock.unlock();
  return queued;
}

// Urgent data come by the anchor: the mark lies behind whatever the lane still holds.
int Stream::at_mark(int fd) const noexcept {
  int at = 0;
  const long r = sys::call(SYS_ioctl, fd, SIOCATMARK, sys::arg(&at));
  if (r < 0) return static_cast<int>(r);
  int queued = 0;
  sys::call(SYS_ioctl, fd, SIOCINQ, sys::arg(&queued));
  return at != 0 && inq(fd) <= queued ? 1 : 0;
}

int Stream::outq(int fd) const noexcept {
  StreamImpl* s = impl();
  int queued = 0;
  const long r = sys::call(SYS_ioctl, fd, SIOCOUTQ, sys::arg(&queued));
  if (r < 0) return static_cast<int>(r);
  if (s->phase.load(std::memory_order_acquire) != Phase::laned || !s->lock.enter()) return queued;
  if (s->phase.load(std::memory_order_relaxed) == Phase::laned && s->lane != nullptr)
    queued += static_cast<int>(s->lane->buffered() + s->lane->held() + s->resend.size());
  s->lock.unlock();
  return queued;
}

void Stream::take_down(LaneReason reason) const noexcept {
  StreamImpl* s = impl();
  if (s->phase.load(std::memory_order_acquire) == Phase::final || !s->lock.enter()) return;
  if (s->generation.load(std::memory_order_relaxed) == generation()) {
    s->take_down_locked(reason);
    if (reason == LaneReason::io_uring || reason == LaneReason::second_process) s->keep_gap_from_others(s->fd);
  }
  s->lock.unlock();
}

int Stream::await_tcp(int fd, LaneReason reason, bool nowait) const {
  take_down(reason);
  return impl()->phase.load(std::memory_order_acquire) == Phase::laned ? impl()->await_end_of_lane(fd, nowait, generation()) : 0;
}

// The QP works in no other process, not even in a vfork child: there the parent's service thread takes the lane down.
void Stream::leave_to_program() const noexcept {
  StreamImpl* s = impl();
  if (s->phase.load(std::memory_order_acquire) == Phase::final || !s->lock.enter()) return;
  if (s->generation.load(std::memory_order_relaxed) == generation()) {
    const bool unordered = s->lane != nullptr && s->phase.load() == Phase::laned && s->lane->unordered();
    if (unordered && engine::in_vfork_child()) {
      s->asked_down.store(Asked::now, std::memory_order_release);
      engine::nudge();
    } else {
      s->take_down_locked(LaneReason::exec);
    }
  }
  s->lock.unlock();
}

void Stream::reset_if_bytes_stay(int fd) const noexcept {
  StreamImpl* s = impl();
  if (!s->lock.enter()) return;
  if (s->generation.load(std::memory_order_relaxed) == generation()) s->reset_if_bytes_stay(fd);
  s->lock.unlock();
}

bool Stream::stays_on_tcp() const noexcept { return impl()->phase.load(std::memory_order_acquire) == Phase::final; }

bool Stream::is_named_by(int fd) const noexcept { return impl()->names_us(fd); }

bool Stream::has_lane() const noexcept {
  return impl()->phase.load(std::memory_order_acquire) == Phase::laned || impl()->strictly_waiting();
}

int Stream::sleep_for_bytes(std::int64_t timeout_ns) const {
  StreamImpl* s = impl();
  if (!s->lock.enter()) return -ENOTSUP;
  int result = -ENOTSUP;
  if (s->generation.load(std::memory_order_relaxed) == generation() && s->phase.load(std::memory_order_relaxed) == Phase::laned &&
      s->rx.load(std::memory_order_relaxed) == RxState::lane && s->usable_here() && !s->lane_is_over()) {
    // Always with a limit: a sleep without one would go on after a handler with SA_RESTART, and a wait for events does not.
    constexpr std::int64_t kLongNs = 3'600'000'000'000;
    const std::int64_t limit = timeout_ns >= 0 ? std::min(timeout_ns, kLongNs) : kLongNs;
    result = s->wait(StreamImpl::For::bytes, rdma::SteadyClock{}.now() + limit, true, StreamImpl::Patience::sleep);
  }
  s->lock.unlock();
  return result;
}

std::uint32_t Stream::poll(std::uint32_t events, bool* anchor_too) const noexcept {
  StreamImpl* s = impl();
  std::uint32_t ready = 0;
  if (s->phase.load(std::memory_order_acquire) == Phase::unjudged) s->judge(s->fd);
  if (!s->lock.enter()) return 0;
  if (s->generation.load(std::memory_order_relaxed) == generation() && s->phase.load(std::memory_order_relaxed) == Phase::laned &&
      s->usable_here()) {
    const int fd = s->fd;
    if (s->abandoned()) s->handle_abandon(fd);
    s->advance_rx(fd);
    s->lane->drain();
    s->lane->settle();
    if (s->lane->has_advert() && s->lane->unread() == 0 && (events & (POLLIN | POLLRDNORM)) != 0) s->lane->refuse_advert();
    s->leave_dead_lane(fd);
    if (s->tx.load(std::memory_order_relaxed) == TxState::prepared) s->try_switch(fd);
    if (s->rx.load(std::memory_order_relaxed) == RxState::lane) {
      if (s->lane->unread() == 0) {
        s->advance_rx(fd);
        s->look_at_anchor(fd);
      }
      if (s->rx.load(std::memory_order_relaxed) == RxState::lane) {
        if (s->lane->unread() != 0 || s->rx_shut) ready |= POLLIN | POLLRDNORM;
      } else {
        ready |= POLLIN | POLLRDNORM;  // the end, or bytes of the anchor: either way a read returns
      }
    }
    if (s->error_due.load(std::memory_order_relaxed) != 0 || s->bytes_missing) ready |= POLLIN | POLLRDNORM;
    if (s->tx.load(std::memory_order_relaxed) != TxState::lane && !s->resend.empty()) (void)s->flush_resend(fd);
    if (!s->end_is_settled() && !s->tx_shut) {
      if (s->resend.size() < StreamImpl::kBufferAhead)
        ready |= POLLOUT | POLLWRNORM;
      else if (events & POLLOUT)
        s->tx_blocked = true;
    }
    if (s->tx.load(std::memory_order_relaxed) == TxState::lane) {
      const bool gone = s->lane_is_over();
      if (gone) s->tx.store(TxState::ended, std::memory_order_release);  // how a write ends is the kernel's to say
      if (gone || writable(*s, *s->lane)) {
        if (s->tx_blocked) s->tx_edge_count.fetch_add(1, std::memory_order_relaxed);
        s->tx_blocked = false;
        ready |= POLLOUT | POLLWRNORM;
      } else if (events & POLLOUT) {
        s->tx_blocked = true;
      }
    }
    if (anchor_too != nullptr) *anchor_too = s->anchor_has_part();
  }
  s->lock.unlock();
  return ready & (events | POLLERR | POLLHUP);
}

std::uint32_t Stream::kernel_events(std::uint32_t events) const noexcept {
  const StreamImpl* s = impl();
  const auto out = static_cast<std::uint32_t>(POLLOUT | POLLWRNORM);
  if (s->strictly_waiting()) return s->phase.load() == Phase::unjudged ? events : events & ~out;
  if (s->phase.load(std::memory_order_acquire) != Phase::laned) return events;
  if (s->strict.load(std::memory_order_relaxed) && s->tx.load(std::memory_order_acquire) == TxState::prepared) events &= ~out;
  // An abandoned direction reads nothing before the peer has said how it goes on, whatever lies on the anchor.
  const RxState rx = s->rx.load(std::memory_order_acquire);
  // Nor does one whose end by the anchor has overtaken the lane's words.
  const bool awaits_end = rx == RxState::ready && s->end_due_ns.load(std::memory_order_relaxed) != 0;
  if (rx == RxState::lane || rx == RxState::abandoned || awaits_end) events &= ~static_cast<std::uint32_t>(POLLIN | POLLRDNORM);
  const TxState tx = s->tx.load(std::memory_order_acquire);
  if (tx == TxState::lane || (tx == TxState::ending && !s->tx_shut)) events &= ~out;
  return events;
}

// Only what the next poll() consumes counts here: a condition that stayed true would turn a sleeper into a busy loop.
bool Stream::maybe_ready(const Grace::Look& look, std::uint32_t events) const noexcept {
  const StreamImpl* s = impl();
  const Lane* const lane = s->seen_lane(look);
  if (lane == nullptr) return false;
  if (lane->maybe_ready()) return true;
  if (s->strict.load(std::memory_order_relaxed) && s->tx.load(std::memory_order_relaxed) == TxState::prepared && lane->said(kReady))
    return true;
  const bool peer_gone = s->peer_gone.load(std::memory_order_relaxed);
  if (s->tx.load(std::memory_order_relaxed) == TxState::lane) {
    if ((events & POLLOUT) != 0 && s->tx_blocked && writable(*s, *lane)) return true;
    if (lane->said(kAbandon) || lane->said(kGone) || lane->dead() || peer_gone) return true;
  }
  if (s->tx.load(std::memory_order_relaxed) == TxState::ending && (lane->said(kEndSeen) || lane->said(kGone) || peer_gone))
    return true;
  switch (s->rx.load(std::memory_order_relaxed)) {
    case RxState::abandoned:
      return lane->said(kResend) || lane->said(kEnd) || s->no_word_comes();
    case RxState::ready:
      return lane->said(kSwitch) || lane->said(kEnd) || peer_gone || (lane->unordered() && s->failed_unseen());
    case RxState::lane:
      return lane->unread() == 0 && ((!s->is_recovering() && (lane->end_reached() || peer_gone)) || s->failed_unseen() ||
                                     s->anchor_event.load(std::memory_order_acquire));
    default:
      return false;
  }
}

void Stream::arm(const Grace::Look& look) const noexcept {
  if (Lane* const lane = impl()->seen_lane(look)) lane->arm(rdma::kWakeChannel);
}

std::uint64_t Stream::rx_edges(const Grace::Look& look) const noexcept {
  const StreamImpl* s = impl();
  const Lane* const lane = s->seen_lane(look);
  return lane == nullptr ? 0 : lane->rx_arrivals() + s->state_edges.load(std::memory_order_relaxed);
}

std::uint64_t Stream::tx_edges() const noexcept {
  const StreamImpl* s = impl();
  return s->tx_edge_count.load(std::memory_order_relaxed) + s->state_edges.load(std::memory_order_relaxed);
}

void Stream::enter_plain_wait() const noexcept { impl()->plain_waiters.fetch_add(1, std::memory_order_seq_cst); }
void Stream::leave_plain_wait() const noexcept { impl()->plain_waiters.fetch_sub(1, std::memory_order_release); }

void Stream::on_wait_entry(int fd) const noexcept {
  StreamImpl* s = impl();
  if (s->phase.load(std::memory_order_acquire) != Phase::laned || s->rx.load(std::memory_order_acquire) != RxState::tcp ||
      !s->lock.enter())
    return;
  if (s->phase.load(std::memory_order_relaxed) == Phase::laned && s->usable_here()) s->advance_rx(fd);
  s->lock.unlock();
}

}  // namespace sdp
