// Per message code, and nothing else: post_send, post_recv, poll, maybe_ready, arm. No allocation; the system calls are the
// device's doorbell where it has no other, arm(), and a yield to who is in the way.
#include <errno.h>
#include <infiniband/verbs.h>

#include <algorithm>

#include "rdma_core/base/clock.hpp"
#include "rdma_core/base/sys.hpp"
#include "rdma_core/drivers/verbs/verbs_qp.hpp"

namespace rdma::verbs {
namespace {

WcStatus to_status(ibv_wc_status status, bool receive) noexcept {
  switch (status) {
    case IBV_WC_SUCCESS:
      return WcStatus::success;
    case IBV_WC_LOC_LEN_ERR:
      return WcStatus::local_length_error;
    case IBV_WC_LOC_PROT_ERR:
    case IBV_WC_LOC_ACCESS_ERR:
      return WcStatus::local_protection_error;
    case IBV_WC_LOC_QP_OP_ERR:  // of a receive: the message did not fit
      return receive ? WcStatus::local_length_error : WcStatus::local_protection_error;
    case IBV_WC_REM_ACCESS_ERR:
      return WcStatus::remote_access_error;
    case IBV_WC_REM_INV_REQ_ERR:
    case IBV_WC_REM_OP_ERR:
      return receive ? WcStatus::local_length_error : WcStatus::remote_invalid_request;
    case IBV_WC_RNR_RETRY_EXC_ERR:
      return WcStatus::rnr_retry_exceeded;
    case IBV_WC_RETRY_EXC_ERR:
      return WcStatus::retry_exceeded;
    case IBV_WC_WR_FLUSH_ERR:
      return WcStatus::flushed;
    default:
      return WcStatus::fatal;
  }
}

ibv_wr_opcode to_verbs(WrOpcode opcode) noexcept {
  switch (opcode) {
    case WrOpcode::rdma_write:
      return IBV_WR_RDMA_WRITE;
    case WrOpcode::rdma_read:
      return IBV_WR_RDMA_READ;
    case WrOpcode::send:
      break;
  }
  return IBV_WR_SEND;
}

unsigned send_flags(const SendWr& wr) noexcept {
  unsigned flags = 0;
  if (wr.flags & kSignalled) flags |= IBV_SEND_SIGNALED;
  if (wr.flags & kInline) flags |= IBV_SEND_INLINE;
  if ((wr.flags & kSolicited) && wr.opcode == WrOpcode::send) flags |= IBV_SEND_SOLICITED;
  if (wr.flags & kFence) flags |= IBV_SEND_FENCE;
  return flags;
}

constexpr unsigned kMaxSge = 8;  ///< DeviceAttr::max_sge at the most
constexpr unsigned kRecvBatch = 16;
constexpr int kLookAhead = 16;
constexpr unsigned kTakeAtOnce = 4;

}  // namespace

Post VerbsQp::post_send(const SendWr& wr) noexcept {
  if (state_ != QpState::rts) return Post::qp_error;
  if (sends_posted_ - sends_done_ >= send_depth_) return Post::queue_full;
  const bool is_read = wr.opcode == WrOpcode::rdma_read;
  if (is_read && read_count_ == kMostReads) return Post::queue_full;
  if (wr.sge_count > kMaxSge) return Post::qp_error;
  ibv_sge sges[kMaxSge];
  for (unsigned i = 0; i < wr.sge_count; ++i)
    sges[i] = {reinterpret_cast<std::uintptr_t>(wr.sges[i].addr), wr.sges[i].length, static_cast<std::uint32_t>(wr.sges[i].lkey)};
  ibv_send_wr request{};
  request.wr_id = (wr.flags & kSignalled) != 0 ? sends_posted_ : sends_posted_ | kUnwanted;
  request.sg_list = sges;
  request.num_sge = wr.sge_count;
  request.opcode = to_verbs(wr.opcode);
  // Soft-iWARP gives TCP the caller's own pages of a request that asks for no completion, and the completion of a later one comes
  // before TCP has sent them for the last time.
  request.send_flags = rnic_ ? send_flags(wr) | IBV_SEND_SIGNALED : send_flags(wr);
  request.wr.rdma.remote_addr = wr.remote_addr;
  request.wr.rdma.rkey = static_cast<std::uint32_t>(wr.rkey);
  ibv_send_wr* bad = nullptr;
  sends_[sends_posted_ & (sends_.size() - 1)] = {wr.wr_id, static_cast<WcOpcode>(wr.opcode)};
  const int failed = ibv_post_send(qp_, &request, &bad);
  if (failed == ENOMEM) return Post::queue_full;
  if (failed != 0) return Post::qp_error;
  if (is_read) reads_[read_count_++] = {sends_posted_, wr.wr_id};
  ++sends_posted_;
  return Post::ok;
}

Post VerbsQp::post_recv(std::span<const RecvWr> wrs) noexcept {
  if (state_ == QpState::error) return Post::qp_error;
  if (recvs_posted_ + early_.size() - recvs_done_ + wrs.size() > recv_depth_) return Post::queue_full;
  if (state_ == QpState::reset) {
    early_.insert(early_.end(), wrs.begin(), wrs.end());
    return Post::ok;
  }
  return hand_over(wrs);
}

Post VerbsQp::hand_over(std::span<const RecvWr> wrs) noexcept {
  while (!wrs.empty()) {
    ibv_sge sges[kRecvBatch];
    ibv_recv_wr requests[kRecvBatch];
    const auto count = static_cast<unsigned>(std::min<std::size_t>(wrs.size(), kRecvBatch));
    for (unsigned i = 0; i < count; ++i) {
      const RecvWr& wr = wrs[i];
      sges[i] = {reinterpret_cast<std::uintptr_t>(wr.addr), wr.length, static_cast<std::uint32_t>(wr.lkey)};
      const std::uint64_t number = recvs_posted_ + i;
      recvs_[number & (recvs_.size() - 1)] = wr.wr_id;
      requests[i] = {};
      requests[i].wr_id = number | kReceive;
      requests[i].next = i + 1 < count ? &requests[i + 1] : nullptr;
      requests[i].sg_list = &sges[i];
      requests[i].num_sge = 1;
    }
    ibv_recv_wr* bad = nullptr;
    if (ibv_post_recv(qp_, requests, &bad) != 0) return Post::qp_error;
    recvs_posted_ += count;
    wrs = wrs.subspan(count);
  }
  return Post::ok;
}

/// False: the request is no Read. What was posted behind it may have completed already.
bool VerbsQp::complete_read(std::uint64_t number, bool success, std::uint64_t& wr_id) noexcept {
  const auto end = reads_.begin() + read_count_;
  const auto read = std::find_if(reads_.begin(), end, [&](const Read& r) { return r.number == number; });
  if (read == end) return false;
  wr_id = read->wr_id;
  std::copy(read + 1, end, read);
  --read_count_;
  sends_done_ = std::max(sends_done_, number + 1);
  if (!success) state_ = QpState::error;
  return true;
}

bool VerbsQp::complete(bool receive, std::uint64_t number, bool success, std::uint64_t& wr_id, WcOpcode& opcode) noexcept {
  if (!receive && read_count_ != 0 && complete_read(number, success, wr_id)) {
    opcode = WcOpcode::rdma_read;
    return true;
  }
  std::uint64_t& done = receive ? recvs_done_ : sends_done_;
  if (number < done || number >= (receive ? recvs_posted_ : sends_posted_)) return false;
  done = number + 1;
  if (receive) {
    wr_id = recvs_[number & (recvs_.size() - 1)];
    opcode = WcOpcode::recv;
  } else {
    const Request& request = sends_[number & (sends_.size() - 1)];
    wr_id = request.wr_id;
    opcode = request.opcode;
  }
  if (!success) state_ = QpState::error;
  return true;
}

SharedQueue::Guard::Guard(const SharedQueue& queue) noexcept : inside_(queue.inside_) {
  constexpr unsigned kLooks = 256;  // far longer than anybody keeps it who has a processor
  const pthread_t self = pthread_self();
  for (unsigned looks = 0;;) {
    pthread_t other = inside_.load(std::memory_order_relaxed);
    if (other == self) return;
    if (other == 0 && inside_.compare_exchange_weak(other, self, std::memory_order_acquire, std::memory_order_relaxed)) break;
    cpu_relax();
    if (++looks % kLooks == 0) sys::call(SYS_sched_yield);
  }
  entered_ = true;
}

void SharedQueue::collect() const noexcept {
  ibv_wc wcs[kLookAhead];
  for (int got = kLookAhead; got == kLookAhead;) {
    got = ibv_poll_cq(cq_, kLookAhead, wcs);
    for (int i = 0; i < got; ++i) {
      const ibv_wc& wc = wcs[i];
      if (wc.status == IBV_WC_SUCCESS && (wc.wr_id & kUnwanted) != 0) continue;
      const auto owner = std::ranges::lower_bound(owners_, wc.qp_num, {}, &Owner::qpn);
      if (owner == owners_.end() || owner->qpn != wc.qp_num) continue;  // of a Qp that is gone
      VerbsCq* const cq = (wc.wr_id & kReceive) != 0 ? owner->receives : owner->sends;
      if (cq == nullptr) continue;
      Told told;
      told.wr_id = wc.wr_id;
      told.byte_len = wc.byte_len;
      told.qpn = wc.qp_num & 0xffffff;
      told.status = static_cast<std::uint8_t>(wc.status);
      cq->put(told);
    }
  }
}

void SharedQueue::request() noexcept {
  std::uint64_t seen = request_.load();
  if ((seen & kAsked) != 0) return;
  std::uint64_t asking = seen | kAsking;
  const bool mine = seen != asking && request_.compare_exchange_strong(seen, asking);
  ibv_req_notify_cq(cq_, 0);
  // Another's request may not have begun yet: only who began one says that it was made.
  if (mine) request_.compare_exchange_strong(asking, asking ^ kAsking ^ kAsked);
}

void VerbsCq::put(const Told& told) noexcept {
  ring_[tail_++ & (ring_.size() - 1)] = told;
  if (const std::uint8_t wakes = armed_.load(); wakes != 0) due_.fetch_or(wakes);
}

unsigned VerbsCq::take(std::span<Told> out) const noexcept {
  const SharedQueue::Guard guard(*queue_);
  if (!guard) return 0;
  if (tail_ - head_ < out.size()) queue_->collect();
  unsigned n = 0;
  while (n < out.size() && head_ != tail_) out[n++] = ring_[head_++ & (ring_.size() - 1)];
  return n;
}

bool VerbsCq::translate(const Told& from, Wc& to) const noexcept {
  const bool receive = (from.wr_id & kReceive) != 0;
  const auto status = static_cast<ibv_wc_status>(from.status);
  for (VerbsQp* qp : qps_) {
    if (static_cast<std::uint32_t>(qp->qpn()) != from.qpn) continue;
    to.status = to_status(status, receive);
    if (!qp->complete(receive, from.wr_id & kNumber, status == IBV_WC_SUCCESS, to.wr_id, to.opcode)) return false;
    to.byte_len = status == IBV_WC_SUCCESS ? from.byte_len : 0;
    to.qpn = qp->qpn();
    return true;
  }
  return false;
}

unsigned VerbsCq::poll(std::span<Wc> out) noexcept {
  unsigned n = 0;
  for (unsigned wanted = 1, got = 1; got == wanted && n < out.size();) {
    Told told[kTakeAtOnce];  // cleared each time
    wanted = std::min(static_cast<unsigned>(out.size()) - n, kTakeAtOnce);
    got = take({told, wanted});
    for (unsigned i = 0; i < got; ++i)
      if (translate(told[i], out[n])) ++n;
  }
  return n;
}

bool VerbsCq::maybe_ready() const noexcept {
  const SharedQueue::Guard guard(*queue_);
  if (!guard) return false;
  if (head_ == tail_) queue_->collect();
  return head_ != tail_;
}

void VerbsCq::arm(std::uint8_t wake) noexcept {
  if (wake == 0 || channel_ == nullptr) return;
  armed_.fetch_or(wake);
  queue_->request();
}

void VerbsCq::disarm() noexcept {
  armed_.store(0);
  due_.store(0);
}

}  // namespace rdma::verbs
