// Small sends in a row, on devices where each message costs more than its bytes and nobody fetches them from the sender's memory:
// while earlier messages are not acknowledged they wait for each other in a message that is open, at the place where staging has
// its next piece.
//
// It goes when it is full, when an acknowledgement leaves less than kGatherFrom messages under way (whoever takes that in), when
// the program waits or receives, before a send that is not small, and before the direction ends. A program that does nothing of the
// kind leaves it to the service thread, which looks every millisecond while some lane holds bytes. A reader that waits acknowledges
// from the kAckAtWait-th message on, so that what is under way is what it has not got.
#include <algorithm>
#include <cstring>

#include "sdp/lane.hpp"

namespace sdp {

namespace {
constexpr auto kHead = static_cast<std::uint32_t>(wire::kBsdhBytes);
}

/// False: there is no room.
bool Lane::open_gathered() noexcept {
  if (!staging_.active() && !staging_.open(*(*peer_)->heap)) return false;
  if (!make_room(conn.max_payload())) return false;
  const std::uint32_t most = longest_payload();
  if (!staging_.has_room(kHead + most + kMarkBytes)) return false;
  gathered_ = staging_.next_piece(kHead + most + kMarkBytes);
  gathered_most_ = most;
  return true;
}

/// Takes what has a place in the open message, which may be a new one. With bytes left in `from` and nothing held the rest goes as
/// any send does.
std::size_t Lane::gather(IovCursor& from, std::size_t bytes) noexcept {
  if (dead()) return 0;
  const bool is_small = bytes <= conn.max_payload() / 4;
  std::size_t total = 0;
  while (!from.done()) {
    if (held() == 0 && (!is_small || !may_hold() || !open_gathered())) return total;
    std::uint32_t payload = held();
    while (!from.done() && payload < gathered_most_) {
      const std::size_t n = std::min<std::size_t>(from.chunk(), gathered_most_ - payload);
      std::memcpy(gathered_ + kHead + payload, from.data(), n);
      from.advance(n);
      payload += static_cast<std::uint32_t>(n);
      total += n;
      tx_bytes_ += n;
    }
    held_.store(payload, std::memory_order_relaxed);
    if ((payload == gathered_most_ || !is_small) && !flush()) return total;
  }
  return total;
}

/// The message as it is to be posted: from here on it counts as sent.
rdma::Sge Lane::close_gathered() noexcept {
  const std::uint32_t payload = held();
  conn.emit_data(payload, gathered_);
  const std::uint32_t mark = mark_bytes(kHead + payload);
  if (mark != 0) put_mark(gathered_, kHead + payload);
  staging_.take_at(gathered_, kHead + payload + mark);
  sent_[conn.credit().sent() % kMaxInFlight] = Sent{tx_bytes_ - payload, sends_, payload, kHead, staging_.position()};
  held_.store(0, std::memory_order_relaxed);
  return {gathered_, kHead + payload + mark, staging_.lkey()};
}

bool Lane::flush() noexcept {
  if (held() == 0) return true;
  if (!may_post()) return false;
  const std::uint32_t payload = held();
  const rdma::Sge whole = close_gathered();
  ++tx_messages_;
  return has_left(post_staged(whole), {whole.addr, kHead}, {whole.addr + kHead, payload});
}

void Lane::take_held(std::byte* out) noexcept {
  std::memcpy(out, gathered_ + kHead, held());
  tx_bytes_ -= held();
  held_.store(0, std::memory_order_relaxed);
}

}  // namespace sdp
