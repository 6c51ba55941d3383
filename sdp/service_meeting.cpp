// The service thread's part in the making of lanes: a candidate looks for its peer by the connection managers, the two exchange
// their proposals and Hello, and the stream gets the lane.
#include <linux/futex.h>
#include <sys/epoll.h>
#include <sys/socket.h>

#include <algorithm>
#include <climits>
#include <cstring>
#include <mutex>
#include <utility>
#include <vector>

#include "rdma_core/base/clock.hpp"
#include "rdma_core/base/log.hpp"
#include "rdma_core/base/sys.hpp"
#include "sdp/anchor_address.hpp"
#include "sdp/policy.hpp"
#include "sdp/room.hpp"
#include "sdp/service.hpp"
#include "sdp/socket_modes.hpp"

namespace sdp {

namespace sys = rdma::sys;
namespace cm = rdma::cm;

namespace {

// How long a connection looks for a peer that is not heard of.
constexpr unsigned kMeetMs = 3000;
// For Hello; while other lanes come up the two processes are busy, and it may take longer.
constexpr std::int64_t kHandshakeNs = 5'000'000'000, kLongestHandshakeNs = 30'000'000'000;
// A manager that was closed meanwhile says nothing any more.
constexpr std::int64_t kLongestSearchNs = 120'000'000'000;

std::int64_t now_ns() noexcept { return rdma::SteadyClock{}.now(); }

bool is_late(std::int64_t lane_since_ns, std::int64_t last_lane_up_ns) noexcept {
  const std::int64_t now = now_ns();
  return now > std::max(lane_since_ns, last_lane_up_ns) + kHandshakeNs || now > lane_since_ns + kLongestHandshakeNs;
}

Transport transport_of(const rdma::DeviceAttr& attr) noexcept {
  if (attr.link_layer == rdma::LinkLayer::memory) return Transport::local;
  return attr.node_type == rdma::NodeType::rnic ? Transport::rnic : Transport::ib;
}

LaneReason reason_of(cm::Reason reason) noexcept {
  switch (reason) {
    case cm::Reason::wrong_owner:
      return LaneReason::wrong_owner;
    case cm::Reason::elsewhere:
      return LaneReason::other_host;
    case cm::Reason::unproven:
      return LaneReason::unproven;
    case cm::Reason::version_mismatch:
      return LaneReason::version;
    case cm::Reason::refused:
      return LaneReason::refused;
    case cm::Reason::no_resources:
      return LaneReason::no_resources;
    case cm::Reason::bad_message:
      return LaneReason::protocol_error;
    case cm::Reason::peer_died:
      return LaneReason::peer_gone;
    case cm::Reason::timed_out:
      return LaneReason::too_late;
    default:
      return LaneReason::no_peer;
  }
}

}  // namespace

/// What fails for want of something shows in many ways.
LaneReason Service::reason_if_short(LaneReason told) const noexcept {
  switch (told) {
    case LaneReason::other_host:
    case LaneReason::no_peer:
    case LaneReason::peer_gone:
    case LaneReason::protocol_error:
      return has_descriptors_for_lane(wake_fd_.load()) && has_room_for_lane() ? told : LaneReason::no_resources;
    default:
      return told;
  }
}

void Service::begin(StreamImpl* stream, std::uint16_t generation) noexcept {
  Handshake h;
  h.stream = stream;
  h.generation = generation;
  (void)stream->lock.lock();
  const bool current = stream->generation.load() == generation && stream->phase.load() == Phase::pursued;
  LaneReason refused = LaneReason::none;
  if (current) {
    h.anchor.fd = stream->fd;
    socklen_t len = sizeof h.anchor.cookie;
    if (sys::call(SYS_getsockopt, stream->fd, SOL_SOCKET, 57 /* SO_COOKIE */, sys::arg(&h.anchor.cookie), sys::arg(&len)) != 0)
      refused = LaneReason::not_tcp;
    len = sizeof h.anchor.local;
    if (sys::call(SYS_getsockname, stream->fd, sys::arg(&h.anchor.local), sys::arg(&len)) != 0) refused = LaneReason::not_tcp;
    len = sizeof h.anchor.remote;
    if (sys::call(SYS_getpeername, stream->fd, sys::arg(&h.anchor.remote), sys::arg(&len)) != 0) refused = LaneReason::not_tcp;
    stream->cookie = h.anchor.cookie;
    if (stream->stats != nullptr) stream->stats->set_addresses(h.anchor.local, h.anchor.remote);
    stream->read_timeouts(stream->fd);
    if (refused == LaneReason::none && may_have_ring(true)) refused = LaneReason::io_uring;
    if (refused == LaneReason::none && has_mode_without_lane(stream->fd)) refused = LaneReason::mode;
    if (refused == LaneReason::none && engine::policy_for(stream->role, h.anchor.local, h.anchor.remote) == Family::tcp)
      refused = engine::policy_reason();
    if (refused != LaneReason::none) stream->take_down_locked(refused);
  }
  stream->lock.unlock();
  if (current && refused != LaneReason::none) search_is_over(stream);
  if (!current || refused != LaneReason::none) return;
  if (stream->stats != nullptr && !stream->lane_was_up.load() && !seekers_.contains(stream))
    stream->stats->set_reason(LaneReason::no_peer);  // until somebody is found
  h.cookie = h.anchor.cookie;
  h.active = stream->role == Role::acceptor;
  h.begun_ns = now_ns();
  auto [it, fresh] = handshakes_.insert_or_assign(h.cookie, h);
  (void)fresh;
  Handshake& kept = it->second;
  const std::uint64_t cookie = h.cookie;
  if (!has_room_for_lane()) return give_up(kept, LaneReason::no_resources);
  const rdma::Result<rdma::Unit> begun = h.active
                                             ? cm_->dial(kept.anchor, kMeetMs,
                                                         [this, cookie](rdma::Device& device, const rdma::Path& path,
                                                                        cm::ConnId conn) -> cm::ConnectionManager::Proposal {
                                                           const auto found = handshakes_.find(cookie);
                                                           if (found == handshakes_.end()) return {};
                                                           Handshake& mine = found->second;
                                                           mine.conn = conn;
                                                           mine.answered = true;
                                                           mine.lane = make_lane(device, path);
                                                           mine.lane_since_ns = now_ns();
                                                           if (mine.lane == nullptr) return {};
                                                           mine.proposal = mine.lane->proposal();
                                                           return {&mine.lane->qp(), std::as_bytes(std::span(&mine.proposal, 1))};
                                                         })
                                             : cm_->offer(kept.anchor, kMeetMs);
  if (!begun) {
    RDMA_LOG(info, "fd %d: %s", stream->fd.load(), begun.error().what);
    const auto again = handshakes_.find(cookie);
    if (again != handshakes_.end()) give_up(again->second, LaneReason::no_resources);
  }
}

// Who waits for a strict stream's lane must look again.
void Service::search_is_over(StreamImpl* stream) noexcept {
  if (!stream->strict.load()) return;
  stream->phase_word.fetch_add(1, std::memory_order_release);
  sys::call(SYS_futex, sys::arg(&stream->phase_word), FUTEX_WAKE, INT_MAX);
  engine::notify(engine::handle_of(stream));
  if (channel_ != nullptr) channel_->ring();
}

void Service::give_up(Handshake& h, LaneReason reason) noexcept {
  reason = reason_if_short(reason);
  (void)h.stream->lock.lock();
  if (h.stream->generation.load() == h.generation && h.stream->phase.load() == Phase::pursued && !rest_again(*h.stream, reason) &&
      !seek_again(h, reason))
    h.stream->take_down_locked(reason);
  h.stream->lock.unlock();
  search_is_over(h.stream);
  if (h.may_recover) links_->forget(h.key);
  if (h.lane != nullptr) retire(nullptr, h.lane, 0, true);
  const std::uint64_t cookie = h.cookie;
  handshakes_.erase(cookie);
}

bool Service::accept_proposal(Handshake& h, std::span<const std::byte> data) noexcept {
  LaneProposal p;
  if (data.size() < sizeof p) return false;
  std::memcpy(&p, data.data(), sizeof p);
  if (p.magic != LaneProposal::kMagic || p.address() % 8 != 0) return false;
  h.lane->set_peer(p);
  if (Capture* capture = engine::capture()) {
    Capture::Endpoint endpoint;
    endpoint.local = h.anchor.local;
    endpoint.remote = h.anchor.remote;
    endpoint.active = h.active;
    h.lane->capture_to(capture, endpoint);
  }
  return true;
}

cm::Transcript Service::transcript_of(std::uint64_t cookie) {
  const auto it = handshakes_.find(cookie);
  if (it == handshakes_.end()) return {};
  const StreamImpl& stream = *it->second.stream;
  const auto copy = [](const Transcript::Record& record) {
    const auto bytes = record.bytes();
    return std::vector(bytes.begin(), bytes.end());
  };
  return {copy(stream.transcript.sent), copy(stream.transcript.received), stream.asks_no_proof};
}

void Service::on_cm_event(const cm::Event& event) noexcept {
  const auto it = handshakes_.find(event.anchor_cookie);
  switch (event.kind) {
    case cm::EventKind::request: {
      if (it == handshakes_.end() || it->second.lane != nullptr) return cm_->reject(event.conn, cm::Reason::refused, {});
      Handshake& h = it->second;
      h.conn = event.conn;
      h.answered = true;
      h.lane = make_lane(*event.device, event.path);
      h.lane_since_ns = now_ns();
      if (h.lane == nullptr) {
        cm_->reject(event.conn, cm::Reason::no_resources, {});
        return give_up(h, LaneReason::no_resources);
      }
      if (!accept_proposal(h, event.private_data)) {
        cm_->reject(event.conn, cm::Reason::version_mismatch, {});
        return give_up(h, LaneReason::version);
      }
      h.lane->conn.await_hello();
      h.reply = reply_for(h);
      if (!cm_->accept(event.conn, h.lane->qp(), std::as_bytes(std::span(&h.reply, 1)))) give_up(h, LaneReason::no_resources);
      return;
    }
    case cm::EventKind::reply: {
      if (it == handshakes_.end()) return cm_->disconnect(event.conn);
      Handshake& h = it->second;
      if (!accept_proposal(h, event.private_data)) {
        cm_->disconnect(event.conn);
        return give_up(h, LaneReason::version);
      }
      if (!cm_->establish(event.conn)) return give_up(h, LaneReason::no_resources);
      if (event.private_data.size() >= sizeof h.reply) {
        std::memcpy(&h.reply, event.private_data.data(), sizeof h.reply);
        take_reply(h, h.reply);
      }
      h.lane->send_hello(hello_addresses(h.anchor));
      return;
    }
    case cm::EventKind::rejected:
    case cm::EventKind::unreachable:
      if (it == handshakes_.end()) return;
      it->second.answered |= event.answered;
      return give_up(it->second, reason_of_end(reason_of(event.reason)));
    case cm::EventKind::established:
      return;  // Hello decides
    case cm::EventKind::disconnected: {
      if (it != handshakes_.end() && it->second.conn == event.conn) return give_up(it->second, LaneReason::peer_gone);
      const auto conn = static_cast<std::uint64_t>(event.conn);
      const auto found = streams_by_conn_.find(conn);
      if (found != streams_by_conn_.end()) {
        StreamImpl* stream = found->second;
        streams_by_conn_.erase(found);
        (void)stream->lock.lock();
        stream->lane_is_disconnected();
        stream->lock.unlock();
        tend(stream);
      }
      const std::lock_guard guard(laned_lock_);
      for (Dying& d : dying_)
        if (d.conn == conn) d.peer_gone = true;
      return;
    }
  }
}

void Service::poll_handshakes() noexcept {
  if (handshakes_.empty()) return;
  bool waiting = false;
  for (int pass = 0; pass < 2; ++pass) {
    std::vector<std::uint64_t> done, late;
    for (auto& [cookie, h] : handshakes_) {
      if (h.lane != nullptr) {
        h.lane->drain();
        if (h.lane->conn.state() == ConnState::established && !h.lane->dead())
          done.push_back(cookie);
        else if (h.lane->dead())
          late.push_back(cookie);
        else if (pass == 0) {
          h.lane->arm(rdma::kWakeChannel);
          waiting = true;
        }
      }
      if (h.lane != nullptr ? is_late(h.lane_since_ns, last_lane_up_ns_) : now_ns() > h.begun_ns + kLongestSearchNs)
        late.push_back(cookie);
    }
    for (const std::uint64_t cookie : done) finish(handshakes_[cookie]);
    for (const std::uint64_t cookie : late)
      if (const auto it = handshakes_.find(cookie); it != handshakes_.end()) {
        if (it->second.conn != cm::ConnId::none) cm_->disconnect(it->second.conn);
        cm_->withdraw(cookie);
        const Lane* const lane = it->second.lane;
        give_up(it->second, lane == nullptr    ? LaneReason::no_peer
                            : lane->violated() ? LaneReason::protocol_error
                            : lane->dead()     ? LaneReason::device_lost
                                               : LaneReason::too_late);
      }
    if (pass == 0 && waiting) device_->arm_fence();  // other devices' arm() needs none
    if (!waiting) break;
  }
}

void Service::finish(Handshake& h) noexcept {
  StreamImpl* stream = h.stream;
  (void)stream->lock.lock();
  const bool current = stream->generation.load() == h.generation && stream->phase.load() == Phase::pursued;
  if (current) {
    stream->conn = static_cast<std::uint64_t>(h.conn);
    stream->watched = true;
    epoll_event ev{EPOLLIN | EPOLLRDHUP | EPOLLET, {.u64 = reinterpret_cast<std::uint64_t>(stream)}};
    sys::call(SYS_epoll_ctl, epoll_fd_, EPOLL_CTL_ADD, stream->fd, sys::arg(&ev));
    if (stream->stats != nullptr) stream->stats->set_transport(transport_of(h.lane->device()->attr()));
    remember_speaker(h);
    begin_watch(h);
    stream->attach(h.lane);
    last_lane_up_ns_ = now_ns();
    {
      const std::lock_guard guard(laned_lock_);
      laned_.push_back(stream);
    }
    streams_by_conn_[stream->conn] = stream;
  }
  const Stream handle = engine::handle_of(stream);
  stream->lock.unlock();
  if (current) {
    on_return(stream);
    RDMA_LOG(info, "fd %d: lane up", stream->fd.load());
    engine::notify(handle);
    search_is_over(stream);
  } else {
    if (h.may_recover) links_->forget(h.key);
    h.lane->write_word(kGone, 0);
    cm_->disconnect(h.conn);
    retire(nullptr, h.lane, 0, true);
  }
  const std::uint64_t cookie = h.cookie;
  handshakes_.erase(cookie);
}

}  // namespace sdp
