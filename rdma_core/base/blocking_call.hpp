// System calls that sleep for the program. What ends such a call in the kernel must end it here, too, though most of a call's time
// is spent outside the kernel: the handler of a signal that came while bytes were copied, or while we looked for them, and a
// cancellation of the thread.
//
// The kernel says EINTR when a signal came since the call began and there is nothing to return, by the rules of signal(7). So
// begin_call() at the start of a call; whoever runs the program's handlers says so by handler_has_run(); and a sleep does not
// begin, not even between the last look and the system call's instruction, once a handler that ends it has run.
#pragma once

#include <atomic>
#include <cstdint>

namespace rdma::sys {

/// Which handlers end a sleep with -EINTR.
enum class EndedBy : std::uint8_t {
  nothing = 0,     ///< the kernel alone, if one comes while it sleeps
  no_restart = 2,  ///< those installed without SA_RESTART: reads and writes without a time limit
  any = 3,         ///< reads and writes with one, and all waits for events
};

/// Of the handlers that have run in this thread since begin_call(): 1: there was one with SA_RESTART; 2: one without.
extern thread_local std::atomic<std::uint8_t> handlers_run __attribute__((tls_model("initial-exec")));

inline void begin_call() noexcept { handlers_run.store(0, std::memory_order_relaxed); }
/// After a sleep said -EINTR: would a call that is ended by these return? A handler of which nobody has told us ends any.
inline bool is_ended(EndedBy by) noexcept {
  const std::uint8_t run = handlers_run.load(std::memory_order_relaxed);
  return run == 0 || (run & static_cast<std::uint8_t>(by)) != 0;
}
/// In a signal's handler, after the program's own, with the kernel's third argument; `restarts`: it was installed with SA_RESTART.
void handler_has_run(void* context, bool restarts) noexcept;

/// As call(), but -EINTR without a system call where handlers have run that end it.
long sleeping_call(EndedBy by, long number, long a = 0, long b = 0, long c = 0, long d = 0, long e = 0, long f = 0) noexcept;
/// As sleeping_call(), and a cancellation point, as libc's wrappers are: a thread that pthread_cancel hits while it waits unwinds
/// from here. What the frames above hold they must give back by destructors, and none of them may be noexcept. As with libc, a
/// thread that is cancelled just as the kernel has finished loses the result. Not inlined: unwinding needs a call to come back to.
[[gnu::noinline]] long blocking_call(EndedBy by, long number, long a = 0, long b = 0, long c = 0, long d = 0, long e = 0,
                                     long f = 0);

}  // namespace rdma::sys
