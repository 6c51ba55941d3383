#include "rdma_core/cm/rdma_cm.hpp"

#include <errno.h>
#include <sys/epoll.h>
#include <sys/eventfd.h>

#include <algorithm>
#include <cstring>
#include <deque>
#include <map>
#include <mutex>
#include <optional>
#include <tuple>
#include <unordered_map>
#include <utility>
#include <vector>

#include "rdma_core/base/clock.hpp"
#include "rdma_core/base/high_fd.hpp"
#include "rdma_core/base/log.hpp"
#include "rdma_core/base/sys.hpp"
#include "rdma_core/cm/offer_relay.hpp"
#include "rdma_core/cm/patience.hpp"
#include "rdma_core/cm/rdma_evidence.hpp"
#include "rdma_core/cm/rdma_manner.hpp"

namespace rdma::cm {
namespace {

constexpr Nanos kMillisecond = 1'000'000;
constexpr Nanos kHandshake = 3000 * kMillisecond;      ///< a peer that falls silent in it
constexpr Nanos kNotedPatience = 1000 * kMillisecond;  ///< a peer that noted the offer dials within it, or is told again
constexpr Nanos kKeep = 10'000 * kMillisecond;         ///< what an address has to do with RDMA, and what nobody uses
constexpr int kResolveMs = 2000;
constexpr int kBacklog = 64;
constexpr long kAtOnce = 8;           ///< connections in the making, and offers to one host: a peer has the time for them then
constexpr Nanos kMostHandshakes = 5;  ///< times kHandshake, with a peer that is busy with others of our connections
constexpr unsigned kPortTries = 32;   ///< an RNIC's port of the kernel's choosing may be a TCP socket's
constexpr Nanos kBackoff[] = {2 * kMillisecond,  4 * kMillisecond,  8 * kMillisecond,  16 * kMillisecond,
                              32 * kMillisecond, 64 * kMillisecond, 128 * kMillisecond};

Nanos now() noexcept { return SteadyClock{}.now(); }

/// Rung from any thread; outlives the manager while a thread has it.
struct Bell {
  int fd = keep_fd(static_cast<int>(sys::call(SYS_eventfd2, 0, EFD_CLOEXEC | EFD_NONBLOCK)));

  ~Bell() {
    forget_fd(fd);
    sys::call(SYS_close, fd);
  }
  void ring() const noexcept {
    const std::uint64_t one = 1;
    sys::call(SYS_write, fd, sys::arg(&one), sizeof one);
  }
  void tell_failed(ConnId id) {
    const std::lock_guard guard(lock_);
    failed_.push_back(id);
    ring();
  }
  std::vector<ConnId> take_failed() {
    const std::lock_guard guard(lock_);
    return std::exchange(failed_, {});
  }

 private:
  std::mutex lock_;
  std::vector<ConnId> failed_;  ///< connections whose request could not be made
};

class RdmaCm final : public ConnectionManager {
 public:
  RdmaCm(std::unique_ptr<Manner> manner, FindDevice find_device, const Secret& secret, DeviceGoes device_goes,
         std::shared_ptr<RdmaChannel> channel)
      : manner_(std::move(manner)),
        find_device_(std::move(find_device)),
        secret_(secret),
        device_goes_(std::move(device_goes)),
        channel_(std::move(channel)),
        epoll_fd_(keep_fd(static_cast<int>(sys::call(SYS_epoll_create1, EPOLL_CLOEXEC)))),
        relay_(epoll_fd_) {
    watch(channel_->fd());
    watch(bell_->fd);
    rendezvous_ = manner_->make_rendezvous(
        *channel_, epoll_fd_, [this](const offer::Offer& o, const IpAddress& server) { return on_offer(o, server); },
        [this](std::uint64_t cookie, std::optional<offer::Code> code) { on_answer(cookie, code); });
    sys::call(SYS_getrandom, sys::arg(&process_), sizeof process_, 0);
  }
  ~RdmaCm() override {
    conns_.clear();
    relay_.close_all();
    rendezvous_ = nullptr;
    forget_fd(epoll_fd_);
    sys::call(SYS_close, epoll_fd_);
  }

  const char* name() const noexcept override { return manner_->name(); }
  const Caps& caps() const noexcept override { return manner_->caps(); }
  void on_event(std::function<void(const Event&)> handler) override { handler_ = std::move(handler); }
  void on_transcript(const TranscriptOf& transcript_of) override { transcript_of_ = transcript_of; }

  Result<Unit> offer(const Anchor& anchor, unsigned ttl_ms) override;
  void withdraw(std::uint64_t cookie) noexcept override;
  Result<Unit> dial(const Anchor& anchor, unsigned timeout_ms, MakeQp make_qp) override;
  Result<Unit> accept(ConnId id, Qp& qp, std::span<const std::byte> data) override;
  void reject(ConnId id, Reason reason, std::span<const std::byte> data) noexcept override;
  Result<Unit> establish(ConnId id) override;
  void disconnect(ConnId id) noexcept override;

  int fd() const noexcept override { return epoll_fd_; }
  int next_timeout_ms() const noexcept override;
  void progress() override;
  void devices_changed(const Device* going) noexcept override;
  void retire() noexcept override;
  void abandon_in_child() noexcept override;

