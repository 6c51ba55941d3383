// The program's signal handlers, run beneath ours. Ours tell the calls that they interrupt (rdma_core/base/program_call.hpp), and
// mend the faults of questions of ours about the program's memory (rdma_core/base/user_memory.hpp).
#pragma once

namespace preload {

/// From now on. The first call counts; any thread. What the program asks and sets by sigaction(), signal() and their kin is its own
/// all the same.
void take_handlers() noexcept;

}  // namespace preload
