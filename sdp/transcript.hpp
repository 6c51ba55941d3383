// Transcript: the first bytes that TCP carried for a stream, each way. On devices between hosts both ends show each other that they
// know them (rdma_core/cm/rdma_cm.hpp), again if a lane has failed and another is to be made: bytes that a lane carried are no part
// of it. What was not seen here (bytes of two threads at a time, or never in the program's memory) ends the record of its
// direction: it holds the first bytes of TCP's without a gap, or fewer.
//
// Threads: a thread that has moved bytes calls add() while it is still counted in, with how many are; anybody may read.
#pragma once

#include <sys/uio.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <span>
#include <vector>

#include "rdma_core/cm/connection_manager.hpp"

namespace sdp {

class Transcript {
 public:
  static constexpr std::size_t kMost = rdma::cm::Transcript::kMost;

  /// One direction.
  class Record {
   public:
    bool is_open() const noexcept { return size_.load(std::memory_order_relaxed) < kMost; }
    /// The first `count` bytes of `from` have been carried. `callers`: threads that are moving bytes that way, this one included.
    void add(std::span<const iovec> from, std::size_t count, std::int32_t callers) noexcept {
      std::uint32_t size = size_.load(std::memory_order_relaxed);
      if (size >= kMost) return;
      if (callers != 1) return close();
      for (const iovec& each : from) {
        const std::size_t n = std::min({each.iov_len, count, kMost - size});
        std::memcpy(bytes_.data() + size, each.iov_base, n);
        size += static_cast<std::uint32_t>(n);
        count -= n;
        if (n < each.iov_len) break;
      }
      // Another thread that has come meanwhile may have closed it.
      std::uint32_t expected = size_.load(std::memory_order_relaxed);
      if (expected < kClosed) size_.compare_exchange_strong(expected, size, std::memory_order_release, std::memory_order_relaxed);
    }
    /// Nothing that follows is known.
    void close() noexcept { size_.fetch_or(kClosed, std::memory_order_release); }
    void restart(bool open) noexcept { size_.store(open ? 0 : kClosed, std::memory_order_relaxed); }
    std::span<const std::byte> bytes() const noexcept {
      return std::span(bytes_).first(size_.load(std::memory_order_acquire) & ~kClosed);
    }

   private:
    static constexpr std::uint32_t kClosed = 1U << 31;
    std::atomic<std::uint32_t> size_{kClosed};
    std::array<std::byte, kMost> bytes_;
  };

  void restart(bool open) noexcept {
    sent.restart(open);
    received.restart(open);
  }

  Record sent, received;
};

}  // namespace sdp
