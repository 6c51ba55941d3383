// Engine: the one object per process that makes lanes: devices, connection managers, the service thread, and what threads that wait
// share. Starts lazily at the first connection that deserves a lane; a process without one has no thread and no helper descriptor.
//
// Threads: any. fork: after_fork_child() forgets the parent's thread and links; the child's own start lazily again.
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <vector>

#include "rdma_core/cm/connection_manager.hpp"
#include "rdma_core/device_registry.hpp"
#include "sdp/options.hpp"
#include "sdp/stream.hpp"

namespace sdp {
class Lane;
class Service;
/// What a fork's child must know of one of the parent's streams, as it was at the fork: the parent may close it before the child
/// runs.
struct StreamSnapshot {
  Stream parents;
  Role role;
  Blocking blocking;
  std::uint8_t phase;
  const Lane* lane;  ///< nullptr: none is up
  bool rx_shut, tx_shut;
  int fd;
  std::int64_t rcv_timeout_ns, snd_timeout_ns;
  std::uint64_t tcp_sent, tcp_received;
};
}  // namespace sdp

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
  // Of devices that serve only who has the credentials of their opener; see rdma_core/builtin_drivers.hpp.
  virtual void ask_before_opening(const std::function<bool()>&) {}
  virtual std::vector<const rdma::Device*> retire_devices() { return {}; }
  virtual void remove_retired(const std::function<bool(const rdma::Device&)>&) {}
  virtual void abandon_in_child() noexcept = 0;  ///< in a fork's child: forgets what is the parent's
};
using Compose = std::unique_ptr<Composition> (*)(const Options&);

/// The settings; read from the environment at the first call.
const Options& options() noexcept;

void configure(Compose compose, LaneListener listener) noexcept;

/// Tracks a TCP connection of the program's. `fd` is connected (or connecting). Cheap: no system call. Empty when policy says TCP
/// or memory is short.
Stream track(int fd, Role role) noexcept;

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

/// How long to spin now, in nanoseconds, adapted to what spinning brought lately; report the outcome. `others_ran`: on this core,
/// meanwhile. What was in vain was then at somebody's cost, and counts twice.
std::int64_t spin_budget() noexcept;
void spin_result(bool found, bool others_ran) noexcept;
/// A turn of Spinner's that takes longer shows that others ran.
std::int64_t long_turn_ns() noexcept;
/// How long one of Spinner's turns takes. A slow machine, an emulated one above all, is slow to put a thread to sleep and to wake
/// it as well: there SDP_SPIN_US stands for as many turns as a fast machine makes in that time, which is up to 20 times as long.
void spin_turn_takes(std::int64_t ns) noexcept;
/// Of the machine, as it was at the first call.
bool has_one_processor() noexcept;

/// What a look at streams without their locks begins with: Grace::Look look(engine::grace()).
Grace& grace() noexcept;

/// True in a vfork child: it has descriptors of its own but shares its parent's memory, where nothing may be changed for its sake.
bool in_vfork_child() noexcept;

/// True if `fd` is one of ours: close, dup2 and close_range must leave it alone.
bool is_helper_fd(int fd) noexcept;

void before_fork() noexcept;
void after_fork_parent() noexcept;
void after_fork_child() noexcept;
/// Round a call that changes credentials. RDMA devices and their connection managers serve only who has the very credentials of
/// their opener (the kernel compares the object, not what is in it): lanes on them go back to TCP before the call, within a second,
/// and the next connection opens the devices anew. Threads that keep others than the rest share no device: a process with several
/// of them then has no such lanes any more. Any thread; in a vfork child, and where nothing is open, it does nothing.
class CredentialsChange {
 public:
  CredentialsChange() noexcept;
  ~CredentialsChange();
  CredentialsChange(const CredentialsChange&) = delete;
  CredentialsChange& operator=(const CredentialsChange&) = delete;

 private:
  Service* service_;
};
/// Round an exec of this process, not of a vfork child, which ends the lanes that do not outlive it: everything that they carry
/// arrives first, within a second. The program goes on by TCP if the exec fails.
class ExecAttempt {
 public:
  ExecAttempt() noexcept;
  ~ExecAttempt();
  ExecAttempt(const ExecAttempt&) = delete;
  ExecAttempt& operator=(const ExecAttempt&) = delete;

 private:
  Service* service_;
};

/// The program has an io_uring that may serve sockets, or is about to make one: no stream gets a lane any more. False: that is
/// known, or does not matter (SDP_IO_URING, a vfork child), for which it makes no system call. Any thread.
bool ring_may_serve_sockets() noexcept;
bool has_ring() noexcept;      ///< that is known
bool rings_matter() noexcept;  ///< it is not, and would be of consequence
/// After that and the take-downs, before the ring serves any: what lanes of RDMA devices carry arrives first, as before an exec.
void finish_lanes_for_ring() noexcept;

/// The process is about to end: says END on every lane, and waits until what send() took needs this process no more, for
/// SDP_EXIT_TIMEOUT at the most. Also in a signal handler, whatever it has interrupted; a call in a call does nothing.
void finish_lanes() noexcept;
/// exit(): that, and the reports, SDP_PCAP and SDP_STATS.
void at_exit() noexcept;
/// An end without exit handlers: the same without SDP_PCAP, also in a signal handler. There is no report of a fork's child that has
/// had no connection, nor on an alternate stack, which may be too small for it.
void at_quick_end() noexcept;

}  // namespace sdp::engine
