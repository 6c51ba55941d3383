// The frames of LocalCm: one per packet of a SOCK_SEQPACKET Unix connection, of exactly the size of its type, host byte order (both
// ends run on one kernel). Everything in a frame is untrusted.
//
//   active                               passive
//   hello (who I am, both cookies)  -->            on the rendezvous connection
//                                   <--  hello
//   link  (new + memfd, bell, or
//          reuse + the link's nonce) -->
//                                   <--  link (new + memfd, bell; same nonce; or unknown: the active side offers a new one)
//   request (lane, QP, private)     -->
//                                   <--  reply (lane, QP, private)  or  reject
//   established                     -->
//
// The connection on which a new link was made is kept as the link's; on it either side later sends
//   disconnect (the receiver's lane).
// Any other connection is closed after established.
#pragma once

#include <cstddef>
#include <cstdint>

#include "rdma_core/drivers/shm/shm_layout.hpp"

namespace rdma::cm::wire {

inline constexpr std::uint32_t kMagic = 0x53'44'4C'43;  // "SDLC"
inline constexpr std::uint16_t kVersion = 2;

enum class Type : std::uint16_t { hello = 1, link, request, reply, reject, established, disconnect };

struct Head {
  std::uint32_t magic;
  std::uint16_t version;
  std::uint16_t type;
  std::uint32_t bytes;  ///< of the frame, this head included
  std::uint32_t reserved;
};
static_assert(sizeof(Head) == 16);

struct Hello {
  Head head;
  shm::ProcessId process;
  std::uint64_t own_cookie;   ///< of the sender's anchor
  std::uint64_t peer_cookie;  ///< of the receiver's anchor, as the sender learnt it; 0: not known
  std::uint32_t layout_version;
  std::uint32_t node_type;    ///< both devices must be of one flavour
  std::uint32_t needs_fence;  ///< 1: no membarrier here
  std::uint32_t pad;
};

enum class LinkKind : std::uint32_t { fresh = 1, reuse, unknown };

struct Link {
  Head head;
  shm::ProcessId nonce;
  std::uint32_t kind;
  std::uint32_t pad;
};

inline constexpr std::size_t kRequestPrivate = 56;
inline constexpr std::size_t kReplyPrivate = 196;
inline constexpr std::size_t kRejectPrivate = 148;

template <std::size_t N>
struct WithPrivate {
  Head head;
  std::uint64_t lane;  ///< the sender's name for the connection
  std::uint32_t qpn;
  std::uint32_t reason;         ///< reject only: a cm::Reason
  std::uint32_t private_bytes;  ///< used of `data`
  std::byte data[(N + 3) / 4 * 4];
};
using Request = WithPrivate<kRequestPrivate>;
using Reply = WithPrivate<kReplyPrivate>;
using Reject = WithPrivate<kRejectPrivate>;

struct Plain {  // established, disconnect
  Head head;
  std::uint64_t lane;  ///< the receiver's name for the connection
};

constexpr Head make_head(Type type, std::size_t bytes) noexcept {
  return {kMagic, kVersion, static_cast<std::uint16_t>(type), static_cast<std::uint32_t>(bytes), 0};
}
constexpr Plain make_plain(Type type, std::uint64_t lane) noexcept { return {make_head(type, sizeof(Plain)), lane}; }

inline constexpr std::size_t kMaxFrame = 512;
static_assert(sizeof(Reply) <= kMaxFrame && sizeof(Request) <= kMaxFrame && sizeof(Hello) <= kMaxFrame);

}  // namespace rdma::cm::wire
