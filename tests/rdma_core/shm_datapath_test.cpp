// The software device's datapath, both flavours: one process, both ends by hand (shm_pair.hpp).
#include <linux/futex.h>
#include <poll.h>
#include <sys/epoll.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <atomic>
#include <boost/test/data/test_case.hpp>
#include <numeric>
#include <random>
#include <thread>

#include "rdma_core/drivers/shm/shm_qp.hpp"
#include "tests/rdma_core/shm_pair.hpp"

using namespace rdma;
using namespace rdma::shm;
using namespace rdma::shm::test;
namespace bdata = boost::unit_test::data;

BOOST_TEST_DONT_PRINT_LOG_VALUE(rdma::NodeType)
BOOST_TEST_DONT_PRINT_LOG_VALUE(rdma::Post)
BOOST_TEST_DONT_PRINT_LOG_VALUE(rdma::WcStatus)
BOOST_TEST_DONT_PRINT_LOG_VALUE(rdma::WcOpcode)
BOOST_TEST_DONT_PRINT_LOG_VALUE(rdma::QpState)

namespace {

const NodeType kFlavours[] = {NodeType::ib_ca, NodeType::rnic};

std::vector<std::byte> pattern(std::size_t bytes, unsigned seed) {
  std::vector<std::byte> out(bytes);
  std::mt19937 random(seed);
  for (auto& b : out) b = static_cast<std::byte>(random());
  return out;
}

bool same(const std::byte* a, const std::vector<std::byte>& b) { return b.empty() || std::memcmp(a, b.data(), b.size()) == 0; }

Post send(End& end, const std::vector<std::byte>& bytes, std::uint8_t flags = kInline, std::uint64_t id = 0) {
  const Sge sge = sge_of(bytes.data(), bytes.size());
  return end.qp->post_send(send_wr(&sge, 1, flags, id));
}

Post transfer(End& end, WrOpcode op, const void* local, std::size_t bytes, Lkey lkey, std::uint64_t remote, Rkey rkey,
              std::uint8_t flags = kSignalled) {
  const Sge sge = sge_of(local, bytes, lkey);
  return end.qp->post_send(
      {.wr_id = 77, .opcode = op, .flags = flags, .sge_count = 1, .sges = &sge, .remote_addr = remote, .rkey = rkey});
}

bool readable_edge(int epoll_fd) {
  epoll_event ev;
  return epoll_wait(epoll_fd, &ev, 1, 0) == 1;
}

int watch_edge(int fd) {
  const int ep = epoll_create1(EPOLL_CLOEXEC);
  epoll_event ev{EPOLLIN | EPOLLET, {}};
  BOOST_REQUIRE(epoll_ctl(ep, EPOLL_CTL_ADD, fd, &ev) == 0);
  (void)readable_edge(ep);  // a bell is ready at once
  return ep;
}

}  // namespace

BOOST_DATA_TEST_CASE(send_gathers_every_size_into_the_posted_buffer,
                     bdata::make(kFlavours) * bdata::make({int{kInline}, kInline | kDirect}), node, flags) {
  Pair p(8, 4096, node);
  for (std::size_t size : {0, 1, 2, 3, 4, 7, 8, 9, 15, 16, 17, 31, 32, 33, 47, 48, 49, 63, 64, 65, 80, 200, 3100, 4095, 4096}) {
    p.b.post(3);
    std::memset(p.b.buffer(3), 0xEE, 4096);
    const auto bytes = pattern(size, static_cast<unsigned>(size));
    const std::size_t cut = size / 3;
    const Sge sges[2] = {sge_of(bytes.data(), cut), sge_of(bytes.data() + cut, size - cut)};
    BOOST_TEST(!p.b.cq->maybe_ready());
    BOOST_TEST(p.a.qp->post_send(send_wr(sges, 2, static_cast<std::uint8_t>(flags))) == Post::ok);
    BOOST_TEST(p.b.cq->maybe_ready());
    const Wc wc = wait_wc(*p.b.cq);
    BOOST_TEST(wc.status == WcStatus::success);
    BOOST_TEST(wc.opcode == WcOpcode::recv);
    BOOST_TEST(wc.wr_id == 3u);
    BOOST_TEST(wc.byte_len == size);
    BOOST_TEST((wc.qpn == p.b.qp->qpn()));
    BOOST_TEST(same(p.b.buffer(3), bytes));
    if (size < 4096) BOOST_TEST(std::to_integer<int>(p.b.buffer(3)[size]) == 0xEE);
    BOOST_TEST(!p.b.cq->maybe_ready());
  }
}

