// ModeChange: one half-pipe moves to another flow-control mode, from this message on.
//
//   16: bit 7 which half of the receiver of this message, bits 6-4 mode, bits 3-0 zero | 17 zero x 3 | 20
//
// Which moves are legal, and who may start them, is for the connection to say.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>

#include "sdp/wire/bsdh.hpp"

namespace sdp::wire {

enum class FlowMode : std::uint8_t { buffered = 0, combined = 1, pipelined = 2 };

struct ModeChange {
  FlowMode mode = FlowMode::combined;
  bool send_half = false;  ///< true: the send half of whoever receives the message; false: its receive half
  friend bool operator==(const ModeChange&, const ModeChange&) = default;
};

/// Takes the whole message. Errors: those of parse_bsdh, wrong_mid, bad_mode (no such mode, or a bit that must be zero).
inline rdma::Result<ModeChange, WireError> parse_mode_change(std::span<const std::byte> msg) noexcept {
  if (const auto error = detail::check_is(Mid::mode_change, msg)) return rdma::Err{*error};
  const std::uint32_t word = rdma::load_be32(msg.data() + kBsdhBytes);
  const std::uint32_t mode = word >> 28 & 7;
  if ((word & 0x0FFF'FFFF) != 0 || mode > static_cast<std::uint32_t>(FlowMode::pipelined)) return rdma::Err{WireError::bad_mode};
  return ModeChange{static_cast<FlowMode>(mode), (word >> 31) != 0};
}

/// Writes the extended header: the bytes that follow the base header.
inline void emit_extended(const ModeChange& v, std::span<std::byte, 4> out) noexcept {
  rdma::store_be32(out.data(), static_cast<std::uint32_t>(v.send_half) << 31 | static_cast<std::uint32_t>(v.mode) << 28);
}

}  // namespace sdp::wire
