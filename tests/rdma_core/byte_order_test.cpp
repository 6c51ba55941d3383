#include "rdma_core/base/byte_order.hpp"

#include <array>
#include <boost/test/unit_test.hpp>

namespace rdma {

// One byte in front, so that nothing is aligned.
BOOST_AUTO_TEST_CASE(stores_put_the_most_significant_byte_first) {
  std::array<std::byte, 9> bytes{};
  const auto is = [&](std::initializer_list<int> want) {
    std::size_t i = 1;
    for (const int b : want) BOOST_TEST(std::to_integer<int>(bytes[i++]) == b);
  };
  store_be16(&bytes[1], 0x0102);
  is({1, 2});
  store_be32(&bytes[1], 0x01020304);
  is({1, 2, 3, 4});
  store_be64(&bytes[1], 0x0102030405060708);
  is({1, 2, 3, 4, 5, 6, 7, 8});
}

BOOST_AUTO_TEST_CASE(loads_read_the_most_significant_byte_first) {
  std::array<std::byte, 9> bytes{};
  for (int i = 1; i <= 8; ++i) bytes[static_cast<std::size_t>(i)] = std::byte(0xF0 + i);
  BOOST_TEST(load_be16(&bytes[1]) == 0xF1F2u);
  BOOST_TEST(load_be32(&bytes[1]) == 0xF1F2F3F4u);
  BOOST_TEST(load_be64(&bytes[1]) == 0xF1F2F3F4F5F6F7F8u);
}

BOOST_AUTO_TEST_CASE(stores_touch_only_their_own_bytes) {
  std::array<std::byte, 10> bytes;
  bytes.fill(std::byte{0xEE});
  store_be16(&bytes[4], 0);
  BOOST_TEST((bytes[3] == std::byte{0xEE} && bytes[6] == std::byte{0xEE}));
  store_be32(&bytes[4], 0);
  BOOST_TEST((bytes[3] == std::byte{0xEE} && bytes[8] == std::byte{0xEE}));
  store_be64(&bytes[1], 0);
  BOOST_TEST((bytes[0] == std::byte{0xEE} && bytes[9] == std::byte{0xEE}));
}

}  // namespace rdma
