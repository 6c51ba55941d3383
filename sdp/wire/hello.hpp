// Hello and HelloAck: the first message of the active and of the passive side. They travel in band, as the first Sends of a lane,
// with MSeq 0 and outside the credit account (PROTOCOL.md, deviations).
//
//   Hello     16 version | 17 IP version, capabilities | 18 zero | 19 MaxAdverts | 20 DesRemRcvSz | 24 LocalRcvSz
//             28 port | 30 zero | 32 source IP | 48 destination IP | 64 zero | 66 ExtMaxAdverts | 68
//   HelloAck  16 version | 17 zero | 18 zero | 19 MaxAdverts | 20 ActRcvSz | 24
//
// The parsers take the whole message, of the in-band length or of the length of native CM private data (92, 196), and check the
// base header too. Reserved bytes are not looked at: a later minor version may use them, and minors are compatible.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <span>

#include "rdma_core/base/result.hpp"
#include "sdp/wire/bsdh.hpp"

namespace sdp::wire {

inline constexpr std::uint8_t kProtocolVersion = 0x22;  ///< what we send; any 2.x is accepted
inline constexpr std::uint8_t kProtocolMajor = 2;
inline constexpr std::uint8_t kInvalidateCap = 1;       ///< the sender takes Send with Invalidate
inline constexpr std::uint8_t kExtendedMaxAdverts = 2;  ///< ExtMaxAdverts holds the number, not MaxAdverts

/// An address as Hello carries it: IPv6, or IPv4 in the last 4 bytes behind 12 zeros. Network byte order.
using HelloIp = std::array<std::byte, 16>;

/// `v4` as in sockaddr_in::sin_addr.s_addr: network byte order.
HelloIp hello_ip_from_v4(std::uint32_t v4) noexcept;

struct HelloHeader {
  std::uint8_t version = kProtocolVersion;
  std::uint8_t ip_version = 4;                ///< 4 or 6
  std::uint8_t capabilities = 0;              ///< low nibble: kInvalidateCap, kExtendedMaxAdverts
  std::uint8_t max_adverts = 1;               ///< > 0 unless kExtendedMaxAdverts
  std::uint32_t desired_remote_rcv_size = 0;  ///< bytes with BSDH; a wish that binds nobody
  std::uint32_t local_rcv_size = 0;           ///< bytes with BSDH: the longest message the receiver of this may send
  std::uint16_t local_port = 0;               ///< of the active side, host byte order
  HelloIp src_ip{};                           ///< active side
  HelloIp dst_ip{};                           ///< passive side
  std::uint16_t ext_max_adverts = 0;          ///< > 0 with kExtendedMaxAdverts

  /// How many advertisements the sender of this can hold at once, of both kinds together.
  std::uint16_t adverts() const noexcept { return capabilities & kExtendedMaxAdverts ? ext_max_adverts : max_adverts; }
  friend bool operator==(const HelloHeader&, const HelloHeader&) = default;
};

struct HelloAckHeader {
  std::uint8_t version = kProtocolVersion;
  std::uint8_t max_adverts = 1;       ///< > 0
  std::uint32_t actual_rcv_size = 0;  ///< bytes with BSDH: what the passive side posted
  friend bool operator==(const HelloAckHeader&, const HelloAckHeader&) = default;
};

/// Errors: those of parse_bsdh, wrong_mid, bad_sequence, bad_version, bad_ip_version, no_adverts, bad_size.
rdma::Result<HelloHeader, WireError> parse_hello(std::span<const std::byte> msg) noexcept;
/// Errors: those of parse_bsdh, wrong_mid, bad_sequence, bad_version, no_adverts, bad_size.
rdma::Result<HelloAckHeader, WireError> parse_hello_ack(std::span<const std::byte> msg) noexcept;

/// Write the whole in-band message, base header included; `bufs` is the initial grant of credits, in buffers.
void emit_hello(const HelloHeader&, std::uint16_t bufs, std::span<std::byte, kHelloBytes> out) noexcept;
void emit_hello_ack(const HelloAckHeader&, std::uint16_t bufs, std::span<std::byte, kHelloAckBytes> out) noexcept;

}  // namespace sdp::wire
