#include "tests/support/sim_cm.hpp"

#include <errno.h>
#include <netinet/in.h>
#include <sys/eventfd.h>

#include <algorithm>
#include <cstring>
#include <deque>
#include <map>
#include <vector>

#include "rdma_core/base/sys.hpp"

namespace rdma::sim {

namespace {

using cm::Anchor;
using cm::Caps;
using cm::ConnId;
using cm::Event;
using cm::EventKind;
using cm::Reason;

constexpr Nanos kMillisecond = 1'000'000;
constexpr Nanos kHandshake = 2000 * kMillisecond;  ///< a peer that falls silent in it
constexpr Nanos kFindAgain = kMillisecond;

using Bytes = std::vector<std::byte>;

struct Frame {
  enum class Type : std::uint8_t { request, reply, reject, ready, disconnect } type;
  ConnId from = ConnId::none;  ///< the sender's
  ConnId to = ConnId::none;    ///< the receiver's, once known
  std::uint64_t cookie = 0;    ///< request: the receiver's anchor
  Qpn qpn{};
  Reason reason = Reason::none;
  Bytes data;
};

struct Conn {
  enum class Step : std::uint8_t { req_sent, req_received, rep_sent, rep_received, established } step;
  bool active = false;
  std::uint64_t cookie = 0;
  ConnId peer = ConnId::none;
  Qpn peer_qpn{};
  Qp* qp = nullptr;
  Frame last;  ///< repeated while it is not answered
  unsigned repeats = 0;
};

struct Dial {
  Anchor anchor;
  Nanos deadline;
  std::uint64_t number;  ///< a later dial of the same anchor is another
  cm::ConnectionManager::MakeQp make_qp;
};
struct Offer {
  Anchor anchor;
  std::uint64_t number;
};

struct Pending {
  Event event;
  Bytes data;
};

bool same_address(const sockaddr_storage& a, const sockaddr_storage& b) {
  if (a.ss_family != b.ss_family) return false;
  if (a.ss_family == AF_INET) {
    const auto& x = reinterpret_cast<const sockaddr_in&>(a);
    const auto& y = reinterpret_cast<const sockaddr_in&>(b);
    return x.sin_port == y.sin_port && x.sin_addr.s_addr == y.sin_addr.s_addr;
  }
  const auto& x = reinterpret_cast<const sockaddr_in6&>(a);
  const auto& y = reinterpret_cast<const sockaddr_in6&>(b);
  return a.ss_family == AF_INET6 && x.sin6_port == y.sin6_port && std::memcmp(&x.sin6_addr, &y.sin6_addr, sizeof x.sin6_addr) == 0;
}

}  // namespace

class SimCmPair::SimCm final : public cm::ConnectionManager {
 public:
  SimCm(SimFabric& fabric, Side side, const SimCmOptions& options) : fabric_(fabric), side_(side), options_(options) {
    const bool rnic = fabric.options().flavour == NodeType::rnic;
    caps_ = rnic ? Caps{197, 251, 251, true, true} : Caps{56, 196, 148, false, true};
    device_ = &fabric.device(side);
    fd_ = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
  }
  ~SimCm() override { sys::call(SYS_close, fd_); }
  void meet(SimCm& peer) noexcept { peer_ = &peer; }
  void report(Device& device) noexcept { device_ = &device; }
  void use_guard(std::weak_ptr<int> guard) { guard_ = std::move(guard); }

  const char* name() const noexcept override { return rnic() ? "sim-rnic" : "sim-ib"; }
  const Caps& caps() const noexcept override { return caps_; }
  void on_event(std::function<void(const Event&)> handler) override { handler_ = std::move(handler); }

  Result<Unit> offer(const Anchor& anchor, unsigned ttl_ms) override {
    if (!alive()) return fail(ENODEV, "sim cm: gone");
    const std::uint64_t number = ++next_number_;
    offers_[anchor.cookie] = {anchor, number};
    later(Nanos{ttl_ms} * kMillisecond, [this, cookie = anchor.cookie, number] {
      auto it = offers_.find(cookie);
      if (it == offers_.end() || it->second.number != number) return;
      offers_.erase(it);
      emit(EventKind::unreachable, ConnId::none, cookie, Reason::no_peer);
    });
    return Unit{};
  }
  void withdraw(std::uint64_t cookie) noexcept override {
    offers_.erase(cookie);
    dials_.erase(cookie);
  }

