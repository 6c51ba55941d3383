// Lanes of both ends in one process, on the simulated fabric or on two software devices tied to each other.
#pragma once

#include <memory>

#include "sdp/engine.hpp"
#include "sdp/lane.hpp"
#include "sdp/stream_impl.hpp"
#include "tests/sim/seeds.hpp"

namespace sdp::sim {

/// One side's device and what its lanes share, as the service thread makes it.
struct LaneHost {
  rdma::Device* device = nullptr;
  std::shared_ptr<PeerContext> context;
  std::unique_ptr<rdma::CompletionChannel> channel;

  void open(rdma::Device& d, const rdma::Path& path) {
    device = &d;
    context = std::make_shared<PeerContext>();
    context->device = &d;
    context->path = path;
    context->pd = std::move(*d.create_pd(path));
    context->heap = std::move(*rdma::RegisteredHeap::create(*context->pd));
    channel = std::move(*d.create_channel());
  }
  Lane* make(const LaneLimits& limits) {
    void* cell = engine::lane_cell();
    auto* lane = new (cell) Lane(new std::shared_ptr<PeerContext>(context), limits);
    const auto opened = lane->open(channel.get());
    if (!opened) broken("open: ", opened.error().what);
    return lane;
  }
};

inline void free_lane(Lane*& lane) {
  if (lane == nullptr) return;
  lane->close();
  lane->~Lane();
  engine::free_lane_cell(lane);
  lane = nullptr;
}

}  // namespace sdp::sim
