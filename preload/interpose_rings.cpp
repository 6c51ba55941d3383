// liburing's ways to a ring. The library makes its system calls inline; these names are where it can be seen in time.
#include <dlfcn.h>

#include <cerrno>

#include "preload/dispatch.hpp"
#include "preload/runtime.hpp"

struct io_uring;
struct io_uring_params;

namespace {

/// liburing may be out of our sight: loaded with a plugin, for that alone.
template <class Function>
Function* real(const char* name) noexcept {
  void* found = preload::next_symbol(name);
  if (found == nullptr)
    if (void* const liburing = dlopen("liburing.so.2", RTLD_LAZY | RTLD_NOLOAD)) found = dlsym(liburing, name);
  return reinterpret_cast<Function*>(found);
}

template <class... Args>
int make_ring(const char* name, Args... args) noexcept {
  const auto call = real<int(Args...)>(name);
  if (call == nullptr) return -ENOSYS;
  preload::before_ring();
  return call(args...);
}

}  // namespace

SDP_EXPORT int io_uring_queue_init(unsigned entries, io_uring* ring, unsigned flags) noexcept {
  return make_ring("io_uring_queue_init", entries, ring, flags);
}
SDP_EXPORT int io_uring_queue_init_params(unsigned entries, io_uring* ring, io_uring_params* params) noexcept {
  return make_ring("io_uring_queue_init_params", entries, ring, params);
}
SDP_EXPORT int io_uring_queue_init_mem(unsigned entries, io_uring* ring, io_uring_params* params, void* memory,
                                       size_t size) noexcept {
  return make_ring("io_uring_queue_init_mem", entries, ring, params, memory, size);
}
SDP_EXPORT int io_uring_queue_mmap(int fd, io_uring_params* params, io_uring* ring) noexcept {
  return make_ring("io_uring_queue_mmap", fd, params, ring);
}
SDP_EXPORT int io_uring_setup(unsigned entries, io_uring_params* params) noexcept {
  return make_ring("io_uring_setup", entries, params);
}
