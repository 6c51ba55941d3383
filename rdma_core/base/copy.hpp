// Copies of many bytes between two cores: memcpy, but for two things that it does not know, and on other CPUs than x86 just memcpy.
// `to` and `from` never overlap.
#pragma once

#if defined(__SSE2__)
#include <emmintrin.h>
#endif

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstring>

namespace rdma {

inline constexpr std::size_t kCacheLine = 64;       ///< bytes
inline constexpr std::size_t kStringCopies = 2048;  ///< bytes: memcpy uses no string instructions for less

#if defined(__SSE2__)
namespace detail {

template <bool PastCaches>
inline void copy_lines(std::byte* to, const std::byte* from, std::size_t n) noexcept {
  const std::size_t head = std::min(n, (kCacheLine - reinterpret_cast<std::uintptr_t>(to) % kCacheLine) % kCacheLine);
  std::memcpy(to, from, head);
  std::size_t at = head;
  for (; n - at >= kCacheLine; at += kCacheLine) {
    const auto* const source = static_cast<const __m128i*>(static_cast<const void*>(from + at));
    auto* const line = static_cast<__m128i*>(static_cast<void*>(to + at));
    const __m128i a = _mm_loadu_si128(source), b = _mm_loadu_si128(source + 1), c = _mm_loadu_si128(source + 2),
                  d = _mm_loadu_si128(source + 3);
    if constexpr (PastCaches) {
      _mm_stream_si128(line, a);
      _mm_stream_si128(line + 1, b);
      _mm_stream_si128(line + 2, c);
      _mm_stream_si128(line + 3, d);
    } else {
      _mm_store_si128(line, a);
      _mm_store_si128(line + 1, b);
      _mm_store_si128(line + 2, c);
      _mm_store_si128(line + 3, d);
    }
  }
  std::memcpy(to + at, from + at, n - at);
}

}  // namespace detail

/// memcpy also where that is slow: for large pieces it uses a string instruction, which on some CPUs (AMD's Zen 3 among them)
/// copies ten times slower to a place that lies 1 to 31 bytes further in its page than the source does in its own. Messages behind
/// their headers and what malloc gives lie so.
inline void copy_bytes(std::byte* to, const std::byte* from, std::size_t n) noexcept {
  constexpr std::uintptr_t kPage = 4096;
  const std::uintptr_t further = (reinterpret_cast<std::uintptr_t>(to) - reinterpret_cast<std::uintptr_t>(from)) % kPage;
  if (n >= kStringCopies && further != 0 && further < kCacheLine)
    detail::copy_lines<false>(to, from, n);
  else
    std::memcpy(to, from, n);
}

/// Writes whole lines to memory and not into this core's cache: for bytes that another core reads next, where asking that core for
/// its lines costs more than memory does. In order with the stores that follow.
inline void copy_past_caches(std::byte* to, const std::byte* from, std::size_t n) noexcept {
  detail::copy_lines<true>(to, from, n);
  _mm_sfence();
}

#else
inline void copy_bytes(std::byte* to, const std::byte* from, std::size_t n) noexcept { std::memcpy(to, from, n); }
inline void copy_past_caches(std::byte* to, const std::byte* from, std::size_t n) noexcept { std::memcpy(to, from, n); }
#endif

}  // namespace rdma
