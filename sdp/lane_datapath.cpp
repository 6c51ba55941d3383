// The per-message code of a lane: no allocation but when buffers grow, no lock, no system call beyond the device's bell.
#include <algorithm>
#include <cstring>

#include "rdma_core/base/log.hpp"
#include "sdp/lane.hpp"

namespace sdp {

using rdma::Post;
using rdma::RecvWr;
using rdma::SendWr;
using rdma::Sge;
using rdma::Wc;

void Lane::show(bool outgoing, std::span<const std::byte> header, std::span<const std::byte> payload) noexcept {
  capture_->message(capture_conn_, outgoing, header, payload);
}

bool Lane::post_message(const Sge* sges, std::uint8_t count) noexcept {
  SendWr wr;
  wr.flags = rdma::kInline;
  wr.sge_count = count;
  wr.sges = sges;
  wr.wr_id = ++requests_;
  // Entries of the send queue come back only when a completion behind them is polled.
  if (requests_ - signalled_ >= kSignalEvery) [[unlikely]] {
    signalled_ = requests_;
    wr.flags |= rdma::kSignalled;
  }
  if (qp_->post_send(wr) != Post::ok) [[unlikely]] {
    // Credits and the in-flight bound keep the queues from filling: what is left is a QP in error.
    dead_ = true;
    conn.abort("the QP is in error");
    return false;
  }
  ++sends_;
  if (capture_ != nullptr) [[unlikely]]
    show(true, {sges[0].addr, sges[0].length}, count > 1 ? std::span(sges[1].addr, sges[1].length) : std::span<const std::byte>{});
  return true;
}

/// Posts one Data message; `sges[0]` is for its header.
bool Lane::post_data(Sge* sges, std::uint8_t count, std::uint32_t payload) noexcept {
  std::byte head[wire::kBsdhBytes];
  sges[0] = Sge{head, sizeof head, {}};
  conn.emit_data(payload, head);
  sent_[conn.credit().sent() % kMaxInFlight] = Sent{tx_bytes_, sends_, payload};
  if (!post_message(sges, count)) return false;
  tx_bytes_ += payload;
  ++tx_messages_;
  if (payload != conn.max_payload()) {
    full_messages_ = 0;
  } else if (++full_messages_ >= 8 && payload < limits_.conn.recv_size_max - wire::kBsdhBytes && !conn.resize_pending())
      [[unlikely]] {
    conn.want_peer_recv_size(limits_.conn.recv_size_max);
    send_control();
  }
  return true;
}

std::size_t Lane::send(IovCursor& from) noexcept {
  if (send_buffer_.buffered() != 0) [[unlikely]] {
    flush_buffer();
    if (send_buffer_.buffered() != 0) return 0;
  }
  std::size_t total = 0;
  while (!from.done() && may_send()) {
    Sge sges[8];
    std::uint8_t count = 1;
    std::uint32_t payload = 0;
    const std::uint32_t limit = conn.max_payload();
    while (!from.done() && payload < limit && count < max_sge_) {
      const std::size_t n = std::min<std::size_t>(from.chunk(), limit - payload);
      sges[count++] = Sge{from.data(), static_cast<std::uint32_t>(n), {}};
      payload += static_cast<std::uint32_t>(n);
      from.advance(n);
    }
    if (!post_data(sges, count, payload)) break;
    total += payload;
  }
  return total;
}

std::size_t Lane::buffer(IovCursor& from, std::size_t limit) noexcept {
  if (frozen_ || dead() || !device_->attr().remembers_sent_data) return 0;
  return send_buffer_.append(from, std::min(limit, SendBuffer::kCapacity), tx_bytes_, *(*peer_)->heap, block_->cursor);
}

void Lane::flush_buffer() noexcept {
  while (send_buffer_.buffered() != 0 && !frozen_ && may_send()) {
    const auto piece = send_buffer_.front(conn.max_payload());
    Sge sges[2];
    sges[1] = Sge{piece.data(), static_cast<std::uint32_t>(piece.size()), {}};
    if (!post_data(sges, 2, static_cast<std::uint32_t>(piece.size()))) return;
    send_buffer_.pop(piece.size());
  }
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
    sent_[conn.credit().sent() % kMaxInFlight] = Sent{tx_bytes_, sends_, 0};
    const Sge sge{message.data(), static_cast<std::uint32_t>(n), {}};
    if (!post_message(&sge, 1)) return;
  }
}

