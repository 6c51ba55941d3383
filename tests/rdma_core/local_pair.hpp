// Processes that meet over a TCP connection by LocalCm: what its tests share.
#pragma once

#include <arpa/inet.h>
#include <netinet/in.h>
#include <poll.h>
#include <sys/socket.h>
#include <unistd.h>

#include <boost/test/unit_test.hpp>
#include <cstring>
#include <map>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "rdma_core/base/clock.hpp"
#include "rdma_core/cm/local_cm.hpp"
#include "rdma_core/drivers/shm/shm_device.hpp"

namespace rdma::cm::test {

inline Anchor anchor_of(int fd) {
  Anchor anchor;
  anchor.fd = fd;
  socklen_t length = sizeof anchor.cookie;
  BOOST_REQUIRE(getsockopt(fd, SOL_SOCKET, SO_COOKIE, &anchor.cookie, &length) == 0);
  length = sizeof anchor.local;
  BOOST_REQUIRE(getsockname(fd, reinterpret_cast<sockaddr*>(&anchor.local), &length) == 0);
  length = sizeof anchor.remote;
  BOOST_REQUIRE(getpeername(fd, reinterpret_cast<sockaddr*>(&anchor.remote), &length) == 0);
  return anchor;
}

inline int tcp_listener(sockaddr_storage& address, int family = AF_INET) {
  address = {};
  address.ss_family = static_cast<sa_family_t>(family);
  if (family == AF_INET)
    reinterpret_cast<sockaddr_in&>(address).sin_addr.s_addr = htonl(INADDR_LOOPBACK);
  else
    reinterpret_cast<sockaddr_in6&>(address).sin6_addr = in6addr_any;
  const int fd = socket(family, SOCK_STREAM | SOCK_CLOEXEC, 0);
  const int off = 0;
  if (family == AF_INET6) setsockopt(fd, IPPROTO_IPV6, IPV6_V6ONLY, &off, sizeof off);
  socklen_t length = sizeof address;
  BOOST_REQUIRE(bind(fd, reinterpret_cast<sockaddr*>(&address), length) == 0);
  BOOST_REQUIRE(listen(fd, 64) == 0);
  BOOST_REQUIRE(getsockname(fd, reinterpret_cast<sockaddr*>(&address), &length) == 0);
  return fd;
}

/// A TCP connection with both ends in this process; `client` is the passive side of the CM.
struct Tcp {
  int client = -1, server = -1;
  explicit Tcp(int server_family = AF_INET, bool by_v4 = true) {
    sockaddr_storage address;
    const int listener = tcp_listener(address, server_family);
    sockaddr_storage to = address;
    if (server_family == AF_INET6 && by_v4) {
      const in_port_t port = reinterpret_cast<sockaddr_in6&>(address).sin6_port;
      to = {};
      to.ss_family = AF_INET;
      reinterpret_cast<sockaddr_in&>(to).sin_port = port;
      reinterpret_cast<sockaddr_in&>(to).sin_addr.s_addr = htonl(INADDR_LOOPBACK);
    } else if (server_family == AF_INET6) {
      reinterpret_cast<sockaddr_in6&>(to).sin6_addr = in6addr_loopback;
    }
    client = socket(to.ss_family, SOCK_STREAM | SOCK_CLOEXEC, 0);
    BOOST_REQUIRE(connect(client, reinterpret_cast<sockaddr*>(&to), sizeof to) == 0);
    server = accept4(listener, nullptr, nullptr, SOCK_CLOEXEC);
    close(listener);
  }
  ~Tcp() {
    close(client);
    close(server);
  }
  Tcp(const Tcp&) = delete;
};

/// Keeps what an event said: its private data are valid in the handler only.
struct Seen {
  EventKind kind;
  ConnId conn;
  std::uint64_t cookie;
  Path path;
  Reason reason;
  std::string data;
};

/// One process's end: device, CM, and a QP per connection. Answers requests and replies as told.
struct Node {
  std::unique_ptr<shm::ShmDevice> device;
  std::unique_ptr<LocalCm> cm;
  std::unique_ptr<CompletionChannel> channel;
  std::unique_ptr<Cq> cq;
  struct Lane {
    std::unique_ptr<Pd> pd;
    std::unique_ptr<Mr> extent;
    std::unique_ptr<Qp> qp;
  };
  std::map<ConnId, Lane> lanes;
  std::vector<Seen> seen;
  bool answers = true;  ///< accept requests, establish replies
  bool rejects = false;
  std::string request_data = "please", reply_data = "welcome", reject_data = "no";

