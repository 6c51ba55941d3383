// What registered_heap.cpp uses of the private jemalloc 5.3 (cmake/jemalloc.cmake). Declared here and not taken from
// <jemalloc/jemalloc.h>: that header speaks of malloc and free, names which in this library are the program's.
#pragma once

#include <cstddef>

namespace rdma::sdpje {

/// extent_hooks_t. A null member other than alloc means "cannot", and jemalloc keeps the range for later use.
struct ExtentHooks {
  void* (*alloc)(ExtentHooks*, void* new_addr, std::size_t size, std::size_t alignment, bool* zero, bool* commit, unsigned arena);
  bool (*dalloc)(ExtentHooks*, void* addr, std::size_t size, bool committed, unsigned arena);
  void (*destroy)(ExtentHooks*, void* addr, std::size_t size, bool committed, unsigned arena);
  bool (*commit)(ExtentHooks*, void* addr, std::size_t size, std::size_t offset, std::size_t length, unsigned arena);
  bool (*decommit)(ExtentHooks*, void* addr, std::size_t size, std::size_t offset, std::size_t length, unsigned arena);
  bool (*purge_lazy)(ExtentHooks*, void* addr, std::size_t size, std::size_t offset, std::size_t length, unsigned arena);
  bool (*purge_forced)(ExtentHooks*, void* addr, std::size_t size, std::size_t offset, std::size_t length, unsigned arena);
  bool (*split)(ExtentHooks*, void* addr, std::size_t size, std::size_t size_a, std::size_t size_b, bool committed, unsigned arena);
  bool (*merge)(ExtentHooks*, void* addr_a, std::size_t size_a, void* addr_b, std::size_t size_b, bool committed, unsigned arena);
};

/// arena_config_t, of mallctl "experimental.arenas_create_ext".
struct ArenaConfig {
  ExtentHooks* extent_hooks;
  bool metadata_use_hooks;
};

inline constexpr int kTcacheNone = 0x100;                                                        // MALLOCX_TCACHE_NONE
constexpr int in_arena(unsigned arena) noexcept { return static_cast<int>((arena + 1) << 20); }  // MALLOCX_ARENA
/// MALLOCX_ALIGN; a power of two.
constexpr int aligned(std::size_t alignment) noexcept { return __builtin_ctzll(alignment); }

}  // namespace rdma::sdpje

extern "C" {
void* sdpje_mallocx(std::size_t size, int flags) noexcept;
void sdpje_dallocx(void* ptr, int flags) noexcept;
std::size_t sdpje_sallocx(const void* ptr, int flags) noexcept;
int sdpje_mallctl(const char* name, void* old_value, std::size_t* old_bytes, void* new_value, std::size_t new_bytes) noexcept;
/// Makes the list of threads anew; `tsd` is the calling thread's.
void sdpje_je_tsd_postfork_child(void* tsd) noexcept;
extern thread_local std::byte sdpje_je_tsd_tls __attribute__((tls_model("initial-exec")));

// Defined by us; see registered_heap.cpp.
extern const char* sdpje_malloc_conf;
char* sdpje_secure_getenv(const char* name) noexcept;
long sdpje_readlink(const char* path, char* out, std::size_t bytes) noexcept;
int sdpje_pthread_create(void* thread, const void* attr, void* (*start)(void*), void* arg) noexcept;
int sdpje_pthread_atfork(void (*prepare)(), void (*parent)(), void (*child)()) noexcept;
double sdpje_exp(double) noexcept;
double sdpje_log(double) noexcept;
double sdpje_round(double) noexcept;
int sdpje_open(const char* path, int flags, ...) noexcept;
int sdpje_creat(const char* path, unsigned mode) noexcept;
int sdpje_close(int fd) noexcept;
}
