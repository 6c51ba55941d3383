// The driver contract of rdma_core/device.hpp, executable. Every driver passes it.
//
// Before the include, the test source defines what to run on:
//   using DeviceFixtures = std::tuple<SimIb, SimRnic>;      Fixtures as described in ends.hpp
// Cases branch on DeviceAttr, as callers do, never on a driver.
#pragma once

#include <errno.h>
#include <sys/epoll.h>
#include <sys/mman.h>
#include <unistd.h>

#include <array>
#include <random>
#include <tuple>
#include <vector>

#include "tests/conformance/ends.hpp"

namespace rdma::conformance {

namespace detail {

/// Every attribute that any move needs.
inline QpAttributes full_move(NodeType node, QpState to) {
  QpAttributes attr = move_to(to);
  attr.access = Access::local_write;
  attr.max_read_outstanding = 1;
  attr.max_read_incoming = 1;
  if (node == NodeType::rnic) {
    RnicQpAttributes rnic;
    rnic.mpa_markers = false;
    rnic.mpa_crc = true;
    rnic.stream_mode = false;
    rnic.peer = 0u;
    attr.transport = rnic;
  } else {
    IbQpAttributes ib;
    ib.pkey_index = std::uint16_t{0};
    ib.port = std::uint8_t{1};
    ib.dgid = Gid{};
    ib.dest_qpn = 0u;
    ib.rq_psn = 0u;
    ib.sq_psn = 0u;
    ib.path_mtu = std::uint8_t{4};
    ib.min_rnr_timer = std::uint8_t{0};
    ib.ack_timeout = std::uint8_t{14};
    ib.retry_count = std::uint8_t{6};
    ib.rnr_retry = std::uint8_t{7};
    attr.transport = ib;
  }
  return attr;
}

/// A Qp that no CM has touched.
template <class Fixture>
struct Unconnected {
  explicit Unconnected(Ends<Fixture>& ends) {
    End& e = ends.a;
    cq = Ends<Fixture>::must(e.device->create_cq(64, nullptr));
    QpInit init;
    init.send_cq = init.recv_cq = cq.get();
    init.send_depth = init.recv_depth = 4;
    qp = Ends<Fixture>::must(e.pd->create_qp(init));
  }
  std::unique_ptr<Cq> cq;
  std::unique_ptr<Qp> qp;
};

/// Edges of a descriptor, as the shim's epoll sets see them.
class EdgeWatch {
 public:
  explicit EdgeWatch(int fd) : epoll_(epoll_create1(EPOLL_CLOEXEC)) {
    epoll_event event{};
    event.events = EPOLLIN | EPOLLET;
    BOOST_REQUIRE_EQUAL(epoll_ctl(epoll_, EPOLL_CTL_ADD, fd, &event), 0);
    (void)edge();  // of what was there before
  }
  ~EdgeWatch() { close(epoll_); }
  EdgeWatch(const EdgeWatch&) = delete;
  EdgeWatch& operator=(const EdgeWatch&) = delete;
  bool edge() {
    epoll_event event{};
    return epoll_wait(epoll_, &event, 1, 0) == 1;
  }

