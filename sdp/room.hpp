// Is there room for what the set-up of a lane takes? The libraries of devices, and C++'s own, may end the process when memory is
// short in the middle: it is better not to begin. A look, no promise. Any thread.
#pragma once

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/resource.h>
#include <sys/syscall.h>

#include <algorithm>
#include <array>
#include <cstddef>

#include "rdma_core/base/sys.hpp"

namespace sdp {

/// Of address space (RLIMIT_AS, RLIMIT_DATA, strict overcommit): device libraries, and a lane as large as it gets. Two system
/// calls.
inline bool has_room_for_lane() noexcept {
  constexpr long kBytes = 32L << 20;
  const long at = rdma::sys::call(SYS_mmap, 0, kBytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (at < 0 && at > -4096) return false;
  rdma::sys::call(SYS_munmap, at, kBytes);
  return true;
}

/// As many descriptors as the first lane on an RDMA device takes. `fd` is any that is open; some fifty system calls.
inline bool has_descriptors_for_lane(int fd) noexcept {
  rlimit limit{};
  rdma::sys::call(SYS_prlimit64, 0, RLIMIT_NOFILE, 0, rdma::sys::arg(&limit));
  // Out of the way of who relies on the lowest free number, where there is such a place.
  const long floor = limit.rlim_cur > 2048 ? 960 : std::max(static_cast<long>(limit.rlim_cur) - 64, 0L);
  std::array<long, 24> copies;
  std::size_t made = 0;
  while (made < copies.size() && (copies[made] = rdma::sys::call(SYS_fcntl, fd, F_DUPFD_CLOEXEC, floor)) >= 0) ++made;
  const bool enough = made == copies.size();
  while (made != 0) rdma::sys::call(SYS_close, copies[--made]);
  return enough;
}

}  // namespace sdp
