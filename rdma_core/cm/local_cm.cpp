#include "rdma_core/cm/local_cm.hpp"

#include <fcntl.h>
#include <sys/epoll.h>
#include <sys/random.h>
#include <sys/socket.h>
#include <sys/un.h>

#include <algorithm>
#include <cerrno>
#include <cstddef>
#include <cstdio>
#include <cstring>
#include <map>
#include <unordered_map>
#include <vector>

#include "rdma_core/base/clock.hpp"
#include "rdma_core/base/log.hpp"
#include "rdma_core/base/sys.hpp"
#include "rdma_core/cm/local_wire.hpp"
#include "rdma_core/cm/sock_diag.hpp"
#include "rdma_core/drivers/shm/shm_device.hpp"

namespace rdma::cm {

namespace {

using shm::OwnSegment;
using shm::PeerIdentity;
using shm::PeerSegment;
using shm::ProcessId;
using shm::ShmLink;

constexpr Nanos kMillisecond = 1'000'000;
constexpr Nanos kHandshake = 2000 * kMillisecond;  ///< a peer that falls silent costs a descriptor for so long
constexpr std::size_t kMaxHandshakes = 256;        ///< at once
constexpr std::size_t kMaxHandshakesOfOther = 32;  ///< at once with one other user
constexpr std::size_t kMaxLinks = 1024;            ///< with one's own user
constexpr std::size_t kMaxLinksOfOther = 64;       ///< with one other user
constexpr std::size_t kMaxUnsent = 4096;
constexpr Nanos kIdleCheck = 5000 * kMillisecond;
constexpr std::uint32_t kOverflowUid = 65534;
constexpr int kBackoffMs[] = {1, 2, 5, 10, 25, 50, 100};
constexpr wire::Plain kRing = wire::make_plain(wire::Type::ring, 0);

Nanos now() noexcept { return SteadyClock{}.now(); }

/// "\0sdpreload/1/COOKIE": abstract, so it belongs to the network namespace and leaves nothing behind.
socklen_t name_of(std::uint64_t cookie, sockaddr_un& address) noexcept {
  address = {};
  address.sun_family = AF_UNIX;
  const int n = std::snprintf(address.sun_path + 1, sizeof address.sun_path - 1, "sdpreload/1/%016llx",
                              static_cast<unsigned long long>(cookie));
  return static_cast<socklen_t>(offsetof(sockaddr_un, sun_path) + 1 + static_cast<std::size_t>(n));
}

/// Does `uid` name one user? The overflow uid stands for every user that this user namespace does not map; where all are mapped it
/// is the ordinary user nobody.
bool proves_identity(std::uint32_t uid) noexcept {
  if (uid != kOverflowUid) return true;
  char map[128];
  const long fd = sys::call(SYS_openat, AT_FDCWD, sys::arg("/proc/self/uid_map"), O_RDONLY | O_CLOEXEC);
  if (fd < 0) return false;
  const long n = sys::call(SYS_read, fd, sys::arg(map), sizeof map - 1);
  sys::call(SYS_close, fd);
  if (n <= 0) return false;
  map[n] = '\0';
  unsigned inside = 1, outside = 1, count = 0;
  return std::sscanf(map, "%u %u %u", &inside, &outside, &count) == 3 && inside == 0 && outside == 0 && count == ~0U;
}

int new_socket() noexcept {
  return shm::move_high(static_cast<int>(sys::call(SYS_socket, AF_UNIX, SOCK_SEQPACKET | SOCK_NONBLOCK | SOCK_CLOEXEC, 0)));
}

bool peer_credentials(int fd, ucred& out) noexcept {
  socklen_t len = sizeof out;
  return sys::call(SYS_getsockopt, fd, SOL_SOCKET, SO_PEERCRED, sys::arg(&out), sys::arg(&len)) == 0;
}

struct Frame {
  std::byte bytes[wire::kMaxFrame];
  std::size_t size = 0;
  int fds[4] = {-1, -1, -1, -1};
  int fd_count = 0;

