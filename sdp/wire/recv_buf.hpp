// ChRcvBuf and ChRcvBufAck: the wish for larger private receive buffers, and the size that was granted.
//
//   16 size, 32 bits | 20
//
// Sizes that we send include the 16-byte base header. OFED sends them without it: take a received value v as "a message may have v
// bytes", which is safe for both readings.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>

#include "sdp/wire/bsdh.hpp"

namespace sdp::wire {

inline constexpr std::size_t kRecvBufBytes = 20;  ///< whole message

struct ChRcvBuf {
  std::uint32_t size = 0;  ///< bytes wished for, base header included; > kBsdhBytes
  friend bool operator==(const ChRcvBuf&, const ChRcvBuf&) = default;
};
struct ChRcvBufAck {
  std::uint32_t size = 0;  ///< bytes in force from now on, base header included; > kBsdhBytes
  friend bool operator==(const ChRcvBufAck&, const ChRcvBufAck&) = default;
};

namespace detail {
template <class T>
rdma::Result<T, WireError> parse_recv_buf(Mid mid, std::span<const std::byte> msg) noexcept {
  if (const auto error = check_is(mid, msg)) return rdma::Err{*error};
  const T value{rdma::load_be32(msg.data() + kBsdhBytes)};
  if (value.size <= kBsdhBytes) return rdma::Err{WireError::bad_size};
  return value;
}
}  // namespace detail

/// Take the whole message. Errors: those of parse_bsdh, wrong_mid, bad_size.
inline rdma::Result<ChRcvBuf, WireError> parse_ch_rcv_buf(std::span<const std::byte> msg) noexcept {
  return detail::parse_recv_buf<ChRcvBuf>(Mid::ch_rcv_buf, msg);
}
inline rdma::Result<ChRcvBufAck, WireError> parse_ch_rcv_buf_ack(std::span<const std::byte> msg) noexcept {
  return detail::parse_recv_buf<ChRcvBufAck>(Mid::ch_rcv_buf_ack, msg);
}

/// Write the extended header: the bytes that follow the base header.
inline void emit_extended(const ChRcvBuf& v, std::span<std::byte, 4> out) noexcept { rdma::store_be32(out.data(), v.size); }
inline void emit_extended(const ChRcvBufAck& v, std::span<std::byte, 4> out) noexcept { rdma::store_be32(out.data(), v.size); }

}  // namespace sdp::wire
