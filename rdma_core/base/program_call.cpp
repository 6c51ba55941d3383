#include "rdma_core/base/program_call.hpp"

#include <pthread.h>
#include <ucontext.h>

#include <cerrno>

#include "rdma_core/base/sys.hpp"

namespace rdma::sys {

using detail::call_state;

namespace detail {
thread_local CallState call_state __attribute__((tls_model("initial-exec")));
}

namespace {

/// As the kernel has it: bit `n - 1` stands for signal n.
using Mask = std::uint64_t;
constexpr Mask bit(int number) noexcept { return Mask{1} << (number - 1); }
constexpr Mask kNotPutOff = bit(SIGSEGV) | bit(SIGBUS) | bit(SIGFPE) | bit(SIGILL) | bit(SIGTRAP) | bit(SIGSYS) | bit(SIGABRT);
constexpr Mask kLibcs = bit(32) | bit(33);
constexpr Mask kBlocked = ~(kNotPutOff | kLibcs);

/// The thread's signal mask when the first was put off.
thread_local Mask mask_before __attribute__((tls_model("initial-exec"))) = 0;

long set_mask(const Mask& mask, Mask* before) noexcept {
  return call(SYS_rt_sigprocmask, SIG_SETMASK, arg(&mask), arg(before), sizeof(Mask));
}

}  // namespace

// The kernel runs the handlers as soon as the mask lets it: before set_mask() returns.
void detail::run_put_off() {
  call_state.has_put_off.store(false, std::memory_order_relaxed);
  const Mask mask = mask_before;
  const int error = errno;  // may be said already, and is not the handler's to change
  set_mask(mask, nullptr);
  errno = error;
}

// It becomes pending again, in a thread that blocks all until it is run: from now on, and when the handler has returned. Handlers
// that the kernel has begun at once nest; the last to return, which was to run first, has the mask of the call.
bool put_off(int number, siginfo_t& info, void* context) noexcept {
  if (!call_state.is_inside.load(std::memory_order_relaxed) || (bit(number) & kNotPutOff) != 0) return false;
  Mask before = 0;
  set_mask(kBlocked, &before);
  if (call(SYS_rt_tgsigqueueinfo, call(SYS_getpid), call(SYS_gettid), number, arg(&info)) != 0) {
    set_mask(before, nullptr);
    return false;
  }
  auto& mask = reinterpret_cast<Mask&>(static_cast<ucontext_t*>(context)->uc_sigmask);
  mask_before = mask;
  mask = kBlocked;
  call_state.has_put_off.store(true, std::memory_order_relaxed);
  return true;
}

#if defined(__x86_64__)

// From its last look at handlers_run to the system call's instruction; where a handler found it there, it goes on at its end.
extern "C" {
extern const char kGuardBegins[] __asm__("sdp_guard_begins") __attribute__((visibility("hidden")));
extern const char kGuardEnters[] __asm__("sdp_guard_enters") __attribute__((visibility("hidden")));
extern const char kGuardEnds[] __asm__("sdp_guard_ends") __attribute__((visibility("hidden")));
}

namespace {

// rbx has the handlers that end the call, where handler_has_run() finds them.
[[gnu::noinline, gnu::noclone]] long guarded_call(EndedBy by, long number, long a, long b, long c, long d, long e,
                                                  long f) noexcept {
  register long r10 asm("r10") = d;
  register long r8 asm("r8") = e;
  register long r9 asm("r9") = f;
  long result = number;
  asm volatile(
      ".hidden sdp_guard_begins, sdp_guard_enters, sdp_guard_ends\n"
      ".globl sdp_guard_begins, sdp_guard_enters, sdp_guard_ends\n"
      "sdp_guard_begins:\n"
      "  testb %%bl, (%[run])\n"
      "  jnz sdp_guard_ends\n"
      "sdp_guard_enters:\n"
      "  syscall\n"
      "  jmp 1f\n"
      "sdp_guard_ends:\n"
      "  movq %[eintr], %%rax\n"
      "1:\n"
      : "+a"(result)
      : "D"(a), "S"(b), "d"(c), "r"(r10), "r"(r8), "r"(r9),
        "b"(static_cast<long>(by)), [run] "r"(&call_state.handlers_run), [eintr] "i"(-EINTR)
      : "rcx", "r11", "cc", "memory");
  return result;
}

/// -EINTR for a guarded call that has not begun to sleep, or is about to begin again.
void end_guarded(ucontext_t& context, std::uint8_t run) noexcept {
  auto& at = context.uc_mcontext.gregs[REG_RIP];
  if (at < reinterpret_cast<greg_t>(kGuardBegins) || at > reinterpret_cast<greg_t>(kGuardEnters)) return;
  if ((context.uc_mcontext.gregs[REG_RBX] & run) != 0) at = reinterpret_cast<greg_t>(kGuardEnds);
}

}  // namespace

#else
#error "program_call.cpp: add the guarded system call of this architecture"
#endif

void handler_has_run(void* context, bool restarts) noexcept {
  const std::uint8_t run = restarts ? 1 : 2;
  call_state.handlers_run.fetch_or(run, std::memory_order_relaxed);
  end_guarded(*static_cast<ucontext_t*>(context), run);
}

namespace {
/// A part of a call in which handlers run.
class Asleep {
 public:
  Asleep() : was_inside_(call_state.is_inside.exchange(false, std::memory_order_relaxed)) {
    if (call_state.has_put_off.load(std::memory_order_relaxed)) [[unlikely]]
      detail::run_put_off();
  }
  ~Asleep() { call_state.is_inside.store(was_inside_, std::memory_order_relaxed); }
  Asleep(const Asleep&) = delete;
  Asleep& operator=(const Asleep&) = delete;

 private:
  bool was_inside_;
};
}  // namespace

long sleeping_call(EndedBy by, long number, long a, long b, long c, long d, long e, long f) {
  const Asleep asleep;
  return guarded_call(by, number, a, b, c, d, e, f);
}

long blocking_call(EndedBy by, long number, long a, long b, long c, long d, long e, long f) {
  const Asleep asleep;
  int was = PTHREAD_CANCEL_DEFERRED;
  pthread_setcanceltype(PTHREAD_CANCEL_ASYNCHRONOUS, &was);
  const long result = guarded_call(by, number, a, b, c, d, e, f);
  pthread_setcanceltype(was, nullptr);
  return result;
}

}  // namespace rdma::sys
