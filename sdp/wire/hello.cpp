#include "sdp/wire/hello.hpp"

#include <algorithm>
#include <cstring>

namespace sdp::wire {

using rdma::Err;
using rdma::load_be16;
using rdma::load_be32;
using rdma::store_be16;
using rdma::store_be32;

namespace {

std::uint8_t byte_at(std::span<const std::byte> msg, std::size_t offset) noexcept {
  return std::to_integer<std::uint8_t>(msg[offset]);
}

HelloIp ip_at(std::span<const std::byte> msg, std::size_t offset) noexcept {
  HelloIp ip;
  std::memcpy(ip.data(), msg.data() + offset, ip.size());
  return ip;
}

bool fits_v4(const HelloIp& ip) noexcept {
  return std::all_of(ip.begin(), ip.begin() + 12, [](std::byte b) { return b == std::byte{0}; });
}

/// What both messages have in common before their own fields.
std::optional<WireError> check_prologue(Mid mid, std::span<const std::byte> msg) noexcept {
  if (const auto error = detail::check_is(mid, msg)) return error;
  const auto base = BsdhView::checked(msg);
  if (base->mseq() != 0 || base->mseq_ack() != 0) return WireError::bad_sequence;
  if (byte_at(msg, 16) >> 4 != kProtocolMajor) return WireError::bad_version;
  return std::nullopt;
}

}  // namespace

HelloIp hello_ip_from_v4(std::uint32_t v4) noexcept {
  HelloIp ip{};
  std::memcpy(ip.data() + 12, &v4, sizeof v4);
  return ip;
}

rdma::Result<HelloHeader, WireError> parse_hello(std::span<const std::byte> msg) noexcept {
  if (const auto error = check_prologue(Mid::hello, msg)) return Err{*error};
  HelloHeader h;
  h.version = byte_at(msg, 16);
  h.ip_version = byte_at(msg, 17) >> 4;
  h.capabilities = byte_at(msg, 17) & 0x0F;
  h.max_adverts = byte_at(msg, 19);
  h.desired_remote_rcv_size = load_be32(msg.data() + 20);
  h.local_rcv_size = load_be32(msg.data() + 24);
  h.local_port = load_be16(msg.data() + 28);
  h.src_ip = ip_at(msg, 32);
  h.dst_ip = ip_at(msg, 48);
  h.ext_max_adverts = load_be16(msg.data() + 66);
  if (h.ip_version != 4 && h.ip_version != 6) return Err{WireError::bad_ip_version};
  if (h.ip_version == 4 && !(fits_v4(h.src_ip) && fits_v4(h.dst_ip))) return Err{WireError::bad_ip_version};
  if (h.adverts() == 0) return Err{WireError::no_adverts};
  if (h.local_rcv_size <= kBsdhBytes) return Err{WireError::bad_size};
  return h;
}

rdma::Result<HelloAckHeader, WireError> parse_hello_ack(std::span<const std::byte> msg) noexcept {
  if (const auto error = check_prologue(Mid::hello_ack, msg)) return Err{*error};
  HelloAckHeader h;
  h.version = byte_at(msg, 16);
  h.max_adverts = byte_at(msg, 19);
  h.actual_rcv_size = load_be32(msg.data() + 20);
  if (h.max_adverts == 0) return Err{WireError::no_adverts};
  if (h.actual_rcv_size <= kBsdhBytes) return Err{WireError::bad_size};
  return h;
}

void emit_hello(const HelloHeader& h, std::uint16_t bufs, std::span<std::byte, kHelloBytes> out) noexcept {
  std::memset(out.data(), 0, out.size());
  emit_bsdh(Bsdh{.mid = Mid::hello, .bufs = bufs, .len = kHelloBytes}, out.data());
  out[16] = std::byte{h.version};
  out[17] = static_cast<std::byte>(h.ip_version << 4 | (h.capabilities & 0x0F));
  out[19] = std::byte{h.max_adverts};
  store_be32(out.data() + 20, h.desired_remote_rcv_size);
  store_be32(out.data() + 24, h.local_rcv_size);
  store_be16(out.data() + 28, h.local_port);
  std::memcpy(out.data() + 32, h.src_ip.data(), h.src_ip.size());
  std::memcpy(out.data() + 48, h.dst_ip.data(), h.dst_ip.size());
  store_be16(out.data() + 66, h.ext_max_adverts);
}

void emit_hello_ack(const HelloAckHeader& h, std::uint16_t bufs, std::span<std::byte, kHelloAckBytes> out) noexcept {
  std::memset(out.data(), 0, out.size());
  emit_bsdh(Bsdh{.mid = Mid::hello_ack, .bufs = bufs, .len = kHelloAckBytes}, out.data());
  out[16] = std::byte{h.version};
  out[19] = std::byte{h.max_adverts};
  store_be32(out.data() + 20, h.actual_rcv_size);
}

}  // namespace sdp::wire
