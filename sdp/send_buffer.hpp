// SendBuffer and PeerBuffer: bytes that send() has taken and no message carries. SDP's private send buffer, read by the peer.
//
// It lets a lane take as many bytes ahead of its reader as a TCP socket does, whatever the size of the sends, and spares a burst of
// small sends the messages. The reader copies from it what it wants when it wants it: nothing has to be flushed, an END waits for
// nobody, and what send() took outlives the sender. Only where the peer's memory is mapped (DeviceAttr::maps_peer_memory).
//
//   positions   ... by messages ... | start ... pulled ..... end |              all count bytes of the lane's direction
//
// One carrier at a time: while the buffer holds bytes that the reader has not pulled, every later byte goes into it too; messages
// go on when it is empty. A hold begins in a small ring, at its first byte, so that bursts stay within the cache, and goes on in a
// large one when that is full:
//
//   small   byte at position p lies at (p - start) % kSmallBytes    for start <= p < split
//   large                              (p - split) % kCapacity      for split <= p < end
//
// The cursors lie in the reader's memory and are written by the sender; `pulled` lies in the sender's and is written by the
// reader. A cursor's fields are stored in their order, and its end is loaded first: who sees an end sees what belongs to it.
#pragma once

#include <algorithm>
#include <array>
#include <atomic>
#include <cstddef>
#include <cstdint>
#include <cstring>

#include "rdma_core/base/clock.hpp"
#include "rdma_core/base/copy.hpp"
#include "rdma_core/registered_heap.hpp"
#include "sdp/copy_trial.hpp"
#include "sdp/iov_cursor.hpp"

namespace sdp {

/// Written by the sender of the direction, as whole words.
struct RingCursor {
  std::atomic<std::uint64_t> addr{0};   ///< in the sender's address space, for RDMA
  std::atomic<std::uint64_t> rkey{0};   ///< of the ring; its size in bytes in the upper half
  std::atomic<std::uint64_t> start{0};  ///< position of the ring's first byte
  std::atomic<std::uint64_t> end{0};    ///< position after its last one; grows for ever
};
static_assert(sizeof(RingCursor) == 32);
inline constexpr unsigned kRings = 2;  ///< small, large
inline constexpr std::array<RingCursor, kRings> kNoCursors{};

/// The sender's side. Threads: externally serialised (the stream's lock), but for buffered().
class SendBuffer {
 public:
  static constexpr std::size_t kSmallBytes = std::size_t{64} << 10;
  static constexpr std::size_t kCapacity = std::size_t{4} << 20;  ///< about what Linux TCP takes on loopback while nobody reads
  static constexpr std::size_t kBulkPiece = 4096;                 ///< bytes: pieces worth the choice of a copy

  /// `copy` outlives it.
  explicit SendBuffer(CopyTrial& copy) noexcept : copy_(copy) {}

  /// What of a ring's cursor the peer does not know yet: words [first, 4) of `word`.
  struct News {
    std::array<std::uint64_t, 4> word{};
    unsigned first = 4;
  };

  /// `pulled` is the peer's word, and untrusted. Any thread.
  std::uint64_t buffered(std::uint64_t pulled) const noexcept {
    const std::uint64_t end = end_.load(std::memory_order_relaxed);
    return end - std::clamp(pulled, std::min(start_.load(std::memory_order_relaxed), end), end);
  }
  /// Position of the oldest byte, where there are any.
  std::uint64_t front(std::uint64_t pulled) const noexcept { return std::max(pulled, start_.load(std::memory_order_relaxed)); }

