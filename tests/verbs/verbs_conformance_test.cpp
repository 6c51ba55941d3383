// The device suite on devices of libibverbs, an IB CA (RoCE) and an RNIC.
#include <signal.h>
#include <sys/time.h>

#include <atomic>

#include "tests/verbs/verbs_fixture.hpp"

namespace rdma::conformance {

using DeviceFixtures = std::tuple<VerbsIb, VerbsRnic>;

}  // namespace rdma::conformance

#include "tests/conformance/device_conformance.hpp"
#include "tests/conformance/shared_cq_conformance.hpp"

namespace rdma::conformance {

// Of four Cqs on one channel the last two share a queue of the device's. Most of a waiting thread's time is spent looking.
namespace {
std::atomic<Cq*> other_cq{nullptr};
std::atomic<int> looks{0};
void look(int) {
  Wc wc;
  if (!other_cq.load()->maybe_ready() && other_cq.load()->poll({&wc, 1}) == 0) looks.fetch_add(1);
}
}  // namespace

BOOST_AUTO_TEST_CASE_TEMPLATE(a_signal_handler_may_look_while_its_thread_does, F, DeviceFixtures) {
  Party<F> party(false);
  looks = 0;
  other_cq = party.b.cqs[3].get();
  struct sigaction action {};
  action.sa_handler = &look;
  BOOST_REQUIRE_EQUAL(sigaction(SIGALRM, &action, nullptr), 0);
  const itimerval often{.it_interval = {0, 200}, .it_value = {0, 200}}, never{};
  setitimer(ITIMER_REAL, &often, nullptr);
  while (looks < 100) BOOST_REQUIRE(!party.b.cqs[2]->maybe_ready());
  setitimer(ITIMER_REAL, &never, nullptr);
  signal(SIGALRM, SIG_DFL);
}

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
