// SIGSEGV and SIGBUS, shared with the program: questions of ours about its memory (rdma_core/base/user_memory.hpp) may fault, and
// what else does is the program's, whose handlers are called as if the kernel had.
#pragma once

namespace preload {

/// From now on. The first call counts; any thread. What the program asks and sets by sigaction() and signal() is its own all the
/// same.
void take_faults() noexcept;

}  // namespace preload
