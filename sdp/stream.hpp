// Stream: one TCP connection of the program, as its two carriers: the anchor (the kernel's connection, always there) and, while one
// is up, a lane (an SDP connection on an RDMA device). The shim calls it in place of the kernel for every descriptor that it
// tracks.
//
// Results are what the system call would return: >= 0, or -errno. errno itself is never touched.
// Lifetime: Streams live in a slab that is never given back and are reused; a StreamRef therefore carries a generation, and a call
// through a stale one gives -EBADF. No call needs a reference count. Threads: any number may call; each call takes the stream's
// lock for its short parts and never sleeps with it held. fork: the slab is shared memory at one address, so that a child sees what
// became of a stream. A child that uses an inherited stream takes its lane down first (the bytes go on by TCP); one that only
// closes it changes nothing.
#pragma once

#include <sys/socket.h>
#include <sys/uio.h>

#include <cstddef>
#include <cstdint>

#include "sdp/grace.hpp"
#include "sdp/stats.hpp"

namespace sdp {

enum class Role : std::uint8_t { unknown, connector, acceptor };
/// Do calls on the program's descriptor block?
enum class Blocking : std::uint8_t { unknown, yes, no };

class StreamImpl;       // stream_impl.hpp
struct StreamSnapshot;  // engine.hpp

class Stream {
 public:
  constexpr Stream() noexcept = default;
  /// As one word, for the shim's descriptor table. 0: none.
  static Stream from_word(std::uint64_t word) noexcept { return Stream(word); }
  std::uint64_t word() const noexcept { return word_; }
  explicit operator bool() const noexcept { return word_ != 0; }

  // --- transfer. Cancellation points, so not noexcept. `flags` are MSG_*; the socket's own O_NONBLOCK and time-outs apply. `msg`
  // as for sendmsg/recvmsg.
  std::int64_t send(int fd, const void* buf, std::size_t len, int flags) const;
  std::int64_t recv(int fd, void* buf, std::size_t len, int flags) const;
  std::int64_t sendmsg(int fd, const msghdr* msg, int flags) const;
  std::int64_t recvmsg(int fd, msghdr* msg, int flags) const;
  std::int64_t sendmmsg(int fd, mmsghdr* msgs, unsigned count, int flags) const;
  /// An error that waits behind what the first messages get is the next call's, as with recv() behind bytes.
  std::int64_t recvmmsg(int fd, mmsghdr* msgs, unsigned count, int flags, timespec* timeout) const;
  std::int64_t sendfile(int fd, int in_fd, std::int64_t* offset, std::size_t count) const;

  // --- ends
  int shutdown(int fd, int how) const noexcept;  ///< includes the kernel's shutdown on the anchor
  /// Before the kernel's close of the last descriptor of this process. The stream is gone afterwards; the caller then closes fd
  /// itself.
  void close(int fd) const noexcept;

  // --- what the shim saw the program set
  void set_nonblocking(bool on) const noexcept;
  StreamSnapshot snapshot() const noexcept;  ///< before a fork
  bool has_heirs() const noexcept;           ///< a fork's child may go on with the connection when this process closes it
  void leave_heirs() const noexcept;         ///< as a fork's child ends: the parent's close() is the end of the connection
  void renumber(int fd) const noexcept;      ///< the connection goes by this descriptor now: the one that we knew is being closed
  void set_timeout(bool receives, std::int64_t ns) const noexcept;  ///< as socket_modes.hpp's timeout_ns()
  void set_linger(int fd) const noexcept;                           ///< the kernel has taken another SO_LINGER
  /// What the kernel said of SO_LINGER, where `len` bytes of it are the program's: its own in the place of ours.
  void show_linger(void* value, socklen_t len) const noexcept;
  int inq(int fd) const noexcept;      ///< FIONREAD
  int outq(int fd) const noexcept;     ///< SIOCOUTQ
  int at_mark(int fd) const noexcept;  ///< SIOCATMARK
  /// The lane goes, the stream stays on TCP for good: a mode that no lane can have, a call that we do not carry, a second process,
  /// an exec. Waits for nobody. Cheap when there is no lane.
  void take_down(LaneReason reason) const noexcept;
  /// take_down(), and waits until a call that sends past us would not overtake what send() took. 0: TCP alone carries what comes;
  /// -EAGAIN: not yet, and the call may not wait; -EINTR, -EPIPE.
  int await_tcp(int fd, LaneReason reason, bool nowait) const;

