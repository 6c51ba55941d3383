#include "sdp/adverts.hpp"

#include <boost/test/unit_test.hpp>
#include <utility>

namespace {

using sdp::DueAdvert;
using sdp::FlowMode;
using sdp::SinkAdverts;
using sdp::SourceAdverts;
using Kind = DueAdvert::Kind;
using SourceRx = SourceAdverts::Rx;
using SinkRx = SinkAdverts::Rx;

constexpr std::uint32_t kPayload = 100;

SourceAdverts source(FlowMode mode = FlowMode::combined) {
  SourceAdverts s;
  s.start(4, kPayload);
  if (mode != FlowMode::combined) {
    s.want_mode(mode);
    s.sent(s.next(), 1);
  }
  return s;
}
SinkAdverts sink(FlowMode mode = FlowMode::combined) {
  SinkAdverts s;
  s.start(4, 4);
  if (mode != FlowMode::combined) BOOST_TEST((s.on_mode_change(mode) == SinkRx::nothing));
  return s;
}
/// Sends what is due and says what it was.
template <class Half>
Kind send(Half& half, std::uint32_t mseq = 10) {
  const DueAdvert due = half.next();
  half.sent(due, mseq);
  return due.kind;
}
constexpr sdp::wire::SrcAvail kAdvert{1000, 7, 0x10000};
constexpr sdp::wire::SinkAvail kSink{500, 7, 0x20000, 0};

BOOST_AUTO_TEST_CASE(an_open_advert_stops_data_and_ends_with_the_last_byte) {
  SourceAdverts s = source();
  BOOST_TEST(s.may_advertise(false));
  BOOST_TEST(!s.may_advertise(true));
  s.on_advert_sent(1000, 10);
  BOOST_TEST(!s.may_send_data());
  BOOST_TEST(!s.may_advertise(false));
  BOOST_TEST((s.on_rdma_rd_compl(400) == SourceRx::progress));
  BOOST_TEST(!s.may_send_data());
  BOOST_TEST((s.on_rdma_rd_compl(590) == SourceRx::over));
  BOOST_TEST(s.may_send_data());
  BOOST_TEST(s.moved() == 990U);
}

// The source knows how far the sink has read, and goes on at once; the sink's word for it comes later.
BOOST_AUTO_TEST_CASE(a_withdrawn_advert_is_over_and_its_reports_may_still_come) {
  SourceAdverts s = source();
  s.on_advert_sent(1000, 10);
  BOOST_TEST((s.on_rdma_rd_compl(100) == SourceRx::progress));
  s.withdrawn(400);
  BOOST_TEST(!s.is_open());
  BOOST_TEST(s.moved() == 400U);
  BOOST_TEST(!s.may_send_data());  // not before the sink knows
  BOOST_TEST(!s.may_advertise(false));
  BOOST_TEST((send(s) == Kind::src_cancel));
  BOOST_TEST(s.may_send_data());
  s.on_advert_sent(500, 10);
  BOOST_TEST((s.on_rdma_rd_compl(300) == SourceRx::nothing));
  BOOST_TEST(s.moved() == 400U);
  BOOST_TEST((s.on_send_sm() == SourceRx::over));  // of the first; the sink drops the second, too
  s.on_advert_sent(500, 10);
  BOOST_TEST((s.on_rdma_rd_compl(490) == SourceRx::over));
}

BOOST_AUTO_TEST_CASE(withdrawn_when_all_is_read_nothing_is_cancelled) {
  SourceAdverts s = source();
  s.on_advert_sent(1000, 10);
  BOOST_TEST(s.want_cancel());
  s.withdrawn(990);
  BOOST_TEST(s.moved() == 990U);
  BOOST_TEST((s.next().kind == Kind::none));
  BOOST_TEST(s.may_send_data());
  BOOST_TEST((s.on_rdma_rd_compl(991) == SourceRx::error));
  BOOST_TEST((s.on_rdma_rd_compl(990) == SourceRx::nothing));
}

BOOST_AUTO_TEST_CASE(a_spoilt_count_of_a_withdrawn_advert_is_no_more_than_it_and_no_less_than_was_reported) {
  for (const auto& [said, counts] : {std::pair(~0U, 990U), std::pair(0U, 50U)}) {
    SourceAdverts s = source();
    s.on_advert_sent(1000, 10);
    BOOST_TEST((s.on_rdma_rd_compl(50) == SourceRx::progress));
    s.withdrawn(said);
    BOOST_TEST(s.moved() == counts);
  }
}

BOOST_AUTO_TEST_CASE(more_than_was_advertised_is_refused) {
  SourceAdverts s = source();
  s.on_advert_sent(1000, 10);
  BOOST_TEST((s.on_rdma_rd_compl(991) == SourceRx::error));
}

BOOST_AUTO_TEST_CASE(a_late_answer_without_an_advert_is_ignored) {
  SourceAdverts s = source();
  BOOST_TEST((s.on_rdma_rd_compl(5) == SourceRx::nothing));
  BOOST_TEST((s.on_send_sm() == SourceRx::nothing));
  BOOST_TEST(!s.want_cancel());
}

BOOST_AUTO_TEST_CASE(a_cancel_ends_by_completion_or_by_send_sm) {
  for (const bool faster : {true, false}) {
    SourceAdverts s = source();
    s.on_advert_sent(1000, 10);
    BOOST_TEST(s.want_cancel());
    BOOST_TEST((send(s) == Kind::src_cancel));
    BOOST_TEST(s.is_cancelling());
    BOOST_TEST((send(s) == Kind::none));
    BOOST_TEST(((faster ? s.on_rdma_rd_compl(990) : s.on_send_sm()) == SourceRx::over));
    BOOST_TEST(!s.is_cancelling());
    BOOST_TEST(s.moved() == (faster ? 990U : 0U));
    BOOST_TEST(s.may_advertise(false));
  }
}

BOOST_AUTO_TEST_CASE(a_cancel_that_is_overtaken_is_not_sent) {
  SourceAdverts s = source();
  s.on_advert_sent(1000, 10);
  BOOST_TEST(s.want_cancel());
  BOOST_TEST((s.on_rdma_rd_compl(990) == SourceRx::over));
  BOOST_TEST((send(s) == Kind::none));
}

BOOST_AUTO_TEST_CASE(a_stale_sink_buffer_is_discarded_and_data_takes_a_valid_one) {
  SourceAdverts s = source(FlowMode::pipelined);
  s.on_data_sent();  // crosses the first SinkAvail
  BOOST_TEST((s.on_sink_avail(kSink) == SourceRx::nothing));
  BOOST_TEST(!s.write_target().has_value());
  BOOST_TEST((s.on_sink_avail(kSink) == SourceRx::nothing));
  BOOST_TEST(s.write_target().has_value());
  s.on_data_sent();  // urgent: into the buffer
  BOOST_TEST(!s.write_target().has_value());
}

BOOST_AUTO_TEST_CASE(a_buffer_is_finished_when_no_payload_fits_or_nothing_follows) {
  SourceAdverts s = source(FlowMode::pipelined);
  BOOST_TEST((s.on_sink_avail(kSink) == SourceRx::nothing));
  s.on_written(300, true);
  BOOST_TEST((s.next().kind == Kind::none));
  BOOST_TEST(!s.may_send_data());
  s.on_written(101, true);
  BOOST_TEST((s.next() == DueAdvert{.kind = Kind::wr_compl, .bytes = 401}));
  BOOST_TEST(!s.write_target().has_value());
  s.sent(s.next(), 5);
  BOOST_TEST(s.may_send_data());
}

BOOST_AUTO_TEST_CASE(a_sink_buffer_voids_what_was_advertised) {
  SourceAdverts s = source(FlowMode::pipelined);
  s.on_advert_sent(1000, 0);
  s.on_advert_sent(1000, 0);
  BOOST_TEST(s.want_cancel());
  BOOST_TEST((s.on_sink_avail(kSink) == SourceRx::over));
  BOOST_TEST(!s.is_cancelling());
  BOOST_TEST(!s.is_open());
}

BOOST_AUTO_TEST_CASE(a_sink_cancel_is_acknowledged_only_for_what_was_dropped) {
  SourceAdverts s = source(FlowMode::pipelined);
  BOOST_TEST((s.on_sink_avail_cancel() == SourceRx::nothing));
  BOOST_TEST((s.next().kind == Kind::none));
  BOOST_TEST((s.on_sink_avail(kSink) == SourceRx::nothing));
  s.on_written(10, true);
  BOOST_TEST((s.on_sink_avail_cancel() == SourceRx::nothing));
  BOOST_TEST((send(s) == Kind::wr_compl));
  BOOST_TEST((send(s) == Kind::none));
  BOOST_TEST((s.on_sink_avail(kSink) == SourceRx::nothing));
  BOOST_TEST((s.on_sink_avail_cancel() == SourceRx::nothing));
  BOOST_TEST(!s.may_send_data());
  BOOST_TEST((send(s) == Kind::sink_cancel_ack));
  BOOST_TEST(s.may_send_data());
}

BOOST_AUTO_TEST_CASE(a_sink_buffer_that_crosses_the_end_of_pipelined_is_void) {
  SourceAdverts s = source(FlowMode::pipelined);
  s.want_mode(FlowMode::combined);
  BOOST_TEST((send(s, 20) == Kind::mode_change));
  s.on_ack(19);
  BOOST_TEST((s.on_sink_avail(kSink) == SourceRx::nothing));
  BOOST_TEST(!s.write_target().has_value());
  s.on_ack(20);
  BOOST_TEST((s.on_sink_avail(kSink) == SourceRx::error));
}

BOOST_AUTO_TEST_CASE(pipelined_does_not_return_before_its_end_was_seen) {
  SourceAdverts s = source(FlowMode::pipelined);
  s.want_mode(FlowMode::combined);
  BOOST_TEST((send(s, 20) == Kind::mode_change));
  s.want_mode(FlowMode::pipelined);
  BOOST_TEST((send(s, 21) == Kind::none));
  s.on_ack(20);
  s.want_mode(FlowMode::pipelined);
  BOOST_TEST((send(s, 21) == Kind::mode_change));
}

BOOST_AUTO_TEST_CASE(too_small_a_sink_buffer_is_refused) {
  SourceAdverts s = source(FlowMode::pipelined);
  BOOST_TEST((s.on_sink_avail({kPayload - 1, 7, 0x20000, 0}) == SourceRx::error));
}

BOOST_AUTO_TEST_CASE(bytes_are_reported_after_the_read_and_by_advert) {
  SinkAdverts s = sink(FlowMode::pipelined);
  BOOST_TEST((s.on_src_avail(kAdvert, 0) == SinkRx::opened));
  BOOST_TEST((s.on_src_avail(kAdvert, 0) == SinkRx::opened));
  s.read_started(600);
  BOOST_TEST((s.next().kind == Kind::none));
  s.read_done(600, 600);
  BOOST_TEST(s.front().address == kAdvert.address + 600);
  s.read_started(400);
  s.read_done(400, 400);
  s.read_started(1);
  s.read_done(1, 1);
  BOOST_TEST((s.next() == DueAdvert{.kind = Kind::rd_compl, .bytes = 1000}));
  s.sent(s.next(), 1);
  BOOST_TEST((s.next() == DueAdvert{.kind = Kind::rd_compl, .bytes = 1}));
}

BOOST_AUTO_TEST_CASE(a_cancel_waits_for_the_read_and_drops_the_rest) {
  SinkAdverts s = sink();
  BOOST_TEST((s.on_src_avail(kAdvert, 10) == SinkRx::opened));
  s.read_started(500);
  BOOST_TEST((s.on_src_avail_cancel() == SinkRx::nothing));
  BOOST_TEST((s.next().kind == Kind::none));
  s.read_done(500, 500);
  BOOST_TEST(!s.is_open());
  BOOST_TEST((send(s) == Kind::rd_compl));
  BOOST_TEST((send(s) == Kind::send_sm));
  BOOST_TEST((send(s) == Kind::none));
}

BOOST_AUTO_TEST_CASE(several_reads_are_under_way_and_a_cancel_waits_for_all) {
  SinkAdverts s = sink();
  BOOST_TEST((s.on_src_avail(kAdvert, 10) == SinkRx::opened));
  s.read_started(100);
  BOOST_TEST(s.next_read().address == kAdvert.address + 110);
  s.read_started(200);
  s.read_done(100, 100);
  BOOST_TEST((s.next() == DueAdvert{.kind = Kind::rd_compl, .bytes = 100}));
  BOOST_TEST((s.on_src_avail_cancel() == SinkRx::nothing));
  BOOST_TEST(s.next_read().left == 0U);
  s.read_done(200, 200);
  BOOST_TEST((s.next() == DueAdvert{.kind = Kind::rd_compl, .bytes = 300}));
  BOOST_TEST((send(s) == Kind::rd_compl));
  BOOST_TEST((send(s) == Kind::send_sm));
}

BOOST_AUTO_TEST_CASE(nothing_behind_a_read_that_was_cut_short_counts) {
  SinkAdverts s = sink();
  BOOST_TEST((s.on_src_avail(kAdvert, 10) == SinkRx::opened));
  s.read_started(100);
  s.read_started(200);
  s.read_done(100, 60);
  s.read_done(200, 200);
  BOOST_TEST((s.next() == DueAdvert{.kind = Kind::rd_compl, .bytes = 60}));
  BOOST_TEST((send(s) == Kind::rd_compl));
  BOOST_TEST((send(s) == Kind::send_sm));
}

BOOST_AUTO_TEST_CASE(a_cancel_of_nothing_is_not_answered) {
  SinkAdverts s = sink();
  BOOST_TEST((s.on_src_avail_cancel() == SinkRx::nothing));
  BOOST_TEST((s.next().kind == Kind::none));
}

BOOST_AUTO_TEST_CASE(a_read_that_is_cut_short_asks_for_the_rest) {
  SinkAdverts s = sink();
  BOOST_TEST((s.on_src_avail(kAdvert, 10) == SinkRx::opened));
  s.read_started(990);
  s.read_done(990, 0);
  BOOST_TEST((send(s) == Kind::send_sm));
  BOOST_TEST(!s.is_open());
}

BOOST_AUTO_TEST_CASE(adverts_sent_before_the_source_saw_send_sm_are_void) {
  SinkAdverts s = sink(FlowMode::pipelined);
  BOOST_TEST((s.on_src_avail(kAdvert, 0) == SinkRx::opened));
  BOOST_TEST(s.want_send_sm());
  BOOST_TEST((s.on_src_avail(kAdvert, 0) == SinkRx::dropped));
  BOOST_TEST((send(s, 30) == Kind::send_sm));
  s.on_ack(29);
  BOOST_TEST((s.on_src_avail(kAdvert, 0) == SinkRx::dropped));
  s.on_ack(30);
  BOOST_TEST((s.on_src_avail(kAdvert, 0) == SinkRx::opened));
}

BOOST_AUTO_TEST_CASE(illegal_in_their_mode) {
  SinkAdverts combined = sink();
  BOOST_TEST((combined.on_src_avail(kAdvert, 0) == SinkRx::error));
  BOOST_TEST((combined.on_src_avail(kAdvert, 1000) == SinkRx::error));
  BOOST_TEST((combined.on_src_avail(kAdvert, 1) == SinkRx::opened));
  BOOST_TEST((combined.on_src_avail(kAdvert, 1) == SinkRx::error));
  BOOST_TEST((combined.on_payload(1) == SinkRx::error));
  BOOST_TEST((combined.on_mode_change(FlowMode::buffered) == SinkRx::error));
  SinkAdverts pipelined = sink(FlowMode::pipelined);
  BOOST_TEST((pipelined.on_src_avail(kAdvert, 1) == SinkRx::error));
  BOOST_TEST((pipelined.on_mode_change(FlowMode::buffered) == SinkRx::error));
  SinkAdverts buffered = sink(FlowMode::buffered);
  BOOST_TEST((buffered.on_src_avail(kAdvert, 1) == SinkRx::error));
  BOOST_TEST(!buffered.may_advertise());
  SourceAdverts s = source();
  BOOST_TEST((s.on_sink_avail(kSink) == SourceRx::error));
  BOOST_TEST((s.on_mode_change(FlowMode::combined) == SourceRx::error));
}

BOOST_AUTO_TEST_CASE(more_adverts_than_agreed_are_refused) {
  SinkAdverts s = sink(FlowMode::pipelined);
  for (int i = 0; i < 4; ++i) BOOST_TEST((s.on_src_avail(kAdvert, 0) == SinkRx::opened));
  BOOST_TEST((s.on_src_avail(kAdvert, 0) == SinkRx::error));
  SourceAdverts other = source(FlowMode::pipelined);
  for (int i = 0; i < 4; ++i) {
    BOOST_TEST(other.may_advertise(false));
    other.on_advert_sent(1000, 0);
  }
  BOOST_TEST(!other.may_advertise(false));
}

BOOST_AUTO_TEST_CASE(data_fills_the_oldest_sink_buffer) {
  SinkAdverts s = sink(FlowMode::pipelined);
  BOOST_TEST((s.on_payload(5) == SinkRx::queue));
  BOOST_TEST(s.non_discards() == 1U);
  s.on_sink_avail_sent(500);
  s.on_sink_avail_sent(500);
  BOOST_TEST((s.on_payload(5) == SinkRx::placed));
  BOOST_TEST(s.non_discards() == 1U);
  BOOST_TEST((s.take_completed() == 5U));
  BOOST_TEST((s.on_rdma_wr_compl(501) == SinkRx::error));
  BOOST_TEST((s.on_rdma_wr_compl(500) == SinkRx::finished));
  BOOST_TEST((s.take_completed() == 500U));
  BOOST_TEST((s.on_rdma_wr_compl(1) == SinkRx::error));
}

BOOST_AUTO_TEST_CASE(a_sink_cancel_ends_by_completion_or_acknowledgement) {
  for (const bool written : {true, false}) {
    SinkAdverts s = sink(FlowMode::pipelined);
    s.on_sink_avail_sent(500);
    BOOST_TEST(s.want_sink_cancel());
    BOOST_TEST((s.on_sink_cancel_ack() == SinkRx::error));
    BOOST_TEST((send(s) == Kind::sink_cancel));
    BOOST_TEST(!s.may_advertise());
    BOOST_TEST(((written ? s.on_rdma_wr_compl(7) : s.on_sink_cancel_ack()) == SinkRx::finished));
    BOOST_TEST((s.take_completed() == (written ? 7U : 0U)));
    BOOST_TEST(s.may_advertise());
  }
}

BOOST_AUTO_TEST_CASE(the_sink_brings_combined_back) {
  SinkAdverts s = sink(FlowMode::buffered);
  SourceAdverts other = source(FlowMode::buffered);
  BOOST_TEST(!other.may_advertise(false));
  s.want_combined();
  BOOST_TEST((send(s) == Kind::mode_change));
  BOOST_TEST((other.on_mode_change(FlowMode::combined) == SourceRx::nothing));
  BOOST_TEST(other.may_advertise(false));
}

}  // namespace
