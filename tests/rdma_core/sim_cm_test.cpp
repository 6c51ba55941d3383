// What the simulated connection managers do beyond the contract: loss, breakage, overtaking. The contract itself is tested by the
// conformance suite.
#include <boost/test/data/test_case.hpp>
#include <set>
#include <tuple>
#include <vector>

#include "tests/conformance/sim_fixture.hpp"

using namespace rdma;
using namespace rdma::sim;
using rdma::cm::ConnId;
using rdma::cm::Event;
using rdma::cm::EventKind;
using rdma::conformance::End;
using rdma::conformance::Ends;
namespace bdata = boost::unit_test::data;

namespace cm_test {  // named: lambdas in data-driven cases capture it

/// One dial from a to b; the test sees what came of it.
struct Attempt {
  Attempt(const SimOptions& options, const SimCmOptions& cm_options) : fabric(options), cms(fabric, cm_options) {
    const auto anchors = SimCmPair::anchors(1);
    for (Side side : {Side::a, Side::b})
      cms.at(side).on_event([this, side](const Event& e) {
        events[static_cast<std::size_t>(side)].push_back(e.kind);
        if (e.kind == EventKind::request) {
          bytes_seen = e.private_data.size();
          conns[1] = e.conn;
          Qp& qp = Ends<conformance::SimDevices>::make(b, *e.device, e.path, {.recvs = 4});
          BOOST_REQUIRE(cms.at(side).accept(e.conn, qp, {}));
        } else if (e.kind == EventKind::reply) {
          BOOST_REQUIRE(cms.at(side).establish(e.conn));
          if (send_at_once) BOOST_REQUIRE_EQUAL(a.send(20, 8), Post::ok);
        }
      });
    BOOST_REQUIRE(cms.at(Side::b).offer(anchors[1], 3000));
    BOOST_REQUIRE(cms.at(Side::a).dial(anchors[0], 3000, [this](Device& device, const Path& path, ConnId conn) {
      conns[0] = conn;
      return cm::ConnectionManager::Proposal{&Ends<conformance::SimDevices>::make(a, device, path, {.recvs = 4}), {}};
    }));
  }
  ~Attempt() {
    for (Side side : {Side::a, Side::b})
      if (fabric.alive(side)) cms.at(side).disconnect(conns[static_cast<std::size_t>(side)]);
    fabric.run_until_idle();
    a.clear();
    b.clear();
  }
  bool has(Side side, EventKind kind) const {
    const auto& list = events[static_cast<std::size_t>(side)];
    return std::find(list.begin(), list.end(), kind) != list.end();
  }
  bool ended(Side side) const {
    return has(side, EventKind::disconnected) || has(side, EventKind::unreachable) || has(side, EventKind::rejected);
  }

  SimFabric fabric;
  SimCmPair cms;
  End a, b;
  ConnId conns[2] = {ConnId::none, ConnId::none};
  std::vector<EventKind> events[2];
  std::size_t bytes_seen = 0;
  bool send_at_once = false;
};

}  // namespace cm_test
using cm_test::Attempt;

BOOST_DATA_TEST_CASE(whatever_is_lost_both_sides_come_to_an_end, bdata::xrange(1, 101), seed) {
  Attempt attempt({.seed = static_cast<std::uint64_t>(seed)}, {.lose_percent = 70, .max_retries = 4});
  attempt.fabric.run_until_idle();
  for (Side side : {Side::a, Side::b}) BOOST_TEST(attempt.has(side, EventKind::established) + attempt.ended(side) > 0);
  // One side established and the other not: the other's end has been told.
  if (attempt.has(Side::a, EventKind::established) && !attempt.has(Side::b, EventKind::established))
    BOOST_TEST(attempt.ended(Side::a));
}

BOOST_AUTO_TEST_CASE(moderate_loss_is_repaired) {
  for (std::uint64_t seed = 1; seed <= 50; ++seed) {
    Attempt attempt({.seed = seed}, {.lose_percent = 30});
    attempt.fabric.run_until_idle();
    BOOST_TEST(attempt.has(Side::a, EventKind::established));
    BOOST_TEST(attempt.has(Side::b, EventKind::established));
    BOOST_TEST(!attempt.ended(Side::a));
  }
}

BOOST_AUTO_TEST_CASE(a_broken_stream_ends_both_sides) {
  std::set<bool> outcomes;
  for (std::uint64_t seed = 1; seed <= 50; ++seed) {
    Attempt attempt({.seed = seed, .flavour = NodeType::rnic}, {.break_percent = 50});
    attempt.fabric.run_until_idle();
    const bool up = attempt.has(Side::a, EventKind::established);
    outcomes.insert(up);
    if (!up) {
      BOOST_TEST(attempt.ended(Side::a));
      BOOST_TEST(attempt.ended(Side::b));
    }
  }
  BOOST_TEST(outcomes.size() == 2u);
}

BOOST_AUTO_TEST_CASE(the_first_send_may_overtake_the_rtu) {
  std::set<bool> overtaken;
  for (std::uint64_t seed = 1; seed <= 50; ++seed) {
    Attempt attempt({.seed = seed}, {});
    attempt.send_at_once = true;
    attempt.fabric.run_until([&] { return attempt.b.recv_cq && attempt.b.recv_cq->maybe_ready(); });
    overtaken.insert(!attempt.has(Side::b, EventKind::established));
    attempt.fabric.run_until_idle();
    BOOST_TEST(attempt.has(Side::b, EventKind::established));
  }
  BOOST_TEST(overtaken.size() == 2u);
}

BOOST_AUTO_TEST_CASE(an_ib_cm_delivers_the_whole_field_and_an_rnic_what_was_given) {
  for (NodeType flavour : {NodeType::ib_ca, NodeType::rnic}) {
    Attempt attempt({.seed = 1, .flavour = flavour}, {});
    attempt.fabric.run_until_idle();
    BOOST_TEST(attempt.bytes_seen == (flavour == NodeType::ib_ca ? 56u : 0u));
  }
}

BOOST_DATA_TEST_CASE(a_death_at_any_step_of_the_handshake_ends_the_other_side, bdata::xrange(1, 41), step) {
  for (NodeType flavour : {NodeType::ib_ca, NodeType::rnic})
    for (Side victim : {Side::a, Side::b}) {
      Attempt attempt({.seed = static_cast<std::uint64_t>(step), .flavour = flavour}, {});
      attempt.fabric.at_step(static_cast<std::uint64_t>(step), [&] { attempt.fabric.kill(victim); });
      attempt.fabric.run_until_idle();
      if (attempt.fabric.alive(victim)) attempt.fabric.kill(victim);
      attempt.fabric.run_until_idle();
      BOOST_TEST(attempt.ended(peer_of(victim)));
    }
}
