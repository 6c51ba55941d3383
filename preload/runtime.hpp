// Start, fork and exit of the library in one process, and the composition of its layers.
#pragma once

namespace preload {

/// Idempotent; a wrapper that is about to track a connection calls it. Registers the fork handlers and composes the engine.
void start() noexcept;

/// Every stream that another program would inherit (no FD_CLOEXEC) goes back to TCP: called before exec and spawn.
void before_exec() noexcept;

}  // namespace preload
