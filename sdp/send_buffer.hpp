// SendBuffer: bytes that send() has taken and no message carries yet, for want of credits. SDP's private send buffer.
//
// It lets a lane take as many bytes ahead of its reader as a TCP socket does, whatever the size of the sends, and turns many small
// sends into few large messages. Its memory is registered and its end is published: when the sender has said END, or died, the
// reader fetches what is left by RDMA Read, so that nothing that send() took is lost and an END waits for nobody.
//
//   positions   ... posted as messages ... | head ........ end |            all count bytes of the lane's direction
//   ring        byte at position p lies at ring[p % capacity]
//
// Threads: externally serialised (the stream's lock), but for the published cursor, which the peer reads at any time.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <span>

#include "rdma_core/registered_heap.hpp"
#include "sdp/iov_cursor.hpp"

namespace sdp {

/// What the peer needs to fetch the rest; lies beside the switch words, written by us, read by the peer.
struct SendCursor {
  std::atomic<std::uint64_t> end{0};        ///< position after the last byte taken
  std::atomic<std::uint64_t> ring_addr{0};  ///< in our address space, for RDMA; 0: no buffer yet
  std::atomic<std::uint32_t> ring_rkey{0};
  std::uint32_t reserved = 0;
};
static_assert(sizeof(SendCursor) == 24);

class SendBuffer {
 public:
  static constexpr std::size_t kCapacity = std::size_t{4} << 20;  ///< about what Linux TCP takes on loopback while nobody reads

  std::uint64_t buffered() const noexcept { return end_ - head_; }
  std::uint64_t end() const noexcept { return end_; }

  /// Appends what fits below `limit` bytes in the buffer; returns how much. `at` is the lane's position when the buffer is empty.
  std::size_t append(IovCursor& from, std::size_t limit, std::uint64_t at, rdma::RegisteredHeap& heap,
                     SendCursor& cursor) noexcept {
    if (ring_ == nullptr && !allocate(heap, cursor)) return 0;
    if (buffered() == 0) head_ = end_ = at;
    std::size_t total = 0;
    while (!from.done() && buffered() < limit) {
      const std::size_t offset = end_ % kCapacity;
      const std::size_t n = std::min({from.chunk(), static_cast<std::size_t>(limit - buffered()), kCapacity - offset});
      std::memcpy(ring_ + offset, from.data(), n);
      from.advance(n);
      end_ += n;
      total += n;
    }
    cursor.end.store(end_, std::memory_order_release);
    return total;
  }
  /// The oldest bytes that lie together, at most `max`.
  std::span<const std::byte> front(std::size_t max) const noexcept {
    const std::size_t offset = head_ % kCapacity;
    return {ring_ + offset, std::min({max, static_cast<std::size_t>(buffered()), kCapacity - offset})};
  }
  void pop(std::size_t bytes) noexcept { head_ += bytes; }

  /// Copies [from, end()) out; `from` lies between head and end.
  void copy_from(std::uint64_t from, std::byte* out) const noexcept {
    for (std::uint64_t p = from; p < end_;) {
      const std::size_t offset = p % kCapacity;
      const std::size_t n = std::min(static_cast<std::size_t>(end_ - p), kCapacity - offset);
      std::memcpy(out, ring_ + offset, n);
      out += n;
      p += n;
    }
  }

  void release(rdma::RegisteredHeap& heap) noexcept {
    if (ring_ != nullptr) heap.deallocate(ring_);
    ring_ = nullptr;
  }

 private:
  bool allocate(rdma::RegisteredHeap& heap, SendCursor& cursor) noexcept {
    auto block = heap.allocate(kCapacity, 4096);
    if (!block) return false;
    ring_ = block->addr;
    cursor.ring_rkey.store(static_cast<std::uint32_t>(block->mr->rkey), std::memory_order_relaxed);
    cursor.ring_addr.store(block->mr->remote_base + static_cast<std::uint64_t>(ring_ - block->mr->addr), std::memory_order_release);
    return true;
  }

  std::byte* ring_ = nullptr;
  std::uint64_t head_ = 0, end_ = 0;
};

}  // namespace sdp
