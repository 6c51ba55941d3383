#include "rdma_core/base/blocking_call.hpp"

#include <pthread.h>
#include <ucontext.h>

#include <cerrno>

#include "rdma_core/base/sys.hpp"

namespace rdma::sys {

thread_local std::atomic<std::uint8_t> handlers_run __attribute__((tls_model("initial-exec"))) = 0;

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
        "b"(static_cast<long>(by)), [run] "r"(&handlers_run), [eintr] "i"(-EINTR)
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
#error "blocking_call.cpp: add the guarded system call of this architecture"
#endif

void handler_has_run(void* context, bool restarts) noexcept {
  const std::uint8_t run = restarts ? 1 : 2;
  handlers_run.fetch_or(run, std::memory_order_relaxed);
  end_guarded(*static_cast<ucontext_t*>(context), run);
}

long sleeping_call(EndedBy by, long number, long a, long b, long c, long d, long e, long f) noexcept {
  return guarded_call(by, number, a, b, c, d, e, f);
}

long blocking_call(EndedBy by, long number, long a, long b, long c, long d, long e, long f) {
  int was = PTHREAD_CANCEL_DEFERRED;
  pthread_setcanceltype(PTHREAD_CANCEL_ASYNCHRONOUS, &was);
  const long result = guarded_call(by, number, a, b, c, d, e, f);
  pthread_setcanceltype(was, nullptr);
  return result;
}

}  // namespace rdma::sys
