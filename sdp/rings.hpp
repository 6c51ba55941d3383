// io_uring: the kernel reads and writes the anchors of the sockets that a ring serves past us, where a lane's bytes are not. So a
// process with a ring that may serve sockets stays on TCP with all its connections (SDP_IO_URING).
//
// A ring that liburing makes is followed: the shim looks at each request before the kernel does, and such a process has lanes until
// the first that is for more than files. Every other ring may serve sockets: from the call that makes or uses it, where that goes
// through a name that we interpose, and where it does not (a system call written inline, a liburing linked statically) from the
// look that finds the ring's memory among the process's mappings.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <optional>

namespace sdp {

/// The rings that are followed. Any thread, without locks; a fork's child has its parent's.
class FollowedRings {
 public:
  /// One address in each of a ring's mappings. The queues may share one.
  struct Memory {
    std::uintptr_t requests = 0;  ///< the entries (SQE); says which ring it is
    std::uintptr_t submissions = 0, completions = 0;
  };
  bool add(const Memory&) noexcept;  ///< false: there are too many
  bool has(std::uintptr_t requests) const noexcept;
  void remove(std::uintptr_t requests) noexcept;
  /// Is [from, to), as the process has it mapped, one of theirs?
  bool have_memory_in(std::uintptr_t from, std::uintptr_t to) const noexcept;

  /// A ring is being made, or goes: for that long it is mapped without being among these.
  class Change {
   public:
    explicit Change(FollowedRings& rings) noexcept : rings_(rings) { rings_.begin_change(); }
    ~Change() { rings_.end_change(); }
    Change(const Change&) = delete;
    Change& operator=(const Change&) = delete;

   private:
    FollowedRings& rings_;
  };
  /// Grows with each beginning and each end of a change.
  std::uint32_t changes() const noexcept { return changes_.load(std::memory_order_seq_cst); }
  bool are_changing() const noexcept { return under_way_.load(std::memory_order_seq_cst) != 0; }
  void forget_changes_in_child() noexcept { under_way_.store(0); }  ///< other threads' of the parent

 private:
  static constexpr std::size_t kMost = 64;
  struct Ring {
    std::atomic<std::uintptr_t> requests, submissions, completions;  ///< `requests` is 0: free; it is set first and last
  };
  void begin_change() noexcept {
    under_way_.fetch_add(1, std::memory_order_seq_cst);
    changes_.fetch_add(1, std::memory_order_seq_cst);
  }
  void end_change() noexcept {
    changes_.fetch_add(1, std::memory_order_seq_cst);
    under_way_.fetch_sub(1, std::memory_order_seq_cst);
  }

  Ring rings_[kMost]{};
  std::atomic<std::uint32_t> changes_{0}, under_way_{0};
};

FollowedRings& followed_rings() noexcept;

/// The looks at the mappings. One thread.
class RingWatch {
 public:
  /// Has the process mapped a ring that is not followed? Looks only if the last look is a while ago, so that the looks take a
  /// thousandth of the time at the most, and a hundredth `before_a_lane`; and, most times, only if another thread of the process
  /// has run since then. False too where there is no /proc.
  bool finds_one(bool before_a_lane) noexcept;

 private:
  bool others_have_run() noexcept;

  std::int64_t last_ns_ = 0, took_ns_ = 0;
  std::optional<std::int64_t> others_ns_;  ///< time on a processor that the other threads had had before the last look
  unsigned spared_ = 0;                    ///< looks since then
};

}  // namespace sdp
