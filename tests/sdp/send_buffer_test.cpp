// The two ends of a send buffer: what is put in comes out, whatever the sizes and the reader's pace; cursors that lie are found
// out.
#include "sdp/send_buffer.hpp"

#include <boost/test/unit_test.hpp>
#include <random>
#include <vector>

#include "tests/sim/stream_pair.hpp"

namespace sdp {
namespace {

constexpr std::size_t kSmall = SendBuffer::kSmallBytes, kAll = SendBuffer::kCapacity;

/// A buffer, its reader, and between them the words that the device would carry.
struct Ends {
  sim::Hosts hosts{rdma::NodeType::ib_ca};
  rdma::RegisteredHeap& heap = *hosts.host[0].context->heap;
  CopyPaces paces;
  CopyTrial copy{paces, BulkCopy::tried, 1 << 20};
  SendBuffer buffer{copy};
  std::array<RingCursor, kRings> cursors;
  std::atomic<std::uint64_t> pulled{0};
  PeerBuffer peer;
  std::uint64_t sent = 0, received = 0;
  const rdma::Mr* mr = nullptr;

  Ends() {
    peer.look_at(cursors);
    auto block = heap.allocate(64, 64);
    mr = block->mr;
    heap.deallocate(block->addr);
  }
  ~Ends() { buffer.release_all(heap); }

