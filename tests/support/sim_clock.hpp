// Time that moves only when the simulation says so.
#pragma once

#include <cassert>

#include "rdma_core/base/clock.hpp"

namespace rdma::sim {

class VirtualClock final : public Clock {
 public:
  Nanos now() const noexcept override { return now_; }
  void advance_to(Nanos time) noexcept {
    assert(time >= now_);
    now_ = time;
  }

 private:
  Nanos now_ = 1'000'000'000;  ///< not 0: "never" and "at the start" must differ
};

}  // namespace rdma::sim
