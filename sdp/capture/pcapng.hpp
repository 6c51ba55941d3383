// Blocks of a pcapng file (draft-ietf-opsawg-pcapng), in the machine's byte order, which the file states.
//
// Layer: bytes only. Every function writes to `out` and returns the end of what it wrote; the caller has made room.
#pragma once

#include <cstddef>
#include <cstdint>

namespace sdp::capture {

inline constexpr std::size_t kFileHeaderBytes = 128;     ///< enough for put_file_header()
inline constexpr std::size_t kPacketBlockOverhead = 64;  ///< enough for a packet's block, without the packet

/// Section header and one Ethernet interface whose time stamps are nanoseconds.
std::byte* put_file_header(std::byte* out) noexcept;

/// What stands before the packet. `nanos`: since 1970.
std::byte* begin_packet(std::byte* out, std::int64_t nanos, std::size_t packet_bytes) noexcept;
/// What stands behind it; `packet` is where it began and `end` where it ends.
std::byte* end_packet(std::byte* packet, std::byte* end, bool outgoing) noexcept;

}  // namespace sdp::capture
