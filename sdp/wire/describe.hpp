// One message as one line of text, for logs. Not for the hot path: it formats.
#pragma once

#include <array>
#include <cstddef>
#include <span>

#include "sdp/wire/mid.hpp"
#include "sdp/wire/wire_error.hpp"

namespace sdp::wire {

/// The protocol's own name: "Hello", "SrcAvail"… Static text. A value outside the enumeration gives "unknown".
const char* to_string(Mid) noexcept;

/// Fixed storage, so that describing allocates nothing.
struct Description {
  std::array<char, 256> text{};
  const char* c_str() const noexcept { return text.data(); }
};

/// Any bytes at all, legal or not:
///   "Data mseq=7 ack=3 bufs=12 len=80 OOB_PRES"
///   "Hello mseq=0 ack=0 bufs=8 len=68 v2.2 IPv4 cap=0 adverts=1 rcv=32784 want=0 port=4711"
///   "7 bytes, shorter than a header"
/// An illegal message is shown as far as it can be read, then " : " and what is wrong with it.
Description describe(std::span<const std::byte> msg) noexcept;

}  // namespace sdp::wire
