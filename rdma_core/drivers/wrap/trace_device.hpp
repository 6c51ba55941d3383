// A Device that shows every request and completion to a sink, on top of any Device. For debugging and for tests that assert what
// was posted.
#pragma once

#include <memory>
#include <span>

#include "rdma_core/device.hpp"
#include "rdma_core/drivers/wrap/forward.hpp"

namespace rdma::wrap {

/// Called after the wrapped call, from the thread that made it: with more than one thread the sink must be safe for that. What is
/// referred to is valid during the call only. A sink on the datapath of a real program should not allocate.
class TraceSink {
 public:
  virtual ~TraceSink() = default;
  virtual void on_post_send(const Qp&, const SendWr&, Post) noexcept {}
  virtual void on_post_recv(const Qp&, std::span<const RecvWr>, Post) noexcept {}
  virtual void on_completion(const Wc&) noexcept {}
  virtual void on_move(const Qp&, QpState from, const QpAttributes&, const Result<Unit>&) noexcept { (void)from; }
  virtual void on_destroy(Qpn) noexcept {}
};

class TraceDevice final : public ForwardDevice {
 public:
  /// Both outlive the wrapper.
  TraceDevice(Device& inner, TraceSink& sink) noexcept : ForwardDevice(inner), sink_(sink) {}

 protected:
  std::unique_ptr<Pd> wrap_pd(std::unique_ptr<Pd> pd) override;
  std::unique_ptr<Cq> wrap_cq(std::unique_ptr<Cq> cq) override;

 private:
  TraceSink& sink_;
};

}  // namespace rdma::wrap