  /// Before another program uses the connection: as take_down(). In a vfork child the lane is its parent's to end.
  void leave_to_program() const noexcept;
  /// Before this process becomes another program, after engine::before_exec(): no connection rather than one with a gap.
  void reset_if_bytes_stay(int fd) const noexcept;
  bool stays_on_tcp() const noexcept;       ///< for good, and there is nothing left to do that the kernel does not
  bool is_named_by(int fd) const noexcept;  ///< of a stream that has a lane: does `fd` still name its connection?

  // --- waiting for several descriptors (poll, select, epoll); see the protocol below
  bool has_lane() const noexcept;  ///< a lane may carry bytes now or soon: the call must take part in the protocol below
  /// POLLIN|POLLOUT|POLLPRI|POLLRDHUP… by the lane; POLL bits as EPOLL bits. `anchor_too`: is set if the kernel knows more of the
  /// stream than whether it is there: an end is near, or a direction is not on the lane.
  std::uint32_t poll(std::uint32_t events, bool* anchor_too = nullptr) const noexcept;
  /// Which of `events` the kernel must still watch on the anchor; the rest is the lane's. POLLERR and POLLHUP are always the
  /// kernel's.
  std::uint32_t kernel_events(std::uint32_t events) const noexcept;
  /// Cheap peek for spinning: false = nothing since the last poll() that would change its answer for `events`, but for what
  /// rx_edges() tells.
  bool maybe_ready(const Grace::Look&, std::uint32_t events) const noexcept;
  void arm(const Grace::Look&) const noexcept;                ///< the next change rings the process's bell
  std::uint64_t rx_edges(const Grace::Look&) const noexcept;  ///< grows with each arrival: a new value is a new EPOLLIN edge
  std::uint64_t tx_edges() const noexcept;                    ///< grows each time the stream became writable again after it was not
  /// A wait in the kernel that does not have the bell in its set begins and ends (counted, so that no switch strands it).
  void enter_plain_wait() const noexcept;
  void leave_plain_wait() const noexcept;
  /// The sleep of a wait for nothing but bytes of this stream: as a receive sleeps, woken by what concerns this stream alone. For
  /// `timeout_ns` at the most, an hour if negative. 0: look again; -EINTR, whatever the handler's SA_RESTART; -EAGAIN: the time is
  /// over; -ENOTSUP: the bell is needed.
  int sleep_for_bytes(std::int64_t timeout_ns) const;
  /// An entry of the program into a wait: the moment at which a reader may be switched over (architecture: READY).
  void on_wait_entry(int fd) const noexcept;

 private:
  friend class StreamImpl;
  explicit constexpr Stream(std::uint64_t word) noexcept : word_(word) {}
  std::int64_t recv_nothing(int fd, int flags) const;
  StreamImpl* impl() const noexcept { return reinterpret_cast<StreamImpl*>(word_ & 0xffffffffffffULL); }
  std::uint16_t generation() const noexcept { return static_cast<std::uint16_t>(word_ >> 48); }
  std::uint64_t word_ = 0;
};

// The protocol of a wait over several descriptors (poll, select, epoll_wait), kept by the caller:
//   1. on_wait_entry() for each stream with has_lane(); poll() each; anything ready: also ask the kernel (time-out 0) now and then,
//   return.
//   2. spin for engine::spin_budget(): maybe_ready() of each, then poll() where true; the kernel every few microseconds.
//   3. engine::prepare_sleep(); arm() each; engine::arm_fence(); poll() each once more.
//   4. sleep in the kernel on kernel_events() of each and engine::bell_fd(); then back to 1.
// Who waits for bytes of one stream alone may sleep_for_bytes() in the place of 3 and 4: a bell is heard by all that wait for one.
}  // namespace sdp
