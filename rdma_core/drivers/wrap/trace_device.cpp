#include "rdma_core/drivers/wrap/trace_device.hpp"

namespace rdma::wrap {
namespace {

class TraceCq final : public ForwardCq {
 public:
  TraceCq(std::unique_ptr<Cq> inner, TraceSink& sink) noexcept : ForwardCq(std::move(inner)), sink_(sink) {}
  unsigned poll(std::span<Wc> out) noexcept override {
    const unsigned n = ForwardCq::poll(out);
    for (const Wc& wc : out.first(n)) sink_.on_completion(wc);
    return n;
  }

 private:
  TraceSink& sink_;
};

class TraceQp final : public ForwardQp {
 public:
  TraceQp(std::unique_ptr<Qp> inner, TraceSink& sink) noexcept : ForwardQp(std::move(inner)), sink_(sink) {}
  ~TraceQp() override { sink_.on_destroy(qpn()); }
  Post post_send(const SendWr& wr) noexcept override {
    const Post post = ForwardQp::post_send(wr);
    sink_.on_post_send(*this, wr, post);
    return post;
  }
  Post post_recv(std::span<const RecvWr> wrs) noexcept override {
    const Post post = ForwardQp::post_recv(wrs);
    sink_.on_post_recv(*this, wrs, post);
    return post;
  }
  Result<Unit> modify(const QpAttributes& attr) override {
    const QpState from = state();
    const Result<Unit> result = ForwardQp::modify(attr);
    sink_.on_move(*this, from, attr, result);
    return result;
  }

 private:
  TraceSink& sink_;
};

class TracePd final : public ForwardPd {
 public:
  TracePd(std::unique_ptr<Pd> inner, TraceSink& sink) noexcept : ForwardPd(std::move(inner)), sink_(sink) {}

 protected:
  std::unique_ptr<Qp> wrap_qp(std::unique_ptr<Qp> qp, const QpInit&) override {
    return std::make_unique<TraceQp>(std::move(qp), sink_);
  }

 private:
  TraceSink& sink_;
};

}  // namespace

std::unique_ptr<Pd> TraceDevice::wrap_pd(std::unique_ptr<Pd> pd) { return std::make_unique<TracePd>(std::move(pd), sink_); }
std::unique_ptr<Cq> TraceDevice::wrap_cq(std::unique_ptr<Cq> cq) { return std::make_unique<TraceCq>(std::move(cq), sink_); }

}  // namespace rdma::wrap
