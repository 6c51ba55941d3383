// Both conformance suites on the software device with LocalCm, in both flavours, bare and wrapped.
#include <tuple>

#include "tests/conformance/shm_fixture.hpp"
#include "tests/conformance/wrapped.hpp"

namespace rdma::conformance {

using DeviceFixtures = std::tuple<ShmIb, ShmRnic, Wrapped<ShmIb, TracedFaults>>;
using CmFixtures = std::tuple<ShmIb, ShmRnic>;

}  // namespace rdma::conformance

#include "tests/conformance/cm_conformance.hpp"
#include "tests/conformance/device_conformance.hpp"
