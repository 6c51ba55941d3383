// Both conformance suites on the simulated fabric, in several shapes of device, bare and wrapped.
#include "tests/conformance/sim_fixture.hpp"

#include <tuple>

#include "tests/conformance/chain_fixture.hpp"
#include "tests/conformance/wrapped.hpp"

namespace rdma::conformance {

struct SimIb : SimDevices {
  SimIb() : SimDevices({.seed = 1}) {}
};
struct SimRnic : SimDevices {
  SimRnic() : SimDevices({.seed = 2, .flavour = NodeType::rnic}) {}
};
/// The shape of the software device.
struct SimShared : SimDevices {
  SimShared()
      : SimDevices({.seed = 3,
                    .max_inline = 65536,
                    .recv_prefix_bytes = 8,
                    .recv_needs_extent = true,
                    .rdma_write_wakes = true,
                    .remembers_sent_data = true,
                    .rnr_retry = false}) {}
};
struct SimBare : SimDevices {
  SimBare() : SimDevices({.seed = 4, .max_inline = 0, .has_wake_word = false, .max_sge = 1, .max_read_outstanding = 1}) {}
};
using SimWrapped = Wrapped<SimIb, TracedFaults>;

using DeviceFixtures = std::tuple<SimIb, SimRnic, SimShared, SimBare, SimWrapped>;

struct SimCmIb : SimManagers {
  SimCmIb() : SimManagers({.seed = 5}, {}) {}
};
struct SimCmLossy : SimManagers {
  SimCmLossy() : SimManagers({.seed = 6}, {.lose_percent = 40}) {}
};
struct SimCmRnic : SimManagers {
  SimCmRnic() : SimManagers({.seed = 7, .flavour = NodeType::rnic}, {}) {}
};

using CmFixtures = std::tuple<SimCmIb, SimCmLossy, SimCmRnic, Chained<SimCmIb>>;

}  // namespace rdma::conformance

#include "tests/conformance/cm_conformance.hpp"
#include "tests/conformance/device_conformance.hpp"
#include "tests/conformance/shared_cq_conformance.hpp"
