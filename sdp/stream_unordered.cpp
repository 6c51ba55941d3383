// What is different on a lane whose posts arrive later than bytes, FIN or RST that TCP carries after them, and are lost with their
// sender: every real RDMA device. Rules 3, 7 and 16 of architecture 2.4.
#include <sys/socket.h>

#include <algorithm>
#include <cstring>
#include <utility>

#include "rdma_core/base/clock.hpp"
#include "rdma_core/base/log.hpp"
#include "rdma_core/base/sys.hpp"
#include "sdp/iov_cursor.hpp"
#include "sdp/stream_impl.hpp"

namespace sdp {

namespace sys = rdma::sys;

bool StreamImpl::end_is_settled() noexcept {
  if (tx.load(std::memory_order_relaxed) != TxState::ending) return true;
  if (!lane->said(kEndSeen) && (is_recovering() || !lane_is_left())) return false;
  tx.store(TxState::ended, std::memory_order_release);
  state_edges.fetch_add(1, std::memory_order_relaxed);
  return true;
}

/// What the lane holds, before END is said: it goes, or follows by TCP.
void StreamImpl::let_held_go() noexcept {
  const std::size_t bytes = lane->held();
  if (bytes == 0 || lane->flush()) return;
  std::byte* const room = resend.room(bytes);
  if (room == nullptr) return break_off(fd);
  lane->take_held(room);
  resend.added(bytes);
  guard_resend();
  count_tcp(true, static_cast<std::int64_t>(bytes));
}

std::size_t StreamImpl::keep_behind_end(IovCursor& from) noexcept {
  std::size_t taken = 0;
  while (!from.done() && resend.size() < kBufferAhead) {
    const std::size_t n = std::min(from.chunk(), kBufferAhead - resend.size());
    std::byte* const room = resend.room(n);
    if (room == nullptr) break;
    std::memcpy(room, from.data(), n);
    resend.added(n);
    from.advance(n);
    taken += n;
  }
  if (taken != 0) guard_resend();
  count_tcp(true, static_cast<std::int64_t>(taken));
  return taken;
}

void StreamImpl::acknowledge_end() noexcept {
  if (end_acknowledged || !lane->said(kEnd)) return;
  end_acknowledged = true;
  lane->write_word(kEndSeen, 0);
}

void StreamImpl::end_if_half_closed(int at) noexcept {
  if (!lane->unordered() || tx.load(std::memory_order_relaxed) != TxState::prepared || owner != engine::process_id()) return;
  if (const AnchorCounts counts = anchor_counts(at); counts.ok && !counts.may_send) end_tx_locked();
}

bool StreamImpl::end_is_awaited() noexcept {
  if (!lane->unordered() || lane->said(kEnd) || lane_is_over()) return false;
  if (is_recovering()) return true;
  if (end_due_ns.load(std::memory_order_relaxed) == 0) {
    end_due_ns.store(rdma::SteadyClock{}.now() + kEndPatienceNs, std::memory_order_relaxed);
    engine::nudge();
  }
  return true;
}

// The peer's process is gone without a word from the CM, or it writes to the connection past us. Nobody knows what is under way.
void StreamImpl::give_up_on_end(int at) noexcept {
  const std::int64_t due = end_due_ns.load(std::memory_order_relaxed);
  if (due == 0) return;
  if (!end_is_awaited()) return end_due_ns.store(0, std::memory_order_relaxed);
  if (rdma::SteadyClock{}.now() < due) return;
  RDMA_LOG(error, "fd %d: the connection ended and the lane's end did not come; the connection is reset", at);
  end_due_ns.store(0, std::memory_order_relaxed);
  if (stats != nullptr) stats->set_reason(LaneReason::peer_gone);
  peer_gone.store(true, std::memory_order_relaxed);
  state_edges.fetch_add(1, std::memory_order_relaxed);
  leave_gap(at);
}

// The peer's exit looks like a failure of the device. It is none if nothing was under way: what is missing of the peer's bytes
// advance_rx() knows.
void StreamImpl::leave_failed_lane(int at) noexcept {
  const bool lost = !end_is_settled() || (tx.load(std::memory_order_relaxed) == TxState::lane && lane->unacknowledged() != 0);
  RDMA_LOG(info, "fd %d: the lane failed (%s)%s", at, lane->failure(),
           lost ? " with bytes under way; the connection is reset" : "");
  peer_gone.store(true, std::memory_order_relaxed);
  if (lost && stats != nullptr && recovery.load(std::memory_order_relaxed) == Recovery::none) stats->lanes_failed.add(1);
  take_down_locked(LaneReason::device_lost);
  if (lost) leave_gap(at);
}

// To the peer it is a RST, and here what a RST leaves: one ECONNRESET, behind what has come by the lane; then the end.
void StreamImpl::leave_gap(int at) noexcept {
  error_due = -ECONNRESET;
  if (!names_us(at)) return;
  break_off(at);
  sys::call(SYS_shutdown, at, SHUT_RDWR);
  int told = 0;
  socklen_t size = sizeof told;
  sys::call(SYS_getsockopt, at, SOL_SOCKET, SO_ERROR, sys::arg(&told), sys::arg(&size));
}

bool StreamImpl::last_words_arrived() noexcept {
  if (!end_acknowledged || lane_is_over()) return true;
  if (!std::exchange(awaits_posts, true)) lane->await_posts();
  lane->drain();
  return lane->are_posts_done();
}

void StreamImpl::break_off(int at) noexcept {
  const sockaddr nobody{.sa_family = AF_UNSPEC, .sa_data = {}};
  if (names_us(at)) sys::call(SYS_connect, at, sys::arg(&nobody), sizeof nobody);
}

}  // namespace sdp
