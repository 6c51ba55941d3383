// Devices of libibverbs as Fixtures of the device suite. The two ends are two devices that reach each other, as
// scripts/vm.d/network makes them:
//   VerbsIb     SDP_TEST_IB   = "DEVICE ADDRESS DEVICE ADDRESS", by default "rxe0 10.77.0.1 rxe1 10.77.0.2"
//   VerbsRnic   SDP_TEST_RNIC = likewise, by default "siw0 10.77.1.1 siw1 10.77.1.2"
// ADDRESS is of either family; of a link-local one with the network device: fe80::1%v0.
#pragma once

#include <fcntl.h>
#include <netdb.h>
#include <rdma/rdma_cma.h>
#include <sys/socket.h>
#include <unistd.h>

#include <array>
#include <cstdlib>
#include <cstring>
#include <sstream>
#include <string>
#include <utility>

#include "rdma_core/cm/ip_address.hpp"
#include "rdma_core/drivers/verbs/verbs_device.hpp"
#include "tests/conformance/ends.hpp"

namespace rdma::conformance {

/// A device and an address on it.
struct Port {
  std::string device;
  std::string address;

  cm::IpAddress ip(std::uint16_t port = 0) const {
    addrinfo hints{}, *found = nullptr;
    hints.ai_flags = AI_NUMERICHOST;
    BOOST_REQUIRE_MESSAGE(getaddrinfo(address.c_str(), nullptr, &hints, &found) == 0, address << " is no address");
    sockaddr_storage storage{};
    std::memcpy(&storage, found->ai_addr, found->ai_addrlen);
    freeaddrinfo(found);
    return cm::IpAddress::from(storage).with_port(port);
  }
  Gid gid() const {
    Gid gid{};
    const cm::IpAddress here = ip();
    if (here.family == AF_INET6) {
      std::memcpy(gid.data(), here.bytes.data(), gid.size());
    } else {
      gid[10] = gid[11] = std::byte{0xFF};
      std::memcpy(gid.data() + 12, here.bytes.data(), 4);
    }
    return gid;
  }
};

inline std::array<Port, 2> ports_from(const char* variable, const char* standard) {
  const char* set = getenv(variable);
  std::istringstream words(set != nullptr ? set : standard);
  std::array<Port, 2> ports;
  for (Port& port : ports) words >> port.device >> port.address;
  BOOST_REQUIRE_MESSAGE(!words.fail(), variable << " is not DEVICE ADDRESS DEVICE ADDRESS");
  return ports;
}

class VerbsPair {
 public:
  explicit VerbsPair(std::array<Port, 2> ports) : ports_(std::move(ports)) {
    for (std::size_t i = 0; i < 2; ++i) {
      auto opened = verbs::VerbsDevice::open(ports_[i].device);
      BOOST_REQUIRE_MESSAGE(opened.ok(), ports_[i].device << ": " << (opened ? "" : opened.error().what)
                                                          << " (these tests want devices: see scripts/vm)");
      devices_[i] = std::move(*opened);
    }
  }
  Device& device(Side side) { return at(side); }
  /// Lets the kernel's threads, which do the device's work, have the processor.
  bool pump() {
    usleep(200);
    for (auto& device : devices_) device->progress();
    return true;
  }
  void finish() {}

 protected:
  verbs::VerbsDevice& at(Side side) { return *devices_[side == Side::a ? 0 : 1]; }
  const Port& port(Side side) const { return ports_[side == Side::a ? 0 : 1]; }
  static Side other(Side side) { return side == Side::a ? Side::b : Side::a; }
  static constexpr Access kEverything = Access::local_write | Access::remote_write | Access::remote_read;
  static constexpr Side kSides[] = {Side::a, Side::b};