  Result<Unit> dial(const Anchor& anchor, unsigned timeout_ms, MakeQp make_qp) override {
    if (!alive()) return fail(ENODEV, "sim cm: gone");
    const std::uint64_t number = ++next_number_;
    dials_[anchor.cookie] = {anchor, fabric_.clock().now() + Nanos{timeout_ms} * kMillisecond, number, std::move(make_qp)};
    later(delay(), [this, cookie = anchor.cookie, number] { find(cookie, number); });
    return Unit{};
  }

  Result<Unit> accept(ConnId id, Qp& qp, std::span<const std::byte> data) override {
    Conn* conn = at(id);
    if (conn == nullptr || conn->step != Conn::Step::req_received) return fail(ENOENT, "sim cm: no such request");
    if (data.size() > caps_.max_reply_private) return fail(EINVAL, "sim cm: private data of the reply are too long");
    conn->qp = &qp;
    if (qp.state() == QpState::reset) move_to_init(qp, flavour());
    move_to_rts(qp, flavour(), conn->peer_qpn, false);
    conn->step = Conn::Step::rep_sent;
    Frame frame{
        .type = Frame::Type::reply, .from = id, .to = conn->peer, .qpn = qp.qpn(), .data = padded(data, caps_.max_reply_private)};
    if (rnic() && fabric_.chance(options_.break_percent)) {
      // The stream breaks under the reply: both see it.
      send_once({.type = Frame::Type::disconnect, .from = id, .to = conn->peer, .reason = Reason::peer_died});
      later(delay(), [this, id] { end(id, Reason::peer_died); });
      return Unit{};
    }
    send_repeated(id, std::move(frame));
    if (rnic())
      later(delay(), [this, id] {
        if (Conn* c = at(id); c != nullptr && c->step == Conn::Step::rep_sent) establish_passive(id, *c);
      });
    return Unit{};
  }

  void reject(ConnId id, Reason reason, std::span<const std::byte> data) noexcept override {
    Conn* conn = at(id);
    if (conn == nullptr || conn->step != Conn::Step::req_received) return;
    const auto cut = data.first(std::min(data.size(), caps_.max_reject_private));
    // Lost like every datagram; the dialler repeats its request, and a request whose answer was no gets it again.
    rejected_[conn->peer] = {
        .type = Frame::Type::reject, .from = id, .to = conn->peer, .reason = reason, .data = padded(cut, caps_.max_reject_private)};
    send_once(rejected_[conn->peer]);
    conns_.erase(id);
  }

  Result<Unit> establish(ConnId id) override {
    Conn* conn = at(id);
    if (conn == nullptr || conn->step != Conn::Step::rep_received) return fail(ENOENT, "sim cm: no such reply");
    if (conn->qp->state() == QpState::reset) move_to_init(*conn->qp, flavour());
    move_to_rts(*conn->qp, flavour(), conn->peer_qpn, true);
    conn->step = Conn::Step::established;
    if (!rnic()) send_ready(id, *conn);
    emit(EventKind::established, id, conn->cookie, Reason::none);
    return Unit{};
  }

  void disconnect(ConnId id) noexcept override {
    Conn* conn = at(id);
    if (conn == nullptr) return;
    if (conn->peer != ConnId::none)
      send_reliably({.type = Frame::Type::disconnect, .from = id, .to = conn->peer, .reason = Reason::none});
    else  // the peer may have the request, and its answer finds nobody
      cancelled_.push_back(id);
    conns_.erase(id);
  }

  int fd() const noexcept override { return fd_; }
  int next_timeout_ms() const noexcept override { return -1; }  // timers are the fabric's events
  void progress() override {
    std::uint64_t count = 0;
    sys::call(SYS_read, fd_, sys::arg(&count), sizeof count);
    while (!inbox_.empty() && alive()) {
      Pending pending = std::move(inbox_.front());
      inbox_.pop_front();
      pending.event.private_data = pending.data;
      if (handler_) handler_(pending.event);
    }
  }

