// The base header: identifiers, lengths, flags.
#include <array>
#include <boost/test/unit_test.hpp>
#include <cstring>
#include <vector>

#include "sdp/wire/bsdh.hpp"
#include "sdp/wire/describe.hpp"

using namespace sdp::wire;

namespace {

std::vector<std::byte> bytes(std::initializer_list<int> values) {
  std::vector<std::byte> out;
  for (int v : values) out.push_back(static_cast<std::byte>(v));
  return out;
}

/// A message of that identifier with a right Len, zeros behind the base header.
std::vector<std::byte> message(int mid, int flags, std::size_t size) {
  std::vector<std::byte> out(size);
  emit_bsdh(Bsdh{static_cast<Mid>(mid), static_cast<std::uint8_t>(flags), 3, static_cast<std::uint32_t>(size), 5, 4}, out.data());
  return out;
}

std::optional<WireError> error_of(const std::vector<std::byte>& msg) {
  const auto parsed = parse_bsdh(msg);
  if (parsed) return std::nullopt;
  return parsed.error();
}

}  // namespace

BOOST_AUTO_TEST_CASE(all_mids_are_eighteen_and_index_the_shapes) {
  for (std::size_t i = 0; i < kAllMids.size(); ++i) BOOST_TEST(mid_index(static_cast<std::uint8_t>(kAllMids[i])) == i);
  int known = 0;
  for (int raw = 0; raw < 256; ++raw) known += is_known_mid(static_cast<std::uint8_t>(raw));
  BOOST_TEST(known == 18);
}

BOOST_AUTO_TEST_CASE(extended_headers_are_those_of_the_catalogue) {
  struct Row {
    Mid mid;
    std::size_t extended;
    bool payload;
  };
  const Row rows[] = {
      {Mid::hello, 52, false},           {Mid::hello_ack, 8, false},
      {Mid::disconn, 0, false},          {Mid::abort_conn, 0, false},
      {Mid::send_sm, 0, false},          {Mid::rdma_wr_compl, 4, false},
      {Mid::rdma_rd_compl, 4, false},    {Mid::mode_change, 4, false},
      {Mid::src_avail_cancel, 0, false}, {Mid::sink_avail_cancel, 0, false},
      {Mid::sink_cancel_ack, 0, false},  {Mid::ch_rcv_buf, 4, false},
      {Mid::ch_rcv_buf_ack, 4, false},   {Mid::susp_comm, 8, false},
      {Mid::susp_comm_ack, 0, false},    {Mid::sink_avail, 20, true},
      {Mid::src_avail, 16, true},        {Mid::data, 0, true},
  };
  for (const Row& row : rows) {
    BOOST_TEST_CONTEXT(to_string(row.mid)) {
      BOOST_TEST(extended_header_bytes(row.mid) == row.extended);
      BOOST_TEST(payload_offset(row.mid) == 16 + row.extended);
      BOOST_TEST(may_carry_payload(row.mid) == row.payload);
    }
  }
}

BOOST_AUTO_TEST_CASE(emits_the_golden_bytes) {
  const Bsdh h{Mid::data, kOobPres | kOobPend, 0x0102, 0x03040506, 0x0708090A, 0x0B0C0D0E};
  std::array<std::byte, kBsdhBytes> out;
  emit_bsdh(h, std::span(out));
  const auto golden = bytes({0xFF, 0x03, 0x01, 0x02, 0x03, 0x04, 0x05, 0x06, 0x07, 0x08, 0x09, 0x0A, 0x0B, 0x0C, 0x0D, 0x0E});
  BOOST_TEST(std::memcmp(out.data(), golden.data(), golden.size()) == 0);

  const auto view = BsdhView::checked(out);
  BOOST_REQUIRE(view.has_value());
  BOOST_TEST(view->mid() == 0xFF);
  BOOST_TEST(view->flags() == 3);
  BOOST_TEST(view->bufs() == 0x0102);
  BOOST_TEST(view->len() == 0x03040506u);
  BOOST_TEST(view->mseq() == 0x0708090Au);
  BOOST_TEST(view->mseq_ack() == 0x0B0C0D0Eu);
  BOOST_TEST(!BsdhView::checked(std::span(out).first(15)).has_value());
}

BOOST_AUTO_TEST_CASE(parses_the_golden_bytes) {
  const auto msg = bytes({0xFF, 0x04, 0x00, 0x40, 0x00, 0x00, 0x00, 0x13, 0xFF, 0xFF, 0xFF, 0xFF, 0x80, 0x00, 0x00, 0x01, 1, 2, 3});
  const auto parsed = parse_bsdh(msg);
  BOOST_REQUIRE(parsed.ok());
  BOOST_TEST((parsed.value() == Bsdh{Mid::data, kReqPipe, 64, 19, 0xFFFFFFFF, 0x80000001}));
}

