// The classes behind Pd, Mr, Cq and Qp of the verbs driver. Private to drivers/verbs.
#pragma once

#include <array>
#include <atomic>
#include <memory>
#include <vector>

#include "rdma_core/drivers/verbs/verbs_device.hpp"
#include "rdma_core/drivers/verbs/verbs_queue.hpp"

struct ibv_pd;
struct ibv_mr;
struct ibv_cq;
struct ibv_qp;
struct ibv_comp_channel;

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
  /// `deepest`: entries that a completion queue of the device may have.
  static Result<std::unique_ptr<CompletionChannel>> open(ibv_context* context, std::uint32_t deepest);
  ~VerbsChannel() override;
  int fd() const noexcept override { return epoll_fd_; }
  void ring() noexcept override;

  bool progress() noexcept override;
  void abandon_in_child() noexcept override;

  /// A queue with room for so many entries more; nullptr: errno says why.
  std::shared_ptr<SharedQueue> queue_for(std::uint32_t depth);
  void let_go() noexcept;  ///< of queues that no Cq uses, but for one that the next may have

 private:
  VerbsChannel(ibv_comp_channel* channel, ibv_context* context, std::uint32_t deepest) noexcept
      : channel_(channel), context_(context), deepest_(deepest) {}
  ibv_comp_channel* channel_;
  ibv_context* context_;
  std::uint32_t deepest_;
  std::vector<std::shared_ptr<SharedQueue>> queues_;
  int bell_fd_ = -1;
  int epoll_fd_ = -1;
};

/// One user's share of a SharedQueue. libibverbs cannot be asked whether a completion is there: a look takes it, and poll() finds
/// it here.
class VerbsCq final : public Cq {
 public:
  /// `channel`: nullptr or the queue's.
  VerbsCq(std::shared_ptr<SharedQueue> queue, std::uint32_t depth, VerbsChannel* channel);
  ~VerbsCq() override;
  unsigned poll(std::span<Wc> out) noexcept override;
  bool maybe_ready() const noexcept override;
  void arm(std::uint8_t wake) noexcept override;
  void disarm() noexcept override;
  std::atomic<std::uint32_t>* wake_word() noexcept override { return channel_ != nullptr ? &wake_word_ : nullptr; }
  void wake_sleepers() noexcept override;

  SharedQueue& queue() const noexcept { return *queue_; }
  /// Entries that no Qp may need yet.
  std::uint32_t room() const noexcept { return depth_ - promised_; }
  void attach(VerbsQp& qp, std::uint32_t depth);
  void detach(VerbsQp& qp, std::uint32_t depth);
  /// What the Qp has left does not come out any more. The device adds nothing to it.
  void drop(Qpn qpn) noexcept;

  // --- for the queue
  void put(const Told& told) noexcept;  ///< under the queue's Guard
  bool is_armed() const noexcept { return armed_.load() != 0; }
  std::uint8_t wake_if_due() noexcept;  ///< returns the Wake bits that are due

 private:
  unsigned take(std::span<Told> out) const noexcept;
  bool translate(const Told& from, Wc& to) const noexcept;

  const std::shared_ptr<SharedQueue> queue_;
  VerbsChannel* const channel_;
  const std::uint32_t depth_;
  std::uint32_t promised_ = 0;          ///< entries that the Qps may need
  std::vector<VerbsQp*> qps_;           ///< that send or receive into this Cq
  std::atomic<std::uint8_t> armed_{0};  ///< Wake bits
  std::atomic<std::uint8_t> due_{0};    ///< those of them whose completion has been taken
  std::atomic<std::uint32_t> wake_word_{0};
  std::vector<Told> ring_;  ///< a power of two; guarded by the queue's Guard
  mutable std::uint32_t head_ = 0, tail_ = 0;
};

class VerbsQp final : public Qp {
 public:
  /// The Cqs have room for its completions.
  VerbsQp(VerbsDevice& device, ibv_qp* qp, const QpInit& init, std::uint32_t recv_depth, std::uint32_t max_inline);
  ~VerbsQp() override;
  Qpn qpn() const noexcept override { return qpn_; }
  std::uint32_t max_inline() const noexcept override { return max_inline_; }
  QpState state() const noexcept override { return state_; }
  Post post_send(const SendWr& wr) noexcept override;
  Post post_recv(std::span<const RecvWr> wrs) noexcept override;
  Result<Unit> modify(const QpAttributes& attr) override;

  /// Turns a completion's number into the caller's wr_id and frees what is behind it; false: it is none of ours.
  bool complete(bool receive, std::uint64_t number, bool success, std::uint64_t& wr_id, WcOpcode& opcode) noexcept;

 private:
  struct Request {
    std::uint64_t wr_id = 0;
    WcOpcode opcode = WcOpcode::send;
  };
  static constexpr unsigned kMostReads = 32;  ///< under way at one time
  struct Read {
    std::uint64_t number = 0, wr_id = 0;
  };
  bool complete_read(std::uint64_t number, bool success, std::uint64_t& wr_id) noexcept;
  void drop_completions() noexcept;
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
  std::vector<Request> sends_;            ///< a power of two of them
  std::vector<std::uint64_t> recvs_;      ///< likewise
  std::array<Read, kMostReads> reads_{};  ///< RDMA Reads under way: some devices complete them behind Sends that were posted later
  unsigned read_count_ = 0;
  std::vector<RecvWr> early_;  ///< receives posted in reset, where the device takes none: handed over with the move to init
};

}  // namespace rdma::verbs
