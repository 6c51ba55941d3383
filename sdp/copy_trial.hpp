// CopyTrial: which way of copying a bulk is faster between the two cores that a lane's ends happen to run on.
//
// A copy into this core's cache is fast by itself, but the lines have to be asked back from the reader's core first and fetched by
// it afterwards. One past the caches spares that and pays with the way through memory. What wins depends on how far apart the cores
// are, by a factor of two either way, and changes with the scheduler: it has to be tried.
//
//   hold ──> measure the way in use ──> settle ──> measure the other ──> vote ──> hold
//
// Time is the writer's, waits for the reader included. All lanes of a process vote together. The clock is read once a stage.
// Threads: a trial is externally serialised, a vote any.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstddef>
#include <cstdint>

namespace sdp {

enum class BulkCopy : std::uint8_t { tried, cached, direct };

/// What trials have found so far.
class CopyVote {
 public:
  bool direct() const noexcept { return score_.load(std::memory_order_relaxed) > 0; }
  /// True: not unanimous yet.
  bool cast(bool for_direct) noexcept {
    const int score = std::clamp(score_.load(std::memory_order_relaxed) + (for_direct ? 1 : -1), -kSure, kSure);
    score_.store(score, std::memory_order_relaxed);
    return score != kSure && score != -kSure;
  }

 private:
  static constexpr int kSure = 3;
  std::atomic<int> score_{0};
};

class CopyTrial {
 public:
  static constexpr std::int64_t kLongestHold = 64;  ///< times what is measured
  static constexpr std::int64_t kSlowest = 2;       ///< nanoseconds a byte: what takes longer is limited by something else

  /// `between`: bytes that the writer can be ahead. As long as that fills or empties its pace is its own, not the stream's: so
  /// twice as many go by before each measurement, and four times as many are measured.
  CopyTrial(CopyVote& vote, BulkCopy way, std::int64_t between) noexcept
      : vote_(vote),
        settled_(2 * between),
        measured_(4 * between),
        tries_(way == BulkCopy::tried),
        direct_(tries_ ? vote.direct() : way == BulkCopy::direct),
        left_(settled_),
        hold_(measured_) {}

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
  enum class Stage : std::uint8_t { hold, in_use, settle, other };

  void next_stage(std::int64_t now) noexcept {
    switch (stage_) {
      case Stage::hold:
        return begin(Stage::in_use, measured_, now);
      case Stage::in_use:
        in_use_ns_ = now - since_;
        direct_ = !direct_;
        return begin(Stage::settle, settled_, now);
      case Stage::settle:
        return begin(Stage::other, measured_, now);
      case Stage::other:
        compare(direct_ ? in_use_ns_ : now - since_, direct_ ? now - since_ : in_use_ns_);
        direct_ = vote_.direct();
        return begin(Stage::hold, hold_, now);
    }
  }
  void begin(Stage stage, std::int64_t bytes, std::int64_t now) noexcept {
    stage_ = stage;
    left_ = bytes;
    since_ = now;
  }
  void compare(std::int64_t cached_ns, std::int64_t direct_ns) noexcept {
    hold_ = std::min(2 * hold_, kLongestHold * measured_);
    if (std::max(cached_ns, direct_ns) > kSlowest * measured_) return;
    constexpr std::int64_t kPart = 16;  // a smaller difference is none
    const bool for_direct = direct_ns + direct_ns / kPart < cached_ns;
    const bool for_cached = cached_ns + cached_ns / kPart < direct_ns;
    if ((for_direct || for_cached) && vote_.cast(for_direct)) hold_ = measured_;
  }

  CopyVote& vote_;
  const std::int64_t settled_, measured_;  ///< bytes
  const bool tries_;
  bool direct_;
  Stage stage_ = Stage::hold;
  std::int64_t left_;  ///< bytes to the end of the stage
  std::int64_t hold_;  ///< bytes of the next one of those
  std::int64_t since_ = 0, in_use_ns_ = 0;
};

}  // namespace sdp
