// LentWatch: memory of the program's that the peer, or the device, may use, as the waiting call follows it: for how long nothing
// has happened, and when the peer is to be asked. Threads: its owner's.
#pragma once

#include <algorithm>
#include <cstdint>
#include <utility>

#include "rdma_core/base/clock.hpp"

namespace sdp {

class LentWatch {
 public:
  static constexpr std::int64_t kMillisecond = 1'000'000;
  static constexpr std::int64_t kReaderPatienceNs = 10 * kMillisecond;  ///< without a byte read: then the rest goes by messages
  /// To a cancel: then the peer's program makes no call, and its thread is asked.
  static constexpr std::int64_t kAnswerNs = 5 * kMillisecond;
  /// To a write, for which the peer's reader waits. A long one takes its time.
  static constexpr std::int64_t kWriteNs = 100 * kMillisecond;

  static std::int64_t now_ns() noexcept { return rdma::SteadyClock{}.now(); }

  explicit LentWatch(std::int64_t now) noexcept : moved_at_(now) {}
  void look(std::int64_t now, std::uint32_t crossed) noexcept {
    if (std::exchange(crossed_, crossed) != crossed) moved_at_ = now;
  }
  void begin_anew(std::int64_t now) noexcept { moved_at_ = now; }
  /// From here on an answer of the peer's is awaited.
  void await_answer(std::int64_t now, std::int64_t usual_ns = kAnswerNs) noexcept {
    moved_at_ = now;
    next_ask_ = now + usual_ns;
  }
  bool awaits_answer() const noexcept { return next_ask_ != 0; }
  std::int64_t still_for(std::int64_t now) const noexcept { return now - moved_at_; }
  /// Later each time.
  bool is_time_to_ask(std::int64_t now) noexcept {
    if (!awaits_answer() || now < next_ask_) return false;
    next_ask_ = now + std::max(2 * (now - moved_at_), kAnswerNs);
    return true;
  }
  std::int64_t next_look(std::int64_t now) const noexcept { return awaits_answer() ? next_ask_ : now + kReaderPatienceNs; }

 private:
  std::uint32_t crossed_ = 0;
  std::int64_t moved_at_;
  std::int64_t next_ask_ = 0;
};

}  // namespace sdp
