// The device suite, part two: several Qps on one Cq, and several Cqs on one channel. Included by a driver's test file behind
// device_conformance.hpp, for the same DeviceFixtures.
#pragma once

#include <array>
#include <map>
#include <vector>

#include "tests/conformance/ends.hpp"

namespace rdma::conformance {

/// Connections of one pair of processes. On each side all Qps send and receive into one Cq, or each into its own.
template <class Fixture>
class Party {
 public:
  static constexpr std::uint32_t kQps = 4, kDepth = 8, kRecvs = 6;

  struct End {
    Device* device = nullptr;
    std::unique_ptr<Pd> pd;
    std::unique_ptr<Mr> memory;
    std::unique_ptr<CompletionChannel> channel;
    std::vector<std::unique_ptr<Cq>> cqs;
    std::vector<std::unique_ptr<Qp>> qps;

    Cq& cq(std::size_t qp = 0) { return *cqs[cqs.size() == 1 ? 0 : qp]; }
    std::byte* slot(std::uint32_t i) const { return memory->addr + std::size_t{i} * kSlotStride + kSlotOffset; }
    Post post_recv(std::size_t qp, std::uint64_t wr_id) {
      const RecvWr wr{wr_id, slot(static_cast<std::uint32_t>(qp * kRecvs + wr_id % kRecvs)), 256, memory->lkey};
      return qps[qp]->post_recv({&wr, 1});
    }
    Post send(std::size_t qp, std::uint64_t wr_id, std::uint8_t flags = kSignalled | kSolicited) {
      const Sge sge{slot(kSlots - 1), 16, memory->lkey};
      SendWr wr;
      wr.wr_id = wr_id;
      wr.flags = flags;
      wr.sge_count = 1;
      wr.sges = &sge;
      return qps[qp]->post_send(wr);
    }
  };

  explicit Party(bool one_cq) {
    for (std::uint32_t i = 0; i < kQps; ++i)
      fixture.connect([&](Side side, Device& device, const Path& path) -> Qp& { return make(end(side), device, path, one_cq); });
  }
  ~Party() {
    for (End* e : {&a, &b}) {
      e->qps.clear();
      e->cqs.clear();
      e->channel.reset();
      e->memory.reset();
      e->pd.reset();
    }
    fixture.finish();
  }
  Party(const Party&) = delete;
  Party& operator=(const Party&) = delete;

  /// Up to `count` completions, by the Qp they belong to; fewer only when no more will come.
  std::map<Qpn, std::vector<Wc>> wait(Cq& cq, std::size_t count) {
    std::map<Qpn, std::vector<Wc>> got;
    std::size_t n = 0;
    wait_until([&] {
      std::array<Wc, 5> wcs;
      while (const unsigned k = cq.poll(std::span(wcs).first(std::min(wcs.size(), count - n)))) {
        for (unsigned i = 0; i < k; ++i) got[wcs[i].qpn].push_back(wcs[i]);
        n += k;
      }
      return n >= count;
    });
    BOOST_TEST(n == count);
    return got;
  }
  template <class Done>
  bool wait_until(Done done) {
    return pump_until(fixture, done);
  }
  void settle() { pump_for_a_while(fixture); }
  /// Sends `each` messages on every connection, in turn, and sees them leave. They are numbered from 0.
  void send_all(std::uint64_t each) {
    for (std::uint64_t k = 0; k < each; ++k)
      for (std::size_t i = 0; i < kQps; ++i) BOOST_REQUIRE_EQUAL(a.send(i, k), Post::ok);
    for (std::size_t i = 0; i < a.cqs.size(); ++i) check_order(wait(a.cq(i), each * kQps / a.cqs.size()), WcOpcode::send);
  }
  static void check_order(const std::map<Qpn, std::vector<Wc>>& got, WcOpcode opcode) {
    for (const auto& [qpn, wcs] : got)
      for (std::size_t k = 0; k < wcs.size(); ++k) {
        BOOST_TEST(wcs[k].wr_id == k);
        BOOST_TEST(wcs[k].status == WcStatus::success);
        BOOST_TEST(wcs[k].opcode == opcode);
      }
  }

  Fixture fixture;  ///< destroyed last
  End a, b;

