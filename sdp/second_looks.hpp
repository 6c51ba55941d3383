// SecondLooks: when a connection looks again whose first search for a lane has failed.
//
// Nothing connects the two ends yet by which they could agree on a time. So each counts from its own first look, which was about
// the same moment for both, and looks at fixed times after it, each time for as long as at first. What a look takes, or whether it
// is left out, moves none of the later ones. The waits are those of a lane that failed (return_pace.hpp). Plain data; nanoseconds.
#pragma once

#include <algorithm>
#include <cstdint>

#include "sdp/return_pace.hpp"

namespace sdp {

class SecondLooks {
 public:
  static constexpr std::int64_t kLook = 3 * ReturnPace::kSecond;  ///< what a look takes that finds nobody
  static constexpr unsigned kUnanswered = 3;                      ///< looks that only others of that service gave a reason for
  static constexpr unsigned kMost = 16;                           ///< connections with one service that look at a time

  explicit SecondLooks(std::int64_t begun) noexcept : begun_(begun) {}

  /// The first of the times that is later than `now`.
  std::int64_t after(std::int64_t now) const noexcept {
    std::int64_t time = begun_, wait = ReturnPace::kFirst;
    do {
      time += kLook + wait;
      wait = std::min(2 * wait, ReturnPace::kLongest);
    } while (time <= now && wait < ReturnPace::kLongest);
    constexpr std::int64_t kStep = kLook + ReturnPace::kLongest;
    return time > now ? time : time + ((now - time) / kStep + 1) * kStep;
  }

  /// A look has ended without a lane. True: another may be worth it.
  bool failed(bool answered) noexcept {
    unanswered_ = answered ? 0 : unanswered_ + 1;
    was_answered_ = was_answered_ || answered;
    return was_answered_ || unanswered_ <= kUnanswered;
  }

 private:
  std::int64_t begun_;
  unsigned unanswered_ = 0;
  bool was_answered_ = false;
};

}  // namespace sdp
