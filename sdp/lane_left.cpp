// What is left of a stopped lane when its device goes: bytes that the program has not read, bytes that the peer may not have, and
// what each side has said, in memory of this process's own.
#include <linux/futex.h>

#include <algorithm>
#include <climits>
#include <cstring>
#include <new>

#include "rdma_core/base/sys.hpp"
#include "sdp/lane.hpp"

namespace sdp {

namespace {

/// Nothing comes by it.
class NoCq final : public rdma::Cq {
 public:
  unsigned poll(std::span<rdma::Wc>) noexcept override { return 0; }
  bool maybe_ready() const noexcept override { return false; }
  void arm(std::uint8_t) noexcept override {}
  void disarm() noexcept override {}
  std::atomic<std::uint32_t>* wake_word() noexcept override { return &word_; }
  void wake_sleepers() noexcept override {
    word_.fetch_add(1, std::memory_order_release);
    rdma::sys::call(SYS_futex, rdma::sys::arg(&word_), FUTEX_WAKE, INT_MAX);
  }

 private:
  std::atomic<std::uint32_t> word_{0};
};

/// Nothing goes by it.
class NoQp final : public rdma::Qp {
 public:
  rdma::Qpn qpn() const noexcept override { return {}; }
  std::uint32_t max_inline() const noexcept override { return 0; }
  rdma::QpState state() const noexcept override { return rdma::QpState::error; }
  rdma::Post post_send(const rdma::SendWr&) noexcept override { return rdma::Post::qp_error; }
  rdma::Post post_recv(std::span<const rdma::RecvWr>) noexcept override { return rdma::Post::qp_error; }
  rdma::Result<rdma::Unit> modify(const rdma::QpAttributes&) override { return rdma::Unit{}; }
};

NoCq no_cq;
NoQp no_qp;

}  // namespace

Lane* Lane::outlive_device(void* cell) const noexcept {
  const CreditWindow& credit = conn.credit();
  std::uint64_t first = tx_bytes_;
  for (std::uint32_t mseq = credit.sent(); mseq != credit.acked(); --mseq)
    if (const Sent& s = sent_[mseq % kMaxInFlight]; s.payload != 0) first = s.start;
  if (!zero_copy_.rest.empty()) first = std::min(first, zero_copy_.rest_from);
  const std::size_t unread = recv_.bytes(), sent = tx_bytes_ - first;
  KeptBytes kept;
  std::byte* const memory = kept.room(sizeof(LaneBlock) + unread + sent);
  if (memory == nullptr || !read_back(first, memory + sizeof(LaneBlock) + unread, sent)) {
    kept.clear();
    return nullptr;
  }
  std::byte* to = memory + sizeof(LaneBlock);
  for (std::uint32_t at = 0; at != recv_.size(); ++at) {
    const RecvQueue::Piece piece = recv_.piece(at);
    std::memcpy(to, piece.addr, piece.bytes);
    to += piece.bytes;
  }

  Lane* const left = new (cell) Lane(nullptr, limits_);
  left->conn = conn;
  left->zero_copy_.inherit(zero_copy_);
  kept.added(sizeof(LaneBlock) + unread + sent);
  left->kept_ = kept;
  left->kept_from_ = first;
  left->block_ = new (memory) LaneBlock{};
  left->words_ = &left->block_->words;
  for (unsigned i = 0; i < kWords; ++i) left->words_->word[i].store(words_->word[i].load());
  left->peer_buffer_.look_at(left->block_->cursors);
  left->cq_ = &no_cq;
  left->qp_ = &no_qp;
  left->max_inline_ = limits_.conn.recv_size_max;
  left->unordered_ = unordered_;
  left->dead_ = left->stopped_ = true;
  left->violated_ = violated_;
  left->peer_disconn_ = peer_disconn_;
  left->failure_ = failure();
  left->recv_.hold(memory + sizeof(LaneBlock), static_cast<std::uint32_t>(unread), no_qp);
  left->rx_bytes_ = rx_bytes_;
  left->rx_arrivals_ = rx_arrivals_;
  left->arrived_ = rx_arrived();
  left->tx_bytes_ = tx_bytes_;
  left->tx_messages_ = tx_messages_;
  return left;
}

bool Lane::read_kept(std::uint64_t from, std::byte* out, std::size_t bytes) const noexcept {
  if (from < kept_from_ || from + bytes > tx_bytes_) return false;
  const std::byte* const sent = kept_.data() + kept_.size() - (tx_bytes_ - kept_from_);
  std::memcpy(out, sent + (from - kept_from_), bytes);
  return true;
}

}  // namespace sdp
