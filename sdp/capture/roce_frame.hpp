// The bytes of RoCEv2 packets and of CM datagrams, for captures: nothing here is ever sent.
//
//   Ethernet 14 | IPv4 20 or IPv6 40 | UDP 8, to port 4791 | BTH 12 | [DETH 8 |] payload | pad to 4 | ICRC 4, zero
//
// Layer: bytes only. Every function writes to `out` and returns the end of what it wrote; the caller has made room.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>

namespace sdp::capture {

inline constexpr std::uint8_t kSendFirst = 0x00, kSendMiddle = 0x01, kSendLast = 0x02, kSendOnly = 0x04;
inline constexpr std::uint8_t kReadResponseOnly = 0x10;            ///< its payload begins with an AETH
inline constexpr std::array<std::byte, 4> kAeth{std::byte{0x1F}};  ///< ACK without end-to-end credits
inline constexpr std::uint8_t kWriteOnly = 0x0A;                   ///< its payload begins with a RETH
/// Of so many bytes, at address 0 by key 0.
constexpr std::array<std::byte, 16> reth(std::uint32_t bytes) noexcept {
  std::array<std::byte, 16> header{};
  for (unsigned i = 0; i < 4; ++i) header[12 + i] = static_cast<std::byte>(bytes >> (24 - 8 * i));
  return header;
}
inline constexpr std::size_t kMadBytes = 256;
inline constexpr std::size_t kMaxOverhead = 14 + 40 + 8 + 12 + 8 + 3 + 4;
inline constexpr std::size_t kIcrcBytes = 4;

/// One end of a lane, as packets name it.
struct End {
  std::array<std::byte, 16> gid{};  ///< the address; IPv4 as ::ffff:a.b.c.d
  std::uint16_t port = 0;           ///< of the program's socket, host byte order
  std::uint32_t qpn = 0;            ///< 24 bits
  std::uint32_t first_psn = 0;      ///< of what this end sends; 24 bits
};

constexpr std::size_t pad_bytes(std::size_t payload) noexcept { return (4 - payload % 4) % 4; }
constexpr std::size_t packet_bytes(bool v4, std::size_t payload) noexcept {
  return 14 + (v4 ? 20 : 40) + 8 + 12 + payload + pad_bytes(payload) + kIcrcBytes;
}

/// All headers of an RC packet up to the payload, whose `payload` bytes, pad_bytes(payload) zeros and kIcrcBytes zeros follow.
std::byte* put_rc_headers(std::byte* out, bool v4, const End& from, const End& to, std::uint8_t opcode, std::uint32_t psn,
                          std::size_t payload) noexcept;

/// The three datagrams of connection set-up, by their attribute.
enum class CmMessage : std::uint16_t { req = 0x0010, rep = 0x0013, rtu = 0x0014 };

struct CmExchange {
  End active, passive;
  bool v4 = false;
  std::uint64_t transaction = 0;  ///< one per lane: pairs the REP with its REQ
  std::uint32_t active_id = 0, passive_id = 0;
};
inline constexpr std::size_t kCmPayloadBytes = 8 + kMadBytes;  ///< DETH and MAD: the `payload` of packet_bytes()

/// One whole datagram, ICRC included, from the side that sends that message.
std::byte* put_cm_packet(std::byte* out, const CmExchange&, CmMessage) noexcept;

}  // namespace sdp::capture
