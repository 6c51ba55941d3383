// CopyTrial: which way of copying a bulk is faster between the two cores that a lane's ends happen to run on.
//
// A copy into this core's cache is fast by itself, but the lines have to be asked back from the reader's core first and fetched by
// it afterwards. One past the caches spares that and pays with the way through memory. What wins depends on how far apart the cores
// are, by a factor of two either way, and changes with the scheduler, a virtual machine's within milliseconds: it has to be tried.
//
// The way in use is measured all the time; a stream goes over to the other when that was clearly faster when last measured. Now and
// then it tries the other way, as often as the trials cost a 64th of the time:
//
//   measure, measure … ──> settle in the other way ──> measure it once ──> settle in the faster ──> measure, measure …
//
// Time is the writer's, waits for the reader included. All lanes of a process share what they find. The clock is read once a stage.
// Threads: a trial is externally serialised; what is shared, any.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstddef>
#include <cstdint>

namespace sdp {

enum class BulkCopy : std::uint8_t { tried, cached, direct };

/// How long a byte takes either way, as far as it has been measured.
class CopyPaces {
 public:
  /// Should who copies this way go past the caches?
  bool direct(bool now) const noexcept {
    constexpr std::int64_t kPart = 16;  // a smaller difference is none
    const std::int64_t mine = of(now).load(std::memory_order_relaxed), other = of(!now).load(std::memory_order_relaxed);
    return other != 0 && other + other / kPart < mine ? !now : now;
  }
  void add(bool direct, std::int64_t ns, std::int64_t bytes) noexcept {
    std::atomic<std::int64_t>& pace = of(direct);
    const std::int64_t before = pace.load(std::memory_order_relaxed), found = ns * kUnit / bytes;
    // Half of what it was, so that one change of the machine is followed at once and one interruption is not.
    pace.store(before == 0 ? found : (before + std::min(found, 2 * before)) / 2, std::memory_order_relaxed);
  }
  /// By how many parts of `kWhole` a trial of the other way makes the stream slower; 0: not at all, or nobody knows.
  static constexpr std::int64_t kWhole = 256;
  std::int64_t loss(bool direct) const noexcept {
    const std::int64_t mine = of(direct).load(std::memory_order_relaxed), other = of(!direct).load(std::memory_order_relaxed);
    return mine == 0 || other <= mine ? 0 : (other - mine) * kWhole / mine;
  }

 private:
  static constexpr std::int64_t kUnit = 1'000'000;
  std::atomic<std::int64_t>& of(bool direct) noexcept { return paces_[direct ? 1 : 0]; }
  const std::atomic<std::int64_t>& of(bool direct) const noexcept { return paces_[direct ? 1 : 0]; }
  std::atomic<std::int64_t> paces_[2]{};  ///< femtoseconds a byte; 0: not measured
};

class CopyTrial {
 public:
  static constexpr std::int64_t kSlowest = 2;  ///< nanoseconds a byte: what takes longer is limited by something else

  /// `between`: bytes that the writer can be ahead. As long as that fills or empties its pace is its own, not the stream's: so
  /// twice as many go by before each measurement, and four times as many are measured.
  CopyTrial(CopyPaces& paces, BulkCopy way, std::int64_t between) noexcept
      : paces_(paces),
        settled_(2 * between),
        measured_(4 * between),
        tries_(way == BulkCopy::tried),
        kept_(tries_ ? paces.direct(false) : way == BulkCopy::direct),
        direct_(kept_),
        left_(settled_) {}

  /// The next piece goes past the caches.
  bool direct() const noexcept { return direct_; }
  /// A piece went that way. `now` gives nanoseconds.
  template <class Now>
  void copied(std::size_t bytes, const Now& now) noexcept {
    left_ -= static_cast<std::int64_t>(bytes);
    if (left_ <= 0 && tries_) [[unlikely]]
      next_stage(now());
  }

 private:
  static constexpr std::int64_t kCost = 64;       ///< trials take one part in so many of the time
  static constexpr std::int64_t kMostHeld = 512;  ///< measurements between two trials

  void next_stage(std::int64_t now) noexcept {
    if (settling_) return measure(now);
    const std::int64_t ns = now - since_;
    const bool is_limited = ns > kSlowest * measured_;
    if (!is_limited) paces_.add(direct_, ns, measured_);
    const bool was_trial = direct_ != kept_;
    const bool better = paces_.direct(kept_);
    if (was_trial || better != kept_) {
      kept_ = better;
      held_ = is_limited ? kMostHeld
                         : std::clamp(kCost * paces_.loss(kept_) * (settled_ + measured_) / measured_ / CopyPaces::kWhole,
                                      std::int64_t{2}, kMostHeld);
    }
    if (direct_ == kept_ && --held_ <= 0) return settle(!kept_);
    if (direct_ == kept_) return measure(now);
    settle(kept_);
  }
  void measure(std::int64_t now) noexcept {
    settling_ = false;
    since_ = now;
    left_ = measured_;
  }
  void settle(bool direct) noexcept {
    settling_ = true;
    direct_ = direct;
    left_ = settled_;
  }

  CopyPaces& paces_;
  const std::int64_t settled_, measured_;  ///< bytes
  const bool tries_;
  bool kept_;    ///< the way that is not on trial
  bool direct_;  ///< the way in use
  bool settling_ = true;
  std::int64_t left_;      ///< bytes to the end of the stage
  std::int64_t held_ = 2;  ///< measurements until the next trial
  std::int64_t since_ = 0;
};

}  // namespace sdp