 private:
  struct Offered {
    Anchor anchor;
    offer::Offer offer;
    Patience patience{};
    Nanos next_try = 0;
    std::size_t tries = 0;
    OfferedEvidence evidence;
    bool noted = false;    ///< once at least
    bool asking = false;   ///< a try is under way; until next_try at the most
    bool waiting = false;  ///< due, but for the other offers to that host
  };
  struct Dialling {
    Anchor anchor;
    MakeQp make_qp;
    Patience patience{};
    Nanos next_look = 0;
    std::size_t looks = 0;
    std::optional<offer::Offer> offer;  ///< that cannot be taken up yet
    bool has_turn = false;              ///< but for the others: in turn_
  };
  enum class Step : std::uint8_t { finding, requested, replied, asked, answered, established };
  struct Conn {
    Step step = Step::finding;  ///< active: finding, requested, replied; passive: asked, answered
    bool active = false;
    std::uint64_t cookie = 0;
    std::uint64_t key = 0;  ///< of `id`
    RdmaId id;
    IpAddress peer;             ///< active: what is dialled
    std::uint32_t process = 0;  ///< the peer's
    Evidence evidence;
    MakeQp make_qp;
    Device* device = nullptr;
    Qp* qp = nullptr;
    std::vector<std::byte> proposal;  ///< active: the caller's private data
    unsigned tries = 0;
    rdma_conn_param granted{};
    Nanos deadline = 0;  ///< 0: none
    Nanos latest = now() + kMostHandshakes * kHandshake;
  };
  struct Listener {
    RdmaId id;
    std::uint64_t key = 0;
    Nanos used = 0;
  };
  /// Of an address, and kept with it: librdmacm gives up what it has of a device with the last identifier on it, and in a fork's
  /// child could not make it anew. An identifier is told, too, when its device is to go.
  struct Known {
    Device* device = nullptr;
    Nanos until = 0;
    RdmaId id;
  };
  struct Pending {
    Event event;
    std::vector<std::byte> data;
  };

  void watch(int fd) noexcept {
    epoll_event event{EPOLLIN, {.u64 = 0}};
    sys::call(SYS_epoll_ctl, epoll_fd_, EPOLL_CTL_ADD, fd, sys::arg(&event));
  }
  void tell(EventKind kind, ConnId conn, std::uint64_t cookie, Reason reason, std::span<const std::byte> data = {},
            bool answered = false);
  Result<Unit> is_elsewhere(std::uint64_t cookie) {
    tell(EventKind::unreachable, ConnId::none, cookie, Reason::elsewhere);
    return Unit{};
  }
  Device* device_of(rdma_cm_id* id) const {
    const char* name = device_name_of(id);
    Device* device = name != nullptr ? find_device_(name) : nullptr;
    return device != nullptr && device->attr().node_type == manner_->node_type() ? device : nullptr;
  }
  Device* device_at(const IpAddress& here);
  std::uint16_t listening_port(const IpAddress& here);
  Path path_to(const Conn& conn);

  offer::Code on_offer(const offer::Offer& offer, const IpAddress& server);
  void on_answer(std::uint64_t cookie, std::optional<offer::Code> code);
  void consider(std::uint64_t cookie, const offer::Offer& offer);
  void take_turns();
  void heard_of(const IpAddress& host) noexcept;
  void take_up(std::uint64_t cookie, const offer::Offer& offer, const Transcript& known);
  Reason check(const Offered& offered, const offer::Dial& dial, const CmEvent& event, Conn& conn);
  bool is_proved_by_reply(const Conn& conn, const CmEvent& event) const;
  void on_request(const CmEvent& event, bool again = false);
  void on_cm_event(const CmEvent& event);
  void on_conn_event(ConnId id, Conn& conn, const CmEvent& event);
  bool find_way(Conn& conn);
  void request(ConnId id);
  void on_failed(ConnId id);
  void end(ConnId id, Reason reason, std::span<const std::byte> data = {}, bool refused = false);
  rdma_conn_param parameters(const Conn& conn) const;
  void on_removal(const CmEvent& event);
  void make_offers(Nanos t);
  void keep_time();

  std::unique_ptr<Manner> manner_;
  FindDevice find_device_;
  const Secret secret_;
  DeviceGoes device_goes_;
  std::shared_ptr<RdmaChannel> channel_;
  int epoll_fd_;
  std::shared_ptr<Bell> bell_ = std::make_shared<Bell>();
  OfferRelay relay_;
  std::unique_ptr<Rendezvous> rendezvous_;
  std::function<void(const Event&)> handler_;
  TranscriptOf transcript_of_ = [](std::uint64_t) { return Transcript{}; };
  std::uint32_t process_ = 0;

