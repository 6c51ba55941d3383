// Which system calls give the caller other credentials: the kernel makes a new object of them even where nothing in it changes.
#pragma once

#include <linux/keyctl.h>
#include <sched.h>
#include <sys/prctl.h>
#include <sys/syscall.h>

#include <array>

namespace preload {

using SyscallArgs = std::array<long, 6>;

/// A keyring of the thread's or process's own, which is made at its first mention and hangs at the credentials.
inline bool is_own_keyring(long id) noexcept {
  const auto key = static_cast<int>(id);
  return key == KEY_SPEC_THREAD_KEYRING || key == KEY_SPEC_PROCESS_KEYRING || key == KEY_SPEC_SESSION_KEYRING;
}

inline bool changes_credentials(long number, const SyscallArgs& a) noexcept {
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
    case SYS_landlock_restrict_self:
      return true;
    case SYS_unshare:
      return (a[0] & CLONE_NEWUSER) != 0;
    case SYS_setns:  // 0: of whatever kind the descriptor is
      return a[1] == 0 || (a[1] & CLONE_NEWUSER) != 0;
    case SYS_add_key:
      return is_own_keyring(a[4]);
    case SYS_request_key:
      return is_own_keyring(a[3]);
    case SYS_keyctl:
      return a[0] == KEYCTL_JOIN_SESSION_KEYRING || a[0] == KEYCTL_SET_REQKEY_KEYRING ||
             (a[0] == KEYCTL_GET_KEYRING_ID && is_own_keyring(a[1]));
    case SYS_prctl:
      return a[0] == PR_SET_KEEPCAPS || a[0] == PR_CAPBSET_DROP || a[0] == PR_SET_SECUREBITS || a[0] == PR_CAP_AMBIENT;
    default:
      return false;
  }
}

}  // namespace preload