BOOST_AUTO_TEST_CASE(send_completes_only_when_signalled) {
  Pair p;
  p.b.post(0);
  p.b.post(1);
  BOOST_TEST(send(p.a, pattern(10, 1), kInline, 5) == Post::ok);
  BOOST_TEST(!p.a.cq->maybe_ready());
  BOOST_TEST(send(p.a, pattern(10, 1), kInline | kSignalled, 6) == Post::ok);
  BOOST_TEST(p.a.cq->maybe_ready());
  const Wc wc = wait_wc(*p.a.cq);
  BOOST_TEST(wc.wr_id == 6u);
  BOOST_TEST(wc.opcode == WcOpcode::send);
  BOOST_TEST(!p.a.cq->maybe_ready());
}

BOOST_AUTO_TEST_CASE(send_says_queue_full_and_changes_nothing_until_the_cq_is_reaped) {
  Pair p(128);
  for (unsigned i = 0; i < 128; ++i) p.b.post(i);
  for (unsigned i = 0; i < 64; ++i) BOOST_REQUIRE(send(p.a, pattern(4, 1), kInline | kSignalled) == Post::ok);
  BOOST_TEST(send(p.a, pattern(4, 1), kInline | kSignalled) == Post::queue_full);
  (void)wait_wc(*p.a.cq);
  BOOST_TEST(send(p.a, pattern(4, 1), kInline | kSignalled) == Post::ok);
  unsigned arrived = 0;
  Wc wc;
  while (p.b.cq->poll({&wc, 1}) == 1) ++arrived;
  BOOST_TEST(arrived == 65u);
}

BOOST_AUTO_TEST_CASE(send_not_inline_needs_a_registered_source) {
  Pair p;
  p.b.post(0);
  auto bytes = pattern(100, 3);
  auto mr = std::move(*p.a.pd->register_memory(bytes, Access::local_read));
  const Sge good = sge_of(bytes.data(), 100, mr->lkey);
  BOOST_TEST(p.a.qp->post_send(send_wr(&good, 1, 0)) == Post::ok);
  BOOST_TEST(wait_wc(*p.b.cq).byte_len == 100u);
  const Sge beyond = sge_of(bytes.data() + 1, 100, mr->lkey);
  BOOST_TEST(p.a.qp->post_send(send_wr(&beyond, 1, 0)) == Post::ok);
  BOOST_TEST(wait_wc(*p.a.cq).status == WcStatus::local_protection_error);
  BOOST_TEST(p.a.qp->state() == QpState::error);
}

BOOST_DATA_TEST_CASE(send_without_a_posted_receive_is_an_error_at_once, bdata::make(kFlavours), node) {
  Pair p(8, 64, node);
  BOOST_TEST(send(p.a, pattern(4, 1), kInline, 9) == Post::ok);
  const Wc wc = wait_wc(*p.a.cq);
  BOOST_TEST(wc.status == WcStatus::rnr_retry_exceeded);
  BOOST_TEST(wc.wr_id == 9u);
  BOOST_TEST(send(p.a, pattern(4, 1)) == Post::qp_error);
}

