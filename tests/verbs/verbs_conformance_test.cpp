// The device suite on devices of libibverbs, an IB CA (RoCE) and an RNIC.
#include "tests/verbs/verbs_fixture.hpp"

namespace rdma::conformance {

using DeviceFixtures = std::tuple<VerbsIb, VerbsRnic>;

}  // namespace rdma::conformance

#include "tests/conformance/device_conformance.hpp"