 private:
  int epoll_;
};

/// Posts one RDMA request that the peer's memory must not allow, and sees it fail without an effect.
template <class F>
void expect_remote_access_error(WrOpcode opcode, const std::function<void(End& target, std::uint64_t& addr, Rkey& key)>& spoil) {
  Ends<F> ends;
  std::memset(ends.b.memory->addr, 0x11, ends.b.memory->length);
  ends.a.fill(3, 64, 1);
  std::uint64_t addr = ends.b.remote(ends.b.slot(2));
  Rkey key = ends.b.memory->rkey;
  spoil(ends.b, addr, key);
  const bool acknowledges = ends.before_refusal(ends.a);
  BOOST_REQUIRE_EQUAL(ends.a.post(opcode, 3, 64, 0, 5, addr, key), Post::ok);
  if (acknowledges) {
    const Wc wc = ends.wait_one(*ends.a.send_cq);  // unsignalled: errors complete all the same
    BOOST_TEST(wc.status == WcStatus::remote_access_error);
    BOOST_TEST(wc.wr_id == 5u);
    BOOST_TEST(ends.a.qp->state() == QpState::error);
  } else {
    ends.expect_the_end(ends.a);
  }
  BOOST_TEST(ends.a.holds(3, 64, 1));
  BOOST_TEST(std::all_of(ends.b.memory->addr, ends.b.memory->addr + ends.b.memory->length,
                         [](std::byte b) { return b == std::byte{0x11}; }));
  ends.settle();
}

}  // namespace detail

BOOST_AUTO_TEST_SUITE(device)

BOOST_AUTO_TEST_CASE_TEMPLATE(attributes_are_usable, F, DeviceFixtures) {
  Ends<F> ends;
  for (End* e : {&ends.a, &ends.b}) {
    const DeviceAttr& attr = e->device->attr();
    BOOST_TEST(e->device->name() != nullptr);
    BOOST_TEST(attr.max_send_wr >= 16u);
    BOOST_TEST(attr.max_recv_wr >= 16u);
    BOOST_TEST((attr.max_recv_wr & (attr.max_recv_wr - 1)) == 0u);
    BOOST_TEST(attr.max_sge >= 1u);
    BOOST_TEST(attr.max_sge_read >= 1u);
    BOOST_TEST(attr.max_read_outstanding >= 1u);
    BOOST_TEST(e->qp->max_inline() <= attr.max_inline);
    BOOST_TEST(e->qp->max_inline() >= std::min(attr.max_inline, 64u));
    if (attr.node_type == NodeType::rnic) {
      BOOST_TEST(attr.max_sge_read == 1u);
      BOOST_TEST(!attr.rnr_retry);
    }
  }
  BOOST_TEST(static_cast<int>(ends.a.device->attr().node_type) == static_cast<int>(ends.b.device->attr().node_type));
}

// --- memory

BOOST_AUTO_TEST_CASE_TEMPLATE(an_extent_is_zeroed_and_large_enough, F, DeviceFixtures) {
  Ends<F> ends;
  auto mr = Ends<F>::must(ends.a.pd->map_extent(3 * 4096));
  BOOST_TEST(mr->length >= 3u * 4096);
  BOOST_TEST(mr->length % 4096 == 0u);
  BOOST_TEST(reinterpret_cast<std::uintptr_t>(mr->addr) % 4096 == 0u);
  BOOST_TEST(std::all_of(mr->addr, mr->addr + mr->length, [](std::byte b) { return b == std::byte{0}; }));
  std::memset(mr->addr, 0x5A, mr->length);
}

BOOST_AUTO_TEST_CASE_TEMPLATE(illegal_sizes_are_refused, F, DeviceFixtures) {
  Ends<F> ends;
  BOOST_TEST(!ends.a.pd->map_extent(0));
  QpInit init;
  init.send_cq = ends.a.send_cq.get();
  init.recv_cq = ends.a.recv_cq.get();
  init.send_depth = ends.a.device->attr().max_send_wr + 1;
  BOOST_TEST(!ends.a.pd->create_qp(init));
  init.send_depth = 16;
  init.recv_depth = ends.a.device->attr().max_recv_wr + 1;
  BOOST_TEST(!ends.a.pd->create_qp(init));
  init.recv_depth = 16;
  init.send_cq = nullptr;
  BOOST_TEST(!ends.a.pd->create_qp(init));
}

// --- messages

BOOST_AUTO_TEST_CASE_TEMPLATE(a_message_arrives_whole_and_in_order, F, DeviceFixtures) {
  constexpr std::array<std::uint32_t, 10> kSizes = {1, 7, 8, 56, 64, 65, 0, 4096, kSlotBytes, 3};
  Ends<F> ends({.recvs = kSizes.size()});
  for (std::uint32_t i = 0; i < kSizes.size(); ++i) {
    ends.a.fill(i, kSizes[i], i);
    BOOST_REQUIRE_EQUAL(ends.a.send(i, kSizes[i], kSignalled | kSolicited, 100 + i), Post::ok);
  }
  const auto got = ends.wait(*ends.b.recv_cq, kSizes.size());
  const auto sent = ends.wait(*ends.a.send_cq, kSizes.size());
  BOOST_REQUIRE_EQUAL(got.size(), kSizes.size());
  BOOST_REQUIRE_EQUAL(sent.size(), kSizes.size());
  for (std::uint32_t i = 0; i < kSizes.size(); ++i) {
    BOOST_TEST(got[i].status == WcStatus::success);
    BOOST_TEST(got[i].opcode == WcOpcode::recv);
    BOOST_TEST(got[i].wr_id == i);
    BOOST_TEST(got[i].byte_len == kSizes[i]);
    BOOST_TEST((got[i].qpn == ends.b.qp->qpn()));
    BOOST_TEST(ends.b.holds(i, kSizes[i], i));
    BOOST_TEST(sent[i].status == WcStatus::success);
    BOOST_TEST(sent[i].opcode == WcOpcode::send);
    BOOST_TEST(sent[i].wr_id == 100 + i);
    BOOST_TEST((sent[i].qpn == ends.a.qp->qpn()));
  }
}

BOOST_AUTO_TEST_CASE_TEMPLATE(the_device_writes_only_prefix_and_buffer, F, DeviceFixtures) {
  Ends<F> ends;
  const std::uint32_t prefix = ends.b.device->attr().recv_prefix_bytes;
  BOOST_REQUIRE(prefix <= kSlotOffset);
  std::byte* const before = ends.b.slot(0) - kSlotOffset;
  std::memset(before, 0x3C, kSlotStride);
  constexpr std::uint32_t kPosted = 256;
  BOOST_REQUIRE_EQUAL(ends.b.post_recv(0, kPosted), Post::ok);
  ends.a.fill(0, 200, 9);
  BOOST_REQUIRE_EQUAL(ends.a.send(0, 200), Post::ok);
  BOOST_TEST(ends.wait_one(*ends.b.recv_cq).byte_len == 200u);
  BOOST_TEST(ends.b.holds(0, 200, 9));
  const auto untouched = [](const std::byte* from, std::size_t n) {
    return std::all_of(from, from + n, [](std::byte b) { return b == std::byte{0x3C}; });
  };
  BOOST_TEST(untouched(before, kSlotOffset - prefix));
  BOOST_TEST(untouched(ends.b.slot(0) + kPosted, 128));
  ends.wait_one(*ends.a.send_cq);
}

BOOST_AUTO_TEST_CASE_TEMPLATE(a_send_gathers_its_pieces, F, DeviceFixtures) {
  Ends<F> ends({.recvs = 1});
  if (ends.a.device->attr().max_sge < 3) return;
  ends.a.fill(0, 900, 5);
  const Lkey key = ends.a.memory->lkey;
  const std::array<Sge, 3> sges = {Sge{ends.a.slot(0), 16, key}, Sge{ends.a.slot(0) + 16, 1, key},
                                   Sge{ends.a.slot(0) + 17, 883, key}};
  SendWr wr;
  wr.wr_id = 4;
  wr.flags = kSignalled | kSolicited;
  wr.sges = sges.data();
  wr.sge_count = sges.size();
  BOOST_REQUIRE_EQUAL(ends.a.qp->post_send(wr), Post::ok);
  BOOST_TEST(ends.wait_one(*ends.b.recv_cq).byte_len == 900u);
  BOOST_TEST(ends.b.holds(0, 900, 5));
  BOOST_TEST(ends.wait_one(*ends.a.send_cq).wr_id == 4u);
}

BOOST_AUTO_TEST_CASE_TEMPLATE(inline_bytes_are_taken_at_the_post, F, DeviceFixtures) {
  Ends<F> ends({.recvs = 2});
  const std::uint32_t size = std::min(ends.a.qp->max_inline(), 64u);
  if (size == 0) return;
  std::vector<std::byte> own(size);
  for (unsigned round = 0; round < 2; ++round) {
    for (std::uint32_t k = 0; k < size; ++k) own[k] = End::pattern(round + 20, k);
    const Sge sge{own.data(), size, Lkey{0xDEAD}};  // registered nowhere
    SendWr wr;
    wr.flags = kInline | kSignalled | kSolicited;
    wr.sges = &sge;
    wr.sge_count = 1;
    BOOST_REQUIRE_EQUAL(ends.a.qp->post_send(wr), Post::ok);
    std::memset(own.data(), 0, size);
  }
  BOOST_TEST(ends.wait(*ends.b.recv_cq, 2).size() == 2u);
  BOOST_TEST(ends.b.holds(0, size, 20));
  BOOST_TEST(ends.b.holds(1, size, 21));
  BOOST_TEST(ends.wait(*ends.a.send_cq, 2).size() == 2u);
}

BOOST_AUTO_TEST_CASE_TEMPLATE(an_unsignalled_send_completes_silently, F, DeviceFixtures) {
  Ends<F> ends({.recvs = 3});
  BOOST_REQUIRE_EQUAL(ends.a.send(0, 10, 0, 1), Post::ok);
  BOOST_REQUIRE_EQUAL(ends.a.send(1, 10, kSignalled, 2), Post::ok);
  BOOST_REQUIRE_EQUAL(ends.a.send(2, 10, 0, 3), Post::ok);
  BOOST_TEST(ends.wait(*ends.b.recv_cq, 3).size() == 3u);
  ends.settle();
  const auto sent = ends.wait(*ends.a.send_cq, 1);
  BOOST_REQUIRE_EQUAL(sent.size(), 1u);
  BOOST_TEST(sent[0].wr_id == 2u);
  ends.settle();
  BOOST_TEST(!ends.a.send_cq->maybe_ready());
}

BOOST_AUTO_TEST_CASE_TEMPLATE(traffic_in_both_directions_keeps_order_and_content, F, DeviceFixtures) {
  constexpr std::uint32_t kMessages = 600;
  constexpr std::uint32_t kBuffers = 12;
  Ends<F> ends({.send_depth = 16, .recv_depth = 16, .recvs = kBuffers});
  std::mt19937 random(42);
  struct Way {
    End* from;
    End* to;
    std::uint32_t sent = 0, received = 0, credits = kBuffers, busy = 0;
    std::vector<std::uint32_t> sizes;
  };
  std::array<Way, 2> ways = {Way{&ends.a, &ends.b}, Way{&ends.b, &ends.a}};
  bool intact = true;
  const auto advance = [&](Way& way) {
    // Each side keeps four buffers for sending, and no more messages on the way than the peer has receives posted.
    while (way.sent < kMessages && way.credits > 0 && way.busy < 4) {
      const std::uint32_t slot = 20 + way.sent % 4;
      const std::uint32_t size =
          random() % 3 == 0 ? static_cast<std::uint32_t>(random() % kSlotBytes) : static_cast<std::uint32_t>(random() % 64);
      way.from->fill(slot, size, way.sent);
      if (way.from->send(slot, size, kSignalled | kSolicited, way.sent) != Post::ok) break;
      way.sizes.push_back(size);
      ++way.sent;
      ++way.busy;
      --way.credits;
    }
    Wc wc[8];
    for (unsigned n = way.from->send_cq->poll(wc); n > 0; --n) --way.busy;
    const unsigned n = way.to->recv_cq->poll(wc);
    for (unsigned i = 0; i < n; ++i) {
      const auto slot = static_cast<std::uint32_t>(wc[i].wr_id);
      intact = intact && wc[i].status == WcStatus::success && wc[i].byte_len == way.sizes[way.received] &&
               way.to->holds(slot, wc[i].byte_len, way.received);
      ++way.received;
      if (way.to->post_recv(slot) == Post::ok) ++way.credits;
    }
  };
  ends.wait_until([&] {
    advance(ways[0]);
    if (ways[0].received > 0) advance(ways[1]);
    return !intact || (ways[0].received == kMessages && ways[1].received == kMessages && ways[0].busy == 0 && ways[1].busy == 0);
  });
  BOOST_TEST(intact);
  BOOST_TEST(ways[0].received == kMessages);
  BOOST_TEST(ways[1].received == kMessages);
}

// --- RDMA

BOOST_AUTO_TEST_CASE_TEMPLATE(an_rdma_write_lands_before_the_send_behind_it, F, DeviceFixtures) {
  Ends<F> ends({.recvs = 1});
  ends.a.fill(4, 5000, 3);
  ends.a.fill(5, 8, 4);
  std::memset(ends.b.slot(9), 0, kSlotBytes);
  BOOST_REQUIRE_EQUAL(ends.a.post(WrOpcode::rdma_write, 4, 5000, 0, 1, ends.b.remote(ends.b.slot(9)), ends.b.memory->rkey),
                      Post::ok);
  BOOST_REQUIRE_EQUAL(ends.a.send(5, 8, kSignalled | kSolicited, 2), Post::ok);
  BOOST_TEST(ends.wait_one(*ends.b.recv_cq).byte_len == 8u);
  BOOST_TEST(ends.b.holds(9, 5000, 3));
  BOOST_TEST((ends.b.slot(9)[5000] == std::byte{0}));
  BOOST_TEST(ends.wait_one(*ends.a.send_cq).wr_id == 2u);
}

BOOST_AUTO_TEST_CASE_TEMPLATE(an_rdma_read_fetches_the_peers_bytes, F, DeviceFixtures) {
  Ends<F> ends;
  ends.b.fill(7, 6000, 8);
  std::memset(ends.a.slot(3), 0, kSlotBytes);
  BOOST_REQUIRE_EQUAL(ends.a.post(WrOpcode::rdma_read, 3, 6000, kSignalled, 31, ends.b.remote(ends.b.slot(7)), ends.b.memory->rkey),
                      Post::ok);
  const Wc wc = ends.wait_one(*ends.a.send_cq);
  BOOST_TEST(wc.status == WcStatus::success);
  BOOST_TEST(wc.opcode == WcOpcode::rdma_read);
  BOOST_TEST(wc.byte_len == 6000u);
  BOOST_TEST(wc.wr_id == 31u);
  BOOST_TEST(ends.a.holds(3, 6000, 8));
  BOOST_TEST((ends.a.slot(3)[6000] == std::byte{0}));
}

BOOST_AUTO_TEST_CASE_TEMPLATE(reads_beyond_the_outstanding_limit_wait_their_turn, F, DeviceFixtures) {
  Ends<F> ends;
  const std::uint32_t reads = std::min(ends.a.device->attr().max_read_outstanding + 3, 14u);
  for (std::uint32_t i = 0; i < reads; ++i) {
    ends.b.fill(i, 100, 60 + i);
    BOOST_REQUIRE_EQUAL(ends.a.post(WrOpcode::rdma_read, i, 100, kSignalled, i, ends.b.remote(ends.b.slot(i)), ends.b.memory->rkey),
                        Post::ok);
  }
  const auto done = ends.wait(*ends.a.send_cq, reads);
  BOOST_REQUIRE_EQUAL(done.size(), reads);
  for (std::uint32_t i = 0; i < reads; ++i) {
    BOOST_TEST(done[i].wr_id == i);
    BOOST_TEST(ends.a.holds(i, 100, 60 + i));
  }
}

BOOST_AUTO_TEST_CASE_TEMPLATE(a_read_completes_once_whatever_is_posted_behind_it, F, DeviceFixtures) {
  constexpr std::uint32_t kSends = 12, kReads = 2;
  Ends<F> ends({.recvs = kSends});
  for (std::uint32_t round = 0; round < 4; ++round) {
    for (std::uint32_t i = 0; i < kReads; ++i) {
      ends.b.fill(20 + i, kSlotBytes, 60 + round + i);
      BOOST_REQUIRE_EQUAL(ends.a.post(WrOpcode::rdma_read, 20 + i, kSlotBytes, kSignalled, 100 + i,
                                      ends.b.remote(ends.b.slot(20 + i)), ends.b.memory->rkey),
                          Post::ok);
    }
    for (std::uint32_t i = 0; i < kSends; ++i) BOOST_REQUIRE_EQUAL(ends.a.send(i, 8, kSignalled, i), Post::ok);
    BOOST_TEST(ends.wait(*ends.b.recv_cq, kSends).size() == kSends);
    const auto done = ends.wait(*ends.a.send_cq, kSends + kReads);
    BOOST_REQUIRE_EQUAL(done.size(), kSends + kReads);
    std::uint32_t sends = 0, reads = 0;
    for (const Wc& wc : done) {
      BOOST_TEST(wc.status == WcStatus::success);
      if (wc.opcode == WcOpcode::rdma_read)
        BOOST_TEST(wc.wr_id == 100 + reads++);
      else
        BOOST_TEST(wc.wr_id == sends++);
    }
    BOOST_TEST(reads == kReads);
    for (std::uint32_t i = 0; i < kReads; ++i) BOOST_TEST(ends.a.holds(20 + i, kSlotBytes, 60 + round + i));
    for (std::uint32_t i = 0; i < kSends; ++i) BOOST_REQUIRE_EQUAL(ends.b.post_recv(i), Post::ok);
  }
}

BOOST_AUTO_TEST_CASE_TEMPLATE(a_fenced_send_starts_after_the_reads_before_it, F, DeviceFixtures) {
  Ends<F> ends({.recvs = 1});
  ends.b.fill(7, 3000, 8);
  BOOST_REQUIRE_EQUAL(ends.a.post(WrOpcode::rdma_read, 3, 3000, kSignalled, 1, ends.b.remote(ends.b.slot(7)), ends.b.memory->rkey),
                      Post::ok);
  BOOST_REQUIRE_EQUAL(ends.a.send(4, 8, kSignalled | kFence, 2), Post::ok);
  // When the peer has the Send, the Read is over: changing the source now must not be seen.
  BOOST_TEST(ends.wait_one(*ends.b.recv_cq).byte_len == 8u);
  std::memset(ends.b.slot(7), 0, 3000);
  const auto done = ends.wait(*ends.a.send_cq, 2);
  BOOST_REQUIRE_EQUAL(done.size(), 2u);
  BOOST_TEST(done[0].wr_id == 1u);
  BOOST_TEST(done[1].wr_id == 2u);
  BOOST_TEST(ends.a.holds(3, 3000, 8));
}

BOOST_AUTO_TEST_CASE_TEMPLATE(rdma_outside_of_the_region_fails, F, DeviceFixtures) {
  using Spoil = std::function<void(End&, std::uint64_t&, Rkey&)>;
  const Spoil spoils[] = {
      [](End& e, std::uint64_t& addr, Rkey&) { addr = e.memory->remote_base - 1; },
      [](End& e, std::uint64_t& addr, Rkey&) { addr = e.memory->remote_base + e.memory->length - 63; },
      [](End& e, std::uint64_t& addr, Rkey&) { addr = e.memory->remote_base + e.memory->length + 4096; },
      [](End&, std::uint64_t& addr, Rkey&) { addr = ~std::uint64_t{0} - 10; },  // wraps round
      [](End&, std::uint64_t& addr, Rkey&) { addr = 0; },
      [](End&, std::uint64_t&, Rkey& key) { key = Rkey{static_cast<std::uint32_t>(key) ^ 0x00F0'0000u}; },
      [](End&, std::uint64_t&, Rkey& key) { key = Rkey{0}; },
      [](End&, std::uint64_t&, Rkey& key) { key = Rkey{0xFFFF'FFFF}; },
  };
  for (const Spoil& spoil : spoils)
    for (WrOpcode opcode : {WrOpcode::rdma_write, WrOpcode::rdma_read}) detail::expect_remote_access_error<F>(opcode, spoil);
}

/// A known fault of a device: its Fixture says so, and the case sees that it is still there.
template <class F>
constexpr bool serves_any_read() {
  if constexpr (requires { F::kServesAnyRead; })
    return F::kServesAnyRead;
  else
    return false;
}

BOOST_AUTO_TEST_CASE_TEMPLATE(rdma_needs_the_right_permission, F, DeviceFixtures) {
  for (WrOpcode opcode : {WrOpcode::rdma_write, WrOpcode::rdma_read}) {
    const bool read = opcode == WrOpcode::rdma_read;
    for (const bool allowed : {false, true}) {
      BOOST_TEST_INFO_SCOPE((read ? "read" : "write") << (allowed ? ", allowed" : ", not allowed"));
      Ends<F> ends;
      const bool served = allowed || (read && serves_any_read<F>());
      Access access = Access::local_write;
      if (allowed == read) access = access | Access::remote_read;
      if (allowed != read) access = access | Access::remote_write;
      auto region = Ends<F>::must(ends.b.pd->register_memory({ends.b.slot(6), 1024}, access));
      std::memset(ends.b.slot(6), 0x22, 1024);
      ends.a.fill(3, 64, 1);
      const bool acknowledges = ends.before_refusal(ends.a);
      BOOST_REQUIRE_EQUAL(ends.a.post(opcode, 3, 64, kSignalled, 5, region->remote_base, region->rkey), Post::ok);
      if (served)
        BOOST_TEST(ends.wait_one(*ends.a.send_cq).status == WcStatus::success);
      else if (acknowledges)
        BOOST_TEST(ends.wait_one(*ends.a.send_cq).status == WcStatus::remote_access_error);
      else
        ends.expect_the_end(ends.a);
      if (!allowed) BOOST_TEST((ends.b.slot(6)[0] == std::byte{0x22}));
      ends.settle();
      ends.b.qp.reset();
    }
  }
}

BOOST_AUTO_TEST_CASE_TEMPLATE(a_region_that_is_gone_is_out_of_reach, F, DeviceFixtures) {
  Ends<F> ends;
  auto region = Ends<F>::must(ends.b.pd->map_extent(4096));
  const std::uint64_t base = region->remote_base;
  const Rkey key = region->rkey;
  BOOST_REQUIRE_EQUAL(ends.a.post(WrOpcode::rdma_write, 3, 64, kSignalled, 1, base, key), Post::ok);
  BOOST_TEST(ends.wait_one(*ends.a.send_cq).status == WcStatus::success);
  region.reset();
  const bool acknowledges = ends.before_refusal(ends.a);
  BOOST_REQUIRE_EQUAL(ends.a.post(WrOpcode::rdma_write, 3, 64, kSignalled, 2, base, key), Post::ok);
  if (acknowledges)
    BOOST_TEST(ends.wait_one(*ends.a.send_cq).status == WcStatus::remote_access_error);
  else
    ends.expect_the_end(ends.a);
  ends.settle();
}

// --- errors

BOOST_AUTO_TEST_CASE_TEMPLATE(a_wrong_lkey_fails_locally, F, DeviceFixtures) {
  Ends<F> ends({.recvs = 1});
  const Sge sge{ends.a.slot(0), 100, Lkey{0x00FF'FF00}};
  SendWr wr;
  wr.wr_id = 9;
  wr.sges = &sge;
  wr.sge_count = 1;
  BOOST_REQUIRE_EQUAL(ends.a.qp->post_send(wr), Post::ok);
  const Wc wc = ends.wait_one(*ends.a.send_cq);
  BOOST_TEST((wc.status == WcStatus::local_protection_error || wc.status == WcStatus::flushed));  // Soft-RoCE flushes it
  BOOST_TEST(wc.wr_id == 9u);
  BOOST_TEST(ends.a.qp->state() == QpState::error);
  ends.settle();
  Wc left[4];
  for (unsigned n = ends.b.recv_cq->poll(left); n > 0; --n) BOOST_TEST(left[n - 1].status == WcStatus::flushed);
}

BOOST_AUTO_TEST_CASE_TEMPLATE(a_message_longer_than_the_buffer_fails_at_both_ends, F, DeviceFixtures) {
  Ends<F> ends;
  BOOST_REQUIRE_EQUAL(ends.b.post_recv(0, 100), Post::ok);
  BOOST_REQUIRE_EQUAL(ends.b.post_recv(1, 100), Post::ok);
  std::memset(ends.b.slot(0) + 100, 0x44, 200);
  const bool acknowledges = ends.before_refusal(ends.a);
  BOOST_REQUIRE_EQUAL(ends.a.send(0, 101, kSolicited, 3), Post::ok);
  const auto got = ends.wait(*ends.b.recv_cq, 2);
  BOOST_REQUIRE_EQUAL(got.size(), 2u);
  BOOST_TEST(got[0].status == WcStatus::local_length_error);
  BOOST_TEST(got[0].wr_id == 0u);
  BOOST_TEST(got[1].status == WcStatus::flushed);
  BOOST_TEST(got[1].wr_id == 1u);
  if (acknowledges) {
    const Wc wc = ends.wait_one(*ends.a.send_cq);
    BOOST_TEST(wc.status == WcStatus::remote_invalid_request);
    BOOST_TEST(wc.wr_id == 3u);
    BOOST_TEST(ends.a.qp->state() == QpState::error);
  } else {
    ends.expect_the_end(ends.a);
  }
  BOOST_TEST(ends.b.qp->state() == QpState::error);
  for (std::uint32_t i = 100; i < 300; ++i) BOOST_REQUIRE(ends.b.slot(0)[i] == std::byte{0x44});
}

BOOST_AUTO_TEST_CASE_TEMPLATE(a_send_without_a_posted_receive_waits_or_fails, F, DeviceFixtures) {
  Ends<F> ends;
  ends.a.fill(0, 50, 2);
  const bool acknowledges = ends.before_refusal(ends.a);
  BOOST_REQUIRE_EQUAL(ends.a.send(0, 50, kSignalled | kSolicited, 1), Post::ok);
  ends.settle();
  if (ends.a.device->attr().rnr_retry) {
    BOOST_TEST(!ends.a.send_cq->maybe_ready());
    BOOST_REQUIRE_EQUAL(ends.b.post_recv(4), Post::ok);
    BOOST_TEST(ends.wait_one(*ends.b.recv_cq).status == WcStatus::success);
    BOOST_TEST(ends.b.holds(4, 50, 2));
    BOOST_TEST(ends.wait_one(*ends.a.send_cq).status == WcStatus::success);
  } else if (!acknowledges) {
    ends.expect_the_end(ends.a);
  } else {
    BOOST_TEST(ends.wait_one(*ends.a.send_cq).status == WcStatus::rnr_retry_exceeded);
    BOOST_TEST(ends.a.qp->state() == QpState::error);
    BOOST_TEST(ends.a.send(0, 50) == Post::qp_error);
  }
}

BOOST_AUTO_TEST_CASE_TEMPLATE(the_move_to_error_flushes_everything_once, F, DeviceFixtures) {
  Ends<F> ends({.recvs = 10});
  BOOST_REQUIRE(ends.a.qp->modify(move_to(QpState::error)));
  BOOST_TEST(ends.a.qp->state() == QpState::error);
  const auto got = ends.wait(*ends.a.recv_cq, 10);
  BOOST_REQUIRE_EQUAL(got.size(), 10u);
  for (std::uint32_t i = 0; i < 10; ++i) {
    BOOST_TEST(got[i].status == WcStatus::flushed);
    BOOST_TEST(got[i].opcode == WcOpcode::recv);
    BOOST_TEST(got[i].wr_id == i);
  }
  BOOST_TEST(ends.a.send(0, 8) == Post::qp_error);
  BOOST_TEST(ends.a.post_recv(0) == Post::qp_error);
  ends.settle();
  Wc wc[4];
  BOOST_TEST(ends.a.recv_cq->poll(wc) == 0u);
  BOOST_TEST(ends.a.send_cq->poll(wc) == 0u);
  BOOST_TEST(!ends.a.recv_cq->maybe_ready());
  ends.b.qp.reset();
}

BOOST_AUTO_TEST_CASE_TEMPLATE(requests_under_way_when_the_error_comes_complete_once_and_in_order, F, DeviceFixtures) {
  constexpr std::uint32_t kPosted = 8;
  Ends<F> ends({.recvs = 12});
  for (std::uint32_t i = 0; i < kPosted; ++i) BOOST_REQUIRE_EQUAL(ends.a.send(i, 100, (i % 2) != 0 ? kSignalled : 0, i), Post::ok);
  BOOST_REQUIRE(ends.a.qp->modify(move_to(QpState::error)));
  ends.settle();
  Wc wc[32];
  const unsigned n = ends.a.send_cq->poll(wc);
  // Successes first (signalled ones only), then flushes of every one that is left.
  std::uint32_t next = 0;
  bool flushing = false;
  for (unsigned i = 0; i < n; ++i) {
    if (wc[i].status == WcStatus::success) {
      BOOST_TEST(!flushing);
      BOOST_TEST(wc[i].wr_id % 2 == 1u);
      next = static_cast<std::uint32_t>(wc[i].wr_id) + 1;
      continue;
    }
    BOOST_TEST(wc[i].status == WcStatus::flushed);
    if (!flushing && next % 2 == 0 && wc[i].wr_id == next + 1) ++next;  // an unsignalled success before it
    BOOST_TEST(wc[i].wr_id == next++);
    flushing = true;
  }
  BOOST_TEST(next >= kPosted - 1);
  BOOST_TEST(ends.a.send_cq->poll(wc) == 0u);
  BOOST_TEST(ends.wait(*ends.a.recv_cq, 12).size() == 12u);
  ends.b.qp.reset();
}

BOOST_AUTO_TEST_CASE_TEMPLATE(a_peer_in_error_is_noticed_by_the_next_send, F, DeviceFixtures) {
  Ends<F> ends({.recvs = 3});
  BOOST_REQUIRE(ends.b.qp->modify(move_to(QpState::error)));
  BOOST_TEST(ends.wait(*ends.b.recv_cq, 3).size() == 3u);
  // Refused at once, or accepted and completed with an error: never lost in silence.
  const Post post = ends.a.send(0, 20, kSolicited, 8);
  if (post != Post::ok) {
    BOOST_TEST(post == Post::qp_error);
  } else if (ends.a.device->attr().acknowledges) {
    const Wc wc = ends.wait_one(*ends.a.send_cq);
    BOOST_TEST(wc.status != WcStatus::success);
    BOOST_TEST(wc.wr_id == 8u);
  }
  const auto flushed = ends.wait(*ends.a.recv_cq, 3);
  BOOST_REQUIRE_EQUAL(flushed.size(), 3u);
  BOOST_TEST(ends.a.qp->state() == QpState::error);
  for (const Wc& wc : flushed) BOOST_TEST(wc.status == WcStatus::flushed);
}

BOOST_AUTO_TEST_CASE_TEMPLATE(messages_that_arrived_before_the_error_are_delivered, F, DeviceFixtures) {
  Ends<F> ends({.recvs = 4});
  for (std::uint32_t i = 0; i < 2; ++i) {
    ends.a.fill(i, 30, i);
    BOOST_REQUIRE_EQUAL(ends.a.send(i, 30), Post::ok);
  }
  BOOST_TEST(ends.wait(*ends.a.send_cq, 2).size() == 2u);
  if (!ends.a.device->attr().acknowledges) ends.settle();  // else: done at the sender, placed at the receiver
  BOOST_REQUIRE(ends.b.qp->modify(move_to(QpState::error)));
  const auto got = ends.wait(*ends.b.recv_cq, 4);
  BOOST_REQUIRE_EQUAL(got.size(), 4u);
  for (std::uint32_t i = 0; i < 4; ++i) {
    BOOST_TEST(got[i].wr_id == i);
    BOOST_TEST(got[i].status == (i < 2 ? WcStatus::success : WcStatus::flushed));
  }
  BOOST_TEST(ends.b.holds(1, 30, 1));
  ends.a.qp.reset();
}

BOOST_AUTO_TEST_CASE_TEMPLATE(a_destroyed_qp_gives_its_buffers_back_at_once, F, DeviceFixtures) {
  Ends<F> ends({.recvs = 5});
  ends.break_the_ice();
  ends.b.qp.reset();
  std::memset(ends.b.memory->addr, 0x66, ends.b.memory->length);
  Wc wc[8];
  BOOST_TEST(ends.b.recv_cq->poll(wc) == 0u);
  (void)ends.a.send(0, 64, kSolicited, 1);  // whatever becomes of it, it does not land there
  ends.settle();
  BOOST_TEST(ends.b.recv_cq->poll(wc) == 0u);
  BOOST_TEST(std::all_of(ends.b.memory->addr, ends.b.memory->addr + ends.b.memory->length,
                         [](std::byte b) { return b == std::byte{0x66}; }));
  (void)ends.a.send_cq->poll(wc);
  (void)ends.a.recv_cq->poll(wc);
}

// --- back-pressure

BOOST_AUTO_TEST_CASE_TEMPLATE(a_full_send_queue_pushes_back_and_recovers, F, DeviceFixtures) {
  Ends<F> ends({.send_depth = 8});
  std::uint64_t accepted = 0, completed = 0;
  const auto fill_up = [&] {
    for (;;) {
      const Post post =
          ends.a.post(WrOpcode::rdma_write, 0, 64, kSignalled, accepted, ends.b.remote(ends.b.slot(1)), ends.b.memory->rkey);
      if (post != Post::ok) return post;
      ++accepted;
      if (accepted > 100'000) return post;
    }
  };
  for (int round = 1; round <= 3; ++round) {
    BOOST_REQUIRE_EQUAL(fill_up(), Post::queue_full);
    BOOST_TEST(accepted >= 8u * static_cast<unsigned>(round));
    BOOST_TEST(ends.a.qp->state() == QpState::rts);
    const auto done = ends.wait(*ends.a.send_cq, accepted - completed);
    BOOST_REQUIRE_EQUAL(done.size(), accepted - completed);
    for (const Wc& wc : done) {
      BOOST_TEST(wc.status == WcStatus::success);
      BOOST_TEST(wc.wr_id == completed++);
    }
  }
}

BOOST_AUTO_TEST_CASE_TEMPLATE(a_full_receive_queue_takes_all_of_a_batch_or_none, F, DeviceFixtures) {
  Ends<F> ends({.recv_depth = 8, .recvs = 6});
  std::array<RecvWr, 3> batch;
  for (std::uint32_t i = 0; i < 3; ++i) batch[i] = {6 + i, ends.a.slot(6 + i), 256, ends.a.memory->lkey};
  BOOST_TEST(ends.a.qp->post_recv(batch) == Post::queue_full);
  BOOST_TEST(ends.a.qp->post_recv(std::span(batch).first(2)) == Post::ok);
  BOOST_TEST(ends.a.qp->post_recv(std::span(batch).last(1)) == Post::queue_full);
  BOOST_REQUIRE(ends.a.qp->modify(move_to(QpState::error)));
  BOOST_TEST(ends.wait(*ends.a.recv_cq, 8).size() == 8u);
  BOOST_TEST(!ends.a.recv_cq->maybe_ready());
}

// --- waking

BOOST_AUTO_TEST_CASE_TEMPLATE(an_armed_cq_announces_the_next_message_once_by_its_word, F, DeviceFixtures) {
  Ends<F> ends({.recvs = 4});
  Cq& cq = *ends.b.recv_cq;
  std::atomic<std::uint32_t>* word = cq.wake_word();
  if (word == nullptr) return;
  const std::uint32_t start = word->load();
  BOOST_REQUIRE_EQUAL(ends.a.send(0, 8), Post::ok);  // not armed: no announcement
  ends.wait_one(cq);
  BOOST_TEST(word->load() == start);

  cq.arm(kWakeWord);
  ends.b.device->arm_fence();
  BOOST_TEST(!cq.maybe_ready());
  BOOST_REQUIRE_EQUAL(ends.a.send(1, 8), Post::ok);
  ends.wait_until([&] { return cq.maybe_ready(); });
  ends.settle();
  ends.b.channel->progress();
  const std::uint32_t woken = word->load();
  BOOST_TEST(woken != start);
  BOOST_REQUIRE_EQUAL(ends.a.send(2, 8), Post::ok);  // one announcement for one arm
  BOOST_TEST(ends.wait(cq, 2).size() == 2u);
  ends.b.channel->progress();
  BOOST_TEST(word->load() == woken);

  cq.arm(kWakeWord);
  ends.b.device->arm_fence();
  cq.disarm();
  BOOST_REQUIRE_EQUAL(ends.a.send(3, 8), Post::ok);
  ends.wait_one(cq);
  ends.b.channel->progress();
  BOOST_TEST(word->load() == woken);

  cq.wake_sleepers();
  BOOST_TEST(word->load() != woken);
  BOOST_TEST(ends.wait(*ends.a.send_cq, 4).size() == 4u);
}

BOOST_AUTO_TEST_CASE_TEMPLATE(an_armed_cq_announces_the_next_message_once_by_its_channel, F, DeviceFixtures) {
  Ends<F> ends({.recvs = 4});
  Cq& cq = *ends.b.recv_cq;
  detail::EdgeWatch watch(ends.b.channel->fd());
  BOOST_REQUIRE_EQUAL(ends.a.send(0, 8), Post::ok);
  ends.wait_one(cq);
  BOOST_TEST(!watch.edge());

  for (std::uint32_t i = 1; i < 3; ++i) {  // every announcement is an edge of its own
    cq.arm(kWakeChannel);
    ends.b.device->arm_fence();
    BOOST_TEST(!watch.edge());
    BOOST_REQUIRE_EQUAL(ends.a.send(i, 8), Post::ok);
    ends.wait_until([&] { return cq.maybe_ready(); });
    ends.settle();
    BOOST_TEST(watch.edge());
    ends.b.channel->progress();
    ends.wait_one(cq);
    BOOST_TEST(!watch.edge());
  }
  BOOST_REQUIRE_EQUAL(ends.a.send(3, 8), Post::ok);
  ends.wait_one(cq);
  BOOST_TEST(!watch.edge());
  ends.b.channel->ring();
  BOOST_TEST(watch.edge());
  BOOST_TEST(ends.wait(*ends.a.send_cq, 4).size() == 4u);
}

BOOST_AUTO_TEST_CASE_TEMPLATE(who_sleeps_on_the_word_is_woken_by_whoever_watches_the_channel, F, DeviceFixtures) {
  Ends<F> ends({.recvs = 2});
  Cq& cq = *ends.b.recv_cq;
  std::atomic<std::uint32_t>* word = cq.wake_word();
  if (word == nullptr) return;
  for (std::uint32_t i = 0; i < 2; ++i) {
    const std::uint32_t before = word->load();
    cq.arm(kWakeWord);
    ends.b.device->arm_fence();
    BOOST_REQUIRE_EQUAL(ends.a.send(i, 8), Post::ok);
    ends.wait_one(cq);
    ends.wait_until([&] {
      ends.b.channel->progress();
      return word->load() != before;
    });
    BOOST_TEST(word->load() != before);
  }
  BOOST_TEST(ends.wait(*ends.a.send_cq, 2).size() == 2u);
}

BOOST_AUTO_TEST_CASE_TEMPLATE(both_kinds_of_sleeper_are_woken, F, DeviceFixtures) {
  Ends<F> ends({.recvs = 1});
  Cq& cq = *ends.b.recv_cq;
  detail::EdgeWatch watch(ends.b.channel->fd());
  std::atomic<std::uint32_t>* word = cq.wake_word();
  const std::uint32_t start = word != nullptr ? word->load() : 0;
  cq.arm(kWakeWord);
  cq.arm(kWakeChannel);  // added to the kind before
  ends.b.device->arm_fence();
  BOOST_REQUIRE_EQUAL(ends.a.send(0, 8), Post::ok);
  ends.wait_one(cq);
  ends.settle();
  BOOST_TEST(watch.edge());
  ends.b.channel->progress();
  if (word != nullptr) BOOST_TEST(word->load() != start);
  ends.wait_one(*ends.a.send_cq);
}

BOOST_AUTO_TEST_CASE_TEMPLATE(what_came_before_the_fence_is_seen_by_the_last_look, F, DeviceFixtures) {
  Ends<F> ends({.recvs = 1});
  BOOST_REQUIRE_EQUAL(ends.a.send(0, 8), Post::ok);
  ends.wait_until([&] { return ends.b.recv_cq->maybe_ready(); });
  ends.b.recv_cq->arm(kWakeWord | kWakeChannel);
  ends.b.device->arm_fence();
  BOOST_TEST(ends.b.recv_cq->maybe_ready());
  ends.b.recv_cq->disarm();
  ends.wait_one(*ends.b.recv_cq);
  ends.wait_one(*ends.a.send_cq);
}

BOOST_AUTO_TEST_CASE_TEMPLATE(own_completions_and_flushes_announce_too, F, DeviceFixtures) {
  Ends<F> ends({.recvs = 1});
  detail::EdgeWatch watch(ends.a.channel->fd());
  ends.a.send_cq->arm(kWakeChannel);
  ends.a.device->arm_fence();
  BOOST_REQUIRE_EQUAL(ends.a.send(0, 8), Post::ok);
  ends.wait_one(*ends.a.send_cq);
  BOOST_TEST(watch.edge());
  ends.wait_one(*ends.b.recv_cq);

  ends.a.recv_cq->arm(kWakeChannel);
  ends.a.device->arm_fence();
  BOOST_REQUIRE(ends.a.qp->modify(move_to(QpState::error)));
  ends.wait_one(*ends.a.recv_cq);
  ends.settle();
  BOOST_TEST(watch.edge());
  ends.b.qp.reset();
}

BOOST_AUTO_TEST_CASE_TEMPLATE(a_solicited_rdma_write_wakes_where_the_device_says_so, F, DeviceFixtures) {
  Ends<F> ends;
  if (!ends.b.device->attr().rdma_write_wakes) return;
  detail::EdgeWatch watch(ends.b.channel->fd());
  const auto write = [&](std::uint8_t flags) {
    ends.b.recv_cq->arm(kWakeChannel);
    ends.b.device->arm_fence();
    BOOST_REQUIRE_EQUAL(ends.a.post(WrOpcode::rdma_write, 0, 8, static_cast<std::uint8_t>(flags | kSignalled), 1,
                                    ends.b.remote(ends.b.slot(1)), ends.b.memory->rkey),
                        Post::ok);
    ends.wait_one(*ends.a.send_cq);
    ends.settle();
  };
  write(0);
  BOOST_TEST(!watch.edge());
  write(kSolicited);
  BOOST_TEST(watch.edge());
  BOOST_TEST(!ends.b.recv_cq->maybe_ready());  // it wakes, it completes nothing there
}

// --- states

BOOST_AUTO_TEST_CASE_TEMPLATE(a_fresh_qp_moves_as_the_table_says, F, DeviceFixtures) {
  Ends<F> ends;
  const NodeType node = ends.a.device->attr().node_type;
  for (QpState to : {QpState::reset, QpState::init, QpState::rtr, QpState::rts, QpState::sqd, QpState::error}) {
    detail::Unconnected<F> fresh(ends);
    BOOST_TEST(fresh.qp->state() == QpState::reset);
    const auto moved = fresh.qp->modify(detail::full_move(node, to));
    BOOST_TEST(moved.ok() == legal_move(node, QpState::reset, to));
    BOOST_TEST(fresh.qp->state() == (moved ? to : QpState::reset));
    if (!moved) BOOST_TEST(moved.error().code == EINVAL);
  }
}

BOOST_AUTO_TEST_CASE_TEMPLATE(a_connected_qp_refuses_illegal_moves_and_stays, F, DeviceFixtures) {
  Ends<F> ends({.recvs = 2});
  const NodeType node = ends.a.device->attr().node_type;
  for (QpState to : {QpState::init, QpState::rtr}) {
    const auto moved = ends.a.qp->modify(detail::full_move(node, to));
    BOOST_TEST(!moved);
    BOOST_TEST(ends.a.qp->state() == QpState::rts);
  }
  ends.break_the_ice();
  Wc wc[8];
  (void)ends.b.recv_cq->poll(wc);
}

BOOST_AUTO_TEST_CASE_TEMPLATE(missing_and_foreign_attributes_are_refused, F, DeviceFixtures) {
  Ends<F> ends;
  const NodeType node = ends.a.device->attr().node_type;
  detail::Unconnected<F> fresh(ends);
  BOOST_TEST(!fresh.qp->modify(move_to(QpState::init)));
  const NodeType other = node == NodeType::rnic ? NodeType::ib_ca : NodeType::rnic;
  BOOST_TEST(!fresh.qp->modify(detail::full_move(other, QpState::init)));
  BOOST_TEST(fresh.qp->state() == QpState::reset);
  BOOST_TEST(fresh.qp->modify(detail::full_move(node, QpState::init)).ok());
}

BOOST_AUTO_TEST_CASE_TEMPLATE(only_a_connected_qp_sends, F, DeviceFixtures) {
  Ends<F> ends;
  const NodeType node = ends.a.device->attr().node_type;
  detail::Unconnected<F> fresh(ends);
  const Sge sge{ends.a.slot(0), 8, ends.a.memory->lkey};
  SendWr wr;
  wr.sges = &sge;
  wr.sge_count = 1;
  BOOST_TEST(fresh.qp->post_send(wr) == Post::qp_error);
  BOOST_REQUIRE(fresh.qp->modify(detail::full_move(node, QpState::init)));
  BOOST_TEST(fresh.qp->post_send(wr) == Post::qp_error);
  const RecvWr recv{1, ends.a.slot(1), 64, ends.a.memory->lkey};
  BOOST_TEST(fresh.qp->post_recv({&recv, 1}) == Post::ok);
}

BOOST_AUTO_TEST_CASE_TEMPLATE(reset_takes_the_buffers_back_in_silence, F, DeviceFixtures) {
  Ends<F> ends({.recvs = 6});
  BOOST_REQUIRE(ends.a.qp->modify(move_to(QpState::reset)));
  BOOST_TEST(ends.a.qp->state() == QpState::reset);
  ends.settle();
  Wc wc[8];
  BOOST_TEST(ends.a.recv_cq->poll(wc) == 0u);
  BOOST_TEST(!ends.a.recv_cq->maybe_ready());
  ends.b.qp.reset();
}

// --- what some devices can do

BOOST_AUTO_TEST_CASE_TEMPLATE(sent_data_are_remembered_where_the_device_says_so, F, DeviceFixtures) {
  Ends<F> ends({.recvs = 6});
  const bool remembers = ends.a.device->attr().remembers_sent_data;
  for (std::uint32_t i = 0; i < 4; ++i) {
    ends.a.fill(i, 20 + i, i);
    BOOST_REQUIRE_EQUAL(ends.a.send(i, 20 + i, kSignalled, i), Post::ok);
  }
  for (std::uint32_t i = 0; i < 4; ++i) {
    const auto bytes = ends.a.qp->sent_message(i);
    BOOST_TEST(bytes.size() == (remembers ? 20 + i : 0u));
    for (std::uint32_t k = 0; k < bytes.size(); ++k) BOOST_REQUIRE(bytes[k] == End::pattern(i, k));
  }
  BOOST_TEST(ends.a.qp->sent_message(4).empty());
  BOOST_TEST(ends.a.qp->sent_message(~std::uint64_t{0}).empty());
  BOOST_TEST(ends.wait(*ends.a.send_cq, 4).size() == 4u);
  BOOST_TEST(ends.wait(*ends.b.recv_cq, 4).size() == 4u);
}

BOOST_AUTO_TEST_CASE_TEMPLATE(what_is_posted_is_there_at_once_where_the_device_says_so, F, DeviceFixtures) {
  Ends<F> ends({.recvs = 6});
  if (!ends.a.device->attr().posts_arrive_at_once) return;
  Wc wc[2];
  for (std::uint32_t i = 0; i < 4; ++i) {  // nobody pumps, waits or polls in between
    ends.a.fill(i, 64, i);
    BOOST_REQUIRE_EQUAL(ends.a.post(WrOpcode::rdma_write, i, 64, kSignalled, i, ends.b.remote(ends.b.slot(7)), ends.b.memory->rkey),
                        Post::ok);
    for (std::uint32_t k = 0; k < 64; ++k) BOOST_REQUIRE(ends.b.slot(7)[k] == End::pattern(i, k));
    BOOST_REQUIRE_EQUAL(ends.a.send(i, 64, kSignalled, i), Post::ok);
    BOOST_REQUIRE(ends.b.recv_cq->maybe_ready());
    BOOST_TEST(ends.b.recv_cq->poll(wc) == 1u);
    BOOST_TEST(wc[0].byte_len == 64u);
  }
}

BOOST_AUTO_TEST_CASE_TEMPLATE(the_peers_memory_is_in_view_where_the_device_says_so, F, DeviceFixtures) {
  Ends<F> ends;
  End& b = ends.b;
  const std::uint64_t base = b.memory->remote_base, length = b.memory->length;
  const Rkey key = b.memory->rkey;
  if (!ends.a.device->attr().maps_peer_memory) {
    BOOST_TEST(ends.a.qp->remote_view(base, 64, key) == nullptr);
    return;
  }
  b.fill(2, 64, 9);
  const std::byte* view = ends.a.qp->remote_view(b.remote(b.slot(2)), 64, key);
  BOOST_REQUIRE(view != nullptr);
  for (std::uint32_t k = 0; k < 64; ++k) BOOST_REQUIRE(view[k] == End::pattern(9, k));
  b.fill(2, 64, 10);
  BOOST_TEST((view[5] == End::pattern(10, 5)));
  BOOST_TEST(ends.a.qp->remote_view(base, length, key) != nullptr);
  BOOST_TEST(ends.a.qp->remote_view(base, length + 1, key) == nullptr);
  BOOST_TEST(ends.a.qp->remote_view(base - 1, 64, key) == nullptr);
  BOOST_TEST(ends.a.qp->remote_view(base + length - 63, 64, key) == nullptr);
  BOOST_TEST(ends.a.qp->remote_view(~std::uint64_t{0} - 10, 64, key) == nullptr);
  BOOST_TEST(ends.a.qp->remote_view(base, ~std::size_t{0}, key) == nullptr);
  BOOST_TEST(ends.a.qp->remote_view(base, 64, Rkey{0}) == nullptr);
  BOOST_TEST(ends.a.qp->remote_view(base, 64, Rkey{static_cast<std::uint32_t>(key) ^ 0x00F0'0000u}) == nullptr);
  auto writable = Ends<F>::must(b.pd->register_memory({b.slot(6), 1024}, Access::local_write | Access::remote_write));
  BOOST_TEST(ends.a.qp->remote_view(writable->remote_base, 64, writable->rkey) == nullptr);
}

namespace detail {
/// One Read by `a` into its slot 3.
template <class F>
Wc read_program(Ends<F>& ends, std::uint64_t from, std::uint32_t bytes, Rkey rkey) {
  std::memset(ends.a.slot(3), 0, kSlotBytes);
  BOOST_REQUIRE_EQUAL(ends.a.post(WrOpcode::rdma_read, 3, bytes, kSignalled, 31, from, rkey), Post::ok);
  return ends.wait_one(*ends.a.send_cq);
}
}  // namespace detail

BOOST_AUTO_TEST_CASE_TEMPLATE(memory_of_the_program_is_read_until_it_is_withdrawn, F, DeviceFixtures) {
  Ends<F> ends;
  std::vector<std::byte> memory(kSlotBytes);
  for (std::uint32_t k = 0; k < kSlotBytes; ++k) memory[k] = End::pattern(6, k);
  if (!ends.a.device->attr().reads_program_memory) {
    BOOST_TEST(!ends.b.qp->withdraw(ends.b.memory->rkey).has_value());
    return;
  }
  auto mr = Ends<F>::must(ends.b.pd->register_memory(memory, Access::remote_read));
  Wc wc = detail::read_program(ends, mr->remote_base, 5000, mr->rkey);
  BOOST_TEST(wc.status == WcStatus::success);
  BOOST_TEST(wc.byte_len == 5000u);
  BOOST_TEST(ends.a.holds(3, 5000, 6));
  BOOST_TEST((ends.a.slot(3)[5000] == std::byte{0}));
  wc = detail::read_program(ends, mr->remote_base + kSlotBytes - 1, 1, mr->rkey);
  BOOST_TEST(wc.byte_len == 1u);
  BOOST_TEST((ends.a.slot(3)[0] == memory.back()));

  BOOST_TEST(ends.b.qp->withdraw(mr->rkey).value_or(0) == 5001u);
  BOOST_TEST(!ends.b.qp->withdraw(mr->rkey).has_value());
  for (bool is_registered : {true, false}) {
    wc = detail::read_program(ends, mr->remote_base, 100, mr->rkey);
    BOOST_TEST(wc.status == WcStatus::success);
    BOOST_TEST(wc.byte_len == 0u);
    if (is_registered) ends.b.qp->withdraw(mr->rkey);
  }
  const Rkey old = mr->rkey;
  const std::uint64_t base = mr->remote_base;
  mr.reset();
  mr = Ends<F>::must(ends.b.pd->register_memory(memory, Access::remote_read));
  BOOST_TEST((mr->rkey != old));
  BOOST_TEST(detail::read_program(ends, base, 100, old).byte_len == 0u);
  BOOST_TEST(detail::read_program(ends, base, 100, mr->rkey).byte_len == 100u);
  BOOST_TEST(ends.b.qp->withdraw(mr->rkey).value_or(0) == 100u);
  BOOST_TEST(ends.a.qp->state() == QpState::rts);
}

BOOST_AUTO_TEST_CASE_TEMPLATE(memory_of_the_program_is_read_within_bounds_and_never_written, F, DeviceFixtures) {
  for (const int spoil : {0, 1, 2, 3}) {
    Ends<F> ends;
    if (!ends.a.device->attr().reads_program_memory) return;
    std::vector<std::byte> memory(kSlotBytes);
    auto mr = Ends<F>::must(ends.b.pd->register_memory(memory, Access::remote_read));
    std::uint64_t at = mr->remote_base;
    if (spoil == 0) at -= 1;
    if (spoil == 1) at += kSlotBytes - 63;
    if (spoil == 2) at = ~std::uint64_t{0} - 10;
    const WrOpcode opcode = spoil == 3 ? WrOpcode::rdma_write : WrOpcode::rdma_read;
    ends.a.fill(3, 64, 1);
    BOOST_REQUIRE_EQUAL(ends.a.post(opcode, 3, 64, kSignalled, 1, at, mr->rkey), Post::ok);
    BOOST_TEST(ends.wait_one(*ends.a.send_cq).status == WcStatus::remote_access_error);
    BOOST_TEST(ends.a.qp->state() == QpState::error);
    BOOST_TEST((memory[0] == std::byte{0}));
    BOOST_TEST(ends.a.qp->remote_view(mr->remote_base, 64, mr->rkey) == nullptr);
    BOOST_TEST(ends.a.qp->remote_word(mr->remote_base, mr->rkey) == nullptr);
  }
}

BOOST_AUTO_TEST_CASE_TEMPLATE(what_the_program_has_unmapped_is_missing_from_a_read, F, DeviceFixtures) {
  Ends<F> ends;
  if (!ends.a.device->attr().reads_program_memory) return;
  const auto page = static_cast<std::size_t>(sysconf(_SC_PAGESIZE));
  auto* const memory = static_cast<std::byte*>(mmap(nullptr, 2 * page, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
  for (std::uint32_t k = 0; k < page; ++k) memory[k] = End::pattern(4, k);
  auto mr = Ends<F>::must(ends.b.pd->register_memory({memory, 2 * page}, Access::remote_read));
  munmap(memory + page, page);
  Wc wc = detail::read_program(ends, mr->remote_base + page - 1000, 3000, mr->rkey);
  BOOST_TEST(wc.status == WcStatus::success);
  BOOST_TEST(wc.byte_len == 1000u);
  for (std::uint32_t k = 0; k < 1000; ++k)
    BOOST_REQUIRE((ends.a.slot(3)[k] == End::pattern(4, static_cast<std::uint32_t>(page) - 1000 + k)));
  BOOST_TEST(detail::read_program(ends, mr->remote_base + page, 100, mr->rkey).byte_len == 0u);
  munmap(memory, page);
  BOOST_TEST(detail::read_program(ends, mr->remote_base, 100, mr->rkey).byte_len == 0u);
  BOOST_TEST(ends.b.qp->withdraw(mr->rkey).value_or(0) == 1000u);
  BOOST_REQUIRE_EQUAL(ends.b.post_recv(0), Post::ok);
  BOOST_REQUIRE_EQUAL(ends.a.send(1, 64), Post::ok);
  BOOST_TEST(ends.wait_one(*ends.b.recv_cq).status == WcStatus::success);
}

BOOST_AUTO_TEST_CASE_TEMPLATE(words_of_the_peer_are_stored_without_a_request_where_its_memory_is_in_view, F, DeviceFixtures) {
  Ends<F> ends;
  End& b = ends.b;
  const std::uint64_t addr = b.remote(b.slot(2));
  const Rkey key = b.memory->rkey;
  Qp& qp = *ends.a.qp;
  std::atomic<std::uint64_t>* const word = qp.remote_word(addr, key);
  if (!ends.a.device->attr().maps_peer_memory) {
    BOOST_TEST(word == nullptr);
    return;
  }
  BOOST_REQUIRE(word != nullptr);
  BOOST_REQUIRE_EQUAL(qp.store_word(*word, 0x0123456789abcdef, false), Post::ok);
  std::uint64_t seen = 0;
  std::memcpy(&seen, b.slot(2), sizeof seen);
  BOOST_TEST(seen == 0x0123456789abcdefULL);
  Wc none[1];
  BOOST_TEST(ends.a.send_cq->poll(none) == 0u);

  BOOST_TEST(qp.remote_word(addr + 4, key) == nullptr);
  BOOST_TEST(qp.remote_word(b.memory->remote_base + b.memory->length, key) == nullptr);
  BOOST_TEST(qp.remote_word(addr, Rkey{0}) == nullptr);
  auto readable = Ends<F>::must(b.pd->register_memory({b.slot(6), 1024}, Access::local_write | Access::remote_read));
  BOOST_TEST(qp.remote_word(readable->remote_base, readable->rkey) == nullptr);

  // Its sleeper is woken if it is armed, and only by those that say so.
  std::atomic<std::uint32_t>* const sleepers = b.recv_cq->wake_word();
  b.recv_cq->arm(kWakeWord);
  ends.b.device->arm_fence();
  const std::uint32_t before = sleepers->load();
  BOOST_REQUIRE_EQUAL(qp.store_word(*word, 1, false), Post::ok);
  BOOST_TEST(sleepers->load() == before);
  BOOST_REQUIRE_EQUAL(qp.store_word(*word, 2, true), Post::ok);
  BOOST_TEST(sleepers->load() != before);

  BOOST_REQUIRE(b.qp->modify(move_to(QpState::error)));
  BOOST_TEST(qp.store_word(*word, 3, true) == Post::qp_error);
  BOOST_TEST(qp.state() == QpState::error);
}

BOOST_AUTO_TEST_CASE_TEMPLATE(a_removed_device_flushes_and_refuses, F, DeviceFixtures) {
  if constexpr (requires(F & f) { f.remove_device(Side::a); }) {
    Ends<F> ends({.recvs = 5});
    bool fatal = false;
    ends.a.device->on_async_event([&](AsyncEvent event) { fatal = event == AsyncEvent::device_fatal; });
    ends.fixture.remove_device(Side::a);
    const auto got = ends.wait(*ends.a.recv_cq, 5);
    BOOST_REQUIRE_EQUAL(got.size(), 5u);
    for (const Wc& wc : got) BOOST_TEST(wc.status != WcStatus::success);
    ends.settle();
    BOOST_TEST(fatal);
    BOOST_TEST(ends.a.send(0, 8) == Post::qp_error);
    BOOST_TEST(ends.a.post_recv(0) == Post::qp_error);
    BOOST_TEST(!ends.a.pd->map_extent(4096));
    BOOST_TEST(!ends.a.device->create_cq(8, nullptr));
    ends.b.qp.reset();
  }
}

BOOST_AUTO_TEST_SUITE_END()

}  // namespace rdma::conformance
