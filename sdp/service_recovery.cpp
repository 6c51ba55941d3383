// The service thread's part in the recovery of failed lanes: who has failed is found, both processes tell each other how far the
// lane had come, and streams go on. A lane is known to both by its key (peer_link.hpp).
#include <sys/poll.h>

#include <algorithm>

#include "rdma_core/base/clock.hpp"
#include "rdma_core/base/log.hpp"
#include "rdma_core/base/sys.hpp"
#include "sdp/service.hpp"

namespace sdp {

namespace sys = rdma::sys;
using Kind = PeerLinks::Kind;

namespace {
constexpr std::int64_t kSecondNs = 1'000'000'000;
std::int64_t now_ns() noexcept { return rdma::SteadyClock{}.now(); }
}  // namespace

void Service::open_links() {
  links_ = std::make_unique<PeerLinks>();
  links_->on_message = [this](const PeerLinks::Message& message) { on_link_message(message); };
  links_->on_lost = [this](const PeerLinks::Key& key) { on_link_lost(key); };
}

/// Passive: where the peer may call us about this lane. Lanes of the software device never need it.
LaneReply Service::reply_for(Handshake& h) {
  LaneReply reply;
  reply.proposal = h.lane->proposal();
  if (!h.lane->unordered()) return reply;
  reply.port = links_->port_at(rdma::cm::IpAddress::from(h.anchor.local));
  if (reply.port == 0) return reply;
  h.key = reply.key = PeerLinks::new_key();
  h.may_recover = true;
  links_->announce(h.key);
  return reply;
}

void Service::take_reply(Handshake& h, const LaneReply& reply) {
  if (!h.lane->unordered() || reply.port == 0) return;
  h.key = reply.key;
  h.may_recover = true;
  links_->connect(h.key, rdma::cm::IpAddress::from(h.anchor.remote).with_port(reply.port));
}

/// The stream's lock is held.
void Service::begin_watch(const Handshake& h) {
  if (!h.may_recover) return;
  Watched w;
  w.stream = h.stream;
  w.lane = h.lane;
  w.since_ns = w.up_ns = now_ns();
  watched_[h.key] = w;
  key_of_[h.lane] = h.key;
  if (links_->has_link(h.key)) h.stream->recovery.store(Recovery::possible);
}

/// The stream has left the lane, or is closed; the peer may still ask.
void Service::end_watch(const Lane& lane, const Arrived& last) {
  const auto key = key_of_.find(&lane);
  if (key == key_of_.end()) return;
  Watched& w = watched_.at(key->second);
  w.stream = nullptr;
  w.last = last;
}

void Service::forget_lane(const Lane& lane) {
  const auto key = key_of_.find(&lane);
  if (key == key_of_.end()) return;
  if (!resting_.contains(key->second)) links_->forget(key->second);
  watched_.erase(key->second);
  key_of_.erase(key);
}

/// A closed stream's last bytes wait for the peer to say how far it has come.
bool Service::waits_for_peer(const Lane& lane) {
  const auto key = key_of_.find(&lane);
  return key != key_of_.end() && links_->has_link(key->second) && engine::lingers_behind(&lane);
}

void Service::tend_watched() {
  const std::int64_t now = now_ns(), patience = kSecondNs * options_.lane_timeout_s;
  std::vector<PeerLinks::Key> unheard;
  for (auto& [key, w] : watched_) {
    if (w.stream != nullptr) {
      StreamImpl& s = *w.stream;
      (void)s.lock.lock();
      if (s.is_recovering() && !w.asked) {
        w.asked = links_->send({Kind::ask, key, s.arrived()});
        if (!w.asked) unheard.push_back(key);
      } else if (s.recovery.load() == Recovery::possible && s.lane == w.lane) {
        if (s.wants_peers_look.exchange(false)) ask_to_look(key, *w.lane);
        probe(key, w, now, patience);
      }
      s.lock.unlock();
    } else if (!w.asked && engine::lingers_behind(w.lane)) {
      w.lane->drain();
      if (!w.lane->dead()) continue;
      w.lane->stop();
      w.last.received = w.lane->rx_arrived();
      w.asked = links_->send({Kind::ask, key, w.last});
    }
  }
  for (const PeerLinks::Key& key : unheard) on_link_lost(key);
}

/// A probe, of what the peer has acknowledged already: it finds nothing missing, but the peer's thread looks.
void Service::ask_to_look(const PeerLinks::Key& key, const Lane& lane) {
  Arrived question;
  question.sent = lane.conn.credit().acked();
  (void)links_->send({Kind::probe, key, question});
}

/// Most paths say nothing when they fail. What was sent long ago must be there, if the peer's thread lives to say so.
void Service::probe(const PeerLinks::Key& key, Watched& w, std::int64_t now, std::int64_t patience) {
  const CreditWindow& credit = w.lane->conn.credit();
  if (w.lane->unacknowledged() == 0 || credit.acked() != w.acked) {
    w.acked = credit.acked();
    w.since_ns = now;
  } else if (now - w.since_ns > patience) {
    w.since_ns = now;
    Arrived question;
    question.sent = credit.sent();
    (void)links_->send({Kind::probe, key, question});
  }
}

void Service::on_link_message(const PeerLinks::Message& m) {
  if (const auto resting = resting_.find(m.key); resting != resting_.end()) {
    if (m.kind == Kind::again) return on_again(resting);
    if (m.kind == Kind::unknown) return on_rest_lost(resting);
  }
  const auto it = watched_.find(m.key);
  if (it == watched_.end()) {  // the handshake is not over, or was not to be
    if (m.kind == Kind::ask || m.kind == Kind::again) (void)links_->send({Kind::unknown, m.key, {}});
    return;
  }
  Watched& w = it->second;
  if (w.stream == nullptr) return on_message_when_left(w, m);
  StreamImpl& s = *w.stream;
  (void)s.lock.lock();
  if (s.lane == w.lane && s.phase.load() == Phase::final) {  // closed, and our command to forget it is still on its way
    w.last = s.arrived();
    w.last.closed = !engine::lingers_behind(w.lane);
    on_message_when_left(w, m);
    s.lock.unlock();
    return;
  }
  const bool current = s.lane == w.lane && s.phase.load() == Phase::laned;
  if (current) {
    switch (m.kind) {
      case Kind::attach:
        if (s.recovery.load() == Recovery::none) s.recovery.store(Recovery::possible);
        break;
      case Kind::ask:
      case Kind::tell:
        (void)s.begin_recovery();
        if (m.kind == Kind::ask && !w.asked) w.asked = links_->send({Kind::tell, m.key, s.arrived()});
        s.recover(m.arrived);
        break;
      case Kind::unknown:
        s.give_up_recovery();
        break;
      case Kind::probe: {
        s.lane->drain();
        Arrived answer = m.arrived;
        answer.received = s.lane->conn.credit().received();
        (void)links_->send({Kind::seen, m.key, answer});
        break;
      }
      case Kind::again:
        w.wanted = true;
        break;
      case Kind::seen:
        if (static_cast<std::int32_t>(m.arrived.sent - m.arrived.received) > 0) (void)s.begin_recovery();
        break;
    }
  }
  const Stream handle = engine::handle_of(&s);
  s.lock.unlock();
  if (!current) return;
  engine::notify(handle);
  channel_->ring();
}

/// The stream needs the lane no more, or is closed: what its peer misses may still be sent.
void Service::on_message_when_left(Watched& w, const PeerLinks::Message& m) {
  if (m.kind != Kind::ask && m.kind != Kind::tell) return;
  w.lane->stop();
  w.last.received = w.lane->rx_arrived();
  if (m.kind == Kind::ask && !w.asked) (void)links_->send({Kind::tell, m.key, w.last});
  engine::recover_lingering(w.lane, m.arrived);
}

void Service::on_link_lost(const PeerLinks::Key& key) {
  if (const auto resting = resting_.find(key); resting != resting_.end()) on_rest_lost(resting);
  const auto it = watched_.find(key);
  if (it == watched_.end() || it->second.stream == nullptr) return;
  StreamImpl& s = *it->second.stream;
  (void)s.lock.lock();
  if (s.is_recovering())
    s.give_up_recovery();
  else if (s.recovery.load() == Recovery::possible)
    s.recovery.store(Recovery::none);  // the lane is as it was
  const Stream handle = engine::handle_of(&s);
  s.lock.unlock();
  engine::notify(handle);
  channel_->ring();
}

/// The device goes, and nothing of it may be left on it: the stream goes on with what is left of its lane, or without one. False:
/// not yet, a thread waits on it or is closing it.
bool Service::outlive(StreamImpl* s) {
  (void)s->lock.lock();
  bool goes_on = s->phase.load() == Phase::laned && (s->is_recovering() || s->is_recovered() || s->begin_recovery());
  if (!goes_on && s->phase.load() == Phase::laned && s->lane_is_left()) {  // what the peer has sent is here
    s->lane->stop();
    if (s->stats != nullptr) s->stats->set_reason(LaneReason::device_lost);
    goes_on = true;
  }
  s->state_edges.fetch_add(1);  // who waits comes and looks
  s->lane->wake_sleepers();
  Lane* const left = goes_on && !s->is_through() && s->waiters == 0 ? leave_behind(s->lane) : nullptr;
  const bool waits = s->changes_lane = s->waiters != 0;
  if (left != nullptr) {
    retire(nullptr, s->lane, s->conn, true);
    streams_by_conn_.erase(s->conn);
    s->conn = 0;
    s->lane = left;
    s->published_lane.store(left, std::memory_order_seq_cst);
  }
  s->lock.unlock();
  return left != nullptr || (!waits && detach(s));
}

/// Likewise of a closed stream, whose last bytes may wait for what the peer says. laned_lock_ is held.
void Service::outlive_closed(std::size_t i) {
  if (waits_for_peer(*dying_[i].lane)) {
    dying_[i].lane->stop();
    if (Lane* const left = leave_behind(dying_[i].lane)) {
      Dying old = dying_[i];
      engine::move_lingering(old.lane, left);
      dying_[i].lane = left;
      dying_[i].conn = 0;
      if (old.stream != nullptr) old.stream->lane = left;
      old.stream = nullptr;
      old.peer_gone = true;
      dying_.push_back(old);
      return;
    }
  }
  dying_[i].peer_gone = true;
}

/// nullptr: no memory.
Lane* Service::leave_behind(const Lane* lane) {
  void* const cell = engine::lane_cell();
  Lane* const left = cell != nullptr ? lane->outlive_device(cell) : nullptr;
  if (left == nullptr && cell != nullptr) engine::free_lane_cell(cell);
  if (const auto known = key_of_.find(lane); left != nullptr && known != key_of_.end()) {
    watched_.at(known->second).lane = left;
    key_of_[left] = known->second;
    key_of_.erase(lane);
  }
  return left;
}

}  // namespace sdp