void Lane::home(std::uint32_t index) noexcept {
  Buffer& b = buffers_[index];
  if (index == kRest) [[unlikely]] {
    (*peer_)->heap->deallocate(b.block);
    b = Buffer{};
    return;
  }
  if (small_left_ != 0 && b.size < conn.wanted_recv_size()) [[unlikely]] {
    Buffer larger;
    if (allocate_buffer(larger, conn.wanted_recv_size())) {
      (*peer_)->heap->deallocate(b.block);
      buffer_bytes_ -= block_bytes(b.size);
      b = larger;
      if (--small_left_ == 0) conn.resize_done(b.size);
    }
  }
  post_list_[pending_posts_++] = index;
  if (pending_posts_ == post_list_.size()) flush_posts();
}

// Posting and credits are not what a message waits for: a receive leaves them to the wait that follows it, while the peer has more
// than half of its credits.
bool Lane::may_not_wait() const noexcept {
  return pending_posts_ > buffer_count_ / 4U || conn.credit().told_left() <= buffer_count_ / 2;
}

void Lane::settle() noexcept {
  if (pending_posts_ != 0) flush_posts();
  if (conn.credit().update_is_due()) send_control();
}

void Lane::flush_posts() noexcept {
  constexpr std::uint16_t kBatch = 4;  // an array of them is cleared before it is filled: no larger than most calls need
  for (std::uint16_t first = 0; first < pending_posts_; first += kBatch) {
    RecvWr wrs[kBatch];
    const auto n = std::min<std::uint16_t>(kBatch, pending_posts_ - first);
    for (std::uint16_t i = 0; i < n; ++i) {
      const std::uint32_t index = post_list_[first + i];
      const Buffer& b = buffers_[index];
      wrs[i] = RecvWr{index, b.addr, b.size, b.lkey};
    }
    if (qp_->post_recv({wrs, n}) == Post::ok) conn.on_posted(n);
  }
  pending_posts_ = 0;
}

// Buffer 0 took Hello and is out of the account; buffer 1 stands for the size in force.
void Lane::grow_count() noexcept {
  const std::uint16_t target = std::min<std::uint16_t>(limits_.recv_buffers_max + 1, kMaxBuffers);
  const std::uint32_t size = std::max(conn.wanted_recv_size(), buffers_[1].size);
  for (std::uint16_t n = buffer_count_; n > 0 && buffer_count_ < target; --n) {
    if (!allocate_buffer(buffers_[buffer_count_], size)) return;
    post_list_[pending_posts_++] = buffer_count_++;
    if (pending_posts_ == post_list_.size()) flush_posts();
  }
}

