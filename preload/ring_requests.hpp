// What a ring of liburing's is asked for, before the kernel knows.
#pragma once

#include <linux/io_uring.h>

#include "sdp/rings.hpp"

/// liburing's own, as far as we look into it: it is the same in every version, for programs have it inlined.
struct io_uring {
  unsigned *head, *tail, *mask, *entries, *flags, *dropped, *array;
  io_uring_sqe* requests;
  unsigned first, behind_last;  ///< of what the program has prepared and liburing has not handed over yet
  std::size_t bytes;
  void* memory;
  unsigned reserved[4];
  unsigned* completions_head;
};

namespace preload {

/// Does such a ring lie where the kernel reads it by calls only, and in entries as we know them? `flags`: IORING_SETUP_*.
bool can_follow_ring(unsigned flags) noexcept;

/// Where it is mapped.
sdp::FollowedRings::Memory memory_of(const io_uring&) noexcept;

/// Of everything that the kernel has not taken yet: can none of it reach a socket?
bool asks_for_files_only(const io_uring&) noexcept;

/// Of `count` descriptors for a ring's own table; negative ones stand for none.
bool are_files(const int* fds, unsigned count) noexcept;

}  // namespace preload
