// IbCm: InfiniBand and RoCE. The rendezvous for TCP port P is the service id of RDMA_PS_IB with P's number; below 1024, where only
// root may have those, 64512 + P. An offer is a REQ without a QP, its answer the private data of a REJ: nothing is left of either.
#include <errno.h>

#include <algorithm>
#include <cstring>
#include <map>
#include <unordered_map>
#include <utility>

#include "rdma_core/base/log.hpp"
#include "rdma_core/cm/rdma_manner.hpp"

namespace rdma::cm {
namespace {

constexpr int kResolveMs = 1000;
constexpr int kBacklog = 64;
// The time until a path is given up: (6 + 1) * 4.096 us * 2^14, half a second.
constexpr std::uint8_t kAckTimeout = 14, kRetryCount = 6, kRnrRetry = 7;
constexpr std::uint8_t kMinRnrTimer = 12;  ///< 0.64 ms

constexpr std::uint16_t service_port(std::uint16_t tcp_port) noexcept {
  return tcp_port < 1024 ? static_cast<std::uint16_t>(64512 + tcp_port) : tcp_port;
}

class IbRendezvous final : public Rendezvous {
 public:
  IbRendezvous(RdmaChannel& channel, OnOffer on_offer, OnAnswer on_answer)
      : channel_(channel), on_offer_(std::move(on_offer)), on_answer_(std::move(on_answer)) {}

  void send(std::uint64_t cookie, const IpAddress& from, const IpAddress& server, const offer::Offer& o) override {
    cancel(cookie);
    const std::uint64_t key = channel_.new_key();
    auto id = channel_.create_id(RDMA_PS_IB, key);
    if (!id) return on_answer_(cookie, std::nullopt);
    sockaddr_storage near = from.with_port(0).to_sockaddr(), far = server.with_port(service_port(server.port)).to_sockaddr();
    if (rdma_resolve_addr(id->get(), reinterpret_cast<sockaddr*>(&near), reinterpret_cast<sockaddr*>(&far), kResolveMs) != 0)
      return on_answer_(cookie, std::nullopt);
    tries_[key] = {*id, cookie, o};
  }
  void cancel(std::uint64_t cookie) noexcept override {
    std::erase_if(tries_, [cookie](const auto& each) { return each.second.cookie == cookie; });
  }

  unsigned patience_ms() const noexcept override { return 1000; }  // the CM says what became of each

  bool hold(const IpAddress& server) override {
    const std::uint64_t key = channel_.new_key();
    auto id = channel_.bound_id(RDMA_PS_IB, key, server.with_port(service_port(server.port)));
    if (!id || rdma_listen(id->get(), kBacklog) != 0) return false;
    held_[key] = {*id, server};
    return true;
  }
  void let_go(const IpAddress& server) noexcept override {
    std::erase_if(held_, [&server](const auto& each) { return each.second.server == server; });
  }

  bool take(const CmEvent& event) override {
    if (event.type == RDMA_CM_EVENT_CONNECT_REQUEST) {
      const auto held = held_.find(event.key);
      if (held == held_.end()) return false;
      answer(event, held->second.server);
      return true;
    }
    const auto it = tries_.find(event.key);
    if (it == tries_.end()) return held_.contains(event.key);
    Try& t = it->second;
    switch (event.type) {
      case RDMA_CM_EVENT_ADDR_RESOLVED:
        if (rdma_resolve_route(t.id.get(), kResolveMs) != 0) over(it, std::nullopt);
        break;
      case RDMA_CM_EVENT_ROUTE_RESOLVED:
        if (!ask(t)) over(it, std::nullopt);
        break;
      case RDMA_CM_EVENT_REJECTED: {
        const auto answer = offer::Answer::parse(event.private_data());
        over(it, answer && answer->token == t.offer.token ? std::optional(answer->code) : std::nullopt);
        break;
      }
      default:  // nobody there; or a stranger who takes the connection, which ends with the identifier
        over(it, std::nullopt);
        break;
    }
    return true;
  }

 private:
  struct Try {
    RdmaId id;
    std::uint64_t cookie = 0;
    offer::Offer offer;
  };
  struct Held {
    RdmaId id;
    IpAddress server;
  };
  using Tries = std::unordered_map<std::uint64_t, Try>;

  static bool ask(const Try& t) {
    const auto bytes = t.offer.bytes();
    rdma_conn_param p{};
    p.private_data = bytes.data();
    p.private_data_len = static_cast<std::uint8_t>(bytes.size());
    p.qp_num = 1;  // none is behind it: the connection is refused, whatever the answer
    p.retry_count = kRetryCount;
    return rdma_connect(t.id.get(), &p) == 0;
  }
  void over(Tries::iterator it, std::optional<offer::Code> code) {
    const std::uint64_t cookie = it->second.cookie;
    tries_.erase(it);
    on_answer_(cookie, code);
  }
  void answer(const CmEvent& event, const IpAddress& server) {
    auto o = offer::Offer::parse(event.private_data());
    offer::Answer a;
    if (o && peer_of(event.request.get()).same_host(o->client)) {
      o->client.scope = server.scope;
      a.token = o->token;
      a.code = on_offer_(*o, server);
    }
    const auto bytes = a.bytes();
    rdma_reject(event.request.get(), bytes.data(), static_cast<std::uint8_t>(bytes.size()));
  }

