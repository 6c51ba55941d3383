// Patience: how long a connection manager looks for an anchor's other end. As long as was asked, and then it is over; counted anew
// whenever something shows that the peer is there and that this one has only to wait for its turn, but not for ever. Plain data;
// nanoseconds. Private to rdma_core/cm.
#pragma once

#include <algorithm>

#include "rdma_core/base/clock.hpp"

namespace rdma::cm {

struct Patience {
  static constexpr Nanos kMost = 20;  ///< times what was asked for

  Nanos asked = 0, ends = 0, latest = 0;

  static Patience of(unsigned ms, Nanos now) noexcept {
    const Nanos asked = static_cast<Nanos>(ms) * 1'000'000;
    return {asked, now + asked, now + kMost * asked};
  }
  void renew(Nanos now) noexcept { ends = std::max(ends, std::min(now + asked, latest)); }
  bool is_over(Nanos now) const noexcept { return now >= ends; }
};

}  // namespace rdma::cm
