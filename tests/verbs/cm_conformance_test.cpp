// The suite of the connection managers on those for RDMA devices: offers, dials and requests go over the wire.
#include "tests/verbs/cm_fixture.hpp"

namespace rdma::conformance {

using CmFixtures = std::tuple<IbCmPair, RnicCmPair>;

}  // namespace rdma::conformance

#include "tests/conformance/cm_conformance.hpp"

namespace rdma::conformance {

// Of several datagrams to ports that nobody has, the kernel refuses a few a second and drops the others in silence.
BOOST_AUTO_TEST_CASE_TEMPLATE(offers_that_came_too_early_are_made_again_while_they_hold, F, CmFixtures) {
  constexpr std::size_t kMany = 24;
  constexpr unsigned kHeldMs = 900;
  F f;
  std::size_t over = 0, heard = 0;
  f.cm(Side::b).on_event([&](const cm::Event& event) { over += event.kind == cm::EventKind::unreachable ? 1 : 0; });
  std::vector<std::array<cm::Anchor, 2>> anchors;
  for (std::size_t i = 0; i < kMany; ++i) {
    anchors.push_back(f.anchors());
    BOOST_REQUIRE(f.cm(Side::b).offer(anchors.back()[1], kHeldMs));
  }
  f.cm(Side::b).progress();
  const auto notice = [&](Device&, const Path&, cm::ConnId) {
    ++heard;
    return cm::ConnectionManager::Proposal{};
  };
  for (const auto& each : anchors) BOOST_REQUIRE(f.cm(Side::a).dial(each[0], 10 * kHeldMs, notice));
  while (over < kMany) f.pump();
  BOOST_TEST(heard == kMany);
}

}  // namespace rdma::conformance
