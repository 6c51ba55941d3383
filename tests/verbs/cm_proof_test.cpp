// Two ends that meet over RDMA come together only if both know what the connection has carried, and the same secret.
#include "tests/conformance/meeting.hpp"
#include "tests/verbs/cm_fixture.hpp"

namespace rdma::conformance {
namespace {

using detail::EventKind;
using detail::Meeting;
using detail::Processes;
using detail::Reason;
using Pairs = std::tuple<IbCmPair, RnicCmPair>;

cm::Transcript& known_to(Processes<IbCmPair>& p, Meeting& m, Side side) { return p.fixture.transcripts[m.anchor(side).cookie]; }
cm::Transcript& known_to(Processes<RnicCmPair>& p, Meeting& m, Side side) { return p.fixture.transcripts[m.anchor(side).cookie]; }

/// Neither end has a connection; both are told why.
template <class F>
void are_kept_apart(Processes<F>& processes, Meeting& m, unsigned ms = 1000) {
  processes.offer(m, ms);
  processes.dial(m, ms);
  for (const Side side : {Side::a, Side::b}) {
    BOOST_REQUIRE(processes.wait_final(m, side));
    BOOST_TEST(m.final_event(side)->reason == Reason::unproven);
    BOOST_TEST(m.count(side, EventKind::established) == 0u);
  }
  BOOST_TEST(m.count(Side::a, EventKind::reply) == 0u);
  BOOST_TEST(m.count(Side::b, EventKind::request) == 0u);
}

}  // namespace

BOOST_AUTO_TEST_CASE_TEMPLATE(a_dialler_that_has_not_read_what_the_client_sent_is_refused, F, Pairs) {
  Processes<F> processes;
  Meeting& m = processes.meeting();
  known_to(processes, m, Side::a).received.back() ^= std::byte{1};
  are_kept_apart(processes, m);
}

BOOST_AUTO_TEST_CASE_TEMPLATE(a_dialler_that_has_sent_something_else_is_refused, F, Pairs) {
  Processes<F> processes;
  Meeting& m = processes.meeting();
  known_to(processes, m, Side::a).sent.front() ^= std::byte{1};
  are_kept_apart(processes, m);
}

BOOST_AUTO_TEST_CASE_TEMPLATE(who_claims_to_have_read_more_than_was_sent_is_not_dialled, F, Pairs) {
  Processes<F> processes;
  Meeting& m = processes.meeting();
  known_to(processes, m, Side::a).sent.resize(10);
  processes.offer(m, 1000);
  processes.dial(m, 1000);
  BOOST_REQUIRE(processes.wait_final(m, Side::a));
  BOOST_TEST(m.final_event(Side::a)->reason == Reason::unproven);
  BOOST_TEST((m.conn(Side::a) == cm::ConnId::none));
}

BOOST_AUTO_TEST_CASE_TEMPLATE(who_claims_to_have_read_next_to_nothing_is_not_dialled, F, Pairs) {
  Processes<F> processes;
  Meeting& m = processes.meeting();
  // Nothing has come from the client, and of 300 bytes it says it has read too few to be told from one who guesses.
  known_to(processes, m, Side::b).sent.clear();
  known_to(processes, m, Side::a).received.clear();
  known_to(processes, m, Side::b).received.resize(20);
  processes.offer(m, 1000);
  processes.dial(m, 1000);
  BOOST_REQUIRE(processes.wait_final(m, Side::a));
  BOOST_TEST(m.final_event(Side::a)->reason == Reason::unproven);
  BOOST_TEST((m.conn(Side::a) == cm::ConnId::none));
}

BOOST_AUTO_TEST_CASE_TEMPLATE(a_dialler_that_lags_behind_is_waited_for, F, Pairs) {
  Processes<F> processes;
  Meeting& m = processes.meeting();
  const cm::Transcript whole = known_to(processes, m, Side::a);
  known_to(processes, m, Side::a).received.resize(3);
  processes.offer(m);
  processes.dial(m);
  for (int i = 0; i < 200; ++i) processes.fixture.pump();
  BOOST_TEST((m.conn(Side::a) == cm::ConnId::none));
  known_to(processes, m, Side::a) = whole;
  BOOST_REQUIRE(processes.wait(m, Side::a, EventKind::established));
  BOOST_REQUIRE(processes.wait(m, Side::b, EventKind::established));
  processes.talk(m, 3);
}

// A byte is with the peer before the call that sent it has returned: each end may know more than the other for a moment.
BOOST_AUTO_TEST_CASE_TEMPLATE(a_client_that_lags_behind_is_waited_for, F, Pairs) {
  Processes<F> processes;
  Meeting& m = processes.meeting();
  const cm::Transcript whole = known_to(processes, m, Side::b);
  known_to(processes, m, Side::b).sent.resize(39);
  processes.offer(m);
  processes.dial(m);
  BOOST_REQUIRE(processes.wait_until([&] { return m.conn(Side::a) != cm::ConnId::none; }));  // it has dialled, with 40 bytes
  known_to(processes, m, Side::b) = whole;
  BOOST_REQUIRE(processes.wait(m, Side::a, EventKind::established));
  BOOST_REQUIRE(processes.wait(m, Side::b, EventKind::established));
}

BOOST_AUTO_TEST_CASE_TEMPLATE(both_may_have_come_further_since_the_offer, F, Pairs) {
  Processes<F> processes;
  Meeting& m = processes.meeting();
  const cm::Transcript whole = known_to(processes, m, Side::b);
  known_to(processes, m, Side::b).sent.resize(20);
  known_to(processes, m, Side::b).received.resize(20);
  processes.offer(m);
  for (int i = 0; i < 20; ++i) processes.fixture.pump();
  known_to(processes, m, Side::b) = whole;
  processes.dial(m);
  BOOST_REQUIRE(processes.wait(m, Side::a, EventKind::established));
  BOOST_REQUIRE(processes.wait(m, Side::b, EventKind::established));
}

BOOST_AUTO_TEST_CASE_TEMPLATE(without_a_byte_they_come_together_only_if_both_want_to, F, Pairs) {
  Processes<F> processes;
  for (const bool both : {true, false}) {
    Meeting& m = processes.meeting();
    for (const Side side : {Side::a, Side::b}) known_to(processes, m, side) = {{}, {}, both || side == Side::b};
    processes.offer(m, 1000);
    processes.dial(m, 1000);
    if (both) {
      BOOST_REQUIRE(processes.wait(m, Side::a, EventKind::established));
      BOOST_REQUIRE(processes.wait(m, Side::b, EventKind::established));
      continue;
    }
    for (const Side side : {Side::a, Side::b}) BOOST_REQUIRE(processes.wait_final(m, side));
    BOOST_TEST(m.count(Side::b, EventKind::request) == 0u);
  }
}

template <class F>
struct OtherSecret : F {
  OtherSecret() : F({cm::Secret{std::byte{1}}, cm::Secret{std::byte{2}}}) {}
};
template <class F>
struct SameSecret : F {
  SameSecret() : F({cm::Secret{std::byte{1}}, cm::Secret{std::byte{1}}}) {}
};

BOOST_AUTO_TEST_CASE_TEMPLATE(secrets_must_be_the_same, F, Pairs) {
  {
    Processes<OtherSecret<F>> processes;
    are_kept_apart(processes, processes.meeting());
  }
  Processes<SameSecret<F>> processes;
  processes.meet(processes.meeting());
}

// What a process in the middle cannot do: pass on a proof as its own. It is bound to the ends that the other knows.
BOOST_AUTO_TEST_CASE(a_proof_is_of_one_connection_and_one_side) {
  const std::vector<std::byte> bytes(40, std::byte{7}), other(40, std::byte{8});
  const cm::Claim claim{
      .client = {}, .server = {}, .dialler = 5, .listener = 6, .data = bytes, .from_client = bytes, .from_server = bytes};
  const auto proof = cm::prove({}, cm::Says::request, claim);
  BOOST_TEST(cm::is_proved(proof, {}, cm::Says::request, claim));
  BOOST_TEST(!cm::is_proved(proof, {}, cm::Says::reply, claim));
  const auto differs = [&](auto change) {
    cm::Claim changed = claim;
    change(changed);
    return !cm::is_proved(proof, {}, cm::Says::request, changed);
  };
  BOOST_TEST(differs([](cm::Claim& c) { c.token[0] = std::byte{1}; }));
  BOOST_TEST(differs([](cm::Claim& c) { c.client.port = 1; }));
  BOOST_TEST(differs([](cm::Claim& c) { c.server.bytes[15] = std::byte{1}; }));
  BOOST_TEST(differs([](cm::Claim& c) { c.dialler = 6; }));
  BOOST_TEST(differs([](cm::Claim& c) { c.listener = 5; }));
  BOOST_TEST(differs([&](cm::Claim& c) { c.data = other; }));
  BOOST_TEST(differs([&](cm::Claim& c) { c.from_client = std::span(bytes).first(39); }));
  BOOST_TEST(differs([&](cm::Claim& c) { c.from_server = other; }));
}

}  // namespace rdma::conformance
