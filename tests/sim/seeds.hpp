// What the seeded tests share: which seeds to run, chance that means the same everywhere, and a stream whose every byte is known.
#pragma once

#include <boost/test/unit_test.hpp>
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <random>
#include <string>

#include "rdma_core/base/log.hpp"

namespace sdp::sim {

/// SDP_SEED_BASE and SDP_SEED_COUNT choose them; without, each test runs its own.
struct Seeds {
  std::uint64_t base, count;
  explicit Seeds(std::uint64_t standard_count)
      : base(number("SDP_SEED_BASE", 1)), count(number("SDP_SEED_COUNT", standard_count)) {}

 private:
  static std::uint64_t number(const char* name, std::uint64_t standard) {
    const char* text = std::getenv(name);
    return text == nullptr || *text == '\0' ? standard : std::strtoull(text, nullptr, 0);
  }
};

/// A broken property. Its message goes to the report together with the seed.
struct Broken {
  std::string what;
};
template <class... Parts>
[[noreturn]] void broken(const Parts&... parts) {
  std::string text;
  const auto add = [&text](const auto& part) {
    if constexpr (std::is_arithmetic_v<std::decay_t<decltype(part)>>)
      text += std::to_string(part);
    else
      text += part;
  };
  (add(parts), ...);
  throw Broken{text};
}

/// Runs `one(seed)` for each seed; stops after five broken ones.
template <class One>
void for_each_seed(const char* name, std::uint64_t standard_count, One one) {
  const Seeds seeds(standard_count);
  rdma::log::threshold = rdma::log::Level::error;  // lanes that die on purpose would fill the report
  unsigned failures = 0;
  for (std::uint64_t seed = seeds.base; seed < seeds.base + seeds.count && failures < 5; ++seed) {
    try {
      one(seed);
    } catch (const Broken& b) {
      ++failures;
      BOOST_ERROR(std::string(name) + ": seed " + std::to_string(seed) + ": " + b.what +
                  "  (again: SDP_SEED_BASE=" + std::to_string(seed) + " SDP_SEED_COUNT=1)");
    }
  }
  BOOST_TEST(failures == 0U);
}

class Chance {
 public:
  explicit Chance(std::uint64_t seed) : random_(seed) {}
  std::uint64_t pick(std::uint64_t low, std::uint64_t high) { return low + random_() % (high - low + 1); }
  bool percent(unsigned p) { return random_() % 100 < p; }
  /// Often small, sometimes large: sizes as programs use them.
  std::size_t size(std::size_t max) {
    const std::uint64_t bits = pick(0, 63 - static_cast<unsigned>(__builtin_clzll(max | 1)));
    return std::min<std::size_t>(max, pick(1, std::uint64_t{2} << bits));
  }

 private:
  std::mt19937_64 random_;
};

/// The byte at `position` of stream `stream`; a shift by any number of bytes, or another stream, looks different.
inline std::byte byte_at(std::uint64_t stream, std::uint64_t position) {
  std::uint64_t x = (position >> 3) + stream * 0x9E3779B97F4A7C15ULL;
  x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9ULL;
  x = (x ^ (x >> 27)) * 0x94D049BB133111EBULL;
  return static_cast<std::byte>((x ^ (x >> 31)) >> (8 * (position & 7)));
}
inline void fill(std::byte* out, std::size_t n, std::uint64_t stream, std::uint64_t position) {
  for (std::size_t i = 0; i < n; ++i) out[i] = byte_at(stream, position + i);
}
inline void verify(const std::byte* got, std::size_t n, std::uint64_t stream, std::uint64_t position, const char* by) {
  for (std::size_t i = 0; i < n; ++i)
    if (got[i] != byte_at(stream, position + i)) broken(by, ": wrong byte at position ", position + i, " of stream ", stream & 1);
}

}  // namespace sdp::sim
