// Why bytes are not a legal SDP message. Each is a protocol violation of the peer: the connection logs it and ends the lane.
#pragma once

#include <cstdint>

namespace sdp::wire {

enum class WireError : std::uint8_t {
  truncated,       ///< shorter than the headers it must have
  unknown_mid,     ///< reserved or experimental identifier
  wrong_mid,       ///< a legal message, but not the one that this parser reads
  bad_length,      ///< Len is not the number of bytes received, or not a length that this message can have
  bad_flags,       ///< a reserved flag is set, or OOB_PRES outside Data
  bad_version,     ///< another major version of SDP
  bad_ip_version,  ///< neither 4 nor 6, or an IPv4 address with more than 4 bytes
  no_adverts,      ///< MaxAdverts is zero
  bad_size,        ///< a receive buffer that could not hold one payload byte
  bad_sequence,    ///< Hello or HelloAck whose MSeq or MSeqAck is not zero
  bad_mode,        ///< ModeChange to a mode that does not exist
  bad_range,       ///< advertised memory is empty or wraps round the address space
  bad_payload,     ///< SrcAvail with the whole advertised buffer in line
};

/// Static text, for log lines.
const char* to_string(WireError) noexcept;

}  // namespace sdp::wire
