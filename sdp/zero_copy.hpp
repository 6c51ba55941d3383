// ZeroCopy: what a lane does with the program's own memory, by SrcAvail (lane_zcopy.cpp): one offer of ours at a time, which the
// peer reads by RDMA, and one read of an offer of the peer's; and by SinkAvail (lane_sink.cpp): one buffer of a reader of ours,
// into which the peer writes by RDMA, and one write into such a buffer of the peer's. stream_zcopy.cpp and stream_sink.cpp decide
// when and wait.
//
// Each belongs to a thread of the program that waits inside its call, for the memory is its own again when the call returns.
// Whoever takes in the peer's messages may find that they are over; their owner fetches how they ended. Memory of the program's is
// registered for that time only. Threads: the stream's lock.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <memory>

#include "rdma_core/device.hpp"
#include "sdp/kept_bytes.hpp"

namespace sdp {

/// After an attempt that came to nothing there is none for a time, which grows.
class Pause {
 public:
  static constexpr std::int64_t kFirstNs = 20'000'000, kLongestNs = 10'000'000'000;
  bool is_on(std::int64_t now_ns) const noexcept { return now_ns < until_ns_; }
  void begin(std::int64_t now_ns) noexcept {
    length_ns_ = std::clamp(2 * length_ns_, kFirstNs, kLongestNs);
    until_ns_ = now_ns + length_ns_;
  }
  void went_well() noexcept { length_ns_ = 0; }

 private:
  std::int64_t length_ns_ = 0, until_ns_ = 0;
};

class ZeroCopy {
 public:
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
  struct Sink {
    std::unique_ptr<rdma::Mr> mr;
    std::byte* memory = nullptr;
    std::uint32_t done = 0;  ///< bytes, by the peer's word
    bool is_open = false;    ///< the peer may still write
    bool has_owner = false;
    bool is_cancelled = false;
  };
  struct Write {
    std::unique_ptr<rdma::Mr> mr;
    const std::byte* memory = nullptr;
    std::uint32_t bytes = 0;
    std::uint64_t from = 0;     ///< the lane's position of the first
    std::uint64_t request = 0;  ///< which of the send queue's
    bool is_open = false;       ///< the device has not done it, or the peer has not said that it has RdmaWrCompl
    bool has_owner = false;
  };
  Offer offer;
  Read read;
  Sink sink;
  Write write;
  Pause sends;     ///< offers, and waits for a buffer of the peer's: its reader did not come, or wanted it otherwise
  Pause receives;  ///< buffers: what came was not written there
  Pause wishes;    ///< for Pipelined mode: the peer has been asked

  /// What was offered or written and not known to have crossed when the lane was stopped, in memory of this process's own: from the
  /// lane's position `rest_from` on.
  KeptBytes rest;
  std::uint64_t rest_from = 0;

  /// The QP is gone.
  void clear() noexcept {
    offer = {};
    read = {};
    sink = {};
    write = {};
    rest.clear();
  }
  /// For a lane in `from`'s place, whose device is gone: how what it had begun ended, for the owners.
  void inherit(const ZeroCopy& from) noexcept {
    offer.bytes = from.offer.bytes;
    offer.in_line = from.offer.in_line;
    offer.crossed = from.offer.crossed;
    offer.kept = from.offer.kept;
    offer.has_owner = from.offer.has_owner;
    offer.is_cancelled = from.offer.is_cancelled;
    read.done = from.read.done;
    read.has_owner = from.read.has_owner;
    sink.done = from.sink.done;
    sink.has_owner = from.sink.has_owner;
    sink.is_cancelled = from.sink.is_cancelled;
    write.bytes = from.write.bytes;
    write.has_owner = from.write.has_owner;
  }
};

}  // namespace sdp
