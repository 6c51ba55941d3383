// The suite of the connection managers on those for RDMA devices: offers, dials and requests go over the wire.
#include "tests/verbs/cm_fixture.hpp"

namespace rdma::conformance {

using CmFixtures = std::tuple<IbCmPair, RnicCmPair>;

}  // namespace rdma::conformance

#include "tests/conformance/cm_conformance.hpp"
