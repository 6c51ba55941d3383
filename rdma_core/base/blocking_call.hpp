// A system call that may block and is a cancellation point, as libc's wrappers are: a thread that pthread_cancel hits while it
// waits unwinds from here. What the frames above hold they must give back by destructors, and none of them may be noexcept.
//
// As with libc, a thread that is cancelled just as the kernel has finished loses the result.
#pragma once

namespace rdma::sys {

/// As call(). Not inlined: unwinding needs a call to come back to.
[[gnu::noinline]] long blocking_call(long number, long a = 0, long b = 0, long c = 0, long d = 0, long e = 0, long f = 0);

}  // namespace rdma::sys
