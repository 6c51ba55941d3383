// Extended headers: for each message its golden bytes, round trip, truncations and illegal fields.
#include <array>
#include <boost/test/unit_test.hpp>
#include <cstring>
#include <string>
#include <vector>

#include "sdp/wire/avail.hpp"
#include "sdp/wire/describe.hpp"
#include "sdp/wire/hello.hpp"
#include "sdp/wire/mode_change.hpp"
#include "sdp/wire/rdma_compl.hpp"
#include "sdp/wire/recv_buf.hpp"
#include "sdp/wire/susp_comm.hpp"

using namespace sdp::wire;
using Bytes = std::vector<std::byte>;

namespace {

Bytes from_hex(const std::string& hex) {
  Bytes out;
  std::string digits;
  for (char c : hex)
    if (c != ' ') digits += c;
  for (std::size_t i = 0; i + 1 < digits.size(); i += 2)
    out.push_back(static_cast<std::byte>(std::stoi(digits.substr(i, 2), nullptr, 16)));
  return out;
}

void set_len(Bytes& msg) { rdma::store_be32(msg.data() + 4, static_cast<std::uint32_t>(msg.size())); }

/// The whole message for a value with an emit_extended().
template <std::size_t N, class T>
Bytes emitted(Mid mid, const T& value, std::size_t payload = 0) {
  Bytes out(kBsdhBytes + N + payload);
  emit_bsdh(Bsdh{mid, 0, 1, static_cast<std::uint32_t>(out.size()), 2, 3}, out.data());
  emit_extended(value, std::span<std::byte, N>(out.data() + kBsdhBytes, N));
  return out;
}

/// Nothing shorter than the headers of `msg` parses, whether or not Len tells the truth; nor does the message under another name.
template <class Parse>
void check_refusals(Parse parse, const Bytes& msg, std::size_t headers) {
  BOOST_REQUIRE(parse(msg).ok());
  for (std::size_t size = 0; size < headers; ++size) {
    Bytes cut(msg.begin(), msg.begin() + static_cast<std::ptrdiff_t>(size));
    BOOST_TEST((!parse(cut).ok() && parse(cut).error() == (size < kBsdhBytes ? WireError::truncated : WireError::bad_length)));
    if (size < kBsdhBytes) continue;
    set_len(cut);
    BOOST_TEST((!parse(cut).ok() && parse(cut).error() == WireError::truncated));
  }
  for (const Mid mid : kAllMids) {
    if (static_cast<std::byte>(mid) == msg[0]) continue;
    Bytes other(payload_offset(mid));
    emit_bsdh(Bsdh{.mid = mid, .len = static_cast<std::uint32_t>(other.size())}, other.data());
    BOOST_TEST((!parse(other).ok() && parse(other).error() == WireError::wrong_mid));
  }
  Bytes flagged = msg;
  flagged[1] = std::byte{0x08};
  BOOST_TEST((!parse(flagged).ok() && parse(flagged).error() == WireError::bad_flags));
}

template <class Parse>
void check_error(Parse parse, Bytes msg, std::size_t offset, std::initializer_list<int> patch, WireError expected) {
  for (int v : patch) msg[offset++] = static_cast<std::byte>(v);
  const auto parsed = parse(msg);
  BOOST_REQUIRE(!parsed.ok());
  BOOST_TEST((parsed.error() == expected), to_string(parsed.error()) << ", expected: " << to_string(expected));
}

HelloHeader sample_hello() {
  HelloHeader h;
  h.max_adverts = 7;
  h.desired_remote_rcv_size = 0x01020304;
  h.local_rcv_size = 0x8010;
  h.local_port = 0x1267;
  h.src_ip = hello_ip_from_v4(__builtin_bswap32(0x0A000001));
  h.dst_ip = hello_ip_from_v4(__builtin_bswap32(0x0A000002));
  h.ext_max_adverts = 0x0506;
  return h;
}

const char kHelloGolden[] =
    "00 00 0007 00000044 00000000 00000000"    // BSDH: Hello, 7 buffers, 68 bytes
    "22 40 00 07 01020304 00008010 1267 0000"  // version, IPV/Cap, MaxAdverts, sizes, port
    "00000000 00000000 00000000 0A000001"      // source
    "00000000 00000000 00000000 0A000002"      // destination
    "0000 0506";                               // ExtMaxAdverts
const char kHelloAckGolden[] = "01 00 0040 00000018 00000000 00000000  22 00 00 01 00008010";

Bytes hello_message(const HelloHeader& h = sample_hello()) {
  Bytes out(kHelloBytes);
  emit_hello(h, 7, std::span<std::byte, kHelloBytes>(out));
  return out;
}
Bytes hello_ack_message(const HelloAckHeader& h) {
  Bytes out(kHelloAckBytes, std::byte{0xEE});
  emit_hello_ack(h, 64, std::span<std::byte, kHelloAckBytes>(out));
  return out;
}

}  // namespace

