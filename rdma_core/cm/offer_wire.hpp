// What two processes on two hosts say to each other before they have a connection: an offer, its answer, and the first bytes of the
// request by which the offer is taken up. Big-endian. An IB CM pads private data with zeros, so every length is fixed.
//
// The offer, 56 bytes, all that an IB REQ carries:
//   0 magic 3, version 1 | 4 token 12 | 16 process 4 | 20 client's port 2 | 22 server's port 2 | 24 dial-back port 2 | 26 family 1
//   (4 or 6) | 27 zero | 28 client's address 16 | 44 hash of both addresses and ports 8 | 52 sent 2 | 54 received 2: how many of
//   the connection's first bytes the client knows, of each direction
// The answer, 24 bytes:   0 magic 3, version 1 | 4 code 1 | 5 zero 3 | 8 token 12 | 20 zero 4
// The dial, 36 bytes in front of the private data of the request:   0 token 12 | 12 process 4 | 16 from the client 2 | 18 from the
//   server 2: how many bytes are proved | 20 proof 16 (rdma_proof.hpp)
// The proof, 16 bytes in front of the private data of the reply
// The refusal, 8 bytes in front of those of a reject:   0 magic 3, version 1 | 4 reason 4
//
// The client is who made the TCP connection. `process` names one process for as long as it lives and is told to its peers only.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <optional>
#include <span>

#include "rdma_core/base/byte_order.hpp"
#include "rdma_core/cm/connection_manager.hpp"
#include "rdma_core/cm/ip_address.hpp"

namespace rdma::cm::offer {

inline constexpr std::uint32_t kOfferMagic = 0x53444F02, kAnswerMagic = 0x53444102,
                               kRefusalMagic = 0x53445202;  // "SDO", "SDA", "SDR"
inline constexpr std::size_t kOfferBytes = 56, kAnswerBytes = 24, kDialBytes = 36, kProofBytes = 16, kRefusalBytes = 8;

using Token = std::array<std::byte, 12>;
using Proof = std::array<std::byte, kProofBytes>;

/// FNV-1a over both ends: a check on what the offer does not carry whole, no secret.
inline std::uint64_t hash_of(const IpAddress& client, const IpAddress& server) noexcept {
  std::uint64_t hash = 0xCBF29CE484222325;
  const auto add = [&hash](std::span<const std::byte> bytes) {
    for (const std::byte b : bytes) hash = (hash ^ std::to_integer<std::uint64_t>(b)) * 0x100000001B3;
  };
  for (const IpAddress* end : {&client, &server}) {
    add(end->bytes);
    add(std::as_bytes(std::span(&end->port, 1)));
  }
  return hash;
}

struct Offer {
  Token token{};
  std::uint32_t process = 0;
  IpAddress client;  ///< the scope is not sent: it is the one of the address that the offer came to
  std::uint16_t server_port = 0;
  std::uint16_t dial_port = 0;
  std::uint64_t hash = 0;
  std::uint16_t sent = 0, received = 0;  ///< bytes, by the client

  std::array<std::byte, kOfferBytes> bytes() const noexcept {
    std::array<std::byte, kOfferBytes> out{};
    store_be32(out.data(), kOfferMagic);
    std::memcpy(out.data() + 4, token.data(), token.size());
    store_be32(out.data() + 16, process);
    store_be16(out.data() + 20, client.port);
    store_be16(out.data() + 22, server_port);
    store_be16(out.data() + 24, dial_port);
    out[26] = static_cast<std::byte>(client.family == AF_INET ? 4 : 6);
    std::memcpy(out.data() + 28, client.bytes.data(), client.bytes.size());
    store_be64(out.data() + 44, hash);
    store_be16(out.data() + 52, sent);
    store_be16(out.data() + 54, received);
    return out;
  }
  /// Of another kind, another version or no sense: nothing.
  static std::optional<Offer> parse(std::span<const std::byte> in) noexcept {
    if (in.size() < kOfferBytes || load_be32(in.data()) != kOfferMagic) return std::nullopt;
    const auto family = std::to_integer<unsigned>(in[26]);
    if (family != 4 && family != 6) return std::nullopt;
    Offer o;
    std::memcpy(o.token.data(), in.data() + 4, o.token.size());
    o.process = load_be32(in.data() + 16);
    o.client.family = family == 4 ? AF_INET : AF_INET6;
    o.client.port = load_be16(in.data() + 20);
    o.server_port = load_be16(in.data() + 22);
    o.dial_port = load_be16(in.data() + 24);
    std::memcpy(o.client.bytes.data(), in.data() + 28, family == 4 ? 4 : 16);
    o.hash = load_be64(in.data() + 44);
    o.sent = load_be16(in.data() + 52);
    o.received = load_be16(in.data() + 54);
    if (o.client.port == 0 || o.server_port == 0 || o.dial_port == 0) return std::nullopt;
    if (o.sent > Transcript::kMost || o.received > Transcript::kMost) return std::nullopt;
    return o;
  }
};

enum class Code : std::uint8_t {
  noted = 1,   ///< the process that waits for it has it and dials
  nobody = 2,  ///< no process waits for it, yet
};

struct Answer {
  Code code = Code::nobody;
  Token token{};

  std::array<std::byte, kAnswerBytes> bytes() const noexcept {
    std::array<std::byte, kAnswerBytes> out{};
    store_be32(out.data(), kAnswerMagic);
    out[4] = static_cast<std::byte>(code);
    std::memcpy(out.data() + 8, token.data(), token.size());
    return out;
  }
  static std::optional<Answer> parse(std::span<const std::byte> in) noexcept {
    if (in.size() < kAnswerBytes || load_be32(in.data()) != kAnswerMagic) return std::nullopt;
    Answer a;
    a.code = in[4] == std::byte{1} ? Code::noted : Code::nobody;
    std::memcpy(a.token.data(), in.data() + 8, a.token.size());
    return a;
  }
};

struct Dial {
  Token token{};
  std::uint32_t process = 0;
  std::uint16_t from_client = 0, from_server = 0;  ///< bytes
  Proof proof{};

  void emit(std::byte* out) const noexcept {
    std::memcpy(out, token.data(), token.size());
    store_be32(out + 12, process);
    store_be16(out + 16, from_client);
    store_be16(out + 18, from_server);
    std::memcpy(out + 20, proof.data(), proof.size());
  }
  static std::optional<Dial> parse(std::span<const std::byte> in) noexcept {
    if (in.size() < kDialBytes) return std::nullopt;
    Dial d;
    std::memcpy(d.token.data(), in.data(), d.token.size());
    d.process = load_be32(in.data() + 12);
    d.from_client = load_be16(in.data() + 16);
    d.from_server = load_be16(in.data() + 18);
    std::memcpy(d.proof.data(), in.data() + 20, d.proof.size());
    return d;
  }
};

/// A reason that no peer of ours would give is `refused`; something else than a refusal of ours: nothing.
inline std::optional<Reason> parse_refusal(std::span<const std::byte> in) noexcept {
  if (in.size() < kRefusalBytes || load_be32(in.data()) != kRefusalMagic) return std::nullopt;
  const std::uint32_t reason = load_be32(in.data() + 4);
  return reason == 0 || reason > static_cast<std::uint32_t>(Reason::unproven) ? Reason::refused : static_cast<Reason>(reason);
}
inline void emit_refusal(Reason reason, std::byte* out) noexcept {
  store_be32(out, kRefusalMagic);
  store_be32(out + 4, static_cast<std::uint32_t>(reason));
}

}  // namespace rdma::cm::offer
