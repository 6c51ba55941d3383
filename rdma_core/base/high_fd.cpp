#include "rdma_core/base/high_fd.hpp"

#include <fcntl.h>
#include <sys/resource.h>

#include <atomic>

#include "rdma_core/base/sys.hpp"

namespace rdma {
namespace {

/// Out of reach of the lowest-free rule and of loops over low numbers, and not higher than needed: the kernel's table is as long as
/// the highest number, and fork copies it.
int move_high(int fd) noexcept {
  rlimit limit{};
  if (sys::call(SYS_prlimit64, 0, RLIMIT_NOFILE, 0, sys::arg(&limit)) != 0) return fd;
  const long floor = limit.rlim_cur > 2048 ? 960 : static_cast<long>(limit.rlim_cur * 3 / 4);
  const long high = sys::call(SYS_fcntl, fd, F_DUPFD_CLOEXEC, floor);
  if (high < 0) return fd;
  sys::call(SYS_close, fd);
  return static_cast<int>(high);
}
void forget_nothing(int) noexcept {}

constinit std::atomic<int (*)(int) noexcept> keeper{&move_high};
constinit std::atomic<void (*)(int) noexcept> forgetter{&forget_nothing};

}  // namespace

int keep_fd(int fd) noexcept { return keeper.load(std::memory_order_relaxed)(fd); }
void forget_fd(int fd) noexcept { forgetter.load(std::memory_order_relaxed)(fd); }

void set_fd_keeper(int (*keep)(int fd) noexcept, void (*forget)(int fd) noexcept) noexcept {
  keeper.store(keep, std::memory_order_relaxed);
  forgetter.store(forget, std::memory_order_relaxed);
}

}  // namespace rdma
