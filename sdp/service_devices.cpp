// The service as a client of the midlayer: the devices that lanes are made on, their channels and what is shared by the lanes to
// one peer; and a device that goes.
#include <sys/epoll.h>

#include <algorithm>
#include <mutex>
#include <new>
#include <utility>
#include <vector>

#include "rdma_core/base/log.hpp"
#include "rdma_core/base/sys.hpp"
#include "sdp/room.hpp"
#include "sdp/service.hpp"
#include "sdp/spinner.hpp"

namespace sdp {

namespace sys = rdma::sys;
namespace cm = rdma::cm;

/// SDP as a client of the midlayer: it takes every device that can carry it, of either node type. Devices go in the service thread.
struct Service::Client final : rdma::DeviceClient {
  explicit Client(Service& s) : service(s) {}
  const char* name() const noexcept override { return "sdp"; }
  void device_added(rdma::Device& device) override {
    if (service.device_ == nullptr) service.device_ = &device;
    service.hurry_returns();
  }
  void device_removed(rdma::Device& device) noexcept override {
    if (service.device_ == &device)
      service.device_ = nullptr;
    else
      service.leave_device(device);
  }
  Service& service;
};

/// False: there is none, or no channel on the primary one.
bool Service::take_devices() noexcept {
  auto* client = new (std::nothrow) Client(*this);
  if (client == nullptr) return false;
  composition_->registry().register_client(*client);
  if (device_ == nullptr) return false;
  auto channel = device_->create_channel();
  if (!channel) return false;
  channel_ = std::move(channel.value());
  return true;
}

std::shared_ptr<PeerContext> Service::context_for(rdma::Device& device, const rdma::Path& path) noexcept {
  std::weak_ptr<PeerContext>& slot = peers_[{&device, path.id}];
  if (auto known = slot.lock()) return known;
  auto pd = device.create_pd(path);
  if (!pd) return nullptr;
  auto context = std::make_shared<PeerContext>();
  context->device = &device;
  context->path = path;
  context->pd = std::move(pd.value());
  // Where memory is pinned, a process with one lane pins no more than that needs.
  constexpr std::size_t kFirstPinned = std::size_t{256} << 10;
  const bool pins = !device.attr().maps_peer_memory;
  auto heap = rdma::RegisteredHeap::create(*context->pd, pins ? kFirstPinned : rdma::RegisteredHeap::kExtentBytes);
  if (!heap) return nullptr;
  context->heap = std::move(heap.value());
  slot = context;
  return context;
}

/// The channel on which the device's Cqs announce; made with the first lane on it. nullptr: there can be none.
rdma::CompletionChannel* Service::channel_of(rdma::Device& device) noexcept {
  if (&device == device_) return channel_.get();
  const auto known = channels_.find(&device);
  if (known != channels_.end()) return known->second.get();
  auto channel = device.create_channel();
  if (!channel) {
    RDMA_LOG(info, "no lane on %s: %s", device.name(), channel.error().what);
    return nullptr;
  }
  epoll_event ev{EPOLLIN | EPOLLET, {.u64 = reinterpret_cast<std::uint64_t>(channel.value().get())}};
  sys::call(SYS_epoll_ctl, epoll_fd_, EPOLL_CTL_ADD, channel.value()->fd(), sys::arg(&ev));
  return (channels_[&device] = std::move(channel.value())).get();
}

/// False: `tag` is no channel's.
bool Service::pass_on(std::uint64_t tag) noexcept {
  for (const auto& [device, channel] : channels_) {
    if (reinterpret_cast<std::uint64_t>(channel.get()) != tag) continue;
    if (channel->progress()) channel_->ring();
    return true;
  }
  return false;
}

/// A device beside the primary one goes: so does all that was made on it, before this returns. What was under way on lanes that
/// cannot be recovered is lost, and their connections fail.
void Service::leave_device(rdma::Device& device) noexcept {
  const auto is_on_it = [&](Lane* lane) { return lane != nullptr && lane->device() == &device; };
  std::vector<std::uint64_t> cookies;
  for (const auto& [cookie, h] : handshakes_)
    if (is_on_it(h.lane)) cookies.push_back(cookie);
  for (const std::uint64_t cookie : cookies) {
    Handshake& h = handshakes_[cookie];
    if (h.conn != cm::ConnId::none) cm_->disconnect(h.conn);
    cm_->withdraw(cookie);
    give_up(h, LaneReason::device_lost);
  }
  for (;;) {
    take_commands(Take::closed);  // a stream that is just being closed leaves by these
    const auto on_it = std::find_if(laned_.begin(), laned_.end(), [&](const StreamImpl* s) { return is_on_it(s->lane); });
    if (on_it == laned_.end()) break;
    if (!outlive(*on_it)) sys::call(SYS_sched_yield);
  }
  {
    const std::lock_guard guard(laned_lock_);
    for (std::size_t i = 0; i < dying_.size(); ++i)
      if (is_on_it(dying_[i].lane)) outlive_closed(i);
  }
  while (std::any_of(dying_.begin(), dying_.end(), [&](const Dying& d) { return is_on_it(d.lane); })) {
    look_after_lanes();
    sys::call(SYS_sched_yield);  // for threads that look, which are not long about it
  }
  std::erase_if(peers_, [&](const auto& each) { return each.first.first == &device; });
  channels_.erase(&device);
  if (inbox_.load() != nullptr) nudge();  // what had to wait
}

/// Takes a stream off its lane, whatever it still wanted there. False: not yet, a thread waits on it or is closing it.
bool Service::detach(StreamImpl* s) noexcept {
  (void)s->lock.lock();
  const bool laned = s->phase.load() == Phase::laned;
  if (laned && (s->tx.load() != TxState::ended || s->rx.load() != RxState::ended)) {
    s->take_down_locked(LaneReason::device_lost);
    s->break_off(s->fd);
    s->resend.clear();
    s->tx.store(TxState::ended);
    s->rx.store(RxState::ended);
  }
  s->state_edges.fetch_add(1);  // who waits finds that nothing is to be had from the lane, and leaves it
  s->lane->wake_sleepers();
  s->error_due = 0;
  s->bytes_missing = false;
  const Arrived last = s->arrived();
  const std::uint64_t conn = s->conn;
  Lane* const lane = laned ? s->take_spent_lane() : nullptr;
  if (lane != nullptr) {
    end_watch(*lane, last);
    if (s->phase.load() == Phase::resting) rest(*s, *lane);
  }
  s->lock.unlock();
  if (lane == nullptr) return false;
  if (s->watched) sys::call(SYS_epoll_ctl, epoll_fd_, EPOLL_CTL_DEL, s->fd, 0);
  s->watched = false;
  streams_by_conn_.erase(conn);
  {
    const std::lock_guard guard(laned_lock_);
    std::erase(laned_, s);
  }
  retire(nullptr, lane, conn, true);
  engine::notify(engine::handle_of(s));
  return true;
}

Lane* Service::make_lane(rdma::Device& device, const rdma::Path& path) noexcept {
  if (!may_have_lanes_on(device) || !has_room_for_lane()) return nullptr;
  auto context = context_for(device, path);
  if (context == nullptr) return nullptr;
  rdma::CompletionChannel* channel = channel_of(device);
  if (channel == nullptr) return nullptr;
  auto* peer = new (std::nothrow) std::shared_ptr<PeerContext>(std::move(context));  // the lane's, once it is made
  if (peer == nullptr) return nullptr;
  void* cell = engine::lane_cell();
  if (cell == nullptr) {
    delete peer;
    return nullptr;
  }
  LaneLimits limits;
  limits.conn.recv_size = options_.recv_buffer_bytes;
  limits.conn.recv_size_max = options_.recv_buffer_max;
  limits.conn.recv_buffers = static_cast<std::uint16_t>(options_.recv_buffers_initial);
  limits.recv_buffers_max = static_cast<std::uint16_t>(options_.recv_buffers);
  limits.bulk_copy = options_.bulk_copy;
  limits.zero_copy_from = options_.zero_copy_from;
  Lane* lane = new (cell) Lane(peer, limits);
  const auto opened = lane->open(channel);
  if (!opened) {
    RDMA_LOG(info, "no lane: %s", opened.error().what);
    lane->close();
    engine::free_lane_cell(cell);
    return nullptr;
  }
  if (lane->unordered()) {
    if (!had_unordered_lane_.exchange(true, std::memory_order_release)) Spinner::measure([lane] { return lane->maybe_ready(); });
    left_host_.store(true);
  }
  return lane;
}

}  // namespace sdp
