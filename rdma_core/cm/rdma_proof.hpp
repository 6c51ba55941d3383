// How two ends that meet by offer and dial-back show each other that they hold the same TCP connection: by a keyed digest of the
// first bytes that it carried, the ends of the RDMA connection that is being made, and what they say to each other in making it.
//
// Who has read an offer knows its token, but not those bytes, and cannot pass on another's digest, which names the QP (on an RNIC:
// the port) that the other has. What it does not prove: bytes that somebody can guess. A protocol that begins with a nonce, a salt
// or a password is safe (TLS, SSH, SCRAM); of one that begins as everybody knows, a user of either host might guess them. Where
// those are not trusted a secret of the administrator's goes into the key.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <span>
#include <string>

#include "rdma_core/cm/offer_wire.hpp"

namespace rdma::cm {

using Secret = std::array<std::byte, 32>;  ///< all zero: none

/// The digest of the file's bytes, of which there are at least 16 and at most 4096. The error is told in words for the operator.
Result<Secret, std::string> secret_from(const char* path);

/// What both ends know of the connection in the making.
struct Claim {
  offer::Token token{};
  IpAddress client, server;         ///< the anchor's ends
  std::uint32_t dialler = 0;        ///< the server's end of the RDMA connection: QP number, or port
  std::uint32_t listener = 0;       ///< the client's: the port that was dialled; in the reply, its QP number
  std::span<const std::byte> data;  ///< private data beside the proof
  std::span<const std::byte> from_client, from_server;
};

enum class Says : std::uint8_t { request = 1, reply = 2 };

/// Any thread.
offer::Proof prove(const Secret& secret, Says what, const Claim& claim) noexcept;
/// Takes as long for a wrong proof as for a right one.
bool is_proved(const offer::Proof& proof, const Secret& secret, Says what, const Claim& claim) noexcept;

}  // namespace rdma::cm
