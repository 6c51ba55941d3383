// Any Fixture of devices behind wrapping devices that change nothing: the suite must not notice.
#pragma once

#include "rdma_core/drivers/wrap/fault_device.hpp"
#include "rdma_core/drivers/wrap/trace_device.hpp"
#include "tests/conformance/ends.hpp"

namespace rdma::conformance {

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