  /// append() for bytes that lie together, where that is a copy and nothing else. False: it is more, and nothing is done.
  bool append_at_once(const std::byte* from, std::size_t bytes, std::uint64_t at) noexcept {
    if (at != end_.load(std::memory_order_relaxed) || at + bytes > room_until_) return false;
    const Ring& ring = rings_[in_large_];
    const std::size_t offset = static_cast<std::size_t>(at - ring.start) & (ring.bytes - 1);
    copy_in(ring, offset, from, bytes);
    end_.store(at + bytes, std::memory_order_relaxed);
    return true;
  }
  unsigned ring_in_use() const noexcept { return in_large_; }  ///< that of the last byte
  /// Appends what fits below `limit` bytes in the buffer; returns how much. `at` is the lane's position.
  std::size_t append(IovCursor& from, std::size_t limit, std::uint64_t at, const std::atomic<std::uint64_t>& pulled,
                     rdma::RegisteredHeap& heap) noexcept {
    if (at != end_.load(std::memory_order_relaxed) || known_pulled_ == at) begin(at);
    room_until_ = 0;
    std::size_t total = 0;
    for (bool fresh = false; !from.done();) {
      Ring& ring = rings_[in_large_];
      const std::uint64_t end = end_.load(std::memory_order_relaxed);
      if (ring.bytes == 0 && !allocate(ring, in_large_ ? kCapacity : kSmallBytes, heap)) break;
      const auto held = static_cast<std::size_t>(end - known_pulled_);
      const auto in_ring = static_cast<std::size_t>(end - std::max(known_pulled_, ring.start));
      const std::size_t room = std::min(ring.bytes - in_ring, limit - std::min(limit, held));
      if ((room < from.chunk() || end >= look_at_) && !fresh) {
        fresh = true;
        if (look_at(pulled, end)) begin(end);
        continue;
      }
      if (room == 0) {
        if (in_large_ || held >= limit || limit <= kSmallBytes) break;
        in_large_ = true;
        look_at_ = end + kSmallBytes;
        rings_[1].start = end;
        rings_[1].news.first = 0;
        continue;
      }
      const std::size_t offset = static_cast<std::size_t>(end - ring.start) & (ring.bytes - 1);
      const std::size_t n = std::min({from.chunk(), room, ring.bytes - offset});
      copy_in(ring, offset, from.data(), n);
      from.advance(n);
      total += n;
      end_.store(end + n, std::memory_order_relaxed);
      ring.news.first = std::min(ring.news.first, 3U);
      ring.news.word[3] = end + n;
    }
    if (const Ring& ring = rings_[in_large_]; ring.bytes != 0) {
      const std::uint64_t end = end_.load(std::memory_order_relaxed);
      const std::size_t together = ring.bytes - (static_cast<std::size_t>(end - ring.start) & (ring.bytes - 1));
      room_until_ = std::min({known_pulled_ + std::min(ring.bytes, limit), end + together, look_at_});
    }
    return total;
  }
  /// The caller tells the peer, rings in their order, and forgets.
  News& news(unsigned ring) noexcept {
    Ring& r = rings_[ring];
    if (r.news.first == 0) {
      r.news.word[0] = r.addr;
      r.news.word[1] = std::uint64_t{r.bytes} << 32 | r.rkey;
      r.news.word[2] = r.start;
    }
    return r.news;
  }

  /// Copies [from, end) out; `from` is held.
  void copy_from(std::uint64_t from, std::byte* out) const noexcept {
    const std::uint64_t end = end_.load(std::memory_order_relaxed);
    while (from < end) {
      const bool large = in_large_ && from >= rings_[1].start;
      const Ring& ring = rings_[large];
      const std::uint64_t stop = large || !in_large_ ? end : rings_[1].start;
      const std::size_t offset = static_cast<std::size_t>(from - ring.start) & (ring.bytes - 1);
      const std::size_t n = std::min(static_cast<std::size_t>(stop - from), ring.bytes - offset);
      std::memcpy(out, ring.memory + offset, n);
      out += n;
      from += n;
    }
  }

  bool has_large() const noexcept { return rings_[1].memory != nullptr; }
  /// The buffer is empty: the large ring's memory goes back.
  void release_large(rdma::RegisteredHeap& heap) noexcept { release(rings_[1], heap); }
  void release_all(rdma::RegisteredHeap& heap) noexcept {
    for (Ring& ring : rings_) release(ring, heap);
  }

 private:
  struct Ring {
    std::byte* memory = nullptr;
    std::size_t bytes = 0;  ///< a power of two
    std::uint64_t addr = 0;
    std::uint32_t rkey = 0;
    std::uint64_t start = 0;
    News news;
  };

