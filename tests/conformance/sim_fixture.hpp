// Fixtures of the conformance suites on the simulated fabric.
#pragma once

#include "rdma_core/drivers/wrap/fault_device.hpp"
#include "rdma_core/drivers/wrap/trace_device.hpp"
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

/// Any Fixture with its devices wrapped. Wrapper(Device&) makes one.
template <class Inner, class Wrapper>
class Wrapped {
 public:
  Device& device(Side side) { return side == Side::a ? static_cast<Device&>(a_) : static_cast<Device&>(b_); }
  void connect(const MakeQp& make) {
    inner_.connect([&](Side side, Device&, const Path& path) -> Qp& { return make(side, device(side), path); });
  }
  bool pump() { return inner_.pump(); }
  void remove_device(Side side) requires requires(Inner& inner) { inner.remove_device(Side::a); }
  { inner_.remove_device(side); }
  void finish() { inner_.finish(); }

 private:
  Inner inner_;
  Wrapper a_{inner_.device(Side::a)};
  Wrapper b_{inner_.device(Side::b)};
};

struct Transparent : wrap::Injector {
  static Transparent& instance() {
    static Transparent injector;
    return injector;
  }
};
struct Silent : wrap::TraceSink {
  static Silent& instance() {
    static Silent sink;
    return sink;
  }
};
/// Both wrappers, one round the other.
struct TracedFaults {
  explicit TracedFaults(Device& inner) : fault_(inner, Transparent::instance()), trace_(fault_, Silent::instance()) {}
  operator Device&() { return trace_; }

 private:
  wrap::FaultDevice fault_;
  wrap::TraceDevice trace_;
};

}  // namespace rdma::conformance
