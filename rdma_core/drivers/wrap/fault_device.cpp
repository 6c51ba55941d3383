#include "rdma_core/drivers/wrap/fault_device.hpp"

#include <algorithm>
#include <vector>

namespace rdma::wrap {
namespace {

class FaultQp;

class FaultCq final : public ForwardCq {
 public:
  FaultCq(std::unique_ptr<Cq> inner, Injector& injector) : ForwardCq(std::move(inner)), injector_(injector) {}
  unsigned poll(std::span<Wc> out) noexcept override;
  void attach(FaultQp& qp) { senders_.push_back(&qp); }
  void detach(FaultQp& qp) noexcept { std::erase(senders_, &qp); }

 private:
  Injector& injector_;
  std::vector<FaultQp*> senders_;  ///< Qps whose sends complete here
};

class FaultQp final : public ForwardQp {
 public:
  FaultQp(std::unique_ptr<Qp> inner, Injector& injector, FaultCq& send_cq)
      : ForwardQp(std::move(inner)), injector_(injector), send_cq_(send_cq) {
    send_cq_.attach(*this);
  }
  ~FaultQp() override { send_cq_.detach(*this); }

  Post post_send(const SendWr& wr) noexcept override {
    switch (injector_.on_post_send(*this, wr)) {
      case Fault::none:
        break;
      case Fault::queue_full:
        if (unpolled_ > 0) return Post::queue_full;
        break;
      case Fault::qp_error:
        return break_now();
    }
    const Post post = ForwardQp::post_send(wr);
    if (post == Post::ok && (wr.flags & kSignalled) != 0) ++unpolled_;
    return post;
  }
  Post post_recv(std::span<const RecvWr> wrs) noexcept override {
    switch (injector_.on_post_recv(*this, wrs)) {
      case Fault::none:
        break;
      case Fault::queue_full:
        return Post::queue_full;
      case Fault::qp_error:
        return break_now();
    }
    return ForwardQp::post_recv(wrs);
  }
  void polled() noexcept {
    if (unpolled_ > 0) --unpolled_;  // an unsignalled request that failed completes too
  }

 private:
  Post break_now() noexcept {
    QpAttributes attr;
    attr.state = QpState::error;
    (void)modify(attr);  // legal from every state
    return Post::qp_error;
  }

  Injector& injector_;
  FaultCq& send_cq_;
  std::uint64_t unpolled_ = 0;  ///< signalled requests
};

unsigned FaultCq::poll(std::span<Wc> out) noexcept {
  if (injector_.on_poll(*this)) return 0;
  const unsigned n = ForwardCq::poll(out);
  for (const Wc& wc : out.first(n)) {
    if (wc.opcode == WcOpcode::recv) continue;
    for (FaultQp* qp : senders_)
      if (qp->qpn() == wc.qpn) qp->polled();
  }
  return n;
}

class FaultPd final : public ForwardPd {
 public:
  FaultPd(std::unique_ptr<Pd> inner, Injector& injector) : ForwardPd(std::move(inner)), injector_(injector) {}

 protected:
  std::unique_ptr<Qp> wrap_qp(std::unique_ptr<Qp> qp, const QpInit& init) override {
    return std::make_unique<FaultQp>(std::move(qp), injector_, *static_cast<FaultCq*>(init.send_cq));
  }

 private:
  Injector& injector_;
};

}  // namespace

std::unique_ptr<Pd> FaultDevice::wrap_pd(std::unique_ptr<Pd> pd) { return std::make_unique<FaultPd>(std::move(pd), injector_); }
std::unique_ptr<Cq> FaultDevice::wrap_cq(std::unique_ptr<Cq> cq) { return std::make_unique<FaultCq>(std::move(cq), injector_); }

}  // namespace rdma::wrap