BOOST_AUTO_TEST_CASE(every_message_makes_the_round_trip) {
  for (const Mid mid : kAllMids) {
    for (const std::uint8_t flags : {0, 2, 4, 6}) {
      std::vector<std::byte> msg(payload_offset(mid) + (may_carry_payload(mid) ? 7 : 0));
      const Bsdh h{mid, flags, 0xFFFF, static_cast<std::uint32_t>(msg.size()), 0xFFFFFFFE, 0x00010203};
      emit_bsdh(h, msg.data());
      const auto parsed = parse_bsdh(msg);
      BOOST_TEST_CONTEXT(to_string(mid)) {
        BOOST_REQUIRE(parsed.ok());
        BOOST_TEST((parsed.value() == h));
      }
    }
  }
}

BOOST_AUTO_TEST_CASE(every_identifier_but_the_eighteen_is_refused) {
  for (int raw = 0x0F; raw <= 0xFC; ++raw)
    for (const std::size_t size : {16u, 20u, 68u}) BOOST_TEST((error_of(message(raw, 0, size)) == WireError::unknown_mid));
}

BOOST_AUTO_TEST_CASE(every_truncation_is_refused) {
  for (const Mid mid : kAllMids) {
    BOOST_TEST_CONTEXT(to_string(mid)) {
      const auto whole = message(static_cast<int>(mid), 0, payload_offset(mid));
      BOOST_TEST(!error_of(whole).has_value());
      for (std::size_t size = 0; size < whole.size(); ++size) {
        // The peer cut the message: Len still tells the whole length.
        const std::vector<std::byte> cut(whole.begin(), whole.begin() + static_cast<std::ptrdiff_t>(size));
        BOOST_TEST((error_of(cut) == (size < kBsdhBytes ? WireError::truncated : WireError::bad_length)));
        // The peer lies consistently: Len agrees, the extended header is not there.
        if (size >= kBsdhBytes) BOOST_TEST((error_of(message(static_cast<int>(mid), 0, size)) == WireError::truncated));
      }
    }
  }
}

BOOST_AUTO_TEST_CASE(len_must_be_the_size_of_the_message) {
  for (const std::uint32_t lie : {0u, 15u, 16u, 31u, 33u, 0x20000020u, 0xFFFFFFFFu}) {
    auto msg = message(0xFF, 0, 32);
    rdma::store_be32(msg.data() + 4, lie);
    BOOST_TEST((error_of(msg) == WireError::bad_length));
  }
}

BOOST_AUTO_TEST_CASE(control_messages_carry_no_payload) {
  for (const Mid mid : kAllMids) {
    const auto error = error_of(message(static_cast<int>(mid), 0, payload_offset(mid) + 1));
    BOOST_TEST_CONTEXT(to_string(mid)) {
      if (may_carry_payload(mid))
        BOOST_TEST(!error.has_value());
      else
        BOOST_TEST((error == WireError::bad_length));
    }
  }
}

BOOST_AUTO_TEST_CASE(greetings_may_have_the_native_length_and_others_not) {
  for (const Mid mid : kAllMids) {
    if (may_carry_payload(mid)) continue;
    BOOST_TEST_CONTEXT(to_string(mid)) {
      BOOST_TEST(error_of(message(static_cast<int>(mid), 0, kNativeHelloBytes)).has_value() == (mid != Mid::hello));
      BOOST_TEST(error_of(message(static_cast<int>(mid), 0, kNativeHelloAckBytes)).has_value() == (mid != Mid::hello_ack));
    }
  }
}

BOOST_AUTO_TEST_CASE(flags_are_legal_where_the_protocol_says) {
  for (const Mid mid : kAllMids) {
    for (int flags = 0; flags < 256; ++flags) {
      const bool legal = (flags & ~7) == 0 && ((flags & kOobPres) == 0 || mid == Mid::data);
      const auto error = error_of(message(static_cast<int>(mid), flags, payload_offset(mid)));
      if (legal)
        BOOST_TEST(!error.has_value());
      else
        BOOST_TEST((error == WireError::bad_flags));
    }
  }
}

BOOST_AUTO_TEST_CASE(describe_shows_legal_and_illegal_bytes) {
  BOOST_TEST(describe(message(0xFF, 1, 20)).c_str() == std::string("Data mseq=5 ack=4 bufs=3 len=20 OOB_PRES"));
  BOOST_TEST(describe(bytes({1, 2, 3})).c_str() == std::string("3 bytes, shorter than a header"));
  BOOST_TEST(describe(message(0x40, 0x82, 16)).c_str() ==
             std::string("message 0x40 mseq=5 ack=4 bufs=3 len=16 OOB_PEND reserved_flags=0x80 : illegal flags"));
  BOOST_TEST(describe(message(0xFE, 0, 32)).c_str() ==
             std::string("SrcAvail mseq=5 ack=4 bufs=3 len=32 : advertised memory is empty or wraps round"));
  for (int e = 0; e <= static_cast<int>(WireError::bad_payload); ++e)
    BOOST_TEST(to_string(static_cast<WireError>(e)) != std::string("unknown error"));
  for (const Mid mid : kAllMids) BOOST_TEST(to_string(mid) != std::string("unknown"));
}
