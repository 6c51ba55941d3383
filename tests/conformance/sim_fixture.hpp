// Fixtures of the conformance suites on the simulated fabric.
#pragma once

#include <poll.h>

#include <array>

#include "tests/conformance/ends.hpp"
#include "tests/support/sim_cm.hpp"
#include "tests/support/sim_fabric.hpp"

namespace rdma::conformance {

inline sim::Side to_sim(Side side) { return side == Side::a ? sim::Side::a : sim::Side::b; }

class SimDevices {
 public:
  explicit SimDevices(const sim::SimOptions& options) : fabric_(options) {}
  Device& device(Side side) { return fabric_.device(to_sim(side)); }
  void connect(const MakeQp& make) {
    Qp& a = make(Side::a, device(Side::a), fabric_.path(sim::Side::a));
    Qp& b = make(Side::b, device(Side::b), fabric_.path(sim::Side::b));
    fabric_.connect(a, b);
  }
  bool pump() { return fabric_.step(); }
  void remove_device(Side side) { fabric_.remove_device(to_sim(side)); }
  void finish() {
    fabric_.run_until_idle();
    BOOST_TEST(fabric_.check() == "");
  }
  sim::SimFabric& fabric() { return fabric_; }

 private:
  sim::SimFabric fabric_;
};

/// Both connection managers on a fabric; progress() is called only when the descriptor asks for it.
class SimManagers {
 public:
  SimManagers(const sim::SimOptions& options, sim::SimCmOptions cm_options)
      : fabric_(options), cms_(fabric_, by_hand(cm_options)) {}
  cm::ConnectionManager& cm(Side side) { return cms_.at(to_sim(side)); }
  Device& device(Side side) { return fabric_.device(to_sim(side)); }
  std::array<cm::Anchor, 2> anchors() { return sim::SimCmPair::anchors(++anchors_); }
  bool pump() {
    bool more = fabric_.step();
    for (Side side : {Side::a, Side::b}) {
      pollfd wanted{cm(side).fd(), POLLIN, 0};
      if (poll(&wanted, 1, 0) != 1) continue;
      cm(side).progress();
      more = true;
    }
    return more;
  }
  void kill(Side side) { fabric_.kill(to_sim(side)); }
  void finish() {
    fabric_.run_until_idle();
    BOOST_TEST(fabric_.check() == "");
  }
  sim::SimFabric& fabric() { return fabric_; }

 private:
  static sim::SimCmOptions by_hand(sim::SimCmOptions options) {
    options.auto_progress = false;
    return options;
  }
  sim::SimFabric fabric_;
  sim::SimCmPair cms_;
  std::uint16_t anchors_ = 0;
};

}  // namespace rdma::conformance
