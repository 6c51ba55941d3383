// System calls of our own. Our library interposes read, write, close, poll… for the whole process, itself included, so internal I/O
// must not go through those names. These go to the kernel directly; they return the value or -errno and leave errno alone.
#pragma once

#include <sys/syscall.h>
#include <unistd.h>

#include <cstdint>

namespace rdma::sys {

#if defined(__x86_64__)
inline long call(long n, long a = 0, long b = 0, long c = 0, long d = 0, long e = 0, long f = 0) noexcept {
  register long r10 asm("r10") = d;
  register long r8 asm("r8") = e;
  register long r9 asm("r9") = f;
  long ret;
  asm volatile("syscall" : "=a"(ret) : "a"(n), "D"(a), "S"(b), "d"(c), "r"(r10), "r"(r8), "r"(r9) : "rcx", "r11", "memory");
  return ret;
}
#else
#error "sys.hpp: add the system call sequence of this architecture"
#endif

template <class T>
long arg(T* p) noexcept {
  return reinterpret_cast<long>(p);
}

}  // namespace rdma::sys
