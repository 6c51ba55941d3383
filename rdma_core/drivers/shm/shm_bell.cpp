#include "rdma_core/drivers/shm/shm_bell.hpp"

#include <errno.h>
#include <fcntl.h>
#include <sys/epoll.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <sys/stat.h>

#include "rdma_core/base/sys.hpp"

namespace rdma::shm {
namespace {

int option(int fd, int name) noexcept {
  int value = -1;
  socklen_t length = sizeof value;
  return sys::call(SYS_getsockopt, fd, SOL_SOCKET, name, sys::arg(&value), sys::arg(&length)) == 0 ? value : -1;
}

long make_pair(int (&ends)[2]) noexcept {
  return sys::call(SYS_socketpair, AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0, sys::arg(ends));
}

/// Does each of several rings wake who polls for edges?
bool wakes_each_time(int fd, const FarEnd& far) noexcept {
  const long poll = sys::call(SYS_epoll_create1, EPOLL_CLOEXEC);
  if (poll < 0) return false;
  epoll_event edge{EPOLLIN | EPOLLET, {}};
  bool wakes = sys::call(SYS_epoll_ctl, poll, EPOLL_CTL_ADD, fd, sys::arg(&edge)) == 0;
  for (int i = 0; i < 3 && wakes; ++i) {
    far.ring();
    wakes = sys::call(SYS_epoll_pwait, poll, sys::arg(&edge), 1, 0, 0, 8) == 1;
  }
  sys::call(SYS_close, poll);
  return wakes;
}

}  // namespace

int move_high(int fd) noexcept {
  rlimit limit{};
  long lowest = 900;
  if (getrlimit(RLIMIT_NOFILE, &limit) == 0 && limit.rlim_cur < 1024)
    lowest = static_cast<long>(limit.rlim_cur - limit.rlim_cur / 8);
  const long high = sys::call(SYS_fcntl, fd, F_DUPFD_CLOEXEC, lowest);
  if (high < 0) return fd;
  sys::call(SYS_close, fd);
  return static_cast<int>(high);
}

void FarEnd::drop() noexcept {
  if (fd_ >= 0) sys::call(SYS_close, fd_);
  fd_ = -1;
}

bool FarEnd::adopt(int fd) noexcept {
  if (fd < 0) return false;
  if (option(fd, SO_DOMAIN) != AF_UNIX || option(fd, SO_TYPE) != SOCK_STREAM) {
    sys::call(SYS_close, fd);
    return false;
  }
  fd_ = move_high(fd);
  return remember();
}

bool FarEnd::replace(int fd) noexcept {
  const bool done = sys::call(SYS_dup3, fd, fd_, O_CLOEXEC) >= 0;
  sys::call(SYS_close, fd);
  return done && remember();
}

bool FarEnd::remember() noexcept {
  struct stat st {};
  if (sys::call(SYS_fstat, fd_, sys::arg(&st)) != 0) return false;
  device_ = st.st_dev;
  inode_ = st.st_ino;
  return true;
}

void FarEnd::ring() const noexcept {
  // What remains of the danger that the program closed our number and opened a socket of its own there: between the two calls.
  struct stat st {};
  if (fd_ < 0 || sys::call(SYS_fstat, fd_, sys::arg(&st)) != 0 || st.st_ino != inode_ || st.st_dev != device_) return;
  sys::call(SYS_shutdown, fd_, SHUT_WR);
}

OwnBell::~OwnBell() {
  if (fd_ >= 0) sys::call(SYS_close, fd_);
}

int OwnBell::open() noexcept {
  int ends[2] = {-1, -1};
  if (const long r = make_pair(ends); r < 0) return static_cast<int>(r);
  fd_ = move_high(ends[0]);
  if (!far_.adopt(ends[1]) || !wakes_each_time(fd_, far_)) return -ENOTSUP;
  return 0;
}

void OwnBell::renew_in_child() noexcept {
  int ends[2] = {-1, -1};
  if (fd_ >= 0 && make_pair(ends) == 0) {
    const bool near = sys::call(SYS_dup3, ends[0], fd_, O_CLOEXEC) >= 0;
    sys::call(SYS_close, ends[0]);
    if (far_.replace(ends[1]) && near) return far_.ring();  // nothing is to be sent through it
  }
  // None is better than the parent's: a peer that has its far end would ring in the wrong process.
  if (fd_ >= 0) sys::call(SYS_close, fd_);
  fd_ = -1;
  far_.drop();
}

}  // namespace rdma::shm
