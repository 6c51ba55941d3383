// One door from libc's names to ours: picks the owner of a descriptor, turns -errno into errno, leaves errno alone on success.
#pragma once

#include <cerrno>

#include "preload/fd_table.hpp"
#include "preload/libc.hpp"

namespace preload {

template <class Ret>
Ret to_libc(std::int64_t result) noexcept {
  if (result < 0) {
    errno = static_cast<int>(-result);
    return static_cast<Ret>(-1);
  }
  return static_cast<Ret>(result);
}

template <class Ours, class Theirs>
auto dispatch(int fd, Ours&& ours, Theirs&& theirs) -> decltype(theirs(libc())) {
  const sdp::Stream stream = fds().find(fd);
  if (!stream) [[likely]]
    return theirs(libc());
  return to_libc<decltype(theirs(libc()))>(ours(stream));
}

/// The call moves bytes in a way that no lane carries: the stream goes back to TCP first.
inline void leave_lane(int fd, sdp::LaneReason reason) noexcept {
  if (const sdp::Stream stream = fds().find(fd)) stream.take_down(reason);
}

}  // namespace preload

/// Marks what the library exports; everything else is hidden. The list is exports.map.
#define SDP_EXPORT extern "C" __attribute__((visibility("default")))
