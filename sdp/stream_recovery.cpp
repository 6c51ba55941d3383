// After a failure of the device or of the path to it: both ends stop their lane, tell each other by a connection of the two
// processes' own (peer_link.hpp) how much has arrived, and go on by TCP from there. Rule 8 of architecture 2.4.
//
// The failed lane is read to the last byte that has arrived, as if the peer had said END there; the sender gives TCP what follows
// from the memory in which it keeps sent bytes until they are acknowledged. Between the two a sender is like one whose END is not
// acknowledged yet: what it sends waits.
#include <sys/socket.h>

#include "rdma_core/base/log.hpp"
#include "rdma_core/base/sys.hpp"
#include "sdp/stream_impl.hpp"

namespace sdp {

bool StreamImpl::begin_recovery() noexcept {
  if (!may_recover() || phase.load(std::memory_order_relaxed) != Phase::laned || lane_is_left()) return false;
  RDMA_LOG(info, "fd %d: the lane failed (%s): asking the peer how much it has", fd.load(), lane->failure());
  recovery.store(Recovery::under_way, std::memory_order_release);
  lane->stop();
  const TxState now = tx.load(std::memory_order_relaxed);
  if (now == TxState::lane) {
    if (stats != nullptr) stats->switches_down.add(1);
    tx.store(TxState::ending, std::memory_order_release);
  } else if (now == TxState::prepared) {
    tx.store(TxState::ended, std::memory_order_release);
  }
  if (stats != nullptr) {
    stats->lanes_failed.add(1);
    stats->set_reason(LaneReason::device_lost);
  }
  end_due_ns.store(0, std::memory_order_relaxed);
  state_edges.fetch_add(1, std::memory_order_relaxed);
  lane->wake_sleepers();
  engine::nudge();
  return true;
}

void StreamImpl::lane_is_disconnected() noexcept {
  if (phase.load(std::memory_order_relaxed) != Phase::laned || is_recovering() || begin_recovery()) return;
  peer_gone.store(true, std::memory_order_relaxed);
  state_edges.fetch_add(1, std::memory_order_relaxed);
}

Arrived StreamImpl::arrived() const noexcept {
  return {tx_switched, tx_switched_at, lane->tx_bytes(), lane->rx_arrived(), fin_is_out()};
}

/// What the peer says of itself is untrusted: it may cost the connection, nothing else.
bool StreamImpl::is_sound(const Arrived& peer) const noexcept {
  RxState now = rx.load(std::memory_order_relaxed);
  if (now == RxState::abandoned) now = before_abandon;
  const bool may_have_switched = now != RxState::tcp;  // not without our READY
  const bool has_switched = now == RxState::draining || now == RxState::lane || now == RxState::refused;
  return (peer.switched ? may_have_switched : !has_switched && lane->rx_arrived() == 0) && peer.sent >= lane->rx_arrived() &&
         peer.received <= lane->tx_bytes();
}

/// What the peer has not received, before what waits behind it. If FIN is out already nothing can follow it, and the peer is told.
bool StreamImpl::give_back_to_tcp(std::uint64_t from) noexcept {
  if (fin_is_out()) return true;
  const auto bytes = static_cast<std::size_t>(lane->tx_bytes() - from);
  if (!resend.put_before(bytes, [&](std::byte* out) { return lane->read_back(from, out, bytes); })) return false;
  count_tcp(true, static_cast<std::int64_t>(bytes));
  return true;
}

void StreamImpl::recover(const Arrived& peer) noexcept {
  if (recovery.load(std::memory_order_relaxed) != Recovery::under_way) return;
  const bool ending = tx.load(std::memory_order_relaxed) == TxState::ending;
  if (!is_sound(peer) || (ending && !give_back_to_tcp(peer.received))) return give_up_recovery();
  recovery.store(Recovery::done, std::memory_order_release);
  if (ending) tx.store(TxState::ended, std::memory_order_release);
  if (rx.load(std::memory_order_relaxed) == RxState::abandoned) rx.store(before_abandon, std::memory_order_relaxed);
  if (peer.switched) {
    lane->suppose(kSwitch, peer.switch_at);
    lane->suppose(kEnd, peer.closed ? peer.sent : lane->rx_arrived());
  } else {
    rx.store(RxState::ended, std::memory_order_release);
  }
  if (!resend.empty()) guard_resend();
  RDMA_LOG(info, "fd %d: on by TCP; %llu bytes of the lane had not arrived", fd.load(),
           static_cast<unsigned long long>(peer.sent - lane->rx_arrived()));
  state_edges.fetch_add(1, std::memory_order_relaxed);
  advance_rx(fd);
  (void)flush_resend(fd);
  lane->wake_sleepers();
  engine::nudge();
}

void StreamImpl::forget_lane() noexcept {
  state_edges.fetch_add(lane->rx_arrivals() + 1, std::memory_order_relaxed);  // Stream::rx_edges() never goes back
  recovery.store(Recovery::none, std::memory_order_relaxed);
  strict.store(false, std::memory_order_relaxed);
  peer_gone.store(false, std::memory_order_relaxed);
  anchor_event.store(false, std::memory_order_relaxed);
  has_large_buffer.store(false, std::memory_order_relaxed);
  tx_blocked.store(false, std::memory_order_relaxed);
  full_at.store(0, std::memory_order_relaxed);
  end_due_ns.store(0, std::memory_order_relaxed);
  asked_down.store(Asked::no, std::memory_order_relaxed);
  tx_switched = end_acknowledged = awaits_posts = gone_is_said = false;
  doubts = words_seen = 0;
  switch_at = tx_switched_at = resent_from = resent_to = 0;
  conn = 0;
}

void StreamImpl::give_up_recovery() noexcept {
  if (const Recovery now = recovery.load(std::memory_order_relaxed); now == Recovery::over || now == Recovery::done) return;
  const bool begun = recovery.exchange(Recovery::over, std::memory_order_acq_rel) == Recovery::under_way;
  if (phase.load(std::memory_order_relaxed) != Phase::laned) return;
  if (begun) leave_failed_lane(fd);  // while it is not taken for settled that the peer has everything
  peer_gone.store(true, std::memory_order_relaxed);
  state_edges.fetch_add(1, std::memory_order_relaxed);
  lane->wake_sleepers();
}

}  // namespace sdp
