// The program's actions for SIGSEGV and SIGBUS, while the kernel has ours (preload/faults.hpp).
//
// sigset() and sigignore(), and programs that make the system call themselves, replace ours: then a bad address ends the process
// as it does where nobody asks.
#include <pthread.h>
#include <signal.h>

#include <array>
#include <atomic>

#include "preload/dispatch.hpp"
#include "preload/faults.hpp"
#include "rdma_core/base/sys.hpp"
#include "rdma_core/base/user_memory.hpp"
#include "sdp/engine.hpp"

using preload::libc;
namespace sys = rdma::sys;

namespace {

using Handler = void (*)(int, siginfo_t*, void*);    // one that takes the number alone does not mind the rest
constexpr std::uintptr_t kDefault = 0, kIgnore = 1;  // SIG_DFL, SIG_IGN
std::uintptr_t handler_of(const struct sigaction& action) noexcept { return reinterpret_cast<std::uintptr_t>(action.sa_handler); }

/// What the program has set for one signal, of which the kernel knows the mask and the flags.
struct Theirs {
  const int number;
  struct sigaction action {};  ///< under `lock`, once it is taken
  std::atomic<std::uintptr_t> handler{kDefault};
  std::atomic<bool> once{false};  ///< SA_RESETHAND
};
std::array<Theirs, 2> theirs{Theirs{SIGSEGV}, Theirs{SIGBUS}};
std::atomic<bool> taken{false};  ///< set under `lock`
std::atomic_flag lock = ATOMIC_FLAG_INIT;

Theirs* find(int number) noexcept {
  for (Theirs& each : theirs)
    if (each.number == number) return &each;
  return nullptr;
}

/// Holds `lock`, with all signals blocked: a handler may set actions, too.
class Locked {
 public:
  Locked() noexcept {
    const sigset_t all = [] {
      sigset_t set;
      sigfillset(&set);
      return set;
    }();
    sys::call(SYS_rt_sigprocmask, SIG_SETMASK, sys::arg(&all), sys::arg(&before_), sizeof(std::uint64_t));
    while (lock.test_and_set(std::memory_order_acquire)) sys::call(SYS_sched_yield);
  }
  ~Locked() {
    lock.clear(std::memory_order_release);
    sys::call(SYS_rt_sigprocmask, SIG_SETMASK, sys::arg(&before_), 0, sizeof(std::uint64_t));
  }
  Locked(const Locked&) = delete;
  Locked& operator=(const Locked&) = delete;

 private:
  sigset_t before_{};
};

void set_kernels(int number, void (*handler)(int)) noexcept {
  struct sigaction action {};
  action.sa_handler = handler;
  (void)libc().sigaction(number, &action, nullptr);
}

void on_fault(int number, siginfo_t* info, void* context) {
  if (rdma::mend_fault(context)) return;
  Theirs& their = *find(number);
  const std::uintptr_t handler = their.handler.load(std::memory_order_acquire);
  const bool sent = info->si_code <= 0;  // by a process; else by an instruction, which is made again when we return
  if (handler == kIgnore && sent) return;
  if (handler == kIgnore || handler == kDefault) {
    set_kernels(number, SIG_DFL);
    if (sent) sys::call(SYS_tgkill, sys::call(SYS_getpid), sys::call(SYS_gettid), number);
    return;
  }
  if (their.once.exchange(false)) {
    const Locked locked;
    their.action.sa_handler = SIG_DFL;
    their.handler.store(kDefault, std::memory_order_release);
  }
  reinterpret_cast<Handler>(handler)(number, info, context);
}

/// Ours, delivered in the way that the program wants for its own; where it has none, in whatever way works.
int set_ours(Theirs& their, const struct sigaction& action) noexcept {
  struct sigaction ours = action;
  ours.sa_sigaction = on_fault;
  ours.sa_flags = SA_SIGINFO | (handler_of(action) > kIgnore ? action.sa_flags & ~SA_RESETHAND : SA_ONSTACK);
  // Before the kernel's, or a fault between the two would be taken for the one before.
  their.action = action;
  their.once.store((action.sa_flags & SA_RESETHAND) != 0, std::memory_order_relaxed);
  their.handler.store(handler_of(action), std::memory_order_release);
  return libc().sigaction(their.number, &ours, nullptr);
}

int act(int number, const struct sigaction* action, struct sigaction* before) noexcept {
  Theirs* const their = find(number);
  // A vfork child's actions are its own, our notes the parent's.
  if (their == nullptr || sdp::engine::in_vfork_child()) return libc().sigaction(number, action, before);
  struct sigaction wanted {};
  if (action != nullptr) wanted = *action;
  struct sigaction old {};
  int result = 0;
  {
    const Locked locked;
    if (!taken.load(std::memory_order_relaxed)) {
      result = libc().sigaction(number, action != nullptr ? &wanted : nullptr, &old);
    } else {
      old = their->action;
      if (action != nullptr) result = set_ours(*their, wanted);
    }
  }
  if (before != nullptr && result == 0) *before = old;
  return result;
}

sighandler_t act_simply(int number, sighandler_t handler, int flags) noexcept {
  struct sigaction action {
  }, before{};
  action.sa_handler = handler;
  action.sa_flags = flags;
  if ((flags & SA_NODEFER) == 0) sigaddset(&action.sa_mask, number);
  return act(number, &action, &before) == 0 ? before.sa_handler : SIG_ERR;
}

}  // namespace

void preload::take_faults() noexcept {
  if (taken.load(std::memory_order_acquire)) return;
  const Locked locked;
  if (taken.load(std::memory_order_relaxed)) return;
  for (Theirs& each : theirs) {
    struct sigaction action {};
    if (libc().sigaction(each.number, nullptr, &action) == 0) (void)set_ours(each, action);
  }
  taken.store(true, std::memory_order_release);
}

SDP_EXPORT int sigaction(int number, const struct sigaction* action, struct sigaction* before) noexcept {
  return act(number, action, before);
}
SDP_EXPORT int __sigaction(int number, const struct sigaction* action, struct sigaction* before) noexcept {
  return act(number, action, before);
}
SDP_EXPORT sighandler_t signal(int number, sighandler_t handler) noexcept {
  return find(number) == nullptr ? libc().signal(number, handler) : act_simply(number, handler, SA_RESTART);
}
SDP_EXPORT sighandler_t sysv_signal(int number, sighandler_t handler) noexcept {
  return find(number) == nullptr ? libc().sysv_signal(number, handler) : act_simply(number, handler, SA_RESETHAND | SA_NODEFER);
}
SDP_EXPORT sighandler_t __sysv_signal(int number, sighandler_t handler) noexcept { return sysv_signal(number, handler); }