// ---- Hello ----

BOOST_AUTO_TEST_CASE(hello__golden_bytes_and_round_trip) {
  BOOST_TEST((hello_message() == from_hex(kHelloGolden)));
  const auto parsed = parse_hello(from_hex(kHelloGolden));
  BOOST_REQUIRE(parsed.ok());
  BOOST_TEST((parsed.value() == sample_hello()));
  BOOST_TEST(parsed.value().adverts() == 7);
  BOOST_TEST(describe(hello_message()).c_str() ==
             std::string("Hello mseq=0 ack=0 bufs=7 len=68 v2.2 IPv4 cap=0 adverts=7 rcv=32784 want=16909060 port=4711"));

  HelloHeader six = sample_hello();
  six.version = 0x2F;
  six.ip_version = 6;
  six.capabilities = kInvalidateCap | kExtendedMaxAdverts;
  six.max_adverts = 0;
  six.src_ip.fill(std::byte{0xFE});
  const auto parsed_six = parse_hello(hello_message(six));
  BOOST_REQUIRE(parsed_six.ok());
  BOOST_TEST((parsed_six.value() == six));
  BOOST_TEST(parsed_six.value().adverts() == 0x0506);
}

BOOST_AUTO_TEST_CASE(hello__native_padding_is_accepted) {
  Bytes padded = hello_message();
  padded.resize(kNativeHelloBytes);
  set_len(padded);
  const auto parsed = parse_hello(padded);
  BOOST_REQUIRE(parsed.ok());
  BOOST_TEST((parsed.value() == sample_hello()));
  for (std::size_t size = kHelloBytes + 1; size < 2 * kNativeHelloBytes; ++size) {
    padded.resize(size);
    set_len(padded);
    BOOST_TEST(parse_hello(padded).ok() == (size == kNativeHelloBytes));
  }
}

BOOST_AUTO_TEST_CASE(hello__refusals) {
  check_refusals(parse_hello, hello_message(), kHelloBytes);
  const Bytes good = hello_message();
  check_error(parse_hello, good, 11, {1}, WireError::bad_sequence);
  check_error(parse_hello, good, 15, {1}, WireError::bad_sequence);
  for (int major = 0; major < 16; ++major)
    if (major != 2) check_error(parse_hello, good, 16, {major << 4 | 2}, WireError::bad_version);
  for (int ip = 0; ip < 16; ++ip)
    if (ip != 4 && ip != 6) check_error(parse_hello, good, 17, {ip << 4}, WireError::bad_ip_version);
  for (std::size_t i = 0; i < 12; ++i) {
    check_error(parse_hello, good, 32 + i, {1}, WireError::bad_ip_version);
    check_error(parse_hello, good, 48 + i, {1}, WireError::bad_ip_version);
  }
  check_error(parse_hello, good, 19, {0}, WireError::no_adverts);
  Bytes extended = good;
  extended[17] = std::byte{0x42};
  BOOST_TEST(parse_hello(extended).ok());
  check_error(parse_hello, extended, 66, {0, 0}, WireError::no_adverts);
  check_error(parse_hello, good, 24, {0, 0, 0, 0}, WireError::bad_size);
  check_error(parse_hello, good, 24, {0, 0, 0, 16}, WireError::bad_size);
}

