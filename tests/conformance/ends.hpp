// What the conformance suites need of every driver: two connected ends in one process.
//
// A Fixture is a default-constructible class with
//   Device& device(Side);                           what objects are made on
//   void connect(const MakeQp&);                    calls MakeQp for both sides, ties the Qps and leaves both in RTS; Side::a is
//   active bool pump();                                    lets time pass a little. False: nothing will happen any more unless
//   somebody acts void finish();                                  at the end of each test, after every object is gone; may add
//   checks of its own
// and, where the driver can do it,
//   void remove_device(Side);                       the device goes while its objects live
#pragma once

#include <algorithm>
#include <boost/test/unit_test.hpp>
#include <cstring>
#include <functional>
#include <memory>
#include <ostream>
#include <vector>

#include "rdma_core/base/clock.hpp"
#include "rdma_core/device.hpp"

namespace rdma {
// For Boost.Test's messages.
inline std::ostream& operator<<(std::ostream& out, WcStatus s) { return out << to_string(s); }
inline std::ostream& operator<<(std::ostream& out, QpState s) { return out << to_string(s); }
inline std::ostream& operator<<(std::ostream& out, Post p) {
  return out << (p == Post::ok ? "ok" : p == Post::queue_full ? "queue_full" : "qp_error");
}
inline std::ostream& operator<<(std::ostream& out, WcOpcode o) { return out << "opcode " << static_cast<int>(o); }
}  // namespace rdma

namespace rdma::conformance {

enum class Side : std::uint8_t { a, b };
using MakeQp = std::function<Qp&(Side, Device&, const Path&)>;

constexpr Nanos kPatience = 40'000'000'000;  ///< of the wall clock: what has not come by then never comes

/// False: it never came, or no more will come.
template <class Fixture, class Done>
bool pump_until(Fixture& fixture, Done done) {
  const SteadyClock clock;
  const Nanos deadline = clock.now() + kPatience;
  while (!done()) {
    if (!fixture.pump()) return done();
    if (clock.now() > deadline) return false;
  }
  return true;
}
template <class Fixture>
void pump_for_a_while(Fixture& fixture) {
  for (int i = 0; i < 200 && fixture.pump(); ++i) {
  }
}

/// Memory of one end: slots for messages, and a region for RDMA.
constexpr std::uint32_t kSlotBytes = 8192;   ///< payload of a slot
constexpr std::uint32_t kSlotStride = 8448;  ///< room for a prefix in front and guards on both sides
constexpr std::uint32_t kSlotOffset = 128;
constexpr std::uint32_t kSlots = 48;
constexpr std::size_t kMemoryBytes = 512 * 1024;

struct End {
  Device* device = nullptr;
  std::unique_ptr<Pd> pd;
  std::unique_ptr<Mr> memory;  ///< of map_extent: serves every device
  std::unique_ptr<CompletionChannel> channel;
  std::unique_ptr<Cq> send_cq;
  std::unique_ptr<Cq> recv_cq;
  std::unique_ptr<Qp> qp;

  void clear() {  // in the order that the contract asks for
    qp.reset();
    send_cq.reset();
    recv_cq.reset();
    channel.reset();
    memory.reset();
    pd.reset();
  }
  std::byte* slot(std::uint32_t i) const { return memory->addr + std::size_t{i} * kSlotStride + kSlotOffset; }
  std::uint64_t remote(const std::byte* p) const { return memory->remote_base + static_cast<std::uint64_t>(p - memory->addr); }
  void fill(std::uint32_t i, std::uint32_t bytes, unsigned seed) const {
    for (std::uint32_t k = 0; k < bytes; ++k) slot(i)[k] = pattern(seed, k);
  }
  static std::byte pattern(unsigned seed, std::uint32_t k) {
    return static_cast<std::byte>((seed * 151u + k * 7u + (k >> 8)) & 0xFF);
  }
  bool holds(std::uint32_t i, std::uint32_t bytes, unsigned seed) const {
    for (std::uint32_t k = 0; k < bytes; ++k)
      if (slot(i)[k] != pattern(seed, k)) return false;
    return true;
  }

