// SrcAvail and SinkAvail: one side offers memory for the other to read from (source) or to write into (sink) by RDMA.
//
//   SrcAvail   16 len | 20 rkey | 24 address, 64 bits | 32 payload: the first bytes of the offered buffer
//   SinkAvail  16 len | 20 rkey | 24 address, 64 bits | 32 non_discards | 36 payload: data of the other half-pipe
//
// Which of them is legal depends on the mode of the half-pipe, which only the connection knows.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>

#include "sdp/wire/bsdh.hpp"

namespace sdp::wire {

struct SrcAvail {
  std::uint32_t len = 0;  ///< bytes of the whole buffer, those in line included; > 0
  std::uint32_t rkey = 0;
  std::uint64_t address = 0;  ///< of the buffer's first byte, which is also the first byte in line
  friend bool operator==(const SrcAvail&, const SrcAvail&) = default;
};

struct SinkAvail {
  std::uint32_t len = 0;  ///< bytes of the buffer; > 0
  std::uint32_t rkey = 0;
  std::uint64_t address = 0;
  std::uint32_t non_discards = 0;  ///< messages with payload that the sink had received when it sent this
  friend bool operator==(const SinkAvail&, const SinkAvail&) = default;
};

/// Take the whole message. Errors: those of parse_bsdh, wrong_mid, bad_range; for SrcAvail also bad_payload when the bytes in line
/// are the whole buffer or more.
rdma::Result<SrcAvail, WireError> parse_src_avail(std::span<const std::byte> msg) noexcept;
rdma::Result<SinkAvail, WireError> parse_sink_avail(std::span<const std::byte> msg) noexcept;
/// The same of a copy of the headers alone, for who cannot let the peer change them meanwhile. The caller has judged the base
/// header; `message_bytes` is the whole message's length, at least that of the headers.
rdma::Result<SrcAvail, WireError> parse_src_avail_headers(std::span<const std::byte, payload_offset(Mid::src_avail)> headers,
                                                          std::size_t message_bytes) noexcept;

/// Write the extended header: the bytes that follow the base header.
void emit_extended(const SrcAvail&, std::span<std::byte, 16> out) noexcept;
void emit_extended(const SinkAvail&, std::span<std::byte, 20> out) noexcept;

}  // namespace sdp::wire
