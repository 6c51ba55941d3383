// The driver contract: Device, Pd, Mr, CompletionChannel, Cq, Qp. What a driver must do is in DRIVERS.md, and
// tests/conformance/device_conformance.hpp is its executable form: every driver passes it.
//
// Callers branch on DeviceAttr (limits, node type, capabilities), never on a driver's name. A fault-injecting or tracing
// device is a Device that wraps a Device (drivers/wrap).
//
// Lifetime: a Device outlives its Pds, a Pd its Mrs and Qps, a CompletionChannel its Cqs, a Cq its Qps. Everything is
// destroyed by its unique_ptr; destroying a Qp flushes nothing any more: its posted buffers are the owner's at once.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <optional>
#include <span>

#include "rdma_core/base/result.hpp"
#include "rdma_core/qp_attr.hpp"
#include "rdma_core/types.hpp"
#include "rdma_core/work_request.hpp"

namespace rdma {

/// Limits and capabilities. Constant for the life of the device.
struct DeviceAttr {
  NodeType node_type = NodeType::ib_ca;
  LinkLayer link_layer = LinkLayer::memory;
  std::uint32_t max_send_wr = 0;   ///< deepest send queue, in requests
  std::uint32_t max_recv_wr = 0;   ///< deepest receive queue, in requests; a power of two
  std::uint32_t max_inline = 0;    ///< bytes; on the software device as large as any receive buffer
  std::uint32_t max_sge = 1;       ///< of a Send
  std::uint32_t max_sge_read = 1;  ///< of an RDMA Read: 1 on RNICs
  std::uint32_t max_read_outstanding = 1;
  std::uint32_t recv_prefix_bytes = 0;  ///< bytes in front of RecvWr::addr that belong to the device while posted
  bool recv_needs_extent = false;       ///< receive buffers and RDMA targets must lie in memory from Pd::map_extent
  bool rnr_retry = false;               ///< a Send without a posted receive waits instead of failing
  bool acknowledges = true;             ///< success says that the peer has it, and its refusals complete with its error. An RNIC's
                                        ///< success only says that the stream took it; a refusal ends the QP
  bool rdma_write_wakes = false;        ///< kSolicited on an RDMA Write wakes a peer that armed its receive CQ
  bool remembers_sent_data = false;     ///< bytes in flight survive the sender's death (they lie in the receiver's memory)
  bool posts_arrive_at_once = false;    ///< Sends and RDMA Writes are in the peer's memory when post_send returns: nothing that
                                        ///< leaves later by another way overtakes them
  bool mixes_messages = false;          ///< a message may end with another's packets, by a fault; see DRIVERS.md, "Known faults"
  bool maps_peer_memory = false;        ///< Qp::remote_view() works; RDMA Writes are seen in the order in which they were posted
  bool reads_program_memory = false;  ///< for a device whose other regions lie in extents: RDMA Reads also reach memory that is the
                                      ///< peer program's, and not pinned. A region for remote reads alone may lie there; see
                                      ///< Pd::register_memory, Qp::withdraw and Wc::byte_len
};

// clang-format 14 takes an enum with an attribute for a function.
// clang-format off
enum class [[nodiscard]] Post : std::uint8_t {
  ok,
  queue_full,  ///< back-pressure, not an error: reap the CQ, then repost
  qp_error,    ///< QP left RTS; everything posted completes flushed
};
// clang-format on

/// A registered memory region. `remote_base` is what the peer's RDMA requests name as address of the first byte.
class Mr {
 public:
  virtual ~Mr() = default;
  std::byte* addr = nullptr;
  std::size_t length = 0;  ///< bytes
  Lkey lkey{};
  Rkey rkey{};
  std::uint64_t remote_base = 0;
};

/// How an armed Cq announces its next completion; a bit set, because two kinds of sleeper may wait for one Cq.
enum Wake : std::uint8_t {
  kWakeWord = 1,     ///< changes Cq::wake_word() and wakes its futex sleepers (a thread in a blocking call)
  kWakeChannel = 2,  ///< makes CompletionChannel::fd() report an edge (poll, select, epoll)
};

/// Where armed Cqs announce. One per process and device is enough.
class CompletionChannel {
 public:
  virtual ~CompletionChannel() = default;
  /// Non-blocking, CLOEXEC, high-numbered. Becomes readable with a new edge for each announcement; register it with
  /// EPOLLET and never read it. Owned by the channel.
  virtual int fd() const noexcept = 0;
  /// Announces from inside the process (another thread changed something that a sleeper waits for). Any thread.
  virtual void ring() noexcept = 0;
  /// Takes what the device has announced and passes it on: changes the wake words of the Cqs concerned and wakes their sleepers.
  /// Whoever watches fd() calls it when there was an edge, always in one thread, which is also the one that destroys the Cqs; fd()
  /// may not be readable afterwards. The software device's peers change the words themselves: nothing to do there. False: none of
  /// the Cqs was armed for kWakeChannel, so that nobody but the caller has to know of the edge.
  virtual bool progress() noexcept { return true; }
  /// In the child of a fork: closes its copies of the descriptors. Nothing else may be called then.
  virtual void abandon_in_child() noexcept {}
};

/// A completion queue. Threading: externally serialised, except maybe_ready(), wake_word() and wake_sleepers(), which any thread
/// may call.
class Cq {
 public:
  virtual ~Cq() = default;
  /// Up to out.size() completions, oldest first per QP, but that an RDMA Read may come behind requests posted after it. No
  /// allocation, no lock, no system call.
  virtual unsigned poll(std::span<Wc> out) noexcept = 0;
  /// False: nothing was there at the time of the call. True: poll() is worth its price. A few loads; for spinning.
  virtual bool maybe_ready() const noexcept = 0;
  /// Asks for one announcement of the next completion, by each kind in `wake` (added to kinds already armed). Stores only. It is
  /// certain only after Device::arm_fence(): arm, fence, look once more (maybe_ready), then sleep.
  virtual void arm(std::uint8_t wake) noexcept = 0;
  virtual void disarm() noexcept = 0;
  /// The futex word (process-shared) that kWakeWord changes, on some devices not before CompletionChannel::progress(). nullptr:
  /// this device has none, sleep on the channel.
  virtual std::atomic<std::uint32_t>* wake_word() noexcept = 0;
  /// Changes the word and wakes its sleepers from inside the process.
  virtual void wake_sleepers() noexcept = 0;
};

struct QpInit {
  Cq* send_cq = nullptr;
  Cq* recv_cq = nullptr;
  std::uint32_t send_depth = 64;  ///< requests
  std::uint32_t recv_depth = 64;  ///< requests; rounded up to a power of two
  std::uint32_t max_inline = 0;   ///< bytes wanted; see Qp::max_inline()
};

/// A queue pair of type RC. Threading: externally serialised; two threads never touch one Qp at a time.
class Qp {
 public:
  virtual ~Qp() = default;
  virtual Qpn qpn() const noexcept = 0;
  virtual std::uint32_t max_inline() const noexcept = 0;
  virtual QpState state() const noexcept = 0;
  // Datapath, per message: no allocation, no lock, no system call beyond the driver's doorbell, no throw.
  virtual Post post_send(const SendWr&) noexcept = 0;
  virtual Post post_recv(std::span<const RecvWr>) noexcept = 0;
  /// The bytes of the `number`th Send of this QP (counted from 0), as they lie at the peer; only if
  /// DeviceAttr::remembers_sent_data, and only until the peer posts that buffer again, which the caller must know from the
  /// protocol. Peer-writable: untrusted. Empty: not there.
  virtual std::span<const std::byte> sent_message(std::uint64_t number) const noexcept {
    (void)number;
    return {};
  }
  /// The peer's registered memory as this process maps it, for loads in place of an RDMA Read; only if
  /// DeviceAttr::maps_peer_memory. It stays readable while the Qp lives; what it holds is the peer's to change: untrusted.
  /// nullptr: the key does not allow remote reads there.
  virtual const std::byte* remote_view(std::uint64_t remote_addr, std::size_t bytes, Rkey rkey) noexcept {
    (void)remote_addr, (void)bytes, (void)rkey;
    return nullptr;
  }
  /// A word of the peer's registered memory, for store_word(); likewise only if DeviceAttr::maps_peer_memory, and while the Qp
  /// is in RTS. The peer leaves that memory registered until it knows that nothing is stored any more. nullptr: the key does not
  /// allow remote writes there, or the address is no multiple of 8.
  virtual std::atomic<std::uint64_t>* remote_word(std::uint64_t remote_addr, Rkey rkey) noexcept {
    (void)remote_addr, (void)rkey;
    return nullptr;
  }
  /// Does what an RDMA Write of that one word would, at once and without a request: nothing completes. `wake`: as kSolicited.
  virtual Post store_word(std::atomic<std::uint64_t>& word, std::uint64_t value, bool wake) noexcept {
    (void)word, (void)value, (void)wake;
    return Post::qp_error;
  }
  /// Ends the peer's Reads of a region of the program's memory of ours (DeviceAttr::reads_program_memory) without asking the peer:
  /// a Read that has not completed by then brings nothing. Returns how many bytes Reads of it have brought in all; the peer can
  /// make it any number. Also in a fork's child. nullopt: the device cannot do that, or it has been done already.
  virtual std::optional<std::uint32_t> withdraw(Rkey rkey) noexcept {
    (void)rkey;
    return std::nullopt;
  }
  // Control path: may block and allocate. Legal moves and required attributes: the tables in qp_attr.hpp.
  virtual Result<Unit> modify(const QpAttributes&) = 0;
};

/// A protection domain: memory and QPs that may reach each other. On the software device it is one peer process: what lies in
/// its extents is mapped by that peer and by nobody else, so never put the bytes of two peers into one Pd.
class Pd {
 public:
  virtual ~Pd() = default;
  /// Registers memory of the caller's. The memory must outlive the Mr. Errors: ENOMEM, EPERM (memlock limit), EINVAL. Of the
  /// program's memory, for remote reads alone, where DeviceAttr::reads_program_memory: with the reason if this peer cannot read
  /// there (EPERM, EACCES, ENOSYS, ESRCH…; EAGAIN: it has not tried).
  virtual Result<std::unique_ptr<Mr>> register_memory(std::span<std::byte> memory, Access access) = 0;
  /// New zeroed memory that the device can reach best, a multiple of the page size, already registered for all kinds of access.
  /// Unmapped with the Mr. Errors: ENOMEM, ENOSPC.
  virtual Result<std::unique_ptr<Mr>> map_extent(std::size_t bytes) = 0;
  virtual Result<std::unique_ptr<Qp>> create_qp(const QpInit& init) = 0;
};

/// A way to one peer, as the CM found it: opaque to everybody but the driver and its CM. Compare, keep, hand to create_pd().
struct Path {
  std::uint64_t id = 0;
  friend bool operator==(const Path&, const Path&) = default;
};

enum class AsyncEvent : std::uint8_t { port_active, port_error, gid_change, device_fatal };

class Device {
 public:
  virtual ~Device() = default;
  virtual const char* name() const noexcept = 0;
  virtual const DeviceAttr& attr() const noexcept = 0;
  virtual Result<std::unique_ptr<Pd>> create_pd(const Path& path) = 0;
  virtual Result<std::unique_ptr<CompletionChannel>> create_channel() = 0;
  /// `depth` completions at the most; `channel` may be null when the Cq is never armed for kWakeChannel.
  virtual Result<std::unique_ptr<Cq>> create_cq(std::uint32_t depth, CompletionChannel* channel) = 0;
  /// Makes every arm() before it visible to every peer: a completion posted after it announces. May cost a system call;
  /// called only before going to sleep. Any thread. Only the first device of a process may need it: the others' arm() is certain.
  virtual void arm_fence() noexcept = 0;
  /// Called with each asynchronous event, from the thread that runs the driver's progress. Set once, before use.
  virtual void on_async_event(std::function<void(AsyncEvent)> handler) = 0;
};

}  // namespace rdma