BOOST_AUTO_TEST_CASE(hello__every_minor_version_and_reserved_bytes_are_accepted) {
  Bytes msg = hello_message();
  for (int minor = 0; minor < 16; ++minor) {
    msg[16] = static_cast<std::byte>(0x20 | minor);
    BOOST_TEST(parse_hello(msg).ok());
  }
  for (std::size_t offset : {18, 30, 31, 64, 65}) msg[offset] = std::byte{0xFF};
  BOOST_TEST(parse_hello(msg).ok());
}

// ---- HelloAck ----

BOOST_AUTO_TEST_CASE(hello_ack__golden_bytes_and_round_trip) {
  const HelloAckHeader h{.max_adverts = 1, .actual_rcv_size = 0x8010};
  BOOST_TEST((hello_ack_message(h) == from_hex(kHelloAckGolden)));
  const auto parsed = parse_hello_ack(from_hex(kHelloAckGolden));
  BOOST_REQUIRE(parsed.ok());
  BOOST_TEST((parsed.value() == h));

  Bytes padded = from_hex(kHelloAckGolden);
  for (std::size_t size = kHelloAckBytes + 1; size < 2 * kNativeHelloAckBytes; ++size) {
    padded.resize(size);
    set_len(padded);
    BOOST_TEST(parse_hello_ack(padded).ok() == (size == kNativeHelloAckBytes));
  }
}

BOOST_AUTO_TEST_CASE(hello_ack__refusals) {
  const Bytes good = hello_ack_message({.max_adverts = 1, .actual_rcv_size = 4096});
  check_refusals(parse_hello_ack, good, kHelloAckBytes);
  check_error(parse_hello_ack, good, 11, {1}, WireError::bad_sequence);
  check_error(parse_hello_ack, good, 15, {1}, WireError::bad_sequence);
  check_error(parse_hello_ack, good, 16, {0x11}, WireError::bad_version);
  check_error(parse_hello_ack, good, 16, {0x32}, WireError::bad_version);
  check_error(parse_hello_ack, good, 19, {0}, WireError::no_adverts);
  check_error(parse_hello_ack, good, 20, {0, 0, 0, 16}, WireError::bad_size);
}

// ---- RdmaWrCompl, RdmaRdCompl ----

BOOST_AUTO_TEST_CASE(rdma_compl__golden_bytes_and_round_trip) {
  BOOST_TEST(
      (emitted<4>(Mid::rdma_wr_compl, RdmaWrCompl{0x01020304}) == from_hex("05 00 0001 00000014 00000002 00000003 01020304")));
  BOOST_TEST(
      (emitted<4>(Mid::rdma_rd_compl, RdmaRdCompl{0x01020304}) == from_hex("06 00 0001 00000014 00000002 00000003 01020304")));
  for (std::uint32_t v : {0u, 1u, 0x80000000u, 0xFFFFFFFFu}) {
    BOOST_TEST((parse_rdma_wr_compl(emitted<4>(Mid::rdma_wr_compl, RdmaWrCompl{v})).value() == RdmaWrCompl{v}));
    BOOST_TEST((parse_rdma_rd_compl(emitted<4>(Mid::rdma_rd_compl, RdmaRdCompl{v})).value() == RdmaRdCompl{v}));
  }
}

BOOST_AUTO_TEST_CASE(rdma_compl__refusals) {
  check_refusals(parse_rdma_wr_compl, emitted<4>(Mid::rdma_wr_compl, RdmaWrCompl{1}), 20);
  check_refusals(parse_rdma_rd_compl, emitted<4>(Mid::rdma_rd_compl, RdmaRdCompl{1}), 20);
}

// ---- ModeChange ----

BOOST_AUTO_TEST_CASE(mode_change__the_six_bytes_of_the_protocol) {
  struct Row {
    int byte;
    ModeChange value;
  };
  const Row rows[] = {
      {0x00, {FlowMode::buffered, false}}, {0x10, {FlowMode::combined, false}}, {0x20, {FlowMode::pipelined, false}},
      {0x80, {FlowMode::buffered, true}},  {0x90, {FlowMode::combined, true}},  {0xA0, {FlowMode::pipelined, true}},
  };
  for (const Row& row : rows) {
    Bytes golden = from_hex("07 00 0001 00000014 00000002 00000003 00000000");
    golden[16] = static_cast<std::byte>(row.byte);
    BOOST_TEST((emitted<4>(Mid::mode_change, row.value) == golden));
    BOOST_REQUIRE(parse_mode_change(golden).ok());
    BOOST_TEST((parse_mode_change(golden).value() == row.value));
  }
}

