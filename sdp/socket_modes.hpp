// Which socket modes can have no lane (architecture, rule 5): asked before the kernel sees an option, and of a socket whose options
// were set before it was a stream of ours, or come from its listener.
#pragma once

#include <sys/socket.h>
#include <sys/time.h>

#include <cstdint>

namespace sdp {

// Of these options, too, each has two numbers, of which <sys/socket.h> gives but one. On a 64-bit machine they mean the same.
inline constexpr int kRcvTimeoNew = 66, kSndTimeoNew = 67;

/// Of a value of SO_RCVTIMEO or SO_SNDTIMEO that the kernel has taken. 0: no time-out; negative: over at once.
inline std::int64_t timeout_ns(const timeval& value) noexcept {
  constexpr std::int64_t kLongestSeconds = 1'000'000'000;  // no program sees the end of more
  if (value.tv_sec >= kLongestSeconds) return 0;
  if (value.tv_sec < 0) return -1;
  return static_cast<std::int64_t>(value.tv_sec) * 1'000'000'000 + static_cast<std::int64_t>(value.tv_usec) * 1000;
}

/// Would setsockopt() with these put the socket in such a mode? `value` is the program's: it may be no address.
bool is_mode_without_lane(int level, int name, const void* value, socklen_t len) noexcept;

/// Is the socket in such a mode? Some system calls.
bool has_mode_without_lane(int fd) noexcept;

}  // namespace sdp
