// Copies: every byte of the piece, no byte beside it, wherever the two ends lie in their pages.
#include "rdma_core/base/copy.hpp"

#include <boost/test/unit_test.hpp>
#include <string_view>
#include <vector>

namespace rdma {
namespace {

constexpr std::size_t kPage = 4096, kMost = 3 * kPage;
constexpr std::byte kBeside{0xEE};

struct Memory {
  std::vector<std::byte> from = std::vector<std::byte>(kMost + 2 * kPage), to = from;
  std::byte* page(std::vector<std::byte>& bytes) const {
    const auto first = reinterpret_cast<std::uintptr_t>(bytes.data());
    return bytes.data() + (kPage - first % kPage) % kPage;
  }
};

template <class Copy>
void check(std::string_view name, Copy copy) {
  Memory memory;
  for (std::size_t i = 0; i < memory.from.size(); ++i) memory.from[i] = static_cast<std::byte>((i * 31) ^ (i >> 8));
  for (const std::size_t n : {0U, 1U, 63U, 64U, 65U, 200U, 2047U, 2048U, 2049U, 4096U, 8191U, 12200U}) {
    for (const std::size_t from : {0U, 1U, 8U, 16U, 24U, 63U}) {
      for (const std::size_t to : {0U, 1U, 8U, 16U, 24U, 40U, 63U, 64U}) {
        std::fill(memory.to.begin(), memory.to.end(), kBeside);
        const std::byte* const source = memory.page(memory.from) + from;
        std::byte* const target = memory.page(memory.to) + to;
        copy(target, source, n);
        BOOST_TEST_CONTEXT(name << ", " << n << " bytes from " << from << " to " << to) {
          BOOST_REQUIRE(std::equal(target, target + n, source));
          BOOST_REQUIRE(std::all_of(memory.to.data(), target, [](std::byte b) { return b == kBeside; }));
          BOOST_REQUIRE(std::all_of(target + n, memory.to.data() + memory.to.size(), [](std::byte b) { return b == kBeside; }));
        }
      }
    }
  }
}

BOOST_AUTO_TEST_CASE(copies_are_exact) {
  check("copy_bytes", [](std::byte* to, const std::byte* from, std::size_t n) { copy_bytes(to, from, n); });
  check("copy_past_caches", [](std::byte* to, const std::byte* from, std::size_t n) { copy_past_caches(to, from, n); });
}

}  // namespace
}  // namespace rdma
