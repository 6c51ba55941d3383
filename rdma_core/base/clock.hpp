// Time as a value that is handed in. The protocol core and everything tested under the simulator take a Clock; the datapath's
// spin budget reads cheap_ticks() directly.
#pragma once

#include <time.h>

#include <cstdint>

namespace rdma {

using Nanos = std::int64_t;

class Clock {
 public:
  virtual ~Clock() = default;
  virtual Nanos now() const noexcept = 0;  ///< monotonic
};

class SteadyClock final : public Clock {
 public:
  Nanos now() const noexcept override {
    timespec ts{};
    clock_gettime(CLOCK_MONOTONIC, &ts);
    return static_cast<Nanos>(ts.tv_sec) * 1'000'000'000 + ts.tv_nsec;
  }
};

/// One pause of a spin loop: tells the core and costs tens of cycles.
inline void cpu_relax() noexcept {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

/// Asks for the cache line of `at` as its only owner; does nothing to memory, whatever the address.
inline void prefetch_for_write(const void* at) noexcept {
#if defined(__x86_64__)
  asm volatile("prefetchw %0" : : "m"(*static_cast<const char*>(at)));  // not among what the compiler may assume of every x86-64
#else
  __builtin_prefetch(at, 1);
#endif
}

}  // namespace rdma
