// ReturnPace: how often lanes to one host are looked for again after they have failed.
//
// One attempt at a time, and more rarely each time that it fails, until one succeeds: then the others follow, twice as many at a
// time. A path on which lanes come up and fail again costs each time what noticing it takes; so a lane that has not lived for long
// is waited for longer and longer, too. Plain data; times in nanoseconds.
#pragma once

#include <algorithm>
#include <cstdint>

namespace sdp {

class ReturnPace {
 public:
  static constexpr std::int64_t kSecond = 1'000'000'000;
  static constexpr std::int64_t kFirst = kSecond;              ///< the shortest wait
  static constexpr std::int64_t kLongest = 60 * kSecond;       ///< between two attempts
  static constexpr std::int64_t kLongestFlaw = 600 * kSecond;  ///< after lanes that did not live for long
  static constexpr std::int64_t kShortLife = 60 * kSecond;
  static constexpr unsigned kMost = 16;  ///< attempts at a time

  /// When the next attempt may begin, if one may at all.
  std::int64_t due() const noexcept { return std::max(attempt_due_, flaw_due_); }
  bool has_room() const noexcept { return under_way_ < at_once_; }
  bool may_begin(std::int64_t now) const noexcept { return has_room() && now >= due(); }

  /// A lane has failed that was up for `lived`. Those that fail with it count once.
  void on_lane_lost(std::int64_t now, std::int64_t lived) noexcept {
    if (now < due()) return;
    flaw_wait_ = lived >= kShortLife || flaw_wait_ == 0 ? kFirst : std::min(2 * flaw_wait_, kLongestFlaw);
    flaw_due_ = now + flaw_wait_;
    at_once_ = 1;
  }
  void begin() noexcept { ++under_way_; }
  void succeed() noexcept {
    --under_way_;
    attempt_wait_ = 0;
    at_once_ = std::min(2 * at_once_, kMost);
  }
  void fail(std::int64_t now) noexcept {
    --under_way_;
    at_once_ = 1;
    if (now < attempt_due_) return;  // another that was under way with it
    attempt_wait_ = std::clamp(2 * attempt_wait_, kFirst, kLongest);
    attempt_due_ = now + attempt_wait_;
  }
  void give_up() noexcept { --under_way_; }  ///< it is nobody's any more; nothing is known of the path
  /// There is news that may change everything, as a device that has come.
  void hurry() noexcept { attempt_due_ = attempt_wait_ = 0; }
  /// Nothing worth keeping.
  bool is_idle(std::int64_t now) const noexcept { return under_way_ == 0 && now >= due() + kLongestFlaw; }

 private:
  std::int64_t attempt_due_ = 0, attempt_wait_ = 0, flaw_due_ = 0, flaw_wait_ = 0;
  unsigned under_way_ = 0, at_once_ = 1;
};

}  // namespace sdp
