// Engine: the one object per process that makes lanes: devices, connection managers, the service thread, and what threads that wait
// share. Starts lazily at the first connection that deserves a lane; a process without one has no thread and no helper descriptor.
//
// Threads: any. fork: after_fork_child() forgets the parent's thread and links; the child's own start lazily again.
#pragma once

#include <cstdint>
#include <memory>

#include "rdma_core/cm/connection_manager.hpp"
#include "rdma_core/device_registry.hpp"
#include "sdp/options.hpp"
#include "sdp/stream.hpp"

namespace sdp::engine {

/// Told, from any thread and with no lock of ours held, when a stream gets a lane, when one of its directions changes carrier, and
/// when the lane is gone: epoll sets put the bell in and change what they ask of the kernel.
using LaneListener = void (*)(Stream stream);

/// Devices and CMs; made by the shim, which alone may name drivers, once, in the service thread.
class Composition {
 public:
  virtual ~Composition() = default;
  virtual rdma::DeviceRegistry& registry() noexcept = 0;
  virtual rdma::cm::ConnectionManager& cm() noexcept = 0;
  virtual void abandon_in_child() noexcept = 0;  ///< in a fork's child: forgets what is the parent's
};
using Compose = std::unique_ptr<Composition> (*)(const Options&);

/// The settings; read from the environment at the first call.
const Options& options() noexcept;

void configure(Compose compose, LaneListener listener) noexcept;

/// Tracks a TCP connection of the program's. `fd` is connected (or connecting). Cheap: no system call beyond reading what must be
/// known. Empty when policy says TCP or memory is short.
Stream track(int fd, Role role) noexcept;

/// What a fork's child must know of one of the parent's streams, as it was at the fork: the parent may close it before the child
/// runs.
struct StreamSnapshot {
  Stream parents;
  Role role;
  bool nonblocking;
  std::uint8_t phase;
  int fd;
  std::int64_t rcv_timeout_ns, snd_timeout_ns;
  std::uint64_t tcp_sent, tcp_received;
};
StreamSnapshot snapshot(Stream) noexcept;
/// In the child: its own stream in the parent's place. Nothing happens to the parent's until the child uses it. Empty: untracked
/// from here on.
Stream inherit(const StreamSnapshot&) noexcept;

/// A descriptor for poll and select that gets readable when armed streams changed: one per calling thread, level-triggered, private
/// to the thread. -1: none could be made (the caller sleeps in short slices).
int thread_bell_fd() noexcept;
/// The process's bell itself, for epoll sets: register with EPOLLIN | EPOLLET.
int bell_fd() noexcept;
void prepare_sleep() noexcept;  ///< before arm(): empties this thread's bell
void arm_fence() noexcept;      ///< after the arm()s. The primary device's only: on others arm() is certain without one
/// Wakes other sleepers of this process (more is ready than one of them will take).
void ring_bell() noexcept;

/// How long to spin now, in nanoseconds, adapted to what spinning brought lately; report the outcome.
std::int64_t spin_budget() noexcept;
void spin_result(bool found) noexcept;

/// What a look at streams without their locks begins with: Grace::Look look(engine::grace()).
Grace& grace() noexcept;

/// True in a vfork child: it has descriptors of its own but shares its parent's memory, where nothing may be changed for its sake.
bool in_vfork_child() noexcept;

/// True if `fd` is one of ours: close, dup2 and close_range must leave it alone.
bool is_helper_fd(int fd) noexcept;

void before_fork() noexcept;
void after_fork_parent() noexcept;
void after_fork_child() noexcept;
/// exec: descriptors in `keep` (those without CLOEXEC) take their lanes down; done by the shim through Stream::take_down.
/// exit: says END on every lane (the peer fetches what send() took and no message carries), writes SDP_STATS.
void at_exit() noexcept;

}  // namespace sdp::engine
