// The way of nearly every send and recv while a stream is on its lane: one message, or a place in the buffer, and no case to be
// looked at. Whatever else there is to do, stream_io.cpp does.
#include <sys/socket.h>

#include "rdma_core/base/user_memory.hpp"
#include "sdp/engine.hpp"
#include "sdp/stream_impl.hpp"

namespace sdp {

std::int64_t StreamImpl::send_at_once(const void* bytes, std::size_t count, int flags, std::uint16_t gen) noexcept {
  constexpr int kUnderstood = MSG_DONTWAIT | MSG_NOSIGNAL | MSG_MORE;
  if (phase.load(std::memory_order_acquire) != Phase::laned || count - 1 >= Lane::kBurstSend || (flags & ~kUnderstood) != 0 ||
      !lock.enter())
    return 0;
  const bool open = generation.load(std::memory_order_relaxed) == gen && tx.load(std::memory_order_relaxed) == TxState::lane &&
                    phase.load(std::memory_order_relaxed) == Phase::laned && owner == engine::process_id() &&
                    !tx_blocked.load(std::memory_order_relaxed) && !lane->said(kAbandon) && !lane_is_left();
  const bool sent = open && rdma::is_readable(bytes, count) &&
                    lane->send_at_once(static_cast<const std::byte*>(bytes), static_cast<std::uint32_t>(count));
  if (sent && stats != nullptr) {
    stats->lane.bytes_sent.add(count);
    stats->lane.messages_sent.add(1);
  }
  lock.unlock();
  return sent ? static_cast<std::int64_t>(count) : 0;
}

std::int64_t StreamImpl::take_at_once(std::byte* to, std::size_t room, std::uint16_t gen) noexcept {
  if (generation.load(std::memory_order_relaxed) != gen || rx.load(std::memory_order_relaxed) != RxState::lane ||
      phase.load(std::memory_order_relaxed) != Phase::laned || owner != engine::process_id() || lane->dead())
    return 0;
  const std::size_t n = lane->recv_at_once(to, room);
  if (n != 0 && stats != nullptr) {
    stats->lane.bytes_received.add(n);
    stats->lane.messages_received.add(1);
  }
  return static_cast<std::int64_t>(n);
}

std::int64_t StreamImpl::recv_at_once(void* to, std::size_t room, int flags, std::uint16_t gen) noexcept {
  constexpr int kUnderstood = MSG_DONTWAIT | MSG_NOSIGNAL;
  if (phase.load(std::memory_order_acquire) != Phase::laned || (flags & ~kUnderstood) != 0 || !lock.enter()) return 0;
  const std::int64_t n = take_at_once(static_cast<std::byte*>(to), room, gen);
  lock.unlock();
  return n;
}

}  // namespace sdp
