// The per-message code of a lane: no allocation but when buffers grow, no lock, no system call beyond the device's bell.
#include <algorithm>
#include <cerrno>
#include <cstring>
#include <utility>

#include "rdma_core/base/clock.hpp"
#include "rdma_core/base/copy.hpp"
#include "rdma_core/base/log.hpp"
#include "rdma_core/base/user_memory.hpp"
#include "sdp/lane.hpp"

namespace sdp {

using rdma::Post;
using rdma::SendWr;
using rdma::Sge;
using rdma::Wc;

void Lane::show(bool outgoing, std::span<const std::byte> header, std::span<const std::byte> payload) noexcept {
  capture_->message(capture_conn_, outgoing, header, payload);
}

void Lane::show_read(bool outgoing, IovCursor at, std::size_t bytes) noexcept {
  while (bytes != 0) {
    const std::size_t n = std::min(bytes, at.chunk());
    capture_->read_response(capture_conn_, outgoing, {at.data(), n});
    at.advance(n);
    bytes -= n;
  }
}

void Lane::remember_staged(SendWr& wr) noexcept {
  const std::uint64_t position = staging_.position();
  staged_up_to_[requests_ % kSendDepth] = position;
  if (position - staged_signalled_ < staging_.longest()) return;
  staged_signalled_ = position;
  signalled_ = requests_;
  wr.flags |= rdma::kSignalled;
}

/// What the device has read and, where it forgets it, the peer has.
void Lane::free_staged() noexcept {
  std::uint64_t position = staged_up_to_[reaped_ % kSendDepth];
  if (unordered_) {
    const std::uint32_t acked = conn.credit().acked();
    position = acked == 0 ? 0 : std::min(position, sent_[acked % kMaxInFlight].staged);
  }
  staging_.done(position);
}

void Lane::fail(const char* why) noexcept {
  dead_ = true;
  if (failure_ == nullptr) failure_ = why;
  if (!unordered_) conn.abort(why);  // else what has arrived before is still taken in
}

/// The peer keeps what it has sent until then, and has as much room for it as we have.
bool Lane::ack_is_due() const noexcept { return unordered_ && arrived_in_all() - told_arrived_ >= limits_.staging / 8; }

/// Without memory to gather in, no longer than what the device takes inline.
std::uint32_t Lane::longest_payload() noexcept {
  constexpr auto kHead = static_cast<std::uint32_t>(wire::kBsdhBytes);
  if (conn.max_payload() + kHead <= max_inline_ && !unordered_) [[likely]]
    return conn.max_payload();
  const bool gathered = staging_.active() || staging_.open(*(*peer_)->heap);
  const std::uint32_t longest = gathered ? static_cast<std::uint32_t>(staging_.longest()) : max_inline_;
  return std::min(max_payload(), longest - mark_bytes(longest) - kHead);
}

/// False: what the peer has not acknowledged fills the memory to gather messages in, and there is no more of it.
bool Lane::make_room(std::size_t bytes) noexcept {
  if (!staging_.active() || !staging_.may_grow()) [[likely]]
    return true;  // may_send() has asked
  const bool is_short = std::min<std::size_t>(bytes, conn.max_payload()) + wire::kBsdhBytes + kMarkBytes > staging_.longest();
  const bool has_room = staging_.has_room(staging_.longest());
  return (has_room && !is_short) || staging_.grow(*(*peer_)->pd) || has_room;
}

/// One message that lies in staging_.
bool Lane::post_staged(const Sge& whole) noexcept {
  SendWr wr;
  if (whole.length <= max_inline_) wr.flags = rdma::kInline;
  wr.sge_count = 1;
  wr.sges = &whole;
  number_request(wr);
  return qp_->post_send(wr) == Post::ok;
}

/// One message from the caller's pieces, which are taken before we return.
bool Lane::post_copy(const SendWr& pieces) noexcept {
  std::uint32_t bytes = 0;
  for (unsigned i = 0; i < pieces.sge_count; ++i) bytes += pieces.sges[i].length;
  const bool kept = unordered_ && pieces.sge_count > 1;
  if (bytes <= max_inline_ && !kept) {
    SendWr wr = pieces;
    number_request(wr);
    return qp_->post_send(wr) == Post::ok;
  }
  if (!staging_.active() && !staging_.open(*(*peer_)->heap)) return false;
  const std::uint32_t mark = mark_bytes(bytes);
  std::byte* const memory = staging_.take(bytes + mark);
  std::size_t at = 0;
  for (unsigned i = 0; i < pieces.sge_count; at += pieces.sges[i++].length)
    rdma::copy_bytes(memory + at, pieces.sges[i].addr, pieces.sges[i].length);
  if (mark != 0) put_mark(memory, bytes);
  return post_staged({memory, bytes + mark, staging_.lkey()});
}

/// Bytes of the peer's message without its mark. If that is another's the lane is over.
std::uint32_t Lane::take_mark(const std::byte* message, std::uint32_t bytes) noexcept {
  if (mark_bytes(bytes) == 0) return bytes;
  bytes -= kMarkBytes;
  if (std::memcmp(message + bytes, message + wire::kMseqOffset, kMarkBytes) != 0) conn.abort("a message ends as another");
  return bytes;
}

bool Lane::post_message(const Sge* sges, std::uint8_t count, std::uint8_t flags) noexcept {
  SendWr wr;
  wr.flags = flags;
  wr.sge_count = count;
  wr.sges = sges;
  bool posted = false;
  if (staging_.active() || unordered_ || max_inline_ < wire::kHelloBytes) [[unlikely]] {
    posted = post_copy(wr);
  } else {
    number_request(wr);
    posted = qp_->post_send(wr) == Post::ok;
  }
  return has_left(posted, {sges[0].addr, sges[0].length},
                  count > 1 ? std::span(sges[1].addr, sges[1].length) : std::span<const std::byte>{});
}

bool Lane::has_left(bool posted, std::span<const std::byte> header, std::span<const std::byte> payload) noexcept {
  if (!posted) [[unlikely]] {
    // Credits and the in-flight bound keep the queues from filling: what is left is a QP in error.
    fail("the QP is in error");
    return false;
  }
  ++sends_;
  told_arrived_ = arrived_in_all();
  told_arrivals_ = rx_arrivals_;
  if (capture_ != nullptr) [[unlikely]]
    show(true, header, payload);
  return true;
}

/// Posts one Data message; `sges[0]` is for its header.
bool Lane::post_data(Sge* sges, std::uint8_t count, std::uint32_t payload) noexcept {
  std::byte head[wire::kBsdhBytes];
  sges[0] = Sge{head, sizeof head, {}};
  conn.emit_data(payload, head);
  Sent& sent = sent_[conn.credit().sent() % kMaxInFlight];
  sent = Sent{tx_bytes_, sends_, payload, wire::kBsdhBytes, staging_.position()};
  const bool is_bulk = may_buffer_ && payload >= kBulkPiece;
  if (!post_message(sges, count, is_bulk && copy_.direct() ? rdma::kInline | rdma::kDirect : rdma::kInline)) return false;
  if (is_bulk) copy_.copied(payload, [] { return rdma::SteadyClock{}.now(); });
  sent.staged = staging_.position();
  tx_bytes_ += payload;
  ++tx_messages_;
  return true;
}

/// `cuts` of the messages of a send of `bytes` ended where the peer's buffers do. Many cuts make these grow to what the sends need;
/// a send that fits takes back one, so that a long one now and then does not.
void Lane::weigh_cuts(std::size_t bytes, std::uint32_t cuts) noexcept {
  if (cuts == 0) {
    --cuts_;
    return;
  }
  cuts_ += cuts;
  const auto size = conn.max_payload() + static_cast<std::uint32_t>(wire::kBsdhBytes);
  // A peer that has granted less than the last wish does not grant more.
  if (cuts_ < kCutsToGrow || conn.resize_pending() || size < wished_size_ || size >= limits_.conn.recv_size_max) return;
  cuts_ = 0;
  wished_size_ = static_cast<std::uint32_t>(
      std::min(std::max(bytes + wire::kBsdhBytes + (marks_ends_ ? kMarkBytes : 0), 2 * std::size_t{size}),
               std::size_t{limits_.conn.recv_size_max}));
  conn.want_peer_recv_size(wished_size_);
  send_control();
}

std::size_t Lane::send(IovCursor& from) noexcept {
  const std::size_t bytes = from.remaining();
  if (bytes > kBurstSend)
    burst_ = 0;
  else if (may_buffer_ && (++burst_ > kBurstBegins || buffered() != 0))
    return buffer(from, SendBuffer::kSmallBytes);
  std::size_t total = 0;
  std::uint32_t cuts = 0;
  if (unordered_ && gathers(bytes)) [[unlikely]] {
    total = gather(from, bytes);
    if (held() != 0) return total;
  }
  while (!from.done() && may_send() && make_room(from.remaining())) {
    const IovCursor before = from;
    Sge sges[8];
    std::uint8_t count = 1;
    std::uint32_t payload = 0;
    const std::uint32_t limit = longest_payload();
    while (!from.done() && payload < limit && count < max_sge_) {
      const std::size_t n = std::min<std::size_t>(from.chunk(), limit - payload);
      sges[count++] = Sge{from.data(), static_cast<std::uint32_t>(n), {}};
      payload += static_cast<std::uint32_t>(n);
      from.advance(n);
    }
    if (!post_data(sges, count, payload)) [[unlikely]] {
      from = before;
      break;
    }
    total += payload;
    cuts += payload == max_payload() && !from.done() ? 1 : 0;
  }
  if (cuts + cuts_ != 0 && total != 0) [[unlikely]]
    weigh_cuts(bytes, cuts);
  return total;
}

std::size_t Lane::buffer(IovCursor& from, std::size_t limit) noexcept {
  if (dead() || !may_buffer_) return 0;
  if (is_offering()) [[unlikely]]
    cancel_offer();
  IovCursor shown = from;
  const std::size_t taken =
      send_buffer_.append(from, std::min(limit, SendBuffer::kCapacity), tx_bytes_, block_->pulled, *(*peer_)->heap);
  tx_bytes_ += taken;
  if (capture_ != nullptr) [[unlikely]]
    show_read(true, shown, taken);
  for (unsigned ring = 0; ring < kRings; ++ring)
    if (!publish(ring)) break;
  return taken;
}

bool Lane::publish(unsigned ring) noexcept {
  SendBuffer::News& news = send_buffer_.news(ring);
  if (news.first == 4) return true;
  const std::size_t offset = offsetof(LaneBlock, cursors) + ring * sizeof(RingCursor);
  if (!write_peer(offset + 8 * news.first, news.word.data() + news.first, 4 - news.first, true)) return false;
  news.first = 4;
  if (peer_end_[ring] == nullptr)
    peer_end_[ring] = qp_->remote_word(peer_words_addr_ + offset + offsetof(RingCursor, end), peer_words_rkey_);
  return true;
}

bool Lane::send_at_once(const std::byte* bytes, std::uint32_t count) noexcept {
  if (capture_ != nullptr || dead()) return false;
  if (may_buffer_ && burst_ >= kBurstBegins) {
    std::atomic<std::uint64_t>* const end = peer_end_[send_buffer_.ring_in_use()];
    if (end == nullptr || !send_buffer_.append_at_once(bytes, count, tx_bytes_)) return false;
    tx_bytes_ += count;
    if (qp_->store_word(*end, tx_bytes_, true) != Post::ok) [[unlikely]]
      fail("the QP is in error");
    return true;
  }
  const bool fits = may_buffer_ ? count + wire::kBsdhBytes <= max_inline_ : may_stage_at_once(count);
  if (!fits || count > max_payload() || !may_send()) return false;
  Sge sges[2];
  sges[1] = Sge{bytes, count, {}};
  if (!post_data(sges, 2, count)) return false;
  if (cuts_ != 0) weigh_cuts(count, 0);
  ++burst_;
  return true;
}

bool Lane::write_peer(std::size_t offset, const std::uint64_t* words, unsigned count, bool wake) noexcept {
  const Sge sge{reinterpret_cast<const std::byte*>(words), static_cast<std::uint32_t>(8 * count), {}};
  SendWr wr = to_peers_block(offset, sge, wake);
  number_request(wr);
  if (requests_ - reaped_ >= send_depth_ / 2) [[unlikely]]
    reap();
  if (qp_->post_send(wr) == Post::ok) [[likely]]
    return true;
  fail("the QP is in error");
  return false;
}

// The word is said already: once more changes nothing.
void Lane::await_posts() noexcept {
  const std::uint64_t raw = 1;
  const Sge sge{reinterpret_cast<const std::byte*>(&raw), sizeof raw, {}};
  SendWr wr = to_peers_block(offsetof(LaneBlock, words) + 8 * std::size_t{kEndSeen}, sge, false);
  number_request(wr);
  wr.flags |= rdma::kSignalled;
  signalled_ = awaited_ = requests_;
  if (qp_->post_send(wr) != Post::ok) dead_ = true;
}

/// What the peer's buffer holds from position `at` on, as far as it lies together.
std::span<const std::byte> Lane::peer_bytes(std::uint64_t at, bool* last) noexcept {
  PeerBuffer::Piece piece;
  const bool sound = peer_buffer_.find(at, piece);
  if (sound && piece.bytes == 0) [[likely]]
    return {};
  const std::byte* const bytes = sound ? qp_->remote_view(piece.addr, piece.bytes, static_cast<rdma::Rkey>(piece.rkey)) : nullptr;
  if (bytes == nullptr) [[unlikely]] {
    conn.abort("the peer's send buffer is not where it says");
    RDMA_LOG(warn, "lane ended: %s", conn.error());
    peer_buffer_.look_at(kNoCursors);
    violated_ = true;
    dead_ = true;
    return {};
  }
  *last = piece.last;
  return {bytes, piece.bytes};
}

/// The reader has caught up with a burst of small sends. Were it to look for the next one at once, both would do nothing but hand
/// the cursor's cache line to and fro; two microseconds later there are many.
void Lane::let_gather() noexcept {
  const std::int64_t until = std::exchange(caught_up_at_, 0) + kGatherNs;
  while (rdma::SteadyClock{}.now() < until) rdma::cpu_relax();
}

/// The peer may use the room of what has been read. Its writer, if it sleeps, is woken for each quarter of the small ring: it went
/// to sleep with more than that in the buffer.
void Lane::say_pulled() noexcept {
  const bool loudly = rx_bytes_ - pulled_loudly_ >= SendBuffer::kSmallBytes / 4;
  if (loudly) pulled_loudly_ = rx_bytes_;
  (void)write_peer(offsetof(LaneBlock, pulled), &rx_bytes_, 1, loudly);
}

void Lane::send_control() noexcept {
  if (conn.hello_ack_due()) [[unlikely]] {
    std::array<std::byte, wire::kHelloAckBytes> ack;
    conn.emit_hello_ack(ack);
    const Sge sge{ack.data(), static_cast<std::uint32_t>(ack.size()), {}};
    post_message(&sge, 1);
  }
  std::array<std::byte, Connection::kControlBytes> message;
  while (const std::size_t n = conn.next_control(message)) {
    sent_[conn.credit().sent() % kMaxInFlight] = Sent{tx_bytes_, sends_, 0, 0, staging_.position()};
    const Sge sge{message.data(), static_cast<std::uint32_t>(n), {}};
    if (!post_message(&sge, 1)) return;
  }
}

// Posting and credits are not what a message waits for: a receive leaves them to the wait that follows it, while the peer has more
// than half of its credits.
bool Lane::may_not_wait() const noexcept {
  return recv_.pending() > recv_.count() / 4U || ack_is_due() || conn.credit().told_left() <= recv_.count() / 2;
}

void Lane::settle() noexcept {
  recv_.post();
  if (held() != 0) [[unlikely]]
    (void)flush();
  if (awaits_ack()) [[unlikely]]
    conn.want_update();
  return_buffers();
}

void Lane::return_buffers() noexcept {
  recv_.post();
  if (ack_is_due()) [[unlikely]]
    conn.want_update();
  else if (!conn.credit().update_is_due())
    return;
  send_control();
}

/// Payload waits in the buffer in which it came.
inline void Lane::queue(std::uint32_t index, std::uint32_t headers, std::uint32_t bytes) noexcept {
  recv_.queue(index, headers, bytes - headers);
  arrived_.store(arrived_.load(std::memory_order_relaxed) + bytes - headers, std::memory_order_relaxed);
  ++rx_arrivals_;
}

void Lane::on_completion(const Wc& wc) noexcept {
  if (wc.status != rdma::WcStatus::success) [[unlikely]] {
    if (wc.opcode == rdma::WcOpcode::rdma_read) on_read_done(false, 0);
    return fail(to_string(wc.status));
  }
  if (wc.opcode != rdma::WcOpcode::recv) {
    reaped_ = std::max(reaped_, wc.wr_id);  // a Read may come behind what was posted after it
    if (staging_.active()) [[unlikely]]
      free_staged();
    if (wc.opcode == rdma::WcOpcode::rdma_read) [[unlikely]]
      on_read_done(true, wc.byte_len);
    if (is_writing()) [[unlikely]]
      follow_write();
    return;
  }
  const auto index = static_cast<std::uint32_t>(wc.wr_id);
  const std::byte* const message = recv_.buffer(index);
  std::uint32_t bytes = wc.byte_len;
  if (marks_ends_) [[unlikely]]
    bytes = take_mark(message, bytes);
  if (capture_ != nullptr) [[unlikely]] {
    const std::span<const std::byte> msg(message, bytes);
    const std::size_t head = std::min(msg.size(), wire::kBsdhBytes);
    show(false, msg.first(head), msg.subspan(head));
  }
  const Rx rx = conn.on_message({message, bytes});
  if (unordered_ && staging_.active()) [[unlikely]]
    free_staged();
  if (is_writing()) [[unlikely]]
    follow_write();
  if (rx == Rx::payload) [[likely]]
    return queue(index, wire::kBsdhBytes, bytes);
  switch (rx) {
    case Rx::advert:
      (void)withdraw_offer();  // both programs send: see Connection
      return queue(index, wire::payload_offset(wire::Mid::src_avail), bytes);
    case Rx::answered:
      follow_offer();
      break;
    case Rx::placed:
      follow_sink(true);
      return queue(index, wire::kBsdhBytes, bytes);
    case Rx::sunk:
      follow_sink(false);
      break;
    case Rx::established:
      return;  // Hello's buffer was outside the account and is not posted again
    case Rx::disconn:
      peer_disconn_ = true;
      break;
    case Rx::resize:
    case Rx::shrink:
      recv_.begin_resize(rx);
      break;
    case Rx::abort:
      RDMA_LOG(warn, "lane ended: %s", conn.error());
      violated_ = true;
      dead_ = true;
      return;
    default:
      break;
  }
  recv_.home(index);
}

void Lane::reap() noexcept {
  Wc wcs[4];  // cleared at each call: no larger than most calls need
  unsigned n = 0;
  do {
    n = cq_->poll(wcs);
    for (unsigned i = 0; i < n; ++i) on_completion(wcs[i]);
  } while (n == std::size(wcs) && recv_.has_room(2 * std::size(wcs) + 1));
}

void Lane::drain() noexcept {
  if (const std::uint64_t ends = peer_buffer_.ends(); ends != seen_ends_.load(std::memory_order_relaxed)) {
    seen_ends_.store(ends, std::memory_order_relaxed);
    ++rx_arrivals_;
  }
  if (!cq_->maybe_ready()) return;
  reap();
  if (may_not_wait() || conn.wants_update()) recv_.post();
  recv_.grow_if_short();
  if (held() != 0 && in_flight() < kGatherFrom) [[unlikely]]
    (void)flush();
  send_control();
}

std::size_t Lane::recv_at_once(std::byte* to, std::size_t room) noexcept {
  if (capture_ != nullptr || held() != 0) return 0;
  const bool is_drained = recv_.empty();
  if (is_drained) drain();
  if (recv_.empty()) return 0;
  const RecvQueue::Piece piece = recv_.piece(0);
  const std::size_t n = std::min<std::size_t>(piece.bytes, room);
  // A read that is shorter than it could be says that there is no more.
  if (n < room &&
      (recv_.size() != 1 || (!is_drained && cq_->maybe_ready()) || has_advert() || peer_buffer_.holds_more_than(rx_bytes_ + n)))
    return 0;
  if (!rdma::can_overwrite(to, n)) return 0;
  rdma::copy_bytes(to, piece.addr, n);
  recv_.take(static_cast<std::uint32_t>(n));
  burst_ = 0;
  caught_up_at_ = 0;
  rx_bytes_ += n;
  if (may_not_wait()) return_buffers();
  return n;
}

std::int64_t Lane::recv(IovCursor& to, bool consume) noexcept {
  burst_ = 0;
  if (held() != 0) [[unlikely]]
    (void)flush();
  const IovCursor start = to;
  std::size_t total = 0, pulled = 0;
  std::uint32_t at = 0, offset = 0;  // of what is left in the queue
  bool last = false, bad_address = false;
  while (!to.done() && !last) {
    if (at == recv_.size()) {
      if (caught_up_at_ != 0 && total == 0) let_gather();
      drain();
      if (at == recv_.size()) {
        const std::span<const std::byte> piece = peer_bytes(rx_bytes_ + total, &last);
        if (piece.empty()) break;
        const std::size_t n = std::min(piece.size(), to.chunk());
        if (bad_address = !rdma::can_overwrite(to.data(), n); bad_address) break;
        rdma::copy_bytes(to.data(), piece.data(), n);
        to.advance(n);
        total += n;
        pulled += n;
        last = last && n == piece.size();
        continue;
      }
    }
    const RecvQueue::Piece piece = recv_.piece(at);
    const std::size_t n = std::min<std::size_t>(piece.bytes - offset, to.chunk());
    if (bad_address = !rdma::can_overwrite(to.data(), n); bad_address) break;
    rdma::copy_bytes(to.data(), piece.addr + offset, n);
    to.advance(n);
    total += n;
    if (consume) {
      recv_.take(static_cast<std::uint32_t>(n));
    } else if (offset += static_cast<std::uint32_t>(n); offset == piece.bytes) {
      ++at;
      offset = 0;
    }
  }
  if (consume) {
    if (capture_ != nullptr && pulled != 0) [[unlikely]] {
      IovCursor shown = start;
      shown.skip(total - pulled);
      show_read(false, shown, pulled);
    }
    caught_up_at_ = last && pulled < kLittle ? rdma::SteadyClock{}.now() : 0;
    took(total, pulled);
    if (may_not_wait()) return_buffers();
  }
  return bad_address && total == 0 ? -EFAULT : static_cast<std::int64_t>(total);
}

/// The program has read `total` bytes, the last `pulled` of them from the peer's buffer.
void Lane::took(std::size_t total, std::size_t pulled) noexcept {
  rx_bytes_ += total;
  if (pulled == 0) return;
  arrived_.store(rx_bytes_, std::memory_order_relaxed);
  say_pulled();
}

std::size_t Lane::discard(std::size_t bytes) noexcept {
  std::size_t total = 0, pulled = 0;
  while (total < bytes) {
    if (recv_.empty()) {
      drain();
      if (recv_.empty()) {
        bool last = false;
        const std::span<const std::byte> piece = peer_bytes(rx_bytes_ + total, &last);
        const std::size_t n = std::min(piece.size(), bytes - total);
        if (n == 0) break;
        if (capture_ != nullptr) capture_->read_response(capture_conn_, false, piece.first(n));
        total += n;
        pulled += n;
        continue;
      }
    }
    const std::size_t n = std::min<std::size_t>(recv_.piece(0).bytes, bytes - total);
    recv_.take(static_cast<std::uint32_t>(n));
    total += n;
  }
  took(total, pulled);
  return_buffers();
  return total;
}

}  // namespace sdp
