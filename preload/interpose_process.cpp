// Programs that are started: what they would inherit goes back to TCP first, for they may not run the library. Take-downs are
// stores only, so that this is right in a vfork child as well; nothing else is touched there.
#include <spawn.h>
#include <unistd.h>

#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <vector>

#include "preload/dispatch.hpp"
#include "preload/runtime.hpp"

namespace {
template <class F>
F next(const char* name) noexcept {
  return reinterpret_cast<F>(preload::next_symbol(name));
}
}  // namespace

SDP_EXPORT int execve(const char* path, char* const argv[], char* const envp[]) noexcept {
  preload::before_exec();
  return next<decltype(&::execve)>("execve")(path, argv, envp);
}
SDP_EXPORT int execv(const char* path, char* const argv[]) noexcept {
  preload::before_exec();
  return next<decltype(&::execv)>("execv")(path, argv);
}
SDP_EXPORT int execvp(const char* file, char* const argv[]) noexcept {
  preload::before_exec();
  return next<decltype(&::execvp)>("execvp")(file, argv);
}
SDP_EXPORT int execvpe(const char* file, char* const argv[], char* const envp[]) noexcept {
  preload::before_exec();
  return next<decltype(&::execvpe)>("execvpe")(file, argv, envp);
}
SDP_EXPORT int fexecve(int fd, char* const argv[], char* const envp[]) noexcept {
  preload::before_exec();
  return next<decltype(&::fexecve)>("fexecve")(fd, argv, envp);
}
SDP_EXPORT int posix_spawn(pid_t* pid, const char* path, const posix_spawn_file_actions_t* actions, const posix_spawnattr_t* attr,
                           char* const argv[], char* const envp[]) {
  preload::before_exec();
  return next<decltype(&::posix_spawn)>("posix_spawn")(pid, path, actions, attr, argv, envp);
}
SDP_EXPORT int posix_spawnp(pid_t* pid, const char* file, const posix_spawn_file_actions_t* actions, const posix_spawnattr_t* attr,
                            char* const argv[], char* const envp[]) {
  preload::before_exec();
  return next<decltype(&::posix_spawnp)>("posix_spawnp")(pid, file, actions, attr, argv, envp);
}
SDP_EXPORT int system(const char* command) {
  preload::before_exec();
  return next<decltype(&::system)>("system")(command);
}
SDP_EXPORT FILE* popen(const char* command, const char* mode) {
  preload::before_exec();
  return next<decltype(&::popen)>("popen")(command, mode);
}
