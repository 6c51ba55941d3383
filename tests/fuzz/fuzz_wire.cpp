// Any bytes as an SDP message: nothing is read past their end, and what parses is emitted and parsed again as the same value.
#include <array>
#include <cstdint>
#include <cstring>
#include <span>
#include <vector>

#include "sdp/wire/avail.hpp"
#include "sdp/wire/bsdh.hpp"
#include "sdp/wire/describe.hpp"
#include "sdp/wire/hello.hpp"
#include "sdp/wire/mode_change.hpp"
#include "sdp/wire/rdma_compl.hpp"
#include "sdp/wire/recv_buf.hpp"
#include "sdp/wire/susp_comm.hpp"
#include "tests/fuzz/require.hpp"

using namespace sdp::wire;
using Message = std::span<const std::byte>;

namespace {

/// Headers written anew from what was parsed must be the bytes that were there, and parse to the same value.
template <std::size_t N, class Parse>
void check_extended(Message msg, const Bsdh& base, Parse parse) {
  const auto first = parse(msg);
  if (!first) return;
  require(payload_offset(base.mid) == kBsdhBytes + N, "the extended header has the size of the catalogue");
  std::vector<std::byte> again(msg.begin(), msg.end());
  std::memset(again.data(), 0xA5, kBsdhBytes + N);
  emit_bsdh(base, again.data());
  emit_extended(first.value(), std::span<std::byte, N>(again.data() + kBsdhBytes, N));
  require(std::memcmp(again.data(), msg.data(), msg.size()) == 0, "emit(parse(bytes)) gives the bytes");
  const auto second = parse(again);
  require(second.ok() && second.value() == first.value(), "parse(emit(value)) gives the value");
}

void check_hello(Message msg, std::uint16_t bufs) {
  const auto first = parse_hello(msg);
  if (!first) return;
  std::array<std::byte, kHelloBytes> again;
  emit_hello(first.value(), bufs, again);
  const auto second = parse_hello(again);
  require(second.ok() && second.value() == first.value(), "Hello makes the round trip");
  require(parse_bsdh(again).ok() && parse_bsdh(again).value().bufs == bufs, "Hello keeps its grant");
}

void check_hello_ack(Message msg, std::uint16_t bufs) {
  const auto first = parse_hello_ack(msg);
  if (!first) return;
  std::array<std::byte, kHelloAckBytes> again;
  emit_hello_ack(first.value(), bufs, again);
  const auto second = parse_hello_ack(again);
  require(second.ok() && second.value() == first.value(), "HelloAck makes the round trip");
  require(parse_bsdh(again).ok() && parse_bsdh(again).value().bufs == bufs, "HelloAck keeps its grant");
}

/// Every parser on every message: at most the one for its identifier may accept it.
int count_accepting(Message msg) {
  return parse_hello(msg).ok() + parse_hello_ack(msg).ok() + parse_rdma_wr_compl(msg).ok() + parse_rdma_rd_compl(msg).ok() +
         parse_mode_change(msg).ok() + parse_ch_rcv_buf(msg).ok() + parse_ch_rcv_buf_ack(msg).ok() + parse_susp_comm(msg).ok() +
         parse_src_avail(msg).ok() + parse_sink_avail(msg).ok();
}

void check(Message msg) {
  const Description text = describe(msg);
  require(std::memchr(text.text.data(), 0, text.text.size()) != nullptr, "a description ends");
  const auto parsed = parse_bsdh(msg);
  if (!parsed) {
    require(count_accepting(msg) == 0, "no parser accepts what has no legal base header");
    return;
  }
  const Bsdh base = parsed.value();
  require(base.len == msg.size(), "len is the size");
  require(payload_offset(base.mid) <= msg.size(), "the extended header is within the message");
  require((base.flags & ~kKnownFlags) == 0, "no unknown flag");
  std::array<std::byte, kBsdhBytes> header;
  emit_bsdh(base, std::span(header));
  require(std::memcmp(header.data(), msg.data(), header.size()) == 0, "the base header makes the round trip");
  require(count_accepting(msg) <= (extended_header_bytes(base.mid) > 0 ? 1 : 0), "one parser accepts a message");

  switch (base.mid) {
    case Mid::hello:
      return check_hello(msg, base.bufs);
    case Mid::hello_ack:
      return check_hello_ack(msg, base.bufs);
    case Mid::rdma_wr_compl:
      return check_extended<4>(msg, base, parse_rdma_wr_compl);
    case Mid::rdma_rd_compl:
      return check_extended<4>(msg, base, parse_rdma_rd_compl);
    case Mid::mode_change:
      return check_extended<4>(msg, base, parse_mode_change);
    case Mid::ch_rcv_buf:
      return check_extended<4>(msg, base, parse_ch_rcv_buf);
    case Mid::ch_rcv_buf_ack:
      return check_extended<4>(msg, base, parse_ch_rcv_buf_ack);
    case Mid::susp_comm:
      return check_extended<8>(msg, base, parse_susp_comm);
    case Mid::src_avail:
      return check_extended<16>(msg, base, parse_src_avail);
    case Mid::sink_avail:
      return check_extended<20>(msg, base, parse_sink_avail);
    default:
      return;
  }
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  const Message msg(reinterpret_cast<const std::byte*>(data), size);
  check(msg);
  // Len rarely agrees with the size by chance: mend it, so that the fields behind it are reached.
  if (size >= kBsdhBytes) {
    std::vector<std::byte> mended(msg.begin(), msg.end());
    rdma::store_be32(mended.data() + 4, static_cast<std::uint32_t>(size));
    check(mended);
  }
  return 0;
}
