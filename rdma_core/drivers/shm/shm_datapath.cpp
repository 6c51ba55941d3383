// Per message code, and nothing else: post_send, post_recv, poll, maybe_ready. No allocation, no lock; a system call only to ring.
#include <limits.h>
#include <linux/futex.h>

#include <algorithm>
#include <cassert>
#include <cstring>
#include <utility>

#include "rdma_core/base/copy.hpp"
#include "rdma_core/base/sys.hpp"
#include "rdma_core/drivers/shm/shm_qp.hpp"

#define SHM_LIKELY(x) __builtin_expect(!!(x), 1)
#define SHM_UNLIKELY(x) __builtin_expect(!!(x), 0)

namespace rdma::shm {
namespace {

template <class Word>
inline void move_word(std::byte* to, const std::byte* from) noexcept {
  Word w;
  std::memcpy(&w, from, sizeof w);
  std::memcpy(to, &w, sizeof w);
}
struct Half {  // 16 bytes: one vector register
  std::uint64_t a, b;
};

/// No call for what is small: headers and short payloads.
inline void copy_piece(std::byte* to, const std::byte* from, std::size_t n) noexcept {
  if (n > 64) {
    copy_bytes(to, from, n);
  } else if (n >= 16) {
    // Pieces from both ends that may overlap in the middle.
    move_word<Half>(to, from);
    if (n > 32) {
      move_word<Half>(to + 16, from + 16);
      move_word<Half>(to + n - 32, from + n - 32);
    }
    move_word<Half>(to + n - 16, from + n - 16);
  } else if (n >= 8) {
    move_word<std::uint64_t>(to, from);
    move_word<std::uint64_t>(to + n - 8, from + n - 8);
  } else if (n >= 4) {
    move_word<std::uint32_t>(to, from);
    move_word<std::uint32_t>(to + n - 4, from + n - 4);
  } else {
    for (std::size_t i = 0; i < n; ++i) to[i] = from[i];
  }
}

inline void compiler_barrier() noexcept { std::atomic_signal_fence(std::memory_order_seq_cst); }

inline std::atomic<std::uint64_t>* flag_of(std::byte* buffer) noexcept {
  return at<std::atomic<std::uint64_t>>(buffer - sizeof(std::uint64_t));
}

const std::atomic<std::uint64_t> kNothingPosted{0};

[[gnu::tls_model("initial-exec")]] thread_local bool barrier_due = false;

}  // namespace

// ---- sending ----

/// From here to leave_window() the owner of the buffers can wait until we are done; see shm_layout.hpp, "closed".
inline void ShmQp::enter_window() noexcept {
  page_->sending.store(1, std::memory_order_relaxed);
  compiler_barrier();
  if (SHM_UNLIKELY(fence_)) std::atomic_thread_fence(std::memory_order_seq_cst);
}

Post ShmQp::post_send(const SendWr& wr) noexcept {
  if (SHM_UNLIKELY(state_ != QpState::rts)) return Post::qp_error;
  if (SHM_UNLIKELY(ring_full())) return Post::queue_full;
  if (SHM_UNLIKELY(wr.opcode != WrOpcode::send)) return post_rdma(wr);
  std::uint64_t total = 0;
  for (unsigned i = 0; i < wr.sge_count; ++i) total += wr.sges[i].length;
  if (SHM_UNLIKELY((wr.flags & kInline) == 0 && !local_sges_ok(wr, Access::local_read))) {
    return fail_send(wr, WcStatus::local_protection_error);
  }
  return post_message(wr, total);
}

inline Post ShmQp::post_message(const SendWr& wr, std::uint64_t total) noexcept {
  enter_window();
  if (SHM_UNLIKELY(peer_page_->closed.load(std::memory_order_relaxed) != 0)) return fail_send(wr, WcStatus::retry_exceeded);
  if (SHM_UNLIKELY(sent_ == known_posted_)) {
    const std::uint64_t posted = peer_page_->posted.load(std::memory_order_acquire);
    if (posted == sent_) return fail_send(wr, WcStatus::rnr_retry_exceeded);
    // More than its queue holds, or fewer than there were: the peer's memory is spoilt.
    if (posted - sent_ > std::uint64_t{peer_mask_} + 1) return fail_send(wr, WcStatus::remote_invalid_request);
    known_posted_ = posted;
  }
  const RqEntry& entry = peer_page_->rq[sent_ & peer_mask_];
  const std::uint64_t offset = entry.offset.load(std::memory_order_relaxed);
  const std::uint32_t room = entry.bytes.load(std::memory_order_relaxed);
  if (SHM_UNLIKELY(offset < sizeof(std::uint64_t) || (offset & 7) != 0 || offset > peer_bytes_ || room > peer_bytes_ - offset))
    return fail_send(wr, WcStatus::remote_invalid_request);
  std::byte* const buffer = peer_base_ + offset;
  ++sent_;
  if (SHM_UNLIKELY(total > room)) {
    if (total <= UINT32_MAX) flag_of(buffer)->store(flag_word(sent_, static_cast<std::uint32_t>(total)), std::memory_order_release);
    return fail_send(wr, WcStatus::remote_invalid_request);
  }
  std::byte* to = buffer;
  for (unsigned i = 0; i < wr.sge_count; ++i) {
    if (SHM_UNLIKELY((wr.flags & kDirect) != 0 && wr.sges[i].length >= kStringCopies))
      copy_past_caches(to, wr.sges[i].addr, wr.sges[i].length);
    else
      copy_piece(to, wr.sges[i].addr, wr.sges[i].length);
    to += wr.sges[i].length;
  }
  flag_of(buffer)->store(flag_word(sent_, static_cast<std::uint32_t>(total)), std::memory_order_release);
  leave_window();
  if (wr.flags & kSignalled) push_send(wr, WcStatus::success, static_cast<std::uint32_t>(total));
  wake_if_armed();
  return Post::ok;
}

bool ShmQp::local_sges_ok(const SendWr& wr, Access need) const noexcept {
  for (unsigned i = 0; i < wr.sge_count; ++i)
    if (!pd_.allows_local(wr.sges[i].addr, wr.sges[i].length, wr.sges[i].lkey, need)) return false;
  return true;
}

/// Where remote_addr lies in our mapping, or nullptr. Everything in the entry can change while we look: each field is read once.
std::byte* ShmQp::remote_range(std::uint64_t remote_addr, std::uint64_t bytes, Rkey remote_key, Access need) noexcept {
  const auto rkey = static_cast<std::uint32_t>(remote_key);
  const MrEntry& entry = at<const MrEntry>(peer_base_ + kMrOffset)[rkey & (kMrCapacity - 1)];
  const std::uint32_t key = entry.key.load(std::memory_order_acquire);
  const std::uint64_t base = entry.base.load(std::memory_order_relaxed);
  const std::uint64_t offset = entry.offset.load(std::memory_order_relaxed);
  const std::uint64_t length = entry.bytes.load(std::memory_order_relaxed);
  const auto access = static_cast<Access>(entry.access.load(std::memory_order_relaxed));
  if (key != rkey || key == 0 || !allows(access, need)) return nullptr;
  if (remote_addr < base || remote_addr - base > length || bytes > length - (remote_addr - base)) return nullptr;
  if (offset > peer_bytes_ || length > peer_bytes_ - offset) return nullptr;
  return peer_base_ + offset + (remote_addr - base);
}

const std::byte* ShmQp::remote_view(std::uint64_t remote_addr, std::size_t bytes, Rkey rkey) noexcept {
  return peer_base_ == nullptr ? nullptr : remote_range(remote_addr, bytes, rkey, Access::remote_read);
}

std::atomic<std::uint64_t>* ShmQp::remote_word(std::uint64_t remote_addr, Rkey rkey) noexcept {
  if (peer_base_ == nullptr) return nullptr;
  std::byte* const word = remote_range(remote_addr, sizeof(std::uint64_t), rkey, Access::remote_write);
  const bool whole = reinterpret_cast<std::uintptr_t>(word) % sizeof(std::uint64_t) == 0;
  return word != nullptr && whole ? at<std::atomic<std::uint64_t>>(word) : nullptr;
}

Post ShmQp::store_word(std::atomic<std::uint64_t>& word, std::uint64_t value, bool wake) noexcept {
  if (SHM_UNLIKELY(state_ != QpState::rts)) return Post::qp_error;
  enter_window();
  if (SHM_UNLIKELY(peer_page_->closed.load(std::memory_order_relaxed) != 0)) {
    leave_window();
    enter_error();
    return Post::qp_error;
  }
  word.store(value, std::memory_order_release);
  leave_window();
  if (wake) wake_if_armed();
  return Post::ok;
}

/// Behind what the peer may sleep for.
inline void ShmQp::wake_if_armed() noexcept {
  compiler_barrier();
  if (SHM_UNLIKELY(fenced_sends_ != 0)) fence_for_now();
  if (SHM_UNLIKELY(peer_page_->armed.load(std::memory_order_relaxed) != 0)) ring_peer();
}

inline void ShmQp::fence_for_now() noexcept {
  std::atomic_thread_fence(std::memory_order_seq_cst);
  if (fence_ || --fenced_sends_ != 0) return;
  page_->fences.store(0, std::memory_order_relaxed);
  std::atomic_thread_fence(std::memory_order_seq_cst);
}

Post ShmQp::post_rdma(const SendWr& wr) noexcept {
  const bool read = wr.opcode == WrOpcode::rdma_read;
  std::uint64_t total = 0;
  for (unsigned i = 0; i < wr.sge_count; ++i) total += wr.sges[i].length;
  const DeviceAttr& attr = pd_.device().attr();
  if (read && wr.sge_count > attr.max_sge_read) return fail_send(wr, WcStatus::local_protection_error);
  if (total > UINT32_MAX) return fail_send(wr, WcStatus::local_length_error);
  // The sink of an RNIC's Read is written by the peer's responses: it needs remote access as well (RFC 5040).
  const Access sink = attr.node_type == NodeType::rnic ? Access::local_write | Access::remote_write : Access::local_write;
  if ((read || (wr.flags & kInline) == 0) && !local_sges_ok(wr, read ? sink : Access::local_read))
    return fail_send(wr, WcStatus::local_protection_error);

  if (read && is_program_key(static_cast<std::uint32_t>(wr.rkey))) return read_program(wr, static_cast<std::uint32_t>(total));
  enter_window();
  if (peer_page_->closed.load(std::memory_order_relaxed) != 0) return fail_send(wr, WcStatus::retry_exceeded);
  std::byte* remote = remote_range(wr.remote_addr, total, wr.rkey, read ? Access::remote_read : Access::remote_write);
  if (remote == nullptr) return fail_send(wr, WcStatus::remote_access_error);
  if (read) {
    for (unsigned i = 0; i < wr.sge_count; ++i) {
      copy_piece(const_cast<std::byte*>(wr.sges[i].addr), remote, wr.sges[i].length);
      remote += wr.sges[i].length;
    }
  } else if (wr.sge_count == 1 && total <= 64 && total % 8 == 0 && reinterpret_cast<std::uintptr_t>(remote) % 8 == 0) {
    // Words appear whole and in the order of their addresses: control words written so need no further protocol.
    for (std::uint64_t i = 0; i < total; i += 8) {
      std::uint64_t word;
      std::memcpy(&word, wr.sges[0].addr + i, sizeof word);
      at<std::atomic<std::uint64_t>>(remote + i)->store(word, std::memory_order_release);
    }
  } else {
    for (unsigned i = 0; i < wr.sge_count; ++i) {
      copy_piece(remote, wr.sges[i].addr, wr.sges[i].length);
      remote += wr.sges[i].length;
    }
  }
  leave_window();
  if (wr.flags & kSignalled) push_send(wr, WcStatus::success, static_cast<std::uint32_t>(total));
  if (!read && (wr.flags & kSolicited)) wake_if_armed();
  return Post::ok;
}

/// Nobody waits for the end of it: what is read is dropped if the owner has withdrawn the region meanwhile, or shut us out.
__attribute__((noinline)) Post ShmQp::read_program(const SendWr& wr, std::uint32_t total) noexcept {
  const auto rkey = static_cast<std::uint32_t>(wr.rkey);
  MrEntry& entry = at<MrEntry>(peer_base_ + kMrOffset)[rkey & (kMrCapacity - 1)];
  std::uint64_t taken = entry.taken.load(std::memory_order_acquire);
  const auto is_there = [&] { return static_cast<std::uint32_t>(taken >> 32) == rkey; };
  const std::uint64_t base = entry.base.load(std::memory_order_relaxed);
  const std::uint64_t length = entry.bytes.load(std::memory_order_relaxed);
  const auto access = static_cast<Access>(entry.access.load(std::memory_order_relaxed));
  if (peer_page_->closed.load(std::memory_order_relaxed) != 0) return fail_send(wr, WcStatus::retry_exceeded);
  std::uint32_t bytes = 0;
  if (is_there()) {
    const bool within = wr.remote_addr >= base && wr.remote_addr - base <= length && total <= length - (wr.remote_addr - base);
    if (!within || !allows(access, Access::remote_read)) {
      taken = entry.taken.load(std::memory_order_acquire);
      if (is_there()) return fail_send(wr, WcStatus::remote_access_error);
    } else {
      bytes = pd_.link().reader.read({wr.sges, wr.sge_count}, wr.remote_addr, total);
    }
  }
  do {
    if (!is_there()) bytes = 0;
  } while (bytes != 0 &&
           !entry.taken.compare_exchange_weak(
               taken, taken_word(rkey, static_cast<std::uint32_t>(taken) + std::min(bytes, ~static_cast<std::uint32_t>(taken))),
               std::memory_order_acq_rel));
  if (peer_page_->closed.load(std::memory_order_acquire) != 0) return fail_send(wr, WcStatus::retry_exceeded);
  if (wr.flags & kSignalled) push_send(wr, WcStatus::success, bytes);
  return Post::ok;
}

inline void ShmQp::push_send(const SendWr& wr, WcStatus status, std::uint32_t bytes) noexcept {
  const std::uint32_t tail = send_tail_.load(std::memory_order_relaxed);
  send_ring_[tail & send_mask_] =
      Wc{.wr_id = wr.wr_id, .status = status, .opcode = static_cast<WcOpcode>(wr.opcode), .byte_len = bytes, .qpn = qpn_};
  send_tail_.store(tail + 1, std::memory_order_release);
  send_cq_->announce_local();
}
static_assert(static_cast<int>(WcOpcode::send) == static_cast<int>(WrOpcode::send) &&
              static_cast<int>(WcOpcode::rdma_write) == static_cast<int>(WrOpcode::rdma_write) &&
              static_cast<int>(WcOpcode::rdma_read) == static_cast<int>(WrOpcode::rdma_read));

/// The request completes with an error and the QP goes to error. The ring has one place more than send_depth for this.
__attribute__((noinline, cold)) Post ShmQp::fail_send(const SendWr& wr, WcStatus status) noexcept {
  leave_window();
  push_send(wr, status, 0);
  enter_error();
  return Post::ok;
}

__attribute__((noinline, cold)) void ShmQp::ring_peer() noexcept {
  const std::uint32_t bits = peer_page_->armed.exchange(0, std::memory_order_acq_rel);
  if (pd_.device().process_id() == maker_) {  // a fork's child promises nothing of what its parent does
    if (fenced_sends_ == 0) page_->fences.store(1, std::memory_order_release);  // behind the message
    fenced_sends_ = kFencedSends;
  }
  if (bits & kWakeWord) {
    peer_page_->wake_word.fetch_add(1, std::memory_order_acq_rel);
    sys::call(SYS_futex, sys::arg(&peer_page_->wake_word), FUTEX_WAKE, INT_MAX);
  }
  // Not left out when the peer has just been rung for another Cq: several threads of the peer may sleep on one bell, and only one
  // of them wakes for an edge. Each armed Cq rings for itself.
  if (bits & kWakeChannel) pd_.link().bell.ring();
}

// ---- receiving ----

void ShmQp::expect_next() noexcept {
  expect_.store(flag_sequence(consumed_ + 1), std::memory_order_relaxed);
  const auto* flag = consumed_ == posted_ ? &kNothingPosted : flag_of(slots_[consumed_ & recv_mask_].addr);
  next_flag_.store(flag, std::memory_order_relaxed);
}

Post ShmQp::post_recv(std::span<const RecvWr> wrs) noexcept {
  if (SHM_UNLIKELY(state_ == QpState::error)) return Post::qp_error;
  if (SHM_UNLIKELY(posted_ - consumed_ + wrs.size() > std::uint64_t{recv_mask_} + 1)) return Post::queue_full;
  const OwnSegment& own = *pd_.link().own;
  const bool idle = consumed_ == posted_;
  for (const RecvWr& wr : wrs) {
    const bool usable = (reinterpret_cast<std::uintptr_t>(wr.addr) & 7) == 0 &&
                        own.contains(wr.addr - sizeof(std::uint64_t), wr.length + sizeof(std::uint64_t));
    assert(usable && "a receive buffer lies in an extent, with room for the prefix");
    if (SHM_UNLIKELY(!usable)) return Post::qp_error;
  }
  for (const RecvWr& wr : wrs) {
    const std::uint64_t index = posted_ & recv_mask_;
    Slot& slot = slots_[index];
    // The flag still holds an older message's number, or what the owner kept there: only a false match must go.
    std::atomic<std::uint64_t>* flag = flag_of(wr.addr);
    if (SHM_UNLIKELY((flag->load(std::memory_order_relaxed) >> 32) == flag_sequence(posted_ + 1)))
      flag->store(0, std::memory_order_relaxed);
    // An unchanged entry is not written again: the sender's cached copy of the line stays valid.
    if (slot.addr != wr.addr || slot.bytes != wr.length) {
      slot.addr = wr.addr;
      slot.bytes = wr.length;
      page_->rq[index].offset.store(static_cast<std::uint64_t>(wr.addr - own.base()), std::memory_order_relaxed);
      page_->rq[index].bytes.store(wr.length, std::memory_order_relaxed);
    }
    slot.wr_id = wr.wr_id;
    ++posted_;
  }
  page_->posted.store(posted_, std::memory_order_release);
  if (idle) expect_next();
  return Post::ok;
}

inline unsigned ShmQp::poll_recv(Wc* out, unsigned room) noexcept {
  unsigned n = 0;
  while (n < room) {
    const std::uint64_t word = next_flag_.load(std::memory_order_relaxed)->load(std::memory_order_acquire);
    if (static_cast<std::uint32_t>(word >> 32) != expect_.load(std::memory_order_relaxed)) break;
    const Slot& slot = slots_[consumed_ & recv_mask_];
    const auto bytes = static_cast<std::uint32_t>(word);
    ++consumed_;
    expect_next();
    if (SHM_UNLIKELY(bytes > slot.bytes)) {
      out[n++] =
          Wc{.wr_id = slot.wr_id, .status = WcStatus::local_length_error, .opcode = WcOpcode::recv, .byte_len = 0, .qpn = qpn_};
      enter_error();
      break;
    }
    out[n++] = Wc{.wr_id = slot.wr_id, .status = WcStatus::success, .opcode = WcOpcode::recv, .byte_len = bytes, .qpn = qpn_};
  }
  if (SHM_UNLIKELY(flushing_.load(std::memory_order_relaxed))) n += flush_recv(out + n, room - n);
  return n;
}

/// In error, after the messages that arrived before: every receive that is left.
__attribute__((noinline, cold)) unsigned ShmQp::flush_recv(Wc* out, unsigned room) noexcept {
  unsigned n = 0;
  for (; n < room && consumed_ != posted_; ++consumed_)
    out[n++] = Wc{.wr_id = slots_[consumed_ & recv_mask_].wr_id,
                  .status = WcStatus::flushed,
                  .opcode = WcOpcode::recv,
                  .byte_len = 0,
                  .qpn = qpn_};
  expect_next();
  if (consumed_ == posted_) flushing_.store(false, std::memory_order_relaxed);
  return n;
}

inline unsigned ShmQp::poll_send(Wc* out, unsigned room) noexcept {
  std::uint32_t head = send_head_.load(std::memory_order_relaxed);
  const std::uint32_t tail = send_tail_.load(std::memory_order_acquire);
  unsigned n = 0;
  while (n < room && head != tail) out[n++] = send_ring_[head++ & send_mask_];
  send_head_.store(head, std::memory_order_relaxed);
  return n;
}

// ---- the Cq ----

unsigned ShmCq::poll_from(std::size_t first, std::span<Wc> out) noexcept {
  unsigned n = 0;
  const auto room = static_cast<unsigned>(out.size());
  for (std::size_t i = 0; i < qps_.size() && n < room; ++i) {
    ShmQp& qp = *qps_[(first + i) % qps_.size()];
    if (qp.sends_into(this)) n += qp.poll_send(out.data() + n, room - n);
    if (qp.receives_into(this) && n < room) n += qp.poll_recv(out.data() + n, room - n);
  }
  return n;
}

unsigned ShmCq::poll(std::span<Wc> out) noexcept {
  if (SHM_LIKELY(qps_.size() == 1)) {
    ShmQp& qp = *qps_[0];
    const auto room = static_cast<unsigned>(out.size());
    unsigned n = 0;
    if (qp.sends_into(this) && qp.send_ready()) n = qp.poll_send(out.data(), room);
    if (qp.receives_into(this)) n += qp.poll_recv(out.data() + n, room - n);
    return n;
  }
  if (qps_.empty()) return 0;
  next_ = (next_ + 1) % qps_.size();
  return poll_from(next_, out);
}

bool ShmCq::maybe_ready() const noexcept {
  for (const ShmQp* qp : qps_)
    if ((qp->receives_into(this) && qp->recv_ready()) || (qp->sends_into(this) && qp->send_ready())) return true;
  return false;
}

void ShmCq::arm(std::uint8_t wake) noexcept {
  const auto bits = static_cast<std::uint8_t>(armed_.load(std::memory_order_relaxed) | wake);
  armed_.store(bits, std::memory_order_relaxed);
  // A plain store may bring back a bit that the peer has just taken: it rings once more than needed.
  for (ShmQp* qp : qps_)
    if (qp->receives_into(this)) qp->page().armed.store(bits, std::memory_order_release);
  std::atomic_thread_fence(std::memory_order_seq_cst);
  for (const ShmQp* qp : qps_)
    if (qp->receives_into(this) && !qp->peer_fences()) barrier_due = true;
}

bool ShmCq::take_barrier_due() noexcept { return std::exchange(barrier_due, false); }

void ShmCq::disarm() noexcept {
  armed_.store(0, std::memory_order_relaxed);
  for (ShmQp* qp : qps_)
    if (qp->receives_into(this)) qp->page().armed.store(0, std::memory_order_relaxed);
}

}  // namespace rdma::shm
