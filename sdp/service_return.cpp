// The service thread's part in the return of lanes: streams that have left a failed lane without a loss rest, and from time to time
// both ends look for a new one. The two processes' own connection (peer_link.hpp) says when, so that they do it at the same time:
// the side that has connected asks, at its pace (return_pace.hpp), and offers when it is answered; the side that has accepted dials
// as it answers. Without that connection the stream stays with TCP.
//
// A stream whose first search was in vain has no such connection: both ends look again at times of their own (second_looks.hpp),
// if there is reason to believe that the peer speaks SDP.
#include <sys/socket.h>

#include <algorithm>
#include <cstdint>
#include <vector>

#include "rdma_core/base/clock.hpp"
#include "rdma_core/base/log.hpp"
#include "rdma_core/base/sys.hpp"
#include "sdp/service.hpp"

namespace sdp {

namespace sys = rdma::sys;
using Kind = PeerLinks::Kind;

namespace {
constexpr std::int64_t kSecondNs = 1'000'000'000;
constexpr std::int64_t kAnswerNs = 5 * kSecondNs;  // the peer's program may not have read the failed lane to its end yet
constexpr std::int64_t kLeastNs = kSecondNs / 2;   // between two attempts of one stream, however often the peer asks
constexpr std::int64_t kNever = INT64_MAX;

std::int64_t now_ns() noexcept { return rdma::SteadyClock{}.now(); }

/// Neither half is over: there may be bytes for a lane.
bool may_carry(int fd) noexcept {
  const AnchorCounts counts = anchor_counts(fd);
  return counts.ok && (counts.may_send || !counts.has_end);
}

/// Another search may end better.
bool may_pass(LaneReason why) noexcept {
  switch (why) {
    case LaneReason::other_host:  // a device or an address that is not there now
    case LaneReason::no_peer:
    case LaneReason::too_late:
    case LaneReason::refused:
    case LaneReason::no_resources:
    case LaneReason::peer_gone:
    case LaneReason::device_lost:
      return true;
    default:
      return false;
  }
}
}  // namespace

/// The stream's lane is spent; the stream's lock is held.
void Service::rest(StreamImpl& s, const Lane& spent) {
  const auto known = key_of_.find(&spent);
  sockaddr_storage there{};
  socklen_t size = sizeof there;
  const bool has_peer = sys::call(SYS_getpeername, s.fd, sys::arg(&there), sys::arg(&size)) == 0;
  if (known == key_of_.end() || !links_->has_link(known->second) || !has_peer)
    return s.phase.store(Phase::final, std::memory_order_release);
  const Watched& w = watched_.at(known->second);
  Resting& r = resting_[known->second];
  r.stream = &s;
  r.peer = rdma::cm::IpAddress::from(there).with_port(0);
  r.wanted = w.wanted;
  const std::int64_t now = now_ns();
  std::erase_if(paces_, [now](const auto& each) { return each.second.is_idle(now); });
  paces_[r.peer].on_lane_lost(now, now - w.up_ns);
  if (s.stats != nullptr) s.stats->will_look.store(true, std::memory_order_relaxed);
  returns_due_ns_ = 0;
}

Service::RestingAt Service::resting_of(const StreamImpl* stream) {
  return std::ranges::find_if(resting_, [stream](const auto& each) { return each.second.stream == stream; });
}

/// The stream needs no other lane any more, or is gone.
void Service::end_rest(RestingAt at) {
  if (at == resting_.end()) return;
  if (at->second.step != Resting::Step::idle) paces_[at->second.peer].give_up();
  if (!watched_.contains(at->first)) links_->forget(at->first);
  resting_.erase(at);
  returns_due_ns_ = 0;
}

void Service::on_return(StreamImpl* stream) {
  seekers_.erase(stream);
  const auto at = resting_of(stream);
  if (at == resting_.end()) return;
  paces_[at->second.peer].succeed();
  at->second.step = Resting::Step::idle;
  end_rest(at);
}

/// The search is over without a lane; the stream's lock is held. False: the stream does not rest.
bool Service::rest_again(StreamImpl& s, LaneReason why) {
  const auto at = resting_of(&s);
  if (at == resting_.end() || why == LaneReason::exec || why == LaneReason::credentials || why == LaneReason::io_uring)
    return false;
  s.phase.store(Phase::resting, std::memory_order_release);
  const bool is_path = why == LaneReason::no_peer || why == LaneReason::other_host || why == LaneReason::peer_gone;
  if (s.stats != nullptr) s.stats->set_reason(is_path ? LaneReason::device_lost : why, true);
  paces_[at->second.peer].fail(now_ns());
  at->second.step = Resting::Step::idle;
  returns_due_ns_ = 0;
  return true;
}

void Service::look_for_lane(const PeerLinks::Key& key, Resting& r) {
  StreamImpl& s = *r.stream;
  r.step = Resting::Step::looking;
  r.wanted = false;
  r.tried_ns = now_ns();
  returns_due_ns_ = 0;
  if (!pursue_again(s)) return;
  if (s.role == Role::acceptor) (void)links_->send({Kind::again, key, {}});
  begin(&s, s.generation.load());
}

/// False: the stream needs no lane any more, or has been taken down.
bool Service::pursue_again(StreamImpl& s) {
  (void)s.lock.lock();
  Phase expected = Phase::resting;
  const bool useful = s.names_us(s.fd) && may_carry(s.fd);
  const bool begins = s.phase.compare_exchange_strong(expected, useful ? Phase::pursued : Phase::final) && useful;
  if (s.stats != nullptr && begins) s.stats->looks_again.add(1);
  if (s.stats != nullptr && !useful) s.stats->will_look.store(false, std::memory_order_relaxed);
  s.lock.unlock();
  return begins;
}

/// The peer asks for another lane, or answers that it is about to look for one.
void Service::on_again(RestingAt at) {
  Resting& r = at->second;
  if (r.stream->role == Role::acceptor) {
    r.wanted = true;
    returns_due_ns_ = 0;
    return;
  }
  if (r.step == Resting::Step::idle && now_ns() - r.tried_ns >= kLeastNs) {  // unasked: there is news on its side
    paces_[r.peer].hurry();
    paces_[r.peer].begin();
  } else if (r.step != Resting::Step::asked) {
    return;
  }
  look_for_lane(at->first, r);
}

void Service::on_rest_lost(RestingAt at) {
  Phase expected = Phase::resting;
  at->second.stream->phase.compare_exchange_strong(expected, Phase::final);
  if (ConnStats* stats = at->second.stream->stats) stats->will_look.store(false, std::memory_order_relaxed);
  end_rest(at);
}

/// A device has come: the one that failed, perhaps. Of the peer's side nobody knows, so one stream for each host asks it.
void Service::hurry_returns() {
  for (auto& [peer, pace] : paces_) pace.hurry();
  std::vector<rdma::cm::IpAddress> told;
  for (auto& [key, r] : resting_) {
    if (r.stream->role != Role::acceptor || std::ranges::find(told, r.peer) != told.end()) continue;
    r.wanted = true;
    told.push_back(r.peer);
  }
  returns_due_ns_ = 0;
}

/// What is due; when to look again, in milliseconds. -1: not for that.
int Service::tend_returns() {
  while (!resting_.empty() && returns_due_ns_ <= now_ns()) tend_resting();
  if (resting_.empty() || returns_due_ns_ == kNever) return -1;
  return static_cast<int>(std::clamp<std::int64_t>((returns_due_ns_ - now_ns()) / 1'000'000 + 1, 1, 60'000));
}

void Service::tend_resting() {
  const std::int64_t now = now_ns();
  returns_due_ns_ = kNever;
  if (thread_.load() != Thread::fresh || leavers_.load() != 0) {
    returns_due_ns_ = now + ReturnPace::kLongest;
    return;
  }
  const auto due_at = [this](std::int64_t when) { returns_due_ns_ = std::min(returns_due_ns_, when); };
  std::map<rdma::cm::IpAddress, RestingAt> next;  // of those that wait, who has waited the longest
  RestingAt answers = resting_.end();
  for (auto at = resting_.begin(); at != resting_.end();) {
    const auto here = at++;
    Resting& r = here->second;
    const Phase phase = r.stream->phase.load();
    if (phase != Phase::resting && phase != Phase::pursued) {  // taken down meanwhile
      end_rest(here);
      continue;
    }
    if (r.step == Resting::Step::asked && now - r.tried_ns >= kAnswerNs) {
      r.step = Resting::Step::idle;
      paces_[r.peer].fail(now);
    }
    if (r.step == Resting::Step::asked) due_at(r.tried_ns + kAnswerNs);
    if (r.step != Resting::Step::idle) continue;
    if (r.stream->role == Role::acceptor) {
      if (r.wanted && now - r.tried_ns >= kLeastNs)
        answers = here;
      else if (r.wanted)
        due_at(r.tried_ns + kLeastNs);
    } else if (const auto [first, fresh] = next.emplace(r.peer, here); !fresh && r.tried_ns < first->second->second.tried_ns) {
      first->second = here;
    }
  }
  for (auto& [peer, at] : next) {
    ReturnPace& pace = paces_[peer];
    if (pace.may_begin(now)) {
      pace.begin();
      at->second.step = Resting::Step::asked;
      at->second.tried_ns = now;
      (void)links_->send({Kind::again, at->first, {}});
      due_at(now);  // there may be room for another
    } else if (pace.has_room()) {
      due_at(pace.due());
    }
  }
  if (answers == resting_.end()) return;
  paces_[answers->second.peer].begin();
  look_for_lane(answers->first, answers->second);
}

// --- streams whose first search was in vain

/// What one program of a host serves, or is served by, is likely to speak what the others of that service speak.
rdma::cm::IpAddress Service::service_of(const Handshake& h) noexcept {
  const auto near = rdma::cm::IpAddress::from(h.anchor.local), far = rdma::cm::IpAddress::from(h.anchor.remote);
  return far.with_port(h.active ? near.port : far.port);
}

/// There a look costs next to nothing, and a peer that a busy machine keeps from looking in time is only late.
bool Service::is_on_this_host(const Handshake& h) noexcept {
  const auto near = rdma::cm::IpAddress::from(h.anchor.local), far = rdma::cm::IpAddress::from(h.anchor.remote);
  return near.same_host(far) || (near.is_loopback() && far.is_loopback());
}

void Service::remember_speaker(const Handshake& h) {
  constexpr std::size_t kMany = 1024;
  if (speakers_.size() >= kMany) speakers_.clear();
  speakers_.insert(service_of(h));
}

/// The search is over without a lane; the stream's lock is held. False: that is final.
bool Service::seek_again(const Handshake& h, LaneReason why) {
  StreamImpl& s = *h.stream;
  const auto known = seekers_.find(&s);
  if (h.answered) remember_speaker(h);
  const bool may_speak = h.answered || known != seekers_.end() || speakers_.contains(service_of(h)) || is_on_this_host(h);
  if (!may_speak || !may_pass(why) || s.strict.load() || s.lane_was_up.load()) return false;
  const auto at = known != seekers_.end() ? known : seekers_.emplace(&s, Seeker{service_of(h), SecondLooks(h.begun_ns)}).first;
  if (!at->second.looks.failed(h.answered)) return false;
  at->second.due_ns = at->second.looks.after(now_ns());
  s.phase.store(Phase::resting, std::memory_order_release);
  if (s.stats != nullptr) s.stats->set_reason(why, true);
  return true;
}

/// As tend_returns().
int Service::tend_seekers() {
  if (seekers_.empty()) return -1;
  const std::int64_t now = now_ns();
  if (thread_.load() != Thread::fresh || leavers_.load() != 0) return 1000;
  std::int64_t next = kNever;
  std::map<rdma::cm::IpAddress, unsigned> looking;
  std::vector<StreamImpl*> due;
  std::erase_if(seekers_, [&](auto& each) {
    const Phase phase = each.first->phase.load();
    if (phase == Phase::pursued) ++looking[each.second.service];
    if (phase == Phase::resting && each.second.due_ns <= now) due.push_back(each.first);
    return phase != Phase::pursued && phase != Phase::resting;  // taken down meanwhile
  });
  for (StreamImpl* stream : due) {
    Seeker& seeker = seekers_.at(stream);
    seeker.due_ns = seeker.looks.after(now);
    if (looking[seeker.service]++ < SecondLooks::kMost && pursue_again(*stream)) begin(stream, stream->generation.load());
  }
  for (const auto& [stream, seeker] : seekers_) next = std::min(next, seeker.due_ns);
  return static_cast<int>(std::clamp<std::int64_t>((next - now) / 1'000'000 + 1, 1, 63'000));
}

}  // namespace sdp
