// The life of lanes after they are up: the service thread watches their anchors, tends what their programs do not, and gives a lane
// back when neither side needs it any more.
#include <sys/epoll.h>

#include <algorithm>
#include <mutex>
#include <utility>

#include "rdma_core/base/clock.hpp"
#include "rdma_core/base/sys.hpp"
#include "sdp/service.hpp"

namespace sdp {

namespace sys = rdma::sys;

namespace {
constexpr int kHeldMs = 1;  // that bytes are held while their program makes no call
constexpr std::int64_t kWordsMs =
    250;  // at most between two looks for words that wake nobody: of some devices, or of an idle program
}  // namespace

void Service::forget(StreamImpl* stream) noexcept {
  for (auto it = handshakes_.begin(); it != handshakes_.end();) {
    if (it->second.stream != stream) {
      ++it;
      continue;
    }
    cm_->withdraw(it->first);
    if (it->second.conn != rdma::cm::ConnId::none) cm_->disconnect(it->second.conn);
    if (it->second.may_recover) links_->forget(it->second.key);
    if (it->second.lane != nullptr) retire(nullptr, it->second.lane, 0, true);
    it = handshakes_.erase(it);
  }
  end_rest(resting_of(stream));
  seekers_.erase(stream);
  if (stream->lane == nullptr) {
    const std::lock_guard guard(laned_lock_);
    std::erase(laned_, stream);
    return engine::free_stream(stream);
  }
  (void)stream->lock.lock();
  if (stream->phase.load() == Phase::laned) {  // closed in a signal handler, under the hands of its own thread
    if (!stream->has_said_end()) stream->end_tx_locked();
    stream->lane->write_word(kGone, 0);
    stream->phase.store(Phase::final, std::memory_order_seq_cst);
    stream->lane->wake_sleepers();
  }
  stream->lock.unlock();
  Arrived last = stream->arrived();
  last.closed = !engine::lingers_behind(stream->lane);
  end_watch(*stream->lane, last);
  retire(stream, stream->lane, stream->conn, stream->peer_gone);
  const std::lock_guard guard(laned_lock_);
  std::erase(laned_, stream);
}

void Service::retire(StreamImpl* stream, Lane* lane, std::uint64_t conn, bool peer_gone) noexcept {
  const std::lock_guard guard(laned_lock_);
  dying_.push_back({stream, lane, conn, peer_gone, engine::grace().epoch()});
}

// FIN, RST or bytes on an anchor beside its lane: whoever sleeps on the lane must look.
void Service::on_anchor(StreamImpl* stream) noexcept {
  if (std::find(laned_.begin(), laned_.end(), stream) == laned_.end()) return;
  stream->anchor_event.store(true, std::memory_order_release);
  tend(stream);
}

void Service::tend(StreamImpl* stream) noexcept {
  (void)stream->lock.lock();
  if (stream->lane != nullptr && stream->phase.load() == Phase::laned) {
    stream->tend();
    stream->lane->wake_sleepers();
  }
  stream->lock.unlock();
  channel_->ring();
}

// Lanes that are over on both sides: the stream forgets its lane; memory goes back when the peer writes no more.
void Service::look_after_lanes() noexcept {
  needs_looks_ = false;
  const std::int64_t now = rdma::SteadyClock{}.now();
  for (std::size_t i = 0; i < laned_.size();) {
    StreamImpl* s = laned_[i];
    bool gone = false;
    const Stream handle = engine::handle_of(s);
    (void)s->lock.lock();
    s->tend();
    wake_for_words(*s);
    if (s->lane != nullptr && s->lane->unordered() && s->phase.load() == Phase::laned) s->lane->rest_if_idle(now);
    needs_looks_ = needs_looks_ || s->needs_looks();
    const Arrived last = s->lane != nullptr ? s->arrived() : Arrived{};
    const std::uint64_t conn = s->conn;
    const bool peer_gone = s->peer_gone.load();
    if (Lane* const spent = s->take_spent_lane()) {
      end_watch(*spent, last);
      retire(nullptr, spent, conn, peer_gone);
      if (s->watched) sys::call(SYS_epoll_ctl, epoll_fd_, EPOLL_CTL_DEL, s->fd, 0);
      s->watched = false;
      streams_by_conn_.erase(conn);
      if (s->phase.load() == Phase::resting) rest(*s, *spent);
      gone = true;
    }
    s->lock.unlock();
    if (gone) {
      engine::notify(handle);
      const std::lock_guard guard(laned_lock_);
      laned_[i] = laned_.back();
      laned_.pop_back();
    } else {
      ++i;
    }
  }
  for (std::size_t i = 0; i < dying_.size();) {
    Dying& d = dying_[i];
    const bool waiters = d.stream != nullptr && d.stream->waiters != 0;
    if (d.lane->unordered() && !d.lane->dead()) d.lane->drain();
    if (waiters || !(d.peer_gone || d.lane->is_left_alone()) || waits_for_peer(*d.lane) || !engine::grace().passed(d.epoch)) {
      ++i;
      continue;
    }
    if (d.conn != 0) {
      streams_by_conn_.erase(d.conn);
      cm_->disconnect(static_cast<rdma::cm::ConnId>(d.conn));
    }
    const Dying over = d;
    {
      const std::lock_guard guard(laned_lock_);
      dying_[i] = dying_.back();
      dying_.pop_back();
    }
    engine::release_lingering(over.lane);
    forget_lane(*over.lane);
    over.lane->close();
    engine::free_lane_cell(over.lane);
    if (over.stream != nullptr) engine::free_stream(over.stream);
  }
}

// PREPARE and READY follow soon after a lane is up, and a program may be asleep until they are seen: the next look is due when as
// much time again has passed since then.
int Service::next_words_ms() const noexcept {
  return static_cast<int>(std::clamp<std::int64_t>((rdma::SteadyClock{}.now() - last_lane_up_ns_) / 1'000'000, 1, kWordsMs));
}

// Not every device wakes a sleeper for a word. Where it does, the sleeper has seen it long ago.
void Service::wake_for_words(StreamImpl& s) noexcept {
  if (s.lane == nullptr || !s.lane->unordered()) return;
  const std::uint8_t words = s.lane->words_said();
  if (std::exchange(s.words_seen, words) == words) return;
  s.lane->wake_sleepers();
  channel_->ring();
}

// A large send buffer is for the moment in which a reader is far behind. This thread looks now and then whether that is over.
void Service::release_buffers() noexcept {
  if (!releasing_.exchange(false, std::memory_order_seq_cst)) return;
  bool left = false;
  for (StreamImpl* s : laned_) {
    if (!s->has_large_buffer.load(std::memory_order_seq_cst)) continue;
    (void)s->lock.lock();
    const bool empty = s->lane == nullptr || s->lane->buffered() == 0;
    if (empty) {
      if (s->lane != nullptr) s->lane->release_buffer();
      s->has_large_buffer.store(false, std::memory_order_seq_cst);
    }
    left = left || !empty;
    s->lock.unlock();
  }
  if (left) releasing_.store(true, std::memory_order_seq_cst);
}

// What small sends have left to wait for company goes after a moment also if their program makes no call. -1: nobody holds any;
// else when to look again.
int Service::tend_held() noexcept {
  if (!holding_.load(std::memory_order_relaxed)) return -1;
  const std::int64_t now = rdma::SteadyClock{}.now();
  if (held_due_ns_ == 0) held_due_ns_ = now + kHeldMs * 1'000'000;
  if (now >= held_due_ns_) {
    held_due_ns_ = 0;
    holding_.store(false, std::memory_order_seq_cst);  // before the looks: who holds more after them says so again
    if (!flush_held()) return -1;
    // The next are likely to follow. Had it to be said of each, that would cost what holding them saves.
    holding_.store(true, std::memory_order_seq_cst);
    held_due_ns_ = now + kHeldMs * 1'000'000;
  }
  return kHeldMs;
}

/// False: there was nothing that could go.
bool Service::flush_held() noexcept {
  bool gone = false;
  held_back_ = false;
  for (StreamImpl* s : laned_) {
    if (s->lane == nullptr || s->lane->held() == 0) continue;
    (void)s->lock.lock();
    if (s->lane != nullptr && s->phase.load() == Phase::laned && s->tx.load() == TxState::lane) {
      s->lane->drain();
      bool left = !s->lane->flush();
      if (left && s->waiters == 0) {  // else a thread waits for the peer and takes in what it says
        s->lane->arm(rdma::kWakeChannel);
        s->lane->drain();
        left = !s->lane->flush();
        held_back_ = held_back_ || left;
      }
      gone = gone || !left;
    }
    s->lock.unlock();
  }
  return gone;
}

bool Service::ends_are_seen() noexcept {
  if (!had_unordered_lane_.load(std::memory_order_acquire)) return true;
  if (inbox_.load(std::memory_order_acquire) != nullptr) return false;  // closed a moment ago
  const auto seen = [](const Lane& lane) { return !lane.unordered() || lane.said(kEndSeen) || lane.said(kGone) || lane.dead(); };
  const Grace::Look look(engine::grace());
  const std::lock_guard guard(laned_lock_);
  return std::all_of(laned_.begin(), laned_.end(),
                     [&](const StreamImpl* s) {
                       const Lane* const lane = s->published_lane.load(std::memory_order_acquire);
                       return lane == nullptr || s->peer_gone.load() || (seen(*lane) && !s->is_recovering());
                     }) &&
         std::all_of(dying_.begin(), dying_.end(), [&](const Dying& d) { return d.peer_gone || seen(*d.lane); });
}

bool Service::stop_at_exit() noexcept {
  const std::lock_guard guard(laned_lock_);
  bool all = true;
  for (StreamImpl* s : laned_) {
    if (s->gone_is_said) continue;
    if (!s->lock.try_lock()) {
      all = all && s->lock.held_by_me();  // exit() in a handler that interrupted this thread inside: nothing can be said
      continue;
    }
    if (s->lane != nullptr && s->phase.load() == Phase::laned) {
      s->tend();
      if (!s->has_said_end()) s->end_tx_locked();
      s->unguard_resend();
      (void)s->reset_if_unread(s->fd, nullptr);  // by the kernel, when the process is gone
      if (!s->resend.empty()) engine::linger(s->fd, s->resend.take(), s->end_is_settled() ? nullptr : s->lane);
      s->lane->write_word(kGone, 0);
      s->gone_is_said = true;
    }
    s->lock.unlock();
  }
  return all;
}

}  // namespace sdp
