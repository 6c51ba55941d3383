// Staging: registered memory into which messages are gathered on devices that cannot take them inline, or that forget what was
// sent before the peer has it. The device reads it until the request has completed; on the latter the lane keeps it until the peer
// has acknowledged the message. A ring: requests complete in the order in which they were posted.
//
// A small ring comes with the first message that needs it; a large one takes its place when the small one is full, or too short for
// a message, and what lies in the small one stays there until it is done. An idle lane gives both back. The large one is registered
// for itself, so that its pages are nobody's then.
//
// Threads: externally serialised (the stream's lock).
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <span>

#include "rdma_core/device.hpp"
#include "rdma_core/registered_heap.hpp"

namespace sdp {

class Staging {
 public:
  explicit Staging(std::size_t bytes) noexcept : most_(bytes) {}

  static constexpr std::size_t kLeastBytes = 4096;

  /// Bytes of a message at the most, as it is now. A quarter: the ring has room again as long as requests complete. Where the large
  /// one is not to be had, so little that many go into the small one: a peer acknowledges each time when it has half as many as it
  /// has buffers.
  std::size_t longest() const noexcept { return ring().bytes / (was_refused_ ? 64 : 4); }
  bool active() const noexcept { return small_.memory != nullptr; }
  /// The small ring. False: no memory.
  bool open(rdma::RegisteredHeap& heap) noexcept {
    auto block = heap.allocate(small_bytes(), 4096);
    if (!block) return false;
    small_ = {block->addr, small_bytes(), block->mr->lkey, taken_};
    was_refused_ = false;
    return true;
  }
  bool may_grow() const noexcept { return !was_refused_ && large_ == nullptr && small_bytes() < most_; }
  /// False: no memory.
  bool grow(rdma::Pd& pd) noexcept {
    auto mr = pd.map_extent(most_);
    was_refused_ = !mr.ok();
    if (was_refused_) return false;
    large_ = std::move(*mr);
    large_ring_ = {large_->addr, most_, large_->lkey, taken_};
    return true;
  }
  /// No request uses any of it, and nothing of it is needed.
  void close(rdma::RegisteredHeap& heap) noexcept {
    if (small_.memory != nullptr) heap.deallocate(small_.memory);
    small_ = {};
    large_ = nullptr;
    large_ring_ = {};
    was_refused_ = false;
    done_ = taken_;
  }

  /// Would take(`bytes`) succeed?
  bool has_room(std::size_t bytes) const noexcept {
    const std::size_t in_ring = static_cast<std::size_t>(taken_ - std::max(done_, ring().begin));
    return gap_before(bytes) + bytes <= ring().bytes - in_ring;
  }
  /// A piece for the next request; the caller has asked has_room(). `bytes` is at most longest().
  std::byte* take(std::size_t bytes) noexcept {
    taken_ += gap_before(bytes);
    std::byte* const piece = ring().at(taken_);
    taken_ += bytes;
    return piece;
  }
  /// Where take(`bytes`) would put its piece; nothing is taken yet. The caller has asked has_room().
  std::byte* next_piece(std::size_t bytes) const noexcept { return ring().at(taken_ + gap_before(bytes)); }
  /// Takes the first `bytes` of a next_piece() that was asked for with as many or more. Nothing has been taken since, and it has
  /// not grown.
  void take_at(const std::byte* piece, std::size_t bytes) noexcept {
    if (piece != ring().at(taken_)) taken_ += ring().bytes - (taken_ - ring().begin) % ring().bytes;
    taken_ += bytes;
  }
  /// Grows for ever. What a request remembers, and hands to done() when it has completed: it and all before it are free then.
  std::uint64_t position() const noexcept { return taken_; }
  void done(std::uint64_t position) noexcept { done_ = std::max(done_, position); }
  /// The piece of that many bytes which ends at `position`, if it is not done().
  std::span<const std::byte> piece(std::uint64_t position, std::size_t bytes) const noexcept {
    if (!active() || position > taken_ || position < done_ + bytes) return {};
    const std::uint64_t from = position - bytes;
    return {(large_ != nullptr && from >= large_ring_.begin ? large_ring_ : small_).at(from), bytes};
  }
  std::size_t in_use() const noexcept { return static_cast<std::size_t>(taken_ - done_); }
  std::size_t bytes() const noexcept { return small_.bytes + large_ring_.bytes; }  ///< registered
  rdma::Lkey lkey() const noexcept { return ring().lkey; }

 private:
  struct Ring {
    std::byte* memory = nullptr;
    std::size_t bytes = 0;
    rdma::Lkey lkey{};
    std::uint64_t begin = 0;  ///< position of its first piece

    std::byte* at(std::uint64_t position) const noexcept { return memory + (position - begin) % bytes; }
  };

  std::size_t small_bytes() const noexcept { return std::min(std::max(most_ / 32, kLeastBytes), most_); }
  const Ring& ring() const noexcept { return large_ != nullptr ? large_ring_ : small_; }
  /// A piece lies together: what is left at the end of the ring may be too little for it.
  std::size_t gap_before(std::size_t bytes) const noexcept {
    const std::size_t left = ring().bytes - (taken_ - ring().begin) % ring().bytes;
    return bytes <= left ? 0 : left;
  }

  std::size_t most_;
  Ring small_, large_ring_;
  std::unique_ptr<rdma::Mr> large_;
  bool was_refused_ = false;
  std::uint64_t taken_ = 0, done_ = 0;
};

}  // namespace sdp