  explicit Node(NodeType flavour = NodeType::ib_ca) {
    device = std::move(*shm::ShmDevice::create({.flavour = flavour, .segment_bytes = std::size_t{16} << 20}));
    channel = std::move(*device->create_channel());
    cq = std::move(*device->create_cq(1024, channel.get()));
    cm = std::move(*LocalCm::create(*device));
    cm->on_event([this](const Event& event) { on_event(event); });
  }
  Qp* make_lane(Device& d, const Path& path, ConnId id) {
    Lane& lane = lanes[id];
    auto pd = d.create_pd(path);
    if (!pd) return nullptr;
    lane.pd = std::move(*pd);
    lane.extent = std::move(*lane.pd->map_extent(8192));
    lane.qp = std::move(*lane.pd->create_qp({.send_cq = cq.get(), .recv_cq = cq.get()}));
    for (unsigned i = 0; i < 4; ++i) post(lane, i);
    return lane.qp.get();
  }
  static std::byte* buffer(Lane& lane, std::uint64_t i) { return lane.extent->addr + 64 + i * 128; }
  static void post(Lane& lane, std::uint64_t i) {
    const RecvWr wr{.wr_id = i, .addr = buffer(lane, i), .length = 64};
    BOOST_REQUIRE((lane.qp->post_recv({&wr, 1}) == Post::ok));
  }
  void on_event(const Event& event) {
    seen.push_back({event.kind, event.conn, event.anchor_cookie, event.path, event.reason,
                    std::string(reinterpret_cast<const char*>(event.private_data.data()), event.private_data.size())});
    if (event.kind == EventKind::request && rejects) {
      cm->reject(event.conn, Reason::refused, std::as_bytes(std::span(reject_data)));
    } else if (event.kind == EventKind::request && answers) {
      Qp* qp = make_lane(*event.device, event.path, event.conn);
      if (qp != nullptr) (void)cm->accept(event.conn, *qp, std::as_bytes(std::span(reply_data)));
    } else if (event.kind == EventKind::reply && answers) {
      (void)cm->establish(event.conn);
    }
  }
  void dial(const Anchor& anchor, unsigned timeout_ms = 5000) {
    BOOST_REQUIRE(cm->dial(anchor, timeout_ms, [this](Device& d, const Path& path, ConnId id) {
      return ConnectionManager::Proposal{make_lane(d, path, id), std::as_bytes(std::span(request_data))};
    }));
  }
  const Seen* find(EventKind kind, std::uint64_t cookie) const {
    for (const Seen& s : seen)
      if (s.kind == kind && s.cookie == cookie) return &s;
    return nullptr;
  }
  std::size_t links() const {
    std::size_t n = 0;
    for (const auto& link : device->links().all()) n += !link->self;
    return n;
  }
  bool send(ConnId conn, const char* text) {
    const Sge sge{reinterpret_cast<const std::byte*>(text), static_cast<std::uint32_t>(std::strlen(text)), {}};
    SendWr wr;
    wr.flags = kInline;
    wr.sge_count = 1;
    wr.sges = &sge;
    return lanes.at(conn).qp->post_send(wr) == Post::ok;
  }
  /// What arrived on `conn`, or nothing.
  std::optional<std::string> receive(ConnId conn) {
    Wc wc;
    if (cq->poll({&wc, 1}) != 1 || wc.status != WcStatus::success) return std::nullopt;
    Lane& lane = lanes.at(conn);
    std::string text(reinterpret_cast<const char*>(buffer(lane, wc.wr_id)), wc.byte_len);
    post(lane, wc.wr_id);
    return text;
  }
};

/// Drives the CMs, each asleep until it has something to do, until `done` says so. False after ten seconds.
template <class Done>
bool run(std::initializer_list<Node*> nodes, Done done) {
  const SteadyClock clock;
  const Nanos end = clock.now() + 10'000'000'000;
  while (!done()) {
    if (clock.now() > end) return false;
    std::vector<pollfd> fds;
    int timeout = 100;
    for (Node* node : nodes) {
      fds.push_back({node->cm->fd(), POLLIN, 0});
      const int wants = node->cm->next_timeout_ms();
      if (wants >= 0 && wants < timeout) timeout = wants;
    }
    poll(fds.data(), fds.size(), timeout);
    for (Node* node : nodes) node->cm->progress();
  }
  return true;
}

}  // namespace rdma::cm::test
