// The program's actions for signals, while the kernel has ours (preload/handlers.hpp).
//
// The kernel knows the program's mask and flags, and ours in the place of each handler. For SIGSEGV and SIGBUS it has ours also
// where the program has none.
//
// sigset() and sigignore(), and programs that make the system call themselves, replace ours: then a handler ends only the sleep
// that it finds in the kernel, and a bad address ends the process, as they do where nobody tells.
#include <pthread.h>
#include <signal.h>

#include <array>
#include <atomic>

#include "preload/dispatch.hpp"
#include "preload/handlers.hpp"
#include "rdma_core/base/program_call.hpp"
#include "rdma_core/base/sys.hpp"
#include "rdma_core/base/user_memory.hpp"
#include "sdp/engine.hpp"

using preload::libc;
namespace sys = rdma::sys;

namespace {

using Handler = void (*)(int, siginfo_t*, void*);    // one that takes the number alone does not mind the rest
constexpr std::uintptr_t kDefault = 0, kIgnore = 1;  // SIG_DFL, SIG_IGN
std::uintptr_t handler_of(const struct sigaction& action) noexcept { return reinterpret_cast<std::uintptr_t>(action.sa_handler); }

/// What the program has set for one signal.
struct Theirs {
  struct sigaction action {};  ///< under `lock`, once they are taken
  // What our handler needs of it. But for SIGSEGV and SIGBUS that of the last that was no SIG_DFL or SIG_IGN: a signal may be on
  // its way when the action changes.
  std::atomic<std::uintptr_t> handler{kDefault};
  std::atomic<bool> restarts{false};  ///< SA_RESTART
  std::atomic<bool> once{false};      ///< SA_RESETHAND
};
std::array<Theirs, _NSIG> theirs;
std::atomic<bool> taken{false};  ///< set under `lock`
std::atomic_flag lock = ATOMIC_FLAG_INIT;
std::atomic<std::uint64_t> interrupting{0};  ///< siginterrupt(): signals for which signal() leaves SA_RESTART out

bool may_fault(int number) noexcept { return number == SIGSEGV || number == SIGBUS; }
/// SIGKILL and SIGSTOP have no handlers, and two signals are libc's own.
bool can_take(int number) noexcept {
  return number > 0 && number < _NSIG && number != SIGKILL && number != SIGSTOP && (number < __SIGRTMIN || number >= SIGRTMIN);
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

void run_theirs(Theirs& their, std::uintptr_t handler, int number, siginfo_t* info, void* context) {
  if (their.once.exchange(false)) {
    const Locked locked;
    their.action.sa_handler = SIG_DFL;
    if (may_fault(number))
      their.handler.store(kDefault, std::memory_order_release);
    else
      (void)libc().sigaction(number, &their.action, nullptr);
  }
  const bool restarts = their.restarts.load(std::memory_order_relaxed);
  reinterpret_cast<Handler>(handler)(number, info, context);
  sys::handler_has_run(context, restarts);
}

void on_signal(int number, siginfo_t* info, void* context) {
  if (sys::put_off(number, *info, context)) return;
  Theirs& their = theirs[static_cast<std::size_t>(number)];
  run_theirs(their, their.handler.load(std::memory_order_acquire), number, info, context);
}

void set_default(int number) noexcept {
  struct sigaction action {};
  action.sa_handler = SIG_DFL;
  (void)libc().sigaction(number, &action, nullptr);
}

void on_fault(int number, siginfo_t* info, void* context) {
  if (rdma::mend_fault(context)) return;
  Theirs& their = theirs[static_cast<std::size_t>(number)];
  const std::uintptr_t handler = their.handler.load(std::memory_order_acquire);
  const bool sent = info->si_code <= 0;  // by a process; else by an instruction, which is made again when we return
  if (handler == kIgnore && sent) return;
  if (handler == kIgnore || handler == kDefault) {
    set_default(number);
    if (sent) sys::call(SYS_tgkill, sys::call(SYS_getpid), sys::call(SYS_gettid), number);
    return;
  }
  run_theirs(their, handler, number, info, context);
}

bool is_ours(const struct sigaction& action) noexcept {
  return (action.sa_flags & SA_SIGINFO) != 0 && (action.sa_sigaction == on_signal || action.sa_sigaction == on_fault);
}

/// What the program would see where the kernel says `kernels`.
struct sigaction seen_by_them(int number, const struct sigaction& kernels) noexcept {
  return is_ours(kernels) ? theirs[static_cast<std::size_t>(number)].action : kernels;
}

/// Ours where the program has a handler, delivered as it wants its own. For faults always, in whatever way works.
int set_ours(int number, const struct sigaction& action, struct sigaction& before) noexcept {
  Theirs& their = theirs[static_cast<std::size_t>(number)];
  const bool is_handled = handler_of(action) > kIgnore;
  struct sigaction ours = action;
  if (is_handled || may_fault(number)) {
    ours.sa_sigaction = may_fault(number) ? on_fault : on_signal;
    ours.sa_flags = SA_SIGINFO | (is_handled ? action.sa_flags & ~SA_RESETHAND : SA_ONSTACK);  // which the kernel does too soon
    // Before the kernel's, or a signal between the two would be taken for the one before.
    their.restarts.store((action.sa_flags & SA_RESTART) != 0, std::memory_order_relaxed);
    their.once.store((action.sa_flags & SA_RESETHAND) != 0, std::memory_order_relaxed);
    their.handler.store(handler_of(action), std::memory_order_release);
  }
  struct sigaction kernels {};
  const int result = libc().sigaction(number, &ours, &kernels);
  before = seen_by_them(number, kernels);
  their.action = action;
  return result;
}

int act(int number, const struct sigaction* action, struct sigaction* before) noexcept {
  if (!can_take(number)) return libc().sigaction(number, action, before);
  struct sigaction wanted {
  }, old{};
  if (action != nullptr) wanted = *action;
  int result = 0;
  if (sdp::engine::in_vfork_child()) {  // whose actions are its own, and our notes the parent's
    result = libc().sigaction(number, action != nullptr ? &wanted : nullptr, &old);
    if (is_ours(old)) old = seen_by_them(number, old);
  } else {
    const Locked locked;
    if (action != nullptr && taken.load(std::memory_order_relaxed)) {
      result = set_ours(number, wanted, old);
    } else {
      result = libc().sigaction(number, action != nullptr ? &wanted : nullptr, &old);
      if (taken.load(std::memory_order_relaxed)) old = seen_by_them(number, old);
    }
  }
  if (before != nullptr && result == 0) *before = old;
  return result;
}

std::uint64_t bit(int number) noexcept { return std::uint64_t{1} << (number - 1); }

sighandler_t act_simply(int number, sighandler_t handler, int flags) noexcept {
  if (!can_take(number) || handler == SIG_ERR) {
    errno = EINVAL;
    return SIG_ERR;
  }
  struct sigaction action {
  }, before{};
  action.sa_handler = handler;
  action.sa_flags = flags;
  if ((flags & SA_NODEFER) == 0) sigaddset(&action.sa_mask, number);
  return act(number, &action, &before) == 0 ? before.sa_handler : SIG_ERR;
}

}  // namespace

void preload::take_handlers() noexcept {
  if (taken.load(std::memory_order_acquire)) return;
  const Locked locked;
  if (taken.load(std::memory_order_relaxed)) return;
  for (int number = 1; number < _NSIG; ++number) {
    struct sigaction action {
    }, before{};
    if (!can_take(number) || libc().sigaction(number, nullptr, &action) != 0) continue;
    if (handler_of(action) > kIgnore || may_fault(number)) (void)set_ours(number, action, before);
    theirs[static_cast<std::size_t>(number)].action = action;
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
  const bool restarts = !can_take(number) || (interrupting.load(std::memory_order_relaxed) & bit(number)) == 0;
  return act_simply(number, handler, restarts ? SA_RESTART : 0);
}
SDP_EXPORT sighandler_t bsd_signal(int number, sighandler_t handler) noexcept { return signal(number, handler); }
SDP_EXPORT sighandler_t ssignal(int number, sighandler_t handler) noexcept { return signal(number, handler); }
SDP_EXPORT sighandler_t sysv_signal(int number, sighandler_t handler) noexcept {
  return act_simply(number, handler, SA_RESETHAND | SA_NODEFER);
}
SDP_EXPORT sighandler_t __sysv_signal(int number, sighandler_t handler) noexcept { return sysv_signal(number, handler); }
SDP_EXPORT int siginterrupt(int number, int interrupts) noexcept {
  struct sigaction action {};
  if (act(number, nullptr, &action) != 0) return -1;
  if (interrupts != 0) {
    if (can_take(number)) interrupting.fetch_or(bit(number), std::memory_order_relaxed);
    action.sa_flags &= ~SA_RESTART;
  } else {
    if (can_take(number)) interrupting.fetch_and(~bit(number), std::memory_order_relaxed);
    action.sa_flags |= SA_RESTART;
  }
  return act(number, &action, nullptr);
}
