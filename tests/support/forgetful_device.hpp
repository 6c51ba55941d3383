// A Device round the software device that has its speed and order, but of which its users see no more than of a real RDMA device:
// it forgets what was sent, maps nobody's memory and promises no order with what other ways carry. Unlike LateDevice it holds
// nothing back, so that several threads may use its Qps as they use others.
//
// It says that RDMA reaches any registered memory. It does so only within extents: give it no other.
#pragma once

#include "rdma_core/drivers/wrap/forward.hpp"

namespace rdma::test {

class ForgetfulQp final : public wrap::ForwardQp {
 public:
  using ForwardQp::ForwardQp;
  std::span<const std::byte> sent_message(std::uint64_t) const noexcept override { return {}; }
  const std::byte* remote_view(std::uint64_t, std::size_t, Rkey) noexcept override { return nullptr; }
  std::atomic<std::uint64_t>* remote_word(std::uint64_t, Rkey) noexcept override { return nullptr; }
};

class ForgetfulPd final : public wrap::ForwardPd {
 public:
  using ForwardPd::ForwardPd;

 protected:
  std::unique_ptr<Qp> wrap_qp(std::unique_ptr<Qp> qp, const QpInit&) override {
    return std::make_unique<ForgetfulQp>(std::move(qp));
  }
};

class ForgetfulDevice final : public wrap::ForwardDevice {
 public:
  explicit ForgetfulDevice(Device& inner) : ForwardDevice(inner), attr_(inner.attr()) {
    attr_.posts_arrive_at_once = attr_.remembers_sent_data = attr_.maps_peer_memory = attr_.recv_needs_extent = false;
  }
  const DeviceAttr& attr() const noexcept override { return attr_; }

 protected:
  std::unique_ptr<Pd> wrap_pd(std::unique_ptr<Pd> pd) override { return std::make_unique<ForgetfulPd>(std::move(pd)); }
  std::unique_ptr<Cq> wrap_cq(std::unique_ptr<Cq> cq) override { return std::make_unique<wrap::ForwardCq>(std::move(cq)); }

 private:
  DeviceAttr attr_;
};

}  // namespace rdma::test
