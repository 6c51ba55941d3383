// The spin before a sleep. It begins with pauses of the core and goes on with sched_yield: what else wants this core gets it, so
// that spinning costs little where cores are scarce, and a peer on the same core can make what we wait for.
#pragma once

#include <sched.h>
#include <sys/syscall.h>

#include "rdma_core/base/clock.hpp"
#include "rdma_core/base/sys.hpp"
#include "sdp/engine.hpp"

namespace sdp {

class Spinner {
 public:
  /// Takes this wait's budget from the engine.
  Spinner() noexcept : budget_(engine::spin_budget()) {
    if (budget_ > 0) until_ = rdma::SteadyClock{}.now() + budget_;
  }
  /// Spins until `found()` or the budget is spent; `found` is called often and must be cheap. Reports the outcome to the engine.
  template <class Found>
  bool run(Found found) noexcept {
    if (budget_ <= 0) return false;
    bool hit = false;
    for (int round = 0; !hit; ++round) {
      for (int i = 0; i < 32 && !hit; ++i) {
        hit = found();
        rdma::cpu_relax();
      }
      if (hit || round < kPauseRounds) continue;
      rdma::sys::call(SYS_sched_yield);
      if (rdma::SteadyClock{}.now() >= until_) break;
    }
    engine::spin_result(hit);
    return hit;
  }

 private:
  static constexpr int kPauseRounds = 3;
  std::int64_t budget_;
  std::int64_t until_ = 0;
};

}  // namespace sdp
