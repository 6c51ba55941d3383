#include "rdma_core/drivers/shm/shm_bell.hpp"

#include <errno.h>
#include <fcntl.h>
#include <sys/eventfd.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <sys/stat.h>

#include <cstring>

#include "rdma_core/base/sys.hpp"

namespace rdma::shm {
namespace {

/// All anonymous kernel files (eventfd, epoll, timerfd…) share one inode, and of these only an eventfd takes a write of 8 bytes.
bool is_anonymous_file(int fd) noexcept {
  static const struct stat reference = [] {
    struct stat st {};
    const long probe = sys::call(SYS_eventfd2, 0, EFD_CLOEXEC);
    if (probe >= 0) {
      sys::call(SYS_fstat, probe, sys::arg(&st));
      sys::call(SYS_close, probe);
    }
    return st;
  }();
  struct stat st {};
  return sys::call(SYS_fstat, fd, sys::arg(&st)) == 0 && st.st_dev == reference.st_dev && st.st_ino == reference.st_ino &&
         st.st_mode == reference.st_mode;
}

/// Says exactly what the descriptor is; needs /proc.
bool is_eventfd_by_name(int fd) noexcept {
  char path[32] = "/proc/self/fd/";
  char digits[12];
  int n = 0;
  for (int v = fd; v > 0 || n == 0; v /= 10) digits[n++] = static_cast<char>('0' + v % 10);
  char* out = path + std::strlen(path);
  while (n > 0) *out++ = digits[--n];
  *out = 0;
  char target[64] = {};
  const long length = sys::call(SYS_readlinkat, AT_FDCWD, sys::arg(path), sys::arg(target), sizeof target - 1);
  return length > 0 && std::strcmp(target, "anon_inode:[eventfd]") == 0;
}

void write_eventfd(int fd) noexcept {
  // What remains of the danger that the program closed our number and opened a file of its own there: between the check and the
  // write, and when its file is an eventfd too (which then counts one more).
  if (!is_anonymous_file(fd)) return;
  const long flags = sys::call(SYS_fcntl, fd, F_GETFL);
  if (flags < 0 || (flags & O_NONBLOCK) == 0) return;
  const std::uint64_t one = 1;
  sys::call(SYS_write, fd, sys::arg(&one), sizeof one);
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

OwnBell::~OwnBell() {
  if (fd_ >= 0) sys::call(SYS_close, fd_);
}

int OwnBell::open() noexcept {
  const long fd = sys::call(SYS_eventfd2, 0, EFD_CLOEXEC | EFD_NONBLOCK);
  if (fd < 0) return static_cast<int>(fd);
  fd_ = move_high(static_cast<int>(fd));
  return 0;
}

void OwnBell::renew_in_child() noexcept {
  const long fd = sys::call(SYS_eventfd2, 0, EFD_CLOEXEC | EFD_NONBLOCK);
  if (fd < 0) {
    sys::call(SYS_close, fd_);
    fd_ = -1;
    return;
  }
  if (fd_ < 0) {
    fd_ = move_high(static_cast<int>(fd));
    return;
  }
  sys::call(SYS_dup3, fd, fd_, O_CLOEXEC);
  sys::call(SYS_close, fd);
}

void OwnBell::ring() const noexcept {
  if (fd_ >= 0) write_eventfd(fd_);
}

PeerBell::~PeerBell() {
  if (fd_ >= 0) sys::call(SYS_close, fd_);
}

bool PeerBell::adopt_eventfd(int fd) noexcept {
  if (fd < 0) return false;
  if (!is_anonymous_file(fd) || !is_eventfd_by_name(fd)) {
    sys::call(SYS_close, fd);
    return false;
  }
  fd_ = move_high(fd);
  return true;
}

void PeerBell::ring() const noexcept {
  if (own_ != nullptr) {
    own_->ring();
  } else if (fd_ >= 0) {
    write_eventfd(fd_);
  } else if (socket_ >= 0) {
    // A full socket means that rings are waiting there already.
    sys::call(SYS_sendto, socket_, sys::arg(frame_.data()), static_cast<long>(frame_.size()), MSG_DONTWAIT | MSG_NOSIGNAL);
  }
}

}  // namespace rdma::shm