  ~Frame() {
    for (int i = 0; i < fd_count; ++i)
      if (fds[i] >= 0) sys::call(SYS_close, fds[i]);
  }
  int take(int i) noexcept {
    const int fd = fds[i];
    fds[i] = -1;
    return fd;
  }
  template <class T>
  bool as(wire::Type type, T& out) const noexcept {
    if (size != sizeof(T)) return false;
    std::memcpy(&out, bytes, sizeof out);
    return out.head.magic == wire::kMagic && out.head.version == wire::kVersion &&
           out.head.type == static_cast<std::uint16_t>(type) && out.head.bytes == sizeof(T);
  }
};

/// >0: a frame; 0: the peer is gone; <0: -errno.
long receive(int fd, Frame& frame) noexcept {
  iovec iov{frame.bytes, sizeof frame.bytes};
  alignas(cmsghdr) char control[CMSG_SPACE(sizeof frame.fds)] = {};
  msghdr msg{};
  msg.msg_iov = &iov;
  msg.msg_iovlen = 1;
  msg.msg_control = control;
  msg.msg_controllen = sizeof control;
  const long n = sys::call(SYS_recvmsg, fd, sys::arg(&msg), MSG_DONTWAIT | MSG_CMSG_CLOEXEC);
  if (n < 0) return n;
  for (cmsghdr* c = CMSG_FIRSTHDR(&msg); c != nullptr; c = CMSG_NXTHDR(&msg, c)) {
    if (c->cmsg_level != SOL_SOCKET || c->cmsg_type != SCM_RIGHTS) continue;
    const int count = static_cast<int>((c->cmsg_len - CMSG_LEN(0)) / sizeof(int));
    for (int i = 0; i < count; ++i) {
      int received = -1;
      std::memcpy(&received, CMSG_DATA(c) + static_cast<std::size_t>(i) * sizeof(int), sizeof received);
      if (frame.fd_count < 4)
        frame.fds[frame.fd_count++] = received;
      else
        sys::call(SYS_close, received);
    }
  }
  frame.size = msg.msg_flags & MSG_TRUNC ? 0 : static_cast<std::size_t>(n);
  return n;
}

template <class T>
bool send_frame(int fd, const T& frame, const int* fds = nullptr, int fd_count = 0) noexcept {
  iovec iov{const_cast<T*>(&frame), sizeof frame};
  alignas(cmsghdr) char control[CMSG_SPACE(4 * sizeof(int))] = {};
  msghdr msg{};
  msg.msg_iov = &iov;
  msg.msg_iovlen = 1;
  if (fd_count > 0) {
    msg.msg_control = control;
    msg.msg_controllen = CMSG_SPACE(static_cast<std::size_t>(fd_count) * sizeof(int));
    cmsghdr* c = CMSG_FIRSTHDR(&msg);
    c->cmsg_level = SOL_SOCKET;
    c->cmsg_type = SCM_RIGHTS;
    c->cmsg_len = CMSG_LEN(static_cast<std::size_t>(fd_count) * sizeof(int));
    std::memcpy(CMSG_DATA(c), fds, static_cast<std::size_t>(fd_count) * sizeof(int));
  }
  return sys::call(SYS_sendmsg, fd, sys::arg(&msg), MSG_DONTWAIT | MSG_NOSIGNAL) == static_cast<long>(sizeof frame);
}

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

}  // namespace

struct LocalCm::State {
  enum class Step : std::uint8_t {
    hello,
    parked,  ///< active: another handshake is just making the link to the same process
    link,
    request,
    reply,
    established,
    linked
  };
  struct Offer {
    Anchor anchor;
    int fd = -1;
    Nanos deadline = 0;
  };
  struct Dial {
    Anchor anchor;
    MakeQp make_qp;
    Nanos deadline = 0;
    Nanos next_try = 0;
    std::size_t tries = 0;
    bool connected = false;
  };
  struct Conn {
    std::uint64_t cookie = 0;
    std::shared_ptr<ShmLink> link;
    std::uint64_t peer_lane = 0;
    std::uint32_t peer_qpn = 0;
    Qp* qp = nullptr;
    int channel = -1;  ///< the rendezvous connection while the handshake lasts
  };
  /// One Unix connection: a handshake, and afterwards perhaps the link's.
  struct Channel {
    bool active = false;
    Step step = Step::hello;
    std::uint64_t cookie = 0;
    PeerIdentity peer;
    bool peer_fence = false;
    std::shared_ptr<ShmLink> link;
    std::unique_ptr<OwnSegment> own;  ///< ours for a link in the making
    ProcessId nonce;
    ConnId conn = ConnId::none;
    Nanos deadline = 0;
    Nanos idle_since = 0;  ///< linked: nobody uses the link since then; 0: used
  };
  /// A disconnect that did not fit into the link's socket.
  struct Unsent {
    std::shared_ptr<ShmLink> link;
    std::uint64_t lane;
  };

