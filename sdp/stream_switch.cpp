// The switch between anchor and lane. Each rule named here is one of architecture 2.4's.
#include <linux/sockios.h>
#include <linux/tcp.h>
#include <netinet/in.h>
#include <sys/ioctl.h>
#include <sys/socket.h>

#include <algorithm>
#include <array>
#include <cerrno>
#include <cstddef>
#include <cstring>
#include <utility>

#include "rdma_core/base/log.hpp"
#include "rdma_core/base/sys.hpp"
#include "sdp/stream_impl.hpp"

namespace sdp {

namespace sys = rdma::sys;

namespace {
// The kernel's TCP_ESTABLISHED…, which no header shares.
constexpr std::uint8_t kEstablished = 1, kFinWait1 = 4, kFinWait2 = 5, kCloseWait = 8;

bool has_end(const tcp_info& info) noexcept {
  return info.tcpi_state != kEstablished && info.tcpi_state != kFinWait1 && info.tcpi_state != kFinWait2;
}
}  // namespace

AnchorCounts anchor_counts(int fd) noexcept {
  AnchorCounts counts;
  tcp_info info{};
  socklen_t len = sizeof info;
  if (sys::call(SYS_getsockopt, fd, IPPROTO_TCP, TCP_INFO, sys::arg(&info), sys::arg(&len)) != 0) return counts;
  if (len < offsetof(tcp_info, tcpi_bytes_retrans) + sizeof info.tcpi_bytes_retrans) return counts;  // a kernel before 4.19
  int queued = 0;
  if (sys::call(SYS_ioctl, fd, SIOCINQ, sys::arg(&queued)) != 0) return counts;
  counts.ok = true;
  counts.sent = info.tcpi_bytes_sent - info.tcpi_bytes_retrans + info.tcpi_notsent_bytes;
  counts.received = info.tcpi_bytes_received;
  counts.queued = static_cast<std::uint64_t>(queued);
  counts.may_send = info.tcpi_state == kEstablished || info.tcpi_state == kCloseWait;
  counts.has_end = has_end(info);
  return counts;
}

bool has_fin(int fd) noexcept {
  tcp_info info{};
  socklen_t len = sizeof info;
  if (sys::call(SYS_getsockopt, fd, IPPROTO_TCP, TCP_INFO, sys::arg(&info), sys::arg(&len)) != 0) return true;
  return has_end(info);
}

bool StreamImpl::names_us(int at) const noexcept {
  std::uint64_t now = 0;
  socklen_t len = sizeof now;
  return sys::call(SYS_getsockopt, at, SOL_SOCKET, SO_COOKIE, sys::arg(&now), sys::arg(&len)) == 0 && now == cookie;
}

void StreamImpl::attach(Lane* new_lane) noexcept {
  lane = new_lane;
  published_lane.store(new_lane, std::memory_order_release);
  if (lane_was_up.exchange(true, std::memory_order_relaxed) && stats != nullptr) stats->lanes_returned.add(1);
  owner = engine::process_id();
  tx.store(TxState::prepared, std::memory_order_relaxed);
  rx.store(RxState::tcp, std::memory_order_relaxed);
  anchor_event.store(false, std::memory_order_relaxed);
  phase.store(Phase::laned, std::memory_order_seq_cst);
  lane->write_word(kPrepare, 0);
  end_if_half_closed(fd);
}

// Rule 4, custody: only while every byte that the kernel has moved for this socket went through us.
void StreamImpl::try_ready(int at) noexcept {
  if (rx.load(std::memory_order_relaxed) != RxState::tcp || !lane->said(kPrepare)) return;
  if (rx_shut && tx_shut) return abandon_rx();
  if (kernel_receivers.load(std::memory_order_seq_cst) != 0 || plain_waiters.load(std::memory_order_seq_cst) != 0) return;
  const AnchorCounts counts = anchor_counts(at);
  if (!counts.ok) return take_down_locked(LaneReason::foreign_use);
  if (counts.has_end) {  // all of it has come by TCP
    rx.store(RxState::ended, std::memory_order_release);
    state_edges.fetch_add(1, std::memory_order_relaxed);
    return;
  }
  if (counts.received - counts.queued != tcp_received.load(std::memory_order_relaxed)) {
    // Bytes may have come between the two looks at the kernel: only a lasting difference is a foreign reader.
    if (++doubts > 16) take_down_locked(LaneReason::foreign_use);
    return;
  }
  rx.store(RxState::ready, std::memory_order_release);
  lane->write_word(kReady, 0);
}

void StreamImpl::try_switch(int at) noexcept {
  if (tx.load(std::memory_order_relaxed) != TxState::prepared) return;
  if (lane->said(kAbandon)) {
    end_tx_locked();
    return;
  }
  if (!lane->said(kReady) || kernel_senders.load(std::memory_order_seq_cst) != 0) return;
  const AnchorCounts counts = anchor_counts(at);
  if (!counts.ok || counts.sent != tcp_sent.load(std::memory_order_relaxed)) {
    take_down_locked(LaneReason::foreign_use);
    return;
  }
  if (!counts.may_send) return end_tx_locked();  // half-closed before the lane was up
  tx.store(TxState::lane, std::memory_order_release);
  state_edges.fetch_add(1, std::memory_order_relaxed);
  lane->write_word(kSwitch, counts.sent);
  tx_switched = true;
  tx_switched_at = counts.sent;
  if (stats != nullptr) stats->switches_up.add(1);
}

void StreamImpl::advance_rx(int at) noexcept {
  if (rx.load(std::memory_order_relaxed) == RxState::tcp) try_ready(at);
  if (rx.load(std::memory_order_relaxed) == RxState::refused) follow_refusal(at);
  if (rx.load(std::memory_order_relaxed) == RxState::abandoned) {
    const bool over = lane->said(kEnd) || no_word_comes();  // looked at first, for it is said last
    std::uint64_t end = 0;
    if (lane->said(kResend, &end)) {
      std::uint64_t p = 0;
      const std::uint64_t received = tcp_received.load(std::memory_order_relaxed);
      resent_from = lane->said(kSwitch, &p) && p > received ? p : received;
      resent_to = resent_from + (end > lane->rx_bytes() ? end - lane->rx_bytes() : 0);
      // Others take some of them past us, so that nobody can say when all have come.
      rx.store(others_use_anchor ? RxState::ended : RxState::resent, std::memory_order_release);
      state_edges.fetch_add(1, std::memory_order_relaxed);
    } else if (over) {
      rx.store(before_abandon, std::memory_order_release);
      state_edges.fetch_add(1, std::memory_order_relaxed);
    }
  }
  if (rx.load(std::memory_order_relaxed) == RxState::resent && tcp_received.load(std::memory_order_relaxed) >= resent_to) {
    rx.store(RxState::ended, std::memory_order_release);
    state_edges.fetch_add(1, std::memory_order_relaxed);
  }
  if (rx.load(std::memory_order_relaxed) == RxState::ready) {
    const bool ended = lane->said(kEnd);  // looked at first, for it is said last
    const bool over = peer_gone || (lane->unordered() && lane_is_dead());
    if (lane->said(kSwitch, &switch_at)) {
      rx.store(RxState::draining, std::memory_order_release);
    } else if (ended || over) {
      if (!ended && lane->unordered()) error_due = -ECONNRESET;  // SWITCH and bytes may be lost behind those of the anchor
      rx.store(RxState::ended, std::memory_order_release);
    }
  }
  if (rx.load(std::memory_order_relaxed) == RxState::draining && tcp_received.load(std::memory_order_relaxed) >= switch_at) {
    rx.store(RxState::lane, std::memory_order_release);
    state_edges.fetch_add(1, std::memory_order_relaxed);
  }
  if (rx.load(std::memory_order_relaxed) != RxState::lane || lane->unread() != 0 || lane->is_reading()) return;
  const bool over = peer_gone || lane_is_dead();
  if (is_recovering() || (!lane->said(kEnd) && !over)) return;
  if (lane->unordered()) acknowledge_end();
  // What was put there before the end was said, or before the peer went, is visible by now.
  lane->drain();
  if (lane->unread() != 0) return;
  std::uint64_t end = 0;
  const bool ended = lane->said(kEnd, &end);
  // Rule 7: the end is known and bytes before it are missing; or nobody knows what was under way when the peer went.
  if (ended ? lane->rx_bytes() != end : lane->unordered()) bytes_missing = true;
  rx.store(RxState::ended, std::memory_order_release);
  state_edges.fetch_add(1, std::memory_order_relaxed);
}

// Rule 7: FIN and RST of the anchor are the only end; rule 6: bytes beside the lane are the stream's.
void StreamImpl::look_at_anchor(int at) noexcept {
  if (!anchor_event.exchange(false, std::memory_order_acq_rel)) return;
  if (rx.load(std::memory_order_relaxed) != RxState::lane || !names_us(at)) return;
  std::byte one;
  const long n = sys::call(SYS_recvfrom, at, sys::arg(&one), 1, MSG_PEEK | MSG_DONTWAIT);
  if (n == -EAGAIN || (n == 0 && rx_shut && !has_fin(at))) return;
  if (n < 0) error_due = static_cast<int>(n);  // the kernel tells it once; the program gets it after the lane's bytes
  if (lane->unordered()) return (void)end_is_awaited();
  lane->drain();
  if (lane->unread() != 0) {
    anchor_event.store(true, std::memory_order_release);  // the lane's bytes first, then look again
    return;
  }
  if (lane->said(kEnd)) return;    // advance_rx() knows what to do
  if (n > 0 && !lane_is_left()) {  // its program sends past the library: what it sends by the lane, too, has to come behind these
    take_down_locked(LaneReason::foreign_use);
    if (rx.load(std::memory_order_relaxed) != RxState::lane) return;
  }
  rx.store(RxState::ended, std::memory_order_release);
  state_edges.fetch_add(1, std::memory_order_relaxed);
}

// Rule 7. What is unsent is dropped, as the kernel always does.
bool StreamImpl::reset_if_unread(int at, const Lane* behind) noexcept {
  const RxState now = rx.load(std::memory_order_relaxed);
  const bool reads_lane = now == RxState::ready || now == RxState::draining || now == RxState::lane;
  if (lane_rest() == 0 && (!reads_lane || lane->unread() == 0)) return false;
  if (others_use_anchor) {  // for them it goes on, if it can
    keep_gap_from_others(at);
    return false;
  }
  resend.clear();
  unguard_resend();
  if (heirs.load(std::memory_order_relaxed) != 0)  // nor can a child read on behind bytes that only we had
    break_off(at);
  else if (behind != nullptr)
    engine::linger(at, {}, behind, engine::Farewell::reset);
  else
    KeptBytes::set_linger(at, {1, 0});
  return true;
}

void StreamImpl::end_tx_locked() noexcept {
  if (lane->is_lent() && !settle_lent()) return;
  const bool switched = tx.load(std::memory_order_relaxed) == TxState::lane;
  if (switched && stats != nullptr) stats->switches_down.add(1);
  if (switched) let_held_go();
  lane->write_word(kEnd, switched ? lane->tx_bytes() : 0);
  tx.store(switched && lane->unordered() ? TxState::ending : TxState::ended, std::memory_order_release);
  state_edges.fetch_add(1, std::memory_order_relaxed);
}

// What the peer has said it sends, or has left behind, lies in our memory: that direction is read on, whoever takes the lane down.
void StreamImpl::abandon_rx() noexcept {
  const RxState now = rx.load(std::memory_order_relaxed);
  if (now == RxState::tcp) {  // READY was never said: the peer cannot have switched
    lane->write_word(kAbandon, 0);
    rx.store(RxState::ended, std::memory_order_release);
    state_edges.fetch_add(1, std::memory_order_relaxed);
    return;
  }
  if (now != RxState::ready && now != RxState::draining && now != RxState::lane) return;
  if (lane->said(kEnd) || lane_is_left()) return;
  lane->refuse_advert();
  before_abandon = now;
  rx.store(RxState::abandoned, std::memory_order_release);
  lane->write_word(kAbandon, lane->rx_bytes());
}

namespace {
/// Bytes that TCP would have taken from a peer whose program sends more than ours reads.
std::uint64_t window_of(int fd) noexcept {
  int buffer = 0;
  socklen_t len = sizeof buffer;
  sys::call(SYS_getsockopt, fd, SOL_SOCKET, SO_RCVBUF, sys::arg(&buffer), sys::arg(&len));
  return static_cast<std::uint64_t>(buffer) / 2;
}
}  // namespace

// Shut for both, a socket of TCP's takes nothing more: the first byte that comes resets the connection. So the peer is to send by
// TCP what does not count as arrived yet, and the kernel refuses it. It must not come before our FIN.
void StreamImpl::refuse_late(int at) noexcept {
  if (!rx_shut || !fin_is_out()) return;
  if (tx.load(std::memory_order_relaxed) == TxState::prepared) end_tx_locked();
  const RxState now = rx.load(std::memory_order_relaxed);
  if (now == RxState::tcp) return abandon_rx();
  if ((now != RxState::draining && now != RxState::lane) || lane->said(kEnd) || lane_is_left() || is_recovering() ||
      lane->is_reading() || lane->has_read() || lane->has_sink() || lane->has_sink_end() || anchor_counts(at).may_send)
    return;
  lane->refuse_advert();
  lane->drain();
  rest_end = lane->rx_bytes() + std::min(lane->unread(), window_of(at));
  rx.store(RxState::refused, std::memory_order_release);
  state_edges.fetch_add(1, std::memory_order_relaxed);
  lane->write_word(kAbandon, rest_end);
  lane->wake_sleepers();
}

bool StreamImpl::holds_rest() const noexcept {
  return lane_rest() != 0 || tcp_received.load(std::memory_order_relaxed) < switch_at;
}

// The peer has answered ABANDON, or has said END before it saw it; or it cannot do without END, as on an unordered lane: then what
// it had sent until then has come by the lane.
void StreamImpl::follow_refusal(int at) noexcept {
  std::uint64_t end = 0;
  const bool over = no_word_comes(), ended = lane->said(kEnd, &end);
  if (!ended && !over && !lane->said(kResend)) return;
  if (lane->unordered()) acknowledge_end();
  if (ended && end > rest_end && !std::exchange(late_are_refused, true)) {
    break_off(at);  // to the peer it is what the kernel's refusal is, and here the error is the kernel's to tell
    if (names_us(at)) sys::call(SYS_shutdown, at, SHUT_RDWR);
  }
  if (holds_rest()) return;
  rx.store(RxState::ended, std::memory_order_release);
  state_edges.fetch_add(1, std::memory_order_relaxed);
}

bool StreamImpl::resume_after_resend() noexcept {
  const std::uint64_t received = tcp_received.load(std::memory_order_relaxed);
  if (received < resent_from || received >= resent_to) return false;
  lane->drain();
  lane->discard(static_cast<std::size_t>(received - resent_from));
  anchor_event.store(true, std::memory_order_release);  // its end is still to be seen
  rx.store(RxState::lane, std::memory_order_release);
  state_edges.fetch_add(1, std::memory_order_relaxed);
  return true;
}

// Rule 8: local recovery reads the shared memory. The bytes past the position that the peer named lie unread in its buffers.
void StreamImpl::handle_abandon(int at) noexcept {
  std::uint64_t from = 0;
  if (has_said_end() || !lane->said(kAbandon, &from)) return;
  if (lane->is_lent()) return lane->cancel_offer();  // who waits for its end comes back here
  if (stats != nullptr && stats->reason.load(std::memory_order_relaxed) == LaneReason::none) stats->set_reason(LaneReason::refused);
  // RESEND has no acknowledgement, and most devices cannot read anything back: the peer reads on by the lane, to END.
  if (tx.load(std::memory_order_relaxed) != TxState::lane || lane->unordered()) return end_tx_locked();
  const std::uint64_t sent = lane->tx_bytes();
  const std::size_t bytes = from < sent ? static_cast<std::size_t>(sent - from) : 0;
  std::byte* const room = bytes != 0 ? resend.room(bytes) : nullptr;
  if (bytes != 0 && (room == nullptr || !lane->read_back(from, room, bytes))) {
    RDMA_LOG(warn, "fd %d: %zu bytes of an abandoned lane cannot be read back; the peer has to read them where they are", at,
             bytes);
    resend.clear();
    return end_tx_locked();
  }
  if (stats != nullptr) stats->switches_down.add(1);
  lane->write_word(kResend, sent);
  tx.store(TxState::ended, std::memory_order_release);
  state_edges.fetch_add(1, std::memory_order_relaxed);
  if (bytes == 0) return;
  resend.added(bytes);
  (void)flush_resend(at);
}

// After a broken rule of the protocol the switch words and the memory are still good: each side tells how far it has read, the
// other sends the rest by TCP, and nothing is lost. After a failure of the device nobody knows what has arrived.
void StreamImpl::leave_dead_lane(int at) noexcept {
  if (!lane->dead() || lane_is_left() || is_recovering() || begin_recovery()) return;
  const Recovery now = recovery.load(std::memory_order_relaxed);
  if (now == Recovery::over || now == Recovery::done || (tx.load() == TxState::ended && rx.load() == RxState::ended)) return;
  if (lane->violated()) return take_down_locked(LaneReason::protocol_error);
  if (lane->unordered()) return leave_failed_lane(at);
  RDMA_LOG(error, "fd %d: the lane failed (%s) with bytes under way; the connection is reset", at, lane->failure());
  if (stats != nullptr) stats->lanes_failed.add(1);
  take_down_locked(LaneReason::device_lost);
  leave_gap(at);
}

bool StreamImpl::flush_resend(int at) noexcept {
  if (!end_is_settled()) return false;
  if (!names_us(at)) {  // closed behind our back: what we hold must not reach a stranger
    resend.clear();
    fin_due = false;
    return true;
  }
  while (!resend.empty()) {
    const long n = send_kept(at);
    if (n == -EAGAIN || n == -EINTR) {
      guard_resend();
      return false;
    }
    if (n < 0) resend.clear();  // the connection is gone: nobody reads the rest
  }
  unguard_resend();
  if (std::exchange(fin_due, false)) sys::call(SYS_shutdown, at, SHUT_WR);
  return true;
}

long StreamImpl::send_kept(int at) noexcept {
  std::array<std::byte, Transcript::kMost> first;
  const std::size_t shown = transcript.sent.is_open() ? std::min(resend.size(), first.size()) : 0;
  std::memcpy(first.data(), resend.data(), shown);
  const long n = resend.send_by(at);
  if (n <= 0 || shown == 0) return n;
  const iovec bytes{first.data(), shown};
  transcript.sent.add({&bytes, 1}, static_cast<std::size_t>(n), kernel_senders.load(std::memory_order_acquire) + 1);
  return n;
}

void StreamImpl::guard_resend() noexcept {
  if (std::exchange(resend_guarded, true)) return;
  KeptBytes::reset_if_killed(fd, linger_option);
}
void StreamImpl::unguard_resend() noexcept {
  if (std::exchange(resend_guarded, false)) KeptBytes::set_linger(fd, linger_option);
}

void StreamImpl::tend() noexcept {
  if (lane != nullptr && !has_said_end() && lane->said(kAbandon)) handle_abandon(fd);
  if (lane != nullptr && !lane->unordered() && asked_down.exchange(Asked::no) != Asked::no)
    take_down_locked(LaneReason::second_process);
  if (lane != nullptr && lane->unordered() && phase.load(std::memory_order_relaxed) == Phase::laned) {
    acknowledge_end();
    if (const Asked asked = asked_down.load(std::memory_order_acquire); asked != Asked::no) {
      if (asked == Asked::now) take_down_locked(LaneReason::second_process);
      advance_rx(fd);
      asked_down.store(is_through() ? Asked::no : Asked::under_way, std::memory_order_relaxed);
    }
    (void)end_is_settled();
    if (tx.load(std::memory_order_relaxed) == TxState::prepared) lane->drain();  // the program's calls look at TCP alone
    leave_dead_lane(fd);
    if (rx.load(std::memory_order_relaxed) == RxState::lane) look_at_anchor(fd);
    give_up_on_end(fd);
  }
  if (!resend.empty() || fin_due) (void)flush_resend(fd);
  if (lane != nullptr && rx_shut && tx_shut && phase.load(std::memory_order_relaxed) == Phase::laned) {
    advance_rx(fd);
    refuse_late(fd);
  }
}

Lane* StreamImpl::take_spent_lane() noexcept {
  if (lane == nullptr || phase.load(std::memory_order_relaxed) != Phase::laned || waiters != 0 || !resend.empty() ||
      error_due.load(std::memory_order_relaxed) != 0 || bytes_missing || tx.load(std::memory_order_relaxed) != TxState::ended ||
      rx.load(std::memory_order_relaxed) != RxState::ended)
    return nullptr;
  lane->write_word(kGone, 0);
  const bool rests = recovery.load(std::memory_order_relaxed) == Recovery::done && !taken_down;
  if (rests) forget_lane();
  phase.store(rests ? Phase::resting : Phase::final, std::memory_order_seq_cst);
  published_lane.store(nullptr, std::memory_order_release);
  return std::exchange(lane, nullptr);
}

// Rule 8: stores only, waits for nobody; also in a fork's child and before exec.
void StreamImpl::take_down_locked(LaneReason reason) noexcept {
  if (inherited.is_unused) return take_down_inherited(reason);
  taken_down = true;
  if (phase.load(std::memory_order_relaxed) != Phase::laned) {
    phase.store(Phase::final, std::memory_order_release);
    if (stats != nullptr) stats->set_reason(reason);
    return;
  }
  others_use_anchor =
      others_use_anchor || reason == LaneReason::io_uring || reason == LaneReason::second_process || reason == LaneReason::exec;
  // What the peer's ring waits for has to come by TCP.
  if (reason == LaneReason::io_uring && abandoned()) handle_abandon(fd);
  const TxState tx_now = tx.load(std::memory_order_relaxed);
  if (tx_now == TxState::lane || tx_now == TxState::prepared) end_tx_locked();
  abandon_rx();
  if (stats != nullptr) stats->set_reason(reason);
  RDMA_LOG(info, "fd %d: lane taken down: %s", fd.load(), to_string(reason));
  lane->wake_sleepers();
  engine::nudge();
}

}  // namespace sdp
