// The contract of rdma_core/cm/connection_manager.hpp, executable. Every connection manager passes it.
//
// Before the include, the test source defines what to run on:
//   using CmFixtures = std::tuple<SimCmIb, SimCmRnic>;
// Each is a default-constructible class with
//   cm::ConnectionManager& cm(Side);       Side::b offers, Side::a dials
//   Device& device(Side);
//   std::array<cm::Anchor, 2> anchors();   the two ends of a new TCP connection: the dialler's, the offerer's
//   bool pump();                           lets a little time pass and calls progress() as fd() and next_timeout_ms() ask for, not
//   more void finish();                         as in ends.hpp
// and perhaps
//   void kill(Side);                       the process of that side dies; its Qps are gone already
#pragma once

#include "tests/conformance/meeting.hpp"

namespace rdma::conformance {

BOOST_AUTO_TEST_SUITE(connection_manager)

using detail::EventKind;
using detail::Meeting;
using detail::Processes;
using detail::Reason;
using detail::Seen;

BOOST_AUTO_TEST_CASE_TEMPLATE(private_data_have_room_for_what_every_transport_carries, F, CmFixtures) {
  Processes<F> processes;
  for (Side side : {Side::a, Side::b}) {
    const cm::Caps& caps = processes.fixture.cm(side).caps();
    BOOST_TEST(caps.max_request_private >= 20u);
    BOOST_TEST(caps.max_reply_private >= 160u);
    BOOST_TEST(caps.max_reject_private >= 140u);
    BOOST_TEST(processes.fixture.cm(side).name() != nullptr);
    BOOST_TEST(processes.fixture.cm(side).fd() >= 0);
  }
}

BOOST_AUTO_TEST_CASE_TEMPLATE(two_processes_meet_and_talk, F, CmFixtures) {
  Processes<F> processes;
  Meeting& m = processes.meeting();
  processes.meet(m);

  const Seen* request = m.find(Side::b, EventKind::request);
  BOOST_REQUIRE(request != nullptr);
  BOOST_TEST(detail::begins_with(request->data, m.request_data));
  BOOST_TEST((request->device == &processes.fixture.device(Side::b)));
  BOOST_TEST(request->path.id != 0u);
  const Seen* reply = m.find(Side::a, EventKind::reply);
  BOOST_REQUIRE(reply != nullptr);
  BOOST_TEST(detail::begins_with(reply->data, m.reply_data));
  BOOST_TEST((reply->device == &processes.fixture.device(Side::a)));
  for (Side side : {Side::a, Side::b}) {
    BOOST_TEST(m.end(side).qp->state() == QpState::rts);
    for (const Seen& s : m.seen[static_cast<std::size_t>(side)]) {
      BOOST_TEST(s.cookie == m.anchor(side).cookie);
      BOOST_TEST((s.conn == m.conn(side)));
    }
  }
  processes.talk(m, 7);
  processes.settle();
  BOOST_TEST(m.count(Side::a, EventKind::established) == 1u);
  BOOST_TEST(m.count(Side::b, EventKind::established) == 1u);
  BOOST_TEST(m.count(Side::b, EventKind::request) == 1u);
  BOOST_TEST(m.count(Side::a, EventKind::reply) == 1u);
}

BOOST_AUTO_TEST_CASE_TEMPLATE(connections_of_the_same_two_processes_do_not_mix, F, CmFixtures) {
  Processes<F> processes;
  Meeting& first = processes.meeting();
  Meeting& second = processes.meeting();
  second.request_data = detail::some_bytes(20, 77);
  processes.offer(second);
  processes.offer(first);
  processes.dial(first);
  processes.dial(second);
  for (Meeting* m : {&first, &second})
    for (Side side : {Side::a, Side::b}) BOOST_REQUIRE(processes.wait(*m, side, EventKind::established));
  BOOST_TEST(detail::begins_with(first.find(Side::b, EventKind::request)->data, first.request_data));
  BOOST_TEST(detail::begins_with(second.find(Side::b, EventKind::request)->data, second.request_data));
  BOOST_TEST((first.conn(Side::a) != second.conn(Side::a)));
  BOOST_TEST((first.conn(Side::b) != second.conn(Side::b)));
  processes.talk(first, 1);
  processes.talk(second, 2);
  // The end of one is not the end of the other.
  processes.fixture.cm(Side::a).disconnect(first.conn(Side::a));
  BOOST_TEST(processes.wait(first, Side::b, EventKind::disconnected));
  processes.settle();
  BOOST_TEST(second.final_event(Side::b) == nullptr);
  processes.talk(second, 3);
}

// --- finding each other

BOOST_AUTO_TEST_CASE_TEMPLATE(a_dial_waits_for_the_offer, F, CmFixtures) {
  Processes<F> processes;
  Meeting& m = processes.meeting();
  processes.dial(m);
  for (int i = 0; i < 5; ++i) processes.fixture.pump();
  BOOST_TEST(m.final_event(Side::a) == nullptr);
  processes.offer(m);
  BOOST_TEST(processes.wait(m, Side::a, EventKind::established));
  BOOST_TEST(processes.wait(m, Side::b, EventKind::established));
  processes.talk(m, 4);
}

BOOST_AUTO_TEST_CASE_TEMPLATE(a_dial_that_finds_nobody_ends, F, CmFixtures) {
  Processes<F> processes;
  Meeting& m = processes.meeting();
  processes.dial(m, 30);
  BOOST_REQUIRE(processes.wait_final(m, Side::a));
  BOOST_TEST(m.final_event(Side::a)->kind == EventKind::unreachable);
  BOOST_TEST(m.final_event(Side::a)->reason == Reason::no_peer);
  processes.settle();
  BOOST_TEST(m.seen[0].size() == 1u);
}

BOOST_AUTO_TEST_CASE_TEMPLATE(an_offer_that_nobody_takes_ends, F, CmFixtures) {
  Processes<F> processes;
  Meeting& m = processes.meeting();
  processes.offer(m, 30);
  BOOST_REQUIRE(processes.wait_final(m, Side::b));
  BOOST_TEST(m.final_event(Side::b)->kind == EventKind::unreachable);
  BOOST_TEST(m.final_event(Side::b)->reason == Reason::no_peer);
  processes.settle();
  BOOST_TEST(m.seen[1].size() == 1u);
}

BOOST_AUTO_TEST_CASE_TEMPLATE(a_withdrawn_offer_is_found_by_nobody, F, CmFixtures) {
  Processes<F> processes;
  Meeting& m = processes.meeting();
  processes.offer(m);
  processes.fixture.cm(Side::b).withdraw(m.anchor(Side::b).cookie);
  processes.fixture.cm(Side::b).withdraw(m.anchor(Side::b).cookie);  // once more does no harm
  processes.dial(m, 30);
  BOOST_REQUIRE(processes.wait_final(m, Side::a));
  BOOST_TEST(m.final_event(Side::a)->kind == EventKind::unreachable);
  BOOST_TEST(m.seen[1].empty());
}

BOOST_AUTO_TEST_CASE_TEMPLATE(a_dial_finds_only_its_own_connection, F, CmFixtures) {
  Processes<F> processes;
  Meeting& offered = processes.meeting();
  Meeting& dialled = processes.meeting();
  processes.offer(offered);
  processes.dial(dialled, 30);
  BOOST_REQUIRE(processes.wait_final(dialled, Side::a));
  BOOST_TEST(dialled.final_event(Side::a)->kind == EventKind::unreachable);
  BOOST_TEST(offered.seen[1].empty());
}

BOOST_AUTO_TEST_CASE_TEMPLATE(a_dialler_may_change_its_mind, F, CmFixtures) {
  Processes<F> processes;
  Meeting& m = processes.meeting();
  m.propose = false;
  processes.offer(m);
  processes.dial(m);
  BOOST_REQUIRE(processes.wait_final(m, Side::a));
  BOOST_TEST(m.final_event(Side::a)->kind == EventKind::unreachable);
  BOOST_TEST(m.final_event(Side::a)->reason == Reason::no_resources);
  BOOST_TEST(m.count(Side::b, EventKind::established) == 0u);
}

// --- saying no

BOOST_AUTO_TEST_CASE_TEMPLATE(a_rejection_arrives_with_reason_and_data, F, CmFixtures) {
  Processes<F> processes;
  Meeting& m = processes.meeting();
  const detail::Bytes why = detail::some_bytes(60, 9);
  m.on_request = [&](const Seen& request) { processes.fixture.cm(Side::b).reject(request.conn, Reason::version_mismatch, why); };
  processes.offer(m);
  processes.dial(m);
  BOOST_REQUIRE(processes.wait_final(m, Side::a));
  BOOST_TEST(m.final_event(Side::a)->kind == EventKind::rejected);
  BOOST_TEST(m.final_event(Side::a)->reason == Reason::version_mismatch);
  BOOST_TEST(detail::begins_with(m.final_event(Side::a)->data, why));
  processes.settle();
  BOOST_TEST(m.seen[0].size() == 1u);
  BOOST_TEST(m.seen[1].size() == 1u);
  // It is over: nothing can be made of it.
  BOOST_TEST(!processes.fixture.cm(Side::a).establish(m.conn(Side::a)));
  BOOST_TEST(!processes.fixture.cm(Side::b).accept(m.conn(Side::b), *m.end(Side::a).qp, {}));
}

// --- private data

BOOST_AUTO_TEST_CASE_TEMPLATE(private_data_of_the_greatest_size_arrive, F, CmFixtures) {
  Processes<F> processes;
  Meeting& m = processes.meeting();
  const cm::Caps& caps = processes.fixture.cm(Side::a).caps();
  m.request_data = detail::some_bytes(caps.max_request_private, 3);
  m.reply_data = detail::some_bytes(caps.max_reply_private, 4);
  processes.meet(m);
  BOOST_TEST((m.find(Side::b, EventKind::request)->data == m.request_data));
  BOOST_TEST((m.find(Side::a, EventKind::reply)->data == m.reply_data));

  Meeting& no = processes.meeting();
  const detail::Bytes why = detail::some_bytes(caps.max_reject_private, 5);
  no.on_request = [&](const Seen& request) { processes.fixture.cm(Side::b).reject(request.conn, Reason::refused, why); };
  processes.offer(no);
  processes.dial(no);
  BOOST_REQUIRE(processes.wait_final(no, Side::a));
  BOOST_TEST((no.final_event(Side::a)->data == why));
}

BOOST_AUTO_TEST_CASE_TEMPLATE(private_data_that_are_too_long_are_refused_not_cut, F, CmFixtures) {
  Processes<F> processes;
  const cm::Caps& caps = processes.fixture.cm(Side::a).caps();
  Meeting& long_request = processes.meeting();
  long_request.request_data = detail::some_bytes(caps.max_request_private + 1, 3);
  processes.offer(long_request);
  processes.dial(long_request);
  BOOST_REQUIRE(processes.wait_final(long_request, Side::a));
  BOOST_TEST(long_request.count(Side::b, EventKind::request) == 0u);

  Meeting& long_reply = processes.meeting();
  long_reply.reply_data = detail::some_bytes(caps.max_reply_private + 1, 3);
  long_reply.on_request = [&](const Seen& request) {
    processes.accept(long_reply, request);
    BOOST_TEST(!long_reply.accept_ok);
    processes.fixture.cm(Side::b).reject(request.conn, Reason::no_resources, {});
  };
  processes.offer(long_reply);
  processes.dial(long_reply);
  BOOST_REQUIRE(processes.wait_final(long_reply, Side::a));
  BOOST_TEST(long_reply.final_event(Side::a)->kind == EventKind::rejected);
  BOOST_TEST(long_reply.final_event(Side::a)->reason == Reason::no_resources);
}

BOOST_AUTO_TEST_CASE_TEMPLATE(private_data_may_be_empty, F, CmFixtures) {
  Processes<F> processes;
  Meeting& m = processes.meeting();
  m.request_data.clear();
  m.reply_data.clear();
  processes.meet(m);
  BOOST_TEST(detail::begins_with(m.find(Side::b, EventKind::request)->data, {}));
  processes.talk(m, 2);
}

// --- the first message

BOOST_AUTO_TEST_CASE_TEMPLATE(the_passive_side_is_ready_when_the_active_side_is_told, F, CmFixtures) {
  Processes<F> processes;
  Meeting& m = processes.meeting();
  m.on_reply = [&](const Seen& reply) {
    BOOST_REQUIRE(m.end(Side::b).qp);
    BOOST_TEST(m.end(Side::b).qp->state() == QpState::rts);
    BOOST_REQUIRE(processes.fixture.cm(Side::a).establish(reply.conn));
    BOOST_TEST(m.end(Side::a).qp->state() == QpState::rts);
    // At once: it may be there before `established` is.
    m.end(Side::a).fill(30, 24, 5);
    BOOST_TEST(m.end(Side::a).send(30, 24) == Post::ok);
  };
  processes.offer(m);
  processes.dial(m);
  BOOST_REQUIRE(processes.wait(m, Side::a, EventKind::established));
  const Wc got = processes.wait_one(*m.end(Side::b).recv_cq);
  BOOST_TEST(got.status == WcStatus::success);
  BOOST_TEST(m.end(Side::b).holds(static_cast<std::uint32_t>(got.wr_id), 24, 5));
  // A receive completion counts as established: the answer may leave.
  m.end(Side::b).fill(31, 16, 6);
  BOOST_TEST(m.end(Side::b).send(31, 16) == Post::ok);
  const Wc answer = processes.wait_one(*m.end(Side::a).recv_cq);
  BOOST_TEST(m.end(Side::a).holds(static_cast<std::uint32_t>(answer.wr_id), 16, 6));
  BOOST_TEST(processes.wait(m, Side::b, EventKind::established));
  processes.wait_one(*m.end(Side::a).send_cq);
  processes.wait_one(*m.end(Side::b).send_cq);
}

// --- the end

BOOST_AUTO_TEST_CASE_TEMPLATE(either_side_ends_a_connection_and_the_other_is_told_once, F, CmFixtures) {
  for (Side who : {Side::a, Side::b}) {
    Processes<F> processes;
    const Side other = who == Side::a ? Side::b : Side::a;
    Meeting& m = processes.meeting();
    processes.meet(m);
    const std::size_t before = m.seen[static_cast<std::size_t>(who)].size();
    processes.fixture.cm(who).disconnect(m.conn(who));
    processes.fixture.cm(who).disconnect(m.conn(who));
    BOOST_REQUIRE(processes.wait(m, other, EventKind::disconnected));
    processes.fixture.cm(other).disconnect(m.conn(other));  // too late, no harm
    processes.settle();
    BOOST_TEST(m.count(other, EventKind::disconnected) == 1u);
    BOOST_TEST(m.seen[static_cast<std::size_t>(who)].size() == before);
  }
}

BOOST_AUTO_TEST_CASE_TEMPLATE(unknown_connections_are_an_error_or_nothing, F, CmFixtures) {
  Processes<F> processes;
  Meeting& m = processes.meeting();
  processes.meet(m);
  auto& cm = processes.fixture.cm(Side::a);
  const auto nobody = detail::ConnId{0xDEAD'BEEF};
  BOOST_TEST(!cm.accept(nobody, *m.end(Side::a).qp, {}));
  BOOST_TEST(!cm.establish(nobody));
  cm.reject(nobody, Reason::refused, {});
  cm.disconnect(nobody);
  cm.disconnect(detail::ConnId::none);
  cm.withdraw(12345);
  processes.talk(m, 1);
}

BOOST_AUTO_TEST_CASE_TEMPLATE(a_dial_given_up_half_way_ends_at_both_sides, F, CmFixtures) {
  Processes<F> processes;
  Meeting& m = processes.meeting();
  m.on_reply = [&](const Seen& reply) { processes.fixture.cm(Side::a).disconnect(reply.conn); };
  processes.offer(m);
  processes.dial(m);
  BOOST_REQUIRE(processes.wait_final(m, Side::b));
  BOOST_TEST(m.final_event(Side::b)->kind == EventKind::disconnected);
  processes.settle();
  BOOST_TEST(m.count(Side::a, EventKind::established) == 0u);
}

BOOST_AUTO_TEST_CASE_TEMPLATE(a_passive_side_that_falls_silent_does_not_hold_the_dialler, F, CmFixtures) {
  Processes<F> processes;
  Meeting& m = processes.meeting();
  m.on_request = nullptr;
  processes.offer(m);
  processes.dial(m);
  BOOST_REQUIRE(processes.wait_final(m, Side::a));
  BOOST_TEST(m.final_event(Side::a)->reason != Reason::none);
  BOOST_REQUIRE(processes.wait_final(m, Side::b));
  BOOST_TEST(!processes.fixture.cm(Side::b).accept(m.conn(Side::b), *m.end(Side::a).qp, {}));
}

BOOST_AUTO_TEST_CASE_TEMPLATE(the_death_of_the_peer_ends_its_connections, F, CmFixtures) {
  if constexpr (requires(F & f) { f.kill(Side::a); }) {
    for (Side who : {Side::a, Side::b}) {
      Processes<F> processes;
      const Side other = who == Side::a ? Side::b : Side::a;
      Meeting& first = processes.meeting();
      Meeting& second = processes.meeting();
      processes.meet(first);
      processes.meet(second);
      processes.kill(who);
      for (Meeting* m : {&first, &second}) {
        BOOST_REQUIRE(processes.wait(*m, other, EventKind::disconnected));
        BOOST_TEST(m->final_event(other)->reason == Reason::peer_died);
      }
      processes.settle();
      BOOST_TEST(first.count(other, EventKind::disconnected) == 1u);
    }
  }
}

BOOST_AUTO_TEST_SUITE_END()

}  // namespace rdma::conformance
