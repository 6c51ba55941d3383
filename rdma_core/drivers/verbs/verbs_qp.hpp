// The classes behind Pd, Mr, Cq and Qp of the verbs driver. Private to drivers/verbs.
#pragma once

#include <atomic>
#include <memory>
#include <vector>

#include "rdma_core/drivers/verbs/verbs_device.hpp"

struct ibv_pd;
struct ibv_mr;
struct ibv_cq;
struct ibv_qp;
struct ibv_comp_channel;
struct ibv_wc;

namespace rdma::verbs {

class VerbsQp;

void set_nonblocking(int fd) noexcept;

class VerbsMr final : public Mr {
 public:
  /// `own_bytes`: what to unmap with it; 0: the memory is the caller's.
  VerbsMr(ibv_mr* mr, std::byte* memory, std::size_t bytes, std::size_t own_bytes) noexcept;
  ~VerbsMr() override;

 private:
  ibv_mr* mr_;
  std::size_t own_bytes_;
};

class VerbsPd final : public Pd {
 public:
  VerbsPd(VerbsDevice& device, ibv_pd* pd) noexcept : device_(device), pd_(pd) {}
  ~VerbsPd() override;
  Result<std::unique_ptr<Mr>> register_memory(std::span<std::byte> memory, Access access) override;
  Result<std::unique_ptr<Mr>> map_extent(std::size_t bytes) override;
  Result<std::unique_ptr<Qp>> create_qp(const QpInit& init) override;

 private:
  VerbsDevice& device_;
  ibv_pd* pd_;
};

/// The device's channel, and a descriptor of our own for ring(), behind one epoll descriptor.
class VerbsChannel final : public CompletionChannel {
 public:
  static Result<std::unique_ptr<CompletionChannel>> open(ibv_context* context);
  ~VerbsChannel() override;
  int fd() const noexcept override { return epoll_fd_; }
  void ring() noexcept override;

  bool progress() noexcept override;
  void abandon_in_child() noexcept override;

  ibv_comp_channel* channel() const noexcept { return channel_; }

 private:
  explicit VerbsChannel(ibv_comp_channel* channel) noexcept : channel_(channel) {}
  ibv_comp_channel* channel_;
  int bell_fd_ = -1;
  int epoll_fd_ = -1;
};

/// libibverbs cannot be asked whether a completion is there: a look takes it, and poll() finds it here.
class VerbsCq final : public Cq {
 public:
  VerbsCq() = default;
  ~VerbsCq() override;
  /// False: errno says why.
  bool open(ibv_context* context, std::uint32_t depth, VerbsChannel* channel) noexcept;
  unsigned poll(std::span<Wc> out) noexcept override;
  bool maybe_ready() const noexcept override;
  void arm(std::uint8_t wake) noexcept override;
  void disarm() noexcept override { armed_.store(0, std::memory_order_relaxed); }
  std::atomic<std::uint32_t>* wake_word() noexcept override { return channel_ != nullptr ? &wake_word_ : nullptr; }
  void wake_sleepers() noexcept override;

  ibv_cq* cq() const noexcept { return cq_; }
  std::uint8_t announced() noexcept;  ///< by the channel; returns what it was armed for
  void attach(VerbsQp& qp) { qps_.push_back(&qp); }
  /// Nothing of the Qp's comes out any more. It is destroyed already as far as the device is concerned.
  void detach(VerbsQp& qp);

 private:
  class Looking;
  static constexpr unsigned kLookAhead = 16;
  unsigned take(Wc* out, unsigned room) const noexcept;
  bool translate(const ibv_wc& from, Wc& to) const noexcept;

  ibv_cq* cq_ = nullptr;
  VerbsChannel* channel_ = nullptr;
  std::atomic<std::uint8_t> armed_{0};  ///< Wake bits
  std::atomic<std::uint32_t> wake_word_{0};
  std::vector<VerbsQp*> qps_;                         ///< that send or receive into this Cq
  mutable std::atomic_flag busy_ = ATOMIC_FLAG_INIT;  ///< somebody polls; guards what follows
  mutable Wc ahead_[kLookAhead];
  mutable unsigned ahead_head_ = 0, ahead_tail_ = 0;
  std::vector<Wc> kept_;  ///< other Qps', taken while one was detached; they come first
  std::size_t kept_head_ = 0;
};

class VerbsQp final : public Qp {
 public:
  VerbsQp(VerbsDevice& device, ibv_qp* qp, const QpInit& init, std::uint32_t recv_depth, std::uint32_t max_inline);
  ~VerbsQp() override;
  Qpn qpn() const noexcept override { return qpn_; }
  std::uint32_t max_inline() const noexcept override { return max_inline_; }
  QpState state() const noexcept override { return state_; }
  Post post_send(const SendWr& wr) noexcept override;
  Post post_recv(std::span<const RecvWr> wrs) noexcept override;
  Result<Unit> modify(const QpAttributes& attr) override;

  /// Turns a completion's number into the caller's wr_id and frees what is behind it; false: nobody is to hear of it.
  bool complete(bool receive, std::uint64_t number, bool success, std::uint64_t& wr_id, WcOpcode& opcode) noexcept;

 private:
  friend class VerbsCq;
  struct Request {
    std::uint64_t wr_id = 0;
    WcOpcode opcode = WcOpcode::send;
    bool wanted = true;  ///< its completion, if it is a success
  };
  Result<Unit> apply(const QpAttributes& attr);
  Post hand_over(std::span<const RecvWr> wrs) noexcept;

  VerbsDevice& device_;
  ibv_qp* qp_;
  Qpn qpn_;
  QpState state_ = QpState::reset;
  bool rnic_;
  std::uint32_t max_inline_;
  VerbsCq* send_cq_;
  VerbsCq* recv_cq_;
  // Requests are numbered from 0; those in [done, posted) are the device's.
  std::uint64_t sends_posted_ = 0, sends_done_ = 0, recvs_posted_ = 0, recvs_done_ = 0;
  std::uint32_t send_depth_, recv_depth_;
  std::vector<Request> sends_;        ///< a power of two of them
  std::vector<std::uint64_t> recvs_;  ///< likewise
  std::vector<RecvWr> early_;         ///< receives posted in reset, where the device takes none: handed over with the move to init
};

}  // namespace rdma::verbs
