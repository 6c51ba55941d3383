// A Device that fails where an Injector says so, on top of any Device. For tests, and for provoking on a real device what happens
// there once a year.
//
// queue_full is injected only while a signalled request of that Qp has not been polled: whoever resumes on its next completion gets
// one, as on a device whose queue is really full. Otherwise the fault does not happen and Injector::on_post_send() is asked again
// at the next post.
#pragma once

#include <atomic>
#include <cstdint>
#include <memory>
#include <random>

#include "rdma_core/device.hpp"
#include "rdma_core/drivers/wrap/forward.hpp"

namespace rdma::wrap {

enum class Fault : std::uint8_t {
  none,
  queue_full,  ///< post_send refuses
  qp_error,    ///< the Qp moves to error, everything posted flushes, and the post is refused
};

/// What goes wrong. Called from the threads that use the Qps and Cqs: with more than one, it must be safe for that. No allocation.
class Injector {
 public:
  virtual ~Injector() = default;
  virtual Fault on_post_send(const Qp&, const SendWr&) noexcept { return Fault::none; }
  /// queue_full or qp_error; none of the buffers is posted.
  virtual Fault on_post_recv(const Qp&, std::span<const RecvWr>) noexcept { return Fault::none; }
  /// True: this poll() finds nothing, whatever is there.
  virtual bool on_poll(const Cq&) noexcept { return false; }
};

/// The `nth` post_send from now on (1 is the next) gets `fault`, and with `every` each further nth one too.
class NthPost final : public Injector {
 public:
  explicit NthPost(std::uint64_t nth, Fault fault = Fault::qp_error, bool every = false) noexcept
      : nth_(nth), fault_(fault), every_(every) {}
  Fault on_post_send(const Qp&, const SendWr&) noexcept override {
    const std::uint64_t count = ++count_;
    return nth_ != 0 && (every_ ? count % nth_ == 0 : count == nth_) ? fault_ : Fault::none;
  }

 private:
  std::uint64_t nth_;
  Fault fault_;
  bool every_;
  std::atomic<std::uint64_t> count_{0};
};

/// Each post_send is refused, and each poll is blind, with a chance; out of a seed. One thread.
class RandomFaults final : public Injector {
 public:
  RandomFaults(std::uint64_t seed, unsigned post_percent, unsigned poll_percent) noexcept
      : random_(seed), post_percent_(post_percent), poll_percent_(poll_percent) {}
  Fault on_post_send(const Qp&, const SendWr&) noexcept override {
    return random_() % 100 < post_percent_ ? Fault::queue_full : Fault::none;
  }
  bool on_poll(const Cq&) noexcept override { return random_() % 100 < poll_percent_; }

 private:
  std::mt19937_64 random_;
  unsigned post_percent_;
  unsigned poll_percent_;
};

class FaultDevice final : public ForwardDevice {
 public:
  /// Both outlive the wrapper.
  FaultDevice(Device& inner, Injector& injector) noexcept : ForwardDevice(inner), injector_(injector) {}

 protected:
  std::unique_ptr<Pd> wrap_pd(std::unique_ptr<Pd> pd) override;
  std::unique_ptr<Cq> wrap_cq(std::unique_ptr<Cq> cq) override;

 private:
  Injector& injector_;
};

}  // namespace rdma::wrap