BOOST_AUTO_TEST_CASE(send_that_is_too_long_fails_both_ends_and_writes_nothing) {
  Pair p(8, 64);
  p.b.post(0);
  p.b.post(1);
  std::memset(p.b.buffer(0), 0x11, 64);
  BOOST_TEST(send(p.a, pattern(65, 1)) == Post::ok);
  BOOST_TEST(wait_wc(*p.a.cq).status == WcStatus::remote_invalid_request);
  const Wc first = wait_wc(*p.b.cq);
  BOOST_TEST(first.status == WcStatus::local_length_error);
  BOOST_TEST(std::to_integer<int>(p.b.buffer(0)[0]) == 0x11);
  BOOST_TEST(p.b.qp->state() == QpState::error);
  const Wc second = wait_wc(*p.b.cq);
  BOOST_TEST(second.status == WcStatus::flushed);
  BOOST_TEST(second.wr_id == 1u);
  Wc none;
  BOOST_TEST(p.b.cq->poll({&none, 1}) == 0u);
}

BOOST_DATA_TEST_CASE(error_delivers_what_arrived_then_flushes_once_then_refuses, bdata::make(kFlavours), node) {
  Pair p(8, 64, node);
  for (unsigned i = 0; i < 5; ++i) p.b.post(i);
  BOOST_TEST(send(p.a, pattern(4, 1)) == Post::ok);
  BOOST_TEST(send(p.a, pattern(4, 1)) == Post::ok);
  BOOST_REQUIRE(p.b.qp->modify({.state = QpState::error}));
  BOOST_TEST(p.b.cq->maybe_ready());
  for (unsigned i = 0; i < 5; ++i) {
    const Wc wc = wait_wc(*p.b.cq);
    BOOST_TEST(wc.wr_id == i);
    BOOST_TEST(wc.status == (i < 2 ? WcStatus::success : WcStatus::flushed));
  }
  BOOST_TEST(!p.b.cq->maybe_ready());
  const RecvWr wr{.wr_id = 1, .addr = p.b.buffer(1), .length = 64};
  BOOST_TEST(p.b.qp->post_recv({&wr, 1}) == Post::qp_error);
  // The peer may not start a message any more.
  BOOST_TEST(send(p.a, pattern(4, 1)) == Post::ok);
  BOOST_TEST(wait_wc(*p.a.cq).status == WcStatus::retry_exceeded);
}

BOOST_AUTO_TEST_CASE(post_recv_beyond_the_depth_is_queue_full) {
  Pair p(4, 64);
  for (unsigned i = 0; i < 4; ++i) p.b.post(i);
  const RecvWr wr{.wr_id = 1, .addr = p.b.buffer(5), .length = 64};
  BOOST_TEST(p.b.qp->post_recv({&wr, 1}) == Post::queue_full);
}

BOOST_AUTO_TEST_CASE(what_lies_in_front_of_a_buffer_is_never_taken_for_a_message) {
  Pair p(4, 64);
  for (std::uint64_t n = 1; n <= 3; ++n) {
    const std::uint64_t forged = flag_word(n, 5);
    std::memcpy(p.b.buffer(0) - 8, &forged, sizeof forged);
    p.b.post(0);
    BOOST_TEST(!p.b.cq->maybe_ready());
    BOOST_TEST(send(p.a, pattern(7, 2)) == Post::ok);
    BOOST_TEST(wait_wc(*p.b.cq).byte_len == 7u);
  }
}

BOOST_AUTO_TEST_CASE(sent_message_shows_what_lies_at_the_peer) {
  Pair p(4, 64);
  for (unsigned i = 0; i < 4; ++i) p.b.post(i);
  const auto first = pattern(10, 1), second = pattern(20, 2);
  BOOST_TEST(p.a.qp->sent_message(0).empty());
  BOOST_TEST(send(p.a, first) == Post::ok);
  BOOST_TEST(send(p.a, second) == Post::ok);
  BOOST_REQUIRE(p.a.qp->sent_message(0).size() == 10u);
  BOOST_TEST(same(p.a.qp->sent_message(0).data(), first));
  BOOST_REQUIRE(p.a.qp->sent_message(1).size() == 20u);
  BOOST_TEST(same(p.a.qp->sent_message(1).data(), second));
  BOOST_TEST(p.a.qp->sent_message(2).empty());
}