  void peer_died() {
    later(delay(), [this] {
      std::vector<ConnId> ids;
      for (const auto& [id, conn] : conns_) ids.push_back(id);
      for (ConnId id : ids) end(id, Reason::peer_died);
    });
  }
  void forget_all() noexcept {
    offers_.clear();
    dials_.clear();
    conns_.clear();
    inbox_.clear();
  }

 private:
  bool rnic() const noexcept { return flavour() == NodeType::rnic; }
  NodeType flavour() const noexcept { return fabric_.options().flavour; }
  bool alive() const noexcept { return fabric_.alive(side_); }
  Conn* at(ConnId id) noexcept {
    auto it = conns_.find(id);
    return it == conns_.end() ? nullptr : &it->second;
  }
  Nanos delay() {
    const SimOptions& o = fabric_.options();
    return static_cast<Nanos>(fabric_.pick(static_cast<std::uint64_t>(o.delay_min), static_cast<std::uint64_t>(o.delay_max)));
  }
  void later(Nanos wait, std::function<void()> action) {
    fabric_.after(wait, [this, guard = guard_, action = std::move(action)] {
      if (guard.lock() && alive()) action();
    });
  }
  Bytes padded(std::span<const std::byte> data, std::size_t full) const {
    Bytes bytes(data.begin(), data.end());
    if (!rnic()) bytes.resize(full);  // a CM datagram carries the whole field
    return bytes;
  }

  void emit(EventKind kind, ConnId conn, std::uint64_t cookie, Reason reason, Bytes data = {}) {
    Pending pending;
    pending.event.kind = kind;
    pending.event.conn = conn;
    pending.event.anchor_cookie = cookie;
    pending.event.reason = reason;
    if (kind == EventKind::request || kind == EventKind::reply) {
      pending.event.path = fabric_.path(side_);
      pending.event.device = device_;
    }
    pending.data = std::move(data);
    inbox_.push_back(std::move(pending));
    const std::uint64_t one = 1;
    sys::call(SYS_write, fd_, sys::arg(&one), sizeof one);
    if (options_.auto_progress) later(0, [this] { progress(); });
  }

  // --- datagrams
  void send_once(Frame frame) { send_after(delay(), std::move(frame), !rnic() && fabric_.chance(options_.lose_percent)); }
  /// The end of a connection is repeated by real CMs until it is answered; here it is never lost.
  void send_reliably(Frame frame) { send_after(delay(), std::move(frame), false); }
  void send_after(Nanos wait, Frame frame, bool lost) {
    if (lost || peer_ == nullptr) return;
    if (rnic()) wait = in_stream_order(wait);
    fabric_.after(wait, [guard = guard_, peer = peer_, frame = std::move(frame)] {
      if (guard.lock() && peer->alive()) peer->take(frame);
    });
  }
  /// A TCP stream does not reorder.
  Nanos in_stream_order(Nanos wait) {
    last_arrival_ = std::max(last_arrival_, fabric_.clock().now() + wait);
    return last_arrival_ - fabric_.clock().now();
  }
  void send_repeated(ConnId id, Frame frame) {
    Conn& conn = *at(id);
    conn.last = frame;
    conn.repeats = 0;
    send_once(std::move(frame));
    if (!rnic()) repeat_later(id, conn.step);
    later(kHandshake, [this, id, step = conn.step] {
      if (Conn* c = at(id); c != nullptr && c->step == step) end(id, Reason::timed_out);
    });
  }
  void repeat_later(ConnId id, Conn::Step step) {
    later(options_.retry_after, [this, id, step] {
      Conn* conn = at(id);
      if (conn == nullptr || conn->step != step) return;
      // A REQ that arrived is answered late if the application is slow: only a sender that loses everything gives up early.
      if (conn->repeats >= options_.max_retries) return;
      ++conn->repeats;
      send_once(conn->last);
      repeat_later(id, step);
    });
  }
  void send_ready(ConnId id, const Conn& conn) {
    const Nanos extra = static_cast<Nanos>(fabric_.pick(0, static_cast<std::uint64_t>(options_.rtu_extra_delay)));
    send_after(delay() + extra, {.type = Frame::Type::ready, .from = id, .to = conn.peer}, fabric_.chance(options_.lose_percent));
  }

