// The suite of the connection managers on those for RDMA devices: offers, dials and requests go over the wire.
#include <fstream>

#include "tests/verbs/cm_fixture.hpp"

namespace rdma::conformance {

using CmFixtures = std::tuple<IbCmPair, RnicCmPair>;

}  // namespace rdma::conformance

#include "tests/conformance/cm_conformance.hpp"

namespace rdma::conformance {

// Of several datagrams to ports that nobody has, the kernel refuses a few a second and drops the others in silence.
BOOST_AUTO_TEST_CASE_TEMPLATE(offers_that_came_too_early_are_made_again_while_they_hold, F, CmFixtures) {
  constexpr std::size_t kMany = 24;
  constexpr unsigned kHeldMs = std::is_same_v<F, RnicCmPair> ? 900 : 3000;  // an IB CM may ask twice, a second apart
  F f;
  std::size_t over = 0, heard = 0;
  for (const Side side : {Side::a, Side::b})
    f.cm(side).on_event([&](const cm::Event& event) { over += event.kind == cm::EventKind::unreachable ? 1 : 0; });
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
  while (over < 2 * kMany) f.pump();
  BOOST_TEST(heard == kMany);
}

/// The kernel's own choice of ports, for a while.
class LocalPorts {
 public:
  explicit LocalPorts(const std::string& range) {
    std::getline(std::ifstream(kFile), before_);
    std::ofstream(kFile) << range << std::flush;
  }
  ~LocalPorts() { std::ofstream(kFile) << before_ << std::flush; }

 private:
  static constexpr const char* kFile = "/proc/sys/net/ipv4/ip_local_port_range";
  std::string before_;
};

// Of an RNIC's dials, made at once, every fourth or so fails at first, for a socket has the port.
BOOST_AUTO_TEST_CASE(every_one_of_many_dials_whose_port_is_taken_is_made_again) {
  constexpr std::uint16_t kFirst = 20'000, kPorts = 64;
  detail::Processes<RnicCmPair> both;
  std::vector<detail::Meeting*> meetings;
  for (int i = 0; i < 24; ++i) meetings.push_back(&both.meeting());
  const LocalPorts narrow(std::to_string(kFirst) + " " + std::to_string(kFirst + kPorts - 1));
  std::vector<int> taken;
  for (std::uint16_t port = kFirst; port < kFirst + kPorts; port += 4) {
    const cm::IpAddress dialler = cm::IpAddress::from(meetings[0]->anchor(Side::a).local).with_port(port);
    const sockaddr_storage address = dialler.to_sockaddr();
    taken.push_back(socket(dialler.family, SOCK_STREAM | SOCK_CLOEXEC, 0));
    BOOST_REQUIRE_EQUAL(bind(taken.back(), reinterpret_cast<const sockaddr*>(&address), dialler.sockaddr_size()), 0);
  }
  for (detail::Meeting* m : meetings) both.offer(*m);
  for (detail::Meeting* m : meetings) both.dial(*m);
  for (detail::Meeting* m : meetings) BOOST_TEST(both.wait(*m, Side::a, cm::EventKind::established));
  for (const int fd : taken) close(fd);
}

}  // namespace rdma::conformance
