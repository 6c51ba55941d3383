// Moves a descriptor of the library's own out of the way of the program's: of the lowest-free rule and of loops over low numbers.
#pragma once

#include <fcntl.h>
#include <sys/resource.h>

#include "rdma_core/base/sys.hpp"

namespace sdp {

/// The descriptor to use from now on, CLOEXEC: a high duplicate (`fd` is closed), or `fd` itself when there is no room above.
/// Not higher than needed: the kernel's table is as long as the highest number, and fork copies it.
inline int move_fd_high(int fd) noexcept {
  rlimit limit{};
  if (rdma::sys::call(SYS_prlimit64, 0, RLIMIT_NOFILE, 0, rdma::sys::arg(&limit)) != 0) return fd;
  const long floor = limit.rlim_cur > 2048 ? 960 : static_cast<long>(limit.rlim_cur * 3 / 4);
  const long high = rdma::sys::call(SYS_fcntl, fd, F_DUPFD_CLOEXEC, floor);
  if (high < 0) return fd;
  rdma::sys::call(SYS_close, fd);
  return static_cast<int>(high);
}

}  // namespace sdp
