#include "rdma_core/base/user_memory.hpp"

#include <ucontext.h>

#include <cstdint>

namespace {

constexpr std::uintptr_t kPage = 4096;

/// Where an instruction may fault and where to go on then, each relative to its own place.
struct Mend {
  std::int32_t instruction, next;
};

}  // namespace

// The linker's names for the first and the end of the table that the questions below fill.
extern "C" {
extern const Mend kFirstMend[] __asm__("__start_sdp_mends") __attribute__((visibility("hidden")));
extern const Mend kEndOfMends[] __asm__("__stop_sdp_mends") __attribute__((visibility("hidden")));
}

namespace rdma {

#if defined(__x86_64__)

namespace {

bool loads(const volatile std::byte* at) noexcept {
  asm goto(
      "1: cmpb $0, %0\n"
      ".pushsection sdp_mends, \"a\"\n"
      ".balign 4\n"
      ".long 1b - ., %l[fault] - .\n"
      ".popsection"
      :
      : "m"(*at)
      : "cc", "memory"
      : fault);
  return true;
fault:
  return false;
}

bool stores(volatile std::byte* at) noexcept {
  asm goto(
      "1: movb $0, %0\n"
      ".pushsection sdp_mends, \"a\"\n"
      ".balign 4\n"
      ".long 1b - ., %l[fault] - .\n"
      ".popsection"
      :
      : "m"(*at)
      : "memory"
      : fault);
  return true;
fault:
  return false;
}

}  // namespace

bool mend_fault(void* context) noexcept {
  auto& at = static_cast<ucontext_t*>(context)->uc_mcontext.gregs[REG_RIP];
  const auto place = [](const std::int32_t& offset) { return reinterpret_cast<greg_t>(&offset) + offset; };
  for (const Mend* m = kFirstMend; m != kEndOfMends; ++m) {
    if (place(m->instruction) != at) continue;
    at = place(m->next);
    return true;
  }
  return false;
}

#else
#error "user_memory.cpp: add a load and a store of this architecture that may fault"
#endif

std::size_t readable_bytes(const void* at, std::size_t bytes) noexcept {
  const auto* const first = static_cast<const std::byte*>(at);
  for (std::size_t n = 0; n < bytes; n += kPage - reinterpret_cast<std::uintptr_t>(first + n) % kPage)
    if (!loads(first + n)) return n;
  return bytes;
}

bool can_overwrite(void* at, std::size_t bytes) noexcept {
  auto* const first = static_cast<std::byte*>(at);
  for (std::size_t n = 0; n < bytes; n += kPage - reinterpret_cast<std::uintptr_t>(first + n) % kPage)
    if (!stores(first + n)) return false;
  return true;
}

}  // namespace rdma
