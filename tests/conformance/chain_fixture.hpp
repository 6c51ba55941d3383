// The managers of another Fixture, each at the end of a chain whose first transport reaches nobody: what the suite sees has been
// handed on by it.
#pragma once

#include <array>
#include <memory>

#include "rdma_core/cm/cm_chain.hpp"
#include "tests/conformance/ends.hpp"

namespace rdma::conformance {

/// Says of every connection that its other end is elsewhere, within the call.
class ReachesNobody final : public cm::ConnectionManager {
 public:
  explicit ReachesNobody(const cm::Caps& caps, int fd) : caps_(caps), fd_(fd) {}
  const char* name() const noexcept override { return "nobody"; }
  const cm::Caps& caps() const noexcept override { return caps_; }
  void on_event(std::function<void(const cm::Event&)> handler) override { handler_ = std::move(handler); }
  Result<Unit> offer(const cm::Anchor& anchor, unsigned) override { return elsewhere(anchor); }
  void withdraw(std::uint64_t) noexcept override {}
  Result<Unit> dial(const cm::Anchor& anchor, unsigned, MakeQp) override { return elsewhere(anchor); }
  Result<Unit> accept(cm::ConnId, Qp&, std::span<const std::byte>) override { return fail(ENOENT, "nobody"); }
  void reject(cm::ConnId, cm::Reason, std::span<const std::byte>) noexcept override {}
  Result<Unit> establish(cm::ConnId) override { return fail(ENOENT, "nobody"); }
  void disconnect(cm::ConnId) noexcept override {}
  int fd() const noexcept override { return fd_; }
  int next_timeout_ms() const noexcept override { return -1; }
  void progress() override {}

 private:
  Result<Unit> elsewhere(const cm::Anchor& anchor) {
    cm::Event e;
    e.anchor_cookie = anchor.cookie;
    e.reason = cm::Reason::elsewhere;
    handler_(e);
    return Unit{};
  }
  cm::Caps caps_;
  int fd_;
  std::function<void(const cm::Event&)> handler_;
};

template <class F>
class Chained : public F {
 public:
  Chained() {
    for (const Side side : {Side::a, Side::b}) {
      cm::ConnectionManager& inner = F::cm(side);
      Chain& c = chains_[static_cast<std::size_t>(side)];
      c.nobody = std::make_unique<ReachesNobody>(inner.caps(), -1);
      c.chain = Ends<F>::must(cm::CmChain::create(
          {{"nobody", {}, c.nobody.get()}, {"inner", [&inner] { return cm::CmChain::Opened(&inner); }}}, clock_));
    }
  }
  cm::ConnectionManager& cm(Side side) { return *chains_[static_cast<std::size_t>(side)].chain; }
  void kill(Side side) requires requires(F& f) { f.kill(side); }
  {
    chains_[static_cast<std::size_t>(side)].chain.reset();
    F::kill(side);
  }

 private:
  struct Chain {
    std::unique_ptr<ReachesNobody> nobody;
    std::unique_ptr<cm::CmChain> chain;
  };
  SteadyClock clock_;
  std::array<Chain, 2> chains_;
};

}  // namespace rdma::conformance
