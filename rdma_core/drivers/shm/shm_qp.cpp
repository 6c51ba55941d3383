// Control path of the software device's objects: creation, state moves, memory regions.
#include "rdma_core/drivers/shm/shm_qp.hpp"

#include <errno.h>
#include <limits.h>
#include <linux/futex.h>
#include <time.h>

#include <algorithm>
#include <bit>
#include <cassert>

#include "rdma_core/base/clock.hpp"
#include "rdma_core/base/log.hpp"
#include "rdma_core/base/sys.hpp"

namespace rdma::shm {

// ---- memory ----

ShmMr::~ShmMr() {
  pd_.forget(*this);
  if (pd_.inherited()) return;
  OwnSegment& own = *pd_.link().own;
  own.retract(static_cast<std::uint32_t>(rkey));
  if (extent_bytes_ != 0) own.release(extent_offset_, extent_bytes_);
}

ShmPd::ShmPd(ShmDevice& device, std::shared_ptr<ShmLink> link)
    : device_(device), link_(std::move(link)), generation_(device.generation()), locals_(kMrCapacity) {}

Result<Unit> ShmPd::enter(Mr& mr, Access access) {
  const std::lock_guard lock(mutex_);
  for (std::size_t tries = 0; tries < kMrCapacity; ++tries) {
    const std::uint32_t key = next_key_++;
    Local& local = locals_[key % kMrCapacity];
    if (key == 0 || local.key != 0) continue;
    mr.lkey = static_cast<Lkey>(key);
    local.addr = mr.addr;
    local.bytes = mr.length;
    local.access = access;
    local.key = key;
    return Unit{};
  }
  return fail(ENOMEM, "shm: too many memory regions");
}

void ShmPd::forget(const Mr& mr) noexcept {
  const std::lock_guard lock(mutex_);
  Local& local = locals_[static_cast<std::uint32_t>(mr.lkey) % kMrCapacity];
  if (local.key == static_cast<std::uint32_t>(mr.lkey)) local = {};
}

Result<std::unique_ptr<Mr>> ShmPd::register_memory(std::span<std::byte> memory, Access access) {
  if (memory.data() == nullptr || memory.empty()) return fail(EINVAL, "shm: empty memory region");
  auto mr = std::make_unique<ShmMr>(*this, 0, 0);
  mr->addr = memory.data();
  mr->length = memory.size();
  mr->remote_base = reinterpret_cast<std::uint64_t>(memory.data());
  if (auto entered = enter(*mr, access); !entered) return Err{entered.error()};
  if (access == Access::remote_read && device_.attr().reads_program_memory) {
    if (inherited()) return fail(EPERM, "shm: inherited by fork");
    const std::uint32_t answer = link_->own->window().answer.load(std::memory_order_acquire);
    if (answer != kCanRead)
      return fail(answer == 0 ? EAGAIN : static_cast<int>(std::min(answer, 4095U)),
                  "shm: the peer cannot read this process's memory");
    auto key = link_->own->publish_program(mr->addr, mr->length, static_cast<std::uint32_t>(access));
    if (!key) return Err{key.error()};
    mr->rkey = static_cast<Rkey>(*key);
  } else if (!inherited() && link_->own->contains(mr->addr, mr->length)) {
    auto key = link_->own->publish(mr->addr, mr->length, static_cast<std::uint32_t>(access));
    if (!key) return Err{key.error()};
    mr->rkey = static_cast<Rkey>(*key);
  }
  return std::unique_ptr<Mr>(std::move(mr));
}

Result<std::unique_ptr<Mr>> ShmPd::map_extent(std::size_t bytes) {
  if (inherited()) return fail(EPERM, "shm: inherited by fork");
  if (bytes == 0 || bytes % kPageBytes != 0) return fail(EINVAL, "shm: an extent is a multiple of the page size");
  auto offset = link_->own->allocate(bytes);
  if (!offset) return Err{offset.error()};
  auto mr = std::make_unique<ShmMr>(*this, *offset, bytes);
  const Access all = Access::local_write | Access::remote_write | Access::remote_read;
  mr->addr = link_->own->base() + *offset;
  mr->length = bytes;
  mr->remote_base = reinterpret_cast<std::uint64_t>(mr->addr);
  if (auto entered = enter(*mr, all); !entered) return Err{entered.error()};
  auto key = link_->own->publish(mr->addr, bytes, static_cast<std::uint32_t>(all));
  if (!key) return Err{key.error()};
  mr->rkey = static_cast<Rkey>(*key);
  return std::unique_ptr<Mr>(std::move(mr));
}

Result<std::unique_ptr<Qp>> ShmPd::create_qp(const QpInit& init) {
  if (inherited()) return fail(EPERM, "shm: inherited by fork");
  const DeviceAttr& attr = device_.attr();
  if (init.send_cq == nullptr || init.recv_cq == nullptr) return fail(EINVAL, "shm: a QP needs two CQs");
  if (init.send_depth == 0 || init.send_depth > attr.max_send_wr || init.recv_depth > attr.max_recv_wr || init.recv_depth == 0)
    return fail(EINVAL, "shm: illegal queue depth");
  if (init.max_inline > attr.max_inline) return fail(EINVAL, "shm: max_inline too large");
  const std::uint32_t depth = std::bit_ceil(init.recv_depth);
  auto offset = link_->own->allocate(qp_page_bytes(depth));
  if (!offset) return Err{offset.error()};
  return std::unique_ptr<Qp>(std::make_unique<ShmQp>(*this, init, *offset, depth));
}

// ---- the Cq ----

void ShmCq::attach(ShmQp& qp) {
  if (std::find(qps_.begin(), qps_.end(), &qp) == qps_.end()) qps_.push_back(&qp);
  if (qp.receives_into(this)) qp.page().armed.store(armed_.load(std::memory_order_relaxed), std::memory_order_release);
}

void ShmCq::detach(ShmQp& qp) noexcept { std::erase(qps_, &qp); }

std::atomic<std::uint32_t>* ShmCq::wake_word() noexcept {
  ShmQp* only = nullptr;
  for (ShmQp* qp : qps_) {
    if (!qp->receives_into(this)) continue;
    if (only != nullptr) return nullptr;
    only = qp;
  }
  return only == nullptr ? nullptr : &only->page().wake_word;
}

void ShmCq::wake_sleepers() noexcept {
  std::atomic<std::uint32_t>* word = wake_word();
  if (word == nullptr) return;
  word->fetch_add(1, std::memory_order_acq_rel);
  sys::call(SYS_futex, sys::arg(word), FUTEX_WAKE, INT_MAX);
}

void ShmCq::announce_armed() noexcept {
  const std::uint8_t bits = armed_.exchange(0, std::memory_order_acq_rel);
  for (ShmQp* qp : qps_)
    if (qp->receives_into(this)) qp->page().armed.store(0, std::memory_order_relaxed);
  if (bits & kWakeWord) wake_sleepers();
  if ((bits & kWakeChannel) && channel_ != nullptr) channel_->ring();
}

// ---- the Qp ----

ShmQp::ShmQp(ShmPd& pd, const QpInit& init, std::size_t page_offset, std::uint32_t recv_depth)
    : page_(at<ShmQpPage>(pd.link().own->base() + page_offset)),
      send_depth_(init.send_depth),
      send_mask_(std::bit_ceil(init.send_depth + 1) - 1),
      send_ring_(std::make_unique<Wc[]>(send_mask_ + 1)),
      recv_mask_(recv_depth - 1),
      slots_(std::make_unique<Slot[]>(recv_depth)),
      send_cq_(static_cast<ShmCq*>(init.send_cq)),
      recv_cq_(static_cast<ShmCq*>(init.recv_cq)),
      qpn_(static_cast<Qpn>(page_offset / kPageBytes)),
      pd_(pd),
      page_offset_(page_offset) {
  expect_next();
  page_->depth = recv_depth;
  page_->magic = kQpMagic;
  recv_cq_->attach(*this);
  send_cq_->attach(*this);
}

ShmQp::~ShmQp() {
  recv_cq_->detach(*this);
  send_cq_->detach(*this);
  if (pd_.inherited()) return;
  if (state_ != QpState::error) shut_out_peer();
  pd_.link().own->release(page_offset_, qp_page_bytes(recv_mask_ + 1));
}

Result<Unit> ShmQp::modify(const QpAttributes& attr) {
  if (pd_.inherited()) return fail(EPERM, "shm: inherited by fork");
  const NodeType node = pd_.device().attr().node_type;
  if (auto legal = check_move(node, state_, attr); !legal) return legal;
  if (attr.access) remote_access_ = *attr.access;
  std::optional<std::uint32_t> peer_qpn;
  if (const auto* ib = std::get_if<IbQpAttributes>(&attr.transport)) peer_qpn = ib->dest_qpn;
  if (const auto* rnic = std::get_if<RnicQpAttributes>(&attr.transport)) peer_qpn = rnic->peer;
  const bool connects =
      attr.state == QpState::rtr || (node == NodeType::rnic && state_ == QpState::init && attr.state == QpState::rts);
  if (connects) {
    if (!peer_qpn) return fail(EINVAL, "shm: no peer QP given");
    if (auto connected = connect_to(*peer_qpn); !connected) return connected;
  }
  if (attr.state == QpState::reset) reset();
  if (attr.state == QpState::error)
    enter_error();
  else
    state_ = attr.state;
  return Unit{};
}

std::span<const std::byte> ShmQp::sent_message(std::uint64_t number) const noexcept {
  if (peer_page_ == nullptr || number >= sent_ || sent_ - number > std::uint64_t{peer_mask_} + 1) return {};
  const RqEntry& entry = peer_page_->rq[number & peer_mask_];
  const std::uint64_t offset = entry.offset.load(std::memory_order_relaxed);
  if (offset < sizeof(std::uint64_t) || (offset & 7) != 0 || offset > peer_bytes_) return {};
  std::byte* buffer = peer_base_ + offset;
  const std::uint64_t word = at<std::atomic<std::uint64_t>>(buffer - sizeof word)->load(std::memory_order_acquire);
  const auto bytes = static_cast<std::uint32_t>(word);
  if (static_cast<std::uint32_t>(word >> 32) != flag_sequence(number + 1) || bytes > peer_bytes_ - offset) return {};
  return {buffer, bytes};
}

Result<Unit> ShmQp::connect_to(std::uint32_t peer_qpn) {
  const ShmLink& link = pd_.link();
  const std::uint64_t bytes = link.peer_bytes();
  const std::uint64_t offset = std::uint64_t{peer_qpn} * kPageBytes;
  if (offset < kFirstPage || offset > bytes || bytes - offset < kPageBytes)
    return fail(EINVAL, "shm: the peer's QP is out of bounds");
  auto* page = at<ShmQpPage>(link.peer_base() + offset);
  const std::uint32_t magic = *static_cast<volatile std::uint32_t*>(&page->magic);
  const std::uint32_t depth = *static_cast<volatile std::uint32_t*>(&page->depth);
  if (magic != kQpMagic || !std::has_single_bit(depth) || depth > kMaxDepth || qp_page_bytes(depth) > bytes - offset)
    return fail(EINVAL, "shm: the peer's QP is none");
  peer_page_ = page;
  peer_mask_ = depth - 1;
  peer_base_ = link.peer_base();
  peer_bytes_ = bytes;
  sent_ = known_posted_ = 0;
  fence_ = link.needs_fence;
  fenced_sends_ = kFencedSends;
  maker_ = pd_.device().process_id();
  page_->fences.store(1, std::memory_order_release);
  peer_fences_.store(fence_ ? &kFences : &page->fences, std::memory_order_release);
  if (pd_.device().attr().reads_program_memory) pd_.link().try_to_read(pd_.device().process_id());
  return Unit{};
}

/// After it nothing arrives any more: see shm_layout.hpp, "closed".
void ShmQp::shut_out_peer() noexcept {
  page_->closed.store(1, std::memory_order_release);
  if (peer_page_ == nullptr) return;
  pd_.device().pass_barrier();
  ShmLink& link = pd_.link();
  constexpr Nanos kPatience = 50'000'000;
  const SteadyClock clock;
  const Nanos start = clock.now();
  for (unsigned spins = 0; peer_page_->sending.load(std::memory_order_acquire) != 0; ++spins) {
    if (!link.alive.load(std::memory_order_relaxed) || link.impatient.load(std::memory_order_relaxed)) return;
    if (spins < 200) {
      cpu_relax();
      continue;
    }
    sys::call(SYS_sched_yield);
    if (clock.now() - start < kPatience) continue;
    // Stopped in the middle, or hostile. It can spoil its own lanes with us, nobody else's; do not wait for it again.
    link.impatient.store(true, std::memory_order_relaxed);
    RDMA_LOG(info, "shm: peer process %d stopped in the middle of a message", link.peer.pid);
    return;
  }
}

void ShmQp::enter_error() noexcept {
  if (state_ == QpState::error) return;
  state_ = QpState::error;
  if (pd_.inherited()) return;  // the parent's QP goes on
  shut_out_peer();
  if (consumed_ != posted_) {
    flushing_.store(true, std::memory_order_release);
    recv_cq_->announce_local();
  }
}

void ShmQp::reset() noexcept {
  if (state_ != QpState::error) shut_out_peer();
  // What was posted is the owner's again, without a completion.
  posted_ = consumed_ = 0;
  page_->posted.store(0, std::memory_order_relaxed);
  for (std::uint32_t i = 0; i <= recv_mask_; ++i) slots_[i] = {};
  flushing_.store(false, std::memory_order_relaxed);
  send_head_.store(send_tail_.load(std::memory_order_relaxed), std::memory_order_relaxed);
  peer_page_ = nullptr;
  peer_fences_.store(&kFences, std::memory_order_release);
  page_->closed.store(0, std::memory_order_release);
  expect_next();
}

}  // namespace rdma::shm
