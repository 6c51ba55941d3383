// syscall(): programs and run times that make their calls by number. What could touch a stream of ours goes the way of the call's
// name; the rest is the kernel's.
#include <pthread.h>
#include <sys/syscall.h>
#include <sys/uio.h>

#include <algorithm>
#include <array>
#include <cstdarg>
#include <optional>

#include "preload/credentials.hpp"
#include "preload/dispatch.hpp"
#include "preload/runtime.hpp"
#include "rdma_core/base/sys.hpp"

extern "C" int close_range(unsigned first, unsigned last, int flags) noexcept;

namespace {

template <class T>
T* pointer(long word) noexcept {
  return reinterpret_cast<T*>(word);
}

struct MaskAndSize {  // the sixth argument of pselect6
  const sigset_t* mask;
  size_t size;
};

constexpr auto kNamed = [] {
  std::array numbers{
      long{SYS_read},        long{SYS_write},      long{SYS_readv},        long{SYS_writev},        long{SYS_recvfrom},
      long{SYS_sendto},      long{SYS_recvmsg},    long{SYS_sendmsg},      long{SYS_recvmmsg},      long{SYS_sendmmsg},
      long{SYS_sendfile},    long{SYS_splice},     long{SYS_socket},       long{SYS_connect},       long{SYS_accept},
      long{SYS_accept4},     long{SYS_shutdown},   long{SYS_setsockopt},   long{SYS_getsockopt},    long{SYS_close},
      long{SYS_close_range}, long{SYS_dup},        long{SYS_dup2},         long{SYS_dup3},          long{SYS_fcntl},
      long{SYS_ioctl},       long{SYS_poll},       long{SYS_ppoll},        long{SYS_select},        long{SYS_pselect6},
      long{SYS_preadv2},     long{SYS_pwritev2},   long{SYS_epoll_create}, long{SYS_epoll_create1}, long{SYS_epoll_ctl},
      long{SYS_epoll_wait},  long{SYS_epoll_pwait}};
  std::sort(numbers.begin(), numbers.end());
  return numbers;
}();

long call_by_name(long number, const long (&a)[6]) {
  const auto fd = static_cast<int>(a[0]);
  const auto flags = static_cast<int>(a[3]);
  const auto size = static_cast<size_t>(a[2]);
  switch (number) {
    case SYS_read:
      return read(fd, pointer<void>(a[1]), size);
    case SYS_write:
      return write(fd, pointer<void>(a[1]), size);
    case SYS_readv:
      return readv(fd, pointer<iovec>(a[1]), static_cast<int>(a[2]));
    case SYS_writev:
      return writev(fd, pointer<iovec>(a[1]), static_cast<int>(a[2]));
    case SYS_recvfrom:
      return recvfrom(fd, pointer<void>(a[1]), size, flags, pointer<sockaddr>(a[4]), pointer<socklen_t>(a[5]));
    case SYS_sendto:
      return sendto(fd, pointer<void>(a[1]), size, flags, pointer<sockaddr>(a[4]), static_cast<socklen_t>(a[5]));
    case SYS_recvmsg:
      return recvmsg(fd, pointer<msghdr>(a[1]), static_cast<int>(a[2]));
    case SYS_sendmsg:
      return sendmsg(fd, pointer<msghdr>(a[1]), static_cast<int>(a[2]));
    case SYS_recvmmsg:
      return recvmmsg(fd, pointer<mmsghdr>(a[1]), static_cast<unsigned>(a[2]), flags, pointer<timespec>(a[4]));
    case SYS_sendmmsg:
      return sendmmsg(fd, pointer<mmsghdr>(a[1]), static_cast<unsigned>(a[2]), flags);
    case SYS_preadv2:  // the upper half of the place counts for nothing here
      return preadv2(fd, pointer<iovec>(a[1]), static_cast<int>(a[2]), a[3], static_cast<int>(a[5]));
    case SYS_pwritev2:
      return pwritev2(fd, pointer<iovec>(a[1]), static_cast<int>(a[2]), a[3], static_cast<int>(a[5]));
    case SYS_sendfile:
      return sendfile(fd, static_cast<int>(a[1]), pointer<off_t>(a[2]), static_cast<size_t>(a[3]));
    case SYS_splice:
      return splice(fd, pointer<off64_t>(a[1]), static_cast<int>(a[2]), pointer<off64_t>(a[3]), static_cast<size_t>(a[4]),
                    static_cast<unsigned>(a[5]));
    case SYS_socket:
      return socket(fd, static_cast<int>(a[1]), static_cast<int>(a[2]));
    case SYS_connect:
      return connect(fd, pointer<sockaddr>(a[1]), static_cast<socklen_t>(a[2]));
    case SYS_accept:
      return accept(fd, pointer<sockaddr>(a[1]), pointer<socklen_t>(a[2]));
    case SYS_accept4:
      return accept4(fd, pointer<sockaddr>(a[1]), pointer<socklen_t>(a[2]), flags);
    case SYS_shutdown:
      return shutdown(fd, static_cast<int>(a[1]));
    case SYS_setsockopt:
      return setsockopt(fd, static_cast<int>(a[1]), static_cast<int>(a[2]), pointer<void>(a[3]), static_cast<socklen_t>(a[4]));
    case SYS_getsockopt:
      return getsockopt(fd, static_cast<int>(a[1]), static_cast<int>(a[2]), pointer<void>(a[3]), pointer<socklen_t>(a[4]));
    case SYS_close:
      return close(fd);
    case SYS_close_range:
      return close_range(static_cast<unsigned>(a[0]), static_cast<unsigned>(a[1]), static_cast<int>(a[2]));
    case SYS_dup:
      return dup(fd);
    case SYS_dup2:
      return dup2(fd, static_cast<int>(a[1]));
    case SYS_dup3:
      return dup3(fd, static_cast<int>(a[1]), static_cast<int>(a[2]));
    case SYS_fcntl:
      return fcntl(fd, static_cast<int>(a[1]), a[2]);
    case SYS_ioctl:
      return ioctl(fd, static_cast<unsigned long>(a[1]), a[2]);
    case SYS_poll:
      return poll(pointer<pollfd>(a[0]), static_cast<nfds_t>(a[1]), static_cast<int>(a[2]));
    case SYS_ppoll:
      return ppoll(pointer<pollfd>(a[0]), static_cast<nfds_t>(a[1]), pointer<timespec>(a[2]), pointer<sigset_t>(a[3]));
    case SYS_select:
      return select(fd, pointer<fd_set>(a[1]), pointer<fd_set>(a[2]), pointer<fd_set>(a[3]), pointer<timeval>(a[4]));
    case SYS_pselect6: {
      const auto* mask = pointer<MaskAndSize>(a[5]);
      return pselect(fd, pointer<fd_set>(a[1]), pointer<fd_set>(a[2]), pointer<fd_set>(a[3]), pointer<timespec>(a[4]),
                     mask != nullptr ? mask->mask : nullptr);
    }
    case SYS_epoll_create:
      return epoll_create(fd);
    case SYS_epoll_create1:
      return epoll_create1(fd);
    case SYS_epoll_ctl:
      return epoll_ctl(fd, static_cast<int>(a[1]), static_cast<int>(a[2]), pointer<epoll_event>(a[3]));
    case SYS_epoll_wait:
      return epoll_wait(fd, pointer<epoll_event>(a[1]), static_cast<int>(a[2]), static_cast<int>(a[3]));
    case SYS_epoll_pwait:
      return epoll_pwait(fd, pointer<epoll_event>(a[1]), static_cast<int>(a[2]), static_cast<int>(a[3]), pointer<sigset_t>(a[4]));
    default:
      errno = ENOSYS;
      return -1;
  }
}

}  // namespace

