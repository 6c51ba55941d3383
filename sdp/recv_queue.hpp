// RecvQueue: a lane's receive buffers. Each is posted at the device, or holds payload that the program has not read, or has come
// home and waits to be posted again together with others.
//
// Their size and number change as they come home: a buffer that is posted cannot be taken back. They grow when the peer asks for
// longer messages or the program reads slower than they come, and on a device that pins what is registered they become few and
// small again when the lane rests.
//
// Memory: from the peer's heap; on a device that pins, those beyond the first ones from extents that are given back. Threads:
// externally serialised (the stream's lock).
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>

#include "rdma_core/device.hpp"
#include "rdma_core/registered_heap.hpp"
#include "sdp/connection.hpp"
#include "sdp/recv_extents.hpp"

namespace sdp {

class RecvQueue {
 public:
  static constexpr std::uint16_t kMaxBuffers = 129;  ///< one more than the largest grant: Hello is outside the account
  static constexpr std::uint32_t kRing = 256;        ///< power of two, above kMaxBuffers

  /// Unread payload, and where it lies.
  struct Piece {
    const std::byte* addr;
    std::uint32_t bytes;
  };

  /// `most`: buffers to grow to under load. `conn` is told of what is posted and of sizes that are in force.
  RecvQueue(Connection& conn, const ConnLimits& first, std::uint16_t most) noexcept : conn_(conn), first_(first), most_(most) {}

  /// Of which memory, and by which QP; all of them outlive close(). `pins`: what is registered is pinned.
  struct Place {
    rdma::RegisteredHeap* heap;
    rdma::Pd* pd;
    rdma::Qp* qp;
    std::uint32_t prefix_bytes;  ///< before each buffer, which the device wants
    bool pins;
  };
  /// Makes and posts the first buffers. Errors: ENOMEM, EIO.
  rdma::Result<rdma::Unit> open(const Place& place) noexcept;
  /// The QP is gone.
  void close() noexcept;
  /// In place of open() and close(): unread payload, in memory of the caller's. `none` takes no buffers.
  void hold(std::byte* payload, std::uint32_t bytes, rdma::Qp& none) noexcept;

  /// The buffer that a completion names.
  std::byte* buffer(std::uint32_t index) const noexcept { return buffers_[index].addr; }

  // --- unread payload, oldest first
  bool empty() const noexcept { return head_ == tail_; }
  std::uint32_t size() const noexcept { return tail_ - head_; }
  std::uint64_t bytes() const noexcept { return bytes_; }
  bool has_room(std::uint32_t pieces) const noexcept { return size() <= kRing - pieces; }
  /// Payload waits in the buffer in which it came, behind so many bytes of headers.
  void queue(std::uint32_t index, std::uint32_t headers, std::uint32_t payload) noexcept {
    unread_[tail_++ % kRing] = Unread{index, headers, payload};
    bytes_ += payload;
  }
  Piece piece(std::uint32_t at) const noexcept {
    const Unread& u = unread_[(head_ + at) % kRing];
    return {buffers_[u.buffer].addr + u.offset, u.length};
  }
  /// The first `count` bytes of the first piece have been read, at most all of them.
  void take(std::uint32_t count) noexcept {
    Unread& u = unread_[head_ % kRing];
    u.offset += count;
    u.length -= count;
    bytes_ -= count;
    if (u.length != 0) return;
    ++head_;
    home(u.buffer);
  }

  // --- buffers
  std::uint16_t count() const noexcept { return count_; }
  std::uint16_t pending() const noexcept { return pending_; }  ///< at home, to be posted
  /// Nothing, or nothing more, of this one will be read.
  void home(std::uint32_t index) noexcept {
    if ((misfits_ | surplus_) != 0 && !exchange(index)) [[unlikely]]
      return;
    pending_list_[pending_++] = index;
    if (pending_ == pending_list_.size()) post_pending();
  }
  void post() noexcept {
    if (pending_ != 0) post_pending();
  }
  /// The program reads slower than messages come: as many again, where that may be.
  void grow_if_short() noexcept {
    if (size() > count_ / 2U && count_ <= most_) [[unlikely]]
      grow();
  }
  /// The peer has asked for larger buffers (resize), or has said that it needs small ones alone (shrink).
  void begin_resize(Rx which) noexcept;
  void may_try_again() noexcept { was_refused_ = false; }  ///< after there was no memory for more or larger ones
  std::size_t memory_bytes() const noexcept { return memory_bytes_; }
  std::size_t grown_bytes() const noexcept { return extents_.bytes(); }  ///< registered beyond the first ones

 private:
  struct Buffer {
    std::byte* block = nullptr;  ///< as allocated
    std::byte* addr = nullptr;
    std::uint32_t size = 0;
    rdma::Lkey lkey{};
    bool is_first = false;  ///< of the heap's memory, as those that a lane begins with
  };
  struct Unread {
    std::uint32_t buffer;
    std::uint32_t offset;
    std::uint32_t length;
  };

  std::size_t block_bytes(std::uint32_t size) const noexcept { return (size + place_.prefix_bytes + 63) & ~std::size_t{63}; }
  bool allocate(Buffer& buffer, std::uint32_t size, bool is_first) noexcept;
  void free(Buffer& buffer) noexcept;
  std::uint32_t wanted_size() const noexcept {
    return conn_.wanted_recv_size() != 0 ? conn_.wanted_recv_size() : conn_.recv_size();
  }
  bool fits(const Buffer& buffer) const noexcept {
    return buffer.block == nullptr || (buffer.size == wanted_size() && (buffer.is_first || !shrinks_));
  }
  void post_pending() noexcept;
  bool exchange(std::uint32_t index) noexcept;
  void see_resize() noexcept;
  void grow() noexcept;

  Connection& conn_;
  const ConnLimits first_;
  const std::uint16_t most_;
  std::uint16_t count_ = 0;
  std::uint16_t pending_ = 0;
  std::uint16_t misfits_ = 0;  ///< buffers that are to be exchanged when they come home
  std::uint16_t surplus_ = 0;  ///< buffers that are to go when they come home
  bool shrinks_ = false;       ///< to first buffers
  bool was_refused_ = false;
  std::uint32_t head_ = 0, tail_ = 0;  ///< unread: [head, tail)
  std::uint64_t bytes_ = 0;
  std::size_t memory_bytes_ = 0;
  Place place_{};
  std::array<Buffer, kMaxBuffers> buffers_{};
  std::array<Unread, kRing> unread_{};
  std::array<std::uint32_t, 32> pending_list_{};
  RecvExtents extents_;
};

}  // namespace sdp
