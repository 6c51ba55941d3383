// Memory that the program names in a call: asked for before anything is done with it, as the kernel does, so that a bad address is
// EFAULT and not the program's end.
//
// A question is a load or a store per page. One that faults is mended by whoever handles SIGSEGV and SIGBUS (mend_fault()); where
// nobody does, or the thread blocks these signals, it ends the process as any bad access would. What another thread unmaps between
// the question and the use is not caught. Any thread, also in a signal handler.
#pragma once

#include <cstddef>

namespace rdma {

/// How many of the `bytes` from `at` on can be read: all of them, or those before the first page that cannot.
std::size_t readable_bytes(const void* at, std::size_t bytes) noexcept;
inline bool is_readable(const void* at, std::size_t bytes) noexcept { return readable_bytes(at, bytes) == bytes; }

/// Can all of them be written? The caller is about to: some are 0 afterwards.
bool can_overwrite(void* at, std::size_t bytes) noexcept;

/// In a handler of SIGSEGV or SIGBUS, with its third argument. True: the fault was one of the above and is over; return.
bool mend_fault(void* context) noexcept;

}  // namespace rdma
