// Both conformance suites on the software device with LocalCm, in both flavours, bare, wrapped and in a chain.
#include <tuple>

#include "tests/conformance/chain_fixture.hpp"
#include "tests/conformance/shm_fixture.hpp"
#include "tests/conformance/wrapped.hpp"

namespace rdma::conformance {

using DeviceFixtures = std::tuple<ShmIb, ShmRnic, Wrapped<ShmIb, TracedFaults>>;
using CmFixtures = std::tuple<ShmIb, ShmRnic, Chained<ShmIb>>;

}  // namespace rdma::conformance

#include "tests/conformance/cm_conformance.hpp"
#include "tests/conformance/device_conformance.hpp"
#include "tests/conformance/shared_cq_conformance.hpp"
