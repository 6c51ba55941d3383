// ZeroCopy: what a lane does with the program's own memory: one offer of ours at a time, which the peer reads by RDMA, and one read
// of an offer of the peer's. lane_zcopy.cpp moves the bytes, stream_zcopy.cpp decides when and waits.
//
// Both belong to a thread of the program that waits inside its call, for the memory is its own again when the call returns. Whoever
// takes in the peer's messages may find that they are over; their owner fetches how they ended. Memory of the program's is
// registered for that time only. Threads: the stream's lock.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <memory>

#include "rdma_core/device.hpp"
#include "sdp/kept_bytes.hpp"

namespace sdp {

class ZeroCopy {
 public:
  static constexpr std::int64_t kFirstPauseNs = 20'000'000, kLongestPauseNs = 10'000'000'000;

  struct Offer {
    std::unique_ptr<rdma::Mr> mr;
    rdma::Rkey rkey{};
    const std::byte* memory = nullptr;
    std::uint32_t bytes = 0;
    std::uint32_t in_line = 0;
    std::uint32_t crossed = 0;       ///< bytes in line, known to be read, or kept
    std::uint32_t kept = 0;          ///< bytes in `rest`
    std::uint64_t moved_before = 0;  ///< SourceAdverts::moved() at its beginning
    bool is_open = false;            ///< the peer may still read
    bool has_owner = false;
    bool is_cancelled = false;
  };
  struct Read {
    std::unique_ptr<rdma::Mr> mr;
    std::byte* memory = nullptr;
    std::uint32_t bytes = 0, started = 0, done = 0;
    std::uint32_t under_way = 0;  ///< RDMA Reads; pieces of the same size, but for the last
    bool has_owner = false;
  };
  Offer offer;
  Read read;

  /// What was offered and not known to have crossed when the lane was stopped, in memory of this process's own: from the lane's
  /// position `rest_from` on.
  KeptBytes rest;
  std::uint64_t rest_from = 0;

  /// After an offer that came to nothing, for the reader did not come or wanted it otherwise, sends go by messages for a time,
  /// which grows.
  bool is_paused(std::int64_t now_ns) const noexcept { return now_ns < paused_until_ns_; }
  void pause(std::int64_t now_ns) noexcept {
    pause_ns_ = std::clamp(2 * pause_ns_, kFirstPauseNs, kLongestPauseNs);
    paused_until_ns_ = now_ns + pause_ns_;
  }
  void went_well() noexcept { pause_ns_ = 0; }

  /// The QP is gone.
  void clear() noexcept {
    offer = {};
    read = {};
    rest.clear();
  }
  /// For a lane in `from`'s place, whose device is gone: how its offer and its read ended, for their owners.
  void inherit(const ZeroCopy& from) noexcept {
    offer.bytes = from.offer.bytes;
    offer.in_line = from.offer.in_line;
    offer.crossed = from.offer.crossed;
    offer.kept = from.offer.kept;
    offer.has_owner = from.offer.has_owner;
    offer.is_cancelled = from.offer.is_cancelled;
    read.done = from.read.done;
    read.has_owner = from.read.has_owner;
  }

 private:
  std::int64_t pause_ns_ = 0, paused_until_ns_ = 0;
};

}  // namespace sdp
