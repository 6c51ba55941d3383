#include "rdma_core/drivers/wrap/late_device.hpp"

#include <algorithm>
#include <deque>

namespace rdma::wrap {

class LateQp final : public ForwardQp {
 public:
  LateQp(std::unique_ptr<Qp> inner, LateDevice& device, const QpInit& init)
      : ForwardQp(std::move(inner)), device_(device), depth_(init.send_depth), max_inline_(init.max_inline) {
    const std::lock_guard guard(device_.mutex_);
    device_.qps_.push_back(this);
  }
  ~LateQp() override {
    const std::lock_guard guard(device_.mutex_);
    std::erase(device_.qps_, this);
  }

  std::uint32_t max_inline() const noexcept override {
    return std::min({ForwardQp::max_inline(), max_inline_, device_.attr().max_inline});
  }
  Post post_send(const SendWr& wr) noexcept override {
    if (state() != QpState::rts) return Post::qp_error;
    const std::lock_guard guard(device_.mutex_);
    if (held_.size() >= depth_) return Post::queue_full;
    Held& h = held_.emplace_back();
    h.wr = wr;
    h.sges.assign(wr.sges, wr.sges + wr.sge_count);
    if ((wr.flags & kInline) != 0) h.put(h.all());
    return Post::ok;
  }
  std::span<const std::byte> sent_message(std::uint64_t) const noexcept override { return {}; }
  const std::byte* remote_view(std::uint64_t, std::size_t, Rkey) noexcept override { return nullptr; }
  std::atomic<std::uint64_t>* remote_word(std::uint64_t, Rkey) noexcept override { return nullptr; }

  // The device's mutex is held.
  std::size_t held() const noexcept { return held_.size(); }
  void release(std::size_t most) {
    for (; !dead_ && most > 0 && !held_.empty(); --most) {
      SendWr wr = held_.front().wr;
      wr.sges = held_.front().sges.data();
      wr.sge_count = static_cast<std::uint8_t>(held_.front().sges.size());
      if (ForwardQp::post_send(wr) == Post::queue_full) return;
      held_.pop_front();
    }
  }
  bool mix(std::size_t packet) {
    for (std::size_t i = 1; i < held_.size(); ++i) {
      if (held_[i - 1].wr.opcode != WrOpcode::send || held_[i].wr.opcode != WrOpcode::send) continue;
      const std::vector<std::byte> before = held_[i - 1].all();
      std::vector<std::byte> mixed = held_[i].all();
      if (mixed.size() <= packet || mixed.size() != before.size()) continue;
      std::copy_n(before.data() + packet, before.size() - packet, mixed.data() + packet);
      held_[i].put(std::move(mixed));
      return true;
    }
    return false;
  }
  void die() noexcept { dead_ = true; }

 private:
  struct Held {
    SendWr wr;
    std::vector<Sge> sges;
    std::vector<std::byte> bytes;  ///< if inline

    std::vector<std::byte> all() const {
      std::vector<std::byte> joined;
      for (const Sge& sge : sges) joined.insert(joined.end(), sge.addr, sge.addr + sge.length);
      return joined;
    }
    void put(std::vector<std::byte> inlined) {
      bytes = std::move(inlined);
      wr.flags |= kInline;
      sges = {Sge{bytes.data(), static_cast<std::uint32_t>(bytes.size()), {}}};
    }
  };
  LateDevice& device_;
  std::size_t depth_;
  std::uint32_t max_inline_;
  std::deque<Held> held_;
  bool dead_ = false;
};

namespace {

class LatePd final : public ForwardPd {
 public:
  LatePd(std::unique_ptr<Pd> inner, LateDevice& device) : ForwardPd(std::move(inner)), device_(device) {}

 protected:
  std::unique_ptr<Qp> wrap_qp(std::unique_ptr<Qp> qp, const QpInit& init) override {
    return std::make_unique<LateQp>(std::move(qp), device_, init);
  }

 private:
  LateDevice& device_;
};

}  // namespace

LateDevice::LateDevice(Device& inner, std::uint32_t max_inline) : ForwardDevice(inner), attr_(inner.attr()) {
  if (max_inline != 0) attr_.max_inline = max_inline;
  attr_.posts_arrive_at_once = false;
  attr_.mixes_messages = true;
  attr_.remembers_sent_data = false;
  attr_.maps_peer_memory = false;
}
LateDevice::~LateDevice() = default;

std::size_t LateDevice::held() const noexcept {
  const std::lock_guard guard(mutex_);
  std::size_t sum = 0;
  for (const LateQp* qp : qps_) sum += qp->held();
  return sum;
}
void LateDevice::release(std::size_t most) {
  const std::lock_guard guard(mutex_);
  for (LateQp* qp : qps_) qp->release(most);
}
bool LateDevice::mix(std::size_t packet) {
  const std::lock_guard guard(mutex_);
  return std::ranges::any_of(qps_, [packet](LateQp* qp) { return qp->mix(packet); });
}
void LateDevice::die() noexcept {
  const std::lock_guard guard(mutex_);
  for (LateQp* qp : qps_) qp->die();
}

std::unique_ptr<Pd> LateDevice::wrap_pd(std::unique_ptr<Pd> pd) { return std::make_unique<LatePd>(std::move(pd), *this); }
std::unique_ptr<Cq> LateDevice::wrap_cq(std::unique_ptr<Cq> cq) { return std::make_unique<ForwardCq>(std::move(cq)); }

}  // namespace rdma::wrap
