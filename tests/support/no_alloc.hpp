// Proves that a stretch of code allocates nothing.
//
//   #define NO_ALLOC_DEFINE_HOOKS            in the one test source of the binary, before the include
//   #include "tests/support/no_alloc.hpp"
//   { NoAlloc guard; stream.send(...); BOOST_TEST(guard.allocations() == 0u); }
//
// Counts malloc, calloc, realloc, aligned_alloc, posix_memalign and every operator new of the calling thread; frees are allowed.
// Under AddressSanitizer and ThreadSanitizer malloc is theirs, and only operator new is counted. NoAlloc::counting() says whether
// hooks exist at all, so that a test which forgot them can notice.
#pragma once

#include <cstddef>
#include <cstdint>

namespace rdma::sim {

namespace detail {
inline thread_local std::uint64_t allocations __attribute__((tls_model("initial-exec"))) = 0;
inline thread_local unsigned no_alloc_paused __attribute__((tls_model("initial-exec"))) = 0;
inline bool no_alloc_hooks = false;
inline void count_allocation() noexcept {
  if (no_alloc_paused == 0) ++allocations;
}
}  // namespace detail

/// Counts from its construction on. Guards nest.
class NoAlloc {
 public:
  NoAlloc() noexcept : start_(detail::allocations) {}
  std::uint64_t allocations() const noexcept { return detail::allocations - start_; }
  static bool counting() noexcept { return detail::no_alloc_hooks; }

 private:
  std::uint64_t start_;
};

/// Code of the test's own (the simulated device) inside a guarded scope: what it allocates does not count.
class PauseNoAlloc {
 public:
  PauseNoAlloc() noexcept { ++detail::no_alloc_paused; }
  ~PauseNoAlloc() { --detail::no_alloc_paused; }
  PauseNoAlloc(const PauseNoAlloc&) = delete;
  PauseNoAlloc& operator=(const PauseNoAlloc&) = delete;
};

}  // namespace rdma::sim

#ifdef NO_ALLOC_DEFINE_HOOKS

#include <cerrno>
#include <cstdlib>
#include <new>

#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)
#define NO_ALLOC_SANITIZED 1
#elif defined(__has_feature)
#if __has_feature(address_sanitizer) || __has_feature(thread_sanitizer) || __has_feature(memory_sanitizer)
#define NO_ALLOC_SANITIZED 1
#endif
#endif

#ifndef NO_ALLOC_SANITIZED
extern "C" {
void* __libc_malloc(std::size_t) noexcept;
void* __libc_calloc(std::size_t, std::size_t) noexcept;
void* __libc_realloc(void*, std::size_t) noexcept;
void* __libc_memalign(std::size_t, std::size_t) noexcept;

// The one source of an executable that includes this defines them.
// NOLINTBEGIN(misc-definitions-in-headers)
void* malloc(std::size_t bytes) noexcept {
  rdma::sim::detail::count_allocation();
  return __libc_malloc(bytes);
}
void* calloc(std::size_t count, std::size_t bytes) noexcept {
  rdma::sim::detail::count_allocation();
  return __libc_calloc(count, bytes);
}
void* realloc(void* old, std::size_t bytes) noexcept {
  rdma::sim::detail::count_allocation();
  return __libc_realloc(old, bytes);
}
void* aligned_alloc(std::size_t alignment, std::size_t bytes) noexcept {
  rdma::sim::detail::count_allocation();
  return __libc_memalign(alignment, bytes);
}
int posix_memalign(void** out, std::size_t alignment, std::size_t bytes) noexcept {
  rdma::sim::detail::count_allocation();
  *out = __libc_memalign(alignment, bytes);
  return *out == nullptr ? ENOMEM : 0;
}
// NOLINTEND(misc-definitions-in-headers)
}
// The standard operator new ends in malloc or aligned_alloc, which count.
namespace rdma::sim::detail {
inline const bool kNoAllocHooksSet = (no_alloc_hooks = true);
}
#else
// Not inlined: g++ warns of a mismatch (-Wmismatched-new-delete) where it sees into one of a pair and not into the other.
[[gnu::noinline]] void* operator new(std::size_t bytes) {
  rdma::sim::detail::count_allocation();
  if (void* p = std::malloc(bytes == 0 ? 1 : bytes)) return p;
  throw std::bad_alloc();
}
[[gnu::noinline]] void operator delete(void* p) noexcept { std::free(p); }
[[gnu::noinline]] void operator delete(void* p, std::size_t) noexcept { std::free(p); }
namespace rdma::sim::detail {
inline const bool kNoAllocHooksSet = (no_alloc_hooks = true);
}
#endif
#endif  // NO_ALLOC_DEFINE_HOOKS
