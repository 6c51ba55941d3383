// Calls that give the process, or one thread of it, other credentials: lanes of RDMA devices go back to TCP first, for the kernel
// takes nothing more from whoever opened them. These calls may be made in a signal handler and in a vfork child.
#include <grp.h>
#include <sched.h>
#include <sys/fsuid.h>
#include <sys/prctl.h>
#include <unistd.h>

#include <cstdarg>

#include "preload/credentials.hpp"
#include "preload/dispatch.hpp"
#include "sdp/engine.hpp"

using preload::libc;

namespace {
template <class Result, class... Args>
Result changing(Result (*call)(Args...) noexcept, Args... args) noexcept {
  const sdp::engine::CredentialsChange change;
  return call(args...);
}
}  // namespace

SDP_EXPORT int setuid(uid_t id) noexcept { return changing(libc().setuid, id); }
SDP_EXPORT int setgid(gid_t id) noexcept { return changing(libc().setgid, id); }
SDP_EXPORT int seteuid(uid_t id) noexcept { return changing(libc().seteuid, id); }
SDP_EXPORT int setegid(gid_t id) noexcept { return changing(libc().setegid, id); }
SDP_EXPORT int setreuid(uid_t real, uid_t effective) noexcept { return changing(libc().setreuid, real, effective); }
SDP_EXPORT int setregid(gid_t real, gid_t effective) noexcept { return changing(libc().setregid, real, effective); }
SDP_EXPORT int setresuid(uid_t real, uid_t effective, uid_t saved) noexcept {
  return changing(libc().setresuid, real, effective, saved);
}
SDP_EXPORT int setresgid(gid_t real, gid_t effective, gid_t saved) noexcept {
  return changing(libc().setresgid, real, effective, saved);
}
SDP_EXPORT int setgroups(size_t count, const gid_t* groups) noexcept { return changing(libc().setgroups, count, groups); }
SDP_EXPORT int initgroups(const char* user, gid_t group) {
  const sdp::engine::CredentialsChange change;
  return libc().initgroups(user, group);
}
SDP_EXPORT int setfsuid(uid_t id) noexcept { return changing(libc().setfsuid, id); }
SDP_EXPORT int setfsgid(gid_t id) noexcept { return changing(libc().setfsgid, id); }

SDP_EXPORT int capset(void* header, const void* data) noexcept {
  const sdp::engine::CredentialsChange change;
  return libc().capset(header, data);
}
SDP_EXPORT int prctl(int option, ...) noexcept {
  va_list args;
  va_start(args, option);
  unsigned long a[4];
  for (unsigned long& each : a) each = va_arg(args, unsigned long);
  va_end(args);
  const auto call = [&] { return libc().prctl(option, a[0], a[1], a[2], a[3]); };
  if (!preload::changes_credentials(SYS_prctl, {option})) return call();
  const sdp::engine::CredentialsChange change;
  return call();
}
SDP_EXPORT int unshare(int flags) noexcept {
  if (!preload::changes_credentials(SYS_unshare, {flags})) return libc().unshare(flags);
  return changing(libc().unshare, flags);
}
SDP_EXPORT int setns(int fd, int type) noexcept {
  if (!preload::changes_credentials(SYS_setns, {fd, type})) return libc().setns(fd, type);
  return changing(libc().setns, fd, type);
}
