#include "sdp/recv_queue.hpp"

#include <algorithm>
#include <cerrno>

#include "rdma_core/base/log.hpp"

namespace sdp {

using rdma::RecvWr;
using rdma::Result;
using rdma::Unit;

bool RecvQueue::allocate(Buffer& buffer, std::uint32_t size, bool is_first) noexcept {
  const std::size_t bytes = block_bytes(size);
  if (place_.pins && !is_first) {
    const RecvExtents::Piece piece = extents_.take(*place_.pd, bytes);
    if (piece.addr == nullptr) return false;
    buffer = Buffer{piece.addr, piece.addr + place_.prefix_bytes, size, piece.lkey, false};
  } else {
    auto block = place_.heap->allocate(bytes, 64);
    if (!block) return false;
    buffer = Buffer{block->addr, block->addr + place_.prefix_bytes, size, block->mr->lkey, true};
  }
  memory_bytes_ += bytes;
  return true;
}

void RecvQueue::free(Buffer& buffer) noexcept {
  if (!extents_.give_back(buffer.block)) place_.heap->deallocate(buffer.block);
  memory_bytes_ -= block_bytes(buffer.size);
  buffer = {};
}

Result<Unit> RecvQueue::open(const Place& place) noexcept {
  place_ = place;
  for (std::uint16_t i = 0; i < first_.recv_buffers + 1; ++i) {
    if (!allocate(buffers_[i], first_.recv_size, true)) return rdma::fail(ENOMEM, "lane: no memory for receive buffers");
    ++count_;
    const RecvWr wr{i, buffers_[i].addr, buffers_[i].size, buffers_[i].lkey};
    if (place_.qp->post_recv({&wr, 1}) != rdma::Post::ok) return rdma::fail(EIO, "lane: cannot post receive buffers");
  }
  return Unit{};
}

void RecvQueue::close() noexcept {
  for (Buffer& b : buffers_)
    if (b.block != nullptr) free(b);
}

void RecvQueue::hold(std::byte* payload, std::uint32_t bytes, rdma::Qp& none) noexcept {
  place_.qp = &none;
  buffers_[0].addr = payload;
  count_ = 1;
  if (bytes != 0) queue(0, 0, bytes);
}

void RecvQueue::post_pending() noexcept {
  constexpr std::uint16_t kBatch = 4;  // an array of them is cleared before it is filled: no larger than most calls need
  for (std::uint16_t first = 0; first < pending_; first += kBatch) {
    RecvWr wrs[kBatch];
    const auto n = std::min<std::uint16_t>(kBatch, pending_ - first);
    for (std::uint16_t i = 0; i < n; ++i) {
      const std::uint32_t index = pending_list_[first + i];
      const Buffer& b = buffers_[index];
      wrs[i] = RecvWr{index, b.addr, b.size, b.lkey};
    }
    if (place_.qp->post_recv({wrs, n}) == rdma::Post::ok) conn_.on_posted(n);
  }
  pending_ = 0;
}

void RecvQueue::grow() noexcept {
  if (was_refused_) return;
  if (surplus_ != 0 || shrinks_) {
    surplus_ = 0;
    shrinks_ = false;
    see_resize();
  }
  const auto target = std::min<std::uint16_t>(2 * count_, std::min<std::uint16_t>(most_ + 1, kMaxBuffers));
  for (std::uint32_t index = 1; index < kMaxBuffers && count_ < target; ++index) {
    if (buffers_[index].block != nullptr) continue;
    if (!allocate(buffers_[index], wanted_size(), false)) {
      was_refused_ = place_.pins;
      break;
    }
    ++count_;
    pending_list_[pending_++] = index;
    if (pending_ == pending_list_.size()) post_pending();
  }
  post();
}

void RecvQueue::begin_resize(Rx which) noexcept {
  // Where nothing is pinned, memory goes back to the heap of the peer's lanes at the most: not worth to grow again.
  if (which == Rx::shrink ? !place_.pins : was_refused_) return conn_.resize_done(conn_.recv_size());
  shrinks_ = which == Rx::shrink;
  if (shrinks_) surplus_ = count_ - std::min<std::uint16_t>(first_.recv_buffers + 1, count_);
  see_resize();
}

/// How far the buffers have come to the size and number that are wanted. Buffer 0 took Hello and is out of the account.
void RecvQueue::see_resize() noexcept {
  misfits_ =
      static_cast<std::uint16_t>(std::count_if(buffers_.begin() + 1, buffers_.end(), [this](const Buffer& b) { return !fits(b); }));
  if (misfits_ != 0 || surplus_ != 0) return;
  shrinks_ = false;
  if (conn_.wanted_recv_size() != 0) conn_.resize_done(conn_.wanted_recv_size());
}

/// Buffers are changing their size or number, and this one has come home. False: it is none any more.
bool RecvQueue::exchange(std::uint32_t index) noexcept {
  Buffer& b = buffers_[index];
  if (surplus_ != 0) {
    --surplus_;
    --count_;
    free(b);
  } else if (const std::uint32_t size = wanted_size(); !fits(b)) {
    Buffer other;
    if (allocate(other, size, size == first_.recv_size)) {
      free(b);
      b = other;
    } else if (size > b.size) {  // a larger one than is wanted does as well, until it comes home again
      RDMA_LOG(info, "lane: no memory for receive buffers of %u bytes", size);
      was_refused_ = place_.pins;
      conn_.resize_done(conn_.recv_size());
    }
  }
  see_resize();
  return b.block != nullptr;
}

}  // namespace sdp
