// A connection that several processes have: a fork's parent and its children, or the program that an exec starts. Rules 9 and 10 of
// architecture 2.4.
#include <sys/socket.h>

#include <utility>

#include "rdma_core/base/log.hpp"
#include "rdma_core/base/sys.hpp"
#include "sdp/engine.hpp"
#include "sdp/stream_impl.hpp"

namespace sdp {

namespace sys = rdma::sys;

StreamSnapshot StreamImpl::snapshot() noexcept {
  heirs.fetch_add(1, std::memory_order_relaxed);
  return {engine::handle_of(this), role,           blocking.load(), static_cast<std::uint8_t>(phase.load()),
          published_lane.load(),   rx_shut,        tx_shut,         fd,
          rcv_timeout_ns,          snd_timeout_ns, tcp_sent.load(), tcp_received.load()};
}

void StreamImpl::inherit(const StreamSnapshot& was) noexcept {
  role = was.role;
  fd = was.fd;
  rx_shut = was.rx_shut;
  tx_shut = was.tx_shut;
  blocking = was.blocking;
  rcv_timeout_ns = was.rcv_timeout_ns;
  snd_timeout_ns = was.snd_timeout_ns;
  tcp_sent = was.tcp_sent;
  tcp_received = was.tcp_received;
  stats = acquire_stats(was.fd);
  transcript.restart(engine::options().transports.leaves_host() && was.tcp_sent == 0 && was.tcp_received == 0);
  const auto parents_phase = static_cast<Phase>(was.phase);
  phase = parents_phase;
  if (parents_phase == Phase::final) return;
  owner = ~0U;
  if (const Inheritance& its = was.parents.impl()->inherited; its.is_unused) {
    inherited.from = its.from.load();
    inherited.phase = its.phase;
    inherited.lane = its.lane;
  } else {
    inherited.from = was.parents;
    inherited.phase = parents_phase;
    inherited.lane = was.lane;
  }
  inherited.heir_of = was.parents;
  inherited.is_unused = true;
  // A stream that is still to be judged is so at its first use; the others look when they see a lane that is not theirs.
  if (parents_phase != Phase::unjudged) phase = Phase::laned;
}

// With heirs of its own it is still counted, in their place.
void StreamImpl::leave_heirs() noexcept {
  if (heirs.load(std::memory_order_relaxed) != 0) return;
  const Stream counter = std::exchange(inherited.heir_of, Stream());
  if (!counter || counter.impl()->generation.load(std::memory_order_acquire) != counter.generation()) return;
  std::atomic<std::uint32_t>& count = counter.impl()->heirs;
  std::uint32_t now = count.load(std::memory_order_relaxed);
  while (now != 0 && !count.compare_exchange_weak(now, now - 1)) {
  }
}

bool StreamImpl::is_parents_too() noexcept {
  const Stream parents = inherited.from.load(std::memory_order_relaxed);
  if (!parents) return false;
  if (parents.impl()->generation.load(std::memory_order_acquire) == parents.generation() && engine::parent_lives()) return true;
  inherited.from.store(Stream(), std::memory_order_relaxed);
  return false;
}

// The parent's cell is shared memory, its lock too; the parent learns of it at its next call. What it has made since the fork, and
// a QP, can be used by it alone.
void StreamImpl::take_down_inherited(LaneReason reason) noexcept {
  const Stream parents = inherited.from.load(std::memory_order_relaxed);
  StreamImpl& parent = *parents.impl();
  inherited.is_unused = false;
  (void)parent.lock.lock();
  const bool current = parent.generation.load(std::memory_order_relaxed) == parents.generation();
  const Phase now = current ? parent.phase.load(std::memory_order_relaxed) : Phase::final;
  const bool is_its_own = now == Phase::laned && (parent.lane != inherited.lane || parent.lane->unordered());
  bool has_gap = false;
  if (now != Phase::final && !is_its_own) {
    parent.take_down_locked(reason == LaneReason::io_uring ? LaneReason::second_process : reason);
    has_gap = now == Phase::laned && parent.has_gap_for_others(fd);
  }
  const bool has_more = now == Phase::laned && (parent.tx.load() == TxState::ending || !parent.resend.empty());
  parent.lock.unlock();
  const bool was_on_tcp = inherited.phase == Phase::plain || inherited.phase == Phase::unjudged;
  if (was_on_tcp && now != Phase::laned && reason == LaneReason::second_process) {
    owner = 0;
    phase.store(inherited.phase, std::memory_order_release);
    return;
  }
  inherited.from = Stream();
  phase.store(Phase::final, std::memory_order_release);
  if (stats != nullptr) stats->set_reason(reason);
  if (!has_gap && ((!is_its_own && !has_more) || ask_parent_down(parents))) return;
  RDMA_LOG(error, "fd %d: %s; the connection is reset", fd.load(),
           has_gap ? "bytes of the parent's lane are unread, and what follows them comes by TCP"
                   : "the parent's lane could not be taken down");
  const sockaddr nobody{.sa_family = AF_UNSPEC, .sa_data = {}};
  sys::call(SYS_connect, fd, sys::arg(&nobody), sizeof nobody);  // the kernel says ECONNRESET here, and RST to the peer
}

// Bytes that the parent has taken in and not read lie in its own memory: with some of them this does not succeed.
bool StreamImpl::ask_parent_down(Stream parents) noexcept {
  constexpr int kPatienceMs = 1000, kStepMs = 2;
  StreamImpl& parent = *parents.impl();
  parent.asked_down.store(Asked::now, std::memory_order_release);
  engine::nudge_parent();
  for (int waited = 0; waited < kPatienceMs; waited += kStepMs) {
    (void)parent.lock.lock();
    const bool through = parent.generation.load(std::memory_order_relaxed) != parents.generation() || parent.is_through() ||
                         (parent.taken_down && parent.asked_down.load() == Asked::no && parent.tx.load() != TxState::ending &&
                          parent.resend.empty());  // of an ordered lane no more is needed: its peer sends what is unread anew
    parent.lock.unlock();
    if (through) return true;
    sys::call(SYS_poll, 0, 0, kStepMs);
  }
  return false;
}

// Who reads past us would take what TCP brings for the next bytes.
bool StreamImpl::has_gap_for_others(int at) const noexcept {
  std::uint64_t end = 0;
  const RxState now = rx.load(std::memory_order_relaxed);
  return (now == RxState::lane || now == RxState::draining) && lane->said(kEnd, &end) && lane->rx_bytes() < end && !has_fin(at);
}

void StreamImpl::keep_gap_from_others(int at) noexcept {
  if (lane == nullptr || phase.load(std::memory_order_relaxed) != Phase::laned || lane_is_left() || !has_gap_for_others(at) ||
      !names_us(at))
    return;
  RDMA_LOG(error, "fd %d: goes to others with bytes of the lane unread; the connection is reset", at);
  break_off(at);
}

void StreamImpl::reset_if_bytes_stay(int at) noexcept {
  if (lane == nullptr || phase.load() != Phase::laned || owner != engine::process_id()) return;
  if (!lane->unordered()) return keep_gap_from_others(at);
  const bool all_read = rx.load() == RxState::ended || lane->end_reached();
  if (all_read && tx.load() == TxState::ended && resend.empty()) return;
  RDMA_LOG(error, "fd %d: a program is run with bytes of the lane %s; the connection is reset", at,
           all_read ? "on their way" : "unread");
  break_off(at);
}

}  // namespace sdp
