#include "sdp/wire/avail.hpp"

#include <limits>

namespace sdp::wire {

using rdma::Err;
using rdma::load_be32;
using rdma::load_be64;
using rdma::store_be32;
using rdma::store_be64;

namespace {

/// An RDMA request computes address + offset: a buffer that wraps would turn a checked length into an unchecked address.
bool is_range(std::uint64_t address, std::uint32_t len) noexcept {
  return len > 0 && address <= std::numeric_limits<std::uint64_t>::max() - (len - 1);
}

}  // namespace

rdma::Result<SrcAvail, WireError> parse_src_avail(std::span<const std::byte> msg) noexcept {
  if (const auto error = detail::check_is(Mid::src_avail, msg)) return Err{*error};
  return parse_src_avail_headers(msg.first<payload_offset(Mid::src_avail)>(), msg.size());
}

rdma::Result<SrcAvail, WireError> parse_src_avail_headers(std::span<const std::byte, payload_offset(Mid::src_avail)> headers,
                                                          std::size_t message_bytes) noexcept {
  const SrcAvail v{load_be32(headers.data() + 16), load_be32(headers.data() + 20), load_be64(headers.data() + 24)};
  if (!is_range(v.address, v.len)) return Err{WireError::bad_range};
  if (message_bytes - payload_offset(Mid::src_avail) >= v.len) return Err{WireError::bad_payload};
  return v;
}

rdma::Result<SinkAvail, WireError> parse_sink_avail(std::span<const std::byte> msg) noexcept {
  if (const auto error = detail::check_is(Mid::sink_avail, msg)) return Err{*error};
  const SinkAvail v{load_be32(msg.data() + 16), load_be32(msg.data() + 20), load_be64(msg.data() + 24), load_be32(msg.data() + 32)};
  if (!is_range(v.address, v.len)) return Err{WireError::bad_range};
  return v;
}

void emit_extended(const SrcAvail& v, std::span<std::byte, 16> out) noexcept {
  store_be32(out.data(), v.len);
  store_be32(out.data() + 4, v.rkey);
  store_be64(out.data() + 8, v.address);
}

void emit_extended(const SinkAvail& v, std::span<std::byte, 20> out) noexcept {
  store_be32(out.data(), v.len);
  store_be32(out.data() + 4, v.rkey);
  store_be64(out.data() + 8, v.address);
  store_be32(out.data() + 16, v.non_discards);
}

}  // namespace sdp::wire
