#include "preload/libc.hpp"

#include <dlfcn.h>
#include <pthread.h>

#include <atomic>
#include <cerrno>
#include <cstdarg>

#include "rdma_core/base/sys.hpp"

namespace preload {

namespace sys = rdma::sys;

namespace {

template <class T>
T finish(long r) noexcept {
  if (r < 0 && r > -4096) {
    errno = static_cast<int>(-r);
    return static_cast<T>(-1);
  }
  return static_cast<T>(r);
}

template <class F>
struct Raw;
/// A system call with the signature of a libc function.
template <class R, class... A>
struct Raw<R (*)(A...)> {
  template <long kNumber>
  static R call(A... args) {
    return finish<R>(sys::call(kNumber, (long)args...));
  }
};
template <class R, class... A>
struct Raw<R (*)(A..., ...)> {};

int raw_fcntl(int fd, int cmd, ...) {
  va_list args;
  va_start(args, cmd);
  const long arg = va_arg(args, long);
  va_end(args);
  return finish<int>(sys::call(SYS_fcntl, fd, cmd, arg));
}
int raw_ioctl(int fd, unsigned long request, ...) {
  va_list args;
  va_start(args, request);
  const long arg = va_arg(args, long);
  va_end(args);
  return finish<int>(sys::call(SYS_ioctl, fd, static_cast<long>(request), arg));
}
int raw_ppoll(pollfd* fds, nfds_t n, const timespec* timeout, const sigset_t* mask) {
  timespec copy{};
  if (timeout != nullptr) copy = *timeout;
  return finish<int>(
      sys::call(SYS_ppoll, sys::arg(fds), static_cast<long>(n), timeout != nullptr ? sys::arg(&copy) : 0, sys::arg(mask), 8));
}
int raw_pselect(int n, fd_set* r, fd_set* w, fd_set* e, const timespec* timeout, const sigset_t* mask) {
  timespec copy{};
  if (timeout != nullptr) copy = *timeout;
  struct {
    const sigset_t* set;
    size_t size;
  } data{mask, 8};
  return finish<int>(
      sys::call(SYS_pselect6, n, sys::arg(r), sys::arg(w), sys::arg(e), timeout != nullptr ? sys::arg(&copy) : 0, sys::arg(&data)));
}
ssize_t raw_recv(int fd, void* buf, size_t len, int flags) {
  return finish<ssize_t>(sys::call(SYS_recvfrom, fd, sys::arg(buf), static_cast<long>(len), flags));
}
ssize_t raw_send(int fd, const void* buf, size_t len, int flags) {
  return finish<ssize_t>(sys::call(SYS_sendto, fd, sys::arg(buf), static_cast<long>(len), flags));
}
int raw_epoll_pwait(int fd, epoll_event* events, int max, int timeout, const sigset_t* mask) {
  return finish<int>(sys::call(SYS_epoll_pwait, fd, sys::arg(events), max, timeout, sys::arg(mask), 8));
}

#define SDP_RAW(name, number) table.name = &Raw<decltype(Libc::name)>::call<number>

Libc make_raw() noexcept {
  Libc table{};
  SDP_RAW(read, SYS_read);
  SDP_RAW(write, SYS_write);
  SDP_RAW(readv, SYS_readv);
  SDP_RAW(writev, SYS_writev);
  SDP_RAW(recvmsg, SYS_recvmsg);
  SDP_RAW(sendmsg, SYS_sendmsg);
  SDP_RAW(sendfile, SYS_sendfile);
  SDP_RAW(accept4, SYS_accept4);
  SDP_RAW(accept, SYS_accept);
  SDP_RAW(connect, SYS_connect);
  SDP_RAW(close, SYS_close);
  table.recv = raw_recv;
  table.send = raw_send;
  table.recvfrom = [](int fd, void* b, size_t l, int f, sockaddr* a, socklen_t* n) -> ssize_t {
    return finish<ssize_t>(sys::call(SYS_recvfrom, fd, sys::arg(b), static_cast<long>(l), f, sys::arg(a), sys::arg(n)));
  };
  table.sendto = [](int fd, const void* b, size_t l, int f, const sockaddr* a, socklen_t n) -> ssize_t {
    return finish<ssize_t>(sys::call(SYS_sendto, fd, sys::arg(b), static_cast<long>(l), f, sys::arg(a), n));
  };
  table.socket = [](int a, int b, int c) noexcept { return finish<int>(sys::call(SYS_socket, a, b, c)); };
  table.shutdown = [](int a, int b) noexcept { return finish<int>(sys::call(SYS_shutdown, a, b)); };
  table.setsockopt = [](int fd, int level, int name, const void* v, socklen_t n) noexcept {
    return finish<int>(sys::call(SYS_setsockopt, fd, level, name, sys::arg(v), n));
  };
  table.dup = [](int fd) noexcept { return finish<int>(sys::call(SYS_dup, fd)); };
  table.dup2 = [](int a, int b) noexcept { return finish<int>(sys::call(SYS_dup2, a, b)); };
  table.dup3 = [](int a, int b, int f) noexcept { return finish<int>(sys::call(SYS_dup3, a, b, f)); };
  table.fcntl = raw_fcntl;
  table.ioctl = raw_ioctl;
  table.poll = [](pollfd* f, nfds_t n, int t) { return finish<int>(sys::call(SYS_poll, sys::arg(f), static_cast<long>(n), t)); };
  table.ppoll = raw_ppoll;
  table.select = [](int n, fd_set* r, fd_set* w, fd_set* e, timeval* t) {
    return finish<int>(sys::call(SYS_select, n, sys::arg(r), sys::arg(w), sys::arg(e), sys::arg(t)));
  };
  table.pselect = raw_pselect;
  table.epoll_ctl = [](int a, int op, int b, epoll_event* e) noexcept {
    return finish<int>(sys::call(SYS_epoll_ctl, a, op, b, sys::arg(e)));
  };
  table.epoll_wait = [](int a, epoll_event* e, int m, int t) {
    return finish<int>(sys::call(SYS_epoll_wait, a, sys::arg(e), m, t));
  };
  table.epoll_pwait = raw_epoll_pwait;
  return table;
}
#undef SDP_RAW

template <class F>
void take(F& slot, const char* name) noexcept {
  if (void* real = dlsym(RTLD_NEXT, name)) slot = reinterpret_cast<F>(real);
}

enum class State : int { unresolved, resolving, resolved };
std::atomic<State> state{State::unresolved};
Libc raw_table;
Libc real_table;

void resolve() noexcept {
  Libc t = raw_table;
#define SDP_TAKE(name) take(t.name, #name)
  SDP_TAKE(read);
  SDP_TAKE(write);
  SDP_TAKE(readv);
  SDP_TAKE(writev);
  SDP_TAKE(recv);
  SDP_TAKE(send);
  SDP_TAKE(recvfrom);
  SDP_TAKE(sendto);
  SDP_TAKE(recvmsg);
  SDP_TAKE(sendmsg);
  SDP_TAKE(sendfile);
  SDP_TAKE(accept4);
  SDP_TAKE(accept);
  SDP_TAKE(connect);
  SDP_TAKE(socket);
  SDP_TAKE(shutdown);
  SDP_TAKE(setsockopt);
  SDP_TAKE(close);
  SDP_TAKE(dup);
  SDP_TAKE(dup2);
  SDP_TAKE(dup3);
  SDP_TAKE(fcntl);
  SDP_TAKE(ioctl);
  SDP_TAKE(poll);
  SDP_TAKE(ppoll);
  SDP_TAKE(select);
  SDP_TAKE(pselect);
  SDP_TAKE(epoll_ctl);
  SDP_TAKE(epoll_wait);
  SDP_TAKE(epoll_pwait);
#undef SDP_TAKE
  real_table = t;
}

}  // namespace

const Libc& libc() noexcept {
  if (state.load(std::memory_order_acquire) == State::resolved) [[likely]]
    return real_table;
  State expected = State::unresolved;
  if (state.compare_exchange_strong(expected, State::resolving)) {
    const int saved = errno;
    raw_table = make_raw();
    resolve();
    state.store(State::resolved, std::memory_order_release);
    errno = saved;
    return real_table;
  }
  // dlsym called us back, or another thread is at it: plain system calls meanwhile.
  if (raw_table.close == nullptr) raw_table = make_raw();
  return state.load(std::memory_order_acquire) == State::resolved ? real_table : raw_table;
}

void* next_symbol(const char* name) noexcept { return dlsym(RTLD_NEXT, name); }

}  // namespace preload