SDP_EXPORT long syscall(long number, ...) noexcept {
  va_list args;
  va_start(args, number);
  long a[6];
  for (long& each : a) each = va_arg(args, long);
  va_end(args);
  if (std::binary_search(kNamed.begin(), kNamed.end(), number)) {
    // By number they are no cancellation points.
    int state = PTHREAD_CANCEL_ENABLE;
    pthread_setcancelstate(PTHREAD_CANCEL_DISABLE, &state);
    const long result = call_by_name(number, a);
    pthread_setcancelstate(state, nullptr);
    return result;
  }
  std::optional<sdp::engine::CredentialsChange> change;
  if (preload::changes_credentials(number, {a[0], a[1], a[2], a[3], a[4], a[5]})) change.emplace();
  if (number == SYS_io_uring_setup || number == SYS_io_uring_enter || number == SYS_io_uring_register) preload::before_ring();
  if (number == SYS_exit_group) preload::before_quick_end();
  std::optional<preload::Exec> attempt;
  if (number == SYS_execve) attempt.emplace(pointer<const char>(a[0]));
  if (number == SYS_execveat) attempt.emplace(nullptr);
  const long result = rdma::sys::call(number, a[0], a[1], a[2], a[3], a[4], a[5]);
  if (result < 0 && result > -4096) {
    errno = static_cast<int>(-result);
    return -1;
  }
  return result;
}