 private:
  End& end(Side side) { return side == Side::a ? a : b; }
  static Qp& make(End& e, Device& device, const Path& path, bool one_cq) {
    using Must = Ends<Fixture>;
    if (e.device == nullptr) {
      e.device = &device;
      e.pd = Must::must(device.create_pd(path));
      e.memory = Must::must(e.pd->map_extent(kMemoryBytes));
      e.channel = Must::must(device.create_channel());
    }
    if (e.cqs.empty() || !one_cq) e.cqs.push_back(Must::must(device.create_cq((one_cq ? kQps : 1) * 2 * kDepth, e.channel.get())));
    QpInit init;
    init.send_cq = init.recv_cq = e.cqs.back().get();
    init.send_depth = init.recv_depth = kDepth;
    e.qps.push_back(Must::must(e.pd->create_qp(init)));
    for (std::uint64_t k = 0; k < kRecvs; ++k) BOOST_REQUIRE_EQUAL(e.post_recv(e.qps.size() - 1, k), Post::ok);
    return *e.qps.back();
  }
};

BOOST_AUTO_TEST_SUITE(shared_cq)

BOOST_AUTO_TEST_CASE_TEMPLATE(completions_of_several_qps_on_one_cq_are_told_apart, F, DeviceFixtures) {
  using P = Party<F>;
  P party(true);
  party.send_all(4);
  const auto received = party.wait(party.b.cq(), 4 * P::kQps);
  BOOST_TEST(received.size() == P::kQps);
  for (const auto& qp : party.b.qps) BOOST_TEST(received.contains(qp->qpn()));
  P::check_order(received, WcOpcode::recv);
  // Both kinds of completion on one Cq: answers, and what comes meanwhile.
  for (std::size_t i = 0; i < P::kQps; ++i) {
    BOOST_REQUIRE_EQUAL(party.b.send(i, 100 + i), Post::ok);
    BOOST_REQUIRE_EQUAL(party.a.send(i, 200 + i), Post::ok);
  }
  for (auto* e : {&party.a, &party.b}) {
    const auto both = party.wait(e->cq(), 2 * P::kQps);
    for (std::size_t i = 0; i < P::kQps; ++i) {
      const auto of = both.find(e->qps[i]->qpn());
      BOOST_REQUIRE(of != both.end());
      BOOST_REQUIRE_EQUAL(of->second.size(), 2u);
      for (const Wc& wc : of->second)
        BOOST_TEST(wc.wr_id == (wc.opcode == WcOpcode::send ? (e == &party.a ? 200 + i : 100 + i) : e == &party.a ? 0 : 4));
    }
  }
}

BOOST_AUTO_TEST_CASE_TEMPLATE(an_error_of_one_qp_flushes_nothing_of_its_neighbours_on_the_cq, F, DeviceFixtures) {
  using P = Party<F>;
  P party(true);
  party.send_all(1);
  party.wait(party.b.cq(), P::kQps);
  QpAttributes over;
  over.state = QpState::error;
  BOOST_REQUIRE(party.b.qps[1]->modify(over));
  const auto flushed = party.wait(party.b.cq(), P::kRecvs - 1);
  BOOST_REQUIRE_EQUAL(flushed.size(), 1u);
  BOOST_TEST((flushed.begin()->first == party.b.qps[1]->qpn()));
  for (const Wc& wc : flushed.begin()->second) BOOST_TEST(wc.status == WcStatus::flushed);
  for (const std::size_t i : {std::size_t{0}, P::kQps - std::size_t{1}}) {
    BOOST_TEST(party.b.qps[i]->state() == QpState::rts);
    BOOST_REQUIRE_EQUAL(party.a.send(i, 7, kSolicited), Post::ok);
    const auto got = party.wait(party.b.cq(), 1);
    BOOST_REQUIRE_EQUAL(got.size(), 1u);
    BOOST_TEST((got.begin()->first == party.b.qps[i]->qpn()));
    BOOST_TEST(got.begin()->second[0].status == WcStatus::success);
  }
  party.a.qps.clear();  // with whatever it has left
  party.b.qps.clear();
}

BOOST_AUTO_TEST_CASE_TEMPLATE(a_destroyed_qp_takes_its_own_completions_along_and_no_others, F, DeviceFixtures) {
  using P = Party<F>;
  P party(true);
  party.send_all(2);
  party.settle();
  std::array<Wc, 1> first;
  BOOST_REQUIRE_EQUAL(party.b.cq().poll(first), 1u);  // some of the others are taken along with it by some drivers
  const Qpn gone = party.b.qps[1]->qpn();
  party.b.qps[1].reset();
  const std::size_t left = 2 * (P::kQps - 1) - (first[0].qpn == gone ? 0 : 1);
  const auto got = party.wait(party.b.cq(), left);
  BOOST_TEST(!got.contains(gone));
  std::array<Wc, 4> none;
  BOOST_TEST(party.b.cq().poll(none) == 0u);
  BOOST_REQUIRE_EQUAL(party.a.send(2, 9, kSolicited), Post::ok);
  const auto more = party.wait(party.b.cq(), 1);
  BOOST_REQUIRE_EQUAL(more.size(), 1u);
  BOOST_TEST((more.begin()->first == party.b.qps[2]->qpn()));
  party.a.qps.clear();
  party.b.qps.clear();
}

BOOST_AUTO_TEST_CASE_TEMPLATE(a_cq_has_room_for_all_that_its_qps_may_post, F, DeviceFixtures) {
  constexpr std::uint32_t kDepth = 8, kMost = 20;
  Ends<F> ends;
  auto cq = Ends<F>::must(ends.a.device->create_cq(64, nullptr));
  QpInit init;
  init.send_cq = init.recv_cq = cq.get();
  init.send_depth = init.recv_depth = kDepth;
  std::vector<std::unique_ptr<Qp>> qps;
  for (auto made = ends.a.pd->create_qp(init); made && qps.size() < kMost; made = ends.a.pd->create_qp(init)) {
    for (std::uint32_t i = 0; i < kDepth; ++i) {
      const RecvWr wr{i, ends.a.slot(i) + qps.size() * 128, 64, ends.a.memory->lkey};
      BOOST_REQUIRE_EQUAL((*made)->post_recv({&wr, 1}), Post::ok);
    }
    qps.push_back(std::move(*made));
  }
  BOOST_TEST(qps.size() >= 4u);
  for (const auto& qp : qps) BOOST_REQUIRE(qp->modify(move_to(QpState::error)));
  std::vector<Wc> got;
  ends.wait_until([&] {
    std::array<Wc, 16> some;
    while (const unsigned n = cq->poll(some)) got.insert(got.end(), some.begin(), some.begin() + n);
    return got.size() >= qps.size() * kDepth;
  });
  BOOST_TEST(got.size() == qps.size() * kDepth);
  std::map<Qpn, std::uint64_t> next;
  for (const Wc& wc : got) {
    BOOST_TEST(wc.status == WcStatus::flushed);
    BOOST_TEST(wc.wr_id == next[wc.qpn]++);
  }
  qps.pop_back();  // and its room is there again
  BOOST_TEST(ends.a.pd->create_qp(init).ok());
  qps.clear();
}

BOOST_AUTO_TEST_CASE_TEMPLATE(cqs_of_one_channel_announce_each_for_itself, F, DeviceFixtures) {
  using P = Party<F>;
  P party(false);
  std::vector<std::atomic<std::uint32_t>*> words;
  for (const auto& cq : party.b.cqs) words.push_back(cq->wake_word());
  if (words[0] == nullptr) return;
  const auto values = [&] {
    std::vector<std::uint32_t> all;
    for (const auto* word : words) all.push_back(word->load());
    return all;
  };
  const auto arm_all = [&] {
    for (const auto& cq : party.b.cqs) cq->arm(kWakeWord);
    party.b.device->arm_fence();
    for (const auto& cq : party.b.cqs) BOOST_TEST(!cq->maybe_ready());
  };
  std::uint64_t message = 0;
  /// Who sleeps on `qp` wakes, and nobody else; `first` looks before the channel is served.
  const auto wakes = [&](std::size_t qp, std::size_t first) {
    const auto before = values();
    BOOST_REQUIRE_EQUAL(party.a.send(qp, message++), Post::ok);
    party.wait(party.a.cq(qp), 1);
    party.settle();
    BOOST_TEST(party.b.cqs[first]->maybe_ready() == (first == qp));
    party.wait_until([&] {
      party.b.channel->progress();
      return values()[qp] != before[qp];
    });
    auto after = values();
    BOOST_TEST(after[qp] != before[qp]);
    after[qp] = before[qp];
    BOOST_TEST(after == before, boost::test_tools::per_element());
    const auto got = party.wait(*party.b.cqs[qp], 1);
    BOOST_TEST((got.begin()->first == party.b.qps[qp]->qpn()));
    BOOST_REQUIRE_EQUAL(party.b.post_recv(qp, got.begin()->second[0].wr_id), Post::ok);
  };
  // Each sleeper's arming outlives the others' announcements, whoever looks first.
  for (std::size_t first = 0; first < P::kQps; ++first) {
    arm_all();
    for (const unsigned qp : {1U, 3U, 0U, 2U}) wakes(qp, first);
  }
  // A sleeper whose Cq's completion another thread takes is woken all the same.
  arm_all();
  const std::uint32_t before = words[1]->load();
  BOOST_REQUIRE_EQUAL(party.a.send(1, message), Post::ok);
  party.wait(*party.b.cqs[1], 1);
  party.wait_until([&] {
    party.b.channel->progress();
    return words[1]->load() != before;
  });
  BOOST_TEST(words[1]->load() != before);
  party.wait(party.a.cq(1), 1);
}

BOOST_AUTO_TEST_SUITE_END()

}  // namespace rdma::conformance
