// The software RDMA device: an RC device between the processes of one host, in shared memory. See shm_layout.hpp.
//
// A Send copies its bytes straight into the receiver's posted buffer; RDMA Read and Write copy through the mapping; every request
// is done when post_send returns. Both flavours run the same memory code; they differ in node type, limits and the legal state
// moves.
//
// A Pd belongs to one link, that is, one peer process; Path::id names it. Paths come from LocalCm, and from self_path().
// RDMA reaches only memory in extents (Pd::map_extent, and register_memory on a part of one); Reads also reach the program's, if
// the options say so and the kernel lets the peer's reader (shm_program_memory.hpp).
//
// What differs from the general contract:
// - Cq::wake_word() exists while exactly one Qp receives into the Cq; else it is nullptr.
// - Creating or destroying a Qp on a Cq must not run beside any other call on that Cq, maybe_ready() and wake_sleepers() included.
// - RecvWr::addr is a multiple of 8.
// - Destroying a Qp, or moving it to error, waits for a message that the peer is just copying into it (nanoseconds; at most
//   50 ms when the peer was stopped in the middle), so that no byte arrives in a buffer that its owner took back.
//
// fork: mappings stay at their addresses in the child, and post_send on an inherited Qp works there. Everything else on inherited
// objects is inert: destroying them frees nothing of the parent's. Call abandon_in_child() first thing in the child.
#pragma once

#include <cstdint>
#include <functional>
#include <memory>

#include "rdma_core/device.hpp"
#include "rdma_core/drivers/shm/shm_links.hpp"

namespace rdma::shm {

struct ShmOptions {
  NodeType flavour = NodeType::ib_ca;                ///< ib_ca or rnic
  std::size_t segment_bytes = std::size_t{1} << 30;  ///< address space per link and direction; only touched pages cost memory
  bool reads_program_memory = false;                 ///< DeviceAttr has it, if the system call exists
};

class ShmDevice final : public Device {
 public:
  static Result<std::unique_ptr<ShmDevice>> create(const ShmOptions& options = {});
  ~ShmDevice() override;

  const char* name() const noexcept override;
  const DeviceAttr& attr() const noexcept override { return attr_; }
  Result<std::unique_ptr<Pd>> create_pd(const Path& path) override;
  Result<std::unique_ptr<CompletionChannel>> create_channel() override;
  Result<std::unique_ptr<Cq>> create_cq(std::uint32_t depth, CompletionChannel* channel) override;
  void arm_fence() noexcept override;
  /// Makes every core that runs a peer pass a barrier.
  void pass_barrier() noexcept;
  void on_async_event(std::function<void(AsyncEvent)> handler) override { async_handler_ = std::move(handler); }

  // For LocalCm, tests and the child of a fork.
  ShmLinks& links() noexcept { return links_; }
  const ProcessId& process_id() const noexcept { return process_id_; }  ///< random; another one in a fork's child
  const OwnBell& bell() const noexcept { return bell_; }
  /// Makes this process one whose running threads arm_fence() of any process reaches. At once while the process has one thread;
  /// later the kernel waits for an RCU grace period, 10 to 20 ms. False: the kernel has no membarrier.
  static bool register_for_fences() noexcept;
  bool has_membarrier() const noexcept { return has_membarrier_; }
  std::size_t segment_bytes() const noexcept { return segment_bytes_; }
  /// The link of this process with itself, made at the first call. Errors: as OwnSegment::create.
  Result<Path> self_path();
  /// In the child of a fork, before anything else is called and while it has one thread: a new identity, a new bell under the old
  /// number, no links. LocalCm::abandon_in_child() calls it.
  void abandon_in_child() noexcept;
  /// Changes in abandon_in_child(): objects remember it to know whether they are inherited.
  std::uint32_t generation() const noexcept { return generation_; }

 private:
  explicit ShmDevice(const ShmOptions& options) noexcept;
  void become_new_process() noexcept;

  DeviceAttr attr_;
  std::size_t segment_bytes_;
  std::uint32_t generation_ = 1;
  bool has_membarrier_ = false;
  ProcessId process_id_;
  OwnBell bell_;
  ShmLinks links_;
  std::mutex self_mutex_;
  std::function<void(AsyncEvent)> async_handler_;
};

}  // namespace rdma::shm
