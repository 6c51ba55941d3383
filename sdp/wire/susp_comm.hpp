// SuspComm: the stream is to go on over a new connection to another service id. No known implementation does it; ours reads it so
// that the log can name it.
//
//   16 service id, 64 bits | 24
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>

#include "sdp/wire/bsdh.hpp"

namespace sdp::wire {

struct SuspComm {
  std::uint64_t service_id = 0;
  friend bool operator==(const SuspComm&, const SuspComm&) = default;
};

/// Takes the whole message. Errors: those of parse_bsdh, wrong_mid.
inline rdma::Result<SuspComm, WireError> parse_susp_comm(std::span<const std::byte> msg) noexcept {
  if (const auto error = detail::check_is(Mid::susp_comm, msg)) return rdma::Err{*error};
  return SuspComm{rdma::load_be64(msg.data() + kBsdhBytes)};
}

/// Writes the extended header: the bytes that follow the base header.
inline void emit_extended(const SuspComm& v, std::span<std::byte, 8> out) noexcept { rdma::store_be64(out.data(), v.service_id); }

}  // namespace sdp::wire
