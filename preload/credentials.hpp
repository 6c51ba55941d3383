// Which system calls give the caller other credentials: the kernel makes a new object of them even where nothing in it changes.
#pragma once

#include <linux/keyctl.h>
#include <sched.h>
#include <sys/prctl.h>
#include <sys/syscall.h>

namespace preload {

/// `first`: the call's first argument.
inline bool changes_credentials(long number, long first) noexcept {
  switch (number) {
    case SYS_setuid:
    case SYS_setgid:
    case SYS_setreuid:
    case SYS_setregid:
    case SYS_setresuid:
    case SYS_setresgid:
    case SYS_setgroups:
    case SYS_setfsuid:
    case SYS_setfsgid:
    case SYS_capset:
    case SYS_setns:
    case SYS_landlock_restrict_self:
      return true;
    case SYS_unshare:
      return (first & CLONE_NEWUSER) != 0;
    case SYS_keyctl:
      return first == KEYCTL_JOIN_SESSION_KEYRING;
    case SYS_prctl:
      return first == PR_SET_KEEPCAPS || first == PR_CAPBSET_DROP || first == PR_SET_SECUREBITS || first == PR_CAP_AMBIENT;
    default:
      return false;
  }
}

}  // namespace preload