  /// Over, and the owner is told how.
  void end(ConnId id, Reason reason) {
    Conn* conn = at(id);
    if (conn == nullptr) return;
    const std::uint64_t cookie = conn->cookie;
    const bool unanswered = conn->step == Conn::Step::req_sent;
    if (reason == Reason::timed_out && conn->peer != ConnId::none)
      send_reliably({.type = Frame::Type::disconnect, .from = id, .to = conn->peer, .reason = Reason::none});
    conns_.erase(id);
    emit(unanswered ? EventKind::unreachable : EventKind::disconnected, id, cookie, reason);
  }

  void find(std::uint64_t cookie, std::uint64_t number) {
    auto it = dials_.find(cookie);
    if (it == dials_.end() || it->second.number != number) return;
    const Anchor& own = it->second.anchor;
    const auto theirs = std::find_if(peer_->offers_.begin(), peer_->offers_.end(), [&](const auto& entry) {
      const Anchor& anchor = entry.second.anchor;
      return same_address(anchor.local, own.remote) && same_address(anchor.remote, own.local);
    });
    if (!peer_->alive() || theirs == peer_->offers_.end()) {
      if (fabric_.clock().now() >= it->second.deadline) {
        dials_.erase(it);
        return emit(EventKind::unreachable, ConnId::none, cookie, Reason::no_peer);
      }
      return later(kFindAgain, [this, cookie, number] { find(cookie, number); });
    }
    Dial dial = std::move(it->second);
    dials_.erase(it);
    const ConnId id = new_id();
    const Proposal proposal = dial.make_qp(*device_, fabric_.path(side_), id);
    if (proposal.qp == nullptr || proposal.private_data.size() > caps_.max_request_private)
      return emit(EventKind::unreachable, ConnId::none, cookie, Reason::no_resources);
    Conn conn{.step = Conn::Step::req_sent, .active = true, .cookie = cookie};
    conn.qp = proposal.qp;
    conns_.emplace(id, std::move(conn));
    send_repeated(id, {.type = Frame::Type::request,
                       .from = id,
                       .cookie = theirs->first,
                       .qpn = proposal.qp->qpn(),
                       .data = padded(proposal.private_data, caps_.max_request_private)});
  }
  ConnId new_id() noexcept { return ConnId{(++next_conn_ << 1) | static_cast<std::uint64_t>(side_)}; }

  void take(const Frame& frame) {
    switch (frame.type) {
      case Frame::Type::request:
        return on_request(frame);
      case Frame::Type::reply:
        return on_reply(frame);
      case Frame::Type::reject: {
        Conn* conn = at(frame.to);
        if (conn == nullptr || conn->step != Conn::Step::req_sent) return;
        const std::uint64_t cookie = conn->cookie;
        conns_.erase(frame.to);
        return emit(EventKind::rejected, frame.to, cookie, frame.reason == Reason::none ? Reason::refused : frame.reason,
                    frame.data);
      }
      case Frame::Type::ready: {
        Conn* conn = at(frame.to);
        if (conn != nullptr && conn->step == Conn::Step::rep_sent) establish_passive(frame.to, *conn);
        return;
      }
      case Frame::Type::disconnect:
        return end(frame.to, frame.reason);
    }
  }

  void on_request(const Frame& frame) {
    for (auto& [id, conn] : conns_)
      if (!conn.active && conn.peer == frame.from) {  // a repeated one
        if (conn.step == Conn::Step::rep_sent) send_once(conn.last);
        return;
      }
    if (auto said_no = rejected_.find(frame.from); said_no != rejected_.end()) return send_once(said_no->second);
    const auto offer = offers_.find(frame.cookie);
    if (offer == offers_.end())
      return send_once(
          {.type = Frame::Type::reject, .to = frame.from, .reason = Reason::no_peer, .data = padded({}, caps_.max_reject_private)});
    offers_.erase(offer);
    const ConnId id = new_id();
    Conn conn{.step = Conn::Step::req_received, .cookie = frame.cookie, .peer = frame.from, .peer_qpn = frame.qpn};
    conns_.emplace(id, std::move(conn));
    later(kHandshake, [this, id] {
      if (Conn* c = at(id); c != nullptr && c->step == Conn::Step::req_received) end(id, Reason::timed_out);
    });
    emit(EventKind::request, id, frame.cookie, Reason::none, frame.data);
  }

