// How far a stopped lane had come, as one side sees it; the peer needs it to go on by TCP.
#pragma once

#include <cstdint>

namespace sdp {

struct Arrived {
  bool switched = false;        ///< this side's sending direction went by the lane
  std::uint64_t switch_at = 0;  ///< from this position of the anchor's stream on
  std::uint64_t sent = 0;       ///< payload by the lane, bytes
  std::uint64_t received = 0;   ///< payload that has arrived by the lane
  bool closed = false;          ///< FIN is out, or the program has closed this side: what has not arrived does not come
};

}  // namespace sdp