BOOST_AUTO_TEST_CASE(mode_change__refusals) {
  const Bytes good = emitted<4>(Mid::mode_change, ModeChange{});
  check_refusals(parse_mode_change, good, 20);
  int accepted = 0;
  for (int byte = 0; byte < 256; ++byte) {
    Bytes msg = good;
    msg[16] = static_cast<std::byte>(byte);
    const auto parsed = parse_mode_change(msg);
    if (parsed.ok())
      ++accepted;
    else
      BOOST_TEST((parsed.error() == WireError::bad_mode));
  }
  BOOST_TEST(accepted == 6);
  for (std::size_t offset : {17, 18, 19}) check_error(parse_mode_change, good, offset, {1}, WireError::bad_mode);
}

// ---- ChRcvBuf, ChRcvBufAck ----

BOOST_AUTO_TEST_CASE(recv_buf__golden_bytes_and_round_trip) {
  BOOST_TEST((emitted<4>(Mid::ch_rcv_buf, ChRcvBuf{0x10010}) == from_hex("0B 00 0001 00000014 00000002 00000003 00010010")));
  BOOST_TEST((emitted<4>(Mid::ch_rcv_buf_ack, ChRcvBufAck{0x10010}) == from_hex("0C 00 0001 00000014 00000002 00000003 00010010")));
  for (std::uint32_t v : {17u, 0x10010u, 0xFFFFFFFFu}) {
    BOOST_TEST((parse_ch_rcv_buf(emitted<4>(Mid::ch_rcv_buf, ChRcvBuf{v})).value() == ChRcvBuf{v}));
    BOOST_TEST((parse_ch_rcv_buf_ack(emitted<4>(Mid::ch_rcv_buf_ack, ChRcvBufAck{v})).value() == ChRcvBufAck{v}));
  }
}

BOOST_AUTO_TEST_CASE(recv_buf__refusals) {
  const Bytes wish = emitted<4>(Mid::ch_rcv_buf, ChRcvBuf{4096});
  const Bytes ack = emitted<4>(Mid::ch_rcv_buf_ack, ChRcvBufAck{4096});
  check_refusals(parse_ch_rcv_buf, wish, 20);
  check_refusals(parse_ch_rcv_buf_ack, ack, 20);
  for (int small : {0, 1, 16}) {
    check_error(parse_ch_rcv_buf, wish, 16, {0, 0, 0, small}, WireError::bad_size);
    check_error(parse_ch_rcv_buf_ack, ack, 16, {0, 0, 0, small}, WireError::bad_size);
  }
}

// ---- SuspComm ----

BOOST_AUTO_TEST_CASE(susp_comm__golden_bytes_round_trip_and_refusals) {
  const Bytes msg = emitted<8>(Mid::susp_comm, SuspComm{0x0102030405060708});
  BOOST_TEST((msg == from_hex("0D 00 0001 00000018 00000002 00000003 0102030405060708")));
  BOOST_REQUIRE(parse_susp_comm(msg).ok());
  BOOST_TEST((parse_susp_comm(msg).value() == SuspComm{0x0102030405060708}));
  check_refusals(parse_susp_comm, msg, 24);
}

// ---- SrcAvail ----

BOOST_AUTO_TEST_CASE(src_avail__golden_bytes_and_round_trip) {
  const SrcAvail v{0x00010000, 0xAABBCCDD, 0x1122334455667788};
  BOOST_TEST((emitted<16>(Mid::src_avail, v, 1) ==
              from_hex("FE 00 0001 00000021 00000002 00000003 00010000 AABBCCDD 1122334455667788 00")));
  for (std::size_t payload : {0u, 1u, 0xFFFFu}) {
    const auto parsed = parse_src_avail(emitted<16>(Mid::src_avail, v, payload));
    BOOST_REQUIRE(parsed.ok());
    BOOST_TEST((parsed.value() == v));
  }
  const SrcAvail last_byte{1, 0, ~0ull};
  BOOST_TEST((parse_src_avail(emitted<16>(Mid::src_avail, last_byte)).value() == last_byte));
}