  void on_reply(const Frame& frame) {
    Conn* conn = at(frame.to);
    if (conn == nullptr) {
      if (std::find(cancelled_.begin(), cancelled_.end(), frame.to) != cancelled_.end())
        send_reliably({.type = Frame::Type::disconnect, .from = frame.to, .to = frame.from, .reason = Reason::none});
      return;
    }
    if (conn->step == Conn::Step::established) return send_ready(frame.to, *conn);  // our RTU was lost
    if (conn->step != Conn::Step::req_sent) return;
    conn->step = Conn::Step::rep_received;
    conn->peer = frame.from;
    conn->peer_qpn = frame.qpn;
    emit(EventKind::reply, frame.to, conn->cookie, Reason::none, frame.data);
  }

  void establish_passive(ConnId id, Conn& conn) {
    conn.step = Conn::Step::established;
    emit(EventKind::established, id, conn.cookie, Reason::none);
  }

  SimFabric& fabric_;
  Side side_;
  SimCmOptions options_;
  Caps caps_;
  Device* device_;
  SimCm* peer_ = nullptr;
  int fd_ = -1;
  std::weak_ptr<int> guard_;  ///< expired: events still queued must not touch us
  std::function<void(const Event&)> handler_;
  std::map<std::uint64_t, Offer> offers_;
  std::map<std::uint64_t, Dial> dials_;
  std::map<ConnId, Conn> conns_;
  std::map<ConnId, Frame> rejected_;  ///< by the dialler's id: said no, may have to say it again
  std::vector<ConnId> cancelled_;
  std::deque<Pending> inbox_;
  std::uint64_t next_number_ = 0, next_conn_ = 0;
  Nanos last_arrival_ = 0;
};

struct SimCmPair::State {
  State(SimFabric& fabric, const SimCmOptions& options) : cms{SimCm{fabric, Side::a, options}, SimCm{fabric, Side::b, options}} {}
  std::shared_ptr<int> guard = std::make_shared<int>(0);
  std::array<SimCm, 2> cms;
};

SimCmPair::SimCmPair(SimFabric& fabric, const SimCmOptions& options) : state_(std::make_unique<State>(fabric, options)) {
  auto& [a, b] = state_->cms;
  a.meet(b);
  b.meet(a);
  a.use_guard(state_->guard);
  b.use_guard(state_->guard);
  fabric.on_death([guard = std::weak_ptr<int>(state_->guard), state = state_.get()](Side side) {
    if (!guard.lock()) return;
    state->cms[static_cast<std::size_t>(side)].forget_all();
    state->cms[static_cast<std::size_t>(peer_of(side))].peer_died();
  });
}

SimCmPair::~SimCmPair() = default;

cm::ConnectionManager& SimCmPair::at(Side side) noexcept { return state_->cms[static_cast<std::size_t>(side)]; }
void SimCmPair::report_device(Side side, Device& device) noexcept { state_->cms[static_cast<std::size_t>(side)].report(device); }

std::array<Anchor, 2> SimCmPair::anchors(std::uint16_t number) {
  const auto address = [](std::uint32_t ip, std::uint16_t port) {
    sockaddr_storage storage{};
    auto& in = reinterpret_cast<sockaddr_in&>(storage);
    in.sin_family = AF_INET;
    in.sin_port = htons(port);
    in.sin_addr.s_addr = htonl(ip);
    return storage;
  };
  std::array<Anchor, 2> ends;
  ends[0].cookie = 0x10000u + number;
  ends[0].local = ends[1].remote = address(0x0A000001, static_cast<std::uint16_t>(20000 + number));
  ends[1].cookie = 0x20000u + number;
  ends[1].local = ends[0].remote = address(0x0A000002, 7);
  return ends;
}

}  // namespace rdma::sim