  Post post_recv(std::uint32_t i, std::uint32_t bytes = kSlotBytes, std::uint64_t wr_id = ~0ull) const {
    const RecvWr wr{wr_id == ~0ull ? i : wr_id, slot(i), bytes, memory->lkey};
    return qp->post_recv({&wr, 1});
  }
  Post post(WrOpcode opcode, std::uint32_t i, std::uint32_t bytes, std::uint8_t flags, std::uint64_t wr_id,
            std::uint64_t remote_addr = 0, Rkey rkey = {}) const {
    const Sge sge{slot(i), bytes, memory->lkey};
    SendWr wr;
    wr.wr_id = wr_id;
    wr.opcode = opcode;
    wr.flags = flags;
    wr.sge_count = 1;
    wr.sges = &sge;
    wr.remote_addr = remote_addr;
    wr.rkey = rkey;
    return qp->post_send(wr);
  }
  Post send(std::uint32_t i, std::uint32_t bytes, std::uint8_t flags = kSignalled | kSolicited, std::uint64_t wr_id = 0) const {
    return post(WrOpcode::send, i, bytes, flags, wr_id);
  }
};

struct EndsWanted {
  std::uint32_t send_depth = 16;
  std::uint32_t recv_depth = 16;
  std::uint32_t recvs = 0;  ///< receives posted on each side before the connection is made: slots 0, 1, …
};

template <class Fixture>
class Ends {
 public:
  explicit Ends(const EndsWanted& wanted = {}) {
    fixture.connect([&](Side side, Device& device, const Path& path) -> Qp& { return make(end(side), device, path, wanted); });
    BOOST_REQUIRE(a.qp);
    BOOST_REQUIRE(b.qp);
    BOOST_REQUIRE_EQUAL(a.qp->state(), QpState::rts);
    BOOST_REQUIRE_EQUAL(b.qp->state(), QpState::rts);
  }
  ~Ends() {
    a.clear();
    b.clear();
    fixture.finish();
  }
  End& end(Side side) { return side == Side::a ? a : b; }

  static Qp& make(End& e, Device& device, const Path& path, const EndsWanted& wanted) {
    e.device = &device;
    e.pd = must(device.create_pd(path));
    e.memory = must(e.pd->map_extent(kMemoryBytes));
    e.channel = must(device.create_channel());
    e.send_cq = must(device.create_cq(2 * wanted.send_depth, e.channel.get()));
    e.recv_cq = must(device.create_cq(2 * wanted.recv_depth, e.channel.get()));
    QpInit init;
    init.send_cq = e.send_cq.get();
    init.recv_cq = e.recv_cq.get();
    init.send_depth = wanted.send_depth;
    init.recv_depth = wanted.recv_depth;
    init.max_inline = std::min<std::uint32_t>(device.attr().max_inline, 64);
    e.qp = must(e.pd->create_qp(init));
    for (std::uint32_t i = 0; i < wanted.recvs; ++i) BOOST_REQUIRE_EQUAL(e.post_recv(i), Post::ok);
    return *e.qp;
  }
  template <class T>
  static T must(Result<T> result) {
    BOOST_REQUIRE_MESSAGE(result.ok(), (result.ok() ? "" : result.error().what));
    return std::move(*result);
  }

  /// Up to `count` completions; fewer only when no more will come.
  std::vector<Wc> wait(Cq& cq, std::size_t count) {
    std::vector<Wc> got;
    wait_until([&] {
      Wc wc[8];
      const unsigned n = cq.poll({wc, std::min<std::size_t>(8, count - got.size())});
      got.insert(got.end(), wc, wc + n);
      return got.size() >= count;
    });
    return got;
  }
  Wc wait_one(Cq& cq) {
    const auto got = wait(cq, 1);
    BOOST_REQUIRE_MESSAGE(got.size() == 1, "a completion never came");
    return got[0];
  }
  template <class Done>
  bool wait_until(Done done) {
    return pump_until(fixture, done);
  }
  /// The peer will refuse what `e` posts next. A device that does not acknowledge says so by ending the Qp, which is sure to show
  /// at a receive that was posted before. Returns whether it acknowledges; if not, expect_the_end() follows.
  bool before_refusal(const End& e) {
    if (e.device->attr().acknowledges) return true;
    BOOST_REQUIRE_EQUAL(e.post_recv(kSlots - 1, 64, 778), Post::ok);
    return false;
  }
  void expect_the_end(const End& e) {
    const Wc wc = wait_one(*e.recv_cq);
    BOOST_TEST(wc.wr_id == 778u);
    BOOST_TEST(wc.status == WcStatus::flushed);
    BOOST_TEST(e.qp->state() == QpState::error);
  }
  /// Lets everything that is under way happen.
  void settle() { pump_for_a_while(fixture); }
  /// The active side's first message has been received: from here on either side may send on every transport.
  void break_the_ice() {
    BOOST_REQUIRE_EQUAL(b.post_recv(kSlots - 1, 64, 777), Post::ok);
    a.fill(kSlots - 1, 8, 1);
    BOOST_REQUIRE_EQUAL(a.send(kSlots - 1, 8, kSignalled, 776), Post::ok);
    BOOST_REQUIRE_EQUAL(wait_one(*b.recv_cq).status, WcStatus::success);
    BOOST_REQUIRE_EQUAL(wait_one(*a.send_cq).wr_id, 776u);
  }

  Fixture fixture;  ///< destroyed last
  End a, b;
};

inline QpAttributes move_to(QpState state) {
  QpAttributes attr;
  attr.state = state;
  return attr;
}

}  // namespace rdma::conformance
