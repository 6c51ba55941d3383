// librdmacm's event channel, as this project uses it: non-blocking, events copied and acknowledged at once, identifiers known by a
// key so that an event of one that is gone finds nobody.
#pragma once

#include <rdma/rdma_cma.h>

#include <array>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <span>
#include <string>

#include "rdma_core/base/result.hpp"
#include "rdma_core/cm/ip_address.hpp"

namespace rdma::cm {

/// Keeps its channel. The last one destroys the identifier, which is the end of what it stood for, without a word to us.
using RdmaId = std::shared_ptr<rdma_cm_id>;

struct CmEvent {
  rdma_cm_event_type type = RDMA_CM_EVENT_ADDR_RESOLVED;
  int status = 0;
  std::uint64_t key = 0;                 ///< of the identifier; of a request, the listener's
  std::string device;                    ///< DEVICE_REMOVAL: its name
  RdmaId request;                        ///< CONNECT_REQUEST: the new one
  std::uint8_t responder_resources = 0;  ///< RDMA Reads that the peer wants to have outstanding
  std::uint8_t initiator_depth = 0;      ///< and that it serves
  std::uint32_t qp_num = 0;              ///< the peer's, if its kind of device tells
  std::size_t size = 0;
  std::array<std::byte, 256> data;

  std::span<const std::byte> private_data() const noexcept { return {data.data(), size}; }
};

/// Threads: one, but for the release of an RdmaId, which any thread may do.
class RdmaChannel : public std::enable_shared_from_this<RdmaChannel> {
 public:
  /// Errors: ENODEV, EACCES: /dev/infiniband/rdma_cm is not there, or not for us.
  static Result<std::shared_ptr<RdmaChannel>> open();
  ~RdmaChannel();
  RdmaChannel(const RdmaChannel&) = delete;
  RdmaChannel& operator=(const RdmaChannel&) = delete;

  std::uint64_t new_key() noexcept { return ++last_key_; }
  Result<RdmaId> create_id(rdma_port_space space, std::uint64_t key);
  /// Bound to that host and port. Errors: as rdma_bind_addr(); ENODEV: no RDMA device has the address.
  Result<RdmaId> bound_id(rdma_port_space space, std::uint64_t key, const IpAddress& here);
  bool next(CmEvent& event);  ///< false: none is there
  int fd() const noexcept { return channel_->fd; }
  void abandon_in_child() noexcept;

 private:
  explicit RdmaChannel(rdma_event_channel* channel) noexcept : channel_(channel) {}
  RdmaId own(rdma_cm_id* id);

  rdma_event_channel* channel_;
  std::uint64_t last_key_ = 0;
};

/// What librdmacm opened for its own use in this process: in a fork's child the parent's descriptors, closed here.
void abandon_librdmacm_contexts() noexcept;

/// Closes what librdmacm has open of a device that is to go, whose identifiers are destroyed.
void close_librdmacm_context(const char* device) noexcept;

/// The address at the other end.
IpAddress peer_of(rdma_cm_id* id) noexcept;
IpAddress local_of(rdma_cm_id* id) noexcept;
/// The device's name; nullptr: not bound to one.
const char* device_name_of(rdma_cm_id* id) noexcept;

}  // namespace rdma::cm