  shm::ShmDevice& device;
  Device* reported;
  Caps caps{wire::kRequestPrivate, wire::kReplyPrivate, wire::kRejectPrivate, true};
  std::function<void(const Event&)> handler;
  int epoll_fd = -1;
  std::unordered_map<std::uint64_t, Offer> offers;   ///< by own cookie
  std::unordered_map<std::uint64_t, Dial> dials;     ///< by own cookie
  std::unordered_map<int, Channel> channels;         ///< by descriptor
  std::unordered_map<int, std::uint64_t> listeners;  ///< descriptor -> cookie
  std::map<ConnId, Conn> conns;
  std::uint64_t next_conn = 1;
  std::vector<Unsent> unsent;
  Nanos idle_limit = 30'000 * kMillisecond;
  Nanos next_idle_check = 0;  ///< 0: no link is idle

  explicit State(shm::ShmDevice& d, Device* r) : device(d), reported(r != nullptr ? r : &d) {}

  void watch(int fd) noexcept {
    epoll_event ev{EPOLLIN, {.u64 = static_cast<std::uint64_t>(fd)}};
    sys::call(SYS_epoll_ctl, epoll_fd, EPOLL_CTL_ADD, fd, sys::arg(&ev));
  }
  void close_fd(int fd) noexcept {
    sys::call(SYS_epoll_ctl, epoll_fd, EPOLL_CTL_DEL, fd, 0);
    sys::call(SYS_close, fd);
  }
  void emit(const Event& event) {
    if (handler) handler(event);
  }
  void emit_unreachable(std::uint64_t cookie, Reason reason) {
    Event e;
    e.kind = EventKind::unreachable;
    e.anchor_cookie = cookie;
    e.reason = reason;
    emit(e);
  }

  void end_offer(std::uint64_t cookie) noexcept {
    const auto it = offers.find(cookie);
    if (it == offers.end()) return;
    listeners.erase(it->second.fd);
    close_fd(it->second.fd);
    offers.erase(it);
  }

  /// The handshake on `fd` is over without a connection.
  void drop_channel(int fd, Reason reason) {
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
      emit_unreachable(channel.cookie, reason);
    }
  }

