// CreditWindow: who may send how many messages. Pure arithmetic modulo 2^32; sdp-protocol: BSDH Bufs, MSeq, MSeqAck; CA4-82.
//
//   credits = Bufs(last received) + MSeqAck(last received) - MSeq(last sent)
//
// Two credits are held back from payload: one for control, one for the update that un-sticks the peer. A message sent with the
// very last credit must itself grant the peer something.
#pragma once

#include <cstdint>

namespace sdp {

inline constexpr std::int32_t kReservedCredits = 2;

class CreditWindow {
 public:
  /// After Hello/HelloAck: the peer's grant and ours. MSeq of both directions starts at 0; the first message is 1.
  void start(std::uint16_t peer_bufs, std::uint16_t own_posted) noexcept {
    limit_ = peer_bufs;
    posted_ = own_posted;
    told_ = own_posted;
  }

  // --- sending
  std::int32_t credits() const noexcept { return static_cast<std::int32_t>(limit_ - sent_); }
  bool may_send_payload() const noexcept { return credits() > kReservedCredits; }
  /// Control without payload: two credits, or the last one if it also grants the peer more than it knows of.
  bool may_send_control() const noexcept { return credits() >= 2 || (credits() == 1 && grants_more()); }
  bool may_send_update() const noexcept { return credits() >= 1 && grants_more(); }
  std::uint32_t on_send() noexcept {
    heard_ = false;
    told_ = received_ + posted_;
    return ++sent_;
  }
  std::uint32_t sent() const noexcept { return sent_; }

  // --- receiving
  /// `update`: an empty Data. False: the peer broke the numbering, acknowledged what was never sent, or withdrew credits.
  bool on_receive(std::uint32_t mseq, std::uint32_t mseq_ack, std::uint16_t bufs, bool update = false) noexcept {
    if (mseq != received_ + 1) return false;
    if (static_cast<std::int32_t>(sent_ - mseq_ack) < 0) return false;
    const std::uint32_t limit = mseq_ack + bufs;
    if (static_cast<std::int32_t>(limit - limit_) < 0) return false;
    received_ = mseq;
    acked_ = mseq_ack;
    limit_ = limit;
    --posted_;
    heard_ |= !update;
    return true;
  }
  void on_posted(std::uint32_t buffers) noexcept { posted_ += buffers; }
  std::uint16_t posted() const noexcept { return static_cast<std::uint16_t>(posted_); }
  std::uint32_t received() const noexcept { return received_; }
  std::uint32_t acked() const noexcept { return acked_; }
  /// How many messages the peer may still send, as far as it has been told.
  std::int32_t told_left() const noexcept { return static_cast<std::int32_t>(told_ - received_); }
  /// How many buffers the peer had posted when it last spoke.
  std::uint32_t peer_posted() const noexcept { return limit_ - acked_; }

  /// Is it time for an empty Data that only grants credits? OFED's rule: what the peer still has, times 1.5, is below what is
  /// posted. With so few posted that the peer could send no payload after it, the rest is unread: then only a peer is told that
  /// cannot speak at all, or, with one credit and nothing to grant, no control message. The latter not in answer to an update, or
  /// two sides that wait for each other would answer each update with an update for ever.
  bool update_is_due() const noexcept {
    const std::int32_t left = told_left();
    const auto posted = static_cast<std::int32_t>(posted_);
    if (posted <= kReservedCredits + 1) return left <= (heard_ ? 1 : 0) && posted > left;
    return (left > kReservedCredits ? left + left / 2 : left) < posted;
  }

 private:
  bool grants_more() const noexcept { return static_cast<std::int32_t>(received_ + posted_ - told_) > 0; }

  std::uint32_t limit_ = 0;     ///< highest MSeq that we may send
  std::uint32_t sent_ = 0;      ///< MSeq of our last message
  std::uint32_t received_ = 0;  ///< MSeq of the peer's last message
  std::uint32_t acked_ = 0;     ///< our last message that the peer says it has
  std::uint32_t posted_ = 0;    ///< own receive buffers posted now
  std::uint32_t told_ = 0;      ///< highest MSeq that we have told the peer it may send
  bool heard_ = false;          ///< something else than an update has come since our last message
};

}  // namespace sdp
