// One connection manager for every transport: how two processes that share a TCP connection (the anchor) meet, and how a QP
// on each side is tied to the other.
//
//   passive (it made the TCP connect)                    active (it does the I/O on the accepted socket)
//   offer(anchor)  ----- be findable ----->
//                                                        dial(anchor, qp, private data)
//   <------------- Event::request (path, private data) --
//   accept(conn, qp, private data) ------------------->  Event::reply (private data)
//                                                        establish(conn)
//   Event::established                                   Event::established
//   disconnect(conn) ------- either side ------------->  Event::disconnected
//
// Who dials is the process that does the I/O on the accepted socket, on every transport; the active side sends first (Caps says
// whether it must). The first Send may overtake Event::established on the passive side: a receive completion there counts as it.
//
// Threading: one thread (the service thread) makes every call and runs progress(). No call blocks.
// Trust: private data, paths and the peer's claims come from another process, possibly another user's. An implementation checks
// that the peer owns the other end of the anchor before it reports an event, if Caps says that it can; data are checked by whoever
// reads them.
#pragma once

#include <sys/socket.h>

#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <span>
#include <vector>

#include "rdma_core/base/result.hpp"
#include "rdma_core/device.hpp"

namespace rdma::cm {

/// The TCP connection that two processes have in common, seen from one of them.
struct Anchor {
  int fd = -1;                ///< the program's descriptor; only looked at during the call it is given to
  std::uint64_t cookie = 0;   ///< SO_COOKIE of fd
  sockaddr_storage local{};   ///< getsockname
  sockaddr_storage remote{};  ///< getpeername
};

/// The first bytes that an anchor has carried, each way, as one of its ends knows them.
struct Transcript {
  static constexpr std::size_t kMost = 512;  ///< bytes of each direction
  std::vector<std::byte> sent, received;
  bool may_be_empty = false;  ///< the user wants the connection though nothing has been exchanged that could show who is there
};

struct Caps {
  std::size_t max_request_private = 0;  ///< bytes
  std::size_t max_reply_private = 0;
  std::size_t max_reject_private = 0;
  bool active_must_send_first = false;  ///< a Send of the passive side before it has received one kills the connection
  bool proves_owner = false;            ///< no event comes before the CM has checked that the peer owns the other end of the
                                        ///< anchor, in the way that its header tells. If false, whoever holds it has to ask over it
};

enum class ConnId : std::uint64_t { none = 0 };

enum class EventKind : std::uint8_t {
  request,      ///< passive: answer with accept() or reject()
  reply,        ///< active: the peer accepted; move the QP on and call establish()
  rejected,     ///< active: final; `reason` says why
  unreachable,  ///< active or passive: nobody there (not preloaded, other host, time-out); final
  established,
  disconnected,  ///< peer or path gone, or the peer called disconnect(); final
};

/// Why there is no connection; shown to the operator.
enum class Reason : std::uint8_t {
  none,
  no_peer,      ///< nobody offers: the peer does not run the library, or not yet
  wrong_owner,  ///< whoever answered does not own the other end of the anchor
  version_mismatch,
  refused,  ///< the peer said no
  no_resources,
  bad_message,  ///< garbage or silence in the handshake
  timed_out,
  peer_died,
  unproven,   ///< the two ends could not show each other that they hold the same connection
  elsewhere,  ///< the other end is not on this host: another CM may reach it
};
const char* to_string(Reason) noexcept;

struct Event {
  EventKind kind = EventKind::unreachable;
  ConnId conn = ConnId::none;
  std::uint64_t anchor_cookie = 0;            ///< own anchor's, on every event
  Path path{};                                ///< request, reply: for Device::create_pd
  Device* device = nullptr;                   ///< request, reply
  std::span<const std::byte> private_data{};  ///< request, reply, rejected. Valid during the handler only; untrusted
  Reason reason = Reason::none;
  bool answered = false;  ///< unreachable: something came that only a user of a CM like this one sends: it may be there later
};

class ConnectionManager {
 public:
  virtual ~ConnectionManager() = default;
  virtual const char* name() const noexcept = 0;
  virtual const Caps& caps() const noexcept = 0;

  /// Called with each event from progress(). Set once, before the first call below. The handler may call the CM back.
  virtual void on_event(std::function<void(const Event&)> handler) = 0;

  /// Asked for what an anchor has carried so far, by its cookie. Set once, before the first call below, for CMs that know no better
  /// proof of who holds its other end. What it gives for one anchor only grows.
  using TranscriptOf = std::function<Transcript(std::uint64_t anchor_cookie)>;
  virtual void on_transcript(const TranscriptOf&) {}

  /// Be findable by the process that holds the other end of `anchor`, for `ttl_ms`; longer, but not for ever, while the peer is
  /// heard of and has only others to see to. Ends with request, or unreachable when the time is over.
  virtual Result<Unit> offer(const Anchor& anchor, unsigned ttl_ms) = 0;
  virtual void withdraw(std::uint64_t anchor_cookie) noexcept = 0;

  /// Find the process at the other end, within the like time: ends with `reply` or unreachable. First the CM finds the peer and
  /// reports path_found through `make_qp`, which creates the QP on a Pd of that path and returns it with the private data of the
  /// request (both stay the caller's; the QP must live until the connection ended). nullptr from make_qp gives the attempt up.
  struct Proposal {
    Qp* qp = nullptr;
    std::span<const std::byte> private_data{};
  };
  using MakeQp = std::function<Proposal(Device&, const Path&, ConnId)>;
  virtual Result<Unit> dial(const Anchor& anchor, unsigned timeout_ms, MakeQp make_qp) = 0;

  /// Passive: answers a request. The CM moves `qp` to RTS before the reply leaves; post receives first.
  virtual Result<Unit> accept(ConnId conn, Qp& qp, std::span<const std::byte> private_data) = 0;
  virtual void reject(ConnId conn, Reason reason, std::span<const std::byte> private_data) noexcept = 0;
  /// Active: after `reply`. The CM moves the QP to RTS; from here on the active side may send.
  virtual Result<Unit> establish(ConnId conn) = 0;
  /// Ends the connection; the peer gets `disconnected`. No event follows here. Idempotent.
  virtual void disconnect(ConnId conn) noexcept = 0;

  /// An epoll descriptor that is readable when progress() has something to do, and the time until it wants to be called anyway.
  virtual int fd() const noexcept = 0;
  virtual int next_timeout_ms() const noexcept = 0;  ///< -1: none
  virtual void progress() = 0;

  /// A device has come; or `going`, if not nullptr, is about to be destroyed. What the CM had found out about devices is forgotten,
  /// what it made on that one is over, and the events of its connections follow.
  virtual void devices_changed(const Device* /*going*/) noexcept {}

  /// No new connections from here on, and no events: what others could find this CM by is given back. Connections that are up stay,
  /// as long as the CM does.
  virtual void retire() noexcept {}

  /// In the child of a fork, first thing and with one thread: closes the child's copies of descriptors. The CM is inert afterwards
  /// and is not destroyed: the child makes a new one.
  virtual void abandon_in_child() noexcept {}
};

}  // namespace rdma::cm