  void link_died(int fd, Channel& channel) {
    const std::shared_ptr<ShmLink> link = channel.link;
    link->alive.store(false);
    link->socket = -1;
    link->bell.forget_socket();
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

  // --- both sides

  bool say_hello(int fd, std::uint64_t own_cookie, std::uint64_t peer_cookie) noexcept {
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

  Reason take_hello(int fd, Channel& channel, const Frame& frame, const SocketOwner& owner) {
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

  /// Is the peer this very process? A process id is no secret, so the kernel's word counts.
  bool is_myself(const PeerIdentity& peer) const noexcept {
    return peer.process == device.process_id() && peer.pid == static_cast<std::int32_t>(sys::call(SYS_getpid)) &&
           peer.uid == peer.own_euid;
  }

  std::size_t handshakes() const noexcept {
    std::size_t n = 0;
    for (const auto& [fd, channel] : channels) n += channel.step != Step::linked;
    return n;
  }
  std::size_t handshakes_of(std::uint32_t uid) const noexcept {
    std::size_t n = 0;
    for (const auto& [fd, channel] : channels) n += channel.step != Step::linked && channel.peer.uid == uid;
    return n;
  }

  std::shared_ptr<ShmLink> known_link(const PeerIdentity& peer) {
    for (const auto& link : device.links().all())
      if (!link->self && link->alive.load() && link->socket >= 0 && link->peer == peer) return link;
    return nullptr;
  }

  bool send_link(int fd, wire::LinkKind kind, const ProcessId& nonce, const OwnSegment* own) noexcept {
    wire::Link frame{};
    frame.head = wire::make_head(wire::Type::link, sizeof frame);
    frame.kind = static_cast<std::uint32_t>(kind);
    frame.nonce = nonce;
    const int fds[2] = {own != nullptr ? own->fd() : -1, device.bell().fd()};
    return send_frame(fd, frame, fds, own != nullptr ? 2 : 0);
  }

  /// Both segments are there: the link exists and `fd` is its connection.
  Reason make_link(int fd, Channel& channel, Frame& frame) {
    if (frame.fd_count < 2) return Reason::bad_message;
    const std::size_t limit = channel.peer.uid == channel.peer.own_euid ? kMaxLinks : kMaxLinksOfOther;
    if (device.links().count_uid(channel.peer.uid) >= limit) return Reason::no_resources;
    auto theirs = PeerSegment::adopt(frame.fds[0], channel.peer.process);
    if (!theirs) {
      RDMA_LOG(warn, "local peer %d: %s", channel.peer.pid, theirs.error().what);
      return Reason::bad_message;
    }
    auto link = std::make_shared<ShmLink>();
    link->nonce = channel.nonce;
    link->peer = channel.peer;
    link->needs_fence = channel.peer_fence || !device.has_membarrier();
    link->socket = fd;
    link->own = std::move(channel.own);
    link->theirs = std::move(theirs.value());
    if (channel.peer.uid == channel.peer.own_euid) {
      if (!link->bell.adopt_eventfd(frame.take(1))) return Reason::bad_message;
    } else {
      link->bell.use_socket(fd, std::as_bytes(std::span(&kRing, 1)));
    }
    device.links().add(link);
    channel.link = std::move(link);
    return Reason::none;
  }

  /// After the last frame of a handshake: the link's connection stays, any other is closed.
  void finish_channel(int fd) {
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

  void try_dial(std::uint64_t cookie, Dial& dial) {
    const auto owner = find_other_end(dial.anchor);
    if (!owner) {
      dials.erase(cookie);
      return emit_unreachable(cookie, Reason::no_peer);
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

  Reason offer_link(int fd, Channel& channel, bool may_reuse) {
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

  bool link_in_the_making(const PeerIdentity& peer) const noexcept {
    return std::any_of(channels.begin(), channels.end(), [&peer](const auto& entry) {
      return entry.second.active && entry.second.step == Step::link && entry.second.own != nullptr && entry.second.peer == peer;
    });
  }

  void wake_parked(const PeerIdentity& peer) {
    std::vector<int> parked;
    for (const auto& [fd, channel] : channels)
      if (channel.step == Step::parked && channel.peer == peer) parked.push_back(fd);
    for (const int fd : parked) {
      const auto it = channels.find(fd);
      if (it == channels.end() || it->second.step != Step::parked) continue;
      if (const Reason r = offer_link(fd, it->second, true); r != Reason::none) drop_channel(fd, r);
    }
  }

  Reason send_request(int fd, Channel& channel) {
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

  Reason active_frame(int fd, Channel& channel, Frame& frame) {
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
        if (kind == wire::LinkKind::unknown && channel.link != nullptr && !channel.link->self)
          return offer_link(fd, channel, false);
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
          e.reason = reject.reason != 0 && reject.reason <= static_cast<std::uint32_t>(Reason::peer_died)
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

  void accept_channel(int listener, std::uint64_t cookie) {
    const int fd = shm::move_high(static_cast<int>(sys::call(SYS_accept4, listener, 0, 0, SOCK_NONBLOCK | SOCK_CLOEXEC)));
    if (fd < 0) return;
    const auto offer = offers.find(cookie);
    ucred cred{};
    const auto owner = offer != offers.end() ? find_other_end(offer->second.anchor) : Result<SocketOwner>(fail(ENOENT, ""));
    const auto euid = static_cast<std::uint32_t>(sys::call(SYS_geteuid));
    if (!owner || !owner.value().held || !peer_credentials(fd, cred) || cred.uid != owner.value().uid ||
        !proves_identity(cred.uid) || handshakes() >= kMaxHandshakes ||
        (cred.uid != euid && handshakes_of(cred.uid) >= kMaxHandshakesOfOther)) {
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

  Reason passive_frame(int fd, Channel& channel, Frame& frame) {
    switch (channel.step) {
      case Step::hello: {
        const auto offer = offers.find(channel.cookie);
        if (offer == offers.end()) return Reason::refused;
        const auto owner = find_other_end(offer->second.anchor);
        if (!owner) return Reason::peer_died;
        if (const Reason r = take_hello(fd, channel, frame, owner.value()); r != Reason::none) return r;
        channel.step = Step::link;
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

  Reason link_frame(Channel& channel, Frame& frame) {
    wire::Plain plain;
    if (frame.as(wire::Type::ring, plain)) {
      device.bell().ring();
      return Reason::none;
    }
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

  void send_unsent() {
    std::erase_if(unsent, [](const Unsent& u) {
      return u.link->socket < 0 || send_frame(u.link->socket, wire::make_plain(wire::Type::disconnect, u.lane));
    });
  }

  /// A link that nobody uses costs descriptors and address space on both sides.
  void close_idle_links(Nanos t) {
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

  void on_readable(int fd) {
    for (int frames = 0; frames < 64; ++frames) {
      const auto it = channels.find(fd);
      if (it == channels.end()) return;
      Frame frame;
      const long n = receive(fd, frame);
      if (n == -EAGAIN || n == -EINTR) return;
      if (n <= 0) return drop_channel(fd, Reason::peer_died);
      Channel& channel = it->second;
      Reason r = Reason::none;
      // The link's own connection may carry a disconnect or a ring while its first handshake still runs.
      wire::Plain plain;
      const bool link_business = channel.link != nullptr && channel.link->socket == fd &&
                                 (frame.as(wire::Type::ring, plain) || frame.as(wire::Type::disconnect, plain));
      if (channel.step == Step::linked || link_business)
        r = link_frame(channel, frame);
      else
        r = channel.active ? active_frame(fd, channel, frame) : passive_frame(fd, channel, frame);
      if (r != Reason::none) {
        RDMA_LOG(info, "local peer: %s", to_string(r));
        return drop_channel(fd, r);
      }
    }
  }
};

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
  if (!in_our_namespace(anchor.fd) || !find_other_end(anchor)) {
    // Known at once, but told like any other end: an event, not a result.
    state_->end_offer(anchor.cookie);
    state_->emit_unreachable(anchor.cookie, Reason::no_peer);
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
  state_->offers[anchor.cookie] = State::Offer{anchor, fd, now() + static_cast<Nanos>(ttl_ms) * kMillisecond};
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
    state_->emit_unreachable(anchor.cookie, Reason::no_peer);
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
    state_->end_offer(cookie);
    state_->emit_unreachable(cookie, Reason::no_peer);
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
