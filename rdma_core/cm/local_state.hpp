// What LocalCm knows: offers, dials, the Unix connections on which handshakes run, and connections. local_handshake.cpp holds the
// two sides of a handshake, local_cm.cpp the rest.
#pragma once

#include <sys/epoll.h>

#include <cerrno>
#include <functional>
#include <map>
#include <memory>
#include <unordered_map>
#include <vector>

#include "rdma_core/base/clock.hpp"
#include "rdma_core/base/sys.hpp"
#include "rdma_core/cm/local_cm.hpp"
#include "rdma_core/cm/local_socket.hpp"
#include "rdma_core/cm/local_wire.hpp"
#include "rdma_core/cm/sock_diag.hpp"
#include "rdma_core/drivers/shm/shm_device.hpp"

namespace rdma::cm {

inline constexpr Nanos kMillisecond = 1'000'000;
inline Nanos now() noexcept { return SteadyClock{}.now(); }

/// Why `other_end` was not found: it is not here, or the kernel does not tell.
inline Reason not_found(const Result<SocketOwner>& other_end) noexcept {
  return other_end.error().code == ENOENT ? Reason::elsewhere : Reason::no_peer;
}

/// The moves of a QP of the software device to RTS, towards the peer's.
Result<Unit> bring_up(Qp& qp, NodeType node, std::uint32_t peer_qpn);

struct LocalCm::State {
  using OwnSegment = shm::OwnSegment;
  using PeerIdentity = shm::PeerIdentity;
  using ProcessId = shm::ProcessId;
  using ShmLink = shm::ShmLink;

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
    bool answered = false;          ///< its peer has begun a handshake
    Reason last = Reason::no_peer;  ///< why it ends if no other handshake begins: one failed for want of something here
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
  Caps caps{wire::kRequestPrivate, wire::kReplyPrivate, wire::kRejectPrivate, true, true};
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
  void emit_unreachable(std::uint64_t cookie, Reason reason, bool answered = false);
  void end_offer(std::uint64_t cookie) noexcept;
  /// The handshake on `fd` is over without a connection.
  void drop_channel(int fd, Reason reason);
  void link_died(int fd, Channel& channel);

  // --- both sides
  bool say_hello(int fd, std::uint64_t own_cookie, std::uint64_t peer_cookie) noexcept;
  Reason take_hello(int fd, Channel& channel, const Frame& frame, const SocketOwner& owner);
  /// Is the peer this very process? A process id is no secret, so the kernel's word counts.
  bool is_myself(const PeerIdentity& peer) const noexcept;
  std::size_t handshakes() const noexcept;
  std::size_t handshakes_of(std::uint32_t uid) const noexcept;
  std::shared_ptr<ShmLink> known_link(const PeerIdentity& peer);
  bool send_link(int fd, wire::LinkKind kind, const ProcessId& nonce, const OwnSegment* own) noexcept;
  /// Both segments are there: the link exists and `fd` is its connection.
  Reason make_link(int fd, Channel& channel, Frame& frame);
  /// After the last frame of a handshake: the link's connection stays, any other is closed.
  void finish_channel(int fd);

  // --- active
  void try_dial(std::uint64_t cookie, Dial& dial);
  Reason offer_link(int fd, Channel& channel, bool may_reuse);
  bool link_in_the_making(const PeerIdentity& peer) const noexcept;
  void wake_parked(const PeerIdentity& peer);
  Reason send_request(int fd, Channel& channel);
  Reason active_frame(int fd, Channel& channel, Frame& frame);

  // --- passive
  void accept_channel(int listener, std::uint64_t cookie);
  Reason passive_frame(int fd, Channel& channel, Frame& frame);

  // --- a link's own frames, and what time brings
  Reason link_frame(Channel& channel, Frame& frame);
  void send_unsent();
  /// A link that nobody uses costs descriptors and address space on both sides.
  void close_idle_links(Nanos t);
  void on_readable(int fd);
  void on_frame(int fd, Channel& channel, Frame& frame);
};

}  // namespace rdma::cm