BOOST_AUTO_TEST_CASE(src_avail__refusals) {
  const Bytes good = emitted<16>(Mid::src_avail, SrcAvail{10, 1, 0x1000}, 9);
  check_refusals(parse_src_avail, good, 32);
  check_error(parse_src_avail, good, 16, {0, 0, 0, 0}, WireError::bad_range);
  check_error(parse_src_avail, good, 16, {0, 0, 0, 9}, WireError::bad_payload);
  check_error(parse_src_avail, good, 16, {0, 0, 0, 1}, WireError::bad_payload);
  check_error(parse_src_avail, good, 24, {0xFF, 0xFF, 0xFF, 0xFF, 0xFF, 0xFF, 0xFF, 0xF7}, WireError::bad_range);
  Bytes fits = good;
  rdma::store_be64(fits.data() + 24, 0xFFFFFFFFFFFFFFF6);
  BOOST_TEST(parse_src_avail(fits).ok());
}

// ---- SinkAvail ----

BOOST_AUTO_TEST_CASE(sink_avail__golden_bytes_and_round_trip) {
  const SinkAvail v{0x00010000, 0xAABBCCDD, 0x1122334455667788, 0x99};
  BOOST_TEST((emitted<20>(Mid::sink_avail, v) ==
              from_hex("FD 00 0001 00000024 00000002 00000003 00010000 AABBCCDD 1122334455667788 00000099")));
  for (std::size_t payload : {0u, 1u, 70'000u}) {
    const auto parsed = parse_sink_avail(emitted<20>(Mid::sink_avail, v, payload));
    BOOST_REQUIRE(parsed.ok());
    BOOST_TEST((parsed.value() == v));
  }
}

BOOST_AUTO_TEST_CASE(sink_avail__refusals) {
  const Bytes good = emitted<20>(Mid::sink_avail, SinkAvail{10, 1, 0x1000, 0}, 5);
  check_refusals(parse_sink_avail, good, 36);
  check_error(parse_sink_avail, good, 16, {0, 0, 0, 0}, WireError::bad_range);
  check_error(parse_sink_avail, good, 24, {0xFF, 0xFF, 0xFF, 0xFF, 0xFF, 0xFF, 0xFF, 0xF7}, WireError::bad_range);
}

// ---- describe ----

BOOST_AUTO_TEST_CASE(describe__names_the_fields_of_every_extended_header) {
  const auto tail = [](const Bytes& msg) {
    const std::string text = describe(msg).c_str();
    return text.substr(text.find("len="));
  };
  BOOST_TEST(tail(hello_ack_message({.max_adverts = 1, .actual_rcv_size = 4096})) == "len=24 v2.2 adverts=1 rcv=4096");
  BOOST_TEST(tail(emitted<4>(Mid::rdma_wr_compl, RdmaWrCompl{9})) == "len=20 written=9");
  BOOST_TEST(tail(emitted<4>(Mid::rdma_rd_compl, RdmaRdCompl{9})) == "len=20 read=9");
  BOOST_TEST(tail(emitted<4>(Mid::mode_change, ModeChange{FlowMode::pipelined, true})) == "len=20 send half to pipelined");
  BOOST_TEST(tail(emitted<4>(Mid::ch_rcv_buf, ChRcvBuf{4096})) == "len=20 size=4096");
  BOOST_TEST(tail(emitted<4>(Mid::ch_rcv_buf_ack, ChRcvBufAck{4096})) == "len=20 size=4096");
  BOOST_TEST(tail(emitted<8>(Mid::susp_comm, SuspComm{0x10050})) == "len=24 service=0x10050");
  BOOST_TEST(tail(emitted<16>(Mid::src_avail, SrcAvail{10, 1, 0x1000}, 1)) == "len=33 bytes=10 rkey=0x1 address=0x1000");
  BOOST_TEST(tail(emitted<20>(Mid::sink_avail, SinkAvail{10, 1, 0x1000, 4})) ==
             "len=36 bytes=10 rkey=0x1 address=0x1000 non_discards=4");
}
