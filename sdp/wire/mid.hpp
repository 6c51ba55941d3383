// Message identifiers: the first byte of every SDP message, and what each identifier says about the bytes that follow.
//
// Layer: numbers only. If you add a message here, kMessageShapes below, describe.cpp, tests/fuzz/fuzz_wire.cpp and the table of
// PROTOCOL.md must learn it too.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>

namespace sdp::wire {

enum class Mid : std::uint8_t {
  hello = 0x00,
  hello_ack = 0x01,
  disconn = 0x02,
  abort_conn = 0x03,
  send_sm = 0x04,
  rdma_wr_compl = 0x05,
  rdma_rd_compl = 0x06,
  mode_change = 0x07,
  src_avail_cancel = 0x08,
  sink_avail_cancel = 0x09,
  sink_cancel_ack = 0x0A,
  ch_rcv_buf = 0x0B,
  ch_rcv_buf_ack = 0x0C,
  susp_comm = 0x0D,
  susp_comm_ack = 0x0E,
  sink_avail = 0xFD,
  src_avail = 0xFE,
  data = 0xFF,
};

inline constexpr std::size_t kBsdhBytes = 16;
inline constexpr std::size_t kHelloBytes = 68;     ///< whole in-band Hello
inline constexpr std::size_t kHelloAckBytes = 24;  ///< whole in-band HelloAck
/// What native SDP puts into CM private data; the bytes past the in-band form are padding.
inline constexpr std::size_t kNativeHelloBytes = 92;
inline constexpr std::size_t kNativeHelloAckBytes = 196;

inline constexpr std::size_t kMidCount = 18;

/// 0..17 for a known identifier, 18 or more for all others: moves 0xFD..0xFF in front of 0x00..0x0E.
constexpr std::uint8_t mid_index(std::uint8_t raw) noexcept { return static_cast<std::uint8_t>(raw + 3); }
/// Reserved and experimental (0x40-0x7F) identifiers are not known: nothing here can interpret them.
constexpr bool is_known_mid(std::uint8_t raw) noexcept { return mid_index(raw) < kMidCount; }

inline constexpr std::array<Mid, kMidCount> kAllMids = {
    Mid::sink_avail,        Mid::src_avail,       Mid::data,          Mid::hello,          Mid::hello_ack,   Mid::disconn,
    Mid::abort_conn,        Mid::send_sm,         Mid::rdma_wr_compl, Mid::rdma_rd_compl,  Mid::mode_change, Mid::src_avail_cancel,
    Mid::sink_avail_cancel, Mid::sink_cancel_ack, Mid::ch_rcv_buf,    Mid::ch_rcv_buf_ack, Mid::susp_comm,   Mid::susp_comm_ack,
};

/// What may follow the base header, in the order of mid_index().
struct MessageShape {
  std::uint8_t extended_bytes;
  bool payload_allowed;
};
inline constexpr std::array<MessageShape, kMidCount> kMessageShapes = {{
    {20, true},                            // SinkAvail
    {16, true},                            // SrcAvail
    {0, true},                             // Data
    {kHelloBytes - kBsdhBytes, false},     // Hello
    {kHelloAckBytes - kBsdhBytes, false},  // HelloAck
    {0, false},                            // DisConn
    {0, false},                            // AbortConn
    {0, false},                            // SendSm
    {4, false},                            // RdmaWrCompl
    {4, false},                            // RdmaRdCompl
    {4, false},                            // ModeChange
    {0, false},                            // SrcAvailCancel
    {0, false},                            // SinkAvailCancel
    {0, false},                            // SinkCancelAck
    {4, false},                            // ChRcvBuf
    {4, false},                            // ChRcvBufAck
    {8, false},                            // SuspComm
    {0, false},                            // SuspCommAck
}};

/// Bytes between the base header and the payload.
constexpr std::size_t extended_header_bytes(Mid mid) noexcept {
  return kMessageShapes[mid_index(static_cast<std::uint8_t>(mid))].extended_bytes;
}
/// Where the payload starts, counted from the start of the message; also the shortest legal length of the message.
constexpr std::size_t payload_offset(Mid mid) noexcept { return kBsdhBytes + extended_header_bytes(mid); }
constexpr bool may_carry_payload(Mid mid) noexcept {
  return kMessageShapes[mid_index(static_cast<std::uint8_t>(mid))].payload_allowed;
}

static_assert(is_known_mid(0x0E) && !is_known_mid(0x0F) && !is_known_mid(0x40) && !is_known_mid(0x7F) && !is_known_mid(0xFC));
static_assert(payload_offset(Mid::data) == 16 && payload_offset(Mid::src_avail) == 32 && payload_offset(Mid::sink_avail) == 36);
static_assert(payload_offset(Mid::hello) == kHelloBytes && payload_offset(Mid::susp_comm) == 24);

}  // namespace sdp::wire
