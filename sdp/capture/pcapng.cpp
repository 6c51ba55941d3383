#include "sdp/capture/pcapng.hpp"

#include <cstring>
#include <string_view>

namespace sdp::capture {
namespace {

constexpr std::uint32_t kSectionHeader = 0x0A0D0D0A, kInterface = 1, kEnhancedPacket = 6;
constexpr std::uint32_t kByteOrderMagic = 0x1A2B3C4D;
constexpr std::uint16_t kEthernet = 1;
constexpr std::uint16_t kOptEnd = 0, kOptUserApplication = 4, kOptInterfaceName = 2, kOptTimeResolution = 9, kOptPacketFlags = 2;
constexpr std::uint8_t kNanoseconds = 9;
constexpr std::uint32_t kInbound = 1, kOutbound = 2;
constexpr std::size_t kBeforePacket = 28;

template <class T>
std::byte* put(std::byte* out, T value) noexcept {
  std::memcpy(out, &value, sizeof value);
  return out + sizeof value;
}

/// Zeros up to a multiple of 4 bytes from `start`, as blocks and options demand.
std::byte* align(const std::byte* start, std::byte* out) noexcept {
  while ((out - start) % 4 != 0) *out++ = std::byte{0};
  return out;
}

std::byte* put_option(std::byte* out, std::uint16_t code, const void* value, std::size_t size) noexcept {
  out = put(out, code);
  out = put(out, static_cast<std::uint16_t>(size));
  std::memcpy(out, value, size);
  return align(out, out + size);
}

/// The total length stands at both ends of a block.
std::byte* finish_block(std::byte* block, std::byte* out) noexcept {
  out = put(put(out, kOptEnd), std::uint16_t{0});
  const auto total = static_cast<std::uint32_t>(out + 4 - block);
  put(block + 4, total);
  return put(out, total);
}

}  // namespace

std::byte* put_file_header(std::byte* out) noexcept {
  std::byte* block = out;
  out = put(block, kSectionHeader) + 4;
  out = put(put(put(out, kByteOrderMagic), std::uint16_t{1}), std::uint16_t{0});  // version 1.0
  out = put(out, std::int64_t{-1});                                               // length of the section: not known
  constexpr std::string_view kApplication = "sdpreload";
  out = put_option(out, kOptUserApplication, kApplication.data(), kApplication.size());
  out = finish_block(block, out);

  block = out;
  out = put(block, kInterface) + 4;
  out = put(put(put(out, kEthernet), std::uint16_t{0}), std::uint32_t{0});  // no limit to a packet
  constexpr std::string_view kName = "sdp";
  out = put_option(out, kOptInterfaceName, kName.data(), kName.size());
  out = put_option(out, kOptTimeResolution, &kNanoseconds, sizeof kNanoseconds);
  return finish_block(block, out);
}

std::byte* begin_packet(std::byte* out, std::int64_t nanos, std::size_t packet_bytes) noexcept {
  const auto stamp = static_cast<std::uint64_t>(nanos);
  out = put(out, kEnhancedPacket) + 4;
  out = put(out, std::uint32_t{0});  // interface
  out = put(put(out, static_cast<std::uint32_t>(stamp >> 32)), static_cast<std::uint32_t>(stamp));
  out = put(out, static_cast<std::uint32_t>(packet_bytes));   // in the file
  return put(out, static_cast<std::uint32_t>(packet_bytes));  // on the wire
}

std::byte* end_packet(std::byte* packet, std::byte* end, bool outgoing) noexcept {
  end = align(packet, end);
  const std::uint32_t flags = outgoing ? kOutbound : kInbound;
  end = put_option(end, kOptPacketFlags, &flags, sizeof flags);
  return finish_block(packet - kBeforePacket, end);
}

}  // namespace sdp::capture
