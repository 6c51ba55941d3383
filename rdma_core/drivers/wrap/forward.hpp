// A Device that wraps a Device and forwards every call: the base of the wrappers in this folder. A wrapper overrides what it
// changes.
//
// Objects made through the wrapper are used with each other only: its Qps are created on its Cqs, its Cqs on its channels. Memory
// regions and channels are the wrapped device's own. The wrapped Device outlives the wrapper.
#pragma once

#include <memory>

#include "rdma_core/device.hpp"

namespace rdma::wrap {

class ForwardCq : public Cq {
 public:
  explicit ForwardCq(std::unique_ptr<Cq> inner) noexcept : inner_(std::move(inner)) {}
  unsigned poll(std::span<Wc> out) noexcept override { return inner_->poll(out); }
  bool maybe_ready() const noexcept override { return inner_->maybe_ready(); }
  void arm(std::uint8_t wake) noexcept override { inner_->arm(wake); }
  void disarm() noexcept override { inner_->disarm(); }
  std::atomic<std::uint32_t>* wake_word() noexcept override { return inner_->wake_word(); }
  void wake_sleepers() noexcept override { inner_->wake_sleepers(); }
  Cq& inner() noexcept { return *inner_; }

 private:
  std::unique_ptr<Cq> inner_;
};

class ForwardQp : public Qp {
 public:
  explicit ForwardQp(std::unique_ptr<Qp> inner) noexcept : inner_(std::move(inner)) {}
  Qpn qpn() const noexcept override { return inner_->qpn(); }
  std::uint32_t max_inline() const noexcept override { return inner_->max_inline(); }
  QpState state() const noexcept override { return inner_->state(); }
  Post post_send(const SendWr& wr) noexcept override { return inner_->post_send(wr); }
  Post post_recv(std::span<const RecvWr> wrs) noexcept override { return inner_->post_recv(wrs); }
  std::span<const std::byte> sent_message(std::uint64_t number) const noexcept override { return inner_->sent_message(number); }
  const std::byte* remote_view(std::uint64_t remote_addr, std::size_t bytes, Rkey rkey) noexcept override {
    return inner_->remote_view(remote_addr, bytes, rkey);
  }
  std::atomic<std::uint64_t>* remote_word(std::uint64_t remote_addr, Rkey rkey) noexcept override {
    return inner_->remote_word(remote_addr, rkey);
  }
  Post store_word(std::atomic<std::uint64_t>& word, std::uint64_t value, bool wake) noexcept override {
    return inner_->store_word(word, value, wake);
  }
  std::optional<std::uint32_t> withdraw(Rkey rkey) noexcept override { return inner_->withdraw(rkey); }
  Result<Unit> modify(const QpAttributes& attr) override { return inner_->modify(attr); }
  Qp& inner() noexcept { return *inner_; }

 private:
  std::unique_ptr<Qp> inner_;
};

class ForwardPd : public Pd {
 public:
  explicit ForwardPd(std::unique_ptr<Pd> inner) noexcept : inner_(std::move(inner)) {}
  Result<std::unique_ptr<Mr>> register_memory(std::span<std::byte> memory, Access access) override {
    return inner_->register_memory(memory, access);
  }
  Result<std::unique_ptr<Mr>> map_extent(std::size_t bytes) override { return inner_->map_extent(bytes); }
  Result<std::unique_ptr<Qp>> create_qp(const QpInit& init) override {
    QpInit unwrapped = init;
    if (init.send_cq != nullptr) unwrapped.send_cq = &static_cast<ForwardCq*>(init.send_cq)->inner();
    if (init.recv_cq != nullptr) unwrapped.recv_cq = &static_cast<ForwardCq*>(init.recv_cq)->inner();
    auto qp = inner_->create_qp(unwrapped);
    if (!qp) return qp;
    return wrap_qp(std::move(*qp), init);
  }

 protected:
  /// `init` names the wrapper's own Cqs.
  virtual std::unique_ptr<Qp> wrap_qp(std::unique_ptr<Qp> qp, const QpInit& init) = 0;

 private:
  std::unique_ptr<Pd> inner_;
};

class ForwardDevice : public Device {
 public:
  explicit ForwardDevice(Device& inner) noexcept : inner_(inner) {}
  const char* name() const noexcept override { return inner_.name(); }
  const DeviceAttr& attr() const noexcept override { return inner_.attr(); }
  Result<std::unique_ptr<Pd>> create_pd(const Path& path) override {
    auto pd = inner_.create_pd(path);
    if (!pd) return pd;
    return wrap_pd(std::move(*pd));
  }
  Result<std::unique_ptr<CompletionChannel>> create_channel() override { return inner_.create_channel(); }
  Result<std::unique_ptr<Cq>> create_cq(std::uint32_t depth, CompletionChannel* channel) override {
    auto cq = inner_.create_cq(depth, channel);
    if (!cq) return cq;
    return wrap_cq(std::move(*cq));
  }
  void arm_fence() noexcept override { inner_.arm_fence(); }
  void on_async_event(std::function<void(AsyncEvent)> handler) override { inner_.on_async_event(std::move(handler)); }

 protected:
  virtual std::unique_ptr<Pd> wrap_pd(std::unique_ptr<Pd> pd) = 0;
  virtual std::unique_ptr<Cq> wrap_cq(std::unique_ptr<Cq> cq) = 0;  ///< a ForwardCq

 private:
  Device& inner_;
};

}  // namespace rdma::wrap