BOOST_DATA_TEST_CASE(rdma_reads_and_writes_within_bounds_and_rights, bdata::make(kFlavours), node) {
  Pair p(4, 64, node);
  auto target = std::move(*p.b.pd->map_extent(8192));
  auto local = std::move(*p.a.pd->map_extent(8192));
  for (std::size_t size : {1, 8, 24, 64, 72, 100, 8192}) {
    const auto bytes = pattern(size, static_cast<unsigned>(size));
    std::memcpy(local->addr, bytes.data(), size);
    BOOST_TEST(transfer(p.a, WrOpcode::rdma_write, local->addr, size, local->lkey, target->remote_base + 8192 - size,
                        target->rkey) == Post::ok);
    const Wc wc = wait_wc(*p.a.cq);
    BOOST_TEST(wc.status == WcStatus::success);
    BOOST_TEST(wc.opcode == WcOpcode::rdma_write);
    BOOST_TEST(same(target->addr + 8192 - size, bytes));
    std::memset(local->addr, 0, size);
    BOOST_TEST(transfer(p.a, WrOpcode::rdma_read, local->addr, size, local->lkey, target->remote_base + 8192 - size,
                        target->rkey) == Post::ok);
    const Wc read = wait_wc(*p.a.cq);
    BOOST_TEST(read.status == WcStatus::success);
    BOOST_TEST(read.byte_len == size);
    BOOST_TEST(same(local->addr, bytes));
  }
  BOOST_TEST(!p.b.cq->maybe_ready());
}

namespace {
enum class Bad { one_beyond, one_before, wraps, wrong_key, zero_key, old_key, read_only, write_only, plain_memory, rnic_two_sges };
const Bad kBad[] = {Bad::one_beyond, Bad::one_before, Bad::wraps,      Bad::wrong_key,    Bad::zero_key,
                    Bad::old_key,    Bad::read_only,  Bad::write_only, Bad::plain_memory, Bad::rnic_two_sges};
}  // namespace
BOOST_TEST_DONT_PRINT_LOG_VALUE(Bad)

BOOST_DATA_TEST_CASE(rdma_outside_of_bounds_or_rights_costs_the_qp, bdata::make(kBad), bad) {
  Pair p(4, 64, bad == Bad::rnic_two_sges ? NodeType::rnic : NodeType::ib_ca);
  auto extent = std::move(*p.b.pd->map_extent(8192));
  auto local = std::move(*p.a.pd->map_extent(4096));
  std::vector<std::byte> plain(4096);
  const auto part = std::span(extent->addr + 1024, 1024);
  std::unique_ptr<Mr> mr = std::move(*p.b.pd->register_memory(
      bad == Bad::plain_memory ? std::span(plain) : part, bad == Bad::read_only ? Access::remote_read
                                                          : bad == Bad::write_only
                                                              ? Access::local_write | Access::remote_write
                                                              : Access::local_write | Access::remote_write | Access::remote_read));
  std::memset(extent->addr, 0x5A, 8192);
  WrOpcode op = WrOpcode::rdma_write;
  std::uint64_t at = mr->remote_base;
  std::size_t size = 16;
  Rkey key = mr->rkey;
  WcStatus expected = WcStatus::remote_access_error;
  switch (bad) {
    case Bad::one_beyond:
      at += 1024 - 15;
      break;
    case Bad::one_before:
      at -= 1;
      break;
    case Bad::wraps:
      at = ~std::uint64_t{0} - 3;
      break;
    case Bad::wrong_key:
      key = static_cast<Rkey>(static_cast<std::uint32_t>(key) ^ 0x10000u);
      break;
    case Bad::zero_key:
      key = Rkey{};
      break;
    case Bad::old_key:
      mr.reset();
      mr = std::move(*p.b.pd->register_memory(part, Access::remote_write | Access::local_write));
      BOOST_TEST((mr->rkey != key));
      break;
    case Bad::read_only:
      break;
    case Bad::write_only:
      op = WrOpcode::rdma_read;
      break;
    case Bad::plain_memory:
      break;
    case Bad::rnic_two_sges: {
      const Sge two[2] = {sge_of(local->addr, 8, local->lkey), sge_of(local->addr + 8, 8, local->lkey)};
      BOOST_TEST(p.a.qp->post_send({.opcode = WrOpcode::rdma_read, .sge_count = 2, .sges = two, .remote_addr = at, .rkey = key}) ==
                 Post::ok);
      BOOST_TEST(wait_wc(*p.a.cq).status == WcStatus::local_protection_error);
      BOOST_TEST(p.a.qp->state() == QpState::error);
      return;
    }
  }
  BOOST_TEST(transfer(p.a, op, local->addr, size, local->lkey, at, key, 0) == Post::ok);
  BOOST_TEST(wait_wc(*p.a.cq).status == expected);
  BOOST_TEST(p.a.qp->state() == QpState::error);
  for (std::size_t i = 0; i < 8192; ++i) BOOST_REQUIRE(std::to_integer<int>(extent->addr[i]) == 0x5A);
}

