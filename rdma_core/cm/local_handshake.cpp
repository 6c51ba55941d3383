// The handshake of two processes, from both sides: hello, the link between them or one that they have, request, reply, established.
#include <sys/random.h>

#include <algorithm>
#include <cerrno>

#include "rdma_core/base/log.hpp"
#include "rdma_core/cm/local_state.hpp"

namespace rdma::cm {

namespace {

using shm::OwnSegment;
using shm::PeerIdentity;
using shm::PeerSegment;
using shm::ProcessId;
using shm::ShmLink;

constexpr Nanos kHandshake = 2000 * kMillisecond;  ///< a peer that falls silent costs a descriptor for so long
constexpr std::size_t kMaxHandshakes = 256;        ///< at once
constexpr std::size_t kMaxHandshakesOfOther = 32;  ///< at once with one other user
constexpr std::size_t kMaxLinks = 1024;            ///< with one's own user
constexpr std::size_t kMaxLinksOfOther = 64;       ///< with one other user
constexpr int kBackoffMs[] = {1, 2, 5, 10, 25, 50, 100};

}  // namespace

Result<Unit> bring_up(Qp& qp, NodeType node, std::uint32_t peer_qpn) {
  const Access access = Access::local_write | Access::remote_write | Access::remote_read;
  QpAttributes attr;
  attr.state = QpState::init;
  attr.access = access;
  if (node == NodeType::rnic) {
    attr.transport = RnicQpAttributes{};
    if (auto r = qp.modify(attr); !r) return r;
    attr = {};
    attr.state = QpState::rts;
    attr.max_read_outstanding = 4;
    attr.max_read_incoming = 4;
    RnicQpAttributes rnic;
    rnic.mpa_markers = false;
    rnic.mpa_crc = false;
    rnic.stream_mode = false;
    rnic.peer = peer_qpn;
    attr.transport = rnic;
    return qp.modify(attr);
  }
  IbQpAttributes ib;
  ib.pkey_index = std::uint16_t{0};
  ib.port = std::uint8_t{1};
  attr.transport = ib;
  if (auto r = qp.modify(attr); !r) return r;
  attr = {};
  attr.state = QpState::rtr;
  attr.max_read_incoming = 4;
  ib = {};
  ib.dgid = Gid{};
  ib.dest_qpn = peer_qpn;
  ib.rq_psn = 0U;
  ib.path_mtu = std::uint8_t{5};
  ib.min_rnr_timer = std::uint8_t{0};
  attr.transport = ib;
  if (auto r = qp.modify(attr); !r) return r;
  attr = {};
  attr.state = QpState::rts;
  attr.max_read_outstanding = 4;
  ib = {};
  ib.sq_psn = 0U;
  ib.ack_timeout = std::uint8_t{14};
  ib.retry_count = std::uint8_t{6};
  ib.rnr_retry = std::uint8_t{0};
  attr.transport = ib;
  return qp.modify(attr);
}

// --- both sides

bool LocalCm::State::say_hello(int fd, std::uint64_t own_cookie, std::uint64_t peer_cookie) noexcept {
  wire::Hello hello{};
  hello.head = wire::make_head(wire::Type::hello, sizeof hello);
  hello.process = device.process_id();
  hello.own_cookie = own_cookie;
  hello.peer_cookie = peer_cookie;
  hello.layout_version = shm::kLayoutVersion;
  hello.node_type = static_cast<std::uint32_t>(device.attr().node_type);
  hello.needs_fence = device.has_membarrier() ? 0 : 1;
  return send_frame(fd, hello);
}

Reason LocalCm::State::take_hello(int fd, Channel& channel, const Frame& frame, const SocketOwner& owner) {
  wire::Hello hello;
  if (!frame.as(wire::Type::hello, hello)) return Reason::bad_message;
  if (hello.layout_version != shm::kLayoutVersion) return Reason::version_mismatch;
  if (hello.node_type != static_cast<std::uint32_t>(device.attr().node_type)) return Reason::version_mismatch;
  if (hello.own_cookie != owner.cookie || (hello.peer_cookie != 0 && hello.peer_cookie != channel.cookie))
    return Reason::wrong_owner;
  ucred cred{};
  if (!peer_credentials(fd, cred)) return Reason::bad_message;
  channel.peer.process = hello.process;
  channel.peer.uid = cred.uid;
  channel.peer.pid = cred.pid;
  channel.peer.own_euid = static_cast<std::uint32_t>(sys::call(SYS_geteuid));
  channel.peer_fence = hello.needs_fence != 0;
  return Reason::none;
}

bool LocalCm::State::is_myself(const PeerIdentity& peer) const noexcept {
  return peer.process == device.process_id() && peer.pid == static_cast<std::int32_t>(sys::call(SYS_getpid)) &&
         peer.uid == peer.own_euid;
}

std::size_t LocalCm::State::handshakes() const noexcept {
  std::size_t n = 0;
  for (const auto& [fd, channel] : channels) n += channel.step != Step::linked;
  return n;
}

std::size_t LocalCm::State::handshakes_of(std::uint32_t uid) const noexcept {
  std::size_t n = 0;
  for (const auto& [fd, channel] : channels) n += channel.step != Step::linked && channel.peer.uid == uid;
  return n;
}

std::shared_ptr<ShmLink> LocalCm::State::known_link(const PeerIdentity& peer) {
  for (const auto& link : device.links().all())
    if (!link->self && link->alive.load() && link->socket >= 0 && link->peer == peer) return link;
  return nullptr;
}

bool LocalCm::State::send_link(int fd, wire::LinkKind kind, const ProcessId& nonce, const OwnSegment* own) noexcept {
  wire::Link frame{};
  frame.head = wire::make_head(wire::Type::link, sizeof frame);
  frame.kind = static_cast<std::uint32_t>(kind);
  frame.nonce = nonce;
  const int fds[2] = {own != nullptr ? own->fd() : -1, device.bell().far_fd()};
  return send_frame(fd, frame, fds, own != nullptr ? 2 : 0);
}

Reason LocalCm::State::make_link(int fd, Channel& channel, Frame& frame) {
  if (frame.fd_count < 2) return Reason::bad_message;
  const std::size_t limit = channel.peer.uid == channel.peer.own_euid ? kMaxLinks : kMaxLinksOfOther;
  if (device.links().count_uid(channel.peer.uid) >= limit) return Reason::no_resources;
  auto theirs = PeerSegment::adopt(frame.fds[0], channel.peer.process);
  if (!theirs) {
    RDMA_LOG(warn, "local peer %d: %s", channel.peer.pid, theirs.error().what);
    return theirs.error().code == ENOMEM ? Reason::no_resources : Reason::bad_message;
  }
  auto link = std::make_shared<ShmLink>();
  link->nonce = channel.nonce;
  link->peer = channel.peer;
  link->needs_fence = channel.peer_fence || !device.has_membarrier();
  link->socket = fd;
  link->own = std::move(channel.own);
  link->theirs = std::move(theirs.value());
  if (!link->bell.adopt(frame.take(1))) return Reason::bad_message;
  if (device.attr().reads_program_memory) link->open_program_memory();
  device.links().add(link);
  channel.link = std::move(link);
  return Reason::none;
}

void LocalCm::State::finish_channel(int fd) {
  const auto it = channels.find(fd);
  if (it == channels.end()) return;
  const auto conn = conns.find(it->second.conn);
  if (conn != conns.end()) conn->second.channel = -1;
  if (it->second.link->socket == fd) {
    if (it->second.link->own != nullptr) it->second.link->own->close_fd();
    it->second.step = Step::linked;
    it->second.conn = ConnId::none;
    it->second.deadline = 0;
    return;
  }
  channels.erase(it);
  close_fd(fd);
}

// --- active

void LocalCm::State::try_dial(std::uint64_t cookie, Dial& dial) {
  const auto owner = find_other_end(dial.anchor);
  if (!owner) {
    const bool was_here = dial.tries != 0;
    dials.erase(cookie);
    return emit_unreachable(cookie, was_here ? Reason::no_peer : not_found(owner));
  }
  dial.next_try = now() + kBackoffMs[std::min(dial.tries, std::size(kBackoffMs) - 1)] * kMillisecond;
  ++dial.tries;
  if (!owner.value().held || !proves_identity(owner.value().uid)) return;
  if (handshakes() >= kMaxHandshakes) return;
  const int fd = new_socket();
  if (fd < 0) return;
  sockaddr_un address;
  const socklen_t len = name_of(owner.value().cookie, address);
  const long r = sys::call(SYS_connect, fd, sys::arg(&address), len);
  ucred cred{};
  if (r != 0 || !peer_credentials(fd, cred)) {
    sys::call(SYS_close, fd);
    return;  // nobody offers yet
  }
  if (cred.uid != owner.value().uid || !say_hello(fd, cookie, owner.value().cookie)) {
    sys::call(SYS_close, fd);
    dials.erase(cookie);
    return emit_unreachable(cookie, Reason::wrong_owner);
  }
  dial.connected = true;
  Channel channel;
  channel.active = true;
  channel.cookie = cookie;
  channel.deadline = now() + kHandshake;
  channels.emplace(fd, std::move(channel));
  watch(fd);
}

Reason LocalCm::State::offer_link(int fd, Channel& channel, bool may_reuse) {
  channel.step = Step::link;
  if (is_myself(channel.peer)) {
    auto self = device.self_path();
    if (!self) return Reason::no_resources;
    channel.link = device.links().find(self.value().id);
    return send_link(fd, wire::LinkKind::reuse, channel.link->nonce, nullptr) ? Reason::none : Reason::peer_died;
  }
  if (may_reuse)
    if (auto known = known_link(channel.peer)) {
      channel.link = known;
      return send_link(fd, wire::LinkKind::reuse, known->nonce, nullptr) ? Reason::none : Reason::peer_died;
    }
  // Many first contacts at once make one link: all but one wait for it.
  if (may_reuse && link_in_the_making(channel.peer)) {
    channel.step = Step::parked;
    return Reason::none;
  }
  channel.link = nullptr;
  auto own = OwnSegment::create(device.segment_bytes(), device.process_id());
  if (!own) return Reason::no_resources;
  channel.own = std::move(own.value());
  sys::call(SYS_getrandom, sys::arg(&channel.nonce), sizeof channel.nonce, 0);
  return send_link(fd, wire::LinkKind::fresh, channel.nonce, channel.own.get()) ? Reason::none : Reason::peer_died;
}

bool LocalCm::State::link_in_the_making(const PeerIdentity& peer) const noexcept {
  return std::any_of(channels.begin(), channels.end(), [&peer](const auto& entry) {
    return entry.second.active && entry.second.step == Step::link && entry.second.own != nullptr && entry.second.peer == peer;
  });
}

void LocalCm::State::wake_parked(const PeerIdentity& peer) {
  std::vector<int> parked;
  for (const auto& [fd, channel] : channels)
    if (channel.step == Step::parked && channel.peer == peer) parked.push_back(fd);
  for (const int fd : parked) {
    const auto it = channels.find(fd);
    if (it == channels.end() || it->second.step != Step::parked) continue;
    if (const Reason r = offer_link(fd, it->second, true); r != Reason::none) drop_channel(fd, r);
  }
}

Reason LocalCm::State::send_request(int fd, Channel& channel) {
  const auto dial = dials.find(channel.cookie);
  if (dial == dials.end()) return Reason::refused;
  const auto id = static_cast<ConnId>(next_conn++);
  const MakeQp make_qp = std::move(dial->second.make_qp);  // it may call us back and end the dial
  const Proposal proposal = make_qp(*reported, Path{channel.link->id}, id);
  if (proposal.qp == nullptr || proposal.private_data.size() > wire::kRequestPrivate) return Reason::no_resources;
  wire::Request request{};
  request.head = wire::make_head(wire::Type::request, sizeof request);
  request.lane = static_cast<std::uint64_t>(id);
  request.qpn = static_cast<std::uint32_t>(proposal.qp->qpn());
  request.private_bytes = static_cast<std::uint32_t>(proposal.private_data.size());
  std::copy(proposal.private_data.begin(), proposal.private_data.end(), request.data);
  Conn conn;
  conn.cookie = channel.cookie;
  conn.link = channel.link;
  conn.qp = proposal.qp;
  conn.channel = fd;
  conns.emplace(id, std::move(conn));
  channel.conn = id;
  channel.step = Step::reply;
  return send_frame(fd, request) ? Reason::none : Reason::peer_died;
}

Reason LocalCm::State::active_frame(int fd, Channel& channel, Frame& frame) {
  switch (channel.step) {
    case Step::hello: {
      const auto dial = dials.find(channel.cookie);
      if (dial == dials.end()) return Reason::refused;
      const auto owner = find_other_end(dial->second.anchor);
      if (!owner) return Reason::peer_died;
      if (const Reason r = take_hello(fd, channel, frame, owner.value()); r != Reason::none) return r;
      return offer_link(fd, channel, true);
    }
    case Step::link: {
      wire::Link link;
      if (!frame.as(wire::Type::link, link)) return Reason::bad_message;
      const auto kind = static_cast<wire::LinkKind>(link.kind);
      if (kind == wire::LinkKind::unknown && channel.link != nullptr && !channel.link->self) return offer_link(fd, channel, false);
      if (kind == wire::LinkKind::fresh && channel.own != nullptr) {
        if (!(link.nonce == channel.nonce)) return Reason::bad_message;
        if (const Reason r = make_link(fd, channel, frame); r != Reason::none) return r;
        const PeerIdentity peer = channel.peer;
        const Reason r = send_request(fd, channel);
        wake_parked(peer);
        return r;
      } else if (kind != wire::LinkKind::reuse || channel.link == nullptr) {
        return Reason::bad_message;
      }
      return send_request(fd, channel);
    }
    case Step::reply: {
      wire::Reply reply;
      wire::Reject reject;
      Event e;
      e.conn = channel.conn;
      e.anchor_cookie = channel.cookie;
      if (frame.as(wire::Type::reject, reject) && reject.private_bytes <= wire::kRejectPrivate) {
        e.kind = EventKind::rejected;
        e.reason = reject.reason != 0 && reject.reason <= static_cast<std::uint32_t>(Reason::elsewhere)
                       ? static_cast<Reason>(reject.reason)
                       : Reason::refused;
        e.private_data = {reject.data, reject.private_bytes};
        conns.erase(channel.conn);
        dials.erase(channel.cookie);
        channel.conn = ConnId::none;
        emit(e);
        finish_channel(fd);
        return Reason::none;
      }
      if (!frame.as(wire::Type::reply, reply) || reply.private_bytes > wire::kReplyPrivate) return Reason::bad_message;
      Conn& conn = conns[channel.conn];
      conn.peer_lane = reply.lane;
      conn.peer_qpn = reply.qpn;
      channel.step = Step::established;
      dials.erase(channel.cookie);
      e.kind = EventKind::reply;
      e.path = Path{channel.link->id};
      e.device = reported;
      e.private_data = {reply.data, reply.private_bytes};
      emit(e);
      return Reason::none;
    }
    default:
      return Reason::bad_message;
  }
}

// --- passive

void LocalCm::State::accept_channel(int listener, std::uint64_t cookie) {
  const int fd = shm::move_high(static_cast<int>(sys::call(SYS_accept4, listener, 0, 0, SOCK_NONBLOCK | SOCK_CLOEXEC)));
  if (fd < 0) return;
  const auto offer = offers.find(cookie);
  ucred cred{};
  const auto owner = offer != offers.end() ? find_other_end(offer->second.anchor) : Result<SocketOwner>(fail(ENOENT, ""));
  const auto euid = static_cast<std::uint32_t>(sys::call(SYS_geteuid));
  if (!owner || !owner.value().held || !peer_credentials(fd, cred) || cred.uid != owner.value().uid || !proves_identity(cred.uid) ||
      handshakes() >= kMaxHandshakes || (cred.uid != euid && handshakes_of(cred.uid) >= kMaxHandshakesOfOther)) {
    sys::call(SYS_close, fd);
    return;
  }
  Channel channel;
  channel.cookie = cookie;
  channel.peer.uid = cred.uid;
  channel.deadline = now() + kHandshake;
  channels.emplace(fd, std::move(channel));
  watch(fd);
}

Reason LocalCm::State::passive_frame(int fd, Channel& channel, Frame& frame) {
  switch (channel.step) {
    case Step::hello: {
      const auto offer = offers.find(channel.cookie);
      if (offer == offers.end()) return Reason::refused;
      const auto owner = find_other_end(offer->second.anchor);
      if (!owner) return Reason::peer_died;
      if (const Reason r = take_hello(fd, channel, frame, owner.value()); r != Reason::none) return r;
      channel.step = Step::link;
      offer->second.answered = true;
      return say_hello(fd, channel.cookie, owner.value().cookie) ? Reason::none : Reason::peer_died;
    }
    case Step::link: {
      wire::Link link;
      if (!frame.as(wire::Type::link, link)) return Reason::bad_message;
      const auto kind = static_cast<wire::LinkKind>(link.kind);
      if (kind == wire::LinkKind::reuse) {
        if (is_myself(channel.peer)) {
          auto self = device.self_path();
          if (!self) return Reason::no_resources;
          channel.link = device.links().find(self.value().id);
          if (!(channel.link->nonce == link.nonce)) return Reason::bad_message;
        } else {
          for (const auto& known : device.links().all())
            if (!known->self && known->alive.load() && known->nonce == link.nonce && known->peer == channel.peer)
              channel.link = known;
        }
        if (channel.link == nullptr)
          return send_link(fd, wire::LinkKind::unknown, link.nonce, nullptr) ? Reason::none : Reason::peer_died;
        channel.step = Step::request;
        return send_link(fd, wire::LinkKind::reuse, link.nonce, nullptr) ? Reason::none : Reason::peer_died;
      }
      if (kind != wire::LinkKind::fresh) return Reason::bad_message;
      auto own = OwnSegment::create(device.segment_bytes(), device.process_id());
      if (!own) return Reason::no_resources;
      channel.own = std::move(own.value());
      channel.nonce = link.nonce;
      const OwnSegment* mine = channel.own.get();
      if (const Reason r = make_link(fd, channel, frame); r != Reason::none) return r;
      channel.step = Step::request;
      return send_link(fd, wire::LinkKind::fresh, link.nonce, mine) ? Reason::none : Reason::peer_died;
    }
    case Step::request: {
      wire::Request request;
      if (!frame.as(wire::Type::request, request) || request.private_bytes > wire::kRequestPrivate) return Reason::bad_message;
      if (offers.find(channel.cookie) == offers.end()) return Reason::refused;  // answered already, or withdrawn
      const auto id = static_cast<ConnId>(next_conn++);
      Conn conn;
      conn.cookie = channel.cookie;
      conn.link = channel.link;
      conn.peer_lane = request.lane;
      conn.peer_qpn = request.qpn;
      conn.channel = fd;
      conns.emplace(id, std::move(conn));
      channel.conn = id;
      channel.step = Step::established;
      end_offer(channel.cookie);
      Event e;
      e.kind = EventKind::request;
      e.conn = id;
      e.anchor_cookie = channel.cookie;
      e.path = Path{channel.link->id};
      e.device = reported;
      e.private_data = {request.data, request.private_bytes};
      emit(e);
      return Reason::none;
    }
    case Step::established: {
      wire::Plain plain;
      if (!frame.as(wire::Type::established, plain)) return Reason::bad_message;
      const auto conn = conns.find(channel.conn);
      // Not before accept(). And a disconnect on the link may have overtaken it.
      if (conn != conns.end() && conn->second.qp == nullptr) return Reason::bad_message;
      const bool still_there = conn != conns.end();
      Event e;
      e.kind = EventKind::established;
      e.conn = channel.conn;
      e.anchor_cookie = channel.cookie;
      finish_channel(fd);
      if (still_there) emit(e);
      return Reason::none;
    }
    default:
      return Reason::bad_message;
  }
}

}  // namespace rdma::cm