  RdmaChannel& channel_;
  OnOffer on_offer_;
  OnAnswer on_answer_;
  Tries tries_;                                   ///< by key
  std::unordered_map<std::uint64_t, Held> held_;  ///< likewise
};

/// What the kernel's CM knows of the move.
Result<QpAttributes> attributes(rdma_cm_id* id, QpState to) {
  ibv_qp_attr known{};
  int mask = 0;
  known.qp_state = to == QpState::init ? IBV_QPS_INIT : to == QpState::rtr ? IBV_QPS_RTR : IBV_QPS_RTS;
  if (rdma_init_qp_attr(id, &known, &mask) != 0) return fail(errno, "ib cm: the kernel does not say how to move the QP");
  IbQpAttributes ib;
  if (to == QpState::init) {
    ib.pkey_index = known.pkey_index;
    ib.port = known.port_num;
  } else if (to == QpState::rtr) {
    Gid gid;
    std::memcpy(gid.data(), known.ah_attr.grh.dgid.raw, gid.size());
    ib.dgid = gid;
    ib.sgid_index = known.ah_attr.grh.sgid_index;
    ib.dlid = known.ah_attr.dlid;
    ib.service_level = known.ah_attr.sl;
    ib.port = known.ah_attr.port_num;
    ib.dest_qpn = known.dest_qp_num;
    ib.rq_psn = known.rq_psn;
    ib.path_mtu = static_cast<std::uint8_t>(known.path_mtu);
    ib.min_rnr_timer = kMinRnrTimer;
  } else {
    ib.sq_psn = known.sq_psn;
    ib.ack_timeout = kAckTimeout;
    ib.retry_count = kRetryCount;
    ib.rnr_retry = kRnrRetry;
  }
  QpAttributes attr;
  attr.state = to;
  attr.access = kPeerAccess;
  attr.transport = ib;
  return attr;
}

Result<Unit> move(Qp& qp, rdma_cm_id* id, QpState to, const rdma_conn_param& granted = {}) {
  auto attr = attributes(id, to);
  if (!attr) return Err{attr.error()};
  attr->max_read_incoming = granted.responder_resources;
  attr->max_read_outstanding = granted.initiator_depth;
  return qp.modify(*attr);
}

class IbManner final : public Manner {
 public:
  const char* name() const noexcept override { return "ib"; }
  NodeType node_type() const noexcept override { return NodeType::ib_ca; }
  rdma_port_space port_space() const noexcept override { return RDMA_PS_IB; }
  const Caps& caps() const noexcept override { return caps_; }
  std::unique_ptr<Rendezvous> make_rendezvous(RdmaChannel& channel, int, Rendezvous::OnOffer on_offer,
                                              Rendezvous::OnAnswer on_answer) override {
    return std::make_unique<IbRendezvous>(channel, std::move(on_offer), std::move(on_answer));
  }

  std::uint32_t near_end(const Qp& qp, rdma_cm_id*) const noexcept override { return static_cast<std::uint32_t>(qp.qpn()); }
  std::uint32_t far_end(const CmEvent& event, rdma_cm_id*) const noexcept override { return event.qp_num; }
  Result<Unit> connect(Qp& qp, const RdmaId& id, const rdma_conn_param& parameters, std::span<const std::byte> data,
                       std::function<void()>) override {
    if (auto moved = move(qp, id.get(), QpState::init); !moved) return moved;
    rdma_conn_param p = parameters;
    p.private_data = data.data();
    p.private_data_len = static_cast<std::uint8_t>(data.size());
    if (rdma_connect(id.get(), &p) != 0) return fail(errno, "ib cm: the request cannot be sent");
    return Unit{};
  }
  Result<Unit> establish(Qp& qp, rdma_cm_id* id, const rdma_conn_param& granted) override {
    for (const QpState to : {QpState::rtr, QpState::rts})
      if (auto moved = move(qp, id, to, granted); !moved) return moved;
    if (rdma_establish(id) != 0) return fail(errno, "ib cm: the connection cannot be completed");
    return Unit{};
  }
  Result<Unit> accept(Qp& qp, rdma_cm_id* id, rdma_conn_param parameters) override {
    for (const QpState to : {QpState::init, QpState::rtr, QpState::rts})
      if (auto moved = move(qp, id, to, parameters); !moved) return moved;
    if (rdma_accept(id, &parameters) != 0) return fail(errno, "ib cm: the reply cannot be sent");
    return Unit{};
  }

 private:
  // Behind librdmacm's own header an IB REQ carries 56 bytes, a REP 196, a REJ 148. The first Send may overtake the RTU.
  Caps caps_{56 - offer::kDialBytes, 196 - offer::kProofBytes, 148 - offer::kRefusalBytes, true, true};
};

}  // namespace

Result<std::unique_ptr<ConnectionManager>> make_ib_cm(FindDevice find_device, const Secret& secret, DeviceGoes device_goes) {
  return make_rdma_cm(std::make_unique<IbManner>(), std::move(find_device), secret, std::move(device_goes));
}

}  // namespace rdma::cm
