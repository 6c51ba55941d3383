// The classes behind Pd, Mr, Cq and Qp of the software device. Private to drivers/shm.
#pragma once

#include <memory>
#include <mutex>
#include <vector>

#include "rdma_core/drivers/shm/shm_device.hpp"

namespace rdma::shm {

class ShmQp;
class ShmPd;

class ShmMr final : public Mr {
 public:
  ShmMr(ShmPd& pd, std::size_t extent_offset, std::size_t extent_bytes) noexcept
      : pd_(pd), extent_offset_(extent_offset), extent_bytes_(extent_bytes) {}
  ~ShmMr() override;

 private:
  ShmPd& pd_;
  std::size_t extent_offset_;
  std::size_t extent_bytes_;  ///< 0: the caller's memory
};

class ShmPd final : public Pd {
 public:
  ShmPd(ShmDevice& device, std::shared_ptr<ShmLink> link);
  Result<std::unique_ptr<Mr>> register_memory(std::span<std::byte> memory, Access access) override;
  Result<std::unique_ptr<Mr>> map_extent(std::size_t bytes) override;
  Result<std::unique_ptr<Qp>> create_qp(const QpInit& init) override;

  ShmDevice& device() const noexcept { return device_; }
  ShmLink& link() const noexcept { return *link_; }
  /// Inherited by a fork's child: nothing of the shared memory may be freed.
  bool inherited() const noexcept { return generation_ != device_.generation(); }

  bool allows_local(const std::byte* addr, std::uint32_t bytes, Lkey lkey, Access access) const noexcept {
    const Local& local = locals_[static_cast<std::uint32_t>(lkey) % kMrCapacity];
    const auto offset = static_cast<std::size_t>(addr - local.addr);
    return local.key == static_cast<std::uint32_t>(lkey) && local.key != 0 && addr >= local.addr && offset <= local.bytes &&
           bytes <= local.bytes - offset && allows(local.access, access);
  }
  void forget(const Mr& mr) noexcept;

 private:
  struct Local {
    const std::byte* addr = nullptr;
    std::size_t bytes = 0;
    std::uint32_t key = 0;
    Access access{};
  };
  Result<Unit> enter(Mr& mr, Access access);

  ShmDevice& device_;
  std::shared_ptr<ShmLink> link_;
  std::uint32_t generation_;
  std::mutex mutex_;
  std::vector<Local> locals_;
  std::uint32_t next_key_ = kMrCapacity;
};

class ShmChannel final : public CompletionChannel {
 public:
  explicit ShmChannel(const OwnBell& bell) noexcept : bell_(bell) {}
  int fd() const noexcept override { return bell_.fd(); }
  void ring() noexcept override { bell_.ring(); }

 private:
  const OwnBell& bell_;
};

class ShmCq final : public Cq {
 public:
  explicit ShmCq(CompletionChannel* channel) noexcept : channel_(channel) {}
  unsigned poll(std::span<Wc> out) noexcept override;
  bool maybe_ready() const noexcept override;
  void arm(std::uint8_t wake) noexcept override;
  void disarm() noexcept override;
  std::atomic<std::uint32_t>* wake_word() noexcept override;
  void wake_sleepers() noexcept override;

  void attach(ShmQp& qp);
  void detach(ShmQp& qp) noexcept;
  /// A completion came into being in this process.
  void announce_local() noexcept {
    if (__builtin_expect(armed_.load(std::memory_order_relaxed) != 0, 0)) announce_armed();
  }
  /// Whether this thread has armed a Cq since it was asked last whose peer passes no fence of its own.
  static bool take_barrier_due() noexcept;

 private:
  void announce_armed() noexcept;
  unsigned poll_from(std::size_t first, std::span<Wc> out) noexcept;

  CompletionChannel* channel_;
  std::atomic<std::uint8_t> armed_{0};
  std::vector<ShmQp*> qps_;  ///< that send or receive into this Cq
  std::size_t next_ = 0;     ///< whose turn it is to be looked at first
};

/// Messages that pass a fence of their own behind one that has rung. It costs some 10 ns, a barrier 3 us at the least and, where
/// the cores are virtual and busy, 60.
inline constexpr std::uint32_t kFencedSends = 256;
/// What stands for the word of a peer that always fences, or sends nothing.
inline const std::atomic<std::uint32_t> kFences{1};

/// What the sender needs of every message comes first, then what the receiver needs, then the rest.
class ShmQp final : public Qp {
 public:
  ShmQp(ShmPd& pd, const QpInit& init, std::size_t page_offset, std::uint32_t recv_depth);
  ~ShmQp() override;
  Qpn qpn() const noexcept override { return qpn_; }
  std::uint32_t max_inline() const noexcept override { return pd_.device().attr().max_inline; }
  QpState state() const noexcept override { return state_; }
  Post post_send(const SendWr& wr) noexcept override;
  Post post_recv(std::span<const RecvWr> wrs) noexcept override;
  Result<Unit> modify(const QpAttributes& attr) override;
  std::span<const std::byte> sent_message(std::uint64_t number) const noexcept override;
  const std::byte* remote_view(std::uint64_t remote_addr, std::size_t bytes, Rkey rkey) noexcept override;
  std::atomic<std::uint64_t>* remote_word(std::uint64_t remote_addr, Rkey rkey) noexcept override;
  Post store_word(std::atomic<std::uint64_t>& word, std::uint64_t value, bool wake) noexcept override;
  std::optional<std::uint32_t> withdraw(Rkey rkey) noexcept override {
    return pd_.link().own->withdraw(static_cast<std::uint32_t>(rkey));
  }

