// The verbs driver: a device of libibverbs, InfiniBand and RoCE as IB CA, iWARP as RNIC.
//
// What differs from the general contract:
// - The device announces by the channel only, whatever is armed; CompletionChannel::progress() changes the wake words. Cq::arm()
//   costs a system call where the device's doorbell does, unless another Cq has asked since progress() was called last: call it
//   after each edge. disarm() takes an edge of the channel not back.
// - Cqs with one channel share the device's completion queues (verbs_queue.hpp).
// - An IB CA's Qp is moved with the attributes of device.hpp, sgid_index among them for RoCE. An RNIC's Qp is bound to its stream
//   by the kernel's iWARP CM: the CM moves it to init, connects it, and then tells it with the move to rts.
//
// fork: a context is its opener's. A child's posts fail, and would even reach the parent's queues on some devices: use nothing
// there, destroy nothing. credentials: as if in a child, in every thread whose credentials are not the very object that the
// opener's were; setuid() gives each thread a new one, whatever its arguments. To give things back still works.
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "rdma_core/device.hpp"

struct ibv_context;
struct ibv_cq;

namespace rdma::verbs {

/// Names of the devices that libibverbs shows at this moment, in its order. Empty: none, or no permission to look.
std::vector<std::string> device_names();

/// In the child of a fork: unmaps its copies of what devices have mapped, which keep those open as descriptors do. Whoever still
/// looks there sees zeros.
void abandon_mappings_in_child() noexcept;

class VerbsDevice final : public Device {
 public:
  /// Errors: ENODEV no such device, EACCES no permission, ENOTSUP neither IB nor iWARP, else what the device says.
  static Result<std::unique_ptr<VerbsDevice>> open(const std::string& name);
  ~VerbsDevice() override;

  const char* name() const noexcept override { return name_.c_str(); }
  const DeviceAttr& attr() const noexcept override { return attr_; }
  /// `path` is not looked at: one device reaches all its peers.
  Result<std::unique_ptr<Pd>> create_pd(const Path& path) override;
  Result<std::unique_ptr<CompletionChannel>> create_channel() override;
  Result<std::unique_ptr<Cq>> create_cq(std::uint32_t depth, CompletionChannel* channel) override;
  void arm_fence() noexcept override {}  // arm() asked the device itself
  void on_async_event(std::function<void(AsyncEvent)> handler) override { async_handler_ = std::move(handler); }

  // For the connection managers and tests.
  ibv_context* context() const noexcept { return context_; }
  /// Index of `gid` in the first port's table. Errors: ENOENT.
  Result<std::uint8_t> gid_index(const Gid& gid) const;
  /// Non-blocking; readable when progress() has something to do.
  int async_fd() const noexcept;
  /// In the child of a fork: closes the child's copies of the descriptors.
  void abandon_in_child() noexcept;
  /// Hands the asynchronous events that are there to the handler.
  void progress();
  /// It is to go, and waits for those who have it open: it is broken, or lose() was called.
  bool was_lost() const noexcept { return lost_; }
  void lose() noexcept { lost_ = true; }
  /// Likewise, or the kernel has closed the way in.
  bool is_lost() const noexcept;

 private:
  VerbsDevice(ibv_context* context, std::string name);
  Result<Unit> look_around();

  ibv_context* context_;
  std::string name_;
  DeviceAttr attr_;
  int gid_entries_ = 0;
  std::uint32_t max_cqe_ = 0;
  ibv_cq* cover_ = nullptr;  ///< see cover_bad_offset()
  bool lost_ = false;
  std::function<void(AsyncEvent)> async_handler_;
};

}  // namespace rdma::verbs