  std::size_t put(std::size_t bytes, std::size_t limit = kAll) {
    std::vector<std::byte> data(bytes);
    sim::fill(data.data(), bytes, 1, sent);
    const iovec iov{data.data(), bytes};
    IovCursor from(&iov, 1);
    const std::size_t n = buffer.append(from, limit, sent, pulled, heap);
    BOOST_REQUIRE(from.remaining() == bytes - n);
    sent += n;
    for (unsigned ring = 0; ring < kRings; ++ring) {
      SendBuffer::News& news = buffer.news(ring);
      std::atomic<std::uint64_t>* const words[] = {&cursors[ring].addr, &cursors[ring].rkey, &cursors[ring].start,
                                                   &cursors[ring].end};
      for (unsigned w = news.first; w < 4; ++w) words[w]->store(news.word[w]);
      news.first = 4;
    }
    return n;
  }
  bool put_at_once(std::size_t bytes) {
    std::vector<std::byte> data(bytes);
    sim::fill(data.data(), bytes, 1, sent);
    if (!buffer.append_at_once(data.data(), bytes, sent)) return false;
    sent += bytes;
    cursors[buffer.ring_in_use()].end.store(sent);
    return true;
  }
  std::size_t take(std::size_t bytes) {
    std::size_t total = 0;
    while (total < bytes) {
      PeerBuffer::Piece piece;
      BOOST_REQUIRE(peer.find(received, piece));
      if (piece.bytes == 0) break;
      const std::size_t n = std::min(piece.bytes, bytes - total);
      sim::verify(mr->addr + (piece.addr - mr->remote_base), n, 1, received, "take");
      received += n;
      total += n;
      BOOST_REQUIRE(piece.last == (peer.held(received) == 0 && n == piece.bytes) || n < piece.bytes);
    }
    pulled.store(received);
    return total;
  }
  std::uint64_t held() const { return buffer.buffered(pulled.load()); }
};

}  // namespace

BOOST_AUTO_TEST_CASE(what_is_put_in_comes_out) {
  std::mt19937_64 chance(7);
  const auto size = [&chance] { return std::size_t{1} << chance() % 20 | (chance() & 0xff); };
  Ends e;
  std::uint64_t large = 0, at_once = 0;
  for (int step = 0; step < 20'000; ++step) {
    if (chance() % 2 != 0)
      e.put(size(), chance() % 2 != 0 ? kSmall : kAll);
    else if (chance() % 3 != 0)
      e.take(size());
    else
      e.take(~std::size_t{0});
    BOOST_REQUIRE(e.held() == e.sent - e.received);
    BOOST_REQUIRE(e.peer.held(e.received) == e.sent - e.received);
    large += e.buffer.has_large();
    for (std::size_t i = chance() % 4; i != 0; --i) at_once += e.put_at_once(1 + chance() % 300);
    if (e.held() == 0 && chance() % 4 == 0) e.buffer.release_large(e.heap);
    if (e.held() == 0 && chance() % 4 == 0) e.sent = e.received += chance() % 5000;  // messages in between
    if (e.held() != 0 && chance() % 16 == 0) {
      const std::uint64_t from = e.received + chance() % e.held();
      std::vector<std::byte> copy(e.sent - from);
      e.buffer.copy_from(from, copy.data());
      sim::verify(copy.data(), copy.size(), 1, from, "copy_from");
    }
  }
  e.take(~std::size_t{0});
  BOOST_TEST(e.received == e.sent);
  BOOST_TEST(large != 0U);
  BOOST_TEST(at_once != 0U);
}

BOOST_AUTO_TEST_CASE(it_takes_no_more_than_the_limit) {
  Ends e;
  BOOST_TEST(e.put(kSmall - 10, kSmall) == kSmall - 10);
  BOOST_TEST(e.put(100, kSmall) == 10U);
  BOOST_TEST(e.put(100, kSmall) == 0U);
  BOOST_TEST(!e.buffer.has_large());
  BOOST_TEST(e.put(2 * kAll) == kAll - kSmall);
  BOOST_TEST(e.put(1) == 0U);
  BOOST_TEST(e.take(1) == 1U);
  BOOST_TEST(e.put(10) == 1U);
}

BOOST_AUTO_TEST_CASE(a_writer_in_the_large_ring_finds_back_to_the_small_one) {
  Ends e;
  e.put(kSmall);
  e.put(100);
  BOOST_TEST(e.buffer.ring_in_use() == 1U);
  e.take(kAll);  // the reader has caught up, and does so now and then; there is always room
  std::size_t sent = 0;
  for (; e.buffer.ring_in_use() == 1U && sent < kAll; sent += 64) {
    e.take(kAll);
    if (!e.put_at_once(64)) e.put(64);
  }
  BOOST_TEST(sent <= 2 * kSmall);
}

BOOST_AUTO_TEST_CASE(a_ring_that_was_given_back_comes_back_somewhere_else) {
  Ends e;
  BOOST_TEST(e.put(kSmall) == kSmall);
  BOOST_TEST(e.put(2000) == 2000U);  // in the large ring, which the writer goes on with until it looks at `pulled` again
  BOOST_TEST(e.take(kAll) == kSmall + 2000);
  e.buffer.release_large(e.heap);
  auto others = e.heap.allocate(kAll, 4096);  // another lane's, at the old place
  BOOST_REQUIRE(others);
  std::memset(others->addr, 0xEE, kAll);
  BOOST_TEST(e.put(100) == 100U);
  BOOST_TEST(e.take(kAll) == 100U);  // verifies every byte
  e.heap.deallocate(others->addr);
}

BOOST_AUTO_TEST_CASE(a_reader_that_claims_too_much_harms_only_itself) {
  Ends e;
  e.put(1000);
  for (const std::uint64_t lie : {std::uint64_t{5000}, ~std::uint64_t{0}}) {
    e.pulled = lie;
    BOOST_TEST(e.held() == 0U);
    BOOST_TEST(e.put(kAll) <= kAll);
  }
  e.pulled = 3;
  BOOST_TEST(e.held() <= kAll + kSmall);
  BOOST_TEST(e.put(kAll) <= kAll);
}

BOOST_AUTO_TEST_CASE(cursors_that_lie_are_found_out) {
  const auto sound = [](std::uint64_t at, std::uint64_t size, std::uint64_t start, std::uint64_t end) {
    std::array<RingCursor, kRings> cursors;
    cursors[0].rkey = size << 32 | 1;
    cursors[0].start = start;
    cursors[0].end = end;
    PeerBuffer peer;
    peer.look_at(cursors);
    BOOST_TEST(peer.held(at) <= kRings * kAll);
    PeerBuffer::Piece piece;
    const bool ok = peer.find(at, piece);
    if (ok) BOOST_TEST(piece.bytes <= size);
    return ok;
  };
  BOOST_TEST(sound(100, kSmall, 100, 100 + kSmall));
  BOOST_TEST(sound(100, kSmall, 200, 300));            // not here yet
  BOOST_TEST(!sound(100, kSmall, 100, 101 + kSmall));  // more than a ring holds
  BOOST_TEST(!sound(100, 0, 100, 200));
  BOOST_TEST(!sound(100, 3000, 100, 200));
  BOOST_TEST(!sound(100, 2 * kAll, 100, 200));
  BOOST_TEST(!sound(100, kSmall, 0, ~std::uint64_t{0}));
  BOOST_TEST(!sound(100, 0xFFFF'FFFF, 0, 200));
}

}  // namespace sdp