  /// Has the reader everything? It writes that word as it reads: nobody looks at it without need. In the large ring one needs to,
  /// for only what is empty begins anew in the small one, and a reader close behind gets a moment to empty it: the moment is short
  /// against the time that bursts out of the cache would take from then on.
  bool look_at(const std::atomic<std::uint64_t>& pulled, std::uint64_t end) noexcept {
    constexpr std::uint64_t kClose = 16 << 10;
    constexpr std::int64_t kMomentNs = 5'000;
    const rdma::SteadyClock clock;
    std::int64_t until = 0;
    do {
      known_pulled_ = std::clamp(pulled.load(std::memory_order_acquire), known_pulled_, end);
      if (!in_large_ || known_pulled_ == end) break;
      look_at_ = end + kSmallBytes;
      if (until == 0) until = clock.now() + kMomentNs;
      rdma::cpu_relax();
    } while (end - known_pulled_ <= kClose && clock.now() < until);
    return known_pulled_ == end;
  }
  void copy_in(const Ring& ring, std::size_t offset, const std::byte* from, std::size_t n) noexcept {
    const bool bulk = n >= kBulkPiece, direct = bulk && copy_.direct();
    if (direct)
      rdma::copy_past_caches(ring.memory + offset, from, n);
    else
      rdma::copy_bytes(ring.memory + offset, from, n);
    if (bulk) copy_.copied(n, [] { return rdma::SteadyClock{}.now(); });
    if (direct) return;
    // The reader has had the next lines: they are on their way back while the program makes its next call.
    constexpr std::size_t kMost = 2048;
    for (std::size_t ahead = n + rdma::kCacheLine; ahead < n + rdma::kCacheLine + std::min(n, kMost); ahead += rdma::kCacheLine)
      rdma::prefetch_for_write(ring.memory + ((offset + ahead) & (ring.bytes - 1)));
  }
  void begin(std::uint64_t at) noexcept {
    in_large_ = false;
    look_at_ = ~std::uint64_t{0};
    rings_[0].start = at;
    rings_[0].news.first = 0;
    end_.store(at, std::memory_order_relaxed);
    start_.store(at, std::memory_order_relaxed);
    known_pulled_ = at;
  }
  static bool allocate(Ring& ring, std::size_t bytes, rdma::RegisteredHeap& heap) noexcept {
    auto block = heap.allocate(bytes, 4096);
    if (!block) return false;
    ring.memory = block->addr;
    ring.bytes = bytes;
    ring.rkey = static_cast<std::uint32_t>(block->mr->rkey);
    ring.addr = block->mr->remote_base + static_cast<std::uint64_t>(ring.memory - block->mr->addr);
    ring.news.first = 0;  // wherever it lay before, if anywhere
    return true;
  }
  void release(Ring& ring, rdma::RegisteredHeap& heap) noexcept {
    room_until_ = 0;
    if (ring.memory != nullptr) heap.deallocate(ring.memory);
    ring.memory = nullptr;
    ring.bytes = 0;
  }

  std::atomic<std::uint64_t> start_{0}, end_{0};
  std::uint64_t known_pulled_ = 0;
  std::uint64_t look_at_ = ~std::uint64_t{0};  ///< position from which on append() looks how far the reader is
  std::uint64_t room_until_ = 0;               ///< position up to which append_at_once() needs no look at anything else
  bool in_large_ = false;
  CopyTrial& copy_;
  std::array<Ring, kRings> rings_;
};

/// The reader's side: what the peer's cursors say, of which nothing is believed.
class PeerBuffer {
 public:
  /// `cursors` outlive it.
  void look_at(const std::array<RingCursor, kRings>& cursors) noexcept { cursors_ = &cursors; }

  struct Piece {
    std::uint64_t addr = 0;
    std::uint32_t rkey = 0;
    std::size_t bytes = 0;
    bool last = false;  ///< nothing followed it when we looked
  };
  /// Bytes from position `at` on that lie together; none: `bytes` is 0. False: the cursors make no sense.
  bool find(std::uint64_t at, Piece& piece) const noexcept {
    piece.bytes = 0;
    for (const RingCursor& cursor : *cursors_) {
      const std::uint64_t end = cursor.end.load(std::memory_order_acquire);
      const std::uint64_t start = cursor.start.load(std::memory_order_acquire);
      if (at < start || at >= end) continue;
      const std::uint64_t rkey = cursor.rkey.load(std::memory_order_relaxed);
      const std::uint64_t size = rkey >> 32;
      if (size == 0 || size > SendBuffer::kCapacity || (size & (size - 1)) != 0 || end - at > size) return false;
      const std::uint64_t offset = (at - start) & (size - 1);
      piece.addr = cursor.addr.load(std::memory_order_relaxed) + offset;
      piece.rkey = static_cast<std::uint32_t>(rkey);
      piece.bytes = static_cast<std::size_t>(std::min(end - at, size - offset));
      const RingCursor& large = cursors_->back();
      piece.last = at + piece.bytes == end && (&cursor == &large || large.start.load(std::memory_order_relaxed) != end ||
                                               large.end.load(std::memory_order_relaxed) <= end);
      return true;
    }
    return true;
  }
  /// Does anything follow position `at`? Any thread.
  bool holds_more_than(std::uint64_t at) const noexcept {
    return (*cursors_)[0].end.load(std::memory_order_acquire) > at || (*cursors_)[1].end.load(std::memory_order_acquire) > at;
  }
  /// Bytes from position `at` on. Any thread.
  std::uint64_t held(std::uint64_t at) const noexcept {
    std::uint64_t sum = 0;
    for (const RingCursor& cursor : *cursors_) {
      const std::uint64_t end = cursor.end.load(std::memory_order_acquire);
      const std::uint64_t from = at + sum;
      if (from >= end || from < cursor.start.load(std::memory_order_acquire)) continue;
      sum += std::min<std::uint64_t>(end - from, SendBuffer::kCapacity);
    }
    return sum;
  }
  /// Changes with every byte that comes. Any thread.
  std::uint64_t ends() const noexcept {
    return (*cursors_)[0].end.load(std::memory_order_acquire) + (*cursors_)[1].end.load(std::memory_order_acquire);
  }

 private:
  const std::array<RingCursor, kRings>* cursors_ = nullptr;
};

}  // namespace sdp
