#include "rdma_core/cm/local_cm.hpp"

#include <algorithm>
#include <cerrno>

#include "rdma_core/base/log.hpp"
#include "rdma_core/cm/local_state.hpp"

namespace rdma::cm {

namespace {

using shm::ShmLink;

constexpr std::size_t kMaxUnsent = 4096;
constexpr Nanos kIdleCheck = 5000 * kMillisecond;

/// Reason::none: the other end is on this host.
Reason whereabouts(const Anchor& anchor, const Result<SocketOwner>& other_end) noexcept {
  if (!in_our_namespace(anchor.fd)) return Reason::elsewhere;
  return other_end ? Reason::none : not_found(other_end);
}

}  // namespace

void LocalCm::State::emit_unreachable(std::uint64_t cookie, Reason reason, bool answered) {
  Event e;
  e.kind = EventKind::unreachable;
  e.anchor_cookie = cookie;
  e.reason = reason;
  e.answered = answered;
  emit(e);
}

void LocalCm::State::end_offer(std::uint64_t cookie) noexcept {
  const auto it = offers.find(cookie);
  if (it == offers.end()) return;
  listeners.erase(it->second.fd);
  close_fd(it->second.fd);
  offers.erase(it);
}

void LocalCm::State::drop_channel(int fd, Reason reason) {
  const auto it = channels.find(fd);
  if (it == channels.end()) return;
  Channel channel = std::move(it->second);
  channels.erase(it);
  if (channel.step == Step::linked) return link_died(fd, channel);
  const bool was_known = channel.conn != ConnId::none && conns.erase(channel.conn) != 0;
  // Others may use the link already that this handshake made.
  if (channel.link != nullptr && channel.link->socket == fd)
    link_died(fd, channel);
  else
    close_fd(fd);
  if (channel.active && channel.own != nullptr) wake_parked(channel.peer);
  if (was_known) {
    Event e;
    e.kind = EventKind::disconnected;
    e.conn = channel.conn;
    e.anchor_cookie = channel.cookie;
    e.reason = reason;
    dials.erase(channel.cookie);
    emit(e);
  } else if (channel.active && dials.erase(channel.cookie) != 0) {
    emit_unreachable(channel.cookie, reason, channel.step != Step::hello);
  } else if (const auto offer = offers.find(channel.cookie); !channel.active && offer != offers.end()) {
    if (reason == Reason::no_resources) offer->second.last = reason;
  }
}

void LocalCm::State::link_died(int fd, Channel& channel) {
  const std::shared_ptr<ShmLink> link = channel.link;
  link->alive.store(false);
  link->socket = -1;
  device.links().drop(link->id);
  close_fd(fd);
  std::vector<ConnId> gone;
  for (const auto& [id, conn] : conns)
    if (conn.link == link) gone.push_back(id);
  for (const ConnId id : gone) {
    Event e;
    e.kind = EventKind::disconnected;
    e.conn = id;
    e.anchor_cookie = conns[id].cookie;
    e.reason = Reason::peer_died;
    conns.erase(id);
    emit(e);
  }
}

Reason LocalCm::State::link_frame(Channel& channel, Frame& frame) {
  wire::Plain plain;
  if (!frame.as(wire::Type::disconnect, plain)) return Reason::bad_message;
  const auto it = conns.find(static_cast<ConnId>(plain.lane));
  if (it == conns.end() || it->second.link != channel.link) return Reason::none;
  Event e;
  e.kind = EventKind::disconnected;
  e.conn = it->first;
  e.anchor_cookie = it->second.cookie;
  conns.erase(it);
  emit(e);
  return Reason::none;
}

void LocalCm::State::send_unsent() {
  std::erase_if(unsent, [](const Unsent& u) {
    return u.link->socket < 0 || send_frame(u.link->socket, wire::make_plain(wire::Type::disconnect, u.lane));
  });
}

void LocalCm::State::close_idle_links(Nanos t) {
  if (next_idle_check == 0) {
    const bool any = std::any_of(channels.begin(), channels.end(), [](const auto& e) { return e.second.step == Step::linked; });
    if (any) next_idle_check = t + std::min(kIdleCheck, idle_limit);
    return;
  }
  if (t < next_idle_check) return;
  next_idle_check = 0;
  std::vector<int> idle;
  for (auto& [fd, channel] : channels) {
    if (channel.step != Step::linked) continue;
    const auto uses = [link = channel.link](const auto& e) { return e.second.link == link; };
    const bool used = std::any_of(conns.begin(), conns.end(), uses) ||
                      std::count_if(channels.begin(), channels.end(), uses) > 1;  // itself, and handshakes that reuse it
    if (used) {
      channel.idle_since = 0;
      continue;
    }
    if (channel.idle_since == 0) channel.idle_since = t;
    if (t - channel.idle_since >= idle_limit) idle.push_back(fd);
    next_idle_check = t + std::min(kIdleCheck, idle_limit);
  }
  for (const int fd : idle) drop_channel(fd, Reason::none);
}

void LocalCm::State::on_readable(int fd) {
  for (int frames = 0; frames < 64; ++frames) {
    const auto it = channels.find(fd);
    if (it == channels.end()) return;
    Frame frame;
    const long n = receive(fd, frame);
    if (n == -EAGAIN || n == -EINTR) return;
    if (n <= 0) return drop_channel(fd, Reason::peer_died);
    on_frame(fd, it->second, frame);
  }
}

void LocalCm::State::on_frame(int fd, Channel& channel, Frame& frame) {
  // The link's own connection may carry a disconnect while its first handshake still runs.
  wire::Plain plain;
  const bool link_business = channel.link != nullptr && channel.link->socket == fd && frame.as(wire::Type::disconnect, plain);
  Reason r = Reason::none;
  if (channel.step == Step::linked || link_business)
    r = link_frame(channel, frame);
  else
    r = channel.active ? active_frame(fd, channel, frame) : passive_frame(fd, channel, frame);
  if (r == Reason::none) return;
  RDMA_LOG(info, "local peer: %s", to_string(r));
  drop_channel(fd, r);
}

// --- what the caller asks for

Result<std::unique_ptr<LocalCm>> LocalCm::create(shm::ShmDevice& device, Device* reported) {
  auto state = std::make_unique<State>(device, reported);
  state->epoll_fd = shm::move_high(static_cast<int>(sys::call(SYS_epoll_create1, EPOLL_CLOEXEC)));
  if (state->epoll_fd < 0) return fail(EMFILE, "local cm: no epoll descriptor");
  return std::unique_ptr<LocalCm>(new LocalCm(std::move(state)));
}

LocalCm::LocalCm(std::unique_ptr<State> state) : state_(std::move(state)) {}

LocalCm::~LocalCm() {
  for (const auto& [fd, cookie] : state_->listeners) sys::call(SYS_close, fd);
  for (const auto& [fd, channel] : state_->channels)
    if (channel.link == nullptr || channel.link->socket != fd) sys::call(SYS_close, fd);
  sys::call(SYS_close, state_->epoll_fd);
}

const Caps& LocalCm::caps() const noexcept { return state_->caps; }
void LocalCm::on_event(std::function<void(const Event&)> handler) { state_->handler = std::move(handler); }

Result<Unit> LocalCm::offer(const Anchor& anchor, unsigned ttl_ms) {
  if (const Reason away = whereabouts(anchor, find_other_end(anchor)); away != Reason::none) {
    // Known at once, but told like any other end: an event, not a result.
    state_->end_offer(anchor.cookie);
    state_->emit_unreachable(anchor.cookie, away);
    return Unit{};
  }
  const int fd = new_socket();
  if (fd < 0) return fail(-fd, "local cm: no descriptor");
  sockaddr_un address;
  const socklen_t len = name_of(anchor.cookie, address);
  long r = sys::call(SYS_bind, fd, sys::arg(&address), len);
  if (r == 0) r = sys::call(SYS_listen, fd, 4);
  if (r != 0) {
    sys::call(SYS_close, fd);
    return fail(static_cast<int>(-r), "local cm: the name of this connection is taken by a stranger");
  }
  state_->end_offer(anchor.cookie);
  state_->offers[anchor.cookie] = State::Offer{anchor, fd, now() + static_cast<Nanos>(ttl_ms) * kMillisecond, false};
  state_->listeners[fd] = anchor.cookie;
  state_->watch(fd);
  return Unit{};
}

void LocalCm::withdraw(std::uint64_t anchor_cookie) noexcept {
  state_->end_offer(anchor_cookie);
  state_->dials.erase(anchor_cookie);
}

Result<Unit> LocalCm::dial(const Anchor& anchor, unsigned timeout_ms, MakeQp make_qp) {
  State::Dial& dial = state_->dials[anchor.cookie];
  dial = State::Dial{};
  if (!in_our_namespace(anchor.fd)) {
    state_->dials.erase(anchor.cookie);
    state_->emit_unreachable(anchor.cookie, Reason::elsewhere);
    return Unit{};
  }
  dial.anchor = anchor;
  dial.make_qp = std::move(make_qp);
  dial.deadline = now() + static_cast<Nanos>(timeout_ms) * kMillisecond;
  state_->try_dial(anchor.cookie, dial);
  return Unit{};
}

Result<Unit> LocalCm::accept(ConnId id, Qp& qp, std::span<const std::byte> private_data) {
  const auto it = state_->conns.find(id);
  if (it == state_->conns.end()) return fail(ENOENT, "local cm: no such connection");
  if (private_data.size() > wire::kReplyPrivate) return fail(EINVAL, "local cm: private data of the reply are too long");
  State::Conn& conn = it->second;
  if (auto up = bring_up(qp, state_->device.attr().node_type, conn.peer_qpn); !up) return up;
  conn.qp = &qp;
  wire::Reply reply{};
  reply.head = wire::make_head(wire::Type::reply, sizeof reply);
  reply.lane = static_cast<std::uint64_t>(id);
  reply.qpn = static_cast<std::uint32_t>(qp.qpn());
  reply.private_bytes = static_cast<std::uint32_t>(private_data.size());
  std::copy(private_data.begin(), private_data.end(), reply.data);
  if (!send_frame(conn.channel, reply)) return fail(EPIPE, "local cm: the peer is gone");
  return Unit{};
}

void LocalCm::reject(ConnId id, Reason reason, std::span<const std::byte> private_data) noexcept {
  const auto it = state_->conns.find(id);
  if (it == state_->conns.end()) return;
  const int fd = it->second.channel;
  wire::Reject reject{};
  reject.head = wire::make_head(wire::Type::reject, sizeof reject);
  reject.lane = static_cast<std::uint64_t>(id);
  reject.reason = static_cast<std::uint32_t>(reason);
  reject.private_bytes = static_cast<std::uint32_t>(std::min(private_data.size(), wire::kRejectPrivate));
  std::copy_n(private_data.begin(), reject.private_bytes, reject.data);
  (void)send_frame(fd, reject);
  state_->conns.erase(it);
  if (const auto channel = state_->channels.find(fd); channel != state_->channels.end()) {
    channel->second.conn = ConnId::none;
    state_->finish_channel(fd);
  }
}

Result<Unit> LocalCm::establish(ConnId id) {
  const auto it = state_->conns.find(id);
  if (it == state_->conns.end()) return fail(ENOENT, "local cm: no such connection");
  State::Conn& conn = it->second;
  if (auto up = bring_up(*conn.qp, state_->device.attr().node_type, conn.peer_qpn); !up) return up;
  const int fd = conn.channel;
  const std::uint64_t cookie = conn.cookie;
  if (!send_frame(fd, wire::make_plain(wire::Type::established, conn.peer_lane))) return fail(EPIPE, "local cm: the peer is gone");
  state_->finish_channel(fd);
  Event e;
  e.kind = EventKind::established;
  e.conn = id;
  e.anchor_cookie = cookie;
  state_->emit(e);
  return Unit{};
}

void LocalCm::disconnect(ConnId id) noexcept {
  const auto it = state_->conns.find(id);
  if (it == state_->conns.end()) return;
  const State::Conn conn = std::move(it->second);
  state_->conns.erase(it);
  if (conn.channel >= 0) {
    state_->dials.erase(conn.cookie);
    if (const auto channel = state_->channels.find(conn.channel); channel != state_->channels.end()) {
      channel->second.conn = ConnId::none;
      state_->drop_channel(conn.channel, Reason::refused);
    }
  } else if (conn.link->socket >= 0) {
    if (!send_frame(conn.link->socket, wire::make_plain(wire::Type::disconnect, conn.peer_lane)) &&
        state_->unsent.size() < kMaxUnsent)
      state_->unsent.push_back({conn.link, conn.peer_lane});
  } else if (conn.link->self) {
    const auto other = state_->conns.find(static_cast<ConnId>(conn.peer_lane));
    if (other == state_->conns.end()) return;
    Event e;
    e.kind = EventKind::disconnected;
    e.conn = other->first;
    e.anchor_cookie = other->second.cookie;
    state_->conns.erase(other);
    state_->emit(e);
  }
}

int LocalCm::fd() const noexcept { return state_->epoll_fd; }

int LocalCm::next_timeout_ms() const noexcept {
  Nanos next = -1;
  const auto consider = [&](Nanos t) {
    if (t != 0 && (next < 0 || t < next)) next = t;
  };
  for (const auto& [cookie, offer] : state_->offers) consider(offer.deadline);
  for (const auto& [cookie, dial] : state_->dials) {
    consider(dial.deadline);
    if (!dial.connected) consider(dial.next_try);
  }
  for (const auto& [fd, channel] : state_->channels) consider(channel.deadline);
  if (!state_->unsent.empty()) consider(now() + 20 * kMillisecond);
  consider(state_->next_idle_check);
  if (next < 0) return -1;
  const Nanos left = next - now();
  return left <= 0 ? 0 : static_cast<int>(left / kMillisecond) + 1;
}

void LocalCm::close_idle_links_after(unsigned ms) noexcept { state_->idle_limit = static_cast<Nanos>(ms) * kMillisecond; }

void LocalCm::progress() {
  epoll_event events[32];
  const long n = sys::call(SYS_epoll_pwait, state_->epoll_fd, sys::arg(events), 32, 0, 0, 8);
  for (long i = 0; i < n; ++i) {
    const int fd = static_cast<int>(events[i].data.u64);
    if (const auto listener = state_->listeners.find(fd); listener != state_->listeners.end())
      state_->accept_channel(fd, listener->second);
    else
      state_->on_readable(fd);
  }
  const Nanos t = now();
  std::vector<std::uint64_t> late, due;
  for (const auto& [cookie, offer] : state_->offers)
    if (t >= offer.deadline) late.push_back(cookie);
  for (const std::uint64_t cookie : late) {
    const bool answered = state_->offers[cookie].answered;
    const Reason why = state_->offers[cookie].last;
    state_->end_offer(cookie);
    state_->emit_unreachable(cookie, why, answered);
  }
  late.clear();
  for (const auto& [cookie, dial] : state_->dials) {
    if (t >= dial.deadline && !dial.connected)
      late.push_back(cookie);
    else if (!dial.connected && t >= dial.next_try)
      due.push_back(cookie);
  }
  for (const std::uint64_t cookie : late) {
    state_->dials.erase(cookie);
    state_->emit_unreachable(cookie, Reason::no_peer);
  }
  for (const std::uint64_t cookie : due)
    if (const auto it = state_->dials.find(cookie); it != state_->dials.end()) state_->try_dial(cookie, it->second);
  std::vector<int> silent;
  for (const auto& [fd, channel] : state_->channels)
    if (channel.deadline != 0 && t >= channel.deadline) silent.push_back(fd);
  for (const int fd : silent) state_->drop_channel(fd, Reason::timed_out);
  state_->send_unsent();
  state_->close_idle_links(t);
}

void LocalCm::abandon_in_child() noexcept {
  for (const auto& [fd, cookie] : state_->listeners) sys::call(SYS_close, fd);
  for (const auto& [fd, channel] : state_->channels)
    if (channel.link == nullptr || channel.link->socket != fd) sys::call(SYS_close, fd);
  sys::call(SYS_close, state_->epoll_fd);
  state_->epoll_fd = -1;
  state_->device.abandon_in_child();
}

}  // namespace rdma::cm
