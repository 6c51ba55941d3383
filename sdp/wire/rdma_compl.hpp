// RdmaWrCompl and RdmaRdCompl: how many bytes an RDMA Write or Read has moved.
//
//   16 bytes, 32 bits | 20
//
// Whether the number fits the oldest advertisement is for the connection to say.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>

#include "sdp/wire/bsdh.hpp"

namespace sdp::wire {

struct RdmaWrCompl {
  std::uint32_t bytes = 0;  ///< written into the oldest SinkAvail buffer; ends it
  friend bool operator==(const RdmaWrCompl&, const RdmaWrCompl&) = default;
};
struct RdmaRdCompl {
  std::uint32_t bytes = 0;  ///< read since the last report; bytes that came in line are never counted
  friend bool operator==(const RdmaRdCompl&, const RdmaRdCompl&) = default;
};

/// Take the whole message. Errors: those of parse_bsdh, wrong_mid.
inline rdma::Result<RdmaWrCompl, WireError> parse_rdma_wr_compl(std::span<const std::byte> msg) noexcept {
  if (const auto error = detail::check_is(Mid::rdma_wr_compl, msg)) return rdma::Err{*error};
  return RdmaWrCompl{rdma::load_be32(msg.data() + kBsdhBytes)};
}
inline rdma::Result<RdmaRdCompl, WireError> parse_rdma_rd_compl(std::span<const std::byte> msg) noexcept {
  if (const auto error = detail::check_is(Mid::rdma_rd_compl, msg)) return rdma::Err{*error};
  return RdmaRdCompl{rdma::load_be32(msg.data() + kBsdhBytes)};
}

/// Write the extended header: the bytes that follow the base header.
inline void emit_extended(const RdmaWrCompl& v, std::span<std::byte, 4> out) noexcept { rdma::store_be32(out.data(), v.bytes); }
inline void emit_extended(const RdmaRdCompl& v, std::span<std::byte, 4> out) noexcept { rdma::store_be32(out.data(), v.bytes); }

}  // namespace sdp::wire
