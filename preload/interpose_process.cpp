// Programs that are started: what they would inherit goes back to TCP first, for they may not run the library. Take-downs are
// stores only, so that this is right in a vfork child as well; nothing else is touched there. Lanes of RDMA devices die with an
// exec of their process, which waits for them.
#include <alloca.h>
#include <spawn.h>
#include <unistd.h>

#include <cstdarg>
#include <cstdio>
#include <cstdlib>

#include "preload/dispatch.hpp"
#include "preload/runtime.hpp"
#include "rdma_core/base/sys.hpp"

using preload::before_spawn;
using preload::Exec;
using preload::libc;

SDP_EXPORT int execve(const char* path, char* const argv[], char* const envp[]) noexcept {
  const Exec attempt(path);
  return libc().execve(path, argv, envp);
}
SDP_EXPORT int execv(const char* path, char* const argv[]) noexcept {
  const Exec attempt(path);
  return libc().execve(path, argv, environ);
}
SDP_EXPORT int execvp(const char* file, char* const argv[]) noexcept {
  const Exec attempt(nullptr);
  return libc().execvpe(file, argv, environ);
}
SDP_EXPORT int execvpe(const char* file, char* const argv[], char* const envp[]) noexcept {
  const Exec attempt(nullptr);
  return libc().execvpe(file, argv, envp);
}
SDP_EXPORT int fexecve(int fd, char* const argv[], char* const envp[]) noexcept {
  const Exec attempt(nullptr);
  return libc().fexecve(fd, argv, envp);
}
SDP_EXPORT int execveat(int folder, const char* path, char* const argv[], char* const envp[], int flags) noexcept {
  const Exec attempt(nullptr);
  return libc().execveat(folder, path, argv, envp, flags);
}

// libc's own forms with a list reach none of the names above. The list lies on the stack, for malloc() may be in use: by a vfork
// child's parent.
namespace {
std::size_t list_length(va_list args) noexcept {
  va_list copy;
  va_copy(copy, args);
  std::size_t n = 1;
  while (va_arg(copy, char*) != nullptr) ++n;
  va_end(copy);
  return n;
}
/// Up to and with the null; `args` is then at what follows it.
void list_into(char** argv, const char* first, va_list& args, std::size_t count) noexcept {
  argv[0] = const_cast<char*>(first);
  for (std::size_t i = 1; i <= count; ++i) argv[i] = va_arg(args, char*);
}
}  // namespace

SDP_EXPORT int execl(const char* path, const char* arg, ...) noexcept {
  va_list args;
  va_start(args, arg);
  const std::size_t count = list_length(args);
  auto** argv = static_cast<char**>(alloca((count + 1) * sizeof(char*)));
  list_into(argv, arg, args, count);
  va_end(args);
  return execve(path, argv, environ);
}
SDP_EXPORT int execle(const char* path, const char* arg, ...) noexcept {
  va_list args;
  va_start(args, arg);
  const std::size_t count = list_length(args);
  auto** argv = static_cast<char**>(alloca((count + 1) * sizeof(char*)));
  list_into(argv, arg, args, count);
  char* const* envp = va_arg(args, char* const*);
  va_end(args);
  return execve(path, argv, envp);
}
SDP_EXPORT int execlp(const char* file, const char* arg, ...) noexcept {
  va_list args;
  va_start(args, arg);
  const std::size_t count = list_length(args);
  auto** argv = static_cast<char**>(alloca((count + 1) * sizeof(char*)));
  list_into(argv, arg, args, count);
  va_end(args);
  return execvpe(file, argv, environ);
}

// --- ends without exit handlers. The kernel sends on what TCP has taken; what RDMA devices have taken dies with the process.
SDP_EXPORT void _exit(int status) {
  preload::before_quick_end();
  for (;;) rdma::sys::call(SYS_exit_group, status);
}
SDP_EXPORT void _Exit(int status) noexcept { _exit(status); }

SDP_EXPORT int posix_spawn(pid_t* pid, const char* path, const posix_spawn_file_actions_t* actions, const posix_spawnattr_t* attr,
                           char* const argv[], char* const envp[]) {
  before_spawn();
  return libc().posix_spawn(pid, path, actions, attr, argv, envp);
}
SDP_EXPORT int posix_spawnp(pid_t* pid, const char* file, const posix_spawn_file_actions_t* actions, const posix_spawnattr_t* attr,
                            char* const argv[], char* const envp[]) {
  before_spawn();
  return libc().posix_spawnp(pid, file, actions, attr, argv, envp);
}
SDP_EXPORT int posix_spawn_file_actions_adddup2(posix_spawn_file_actions_t* actions, int fd, int to) noexcept {
  preload::leave_lane(fd, sdp::LaneReason::exec);  // `to` is for the program to be run; nothing tells us at that time
  return libc().posix_spawn_file_actions_adddup2(actions, fd, to);
}
SDP_EXPORT int system(const char* command) {
  before_spawn();
  return libc().system(command);
}
SDP_EXPORT FILE* popen(const char* command, const char* mode) {
  before_spawn();
  return libc().popen(command, mode);
}
SDP_EXPORT FILE* _IO_popen(const char* command, const char* mode) { return popen(command, mode); }
