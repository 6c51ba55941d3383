#include "sdp/staging.hpp"

#include <sys/mman.h>

#include <boost/test/unit_test.hpp>
#include <cstring>
#include <deque>
#include <random>

namespace sdp {
namespace {

constexpr std::size_t kMost = 512 << 10, kSmall = kMost / 32;

/// Extents by mmap; `pinned`: bytes of those that are there.
struct FakePd final : rdma::Pd {
  struct Extent final : rdma::Mr {
    Extent(FakePd& p, std::size_t bytes) : pd(p) {
      addr = static_cast<std::byte*>(mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
      length = bytes;
      lkey = rdma::Lkey{++pd.keys};
      pd.pinned += bytes;
    }
    ~Extent() override {
      pd.pinned -= length;
      munmap(addr, length);
    }
    FakePd& pd;
  };
  rdma::Result<std::unique_ptr<rdma::Mr>> register_memory(std::span<std::byte>, rdma::Access) override {
    return rdma::fail(ENOTSUP, "fake");
  }
  rdma::Result<std::unique_ptr<rdma::Qp>> create_qp(const rdma::QpInit&) override { return rdma::fail(ENOTSUP, "fake"); }
  rdma::Result<std::unique_ptr<rdma::Mr>> map_extent(std::size_t bytes) override {
    if (refuses) return rdma::fail(ENOMEM, "fake");
    return std::unique_ptr<rdma::Mr>(std::make_unique<Extent>(*this, (bytes + 4095) & ~std::size_t{4095}));
  }
  std::size_t pinned = 0;
  std::uint32_t keys = 0;
  bool refuses = false;
};

struct Fixture {
  FakePd pd;
  std::unique_ptr<rdma::RegisteredHeap> heap = std::move(*rdma::RegisteredHeap::create(pd, 256 << 10));
  Staging staging{kMost};
  ~Fixture() { staging.close(*heap); }
};

}  // namespace

BOOST_FIXTURE_TEST_SUITE(staging, Fixture)

BOOST_AUTO_TEST_CASE(it_is_small_at_first_and_goes_back_to_nothing) {
  BOOST_TEST(staging.bytes() == 0U);
  BOOST_REQUIRE(staging.open(*heap));
  BOOST_TEST(staging.bytes() == kSmall);
  BOOST_TEST(staging.longest() == kSmall / 4);
  const std::size_t before = pd.pinned;
  BOOST_REQUIRE(staging.grow(pd));
  BOOST_TEST(!staging.may_grow());
  BOOST_TEST(staging.longest() == kMost / 4);
  BOOST_TEST(pd.pinned == before + kMost);
  staging.close(*heap);
  BOOST_TEST(staging.bytes() == 0U);
  BOOST_TEST(pd.pinned == before);
  BOOST_TEST(heap->bytes_in_use() == 0U);
}

BOOST_AUTO_TEST_CASE(without_memory_for_more_it_goes_on_with_what_it_has) {
  BOOST_REQUIRE(staging.open(*heap));
  pd.refuses = true;
  BOOST_TEST(!staging.grow(pd));
  BOOST_TEST(!staging.may_grow());
  unsigned messages = 0;
  for (; staging.has_room(staging.longest()); ++messages) staging.take(staging.longest());
  BOOST_TEST(messages >= 62U, "a peer with 64 buffers answers half of them");
  staging.done(staging.position());
  BOOST_TEST(staging.has_room(staging.longest()));
}

// Every piece that is not done is what was written there, through growth, wrap and return.
BOOST_AUTO_TEST_CASE(pieces_stay_what_they_are_until_they_are_done) {
  std::mt19937 random(7);
  struct Piece {
    std::uint64_t end;
    std::size_t bytes;
    unsigned char value;
  };
  std::deque<Piece> pieces;
  unsigned grown = 0, closed = 0;
  for (unsigned step = 0; step < 200'000; ++step) {
    if (!staging.active()) {
      BOOST_REQUIRE(staging.open(*heap));
    }
    const std::size_t bytes = 1 + random() % staging.longest();
    if (random() % 2 == 0 && staging.has_room(bytes)) {
      const auto value = static_cast<unsigned char>(random());
      std::memset(staging.take(bytes), value, bytes);
      pieces.push_back({staging.position(), bytes, value});
    } else if (!pieces.empty() && random() % 3 != 0) {
      staging.done(pieces.front().end);
      pieces.pop_front();
    } else if (staging.may_grow() && random() % 50 == 0) {
      BOOST_REQUIRE(staging.grow(pd));
      ++grown;
    } else if (staging.in_use() == 0 && random() % 4 == 0) {
      staging.close(*heap);
      ++closed;
      continue;
    }
    if (pieces.empty()) continue;
    const Piece& one = pieces[random() % pieces.size()];
    const auto found = staging.piece(one.end, one.bytes);
    BOOST_REQUIRE_EQUAL(found.size(), one.bytes);
    BOOST_REQUIRE(std::ranges::all_of(found, [&](std::byte b) { return b == std::byte{one.value}; }));
  }
  BOOST_TEST(grown > 10U);
  BOOST_TEST(closed > 10U);
}

BOOST_AUTO_TEST_SUITE_END()

}  // namespace sdp