  std::unordered_map<std::uint64_t, Offered> offers_;  ///< by own cookie
  std::unordered_map<std::uint64_t, Dialling> dials_;  ///< likewise
  std::map<ConnId, Conn> conns_;
  std::unordered_map<std::uint64_t, ConnId> conn_by_key_;
  std::map<IpAddress, Listener> listeners_;  ///< by local host
  std::map<IpAddress, Nanos> held_;          ///< rendezvous of ours, and when a dial wanted them last
  std::map<IpAddress, Known> known_;         ///< by local host
  std::map<std::tuple<Device*, IpAddress, std::uint32_t>, std::uint64_t> paths_;  ///< one per process at the other end
  std::uint64_t last_conn_ = 0, last_path_ = 0;
  std::deque<std::uint64_t> turn_;  ///< dials with an offer that may be taken up, in the order in which it came
  std::deque<Pending> pending_;
  EarlyRequests early_;
};

void RdmaCm::tell(EventKind kind, ConnId conn, std::uint64_t cookie, Reason reason, std::span<const std::byte> data,
                  bool answered) {
  Pending p;
  p.event.kind = kind;
  p.event.conn = conn;
  p.event.anchor_cookie = cookie;
  p.event.reason = reason;
  p.event.answered = answered;
  p.data.assign(data.begin(), data.end());
  if (const auto it = conns_.find(conn); it != conns_.end() && (kind == EventKind::request || kind == EventKind::reply)) {
    p.event.device = it->second.device;
    p.event.path = path_to(it->second);
  }
  pending_.push_back(std::move(p));
  bell_->ring();
}

/// What lies at the other end is the same process if address and number are: the number is told to its peers only.
Path RdmaCm::path_to(const Conn& conn) {
  constexpr std::size_t kMany = 4096;
  if (paths_.size() >= kMany) paths_.clear();
  auto& path = paths_[{conn.device, conn.peer.with_port(0), conn.process}];
  if (path == 0) path = ++last_path_;
  return Path{path};
}

Device* RdmaCm::device_at(const IpAddress& here) {
  const IpAddress host = here.with_port(0);
  // Of the loopback address the kernel says that any device has it.
  if (host.family == AF_UNSPEC || host.is_loopback()) return nullptr;
  Known& known = known_[host];
  if (known.until > now()) return known.device;
  auto id = channel_->bound_id(manner_->port_space(), channel_->new_key(), host);
  known.device = id ? device_of(id->get()) : nullptr;
  known.until = now() + kKeep;
  if (known.device != nullptr) known.id = std::move(*id);
  return known.device;
}

std::uint16_t RdmaCm::listening_port(const IpAddress& here) {
  Listener& listener = listeners_[here.with_port(0)];
  for (unsigned tries = 0; listener.id == nullptr && tries < kPortTries; ++tries) {
    const std::uint64_t key = channel_->new_key();
    auto id = channel_->bound_id(manner_->port_space(), key, here.with_port(0));
    if (!id || rdma_listen(id->get(), kBacklog) != 0) continue;
    listener = {*id, key, 0};
  }
  if (listener.id == nullptr) {
    listeners_.erase(here.with_port(0));
    return 0;
  }
  listener.used = now();
  return ntohs(rdma_get_src_port(listener.id.get()));
}

// --- the connecting side

Result<Unit> RdmaCm::offer(const Anchor& anchor, unsigned ttl_ms) {
  const IpAddress local = IpAddress::from(anchor.local), remote = IpAddress::from(anchor.remote);
  if (device_at(local) == nullptr) return is_elsewhere(anchor.cookie);
  const std::uint16_t port = listening_port(local);
  if (port == 0) return fail(EADDRINUSE, "rdma cm: no port to be called back at");
  Offered& o = offers_[anchor.cookie];
  o = Offered{.anchor = anchor};
  sys::call(SYS_getrandom, sys::arg(o.offer.token.data()), static_cast<long>(o.offer.token.size()), 0);
  o.offer.process = process_;
  o.offer.client = local;
  o.offer.server_port = remote.port;
  o.offer.dial_port = port;
  o.offer.hash = offer::hash_of(local, remote);
  o.patience = Patience::of(ttl_ms, now());
  bell_->ring();  // the next progress() makes the first try
  return Unit{};
}

// Many offers are repeated more rarely: who answers them makes the connections, too.
void RdmaCm::on_answer(std::uint64_t cookie, std::optional<offer::Code> code) {
  const auto it = offers_.find(cookie);
  if (it == offers_.end()) return;
  Offered& o = it->second;
  const Nanos t = now(), many = 1 + static_cast<Nanos>(offers_.size()) / kAtOnce;
  o.asking = false;
  if (code == offer::Code::noted) {
    o.noted = true;
    o.patience.renew(t);
    o.next_try = t + kNotedPatience;
  } else {
    o.next_try = t + many * kBackoff[std::min(o.tries++, std::size(kBackoff) - 1)];
  }
}

Reason RdmaCm::check(const Offered& o, const offer::Dial& dial, const CmEvent& event, Conn& c) {
  auto evidence = o.evidence.shown_by(dial, o.anchor, transcript_of_(o.anchor.cookie));
  if (!evidence) return Reason::unproven;
  c.evidence = std::move(*evidence);
  c.evidence.dialler_end = manner_->far_end(event, event.request.get());
  const auto data = event.private_data().subspan(offer::kDialBytes);
  const Claim claim = c.evidence.claim(o.offer.dial_port, data.first(std::min(data.size(), caps().max_request_private)));
  return is_proved(dial.proof, secret_, Says::request, claim) ? Reason::none : Reason::unproven;
}

void RdmaCm::on_request(const CmEvent& event, bool again) {
  const auto dial = offer::Dial::parse(event.private_data());
  const auto it = !dial ? offers_.end() : std::find_if(offers_.begin(), offers_.end(), [&](const auto& each) {
    return each.second.offer.token == dial->token;
  });
  rdma_cm_id* const id = event.request.get();
  Device* const device = device_of(id);
  if (it != offers_.end() && !again && OfferedEvidence::is_behind(*dial, transcript_of_(it->first)) && early_.keep(event, now()))
    return;
  Conn c;
  Reason refused = Reason::refused;
  if (it != offers_.end() && device != nullptr && peer_of(id).same_host(IpAddress::from(it->second.anchor.remote)))
    refused = check(it->second, *dial, event, c);
  if (refused != Reason::none) {
    std::array<std::byte, offer::kRefusalBytes> why;
    offer::emit_refusal(refused, why.data());
    rdma_reject(id, why.data(), static_cast<std::uint8_t>(why.size()));
    if (refused == Reason::unproven && !it->second.evidence.bear_guess()) {
      const std::uint64_t cookie = it->first;
      withdraw(cookie);
      tell(EventKind::unreachable, ConnId::none, cookie, Reason::unproven);
    }
    return;
  }
  const auto conn_id = ConnId{++last_conn_};
  c.step = Step::asked;
  c.cookie = it->first;
  c.key = channel_->new_key();
  c.id = event.request;
  c.id->context = reinterpret_cast<void*>(c.key);
  c.peer = peer_of(id);
  c.process = dial->process;
  c.device = device;
  c.granted.responder_resources = event.responder_resources;
  c.granted.initiator_depth = event.initiator_depth;
  c.deadline = now() + kHandshake;
  conn_by_key_[c.key] = conn_id;
  const std::uint64_t cookie = c.cookie;
  conns_.emplace(conn_id, std::move(c));
  rendezvous_->cancel(cookie);
  offers_.erase(it);
  heard_of(conns_.at(conn_id).peer);
  tell(EventKind::request, conn_id, cookie, Reason::none, event.private_data().subspan(offer::kDialBytes));
}

// --- the side that has accepted

Result<Unit> RdmaCm::dial(const Anchor& anchor, unsigned timeout_ms, MakeQp make_qp) {
  if (device_at(IpAddress::from(anchor.local)) == nullptr) return is_elsewhere(anchor.cookie);
  Dialling& d = dials_[anchor.cookie];
  d = Dialling{.anchor = anchor, .make_qp = std::move(make_qp)};
  d.patience = Patience::of(timeout_ms, now());
  bell_->ring();  // the next progress() sees to the rendezvous
  return Unit{};
}

offer::Code RdmaCm::on_offer(const offer::Offer& o, const IpAddress& server) {
  const IpAddress there = server.with_port(o.server_port);
  for (const auto& [cookie, dial] : dials_) {
    const IpAddress local = IpAddress::from(dial.anchor.local), remote = IpAddress::from(dial.anchor.remote);
    if (local.port != o.server_port || remote.port != o.client.port || remote.bytes != o.client.bytes ||
        o.hash != offer::hash_of(remote, local))
      continue;
    heard_of(o.client);
    consider(cookie, o);
    return offer::Code::noted;
  }
  for (const auto& [id, conn] : conns_)  // told again while it is being taken up
    if (conn.active && conn.evidence.token == o.token) return offer::Code::noted;
  return relay_.pass_on(o, there) ? offer::Code::noted : offer::Code::nobody;
}

void RdmaCm::consider(std::uint64_t cookie, const offer::Offer& o) {
  const auto it = dials_.find(cookie);
  if (it == dials_.end()) return;
  Dialling& d = it->second;
  if (!d.offer) d.looks = 0;
  d.offer = o;
  if (!may_take_up(o, transcript_of_(cookie))) return;
  if (!std::exchange(d.has_turn, true)) turn_.push_back(cookie);
  take_turns();
}

void RdmaCm::take_turns() {
  auto in_the_making =
      std::ranges::count_if(conns_, [](const auto& each) { return each.second.active && each.second.step != Step::established; });
  for (; !turn_.empty() && in_the_making < kAtOnce; ++in_the_making) {
    const std::uint64_t cookie = turn_.front();
    turn_.pop_front();
    const auto it = dials_.find(cookie);
    if (it == dials_.end() || !it->second.has_turn) continue;  // given up meanwhile
    it->second.has_turn = false;
    take_up(cookie, offer::Offer(*it->second.offer), transcript_of_(cookie));
  }
}

/// That host makes connections with us. Others with it may have to wait for that.
void RdmaCm::heard_of(const IpAddress& host) noexcept {
  const Nanos t = now();
  const auto is_there = [&host](const Anchor& anchor) { return IpAddress::from(anchor.remote).same_host(host); };
  for (auto& [cookie, o] : offers_)
    if (is_there(o.anchor)) o.patience.renew(t);
  for (auto& [cookie, d] : dials_)
    if (is_there(d.anchor)) d.patience.renew(t);
  for (auto& [id, c] : conns_)
    if (c.deadline != 0 && c.peer.same_host(host)) c.deadline = std::max(c.deadline, std::min(t + kHandshake, c.latest));
}

void RdmaCm::take_up(std::uint64_t cookie, const offer::Offer& o, const Transcript& known) {
  const auto it = dials_.find(cookie);
  Dialling d = std::move(it->second);
  dials_.erase(it);
  relay_.forget(cookie);
  Conn c;
  c.active = true;
  c.cookie = cookie;
  c.evidence = evidence_for(o, d.anchor, known);
  c.peer = c.evidence.client.with_port(o.dial_port);
  c.process = o.process;
  c.make_qp = std::move(d.make_qp);
  c.deadline = now() + kHandshake;
  const auto id = ConnId{++last_conn_};
  const bool begun = find_way(c);
  conn_by_key_[c.key] = id;
  conns_.emplace(id, std::move(c));
  if (!begun) end(id, Reason::no_resources);
}

bool RdmaCm::find_way(Conn& c) {
  c.step = Step::finding;
  c.key = channel_->new_key();
  auto made = channel_->create_id(manner_->port_space(), c.key);
  if (!made) return false;
  c.id = *made;
  sockaddr_storage from = c.evidence.server.with_port(0).to_sockaddr(), to = c.peer.to_sockaddr();
  return rdma_resolve_addr(c.id.get(), reinterpret_cast<sockaddr*>(&from), reinterpret_cast<sockaddr*>(&to), kResolveMs) == 0;
}

/// Of an RNIC the kernel chooses a local port without a look at TCP's, and the call fails if a socket has it: once more, with
/// another.
void RdmaCm::on_failed(ConnId id) {
  const auto it = conns_.find(id);
  if (it == conns_.end() || it->second.step != Step::requested) return;
  Conn& c = it->second;
  conn_by_key_.erase(c.key);
  const bool again = ++c.tries < kPortTries && find_way(c);
  conn_by_key_[c.key] = id;
  if (again) return;
  RDMA_LOG(info, "%s: no request can be sent, after %u tries", name(), c.tries);
  end(id, Reason::no_peer);
}

/// The way is found: the QP, and the request on it.
void RdmaCm::request(ConnId id) {
  Conn& found = conns_.at(id);
  found.device = device_of(found.id.get());
  if (found.device == nullptr) return end(id, Reason::no_peer);
  if (found.qp == nullptr) {
    const MakeQp make_qp = std::move(found.make_qp);
    const Proposal proposal = make_qp(*found.device, path_to(found), id);
    const auto it = conns_.find(id);  // it may have called back and given up
    if (it == conns_.end()) return;
    if (proposal.qp == nullptr || proposal.private_data.size() > caps().max_request_private) return end(id, Reason::no_resources);
    Conn& made = it->second;
    made.qp = proposal.qp;
    made.proposal.assign(proposal.private_data.begin(), proposal.private_data.end());
    made.proposal.resize(caps().max_request_private);  // as it arrives on a device that pads
  }
  Conn& c = conns_.at(id);
  Evidence& e = c.evidence;
  e.dialler_end = manner_->near_end(*c.qp, c.id.get());
  const auto shown = [](const std::vector<std::byte>& bytes) { return static_cast<std::uint16_t>(bytes.size()); };
  const offer::Dial dial{e.token, process_, shown(e.from_client), shown(e.from_server),
                         prove(secret_, Says::request, e.claim(c.peer.port, c.proposal))};
  std::vector<std::byte> request(offer::kDialBytes);
  dial.emit(request.data());
  request.insert(request.end(), c.proposal.begin(), c.proposal.end());
  c.step = Step::requested;
  c.granted.responder_resources = c.granted.initiator_depth =
      static_cast<std::uint8_t>(std::min(c.device->attr().max_read_outstanding, 16U));
  const auto failed = [bell = bell_, id] { bell->tell_failed(id); };
  if (const auto sent = manner_->connect(*c.qp, c.id, parameters(c), request, failed); !sent) {
    RDMA_LOG(info, "%s: %s (%d)", name(), sent.error().what, sent.error().code);
    end(id, Reason::no_resources);
  }
}

bool RdmaCm::is_proved_by_reply(const Conn& c, const CmEvent& event) const {
  const auto data = event.private_data();
  if (data.size() < offer::kProofBytes) return false;
  offer::Proof proof;
  std::copy_n(data.begin(), proof.size(), proof.begin());
  const auto rest = data.subspan(proof.size());
  const auto claim =
      c.evidence.claim(manner_->far_end(event, c.id.get()), rest.first(std::min(rest.size(), caps().max_reply_private)));
  return is_proved(proof, secret_, Says::reply, claim);
}

Result<Unit> RdmaCm::establish(ConnId id) {
  const auto it = conns_.find(id);
  if (it == conns_.end() || it->second.step != Step::replied) return fail(ENOENT, "rdma cm: no such reply");
  Conn& c = it->second;
  if (auto up = manner_->establish(*c.qp, c.id.get(), c.granted); !up) return up;
  c.step = Step::established;
  c.deadline = 0;
  tell(EventKind::established, id, c.cookie, Reason::none);
  return Unit{};
}

// --- both

rdma_conn_param RdmaCm::parameters(const Conn& c) const {
  const auto most = static_cast<std::uint8_t>(std::min(c.device->attr().max_read_outstanding, 16U));
  rdma_conn_param p{};
  p.qp_num = static_cast<std::uint32_t>(c.qp->qpn());
  p.responder_resources = std::min(c.granted.responder_resources, most);
  p.initiator_depth = std::min(c.granted.initiator_depth, most);
  p.retry_count = 6;      // 7 is for ever on Soft-RoCE
  p.rnr_retry_count = 7;  // credits keep it from being needed
  return p;
}

Result<Unit> RdmaCm::accept(ConnId id, Qp& qp, std::span<const std::byte> data) {
  const auto it = conns_.find(id);
  if (it == conns_.end() || it->second.step != Step::asked) return fail(ENOENT, "rdma cm: no such request");
  if (data.size() > caps().max_reply_private) return fail(EINVAL, "rdma cm: private data of the reply are too long");
  Conn& c = it->second;
  c.qp = &qp;
  std::vector<std::byte> reply(offer::kProofBytes + caps().max_reply_private);  // padded, as some devices do it
  std::copy(data.begin(), data.end(), reply.begin() + offer::kProofBytes);
  const auto claim = c.evidence.claim(manner_->near_end(qp, c.id.get()), std::span(reply).subspan(offer::kProofBytes));
  const offer::Proof proof = prove(secret_, Says::reply, claim);
  std::copy(proof.begin(), proof.end(), reply.begin());
  rdma_conn_param p = parameters(c);
  p.private_data = reply.data();
  p.private_data_len = static_cast<std::uint8_t>(reply.size());
  if (auto up = manner_->accept(qp, c.id.get(), p); !up) return up;
  c.step = Step::answered;
  c.deadline = now() + kHandshake;
  return Unit{};
}

void RdmaCm::reject(ConnId id, Reason reason, std::span<const std::byte> data) noexcept {
  const auto it = conns_.find(id);
  if (it == conns_.end() || it->second.step != Step::asked) return;
  std::array<std::byte, 255> bytes;
  offer::emit_refusal(reason, bytes.data());
  const std::size_t cut = std::min(data.size(), caps().max_reject_private);
  std::copy_n(data.begin(), cut, bytes.begin() + offer::kRefusalBytes);
  rdma_reject(it->second.id.get(), bytes.data(), static_cast<std::uint8_t>(offer::kRefusalBytes + cut));
  conn_by_key_.erase(it->second.key);
  conns_.erase(it);
}

void RdmaCm::disconnect(ConnId id) noexcept {
  const auto it = conns_.find(id);
  if (it == conns_.end()) return;
  if (it->second.step == Step::asked) return reject(id, Reason::refused, {});
  if (it->second.step == Step::requested)
    manner_->abandon(std::move(it->second.id));
  else if (it->second.step != Step::finding)
    rdma_disconnect(it->second.id.get());
  conn_by_key_.erase(it->second.key);
  conns_.erase(it);
  if (!turn_.empty()) bell_->ring();
}

/// Over, and the owner is told how.
void RdmaCm::end(ConnId id, Reason reason, std::span<const std::byte> data, bool refused) {
  const auto it = conns_.find(id);
  if (it == conns_.end()) return;
  Conn c = std::move(it->second);
  conn_by_key_.erase(c.key);
  conns_.erase(it);
  if (c.step == Step::requested) manner_->abandon(std::move(c.id));
  const bool unanswered = c.step == Step::finding || c.step == Step::requested;
  if (!unanswered && c.step != Step::asked) rdma_disconnect(c.id.get());  // the kernel leaves the QP as it is until then
  if (c.step == Step::asked) {
    std::array<std::byte, offer::kRefusalBytes> why;
    offer::emit_refusal(reason, why.data());
    rdma_reject(c.id.get(), why.data(), static_cast<std::uint8_t>(why.size()));
  }
  tell(refused      ? EventKind::rejected
       : unanswered ? EventKind::unreachable
                    : EventKind::disconnected,
       id, c.cookie, reason, data, true);
}

void RdmaCm::withdraw(std::uint64_t cookie) noexcept {
  offers_.erase(cookie);
  rendezvous_->cancel(cookie);
  dials_.erase(cookie);
  relay_.forget(cookie);
  std::erase_if(conns_, [&](const auto& each) {
    const bool mine = each.second.cookie == cookie && each.second.step == Step::finding;
    if (mine) conn_by_key_.erase(each.second.key);
    return mine;
  });
  if (!turn_.empty()) bell_->ring();
}

void RdmaCm::on_cm_event(const CmEvent& event) {
  if (event.type == RDMA_CM_EVENT_CONNECT_REQUEST) {
    const bool ours = std::any_of(listeners_.begin(), listeners_.end(), [&](const auto& l) { return l.second.key == event.key; });
    return ours ? on_request(event) : void();
  }
  const auto it = conn_by_key_.find(event.key);
  if (it == conn_by_key_.end()) return;
  const ConnId id = it->second;
  on_conn_event(id, conns_.at(id), event);
}

void RdmaCm::on_conn_event(ConnId id, Conn& c, const CmEvent& event) {
  switch (event.type) {
    case RDMA_CM_EVENT_ADDR_RESOLVED:
      if (rdma_resolve_route(c.id.get(), kResolveMs) != 0) end(id, Reason::no_peer);
      return;
    case RDMA_CM_EVENT_ROUTE_RESOLVED:
      return request(id);
    case RDMA_CM_EVENT_CONNECT_RESPONSE:
    case RDMA_CM_EVENT_ESTABLISHED:
      if (c.step == Step::requested) {
        c.step = Step::replied;
        c.granted.responder_resources = event.responder_resources;
        c.granted.initiator_depth = event.initiator_depth;
        if (!is_proved_by_reply(c, event)) return end(id, Reason::unproven, {}, true);
        heard_of(c.peer);
        tell(EventKind::reply, id, c.cookie, Reason::none, event.private_data().subspan(offer::kProofBytes));
      } else if (c.step == Step::answered) {
        c.step = Step::established;
        c.deadline = 0;
        heard_of(c.peer);
        tell(EventKind::established, id, c.cookie, Reason::none);
      }
      return;
    case RDMA_CM_EVENT_REJECTED:
      if (const auto why = offer::parse_refusal(event.private_data()); why && c.step == Step::requested)
        return end(id, *why, event.private_data().subspan(offer::kRefusalBytes), true);
      return end(id, Reason::no_peer);
    case RDMA_CM_EVENT_ADDR_ERROR:
    case RDMA_CM_EVENT_ROUTE_ERROR:
    case RDMA_CM_EVENT_UNREACHABLE:
    case RDMA_CM_EVENT_CONNECT_ERROR:
      return end(id, c.step == Step::finding || c.step == Step::requested ? Reason::no_peer : Reason::peer_died);
    case RDMA_CM_EVENT_DISCONNECTED:
    case RDMA_CM_EVENT_DEVICE_REMOVAL:
      return end(id, Reason::peer_died);
    default:
      return;
  }
}

void RdmaCm::on_removal(const CmEvent& event) {
  if (Device* device = find_device_(event.device.c_str()); device != nullptr && device_goes_) device_goes_(*device);
}

// An identifier that the kernel has ended stays as it is, and hears nothing of a device that comes in that one's place.
void RdmaCm::devices_changed(const Device* going) noexcept {
  for (auto& [host, known] : known_) known.until = 0;
  if (going == nullptr) return;
  const auto is_on_it = [going](const RdmaId& id) {
    const char* name = id != nullptr ? device_name_of(id.get()) : nullptr;
    return name != nullptr && std::strcmp(name, going->name()) == 0;
  };
  std::vector<ConnId> over;
  for (const auto& [id, c] : conns_)
    if (c.device == going || is_on_it(c.id)) over.push_back(id);
  for (const ConnId id : over) end(id, Reason::peer_died);
  std::erase_if(listeners_, [&](const auto& each) { return is_on_it(each.second.id); });
  std::erase_if(known_, [&](const auto& each) { return is_on_it(each.second.id); });
  for (const auto& [server, used] : held_) rendezvous_->let_go(server);  // those on other devices are taken anew
  held_.clear();
  for (const auto& [cookie, o] : offers_) rendezvous_->cancel(cookie);
  std::erase_if(paths_, [going](const auto& each) { return std::get<Device*>(each.first) == going; });
}

int RdmaCm::next_timeout_ms() const noexcept {
  Nanos first = 0;
  const auto consider = [&first](Nanos t) {
    if (t != 0 && (first == 0 || t < first)) first = t;
  };
  for (const auto& [cookie, o] : offers_) {
    consider(o.patience.ends);
    if (!o.waiting) consider(std::max<Nanos>(o.next_try, 1));
  }
  for (const auto& [cookie, d] : dials_) consider(std::min(d.patience.ends, std::max<Nanos>(d.next_look, 1)));
  for (const auto& [id, c] : conns_) consider(c.deadline);
  if (const auto due = early_.next_due()) consider(*due);
  for (const auto& [address, used] : held_) consider(used + kKeep);
  for (const auto& [address, l] : listeners_) consider(l.used + kKeep);
  if (first == 0) return -1;
  return static_cast<int>(std::clamp<Nanos>((first - now() + kMillisecond - 1) / kMillisecond, 0, 60'000));
}

/// Those that have waited the longest first, and no more to a host than it has the time for.
void RdmaCm::make_offers(Nanos t) {
  std::map<IpAddress, long> under_way;
  std::vector<std::pair<Nanos, std::uint64_t>> due;
  const auto host_of = [](const Offered& o) { return IpAddress::from(o.anchor.remote).with_port(0); };
  for (auto& [cookie, o] : offers_) {
    const bool is_due = t >= o.next_try;
    o.asking = o.asking && !is_due;
    if (o.asking) ++under_way[host_of(o)];
    if (is_due) due.emplace_back(o.next_try, cookie);
  }
  std::ranges::sort(due);
  for (const auto& [since, cookie] : due) {
    Offered& o = offers_.at(cookie);
    const Transcript transcript = transcript_of_(cookie);
    o.waiting = false;
    if (!suffices_for_offer(transcript)) {
      o.next_try = t + kBackoff[std::min(o.tries++, std::size(kBackoff) - 1)];
      continue;
    }
    long& to_host = under_way[host_of(o)];
    o.waiting = to_host >= kAtOnce;
    if (o.waiting) {
      if (!o.evidence.is_said()) o.patience.renew(t);  // its time begins with the first try
      continue;
    }
    ++to_host;
    o.asking = true;
    o.next_try = t + rendezvous_->patience_ms() * kMillisecond;  // until the answer says more
    o.evidence.say(transcript, o.offer);
    rendezvous_->send(cookie, IpAddress::from(o.anchor.local), IpAddress::from(o.anchor.remote), o.offer);
  }
}

void RdmaCm::keep_time() {
  const Nanos t = now();
  std::vector<std::uint64_t> over, held_offers;
  for (const auto& [cookie, o] : offers_)
    if (o.patience.is_over(t)) over.push_back(cookie);
  for (auto& [cookie, d] : dials_) {
    if (d.has_turn) d.patience.renew(t);
    if (d.patience.is_over(t)) {
      over.push_back(cookie);
    } else if (t >= d.next_look) {
      const IpAddress here = IpAddress::from(d.anchor.local);
      d.next_look = t + kBackoff[std::min(d.looks++, std::size(kBackoff) - 1)];
      if (d.offer) held_offers.push_back(cookie);
      if (held_.contains(here) || rendezvous_->hold(here))
        held_[here] = t;
      else
        (void)relay_.wait_for(cookie);
    }
  }
  for (const std::uint64_t cookie : over) {
    const auto dial = dials_.find(cookie);
    const auto offered = offers_.find(cookie);
    const bool met =
        (dial != dials_.end() && dial->second.offer) ||
        (offered != offers_.end() && (offered->second.evidence.is_guessed_at() || !offered->second.evidence.is_said()));
    const bool had_turn = dial != dials_.end() && dial->second.has_turn;
    const bool answered = (dial != dials_.end() && dial->second.offer) || (offered != offers_.end() && offered->second.noted);
    withdraw(cookie);
    const Reason why = had_turn ? Reason::timed_out : met ? Reason::unproven : Reason::no_peer;
    tell(EventKind::unreachable, ConnId::none, cookie, why, {}, answered);
  }
  make_offers(t);
  for (const std::uint64_t cookie : held_offers)
    if (const auto it = dials_.find(cookie); it != dials_.end()) consider(cookie, offer::Offer(*it->second.offer));
  for (const CmEvent& event : early_.take_due(t)) on_request(event, true);
  std::vector<ConnId> late;
  for (const auto& [id, c] : conns_)
    if (c.deadline != 0 && t >= c.deadline) late.push_back(id);
  for (const ConnId id : late) end(id, Reason::timed_out);
  std::erase_if(held_, [&](const auto& each) {
    if (t < each.second + kKeep) return false;
    rendezvous_->let_go(each.first);
    return true;
  });
  const auto waits_at = [this](const IpAddress& host) {
    return std::any_of(offers_.begin(), offers_.end(),
                       [&host](const auto& o) { return IpAddress::from(o.second.anchor.local).same_host(host); });
  };
  for (auto& [host, listener] : listeners_)
    if (waits_at(host)) listener.used = t;
  std::erase_if(listeners_, [t](const auto& each) { return t >= each.second.used + kKeep; });
}

void RdmaCm::progress() {
  std::uint64_t count = 0;
  sys::call(SYS_read, bell_->fd, sys::arg(&count), sizeof count);
  for (const ConnId failed : bell_->take_failed()) on_failed(failed);
  for (CmEvent event; channel_->next(event);) {
    if (event.type == RDMA_CM_EVENT_DEVICE_REMOVAL) on_removal(event);
    if (!rendezvous_->take(event)) on_cm_event(event);
  }
  rendezvous_->progress();
  relay_.progress([this](std::uint64_t cookie, const offer::Offer& o) {
    const auto it = dials_.find(cookie);
    if (it == dials_.end()) return;
    const IpAddress local = IpAddress::from(it->second.anchor.local), remote = IpAddress::from(it->second.anchor.remote);
    if (o.hash == offer::hash_of(remote, local)) consider(cookie, o);
  });
  keep_time();
  take_turns();
  while (!pending_.empty()) {
    Pending p = std::move(pending_.front());
    pending_.pop_front();
    p.event.private_data = p.data;
    if (handler_) handler_(p.event);
  }
}

void RdmaCm::retire() noexcept {
  for (auto& [id, c] : conns_)
    if (c.step == Step::requested) manner_->abandon(std::move(c.id));
  std::erase_if(conns_,
                [](const auto& each) { return each.second.step != Step::answered && each.second.step != Step::established; });
  conn_by_key_.clear();
  pending_.clear();
  early_.clear();
  offers_.clear();
  dials_.clear();
  turn_.clear();
  relay_.close_all();
  listeners_.clear();
  known_.clear();
  held_.clear();
  rendezvous_ = nullptr;
}

void RdmaCm::abandon_in_child() noexcept {
  channel_->abandon_in_child();
  abandon_librdmacm_contexts();
  if (rendezvous_ != nullptr) rendezvous_->abandon_in_child();
  relay_.close_all();
  for (const int fd : {bell_->fd, epoll_fd_}) {
    forget_fd(fd);
    sys::call(SYS_close, fd);
  }
}

}  // namespace

Result<std::unique_ptr<ConnectionManager>> make_rdma_cm(std::unique_ptr<Manner> manner, FindDevice find_device,
                                                        const Secret& secret, DeviceGoes device_goes) {
  auto channel = RdmaChannel::open();
  if (!channel) return Err{channel.error()};
  return std::unique_ptr<ConnectionManager>(
      new RdmaCm(std::move(manner), std::move(find_device), secret, std::move(device_goes), std::move(*channel)));
}

}  // namespace rdma::cm
