// The spin before a sleep. It begins with pauses of the core and goes on with sched_yield: what else wants this core gets it, so
// that spinning costs little where cores are scarce, and a peer on the same core can make what we wait for. Where there is one core
// alone nothing comes while we look: there are a few yields and no pauses. No clock is read there, either: reading it may be a
// system call, and one that returns has let everybody else run who could.
#pragma once

#include <sched.h>
#include <sys/syscall.h>

#include <algorithm>
#include <cstdint>

#include "rdma_core/base/clock.hpp"
#include "rdma_core/base/sys.hpp"
#include "sdp/engine.hpp"

namespace sdp {

class Spinner {
 public:
  /// Takes this wait's budget from the engine. It begins when the pauses are over: what comes sooner is not kept up by a clock.
  /// `lanes` are looked at each time: the more, the fewer looks before others get the core.
  explicit Spinner(std::uint32_t lanes = 1) noexcept
      : budget_(engine::spin_budget()), first_looks_(kLooksBeforeClock / static_cast<int>(std::clamp(lanes, 1U, kMostLanes))) {}
  /// Whether run() will look at all.
  bool may_find() const noexcept { return budget_ > 0; }
  /// Spins until `found()` or the budget is spent; `found` is called often and must be cheap. Reports the outcome to the engine.
  template <class Found>
  bool run(Found found) noexcept {
    if (budget_ <= 0) return false;
    const bool hit = engine::has_one_processor() ? by_turns(found) : by_clock(found);
    engine::spin_result(hit, others_ran_);
    return hit;
  }
  /// Tells the engine how long a turn takes here at the least: a yield, and looks for what is not there. Makes a few of them; tells
  /// nothing if something is found, or where no clock is looked at.
  template <class Found>
  static void measure(Found found) noexcept {
    if (engine::has_one_processor()) return;
    constexpr int kTries = 8;
    const rdma::SteadyClock clock;
    std::int64_t least = INT64_MAX;
    for (int i = 0; i < kTries; ++i) {
      const std::int64_t begun = clock.now();
      rdma::sys::call(SYS_sched_yield);
      if (look(found, kLooksPerYield)) return;
      least = std::min(least, clock.now() - begun);
    }
    engine::spin_turn_takes(least);
  }

 private:
  static constexpr std::uint32_t kMostLanes = 32;
  static constexpr int kLooksBeforeClock = 128, kLooksPerYield = 32, kTurns = 4;

  template <class Found>
  bool by_clock(Found& found) noexcept {
    if (look(found, first_looks_)) return true;
    const std::int64_t until = rdma::SteadyClock{}.now() + budget_;
    for (std::int64_t now = until - budget_; now < until;) {
      const std::int64_t begun = now;
      rdma::sys::call(SYS_sched_yield);
      if (look(found, kLooksPerYield)) return true;
      now = rdma::SteadyClock{}.now();
      others_ran_ = others_ran_ || now - begun > engine::long_turn_ns();
    }
    return false;
  }

  template <class Found>
  static bool by_turns(Found& found) noexcept {
    for (int turn = 0; !found(); ++turn) {
      if (turn == kTurns) return false;
      rdma::sys::call(SYS_sched_yield);
    }
    return true;
  }

  template <class Found>
  static bool look(Found& found, int times) noexcept {
    for (int i = 0; i < times; ++i) {
      if (found()) return true;
      rdma::cpu_relax();
    }
    return false;
  }

  std::int64_t budget_;
  int first_looks_;
  bool others_ran_ = false;
};

}  // namespace sdp
