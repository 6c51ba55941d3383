// io_uring: a program that has a ring may hand any of its sockets to it, and nobody is told. The kernel then reads and writes the
// anchor past us, where a lane's bytes are not. So a process with a ring stays on TCP (SDP_IO_URING): from the call that makes one,
// where that goes through a name that we interpose, and where it does not (a system call written inline, a liburing linked
// statically) from the look that finds the ring's memory among the process's mappings.
#pragma once

#include <cstdint>

namespace sdp {

/// The looks at the mappings. One thread.
class RingWatch {
 public:
  /// Has the process mapped a ring? Looks only if the last look is a while ago: the looks take a thousandth of the time at the
  /// most, and a hundredth `before_a_lane`. False too where there is no /proc.
  bool finds_one(bool before_a_lane) noexcept;

 private:
  std::int64_t last_ns_ = 0, took_ns_ = 0;
};

}  // namespace sdp
