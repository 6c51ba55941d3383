#include "preload/libc.hpp"

#include <dlfcn.h>
#include <pthread.h>

#include <atomic>
#include <cerrno>
#include <cstdarg>
#include <type_traits>

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

template <class T>
long word(T value) noexcept {
  if constexpr (std::is_pointer_v<T>)
    return sys::arg(value);
  else
    return static_cast<long>(value);
}

/// Puts the system call `kNumber` into `slot`: for functions that pass their arguments on as they are.
template <long kNumber, class R, bool kNoexcept, class... A>
constexpr void raw(R (*&slot)(A...) noexcept(kNoexcept)) noexcept {
  slot = [](A... args) noexcept -> R { return finish<R>(sys::call(kNumber, word(args)...)); };
}

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
int raw_prctl(int option, ...) {
  va_list args;
  va_start(args, option);
  long a[4];
  for (long& each : a) each = va_arg(args, long);
  va_end(args);
  return finish<int>(sys::call(SYS_prctl, option, a[0], a[1], a[2], a[3]));
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

// To make that system call takes what only libc has: the way back from a handler.
int no_sigaction(int, const struct sigaction*, struct sigaction*) noexcept { return finish<int>(-ENOSYS); }

constexpr Libc make_raw() noexcept {
  Libc table{};
  raw<SYS_read>(table.read);
  raw<SYS_write>(table.write);
  raw<SYS_readv>(table.readv);
  raw<SYS_writev>(table.writev);
  table.recv = raw_recv;
  table.send = raw_send;
  raw<SYS_recvfrom>(table.recvfrom);
  raw<SYS_sendto>(table.sendto);
  raw<SYS_recvmsg>(table.recvmsg);
  raw<SYS_sendmsg>(table.sendmsg);
  raw<SYS_sendfile>(table.sendfile);
  raw<SYS_accept4>(table.accept4);
  raw<SYS_accept>(table.accept);
  raw<SYS_connect>(table.connect);
  raw<SYS_socket>(table.socket);
  raw<SYS_shutdown>(table.shutdown);
  raw<SYS_setsockopt>(table.setsockopt);
  raw<SYS_getsockopt>(table.getsockopt);
  raw<SYS_close>(table.close);
  raw<SYS_dup>(table.dup);
  raw<SYS_dup2>(table.dup2);
  raw<SYS_dup3>(table.dup3);
  table.fcntl = raw_fcntl;
  table.ioctl = raw_ioctl;
  raw<SYS_poll>(table.poll);
  table.ppoll = raw_ppoll;
  raw<SYS_select>(table.select);
  table.pselect = raw_pselect;
  raw<SYS_epoll_create1>(table.epoll_create1);
  raw<SYS_epoll_ctl>(table.epoll_ctl);
  raw<SYS_epoll_wait>(table.epoll_wait);
  table.epoll_pwait = raw_epoll_pwait;
  raw<SYS_close_range>(table.close_range);
  raw<SYS_execve>(table.execve);
  table.sigaction = no_sigaction;
  raw<SYS_setuid>(table.setuid);
  raw<SYS_setgid>(table.setgid);
  raw<SYS_setreuid>(table.setreuid);
  raw<SYS_setregid>(table.setregid);
  raw<SYS_setresuid>(table.setresuid);
  raw<SYS_setresgid>(table.setresgid);
  raw<SYS_setgroups>(table.setgroups);
  raw<SYS_setfsuid>(table.setfsuid);
  raw<SYS_setfsgid>(table.setfsgid);
  raw<SYS_capset>(table.capset);
  table.prctl = raw_prctl;
  raw<SYS_unshare>(table.unshare);
  raw<SYS_setns>(table.setns);
  return table;
}

template <class F>
void take(F& slot, const char* name) noexcept {
  if (void* real = dlsym(RTLD_NEXT, name)) slot = reinterpret_cast<F>(real);
}

enum class State : int { unresolved, resolving, resolved };
std::atomic<State> state{State::unresolved};
constinit const Libc kRawTable = make_raw();  // in place before anything of ours runs
Libc real_table;

void resolve() noexcept {
  Libc t = kRawTable;
  take(t.read, "read");
  take(t.write, "write");
  take(t.readv, "readv");
  take(t.writev, "writev");
  take(t.recv, "recv");
  take(t.send, "send");
  take(t.recvfrom, "recvfrom");
  take(t.sendto, "sendto");
  take(t.recvmsg, "recvmsg");
  take(t.sendmsg, "sendmsg");
  take(t.sendfile, "sendfile");
  take(t.accept4, "accept4");
  take(t.accept, "accept");
  take(t.connect, "connect");
  take(t.socket, "socket");
  take(t.shutdown, "shutdown");
  take(t.setsockopt, "setsockopt");
  take(t.getsockopt, "getsockopt");
  take(t.close, "close");
  take(t.dup, "dup");
  take(t.dup2, "dup2");
  take(t.dup3, "dup3");
  take(t.fcntl, "fcntl");
  take(t.ioctl, "ioctl");
  take(t.poll, "poll");
  take(t.ppoll, "ppoll");
  take(t.select, "select");
  take(t.pselect, "pselect");
  take(t.epoll_create1, "epoll_create1");
  take(t.epoll_ctl, "epoll_ctl");
  take(t.epoll_wait, "epoll_wait");
  take(t.epoll_pwait, "epoll_pwait");
  take(t.close_range, "close_range");
  take(t.execve, "execve");
  take(t.execvpe, "execvpe");
  take(t.fexecve, "fexecve");
  take(t.posix_spawn, "posix_spawn");
  take(t.posix_spawnp, "posix_spawnp");
  take(t.posix_spawn_file_actions_adddup2, "posix_spawn_file_actions_adddup2");
  take(t.execveat, "execveat");
  take(t.system, "system");
  take(t.popen, "popen");
  take(t.fclose, "fclose");
  take(t.freopen, "freopen");
  take(t.sigaction, "sigaction");
  take(t.setuid, "setuid");
  take(t.setgid, "setgid");
  take(t.seteuid, "seteuid");
  take(t.setegid, "setegid");
  take(t.setreuid, "setreuid");
  take(t.setregid, "setregid");
  take(t.setresuid, "setresuid");
  take(t.setresgid, "setresgid");
  take(t.setgroups, "setgroups");
  take(t.initgroups, "initgroups");
  take(t.setfsuid, "setfsuid");
  take(t.setfsgid, "setfsgid");
  take(t.capset, "capset");
  take(t.prctl, "prctl");
  take(t.unshare, "unshare");
  take(t.setns, "setns");
  real_table = t;
}

}  // namespace

const Libc& libc() noexcept {
  if (state.load(std::memory_order_acquire) == State::resolved) [[likely]]
    return real_table;
  State expected = State::unresolved;
  if (state.compare_exchange_strong(expected, State::resolving)) {
    const int saved = errno;
    resolve();
    state.store(State::resolved, std::memory_order_release);
    errno = saved;
    return real_table;
  }
  // dlsym called us back, or another thread is at it: plain system calls meanwhile.
  return state.load(std::memory_order_acquire) == State::resolved ? real_table : kRawTable;
}

void* next_symbol(const char* name) noexcept { return dlsym(RTLD_NEXT, name); }

}  // namespace preload
