// A call of the program's into us, as its thread's signal handlers and its cancellation see it: as they see a system call.
//
// The kernel runs handlers where a call sleeps or returns, never in its middle. So here: a handler that comes in between is put off
// until then, and finds nothing half done, takes no lock that its thread has, and may leave the call by siglongjmp. And the kernel
// says EINTR when a signal came since the call began and there is nothing to return, by the rules of signal(7): a sleep does not
// begin, not even between the last look and the system call's instruction, once a handler that ends it has run.
//
// This needs somebody who has the program's handlers run beneath his own: he asks put_off() first and says handler_has_run() after.
#pragma once

#include <signal.h>

#include <atomic>
#include <cstdint>

namespace rdma::sys {

/// Which handlers end a sleep with -EINTR.
enum class EndedBy : std::uint8_t {
  nothing = 0,     ///< the kernel alone, if one comes while it sleeps
  no_restart = 2,  ///< those installed without SA_RESTART: reads and writes without a time limit
  any = 3,         ///< reads and writes with one, and all waits for events
};

namespace detail {

/// Of one thread; changed by it and its handlers alone.
struct CallState {
  std::atomic<bool> is_inside{false};    ///< a call, and not in a sleep of it
  std::atomic<bool> has_put_off{false};  ///< a signal is pending in the kernel, and all are blocked
  /// Of the handlers that have run since the call began: 1: there was one with SA_RESTART; 2: one without.
  std::atomic<std::uint8_t> handlers_run{0};
};
extern thread_local CallState call_state __attribute__((tls_model("initial-exec")));
void run_put_off();

}  // namespace detail

/// From a call's beginning to its end. A call in a call (of ours, or by a handler that runs in a sleep) is one of its own.
class ProgramCall {
 public:
  ProgramCall() noexcept : was_inside_(detail::call_state.is_inside.load(std::memory_order_relaxed)) {
    detail::call_state.handlers_run.store(0, std::memory_order_relaxed);
    detail::call_state.is_inside.store(true, std::memory_order_relaxed);
  }
  /// What was put off runs now. It may leave by siglongjmp, or by an exception as from any call.
  ~ProgramCall() noexcept(false) {
    detail::call_state.is_inside.store(was_inside_, std::memory_order_relaxed);
    if (detail::call_state.has_put_off.load(std::memory_order_relaxed) && !was_inside_) [[unlikely]]
      detail::run_put_off();
  }
  ProgramCall(const ProgramCall&) = delete;
  ProgramCall& operator=(const ProgramCall&) = delete;

 private:
  bool was_inside_;
};

/// The call goes on as if no handler had run since it began.
inline void forget_handlers() noexcept { detail::call_state.handlers_run.store(0, std::memory_order_relaxed); }
/// After a sleep said -EINTR: would a call that is ended by these return? A handler of which nobody has told us ends any.
inline bool is_ended(EndedBy by) noexcept {
  const std::uint8_t run = detail::call_state.handlers_run.load(std::memory_order_relaxed);
  return run == 0 || (run & static_cast<std::uint8_t>(by)) != 0;
}

/// As call(), where the call may sleep: handlers run. -EINTR without a system call where some have that end it.
long sleeping_call(EndedBy by, long number, long a = 0, long b = 0, long c = 0, long d = 0, long e = 0, long f = 0);
/// As sleeping_call(), and a cancellation point, as libc's wrappers are: a thread that pthread_cancel hits while it waits unwinds
/// from here. What the frames above hold they must give back by destructors, and none of them may be noexcept. As with libc, a
/// thread that is cancelled just as the kernel has finished loses the result. Not inlined: unwinding needs a call to come back to.
[[gnu::noinline]] long blocking_call(EndedBy by, long number, long a = 0, long b = 0, long c = 0, long d = 0, long e = 0,
                                     long f = 0);

/// In a signal's handler, with what the kernel gave it. True: return at once, the signal comes again when the call sleeps or
/// returns. Faults and abort() are not put off.
bool put_off(int number, siginfo_t& info, void* context) noexcept;
/// In a signal's handler, after the program's own; `restarts`: it was installed with SA_RESTART.
void handler_has_run(void* context, bool restarts) noexcept;

}  // namespace rdma::sys
