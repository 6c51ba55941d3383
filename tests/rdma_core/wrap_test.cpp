// FaultDevice and TraceDevice where they change or show something. That they change nothing else is shown by the conformance
// suites, which run behind both.
#include <map>
#include <vector>

#include "rdma_core/drivers/wrap/fault_device.hpp"
#include "rdma_core/drivers/wrap/trace_device.hpp"
#include "tests/conformance/ends.hpp"
#include "tests/support/sim_fabric.hpp"

using namespace rdma;
using namespace rdma::wrap;
using rdma::conformance::End;
using rdma::conformance::Ends;
using rdma::conformance::MakeQp;
using rdma::conformance::move_to;

namespace {

/// Side a is wrapped by what the test has put here, side b is bare.
Injector* current_injector = nullptr;
TraceSink* current_sink = nullptr;

class Fixture {
 public:
  Device& device(conformance::Side side) {
    if (side == conformance::Side::b) return fabric_.device(sim::Side::b);
    return current_sink != nullptr ? static_cast<Device&>(trace_) : fault_;
  }
  void connect(const MakeQp& make) {
    Qp& a = make(conformance::Side::a, device(conformance::Side::a), fabric_.path(sim::Side::a));
    Qp& b = make(conformance::Side::b, device(conformance::Side::b), fabric_.path(sim::Side::b));
    fabric_.connect(a, b);
  }
  bool pump() { return fabric_.step(); }
  void finish() {
    fabric_.run_until_idle();
    BOOST_TEST(fabric_.check() == "");
  }

 private:
  sim::SimFabric fabric_;
  Injector nothing_;
  TraceSink silence_;
  FaultDevice fault_{fabric_.device(sim::Side::a), current_injector != nullptr ? *current_injector : nothing_};
  TraceDevice trace_{fabric_.device(sim::Side::a), current_sink != nullptr ? *current_sink : silence_};
};

struct Use {
  explicit Use(Injector& injector) { current_injector = &injector; }
  explicit Use(TraceSink& sink) { current_sink = &sink; }
  ~Use() {
    current_injector = nullptr;
    current_sink = nullptr;
  }
};

}  // namespace

BOOST_AUTO_TEST_SUITE(fault_device)

BOOST_AUTO_TEST_CASE(the_nth_post_breaks_the_qp_and_flushes_what_was_posted) {
  NthPost injector(3);
  Use use(injector);
  Ends<Fixture> ends({.recvs = 4});
  BOOST_TEST(ends.a.send(0, 8, kSignalled, 1) == Post::ok);
  BOOST_TEST(ends.a.send(1, 8, kSignalled, 2) == Post::ok);
  BOOST_TEST(ends.a.send(2, 8, kSignalled, 3) == Post::qp_error);
  BOOST_TEST(ends.a.qp->state() == QpState::error);
  const auto sent = ends.wait(*ends.a.send_cq, 2);  // not 3: what was refused does not complete
  BOOST_REQUIRE_EQUAL(sent.size(), 2u);
  BOOST_TEST(sent[0].wr_id == 1u);
  BOOST_TEST(sent[1].wr_id == 2u);
  const auto flushed = ends.wait(*ends.a.recv_cq, 4);
  BOOST_REQUIRE_EQUAL(flushed.size(), 4u);
  for (const Wc& wc : flushed) BOOST_TEST(wc.status == WcStatus::flushed);
  BOOST_TEST(ends.a.send(3, 8) == Post::qp_error);
  ends.b.qp.reset();
  (void)ends.wait(*ends.b.recv_cq, 4);
}

BOOST_AUTO_TEST_CASE(a_post_is_refused_only_while_a_completion_is_due) {
  NthPost injector(1, Fault::queue_full, true);  // every one, as far as it may
  Use use(injector);
  Ends<Fixture> ends({.recvs = 8});
  BOOST_TEST(ends.a.send(0, 8, 0) == Post::ok);  // nothing due: a refusal would never be taken back
  BOOST_TEST(ends.a.send(1, 8, kSignalled) == Post::ok);
  BOOST_TEST(ends.a.send(2, 8, kSignalled) == Post::queue_full);
  BOOST_TEST(ends.a.send(2, 8, kSignalled) == Post::queue_full);
  BOOST_TEST(ends.wait_one(*ends.a.send_cq).status == WcStatus::success);
  BOOST_TEST(ends.a.send(2, 8, kSignalled) == Post::ok);
  BOOST_TEST(ends.wait_one(*ends.a.send_cq).status == WcStatus::success);
  BOOST_TEST(ends.wait(*ends.b.recv_cq, 3).size() == 3u);
}

BOOST_AUTO_TEST_CASE(receives_can_be_refused) {
  struct NoReceives : Injector {
    Fault fault = Fault::queue_full;
    Fault on_post_recv(const Qp&, std::span<const RecvWr>) noexcept override { return fault; }
  } injector;
  Use use(injector);
  Ends<Fixture> ends;
  BOOST_TEST(ends.a.post_recv(0) == Post::queue_full);
  injector.fault = Fault::none;
  BOOST_TEST(ends.a.post_recv(0) == Post::ok);
  injector.fault = Fault::qp_error;
  BOOST_TEST(ends.a.post_recv(1) == Post::qp_error);
  const auto flushed = ends.wait(*ends.a.recv_cq, 2);
  BOOST_REQUIRE_EQUAL(flushed.size(), 1u);
  BOOST_TEST(flushed[0].wr_id == 0u);
}

