#include "rdma_core/drivers/verbs/verbs_qp.hpp"

#include <errno.h>
#include <fcntl.h>
#include <infiniband/verbs.h>
#include <linux/futex.h>
#include <sys/epoll.h>
#include <sys/eventfd.h>
#include <sys/mman.h>

#include <algorithm>
#include <bit>
#include <climits>
#include <cstring>
#include <new>
#include <utility>

#include "rdma_core/base/high_fd.hpp"
#include "rdma_core/base/log.hpp"
#include "rdma_core/base/sys.hpp"

namespace rdma::verbs {
namespace {

constexpr std::size_t kPageBytes = 4096;
/// The iWARP provider of rdma-core 44 cannot map a queue of its that starts at page 144 of a context, and queues of 64 entries and
/// more step over it.
constexpr std::uint32_t kShallowest = 64;
constexpr std::uint32_t kSharers = 64;  ///< Cqs of one SharedQueue, if all are as deep

int access_flags(Access access) noexcept {
  int flags = 0;
  if (allows(access, Access::local_write)) flags |= IBV_ACCESS_LOCAL_WRITE;
  if (allows(access, Access::remote_write)) flags |= IBV_ACCESS_REMOTE_WRITE | IBV_ACCESS_LOCAL_WRITE;
  if (allows(access, Access::remote_read)) flags |= IBV_ACCESS_REMOTE_READ;
  return flags;
}

ibv_qp_state to_verbs(QpState state) noexcept {
  switch (state) {
    case QpState::reset:
      return IBV_QPS_RESET;
    case QpState::init:
      return IBV_QPS_INIT;
    case QpState::rtr:
      return IBV_QPS_RTR;
    case QpState::rts:
      return IBV_QPS_RTS;
    case QpState::sqd:
      return IBV_QPS_SQD;
    case QpState::error:
      break;
  }
  return IBV_QPS_ERR;
}

/// What of `ib` the device wants to hear, beside the state.
int take_ib(const IbQpAttributes& ib, ibv_qp_attr& to) noexcept {
  int mask = 0;
  const auto take = [&mask](const auto& from, auto& field, int bit) {
    if (!from) return;
    field = static_cast<std::remove_reference_t<decltype(field)>>(*from);
    mask |= bit;
  };
  take(ib.pkey_index, to.pkey_index, IBV_QP_PKEY_INDEX);
  take(ib.port, to.port_num, IBV_QP_PORT);
  take(ib.dest_qpn, to.dest_qp_num, IBV_QP_DEST_QPN);
  take(ib.rq_psn, to.rq_psn, IBV_QP_RQ_PSN);
  take(ib.sq_psn, to.sq_psn, IBV_QP_SQ_PSN);
  take(ib.path_mtu, to.path_mtu, IBV_QP_PATH_MTU);
  take(ib.min_rnr_timer, to.min_rnr_timer, IBV_QP_MIN_RNR_TIMER);
  take(ib.ack_timeout, to.timeout, IBV_QP_TIMEOUT);
  take(ib.retry_count, to.retry_cnt, IBV_QP_RETRY_CNT);
  take(ib.rnr_retry, to.rnr_retry, IBV_QP_RNR_RETRY);
  if (ib.dgid) {
    constexpr std::uint8_t kHops = 64;
    to.ah_attr.is_global = 1;
    std::memcpy(to.ah_attr.grh.dgid.raw, ib.dgid->data(), ib.dgid->size());
    to.ah_attr.grh.sgid_index = ib.sgid_index.value_or(0);
    to.ah_attr.grh.hop_limit = kHops;
    to.ah_attr.dlid = ib.dlid.value_or(0);
    to.ah_attr.sl = ib.service_level.value_or(0);
    to.ah_attr.port_num = ib.port.value_or(1);
    mask |= IBV_QP_AV;
  }
  return mask;
}

QpAttributes any_init(NodeType node) {
  QpAttributes attr;
  attr.state = QpState::init;
  attr.access = Access::local_read;
  if (node != NodeType::rnic) {
    IbQpAttributes ib;
    ib.pkey_index = std::uint16_t{0};
    ib.port = std::uint8_t{1};
    attr.transport = ib;
  }
  return attr;
}

}  // namespace

void set_nonblocking(int fd) noexcept { sys::call(SYS_fcntl, fd, F_SETFL, sys::call(SYS_fcntl, fd, F_GETFL) | O_NONBLOCK); }

// ---- memory

VerbsMr::VerbsMr(ibv_mr* mr, std::byte* memory, std::size_t bytes, std::size_t own_bytes) noexcept
    : mr_(mr), own_bytes_(own_bytes) {
  addr = memory;
  length = bytes;
  lkey = Lkey{mr->lkey};
  rkey = Rkey{mr->rkey};
  remote_base = reinterpret_cast<std::uintptr_t>(memory);
}

VerbsMr::~VerbsMr() {
  ibv_dereg_mr(mr_);
  if (own_bytes_ != 0) munmap(addr, own_bytes_);
}

VerbsPd::~VerbsPd() {
  if (const int failed = ibv_dealloc_pd(pd_); failed != 0)
    RDMA_LOG(error, "verbs: a protection domain is still in use: %d", failed);
}

Result<std::unique_ptr<Mr>> VerbsPd::register_memory(std::span<std::byte> memory, Access access) {
  if (memory.empty()) return fail(EINVAL, "verbs: nothing to register");
  ibv_mr* mr = ibv_reg_mr(pd_, memory.data(), memory.size(), access_flags(access));
  if (mr == nullptr) return fail(errno, "verbs: the memory cannot be registered");
  auto* const own = new (std::nothrow) VerbsMr(mr, memory.data(), memory.size(), 0);
  if (own != nullptr) return std::unique_ptr<Mr>(own);
  ibv_dereg_mr(mr);
  return fail(ENOMEM, "verbs: no memory");
}

Result<std::unique_ptr<Mr>> VerbsPd::map_extent(std::size_t bytes) {
  if (bytes == 0 || bytes > SIZE_MAX - kPageBytes) return fail(EINVAL, "verbs: an extent of no size");
  bytes = (bytes + kPageBytes - 1) & ~(kPageBytes - 1);
  void* memory = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (memory == MAP_FAILED) return fail(errno, "verbs: no memory");
  ibv_mr* mr = ibv_reg_mr(pd_, memory, bytes, IBV_ACCESS_LOCAL_WRITE | IBV_ACCESS_REMOTE_WRITE | IBV_ACCESS_REMOTE_READ);
  if (mr == nullptr) {
    const int error = errno;
    munmap(memory, bytes);
    return fail(error,
                error == ENOMEM ? "verbs: more memory than may be locked (ulimit -l)" : "verbs: the memory cannot be registered");
  }
  auto* const own = new (std::nothrow) VerbsMr(mr, static_cast<std::byte*>(memory), bytes, bytes);
  if (own != nullptr) return std::unique_ptr<Mr>(own);
  ibv_dereg_mr(mr);
  munmap(memory, bytes);
  return fail(ENOMEM, "verbs: no memory");
}

// ---- the channel

Result<std::unique_ptr<CompletionChannel>> VerbsChannel::open(ibv_context* context, std::uint32_t deepest) {
  ibv_comp_channel* channel = ibv_create_comp_channel(context);
  if (channel == nullptr) return fail(errno, "verbs: no completion channel");
  std::unique_ptr<VerbsChannel> own(new VerbsChannel(channel, context, deepest));
  set_nonblocking(channel->fd);
  channel->fd = keep_fd(channel->fd);
  own->bell_fd_ = keep_fd(static_cast<int>(sys::call(SYS_eventfd2, 0, EFD_CLOEXEC | EFD_NONBLOCK)));
  own->epoll_fd_ = keep_fd(static_cast<int>(sys::call(SYS_epoll_create1, EPOLL_CLOEXEC)));
  if (own->bell_fd_ < 0 || own->epoll_fd_ < 0)
    return fail(-std::min(own->bell_fd_, own->epoll_fd_), "verbs: no descriptor for a completion channel");
  for (const int fd : {channel->fd, own->bell_fd_}) {
    epoll_event event{};
    event.events = EPOLLIN | EPOLLET;
    if (const long failed = sys::call(SYS_epoll_ctl, own->epoll_fd_, EPOLL_CTL_ADD, fd, sys::arg(&event)); failed != 0)
      return fail(static_cast<int>(-failed), "verbs: no completion channel");
  }
  return std::unique_ptr<CompletionChannel>(std::move(own));
}

VerbsChannel::~VerbsChannel() {
  queues_.clear();
  for (const int fd : {epoll_fd_, bell_fd_}) {
    if (fd < 0) continue;
    forget_fd(fd);
    sys::call(SYS_close, fd);
  }
  forget_fd(channel_->fd);
  ibv_destroy_comp_channel(channel_);
}

void VerbsChannel::abandon_in_child() noexcept {
  for (int* fd : {&epoll_fd_, &bell_fd_, &channel_->fd}) {
    forget_fd(*fd);
    sys::call(SYS_close, std::exchange(*fd, -1));
  }
}

void VerbsChannel::ring() noexcept {
  const std::uint64_t one = 1;
  sys::call(SYS_write, bell_fd_, sys::arg(&one), sizeof one);
}

bool VerbsChannel::progress() noexcept {
  ibv_cq* cq = nullptr;
  void* context = nullptr;
  std::uint8_t wakes = 0;
  while (ibv_get_cq_event(channel_, &cq, &context) == 0) {
    ibv_ack_cq_events(cq, 1);
    wakes |= static_cast<SharedQueue*>(context)->announced();
  }
  return (wakes & kWakeChannel) != 0;
}

// A new one has room for as many Cqs as there are already: a process with few connections does not pay for many, and two threads
// with a lane each have a queue each.
std::shared_ptr<SharedQueue> VerbsChannel::queue_for(std::uint32_t depth) {
  std::uint32_t in_use = 0;
  for (const auto& each : queues_) {
    if (each->room() >= depth) return each;
    in_use += each->depth() - each->room();
  }
  const std::uint32_t most = std::min(std::clamp(in_use, depth, kSharers * depth), deepest_);
  for (std::uint32_t wanted = std::max(most, depth);; wanted = std::max(wanted / 2, depth)) {
    if (auto made = SharedQueue::make(context_, wanted, channel_)) return queues_.emplace_back(std::move(made));
    if (wanted == depth) return nullptr;
  }
}

void VerbsChannel::let_go() noexcept {
  bool kept = false;
  std::erase_if(queues_, [&](const auto& each) { return each->is_unused() && std::exchange(kept, true); });
}

// ---- queues

VerbsCq::VerbsCq(std::shared_ptr<SharedQueue> queue, std::uint32_t depth, VerbsChannel* channel)
    : queue_(std::move(queue)), channel_(channel), depth_(depth), ring_(std::bit_ceil(depth)) {
  queue_->enter(*this, depth_);
}

VerbsCq::~VerbsCq() {
  queue_->leave(*this, depth_);
  if (channel_ != nullptr) channel_->let_go();
}

void VerbsCq::attach(VerbsQp& qp, std::uint32_t depth) {
  promised_ += depth;
  qps_.push_back(&qp);
}

void VerbsCq::detach(VerbsQp& qp, std::uint32_t depth) {
  promised_ -= depth;
  std::erase(qps_, &qp);
}

void VerbsCq::drop(Qpn qpn) noexcept {
  const SharedQueue::Guard guard(*queue_);
  queue_->collect();
  std::uint32_t kept = head_;
  for (std::uint32_t at = head_; at != tail_; ++at) {
    const Told& told = ring_[at & (ring_.size() - 1)];
    if (told.qpn != static_cast<std::uint32_t>(qpn)) ring_[kept++ & (ring_.size() - 1)] = told;
  }
  tail_ = kept;
}

void VerbsCq::wake_sleepers() noexcept {
  wake_word_.fetch_add(1, std::memory_order_acq_rel);
  sys::call(SYS_futex, sys::arg(&wake_word_), FUTEX_WAKE, INT_MAX);
}

// Armed until it is woken: who collects for it while announced() looks must not make it seem that nobody sleeps.
std::uint8_t VerbsCq::wake_if_due() noexcept {
  const std::uint8_t wakes = due_.exchange(0);
  armed_.fetch_and(static_cast<std::uint8_t>(~wakes));
  if (wakes & kWakeWord) wake_sleepers();
  return wakes;
}

Result<std::unique_ptr<Qp>> VerbsPd::create_qp(const QpInit& init) {
  const DeviceAttr& attr = device_.attr();
  if (init.send_cq == nullptr || init.recv_cq == nullptr) return fail(EINVAL, "verbs: a Qp without a Cq");
  if (init.send_depth > attr.max_send_wr || init.recv_depth > attr.max_recv_wr || init.send_depth == 0)
    return fail(EINVAL, "verbs: a queue deeper than the device allows");
  const std::uint32_t recv_depth = std::bit_ceil(std::max(init.recv_depth, 1U));
  const auto &send_cq = static_cast<const VerbsCq&>(*init.send_cq), &recv_cq = static_cast<const VerbsCq&>(*init.recv_cq);
  const bool one = &send_cq == &recv_cq;
  if (send_cq.room() < init.send_depth + (one ? recv_depth : 0) || (!one && recv_cq.room() < recv_depth))
    return fail(EINVAL, "verbs: the completion queue is too shallow for one Qp more");
  ibv_qp_init_attr wanted{};
  wanted.send_cq = send_cq.queue().cq();
  wanted.recv_cq = recv_cq.queue().cq();
  wanted.qp_type = IBV_QPT_RC;
  wanted.cap = {.max_send_wr = std::max(init.send_depth, kShallowest),
                .max_recv_wr = std::max(recv_depth, kShallowest),
                .max_send_sge = attr.max_sge,
                .max_recv_sge = 1,
                .max_inline_data = std::min(init.max_inline, attr.max_inline)};
  ibv_qp* qp = ibv_create_qp(pd_, &wanted);
  if (qp == nullptr) return fail(errno, "verbs: no Qp");
  const std::uint32_t granted = std::min(wanted.cap.max_inline_data, attr.max_inline);
  return std::unique_ptr<Qp>(new VerbsQp(device_, qp, init, recv_depth, granted));
}

VerbsQp::VerbsQp(VerbsDevice& device, ibv_qp* qp, const QpInit& init, std::uint32_t recv_depth, std::uint32_t max_inline)
    : device_(device),
      qp_(qp),
      qpn_(Qpn{qp->qp_num}),
      rnic_(device.attr().node_type == NodeType::rnic),
      max_inline_(max_inline),
      send_cq_(static_cast<VerbsCq*>(init.send_cq)),
      recv_cq_(static_cast<VerbsCq*>(init.recv_cq)),
      send_depth_(init.send_depth),
      recv_depth_(recv_depth),
      sends_(std::bit_ceil(init.send_depth)),
      recvs_(recv_depth) {
  early_.reserve(recv_depth);
  send_cq_->attach(*this, send_depth_);
  recv_cq_->attach(*this, recv_depth_);
  SharedQueue &sends = send_cq_->queue(), &receives = recv_cq_->queue();
  const bool one = &sends == &receives;
  sends.attach(qp->qp_num, send_cq_, one ? recv_cq_ : nullptr);
  if (!one) receives.attach(qp->qp_num, nullptr, recv_cq_);
}

VerbsQp::~VerbsQp() {
  if (const int failed = ibv_destroy_qp(qp_); failed != 0) RDMA_LOG(error, "verbs: a Qp cannot be destroyed: %d", failed);
  drop_completions();
  for (VerbsCq* cq : {send_cq_, recv_cq_}) cq->queue().detach(static_cast<std::uint32_t>(qpn_));
  send_cq_->detach(*this, send_depth_);
  recv_cq_->detach(*this, recv_depth_);
}

void VerbsQp::drop_completions() noexcept {
  send_cq_->drop(qpn_);
  if (recv_cq_ != send_cq_) recv_cq_->drop(qpn_);
}

Result<Unit> VerbsQp::modify(const QpAttributes& attr) {
  if (auto legal = check_move(device_.attr().node_type, state_, attr); !legal) return legal;
  if (state_ == QpState::reset && attr.state == QpState::error) {  // which the kernel does not know as one move
    if (auto moved = modify(any_init(device_.attr().node_type)); !moved) return moved;
  }
  if (auto moved = apply(attr); !moved) return moved;
  state_ = attr.state;
  if (state_ == QpState::reset) {
    drop_completions();
    sends_posted_ = sends_done_ = recvs_posted_ = recvs_done_ = 0;
    read_count_ = 0;
    early_.clear();
  } else if (!early_.empty()) {
    const std::vector<RecvWr> wrs = std::exchange(early_, {});
    if (hand_over(wrs) != Post::ok) return fail(EIO, "verbs: the device does not take the receives");
  }
  return Unit{};
}

Result<Unit> VerbsQp::apply(const QpAttributes& attr) {
  if (attr.state == QpState::reset && state_ == QpState::reset) return Unit{};
  if (rnic_ && attr.state == QpState::rts) return Unit{};  // the kernel's CM has moved it
  ibv_qp_attr to{};
  to.qp_state = to_verbs(attr.state);
  int mask = IBV_QP_STATE;
  if (attr.access) {
    to.qp_access_flags = static_cast<unsigned>(access_flags(*attr.access));
    mask |= IBV_QP_ACCESS_FLAGS;
  }
  if (const auto* ib = std::get_if<IbQpAttributes>(&attr.transport)) mask |= take_ib(*ib, to);
  if (!rnic_ && attr.max_read_outstanding) {
    to.max_rd_atomic = *attr.max_read_outstanding;
    mask |= IBV_QP_MAX_QP_RD_ATOMIC;
  }
  if (!rnic_ && attr.max_read_incoming) {
    to.max_dest_rd_atomic = *attr.max_read_incoming;
    mask |= IBV_QP_MAX_DEST_RD_ATOMIC;
  }
  // A caller may hand in everything it knows; the device refuses what has no place in this move.
  constexpr int kInit = IBV_QP_STATE | IBV_QP_PKEY_INDEX | IBV_QP_PORT | IBV_QP_ACCESS_FLAGS;
  constexpr int kRtr = IBV_QP_STATE | IBV_QP_AV | IBV_QP_PATH_MTU | IBV_QP_DEST_QPN | IBV_QP_RQ_PSN | IBV_QP_MAX_DEST_RD_ATOMIC |
                       IBV_QP_MIN_RNR_TIMER | IBV_QP_ACCESS_FLAGS;
  constexpr int kRts = IBV_QP_STATE | IBV_QP_TIMEOUT | IBV_QP_RETRY_CNT | IBV_QP_RNR_RETRY | IBV_QP_SQ_PSN |
                       IBV_QP_MAX_QP_RD_ATOMIC | IBV_QP_ACCESS_FLAGS;
  switch (attr.state) {
    case QpState::init:
      mask &= kInit;
      break;
    case QpState::rtr:
      mask &= kRtr;
      break;
    case QpState::rts:
      mask &= state_ == QpState::rtr ? kRts : IBV_QP_STATE | IBV_QP_ACCESS_FLAGS | IBV_QP_MIN_RNR_TIMER;
      break;
    default:
      mask = IBV_QP_STATE;
      break;
  }
  if (const int failed = ibv_modify_qp(qp_, &to, mask); failed != 0) return fail(failed, "verbs: the device refuses the move");
  return Unit{};
}

}  // namespace rdma::verbs
