// Long sends in place: the program's memory is offered to the peer's reader, and send() returns when nobody reads there any more.
// When the peer's reader does not come for it the rest goes as every send does, and further offers pause.
#include <sys/socket.h>

#include <algorithm>
#include <cerrno>
#include <utility>

#include "rdma_core/base/program_call.hpp"
#include "rdma_core/base/user_memory.hpp"
#include "sdp/engine.hpp"
#include "sdp/lent_watch.hpp"
#include "sdp/stream_impl.hpp"

namespace sdp {

namespace sys = rdma::sys;

StreamImpl::InPlace StreamImpl::send_in_place(int at, IovCursor& from, std::uint16_t gen, std::int64_t& deadline) noexcept {
  lane->drain();
  const std::int64_t now = LentWatch::now_ns();
  // An unordered lane that could not be recovered would be lost with what is under way on it, and nobody could say how much that
  // is.
  if ((lane->unordered() && !may_recover()) || lane->dead() || lane->zero_copy().sends.is_on(now)) return {};
  if (deadline == 0 && snd_timeout_ns != 0) deadline = now + snd_timeout_ns;
  if (lane->writes_in_place()) return write_in_place(at, from, gen, deadline);
  const auto bytes = static_cast<std::uint32_t>(std::min<std::size_t>(from.chunk(), Lane::kLongestOffer));
  const Lane::Offered offered = lane->offer(from.data(), bytes);
  if (offered != Lane::Offered::yes) {
    if (offered == Lane::Offered::unregistered) {
      lane->zero_copy().sends.begin(now);
      if (stats != nullptr) stats->zero_copy.unregistered.add(1);
    }
    return {};
  }
  InPlace sent{.was_offered = true};
  sent.result = await_lent(at, gen, deadline, now);
  if (generation.load(std::memory_order_relaxed) != gen) return sent;  // closed: the lane may be gone already
  const Lane::OfferEnd end = lane->take_offer();
  from.skip(end.sent);
  sent.bytes = end.sent;
  if (end.whole)
    lane->zero_copy().sends.went_well();
  else if (sent.result == 0)  // nothing of the caller's has ended it
    lane->zero_copy().sends.begin(LentWatch::now_ns());
  // Another thread may have unmapped what the peer could not read. Those who copy have to know that.
  if (!end.whole && sent.result == 0 && !rdma::is_readable(from.data(), std::min<std::size_t>(from.chunk(), bytes - end.sent)))
    sent.result = -EFAULT;
  if (stats == nullptr) return sent;
  stats->lane.bytes_sent.add(end.sent);
  stats->lane.messages_sent.add(1);
  stats->zero_copy.adverts.add(1);
  stats->zero_copy.bytes_sent.add(end.in_place);
  stats->zero_copy.cancelled.add(end.cancelled ? 1 : 0);
  stats->zero_copy.refused.add(!end.whole && !end.cancelled ? 1 : 0);
  return sent;
}

// A peer that is stopped answers nothing, and its lane waits, as with TCP, until the caller has to return: then without the lane.
int StreamImpl::await_lent(int at, std::uint16_t gen, std::int64_t deadline, std::int64_t now) noexcept {
  const std::int64_t patience = std::int64_t{engine::options().lane_timeout_s} * 1000 * LentWatch::kMillisecond;
  LentWatch watch(now);
  int result = 0;
  while (lane->is_lent()) {
    if (lane->dead() || lane_is_over()) {
      leave_dead_lane(at);
      if (lane->is_lent()) lane->unordered() ? lane->stop() : lane->cancel_offer();
      break;
    }
    watch.look(now, lane->offer_crossed());
    if (!watch.awaits_answer() && lane->is_writing()) {
      watch.await_answer(now, LentWatch::kWriteNs);
    } else if (!watch.awaits_answer() &&
               (result != 0 || watch.still_for(now) >= LentWatch::kReaderPatienceNs || lane->said(kAbandon))) {
      lane->cancel_offer();
      watch.await_answer(now);
    } else if (result != 0 && watch.still_for(now) >= patience) {
      if (!begin_recovery()) lane->stop();
      break;
    } else if (watch.is_time_to_ask(now)) {
      wants_peers_look.store(true);
      engine::nudge();
    }
    const bool has_deadline = deadline != 0 && result == 0;
    const std::int64_t until = has_deadline ? std::min(watch.next_look(now), deadline) : watch.next_look(now);
    const int woken = wait(For::room, until, true, Patience::spin_and_sleep_uncancelled);
    if (generation.load(std::memory_order_relaxed) != gen) break;
    lane->drain();
    now = LentWatch::now_ns();
    const bool is_ended = woken == -EINTR && sys::is_ended(deadline != 0 ? sys::EndedBy::any : sys::EndedBy::no_restart);
    if (woken == -EINTR) sys::forget_handlers();  // or the next wait would not sleep
    if (result != 0) continue;
    result = is_ended ? -EINTR : has_deadline && now >= deadline ? -EAGAIN : 0;
    if (result != 0) watch.begin_anew(now);
  }
  return result;
}

bool StreamImpl::settle_lent() noexcept {
  if (!lane->unordered()) {
    lane->cancel_offer();
    return true;
  }
  if (!lane->dead() && lane->settle_lent()) return true;
  if (begin_recovery()) return false;
  lane->stop();
  return true;
}

std::int64_t StreamImpl::read_in_place(int at, IovCursor& to, bool may_read, std::uint16_t gen) noexcept {
  if (!may_read || !lane->begin_read(to.data(), to.chunk())) {
    lane->refuse_advert();
    return 0;
  }
  const std::int64_t patience = std::int64_t{engine::options().lane_timeout_s} * 1000 * LentWatch::kMillisecond;
  LentWatch watch(LentWatch::now_ns());
  while (lane->is_reading()) {
    const std::int64_t now = LentWatch::now_ns();
    watch.look(now, lane->read_done());
    if (lane->dead() || lane_is_over() || watch.still_for(now) >= patience) {
      leave_dead_lane(at);
      if (lane->is_reading() && !begin_recovery()) lane->stop();
      break;
    }
    (void)wait(For::bytes, watch.next_look(now), true, Patience::spin_and_sleep_uncancelled);  // the device is writing to `to`
    if (generation.load(std::memory_order_relaxed) != gen) return 0;
    lane->drain();
  }
  const std::uint32_t bytes = lane->take_read();
  to.skip(bytes);
  if (rx.load(std::memory_order_relaxed) != RxState::lane) lane->refuse_advert();
  if (stats != nullptr) {
    stats->lane.bytes_received.add(bytes);
    stats->zero_copy.bytes_received.add(bytes);
  }
  return bytes;
}

}  // namespace sdp
