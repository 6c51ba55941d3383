// Receives and sends in place, the other way: who waits in recv() with room for much lets the peer's sender write there, and who
// sends much while the peer's reader waits so writes. recv() returns when nobody writes to its memory any more, send() when the
// peer has what was written.
#include <sys/socket.h>

#include <algorithm>
#include <cerrno>

#include "rdma_core/base/program_call.hpp"
#include "sdp/engine.hpp"
#include "sdp/lent_watch.hpp"
#include "sdp/stream_impl.hpp"

namespace sdp {

namespace sys = rdma::sys;

namespace {

/// A reader that has waited for so long goes on waiting without lending its memory: an idle connection pins none, and a thread that
/// waits can be cancelled.
constexpr std::int64_t kSenderPatienceNs = 100 * LentWatch::kMillisecond;

/// `woken` is what wait() has returned. The time that a call has ended it as well as a handler that is not restarted.
int end_of_call(int woken, std::int64_t deadline, std::int64_t now) noexcept {
  const bool is_ended = woken == -EINTR && sys::is_ended(deadline != 0 ? sys::EndedBy::any : sys::EndedBy::no_restart);
  if (woken == -EINTR) sys::forget_handlers();  // or the next wait would not sleep
  return is_ended ? -EINTR : deadline != 0 && now >= deadline ? -EAGAIN : 0;
}

}  // namespace

// --- the reader

StreamImpl::InPlace StreamImpl::receive_in_place(int at, IovCursor& to, std::uint16_t gen, std::int64_t deadline) noexcept {
  const std::int64_t now = LentWatch::now_ns();
  Pause& pause = lane->zero_copy().receives;
  if (rx.load(std::memory_order_relaxed) != RxState::lane || !may_recover() || pause.is_on(now) ||
      (deadline != 0 && now >= deadline))
    return {};
  const Lane::Sunk sunk = lane->advertise(to.data(), to.chunk());
  if (sunk == Lane::Sunk::unregistered) {
    pause.begin(now);
    if (stats != nullptr) stats->zero_copy.unregistered.add(1);
  }
  if (sunk == Lane::Sunk::not_pipelined && !lane->zero_copy().wishes.is_on(now)) {
    lane->zero_copy().wishes.begin(now);
    lane->wish_pipelined();
  }
  if (sunk != Lane::Sunk::yes) return {};
  lane->zero_copy().wishes.went_well();
  InPlace got{.was_offered = true};
  bool came_in_time = true;
  got.result = await_sunk(gen, deadline, came_in_time);
  if (generation.load(std::memory_order_relaxed) == gen && lane->has_sink()) settle_sink(at, gen);
  if (generation.load(std::memory_order_relaxed) != gen) return got;  // closed: the lane may be gone already
  const bool cancelled = lane->zero_copy().sink.is_cancelled;
  const std::uint32_t bytes = lane->take_sunk();
  to.skip(bytes);
  got.bytes = bytes;
  if (bytes != 0)
    lane->zero_copy().receives.went_well();
  else if (got.result == 0 && came_in_time)
    lane->zero_copy().receives.begin(LentWatch::now_ns());
  if (stats == nullptr) return got;
  stats->zero_copy.sinks.add(1);
  stats->zero_copy.sinks_cancelled.add(cancelled ? 1 : 0);
  stats->zero_copy.sinks_unused.add(bytes == 0 && !cancelled ? 1 : 0);
  if (bytes == 0) return got;
  stats->lane.bytes_received.add(bytes);
  stats->lane.messages_received.add(1);
  stats->zero_copy.bytes_received.add(bytes);
  stats->zero_copy.bytes_placed.add(bytes);
  return got;
}

/// Returns also when something else is to be looked at than what the peer writes.
int StreamImpl::await_sunk(std::uint16_t gen, std::int64_t deadline, bool& came_in_time) noexcept {
  const std::int64_t patience = LentWatch::now_ns() + kSenderPatienceNs;
  int result = 0;
  while (result == 0 && lane->has_sink()) {
    if (rx.load(std::memory_order_relaxed) != RxState::lane || lane->said(kEnd) || peer_gone || lane->dead() || is_recovering() ||
        rx_shut || anchor_event.load(std::memory_order_acquire))
      return 0;
    const std::int64_t until = deadline != 0 ? std::min(deadline, patience) : patience;
    const int woken = wait(For::bytes, until, true, Patience::spin_and_sleep_uncancelled);
    if (generation.load(std::memory_order_relaxed) != gen) return 0;
    lane->drain();
    const std::int64_t now = LentWatch::now_ns();
    result = end_of_call(woken, deadline, now);
    came_in_time = now < patience;
    if (!came_in_time) break;
  }
  return lane->has_sink() ? result : 0;
}

// Of a peer that has said END, or that it writes no more, all writes have arrived. Else it answers, or the lane is given up: then
// what it may have written here and not told of comes by TCP.
void StreamImpl::settle_sink(int at, std::uint16_t gen) noexcept {
  const std::int64_t patience = std::int64_t{engine::options().lane_timeout_s} * 1000 * LentWatch::kMillisecond;
  std::int64_t now = LentWatch::now_ns();
  LentWatch watch(now);
  watch.await_answer(now);
  lane->cancel_sink();
  while (lane->has_sink()) {
    if (lane->end_reached() || lane->said(kGone)) {
      lane->drain();  // what came before that word
      lane->drop_sink();
    } else if (lane->dead() || lane_is_over()) {
      leave_dead_lane(at);
      if (lane->has_sink()) lane->stop();
    } else if (watch.still_for(now) >= patience) {
      if (!begin_recovery()) lane->stop();
    } else {
      if (watch.is_time_to_ask(now)) {
        wants_peers_look.store(true);
        engine::nudge();
      }
      if (wait(For::bytes, watch.next_look(now), true, Patience::spin_and_sleep_uncancelled) == -EINTR) sys::forget_handlers();
      if (generation.load(std::memory_order_relaxed) != gen) return;
      lane->drain();
      now = LentWatch::now_ns();
    }
  }
}

// --- the sender

StreamImpl::InPlace StreamImpl::write_in_place(int at, IovCursor& from, std::uint16_t gen, std::int64_t deadline) noexcept {
  InPlace sent{.was_offered = true};
  if (!lane->has_target()) {
    sent.result = await_target(gen, deadline);
    return sent;  // whatever has happened meanwhile is to be looked at first
  }
  const std::int64_t now = LentWatch::now_ns();
  const Lane::Offered written =
      lane->write(from.data(), static_cast<std::uint32_t>(std::min<std::size_t>(from.chunk(), Lane::kLongestWrite)));
  if (written == Lane::Offered::unregistered) {
    lane->zero_copy().sends.begin(now);
    if (stats != nullptr) stats->zero_copy.unregistered.add(1);
  }
  if (written != Lane::Offered::yes) return {};
  sent.result = await_lent(at, gen, deadline, now);
  if (generation.load(std::memory_order_relaxed) != gen) return sent;  // closed: the lane may be gone already
  const std::uint32_t bytes = lane->take_written();
  from.skip(bytes);
  sent.bytes = bytes;
  lane->zero_copy().sends.went_well();
  if (stats == nullptr) return sent;
  stats->lane.bytes_sent.add(bytes);
  stats->lane.messages_sent.add(1);
  stats->zero_copy.bytes_sent.add(bytes);
  stats->zero_copy.bytes_written.add(bytes);
  return sent;
}

/// If it does not come the sends go by messages for a time, and then by offers.
int StreamImpl::await_target(std::uint16_t gen, std::int64_t deadline) noexcept {
  std::int64_t now = LentWatch::now_ns();
  const std::int64_t patience = now + LentWatch::kReaderPatienceNs;
  while (generation.load(std::memory_order_relaxed) == gen && phase.load(std::memory_order_relaxed) == Phase::laned &&
         tx.load(std::memory_order_relaxed) == TxState::lane && !lane->dead() && !lane_is_over() && !lane->said(kAbandon) &&
         !lane->has_target() && lane->writes_in_place()) {
    if (now >= patience) {
      lane->zero_copy().sends.begin(now);
      lane->leave_writing();
      return 0;
    }
    const std::int64_t until = deadline != 0 ? std::min(deadline, patience) : patience;
    const int woken = wait(For::target, until, true, Patience::spin_and_sleep_uncancelled);
    if (generation.load(std::memory_order_relaxed) != gen) return 0;
    lane->drain();
    now = LentWatch::now_ns();
    if (const int result = end_of_call(woken, deadline, now); result != 0) return result;
  }
  return 0;
}

}  // namespace sdp
