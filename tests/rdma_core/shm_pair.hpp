// Two software devices tied to each other by hand, without a CM: both ends of every test of the datapath. Made before a fork, the
// two ends may be used by two processes.
#pragma once

#include <sys/syscall.h>
#include <unistd.h>

#include <boost/test/unit_test.hpp>
#include <cstring>
#include <memory>
#include <utility>
#include <vector>

#include "rdma_core/drivers/shm/shm_device.hpp"

namespace rdma::shm::test {

constexpr std::size_t kTestSegment = std::size_t{64} << 20;

/// Each is the other's peer: what LocalCm does with descriptors, done by dup.
inline void link_devices(ShmDevice& a, ShmDevice& b, Path& path_a, Path& path_b) {
  auto la = std::make_shared<ShmLink>();
  auto lb = std::make_shared<ShmLink>();
  la->own = std::move(*OwnSegment::create(a.segment_bytes(), a.process_id()));
  lb->own = std::move(*OwnSegment::create(b.segment_bytes(), b.process_id()));
  la->theirs = std::move(*PeerSegment::adopt(lb->own->fd(), b.process_id()));
  lb->theirs = std::move(*PeerSegment::adopt(la->own->fd(), a.process_id()));
  BOOST_REQUIRE(la->bell.adopt(dup(b.bell().far_fd())));
  BOOST_REQUIRE(lb->bell.adopt(dup(a.bell().far_fd())));
  la->own->close_fd();
  lb->own->close_fd();
  la->needs_fence = lb->needs_fence = !a.has_membarrier();
  la->nonce = lb->nonce = {{1, 2}};
  for (auto& [link, peer] : {std::pair(la, &b), std::pair(lb, &a)})
    link->peer = {peer->process_id(), geteuid(), getpid(), geteuid()};
  if (a.attr().reads_program_memory) {
    la->open_program_memory();
    lb->open_program_memory();
  }
  a.links().add(la);
  b.links().add(lb);
  path_a = Path{la->id};
  path_b = Path{lb->id};
}

struct End {
  std::unique_ptr<ShmDevice> device;
  Path path;
  std::unique_ptr<CompletionChannel> channel;
  std::unique_ptr<Cq> cq;
  std::unique_ptr<Pd> pd;
  std::unique_ptr<Mr> extent;
  std::unique_ptr<Qp> qp;
  std::uint32_t buf_bytes = 0;

  std::byte* buffer(unsigned i) const { return extent->addr + 64 + std::size_t{i} * (buf_bytes + 64); }
  void post(unsigned i) {
    const RecvWr wr{.wr_id = i, .addr = buffer(i), .length = buf_bytes};
    BOOST_REQUIRE(qp->post_recv({&wr, 1}) == Post::ok);
  }
};

inline void open_end(End& end, std::uint32_t depth, std::uint32_t buf_bytes) {
  end.buf_bytes = buf_bytes;
  end.channel = std::move(*end.device->create_channel());
  end.cq = std::move(*end.device->create_cq(4096, end.channel.get()));
  end.pd = std::move(*end.device->create_pd(end.path));
  const std::size_t bytes = (64 + std::size_t{depth + 8} * (buf_bytes + 64) + 4095) & ~std::size_t{4095};
  end.extent = std::move(*end.pd->map_extent(bytes));
  end.qp = std::move(*end.pd->create_qp(
      {.send_cq = end.cq.get(), .recv_cq = end.cq.get(), .send_depth = 64, .recv_depth = depth, .max_inline = 0}));
}

/// The moves of a CM.
inline void qp_to_rts(Qp& qp, std::uint32_t dest, NodeType node) {
  const Access access = Access::local_write | Access::remote_write | Access::remote_read;
  if (node == NodeType::rnic) {
    BOOST_REQUIRE(qp.modify({.state = QpState::init, .access = access, .transport = RnicQpAttributes{}}));
    BOOST_REQUIRE(
        qp.modify({.state = QpState::rts, .access = {}, .transport = RnicQpAttributes{.stream_mode = false, .peer = dest}}));
    return;
  }
  BOOST_REQUIRE(qp.modify({.state = QpState::init, .access = access, .transport = IbQpAttributes{.pkey_index = 0, .port = 1}}));
  BOOST_REQUIRE(
      qp.modify({.state = QpState::rtr,
                 .access = {},
                 .max_read_incoming = 1,
                 .transport = IbQpAttributes{.dgid = Gid{}, .dest_qpn = dest, .rq_psn = 0, .path_mtu = 5, .min_rnr_timer = 0}}));
  BOOST_REQUIRE(qp.modify({.state = QpState::rts,
                           .access = {},
                           .max_read_outstanding = 1,
                           .transport = IbQpAttributes{.sq_psn = 0, .ack_timeout = 14, .retry_count = 6, .rnr_retry = 0}}));
}

inline void move_to_rts(End& end, Qpn peer, NodeType node) { qp_to_rts(*end.qp, static_cast<std::uint32_t>(peer), node); }

/// Two connected QPs. self: both on one device, tied to itself.
struct Pair {
  End a, b;
  explicit Pair(std::uint32_t depth = 64, std::uint32_t buf_bytes = 4096, NodeType node = NodeType::ib_ca,
                bool reads_program_memory = false) {
    const ShmOptions options{.flavour = node, .segment_bytes = kTestSegment, .reads_program_memory = reads_program_memory};
    a.device = std::move(*ShmDevice::create(options));
    b.device = std::move(*ShmDevice::create(options));
    link_devices(*a.device, *b.device, a.path, b.path);
    open_end(a, depth, buf_bytes);
    open_end(b, depth, buf_bytes);
    move_to_rts(a, b.qp->qpn(), node);
    move_to_rts(b, a.qp->qpn(), node);
  }
};

inline SendWr send_wr(const Sge* sge, unsigned count, std::uint8_t flags, std::uint64_t id = 0) {
  return {.wr_id = id, .opcode = WrOpcode::send, .flags = flags, .sge_count = static_cast<std::uint8_t>(count), .sges = sge};
}

inline Sge sge_of(const void* p, std::size_t n, Lkey lkey = {}) {
  return {static_cast<const std::byte*>(p), static_cast<std::uint32_t>(n), lkey};
}

/// The next completion, spinning; a watchdog of the test runner ends what never comes.
inline Wc wait_wc(Cq& cq) {
  Wc wc;
  while (cq.poll({&wc, 1}) == 0) {
  }
  return wc;
}

}  // namespace rdma::shm::test