BOOST_AUTO_TEST_CASE(map_extent_gives_zeros_again_after_use) {
  Pair p(4, 64);
  std::byte* before = nullptr;
  for (int round = 0; round < 3; ++round) {
    auto mr = std::move(*p.a.pd->map_extent(16384));
    if (before == nullptr) before = mr->addr;
    BOOST_TEST(mr->addr == before);
    for (std::size_t i = 0; i < 16384; ++i) BOOST_REQUIRE(mr->addr[i] == std::byte{});
    std::memset(mr->addr, 0xFF, 16384);
  }
  BOOST_TEST(!p.a.pd->map_extent(kTestSegment));
  BOOST_TEST(p.a.pd->map_extent(kTestSegment).error().code == ENOSPC);
}

BOOST_AUTO_TEST_CASE(arm_announces_the_next_completion_once_by_each_kind) {
  Pair p;
  const int ep = watch_edge(p.b.channel->fd());
  BOOST_TEST(!readable_edge(ep));
  for (unsigned i = 0; i < 8; ++i) p.b.post(i);
  const std::uint32_t word = p.b.cq->wake_word()->load();
  BOOST_TEST(send(p.a, pattern(4, 1)) == Post::ok);  // not armed
  BOOST_TEST(!readable_edge(ep));
  BOOST_TEST(p.b.cq->wake_word()->load() == word);

  p.b.cq->arm(kWakeChannel);
  p.b.device->arm_fence();
  BOOST_TEST(send(p.a, pattern(4, 1)) == Post::ok);
  BOOST_TEST(readable_edge(ep));
  BOOST_TEST(send(p.a, pattern(4, 1)) == Post::ok);
  BOOST_TEST(!readable_edge(ep));
  BOOST_TEST(p.b.cq->wake_word()->load() == word);

  p.b.cq->arm(kWakeWord);
  p.b.cq->arm(kWakeChannel);
  BOOST_TEST(send(p.a, pattern(4, 1)) == Post::ok);
  BOOST_TEST(readable_edge(ep));
  BOOST_TEST(p.b.cq->wake_word()->load() == word + 1);

  p.b.cq->arm(kWakeWord | kWakeChannel);
  p.b.cq->disarm();
  BOOST_TEST(send(p.a, pattern(4, 1)) == Post::ok);
  BOOST_TEST(!readable_edge(ep));
  close(ep);
}

/// Takes what has come to `end` and posts its buffers again.
unsigned take_all(End& end) {
  unsigned taken = 0;
  for (Wc wc; end.cq->poll({&wc, 1}) == 1; ++taken) {
    BOOST_REQUIRE(wc.status == WcStatus::success);
    end.post(static_cast<unsigned>(wc.wr_id));
  }
  return taken;
}

