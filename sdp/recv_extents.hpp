// RecvExtents: memory for the receive buffers that a lane gets beyond its first ones. Registered for itself, a few buffers at a
// time, and given back with the last of them that goes: what comes from the peer's heap stays registered as long as that.
//
// Threads: externally serialised (the stream's lock).
#pragma once

#include <array>
#include <bit>
#include <cerrno>
#include <cstddef>
#include <cstdint>
#include <memory>

#include "rdma_core/device.hpp"

namespace sdp {

class RecvExtents {
 public:
  static constexpr unsigned kPieces = 16;  ///< of one size, in an extent
  /// Enough for 129 buffers while they change from one size to another.
  static constexpr unsigned kExtents = 2 * (129 / kPieces + 1);

  struct Piece {
    std::byte* addr = nullptr;
    rdma::Lkey lkey{};
  };
  /// nullptr: no memory. `bytes` keeps the alignment that the caller wants.
  Piece take(rdma::Pd& pd, std::size_t bytes) noexcept {
    Extent* unused = nullptr;
    for (Extent& each : extents_) {
      if (each.mr == nullptr) {
        unused = &each;
      } else if (each.piece == bytes && each.taken != kAll) {
        return each.take();
      }
    }
    auto mr = unused != nullptr ? pd.map_extent((kPieces * bytes + kPageBytes - 1) & ~(kPageBytes - 1))
                                : rdma::fail(ENOMEM, "lane: too many extents");
    if (!mr) return {};
    *unused = {std::move(*mr), bytes, 0};
    return unused->take();
  }
  /// False: it is not of these.
  bool give_back(const std::byte* addr) noexcept {
    for (Extent& each : extents_) {
      if (each.mr == nullptr || addr < each.mr->addr || addr >= each.mr->addr + each.mr->length) continue;
      each.taken &= ~(1U << static_cast<std::size_t>(addr - each.mr->addr) / each.piece);
      if (each.taken == 0) each = {};
      return true;
    }
    return false;
  }
  std::size_t bytes() const noexcept {  ///< registered
    std::size_t sum = 0;
    for (const Extent& each : extents_) sum += each.mr != nullptr ? each.mr->length : 0;
    return sum;
  }

 private:
  static constexpr std::size_t kPageBytes = 4096;
  static constexpr std::uint32_t kAll = (1U << kPieces) - 1;
  struct Extent {
    std::unique_ptr<rdma::Mr> mr;
    std::size_t piece = 0;    ///< bytes
    std::uint32_t taken = 0;  ///< a bit for each piece

    Piece take() noexcept {
      const auto index = static_cast<std::size_t>(std::countr_one(taken));
      taken |= 1U << index;
      return {mr->addr + index * piece, mr->lkey};
    }
  };
  std::array<Extent, kExtents> extents_;
};

}  // namespace sdp
