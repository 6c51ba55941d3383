#include "rdma_core/cm/rdma_channel.hpp"

#include <fcntl.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <mutex>
#include <utility>
#include <vector>

#include "rdma_core/base/high_fd.hpp"
#include "rdma_core/base/sys.hpp"

namespace rdma::cm {
namespace {

/// librdmacm opens each device once and keeps it. Its descriptors are put out of the program's way when we first see them.
struct Contexts {
  std::mutex mutex;
  std::vector<ibv_context*> seen;
};
Contexts& contexts() {
  static auto* const all = new Contexts;
  return *all;
}

void see(ibv_context* context) {
  if (context == nullptr) return;
  const std::lock_guard guard(contexts().mutex);
  auto& seen = contexts().seen;
  if (std::find(seen.begin(), seen.end(), context) != seen.end()) return;
  seen.push_back(context);
  context->cmd_fd = keep_fd(context->cmd_fd);
  context->async_fd = keep_fd(context->async_fd);
}

void close_descriptors(ibv_context& context) noexcept {
  for (int* fd : {&context.cmd_fd, &context.async_fd}) {
    forget_fd(*fd);
    sys::call(SYS_close, std::exchange(*fd, -1));
  }
}

IpAddress address_of(const sockaddr* address) noexcept {
  sockaddr_storage storage{};
  if (address == nullptr) return {};
  if (address->sa_family == AF_INET) std::memcpy(&storage, address, sizeof(sockaddr_in));
  if (address->sa_family == AF_INET6) std::memcpy(&storage, address, sizeof(sockaddr_in6));
  return IpAddress::from(storage);
}

}  // namespace

void abandon_librdmacm_contexts() noexcept {
  for (ibv_context* context : std::exchange(contexts().seen, {})) close_descriptors(*context);
}

// librdmacm itself would keep them until it looks for another device and finds that this one is gone. It frees the context then.
void close_librdmacm_context(const char* device) noexcept {
  const std::lock_guard guard(contexts().mutex);
  std::erase_if(contexts().seen, [device](ibv_context* context) {
    const bool its = std::strcmp(ibv_get_device_name(context->device), device) == 0;
    if (its) close_descriptors(*context);
    return its;
  });
}

Result<std::shared_ptr<RdmaChannel>> RdmaChannel::open() {
  rdma_event_channel* channel = rdma_create_event_channel();
  if (channel == nullptr) return fail(errno, "the kernel's RDMA connection manager cannot be opened");
  channel->fd = keep_fd(channel->fd);
  sys::call(SYS_fcntl, channel->fd, F_SETFL, sys::call(SYS_fcntl, channel->fd, F_GETFL) | O_NONBLOCK);
  return std::shared_ptr<RdmaChannel>(new RdmaChannel(channel));
}

RdmaChannel::~RdmaChannel() {
  forget_fd(channel_->fd);
  rdma_destroy_event_channel(channel_);
}

RdmaId RdmaChannel::own(rdma_cm_id* id) {
  see(id->verbs);
  return {id, [channel = shared_from_this()](rdma_cm_id* gone) { rdma_destroy_id(gone); }};
}

Result<RdmaId> RdmaChannel::create_id(rdma_port_space space, std::uint64_t key) {
  rdma_cm_id* id = nullptr;
  if (rdma_create_id(channel_, &id, reinterpret_cast<void*>(key), space) != 0) return fail(errno, "no RDMA identifier");
  return own(id);
}

Result<RdmaId> RdmaChannel::bound_id(rdma_port_space space, std::uint64_t key, const IpAddress& here) {
  auto id = create_id(space, key);
  if (!id) return id;
  sockaddr_storage address = here.to_sockaddr();
  if (rdma_bind_addr(id->get(), reinterpret_cast<sockaddr*>(&address)) != 0) return fail(errno, "the address cannot be bound");
  see((*id)->verbs);
  if ((*id)->verbs == nullptr) return fail(ENODEV, "no RDMA device has the address");
  return id;
}

bool RdmaChannel::next(CmEvent& event) {
  rdma_cm_event* from = nullptr;
  if (rdma_get_cm_event(channel_, &from) != 0) return false;
  event = CmEvent{};
  event.type = from->event;
  event.status = from->status;
  const rdma_cm_id* known = from->event == RDMA_CM_EVENT_CONNECT_REQUEST ? from->listen_id : from->id;
  event.key = reinterpret_cast<std::uint64_t>(known->context);
  see(from->id->verbs);
  if (from->event == RDMA_CM_EVENT_CONNECT_REQUEST) event.request = own(from->id);
  if (const char* name = device_name_of(from->id); name != nullptr && from->event == RDMA_CM_EVENT_DEVICE_REMOVAL)
    event.device = name;
  switch (from->event) {
    case RDMA_CM_EVENT_CONNECT_REQUEST:
    case RDMA_CM_EVENT_CONNECT_RESPONSE:
    case RDMA_CM_EVENT_ESTABLISHED:
    case RDMA_CM_EVENT_REJECTED: {
      const rdma_conn_param& conn = from->param.conn;
      if (conn.private_data != nullptr) {
        event.size = std::min<std::size_t>(conn.private_data_len, event.data.size());
        std::memcpy(event.data.data(), conn.private_data, event.size);
      }
      event.responder_resources = conn.responder_resources;
      event.initiator_depth = conn.initiator_depth;
      event.qp_num = conn.qp_num;
      break;
    }
    default:
      break;
  }
  rdma_ack_cm_event(from);
  return true;
}

void RdmaChannel::abandon_in_child() noexcept {
  forget_fd(channel_->fd);
  sys::call(SYS_close, std::exchange(channel_->fd, -1));
}

IpAddress peer_of(rdma_cm_id* id) noexcept { return address_of(rdma_get_peer_addr(id)); }
IpAddress local_of(rdma_cm_id* id) noexcept { return address_of(rdma_get_local_addr(id)); }

const char* device_name_of(rdma_cm_id* id) noexcept {
  return id->verbs != nullptr ? ibv_get_device_name(id->verbs->device) : nullptr;
}

}  // namespace rdma::cm
