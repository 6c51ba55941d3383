// The device suite on devices of libibverbs, an IB CA (RoCE) and an RNIC.
#include "tests/verbs/verbs_fixture.hpp"

namespace rdma::conformance {

using DeviceFixtures = std::tuple<VerbsIb, VerbsRnic>;

}  // namespace rdma::conformance

#include "tests/conformance/device_conformance.hpp"
#include "tests/conformance/shared_cq_conformance.hpp"

namespace rdma::conformance {

// The places in Soft-iWARP's file at which queues can be mapped are 4 KiB each; 0x90000 is no place for its library.
BOOST_AUTO_TEST_CASE(queues_are_made_until_there_are_as_many_as_a_hundred_lanes_have) {
  for (const char* name : {"rxe0", "siw0"}) {
    auto device = verbs::VerbsDevice::open(name);
    BOOST_REQUIRE(device.ok());
    for (const std::uint32_t depth : {64U, 256U, 1024U}) {
      std::vector<std::unique_ptr<Cq>> made;
      for (int i = 0; i < 200; ++i) {
        auto cq = (*device)->create_cq(depth, nullptr);
        BOOST_REQUIRE_MESSAGE(cq.ok(), name << ": the queue number " << i << " of depth " << depth);
        made.push_back(std::move(*cq));
      }
    }
  }
}

}  // namespace rdma::conformance
