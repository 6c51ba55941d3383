// A Device whose posts leave later than post_send returns, on top of one whose posts arrive at once: what a wire does to order. Its
// requests wait in order, per Qp, until release() lets them go; nothing else waits for them, so that bytes, ends and deaths that
// travel another way come first. It forgets what was sent and maps nobody's memory, as real RDMA devices do.
//
// For tests. post_send allocates and locks. release() is like another user of each Qp: keep the others off them.
#pragma once

#include <cstddef>
#include <memory>
#include <mutex>
#include <vector>

#include "rdma_core/device.hpp"
#include "rdma_core/drivers/wrap/forward.hpp"

namespace rdma::wrap {

class LateQp;

class LateDevice final : public ForwardDevice {
 public:
  /// `max_inline`: bytes; 0: as the wrapped device, which outlives the wrapper.
  explicit LateDevice(Device& inner, std::uint32_t max_inline = 0);
  ~LateDevice() override;
  const DeviceAttr& attr() const noexcept override { return attr_; }

  std::size_t held() const noexcept;  ///< requests
  /// Lets the `most` oldest requests of each Qp go, as far as its queues have room.
  void release(std::size_t most = ~std::size_t{0});
  /// Of two Sends in a row that wait and are as long as each other the second becomes its own first `packet` bytes and the rest of
  /// the other: what a device makes that puts packets into the wrong message. False: no two such.
  bool mix(std::size_t packet);
  /// The process ends: what waits, and what it posts from here on, never leaves. Qps made later work again.
  void die() noexcept;

 protected:
  std::unique_ptr<Pd> wrap_pd(std::unique_ptr<Pd> pd) override;
  std::unique_ptr<Cq> wrap_cq(std::unique_ptr<Cq> cq) override;

 private:
  friend class LateQp;
  DeviceAttr attr_;
  mutable std::mutex mutex_;  ///< guards what waits
  std::vector<LateQp*> qps_;
};

}  // namespace rdma::wrap
