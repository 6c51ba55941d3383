// What the IB CM and the RNIC CM do differently; all else is RdmaCm's (rdma_cm.cpp). Private to rdma_core/cm.
#pragma once

#include <functional>
#include <memory>
#include <optional>
#include <vector>

#include "rdma_core/cm/offer_wire.hpp"
#include "rdma_core/cm/rdma_channel.hpp"
#include "rdma_core/cm/rdma_cm.hpp"

namespace rdma::cm {

/// How an offer gets to the host at the other end of the anchor, and its answer back.
class Rendezvous {
 public:
  /// An offer that came to `server`, from the host that it names as the client's. The result is the answer.
  using OnOffer = std::function<offer::Code(const offer::Offer&, const IpAddress& server)>;
  /// What became of the last send() for that connection; nullopt: no answer, or none of ours.
  using OnAnswer = std::function<void(std::uint64_t cookie, std::optional<offer::Code>)>;

  virtual ~Rendezvous() = default;
  /// One try. A try for the same connection that is still under way ends without a word.
  virtual void send(std::uint64_t cookie, const IpAddress& from, const IpAddress& server, const offer::Offer&) = 0;
  virtual void cancel(std::uint64_t cookie) noexcept = 0;
  /// How long a try may go without an answer before the next one.
  virtual unsigned patience_ms() const noexcept = 0;
  /// Takes offers to that address. False: another process does, or it may not be; ask again later.
  virtual bool hold(const IpAddress& server) = 0;
  virtual void let_go(const IpAddress& server) noexcept = 0;
  /// True: the event was its own.
  virtual bool take(const CmEvent&) { return false; }
  virtual void progress() {}  ///< looks at its sockets
  virtual void abandon_in_child() noexcept {}
};

class Manner {
 public:
  virtual ~Manner() = default;
  virtual const char* name() const noexcept = 0;
  virtual NodeType node_type() const noexcept = 0;
  virtual rdma_port_space port_space() const noexcept = 0;
  virtual const Caps& caps() const noexcept = 0;
  virtual std::unique_ptr<Rendezvous> make_rendezvous(RdmaChannel& channel, int epoll_fd, Rendezvous::OnOffer,
                                                      Rendezvous::OnAnswer) = 0;

  /// What names this side's end of a connection to the other; known once the way to it is found.
  virtual std::uint32_t near_end(const Qp& qp, rdma_cm_id* id) const noexcept = 0;
  /// What names the other side's, in its request or reply; `id` is the connection's here.
  virtual std::uint32_t far_end(const CmEvent& event, rdma_cm_id* id) const noexcept = 0;

  /// Active: QP to init, and the request. `failed` may be called in any thread, or never.
  virtual Result<Unit> connect(Qp& qp, const RdmaId& id, const rdma_conn_param& parameters, std::span<const std::byte> data,
                               std::function<void()> failed) = 0;
  /// Active: after the reply.
  virtual Result<Unit> establish(Qp& qp, rdma_cm_id* id, const rdma_conn_param& granted) = 0;
  /// Active: gives up a request that is not answered.
  virtual void abandon(RdmaId id) noexcept { id = nullptr; }
  /// Passive: QP to rts, and the reply.
  virtual Result<Unit> accept(Qp& qp, rdma_cm_id* id, rdma_conn_param parameters) = 0;
};

Result<std::unique_ptr<ConnectionManager>> make_rdma_cm(std::unique_ptr<Manner> manner, FindDevice find_device,
                                                        const Secret& secret, DeviceGoes device_goes);

/// What the peer may do with the memory of the QP's Pd.
inline constexpr Access kPeerAccess = Access::local_write | Access::remote_write | Access::remote_read;

}  // namespace rdma::cm
