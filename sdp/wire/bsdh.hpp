// Base Sockets Direct Header: the first 16 bytes of every SDP message.
//
//   0     1       2        4         8          12            16
//   | mid | flags |  bufs  |   len   |   mseq   |  mseq_ack   |     all big-endian
//
// Layer: bytes only -- no connection, no clock, no allocation. parse and emit run once per message on the hot path: both are two
// 8-byte accesses, and Data leaves parse after three comparisons.
#pragma once

#include <cstddef>
#include <cstdint>
#include <optional>
#include <span>

#include "rdma_core/base/byte_order.hpp"
#include "rdma_core/base/result.hpp"
#include "sdp/wire/mid.hpp"
#include "sdp/wire/wire_error.hpp"

namespace sdp::wire {

inline constexpr std::uint8_t kOobPres = 1;  ///< the last payload byte is the urgent byte; Data only
inline constexpr std::uint8_t kOobPend = 2;  ///< an urgent byte is on its way; any message
inline constexpr std::uint8_t kReqPipe = 4;  ///< hint of the sink: Pipelined mode preferred
inline constexpr std::uint8_t kKnownFlags = kOobPres | kOobPend | kReqPipe;

inline constexpr std::size_t kMseqOffset = 8;

/// Offsets over bytes that we do not own; interprets nothing. For logs and captures, which must show illegal messages too.
class BsdhView {
 public:
  /// nullopt if shorter than a header; afterwards no accessor can read out of bounds. The bytes must outlive the view.
  static std::optional<BsdhView> checked(std::span<const std::byte> msg) noexcept {
    if (msg.size() < kBsdhBytes) return std::nullopt;
    return BsdhView(msg.data());
  }
  std::uint8_t mid() const noexcept { return std::to_integer<std::uint8_t>(p_[0]); }
  std::uint8_t flags() const noexcept { return std::to_integer<std::uint8_t>(p_[1]); }
  std::uint16_t bufs() const noexcept { return rdma::load_be16(p_ + 2); }
  std::uint32_t len() const noexcept { return rdma::load_be32(p_ + 4); }
  std::uint32_t mseq() const noexcept { return rdma::load_be32(p_ + 8); }
  std::uint32_t mseq_ack() const noexcept { return rdma::load_be32(p_ + 12); }

 private:
  explicit BsdhView(const std::byte* p) noexcept : p_(p) {}
  const std::byte* p_;
};

struct Bsdh {
  Mid mid = Mid::data;
  std::uint8_t flags = 0;      ///< kOobPres | kOobPend | kReqPipe
  std::uint16_t bufs = 0;      ///< private receive buffers that the sender has posted now, in buffers; absolute
  std::uint32_t len = 0;       ///< whole message, this header included, in bytes
  std::uint32_t mseq = 0;      ///< number of this message
  std::uint32_t mseq_ack = 0;  ///< last message of the receiver's that the sender had taken; one snapshot with bufs
  friend bool operator==(const Bsdh&, const Bsdh&) = default;
};

namespace detail {

/// The checks that Data does not need: identifier, flags and a length that the message can have.
inline std::optional<WireError> check_not_data(std::uint8_t mid, std::uint8_t flags, std::size_t len) noexcept {
  if (!is_known_mid(mid)) return WireError::unknown_mid;
  if (flags & kOobPres) return WireError::bad_flags;
  const MessageShape shape = kMessageShapes[mid_index(mid)];
  const std::size_t headers = kBsdhBytes + shape.extended_bytes;
  if (len < headers) return WireError::truncated;
  if (len == headers || shape.payload_allowed) return std::nullopt;
  if (mid == static_cast<std::uint8_t>(Mid::hello) && len == kNativeHelloBytes) return std::nullopt;
  if (mid == static_cast<std::uint8_t>(Mid::hello_ack) && len == kNativeHelloAckBytes) return std::nullopt;
  return WireError::bad_length;
}

}  // namespace detail

/// `msg` is exactly what the receive completion reported: untrusted. What passes has its whole extended header within `msg`, and
/// a payload only if the message may have one: msg.subspan(payload_offset(mid)). The fields of the extended header are still to
/// be checked by their own parser. `msg` must not change meanwhile: copy the header first if the peer can write to it.
/// Errors: truncated, unknown_mid, bad_length, bad_flags.
inline rdma::Result<Bsdh, WireError> parse_bsdh(std::span<const std::byte> msg) noexcept {
  if (msg.size() < kBsdhBytes) [[unlikely]]
    return rdma::Err{WireError::truncated};
  const std::uint64_t low = rdma::load_be64(msg.data());
  const std::uint64_t high = rdma::load_be64(msg.data() + 8);
  const auto mid = static_cast<std::uint8_t>(low >> 56);
  const auto flags = static_cast<std::uint8_t>(low >> 48);
  const auto len = static_cast<std::uint32_t>(low);
  if (len != msg.size()) [[unlikely]]
    return rdma::Err{WireError::bad_length};
  if (flags & ~kKnownFlags) [[unlikely]]
    return rdma::Err{WireError::bad_flags};
  if (mid != static_cast<std::uint8_t>(Mid::data)) [[unlikely]] {
    if (const auto error = detail::check_not_data(mid, flags, len)) return rdma::Err{*error};
  }
  return Bsdh{
      static_cast<Mid>(mid),           flags, static_cast<std::uint16_t>(low >> 32), len, static_cast<std::uint32_t>(high >> 32),
      static_cast<std::uint32_t>(high)};
}

/// Writes kBsdhBytes to `out`, in two stores. Cannot fail: a Bsdh that the caller built is legal by its contract.
inline void emit_bsdh(const Bsdh& h, std::byte* out) noexcept {
  rdma::store_be64(out, static_cast<std::uint64_t>(h.mid) << 56 | static_cast<std::uint64_t>(h.flags) << 48 |
                            static_cast<std::uint64_t>(h.bufs) << 32 | h.len);
  rdma::store_be64(out + 8, static_cast<std::uint64_t>(h.mseq) << 32 | h.mseq_ack);
}
inline void emit_bsdh(const Bsdh& h, std::span<std::byte, kBsdhBytes> out) noexcept { emit_bsdh(h, out.data()); }

namespace detail {

/// First step of every extended header's parser: the base header, and that it announces the message `mid`.
inline std::optional<WireError> check_is(Mid mid, std::span<const std::byte> msg) noexcept {
  const auto base = parse_bsdh(msg);
  if (!base) return base.error();
  if (base.value().mid != mid) return WireError::wrong_mid;
  return std::nullopt;
}

}  // namespace detail

}  // namespace sdp::wire
