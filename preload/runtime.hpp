// Start, fork and exit of the library in one process, and the composition of its layers.
#pragma once

#include <optional>

#include "sdp/engine.hpp"

namespace preload {

/// The stream of a connection that the kernel has just made; empty if it shall have none (policy tcp, no memory). The first one
/// starts the library, unless its constructor has: any number of threads may bring the first ones at the same time.
sdp::Stream track(int fd, sdp::Role role) noexcept;

/// Before an end of the process that no exit handler sees. Does nothing in a vfork child.
void before_quick_end() noexcept;

/// Every stream that another program would inherit (no FD_CLOEXEC) goes back to TCP: called before a spawn.
void before_spawn() noexcept;

/// Before an io_uring can serve a socket: every stream goes back to TCP, for good. Cheap when that is done already.
void before_ring() noexcept;

/// Round an exec: the same, and what would not outlive it arrives before. `path`: nullptr if only the call finds it; one that
/// cannot be executed changes nothing.
class Exec {
 public:
  explicit Exec(const char* path) noexcept;

 private:
  std::optional<sdp::engine::ExecAttempt> attempt_;
};

}  // namespace preload
