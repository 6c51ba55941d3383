// Grace: when memory that threads look at without a lock may be given back.
//
// A wait over many streams peeks at their lanes all the time and takes no lock for it. It does so inside a Look. Who withdraws a
// lane (the service thread) first makes it unreachable, then notes the epoch and keeps the lane until passed() says that every Look
// that may have seen it is over. Nobody waits for anybody.
//
// Two counters take turns: a Look counts in the current epoch's, and an epoch ends only when the counter of the one before it is
// back at zero. After two ends, every Look of the noted epoch is over.
#pragma once

#include <atomic>
#include <cstdint>

namespace sdp {

class Grace {
 public:
  /// Any thread, also in a signal handler; short. Nests.
  class Look {
   public:
    explicit Look(Grace& grace) noexcept : grace_(grace) {
      for (;;) {
        const std::uint64_t now = grace.epoch_.load(std::memory_order_seq_cst);
        side_ = now % 2;
        grace.inside_[side_].fetch_add(1, std::memory_order_seq_cst);
        if (grace.epoch_.load(std::memory_order_seq_cst) == now) return;
        grace.inside_[side_].fetch_sub(1, std::memory_order_release);
      }
    }
    ~Look() { grace_.inside_[side_].fetch_sub(1, std::memory_order_release); }
    Look(const Look&) = delete;
    Look& operator=(const Look&) = delete;

   private:
    Grace& grace_;
    unsigned side_ = 0;
  };

  // --- one thread only
  /// To be noted after the thing has been made unreachable by a seq_cst store.
  std::uint64_t epoch() const noexcept { return epoch_.load(std::memory_order_seq_cst); }
  /// Is every Look over that began before `noted` was read? Ends epochs as far as it can.
  bool passed(std::uint64_t noted) noexcept {
    for (;;) {
      const std::uint64_t now = epoch_.load(std::memory_order_relaxed);
      if (now >= noted + 2) return true;
      if (inside_[(now + 1) % 2].load(std::memory_order_seq_cst) != 0) return false;
      epoch_.store(now + 1, std::memory_order_seq_cst);
    }
  }
  /// In a fork's child: the parent's other threads are not here.
  void forget() noexcept {
    for (auto& count : inside_) count.store(0, std::memory_order_relaxed);
  }

 private:
  std::atomic<std::uint64_t> epoch_{0};
  std::atomic<std::int32_t> inside_[2] = {};
};

}  // namespace sdp