BOOST_AUTO_TEST_CASE(a_barrier_is_due_only_where_the_sender_passes_no_fence) {
  Pair p;
  if (!p.a.device->has_membarrier()) return;
  const auto bytes = pattern(4, 1);
  const auto arming_needs_barrier = [&] {
    p.b.cq->arm(kWakeWord);
    return ShmCq::take_barrier_due();
  };
  for (unsigned i = 0; i < 8; ++i) p.b.post(i);
  BOOST_TEST(!arming_needs_barrier());  // a new sender fences
  p.b.cq->disarm();
  for (std::uint32_t i = 0; i < kFencedSends; ++i) {
    BOOST_TEST(!arming_needs_barrier());
    p.b.cq->disarm();
    BOOST_TEST(send(p.a, bytes) == Post::ok);
    BOOST_TEST(take_all(p.b) == 1U);
  }
  BOOST_TEST(arming_needs_barrier());
  const std::uint32_t word = p.b.cq->wake_word()->load();
  BOOST_TEST(send(p.a, bytes) == Post::ok);
  BOOST_TEST(p.b.cq->wake_word()->load() == word + 1);
  BOOST_TEST(!arming_needs_barrier());  // it has rung
  BOOST_TEST(!ShmCq::take_barrier_due());
}

BOOST_AUTO_TEST_CASE(no_wake_up_is_lost_while_the_sender_begins_to_fence_and_leaves_off) {
  constexpr unsigned kMessages = 200'000, kDepth = 32;
  Pair p(kDepth);
  for (unsigned i = 0; i < kDepth; ++i) p.b.post(i);
  std::atomic<unsigned> taken{0};
  std::thread receiver([&] {
    while (taken.load() < kMessages) {
      if (const unsigned n = take_all(p.b); n != 0) {
        taken.fetch_add(n);
        continue;
      }
      std::atomic<std::uint32_t>* const word = p.b.cq->wake_word();
      const std::uint32_t seen = word->load();
      p.b.cq->arm(kWakeWord);
      p.b.device->arm_fence();
      if (!p.b.cq->maybe_ready()) syscall(SYS_futex, word, FUTEX_WAIT, seen, nullptr, nullptr, 0);
    }
  });
  const auto bytes = pattern(8, 1);
  std::mt19937 random(7);
  for (unsigned sent = 0; sent < kMessages;) {
    // Now a row that is longer than it fences for, now one message at a time, each into a sleep.
    const bool row = random() % 2 == 0;
    for (unsigned left = row ? kFencedSends + random() % kFencedSends : 4; left > 0 && sent < kMessages; --left) {
      const unsigned most_unread = row ? kDepth - 1 : 0;
      while (sent - taken.load() > most_unread) std::this_thread::yield();
      BOOST_REQUIRE(send(p.a, bytes) == Post::ok);
      ++sent;
    }
  }
  receiver.join();
  BOOST_TEST(taken.load() == kMessages);
}

BOOST_AUTO_TEST_CASE(a_solicited_rdma_write_wakes_and_another_does_not) {
  Pair p;
  const int ep = watch_edge(p.b.channel->fd());
  auto target = std::move(*p.b.pd->map_extent(4096));
  const std::uint64_t word = 42;
  p.b.cq->arm(kWakeChannel);
  BOOST_TEST(transfer(p.a, WrOpcode::rdma_write, &word, 8, {}, target->remote_base, target->rkey, kInline) == Post::ok);
  BOOST_TEST(!readable_edge(ep));
  BOOST_TEST(transfer(p.a, WrOpcode::rdma_write, &word, 8, {}, target->remote_base, target->rkey, kInline | kSolicited) ==
             Post::ok);
  BOOST_TEST(readable_edge(ep));
  close(ep);
}

BOOST_AUTO_TEST_CASE(a_local_completion_wakes_an_armed_cq) {
  Pair p;
  const int ep = watch_edge(p.a.channel->fd());
  p.b.post(0);
  p.a.post(0);
  p.a.cq->arm(kWakeChannel);
  BOOST_TEST(send(p.a, pattern(4, 1), kInline | kSignalled) == Post::ok);
  BOOST_TEST(readable_edge(ep));
  p.a.cq->arm(kWakeChannel);
  BOOST_REQUIRE(p.a.qp->modify({.state = QpState::error}));  // flushes the receive
  BOOST_TEST(readable_edge(ep));
  close(ep);
}