  bool recv_ready() const noexcept {
    const std::uint64_t word = peek(*next_flag_.load(std::memory_order_relaxed));
    return static_cast<std::uint32_t>(word >> 32) == expect_.load(std::memory_order_relaxed) ||
           flushing_.load(std::memory_order_relaxed);
  }
  bool send_ready() const noexcept {
    return send_head_.load(std::memory_order_relaxed) != send_tail_.load(std::memory_order_relaxed);
  }
  unsigned poll_recv(Wc* out, unsigned room) noexcept;
  unsigned poll_send(Wc* out, unsigned room) noexcept;
  bool sends_into(const ShmCq* cq) const noexcept { return send_cq_ == cq; }
  bool receives_into(const ShmCq* cq) const noexcept { return recv_cq_ == cq; }
  ShmQpPage& page() noexcept { return *page_; }
  /// Does the peer see what is armed now before it leaves off looking? The caller has passed a fence since it armed.
  bool peer_fences() const noexcept { return peer_fences_.load(std::memory_order_relaxed)->load(std::memory_order_acquire) != 0; }

 private:
  /// Another thread may just have taken the buffer and made something else of it: what is read there then means nothing.
  [[gnu::no_sanitize("thread")]] static std::uint64_t peek(const std::atomic<std::uint64_t>& flag) noexcept {
    return __atomic_load_n(reinterpret_cast<const std::uint64_t*>(&flag), __ATOMIC_ACQUIRE);
  }
  struct Slot {
    std::uint64_t wr_id = 0;
    std::byte* addr = nullptr;
    std::uint32_t bytes = 0;
  };

  // Datapath.
  Post post_message(const SendWr& wr, std::uint64_t total) noexcept;
  Post post_rdma(const SendWr& wr) noexcept;
  Post read_program(const SendWr& wr, std::uint32_t total) noexcept;
  Post fail_send(const SendWr& wr, WcStatus status) noexcept;
  std::byte* remote_range(std::uint64_t remote_addr, std::uint64_t bytes, Rkey rkey, Access need) noexcept;
  bool local_sges_ok(const SendWr& wr, Access need) const noexcept;
  bool ring_full() const noexcept {
    return send_tail_.load(std::memory_order_relaxed) - send_head_.load(std::memory_order_relaxed) >= send_depth_;
  }
  void push_send(const SendWr& wr, WcStatus status, std::uint32_t bytes) noexcept;
  void enter_window() noexcept;
  void leave_window() noexcept { page_->sending.store(0, std::memory_order_release); }
  void wake_if_armed() noexcept;
  void fence_for_now() noexcept;
  void ring_peer() noexcept;
  void expect_next() noexcept;
  unsigned flush_recv(Wc* out, unsigned room) noexcept;

  // Control path.
  Result<Unit> connect_to(std::uint32_t peer_qpn);
  void enter_error() noexcept;
  void shut_out_peer() noexcept;
  void reset() noexcept;

  QpState state_ = QpState::reset;
  bool fence_ = false;              ///< always: there is no membarrier
  std::uint32_t fenced_sends_ = 0;  ///< so many more
  ProcessId maker_{};               ///< whose they are
  std::uint32_t peer_mask_ = 0;
  ShmQpPage* page_ = nullptr;
  ShmQpPage* peer_page_ = nullptr;
  std::byte* peer_base_ = nullptr;
  std::uint64_t peer_bytes_ = 0;
  std::uint64_t sent_ = 0;
  std::uint64_t known_posted_ = 0;
  std::atomic<std::uint32_t> send_head_{0};
  std::atomic<std::uint32_t> send_tail_{0};
  std::uint32_t send_depth_ = 0;
  std::uint32_t send_mask_ = 0;
  std::unique_ptr<Wc[]> send_ring_;

  alignas(64) std::atomic<const std::atomic<std::uint64_t>*> next_flag_;
  std::atomic<std::uint32_t> expect_{flag_sequence(1)};
  std::atomic<const std::atomic<std::uint32_t>*> peer_fences_{&kFences};
  std::atomic<bool> flushing_{false};
  std::uint32_t recv_mask_ = 0;
  std::uint64_t posted_ = 0;
  std::uint64_t consumed_ = 0;
  std::unique_ptr<Slot[]> slots_;
  ShmCq* send_cq_;
  ShmCq* recv_cq_;
  Qpn qpn_;

  ShmPd& pd_;
  std::size_t page_offset_;
  Access remote_access_{};
};

}  // namespace rdma::shm
