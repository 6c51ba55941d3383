// Logging. A disabled level costs one load and one branch and formats nothing. Lines go to the descriptor chosen at start with
// one write(2) each, so they are safe after fork and never interleave. Never throws, never changes errno.
#pragma once

#include <atomic>
#include <cstdint>

namespace rdma::log {

enum class Level : std::uint8_t { off, error, warn, info, debug };

extern std::atomic<Level> threshold;  ///< default: warn

inline bool enabled(Level level) noexcept { return level <= threshold.load(std::memory_order_relaxed); }

/// Where lines go: a descriptor (2 at first) that log does not own. May be called any time.
void set_fd(int fd) noexcept;
int fd() noexcept;

/// One line "sdpreload[pid]: level: text"; longer than 1000 bytes is cut. Async-signal-safe but for the formatting of floats.
void write(Level level, const char* format, ...) noexcept __attribute__((format(printf, 2, 3)));

}  // namespace rdma::log

/// The one macro: the arguments are not evaluated when the level is off.
#define RDMA_LOG(level, ...)                                                                                         \
  do {                                                                                                               \
    if (::rdma::log::enabled(::rdma::log::Level::level)) ::rdma::log::write(::rdma::log::Level::level, __VA_ARGS__); \
  } while (0)
