#include "sdp/lane.hpp"

#include <unistd.h>

#include <algorithm>
#include <bit>
#include <cerrno>
#include <cstring>
#include <new>
#include <utility>

#include "rdma_core/base/clock.hpp"
#include "rdma_core/base/log.hpp"

namespace sdp {

using rdma::Result;
using rdma::Unit;

Result<Unit> Lane::open(rdma::CompletionChannel* channel) noexcept {
  PeerContext& peer = **peer_;
  device_ = peer.device;
  may_buffer_ = device_->attr().maps_peer_memory;
  unordered_ = !device_->attr().posts_arrive_at_once;
  marks_ends_ = device_->attr().mixes_messages;
  max_sge_ = device_->attr().max_sge < 8 ? device_->attr().max_sge : 8;
  may_withdraw_ = device_->attr().reads_program_memory;
  const bool reaches_programs = may_withdraw_ || (unordered_ && !may_buffer_ && !device_->attr().recv_needs_extent);
  if (limits_.zero_copy_from != 0 && reaches_programs) zero_copy_from_ = limits_.zero_copy_from;
  if (zero_copy_from_ == limits_.zero_copy_from && !may_withdraw_) {
    sink_from_ = std::max<std::size_t>(zero_copy_from_, limits_.conn.recv_size_max);
    conn.grant_pipelined();
  }
  auto words = peer.heap->allocate(sizeof(LaneBlock), 64);
  if (!words) return rdma::Err{words.error()};
  block_ = new (words->addr) LaneBlock{};
  words_ = &block_->words;
  peer_buffer_.look_at(block_->cursors);
  words_mr_view_.addr = words->mr->addr;
  words_mr_view_.remote_base = words->mr->remote_base;
  words_mr_view_.rkey = words->mr->rkey;

  rdma::QpInit init;
  init.send_depth = send_depth_ = unordered_ ? kWireDepth : kSendDepth;
  init.recv_depth =
      unordered_ ? std::bit_ceil(std::min<std::uint32_t>(limits_.recv_buffers_max + 1U, RecvQueue::kMaxBuffers)) : RecvQueue::kRing;
  init.max_inline = std::min({device_->attr().max_inline, limits_.conn.recv_size_max, unordered_ ? kWireInline : ~0U});
  auto cq = device_->create_cq(init.send_depth + init.recv_depth, channel);
  if (!cq) return rdma::Err{cq.error()};
  cq_ = cq.value().release();
  init.send_cq = cq_;
  init.recv_cq = cq_;
  auto qp = peer.pd->create_qp(init);
  if (!qp) return rdma::Err{qp.error()};
  qp_ = qp.value().release();
  max_inline_ = qp_->max_inline();
  if (max_inline_ < kLeastInline) return rdma::fail(ENOTSUP, "lane: the device takes too few bytes inline");

  return recv_.open({peer.heap.get(), peer.pd.get(), qp_, device_->attr().recv_prefix_bytes, unordered_});
}

void Lane::close() noexcept {
  if (device_ == nullptr && peer_ == nullptr) return kept_.clear();
  if (capture_ != nullptr) capture_->remove_connection(capture_conn_);
  delete qp_;
  zero_copy_.clear();
  delete cq_;
  qp_ = nullptr;
  cq_ = nullptr;
  if (block_ != nullptr) (*peer_)->heap->deallocate(reinterpret_cast<std::byte*>(block_));
  block_ = nullptr;
  words_ = nullptr;
  send_buffer_.release_all(*(*peer_)->heap);
  staging_.close(*(*peer_)->heap);
  recv_.close();
  delete peer_;
  peer_ = nullptr;
}

LaneProposal Lane::proposal() const noexcept {
  LaneProposal p;
  const std::uint64_t address =
      words_mr_view_.remote_base + static_cast<std::uint64_t>(reinterpret_cast<std::byte*>(words_) - words_mr_view_.addr);
  p.words_addr = {static_cast<std::uint32_t>(address), static_cast<std::uint32_t>(address >> 32)};
  p.words_rkey = static_cast<std::uint32_t>(words_mr_view_.rkey);
  p.shown_qpn = shown_qpn() | (device_->attr().mixes_messages ? LaneProposal::kMarksEnds : 0);
  return p;
}

void Lane::set_peer(const LaneProposal& proposal) noexcept {
  peer_words_addr_ = proposal.address();
  peer_words_rkey_ = static_cast<rdma::Rkey>(proposal.words_rkey);
  peer_shown_qpn_ = proposal.shown_qpn & LaneProposal::kQpn;
  marks_ends_ = marks_ends_ || (unordered_ && (proposal.shown_qpn & LaneProposal::kMarksEnds) != 0);
}

// Both ends of a lane of one host have one address, and often one QP number: a capture tells them apart by the process.
std::uint32_t Lane::shown_qpn() const noexcept {
  return (static_cast<std::uint32_t>(qp_->qpn()) ^ static_cast<std::uint32_t>(getpid()) << 8) & 0xffffff;
}

void Lane::capture_to(Capture* capture, const Capture::Endpoint& endpoint) noexcept {
  Capture::Endpoint full = endpoint;
  full.local_qpn = shown_qpn();
  full.remote_qpn = peer_shown_qpn_;
  capture_ = capture;
  capture_conn_ = capture->add_connection(full);
  max_sge_ = std::min(max_sge_, 2U);  // header and one piece of payload: what a capture takes
}

void Lane::send_hello(const wire::HelloHeader& addresses) noexcept {
  std::array<std::byte, wire::kHelloBytes> hello;
  conn.emit_hello(addresses, hello);
  const rdma::Sge sge{hello.data(), static_cast<std::uint32_t>(hello.size()), {}};
  post_message(&sge, 1);
}

// Never signalled: in a fork's child nobody would reap it.
void Lane::write_word(Word which, std::uint64_t value) noexcept {
  if (peer_words_addr_ == 0 || qp_ == nullptr) return;
  const std::uint64_t raw = value + 1;
  const rdma::Sge sge{reinterpret_cast<const std::byte*>(&raw), sizeof raw, {}};
  if (qp_->post_send(to_peers_block(offsetof(LaneBlock, words) + 8 * std::size_t{which}, sge, true)) == rdma::Post::ok)
    ++requests_;
  else
    dead_ = true;
}

void Lane::release_buffer() noexcept {
  if (buffered() == 0) send_buffer_.release_large(*(*peer_)->heap);
}

void Lane::rest_if_idle(std::int64_t now_ns) noexcept {
  const std::uint64_t moves = tx_messages_ + rx_arrivals_;
  if (std::exchange(idle_moves_, moves) != moves || idle_since_ == 0) {
    idle_since_ = now_ns;
    awaits_idle_ = asked_to_shrink_ = false;
    return;
  }
  if (!unordered_ || dead() || conn.state() != ConnState::established || now_ns - idle_since_ < kIdleNs) return;
  drain();
  if (dead()) return;
  recv_.may_try_again();
  // The peer may have a message that our device would still send once more: its completion counts, too.
  const bool device_is_done = !staging_.active() || staged_up_to_[reaped_ % kSendDepth] == staging_.position();
  const bool owes_ack = arrived_in_all() != told_arrived_;
  if (owes_ack) recv_.post();
  if (owes_ack && conn.credit().may_send_update()) {
    conn.want_update();
    send_control();
  }
  if (!device_is_done && !std::exchange(awaits_idle_, true)) {
    signalled_ = requests_ - kSignalEvery;  // the next request asks for a completion: a word that tells the peer nothing
    (void)write_peer(offsetof(LaneBlock, pulled), &rx_bytes_, 1, false);
  }
  if (staging_.active() && device_is_done && staging_.in_use() == 0 && held() == 0) staging_.close(*(*peer_)->heap);
  release_peers_buffers();
}

// A buffer that is posted cannot be taken back, only be used up. Who has had the peer's buffers grow says that its messages will be
// short again, and then uses them up by empty ones: each comes home at the peer and is exchanged for a small one, or not posted any
// more. Half of what the peer grants at first is left to payload.
void Lane::release_peers_buffers() noexcept {
  if (held() != 0 || is_offering() || dead()) return;
  if (!asked_to_shrink_ && conn.peer_has_grown() && !conn.resize_pending()) {
    asked_to_shrink_ = true;
    sweeps_left_ = 2 * RecvQueue::kMaxBuffers;
    cuts_ = wished_size_ = 0;
    conn.want_peer_to_shrink();
    send_control();
  }
  for (; conn.peer_shrinks() && sweeps_left_ != 0 && may_post() && conn.credit().credits() > conn.first_peer_bufs() / 2;
       --sweeps_left_) {
    std::array<std::byte, wire::kBsdhBytes> sweep;
    conn.emit_data(0, sweep.data());
    sent_[conn.credit().sent() % kMaxInFlight] = Sent{tx_bytes_, sends_, 0, 0, staging_.position()};
    const rdma::Sge sge{sweep.data(), static_cast<std::uint32_t>(sweep.size()), {}};
    if (!post_message(&sge, 1)) return;
  }
}

void Lane::stop() noexcept {
  constexpr std::int64_t kLongest = 50'000'000, kQuiet = 1'000'000;
  if (std::exchange(stopped_, true)) return;
  rdma::QpAttributes over;
  over.state = rdma::QpState::error;
  (void)qp_->modify(over);
  // What came before stands in the Cq before what is flushed now.
  const rdma::SteadyClock clock;
  const std::int64_t begun = clock.now();
  for (std::int64_t now = begun, heard = begun; now - begun < kLongest; now = clock.now()) {
    if (cq_->maybe_ready()) {
      reap();
      heard = clock.now();
    } else if (now - heard >= kQuiet && !is_reading()) {
      break;  // a look that long after the last news has found none, however late this thread was
    }
  }
  if (held() != 0) (void)close_gathered();  // one more that the peer does not acknowledge
  fail("stopped");
  leave_programs_memory();
}

bool Lane::read_back(std::uint64_t from, std::byte* out, std::size_t bytes) const noexcept {
  if (device_ == nullptr) return read_kept(from, out, bytes);
  const CreditWindow& credit = conn.credit();
  const std::uint64_t pulled = block_->pulled.load(std::memory_order_acquire);
  // Messages first, then the buffer, or what was offered: no message follows these bytes.
  const bool has_rest = !zero_copy_.rest.empty();
  const std::uint64_t by_messages = has_rest ? zero_copy_.rest_from : buffered() != 0 ? send_buffer_.front(pulled) : tx_bytes_;
  const std::size_t posted = from < by_messages ? std::min<std::uint64_t>(by_messages - from, bytes) : 0;
  std::size_t done = 0;
  // The oldest unread message is at most kMaxInFlight back; walk forward from there.
  const std::uint32_t depth = kMaxInFlight < credit.sent() ? kMaxInFlight : credit.sent();
  for (std::uint32_t mseq = credit.sent() - depth + 1; mseq != credit.sent() + 1 && done < posted; ++mseq) {
    const Sent& s = sent_[mseq % kMaxInFlight];
    const std::uint64_t want = from + done;
    if (s.payload == 0 || want < s.start || want >= s.start + s.payload) continue;
    const std::uint32_t whole = s.headers + s.payload;
    const auto msg = unordered_ ? staging_.piece(s.staged, whole + mark_bytes(whole)) : qp_->sent_message(s.number);
    if (msg.size() < whole) return false;
    const std::size_t skip = want - s.start;
    const std::size_t n = std::min<std::size_t>(s.payload - skip, posted - done);
    std::memcpy(out + done, msg.data() + s.headers + skip, n);
    done += n;
  }
  if (done != posted) return false;
  if (done == bytes) return true;
  if (!has_rest)
    send_buffer_.copy_from(from + done, out + done);
  else
    std::memcpy(out + done, zero_copy_.rest.data() + (from + done - zero_copy_.rest_from), bytes - done);
  return true;
}

}  // namespace sdp