BOOST_AUTO_TEST_CASE(a_cq_serves_several_qps_in_turn) {
  Pair p;
  auto second_a = std::move(*p.a.pd->create_qp({.send_cq = p.a.cq.get(), .recv_cq = p.a.cq.get()}));
  auto second_b = std::move(*p.b.pd->create_qp({.send_cq = p.b.cq.get(), .recv_cq = p.b.cq.get()}));
  std::swap(p.a.qp, second_a);
  std::swap(p.b.qp, second_b);
  move_to_rts(p.a, p.b.qp->qpn(), NodeType::ib_ca);
  move_to_rts(p.b, p.a.qp->qpn(), NodeType::ib_ca);
  BOOST_TEST(p.b.cq->wake_word() == nullptr);
  p.b.post(1);
  BOOST_TEST(send(p.a, pattern(4, 1)) == Post::ok);
  std::swap(p.a.qp, second_a);
  std::swap(p.b.qp, second_b);
  p.b.post(2);
  BOOST_TEST(send(p.a, pattern(4, 1)) == Post::ok);
  Wc wcs[4];
  BOOST_TEST(p.b.cq->poll(wcs) == 2u);
  BOOST_TEST(wcs[0].wr_id + wcs[1].wr_id == 3u);
  BOOST_TEST((wcs[0].qpn != wcs[1].qpn));
  second_b.reset();
  BOOST_TEST(p.b.cq->wake_word() != nullptr);
}

BOOST_DATA_TEST_CASE(both_ends_may_be_in_one_process, bdata::make(kFlavours), node) {
  auto device = std::move(*ShmDevice::create({.flavour = node, .segment_bytes = kTestSegment}));
  const Path path = *device->self_path();
  BOOST_TEST((path == *device->self_path()));
  End a, b;
  // The device is shared by both ends: lent, not given.
  a.device.reset(device.get());
  a.path = b.path = path;
  open_end(a, 8, 64);
  b.device.reset(device.get());
  open_end(b, 8, 64);
  move_to_rts(a, b.qp->qpn(), node);
  move_to_rts(b, a.qp->qpn(), node);
  b.post(0);
  BOOST_TEST(send(a, pattern(40, 1)) == Post::ok);
  BOOST_TEST(wait_wc(*b.cq).byte_len == 40u);
  BOOST_TEST(same(b.buffer(0), pattern(40, 1)));
  (void)a.device.release();
  (void)b.device.release();
}

BOOST_AUTO_TEST_CASE(reset_makes_a_qp_new) {
  Pair p(8, 64);
  p.b.post(0);
  BOOST_TEST(send(p.a, pattern(4, 1)) == Post::ok);
  BOOST_REQUIRE(p.a.qp->modify({.state = QpState::reset}));
  BOOST_REQUIRE(p.b.qp->modify({.state = QpState::reset}));
  BOOST_TEST(!p.b.cq->maybe_ready());
  move_to_rts(p.a, p.b.qp->qpn(), NodeType::ib_ca);
  move_to_rts(p.b, p.a.qp->qpn(), NodeType::ib_ca);
  p.b.post(2);
  BOOST_TEST(send(p.a, pattern(6, 1)) == Post::ok);
  const Wc wc = wait_wc(*p.b.cq);
  BOOST_TEST(wc.wr_id == 2u);
  BOOST_TEST(wc.byte_len == 6u);
}

BOOST_AUTO_TEST_CASE(create_refuses_what_the_limits_exclude) {
  Pair p(8, 64);
  QpInit init{.send_cq = p.a.cq.get(), .recv_cq = p.a.cq.get()};
  init.recv_depth = kMaxDepth + 1;
  BOOST_TEST(!p.a.pd->create_qp(init));
  init.recv_depth = kMaxDepth;
  BOOST_TEST(p.a.pd->create_qp(init).ok());
  BOOST_TEST(!p.a.device->create_pd(Path{999}));
  BOOST_TEST(!p.a.pd->map_extent(100));
}
