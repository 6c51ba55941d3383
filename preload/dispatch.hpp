// One door from libc's names to ours: picks the owner of a descriptor, turns -errno into errno, leaves errno alone on success.
#pragma once

#include <pthread.h>

#include <cerrno>

#include "preload/fd_table.hpp"
#include "preload/libc.hpp"
#include "rdma_core/base/program_call.hpp"

namespace preload {

template <class Ret>
Ret to_libc(std::int64_t result) noexcept {
  if (result < 0) {
    errno = static_cast<int>(-result);
    return static_cast<Ret>(-1);
  }
  return static_cast<Ret>(result);
}

/// A call of ours, at whose end handlers run before libc's errno is set: `what()` gives -errno or a result.
template <class What>
std::int64_t in_call(What&& what) {
  const rdma::sys::ProgramCall here;
  return what();
}

template <class Ours, class Theirs>
auto dispatch(int fd, Ours&& ours, Theirs&& theirs) -> decltype(theirs(libc())) {
  const sdp::Stream stream = fds().find(fd);
  if (!stream) [[likely]]
    return theirs(libc());
  return to_libc<decltype(theirs(libc()))>(in_call([&] { return ours(stream); }));
}

/// As in_call(), where POSIX makes the call a cancellation point.
template <class What>
std::int64_t cancellable(What&& what) {
  pthread_testcancel();
  const std::int64_t result = in_call(what);
  if (result == -EINTR) pthread_testcancel();
  return result;
}

/// The same for what POSIX makes a cancellation point. libc's own functions are; a wait of ours ends with EINTR when the signal
/// comes that pthread_cancel sends. No frame between here and the program may be noexcept: a cancelled thread unwinds through it.
template <class Ours, class Theirs>
auto dispatch_cancellable(int fd, Ours&& ours, Theirs&& theirs) -> decltype(theirs(libc())) {
  const sdp::Stream stream = fds().find(fd);
  if (!stream) [[likely]]
    return theirs(libc());
  return to_libc<decltype(theirs(libc()))>(cancellable([&] { return ours(stream); }));
}

/// The kernel has just made `fd`: what we knew of that number was closed behind our back.
void remember_new(int fd, Kind kind) noexcept;

/// The call moves bytes in a way that no lane carries: the stream goes back to TCP first.
inline void leave_lane(int fd, sdp::LaneReason reason) noexcept {
  const sdp::Stream stream = fds().find(fd);
  if (!stream) return;
  const rdma::sys::ProgramCall here;
  stream.take_down(reason);
}

/// The same for a call that sends. False: it must not yet, with errno; on a blocking descriptor it has waited.
inline bool leave_lane_to_send(int fd, bool nowait = false) {
  const sdp::Stream stream = fds().find(fd);
  if (!stream) return true;
  return to_libc<int>(cancellable([&]() -> std::int64_t { return stream.await_tcp(fd, sdp::LaneReason::mode, nowait); })) == 0;
}

/// The same for calls that let libc send later, and neither wait nor end early by themselves: on a descriptor that does not block
/// it waits no longer than SDP_EXIT_TIMEOUT, then errno is EAGAIN. No cancellation point.
bool leave_lane_to_libc(int fd, sdp::LaneReason why = sdp::LaneReason::mode) noexcept;

}  // namespace preload

/// Marks what the library exports; everything else is hidden. The list is exports.map.
#define SDP_EXPORT extern "C" __attribute__((visibility("default")))