void Lane::on_completion(const Wc& wc) noexcept {
  if (wc.status != rdma::WcStatus::success) [[unlikely]] {
    dead_ = true;
    conn.abort(to_string(wc.status));
    return;
  }
  if (wc.opcode != rdma::WcOpcode::recv) {
    reaped_ = wc.wr_id;
    return;
  }
  const auto index = static_cast<std::uint32_t>(wc.wr_id);
  const Buffer& b = buffers_[index];
  if (capture_ != nullptr) [[unlikely]] {
    const std::span<const std::byte> msg(b.addr, wc.byte_len);
    const std::size_t head = std::min(msg.size(), wire::kBsdhBytes);
    show(false, msg.first(head), msg.subspan(head));
  }
  const Rx rx = conn.on_message({b.addr, wc.byte_len});
  if (rx == Rx::payload) [[likely]] {
    constexpr auto kHead = static_cast<std::uint32_t>(wire::kBsdhBytes);
    unread_[rx_tail_++ % kRing] = Unread{index, kHead, wc.byte_len - kHead};
    rx_bytes_queued_ += wc.byte_len - kHead;
    ++rx_arrivals_;
    return;
  }
  switch (rx) {
    case Rx::established:
      return;  // Hello's buffer was outside the account and is not posted again
    case Rx::disconn:
      peer_disconn_ = true;
      break;
    case Rx::resize:
      small_left_ = buffer_count_ - 1;
      for (std::uint16_t i = 0; i < buffer_count_; ++i)
        if (buffers_[i].size >= conn.wanted_recv_size()) --small_left_;
      break;
    case Rx::abort:
      RDMA_LOG(warn, "lane ended: %s", conn.error());
      violated_ = true;
      dead_ = true;
      return;
    default:
      break;
  }
  home(index);
}

void Lane::reap() noexcept {
  Wc wcs[4];  // cleared at each call: no larger than most calls need
  unsigned n = 0;
  do {
    n = cq_->poll(wcs);
    for (unsigned i = 0; i < n; ++i) on_completion(wcs[i]);
  } while (n == std::size(wcs) && rx_tail_ - rx_head_ < kRing - 2 * std::size(wcs));
}

void Lane::drain() noexcept {
  if (!cq_->maybe_ready()) return;
  reap();
  if (may_not_wait()) flush_posts();
  if (rx_tail_ - rx_head_ > buffer_count_ / 2U && buffer_count_ <= limits_.recv_buffers_max) [[unlikely]] {
    grow_count();
    if (pending_posts_ != 0) flush_posts();
  }
  if (send_buffer_.buffered() != 0) flush_buffer();
  send_control();
}

std::size_t Lane::recv(IovCursor& to, bool consume) noexcept {
  std::size_t total = 0;
  std::uint32_t at = rx_head_;
  std::uint32_t offset_in_front = 0;
  while (!to.done()) {
    if (at == rx_tail_) {
      drain();
      if (at == rx_tail_) break;
    }
    Unread& u = unread_[at % kRing];
    const std::uint32_t skip = consume ? 0 : offset_in_front;
    const std::size_t n = std::min<std::size_t>(u.length - skip, to.chunk());
    std::memcpy(to.data(), buffers_[u.buffer].addr + u.offset + skip, n);
    to.advance(n);
    total += n;
    if (consume) {
      u.offset += static_cast<std::uint32_t>(n);
      u.length -= static_cast<std::uint32_t>(n);
      if (u.length == 0) {
        const std::uint32_t buffer = u.buffer;
        rx_head_ = ++at;
        home(buffer);
      }
    } else {
      offset_in_front += static_cast<std::uint32_t>(n);
      if (offset_in_front == u.length) {
        ++at;
        offset_in_front = 0;
      }
    }
  }
  if (consume) {
    rx_bytes_queued_ -= total;
    rx_bytes_ += total;
    if (may_not_wait()) settle();
  }
  return total;
}

std::size_t Lane::discard(std::size_t bytes) noexcept {
  std::size_t total = 0;
  while (total < bytes) {
    if (rx_head_ == rx_tail_) {
      drain();
      if (rx_head_ == rx_tail_) break;
    }
    Unread& u = unread_[rx_head_ % kRing];
    const std::size_t n = std::min<std::size_t>(u.length, bytes - total);
    u.offset += static_cast<std::uint32_t>(n);
    u.length -= static_cast<std::uint32_t>(n);
    total += n;
    if (u.length == 0) {
      const std::uint32_t buffer = u.buffer;
      ++rx_head_;
      home(buffer);
    }
  }
  rx_bytes_queued_ -= total;
  rx_bytes_ += total;
  settle();
  return total;
}

}  // namespace sdp
