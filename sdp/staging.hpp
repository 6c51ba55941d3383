// Staging: registered memory into which messages are gathered on devices that cannot take them inline, or that forget what was
// sent before the peer has it. The device reads it until the request has completed; on the latter the lane keeps it until the peer
// has acknowledged the message. A ring: requests complete in the order in which they were posted. Made at the first message that
// needs it, and given back with the lane.
//
// Threads: externally serialised (the stream's lock).
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <span>

#include "rdma_core/registered_heap.hpp"

namespace sdp {

class Staging {
 public:
  explicit Staging(std::size_t bytes) noexcept : capacity_(bytes) {}

  /// Bytes of a message at the most. A quarter: the ring has room again as long as requests complete.
  std::size_t longest() const noexcept { return capacity_ / 4; }
  bool active() const noexcept { return memory_ != nullptr; }
  /// False: no memory.
  bool open(rdma::RegisteredHeap& heap) noexcept {
    auto block = heap.allocate(capacity_, 4096);
    if (!block) return false;
    memory_ = block->addr;
    lkey_ = block->mr->lkey;
    return true;
  }
  void close(rdma::RegisteredHeap& heap) noexcept {
    if (memory_ != nullptr) heap.deallocate(memory_);
    memory_ = nullptr;
    taken_ = done_;
  }

  /// Would take(`bytes`) succeed?
  bool has_room(std::size_t bytes) const noexcept { return gap_before(bytes) + bytes <= capacity_ - in_use(); }
  /// A piece for the next request; the caller has asked has_room(). `bytes` is at most longest().
  std::byte* take(std::size_t bytes) noexcept {
    taken_ += gap_before(bytes);
    std::byte* const piece = memory_ + taken_ % capacity_;
    taken_ += bytes;
    return piece;
  }
  /// Where take(`bytes`) would put its piece; nothing is taken yet. The caller has asked has_room().
  std::byte* next_piece(std::size_t bytes) const noexcept { return memory_ + (taken_ + gap_before(bytes)) % capacity_; }
  /// Takes the first `bytes` of a next_piece() that was asked for with as many or more. Nothing has been taken since.
  void take_at(const std::byte* piece, std::size_t bytes) noexcept {
    const std::size_t here = taken_ % capacity_;
    if (piece != memory_ + here) taken_ += capacity_ - here;
    taken_ += bytes;
  }
  /// Grows for ever. What a request remembers, and hands to done() when it has completed: it and all before it are free then.
  std::uint64_t position() const noexcept { return taken_; }
  void done(std::uint64_t position) noexcept { done_ = std::max(done_, position); }
  /// The piece of that many bytes which ends at `position`, if it is not done().
  std::span<const std::byte> piece(std::uint64_t position, std::size_t bytes) const noexcept {
    if (memory_ == nullptr || position > taken_ || position < done_ + bytes) return {};
    return {memory_ + (position - bytes) % capacity_, bytes};
  }
  std::size_t in_use() const noexcept { return static_cast<std::size_t>(taken_ - done_); }
  rdma::Lkey lkey() const noexcept { return lkey_; }

 private:
  /// A piece lies together: what is left at the end of the ring may be too little for it.
  std::size_t gap_before(std::size_t bytes) const noexcept {
    const std::size_t left = capacity_ - taken_ % capacity_;
    return bytes <= left ? 0 : left;
  }

  std::size_t capacity_;
  std::byte* memory_ = nullptr;
  rdma::Lkey lkey_{};
  std::uint64_t taken_ = 0, done_ = 0;
};

}  // namespace sdp