 private:
  std::array<Port, 2> ports_;
  std::array<std::unique_ptr<verbs::VerbsDevice>, 2> devices_;
};

/// An IB CA's Qps need no manager: each is told of the other.
class VerbsIb : public VerbsPair {
 public:
  VerbsIb() : VerbsPair(ports_from("SDP_TEST_IB", "rxe0 10.77.0.1 rxe1 10.77.0.2")) {}
  void connect(const MakeQp& make) {
    std::array<Qp*, 2> qps{};
    for (const Side side : kSides) qps[side == Side::a ? 0 : 1] = &make(side, at(side), Path{});
    for (const Side side : kSides) {
      Qp& qp = *qps[side == Side::a ? 0 : 1];
      IbQpAttributes ib;
      ib.pkey_index = std::uint16_t{0};
      ib.port = std::uint8_t{1};
      ib.dgid = port(other(side)).gid();
      ib.sgid_index = Ends<VerbsIb>::must(at(side).gid_index(port(side).gid()));
      ib.dest_qpn = static_cast<std::uint32_t>(qps[side == Side::a ? 1 : 0]->qpn());
      ib.rq_psn = ib.sq_psn = 4711U;
      ib.path_mtu = std::uint8_t{3};
      ib.min_rnr_timer = std::uint8_t{1};
      ib.ack_timeout = std::uint8_t{14};
      ib.retry_count = std::uint8_t{6};
      ib.rnr_retry = std::uint8_t{7};
      QpAttributes attr;
      attr.access = kEverything;
      attr.max_read_outstanding = attr.max_read_incoming = static_cast<std::uint8_t>(at(side).attr().max_read_outstanding);
      attr.transport = ib;
      for (const QpState to : {QpState::init, QpState::rtr, QpState::rts}) {
        attr.state = to;
        const auto moved = qp.modify(attr);
        BOOST_REQUIRE_MESSAGE(moved.ok(), to_string(to) << ": " << (moved ? "" : moved.error().what));
      }
    }
  }
};

/// The kernel's iWARP CM ties an RNIC's Qp to its stream: side a connects to side b. Some ends of the peer's it only reports, and
/// leaves the Qp as it is until the connection is ended here too.
class VerbsRnic : public VerbsPair {
 public:
  /// Soft-iWARP (6.12) looks at key and bounds of a Read, not at the permission: all registered memory is readable for the peer.
  static constexpr bool kServesAnyRead = true;
  VerbsRnic() : VerbsPair(ports_from("SDP_TEST_RNIC", "siw0 10.77.1.1 siw1 10.77.1.2")) {
    channel_ = rdma_create_event_channel();
    BOOST_REQUIRE(channel_ != nullptr);
  }
  ~VerbsRnic() {
    for (rdma_cm_id* id : ids_) rdma_destroy_id(id);
    rdma_destroy_event_channel(channel_);
  }
  void connect(const MakeQp& make) {
    fcntl(channel_->fd, F_SETFL, fcntl(channel_->fd, F_GETFL) & ~O_NONBLOCK);
    rdma_cm_id* const listener = new_id();
    const cm::IpAddress near = port(Side::a).ip(), far = port(Side::b).ip();
    sockaddr_storage at_far = far.to_sockaddr();
    BOOST_REQUIRE_EQUAL(rdma_bind_addr(listener, reinterpret_cast<sockaddr*>(&at_far)), 0);
    BOOST_REQUIRE_EQUAL(rdma_listen(listener, 1), 0);
    cm::IpAddress target = far.with_port(ntohs(rdma_get_src_port(listener)));
    target.scope = near.scope;

    Qp& active = prepared(make, Side::a);
    rdma_conn_param parameters = with(active);
    // The kernel chooses a local port without a look at those of TCP, where old connections may still have it.
    for (int tries = 0; !dialled(near, target, parameters); ++tries) BOOST_REQUIRE_LT(tries, 16);

    rdma_cm_id* const accepted = expect(RDMA_CM_EVENT_CONNECT_REQUEST);
    ids_.push_back(accepted);
    Qp& passive = prepared(make, Side::b);
    parameters = with(passive);
    BOOST_REQUIRE_EQUAL(rdma_accept(accepted, &parameters), 0);
    expect(RDMA_CM_EVENT_ESTABLISHED);
    expect(RDMA_CM_EVENT_ESTABLISHED);
    for (Qp* qp : {&active, &passive}) {
      QpAttributes attr;
      attr.state = QpState::rts;
      RnicQpAttributes rnic;
      rnic.peer = 1U;
      rnic.stream_mode = false;
      attr.transport = rnic;
      BOOST_REQUIRE(qp->modify(attr));
    }
    fcntl(channel_->fd, F_SETFL, fcntl(channel_->fd, F_GETFL) | O_NONBLOCK);
  }
  bool pump() {
    for (rdma_cm_event* event = nullptr; rdma_get_cm_event(channel_, &event) == 0;) {
      rdma_cm_id* const id = event->id;
      const bool disconnected = event->event == RDMA_CM_EVENT_DISCONNECTED;
      rdma_ack_cm_event(event);
      if (disconnected) rdma_disconnect(id);
    }
    return VerbsPair::pump();
  }

 private:
  rdma_cm_id* new_id() {
    rdma_cm_id* id = nullptr;
    BOOST_REQUIRE_EQUAL(rdma_create_id(channel_, &id, nullptr, RDMA_PS_TCP), 0);
    ids_.push_back(id);
    return id;
  }
  bool dialled(const cm::IpAddress& near, const cm::IpAddress& far, rdma_conn_param& parameters) {
    rdma_cm_id* const dialler = new_id();
    sockaddr_storage from = near.to_sockaddr(), to = far.to_sockaddr();
    BOOST_REQUIRE_EQUAL(rdma_resolve_addr(dialler, reinterpret_cast<sockaddr*>(&from), reinterpret_cast<sockaddr*>(&to), 5000), 0);
    expect(RDMA_CM_EVENT_ADDR_RESOLVED);
    BOOST_REQUIRE_EQUAL(rdma_resolve_route(dialler, 5000), 0);
    expect(RDMA_CM_EVENT_ROUTE_RESOLVED);
    return rdma_connect(dialler, &parameters) == 0;
  }
  rdma_cm_id* expect(rdma_cm_event_type type) {
    rdma_cm_event* event = nullptr;
    BOOST_REQUIRE_EQUAL(rdma_get_cm_event(channel_, &event), 0);
    const rdma_cm_event_type got = event->event;
    rdma_cm_id* const id = event->id;
    const int status = event->status;
    rdma_ack_cm_event(event);
    BOOST_REQUIRE_MESSAGE(got == type, rdma_event_str(got) << " (" << status << ") in the place of " << rdma_event_str(type));
    return id;
  }
  Qp& prepared(const MakeQp& make, Side side) {
    Qp& qp = make(side, at(side), Path{});
    QpAttributes attr;
    attr.state = QpState::init;
    attr.access = kEverything;
    attr.transport = RnicQpAttributes{};
    const auto moved = qp.modify(attr);
    BOOST_REQUIRE_MESSAGE(moved.ok(), "init: " << (moved ? "" : moved.error().what));
    return qp;
  }
  rdma_conn_param with(const Qp& qp) {
    rdma_conn_param parameters{};
    parameters.qp_num = static_cast<std::uint32_t>(qp.qpn());
    parameters.initiator_depth = parameters.responder_resources =
        static_cast<std::uint8_t>(at(Side::a).attr().max_read_outstanding);
    return parameters;
  }

  rdma_event_channel* channel_ = nullptr;
  std::vector<rdma_cm_id*> ids_;
};

}  // namespace rdma::conformance