BOOST_AUTO_TEST_CASE(random_faults_lose_nothing) {
  for (std::uint64_t seed = 1; seed <= 20; ++seed) {
    BOOST_TEST_CONTEXT("seed " << seed) {
      RandomFaults injector(seed, 40, 50);
      Use use(injector);
      constexpr std::uint32_t kMessages = 60;
      Ends<Fixture> ends({.recvs = 10});
      std::uint32_t sent = 0, done = 0, received = 0, refused = 0;
      bool intact = true;
      ends.wait_until([&] {
        while (sent < kMessages && sent - done < 4 && sent - received < 10) {
          const std::uint32_t slot = 20 + sent % 4;
          ends.a.fill(slot, 50, sent);
          if (ends.a.send(slot, 50, kSignalled, sent) != Post::ok) {
            ++refused;
            break;
          }
          ++sent;
        }
        Wc wc[4];
        const unsigned n = ends.a.send_cq->poll(wc);
        for (unsigned i = 0; i < n; ++i) intact = intact && wc[i].status == WcStatus::success && wc[i].wr_id == done++;
        for (unsigned i = ends.b.recv_cq->poll({wc, 1}); i > 0; --i) {
          intact = intact && ends.b.holds(static_cast<std::uint32_t>(wc[0].wr_id), wc[0].byte_len, received++);
          intact = intact && ends.b.post_recv(static_cast<std::uint32_t>(wc[0].wr_id)) == Post::ok;
        }
        return !intact;
      });
      // The fabric is idle; what is left waits for a poll that sees.
      for (int i = 0; i < 200 && done < kMessages; ++i) {
        Wc wc[4];
        done += ends.a.send_cq->poll(wc);
        if (sent < kMessages && sent - done < 4 && ends.a.send(20 + sent % 4, 50, kSignalled, sent) == Post::ok) ++sent;
        ends.settle();
        while (ends.b.recv_cq->poll({wc, 1}) == 1) {
          ++received;
          BOOST_REQUIRE_EQUAL(ends.b.post_recv(static_cast<std::uint32_t>(wc[0].wr_id)), Post::ok);
        }
      }
      BOOST_TEST(intact);
      BOOST_TEST(done == kMessages);
      BOOST_TEST(received == kMessages);
      BOOST_TEST(refused > 0u);
    }
  }
}

BOOST_AUTO_TEST_SUITE_END()

BOOST_AUTO_TEST_SUITE(trace_device)

BOOST_AUTO_TEST_CASE(every_request_completion_and_move_is_shown) {
  struct Log : TraceSink {
    std::vector<std::uint64_t> sends, refused;
    std::size_t recvs = 0;
    std::map<std::uint64_t, WcStatus> completions;
    std::vector<std::pair<QpState, bool>> moves;
    unsigned destroyed = 0;
    void on_post_send(const Qp&, const SendWr& wr, Post post) noexcept override {
      (post == Post::ok ? sends : refused).push_back(wr.wr_id);
    }
    void on_post_recv(const Qp&, std::span<const RecvWr> wrs, Post post) noexcept override {
      if (post == Post::ok) recvs += wrs.size();
    }
    void on_completion(const Wc& wc) noexcept override { completions[wc.wr_id] = wc.status; }
    void on_move(const Qp&, QpState, const QpAttributes& attr, const Result<Unit>& result) noexcept override {
      moves.emplace_back(attr.state, result.ok());
    }
    void on_destroy(Qpn) noexcept override { ++destroyed; }
  } log;
  Use use(log);
  {
    Ends<Fixture> ends({.recvs = 2});
    BOOST_TEST(log.recvs == 2u);
    BOOST_TEST(
        (log.moves == std::vector<std::pair<QpState, bool>>{{QpState::init, true}, {QpState::rtr, true}, {QpState::rts, true}}));
    log.moves.clear();
    BOOST_TEST(ends.a.send(0, 8, kSignalled, 50) == Post::ok);
    BOOST_TEST(ends.wait_one(*ends.a.send_cq).wr_id == 50u);
    BOOST_TEST(!ends.a.qp->modify(move_to(QpState::init)));
    BOOST_REQUIRE(ends.a.qp->modify(move_to(QpState::error)));
    BOOST_TEST(ends.a.send(0, 8, kSignalled, 51) == Post::qp_error);
    BOOST_TEST(ends.wait(*ends.a.recv_cq, 2).size() == 2u);
    BOOST_TEST(ends.wait(*ends.b.recv_cq, 1).size() == 1u);
  }
  BOOST_TEST((log.sends == std::vector<std::uint64_t>{50}));
  BOOST_TEST((log.refused == std::vector<std::uint64_t>{51}));
  BOOST_REQUIRE_EQUAL(log.completions.size(), 3u);
  BOOST_TEST(log.completions[50] == WcStatus::success);
  BOOST_TEST(log.completions[0] == WcStatus::flushed);
  BOOST_TEST(log.completions[1] == WcStatus::flushed);
  BOOST_TEST((log.moves == std::vector<std::pair<QpState, bool>>{{QpState::init, false}, {QpState::error, true}}));
  BOOST_TEST(log.destroyed == 1u);
}

BOOST_AUTO_TEST_SUITE_END()
