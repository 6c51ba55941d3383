#include "sdp/service.hpp"

#include <linux/futex.h>
#include <netinet/in.h>
#include <pthread.h>
#include <signal.h>
#include <sys/epoll.h>
#include <sys/eventfd.h>
#include <sys/socket.h>

#include <algorithm>
#include <cerrno>
#include <climits>
#include <cstring>
#include <mutex>
#include <new>
#include <utility>

#include "rdma_core/base/clock.hpp"
#include "rdma_core/base/log.hpp"
#include "rdma_core/base/sys.hpp"
#include "sdp/anchor_address.hpp"
#include "sdp/policy.hpp"

namespace sdp {

namespace sys = rdma::sys;
namespace cm = rdma::cm;

namespace {

constexpr std::uint64_t kWakeTag = 1, kCmTag = 2, kBellTag = 3, kLinksTag = 4;  // all others are StreamImpl addresses
constexpr unsigned kMeetMs = 3000;                                              // how long a connection looks for its peer
constexpr std::int64_t kHandshakeNs = 3'000'000'000;
constexpr int kTendMs = 20;
constexpr int kReleaseMs = 250;
constexpr int kStrangersMs = 1000;
constexpr int kLeaveMs = 5;
constexpr std::int64_t kWordsMs = 250;  // at most between two looks for words that a device's writes wake nobody for

std::int64_t now_ns() noexcept { return rdma::SteadyClock{}.now(); }

/// The thread wakes rarely and works for microseconds, but both cores are often busy with the very stream that waits for its lane.
/// A short slice makes the scheduler run it at once (EEVDF, Linux 6.12; others ignore it). Not a priority: it gets no more time
/// than others.
void ask_for_short_slices() noexcept {
  struct {
    std::uint32_t size, policy;
    std::uint64_t flags;
    std::int32_t nice;
    std::uint32_t priority;
    std::uint64_t runtime, deadline, period;
  } attr{};
  attr.size = sizeof attr;
  attr.nice = 20 - static_cast<std::int32_t>(sys::call(SYS_getpriority, 0 /* PRIO_PROCESS */, 0));  // as it is
  attr.runtime = 100'000;                                                                           // ns, the least that is taken
  attr.flags = 0x08;                                                                                // SCHED_FLAG_KEEP_POLICY
  sys::call(SYS_sched_setattr, 0, sys::arg(&attr), 0);
}

Transport transport_of(const rdma::DeviceAttr& attr) noexcept {
  if (attr.link_layer == rdma::LinkLayer::memory) return Transport::local;
  return attr.node_type == rdma::NodeType::rnic ? Transport::rnic : Transport::ib;
}

LaneReason reason_of(cm::Reason reason) noexcept {
  switch (reason) {
    case cm::Reason::wrong_owner:
      return LaneReason::wrong_owner;
    case cm::Reason::elsewhere:
      return LaneReason::other_host;
    case cm::Reason::unproven:
      return LaneReason::unproven;
    case cm::Reason::version_mismatch:
      return LaneReason::version;
    case cm::Reason::refused:
      return LaneReason::refused;
    case cm::Reason::no_resources:
      return LaneReason::no_resources;
    case cm::Reason::bad_message:
      return LaneReason::protocol_error;
    case cm::Reason::peer_died:
      return LaneReason::peer_gone;
    default:
      return LaneReason::no_peer;
  }
}

}  // namespace

/// SDP as a client of the midlayer: it takes every device that can carry it, of either node type. Devices go in the service thread.
struct Service::Client final : rdma::DeviceClient {
  explicit Client(Service& s) : service(s) {}
  const char* name() const noexcept override { return "sdp"; }
  void device_added(rdma::Device& device) override {
    if (service.device_ == nullptr) service.device_ = &device;
  }
  void device_removed(rdma::Device& device) noexcept override {
    if (service.device_ == &device)
      service.device_ = nullptr;
    else
      service.leave_device(device);
  }
  Service& service;
};

Service* Service::start(const Options& options, engine::Compose compose) noexcept {
  auto* service = new (std::nothrow) Service(options, compose);
  if (service == nullptr) return nullptr;
  service->wake_fd_.store(engine::high_fd(static_cast<int>(sys::call(SYS_eventfd2, 0, EFD_NONBLOCK | EFD_CLOEXEC))));
  service->epoll_fd_ = engine::high_fd(static_cast<int>(sys::call(SYS_epoll_create1, EPOLL_CLOEXEC)));
  if (const int failed = service->start_thread(1); failed != 0) {
    RDMA_LOG(warn, "no service thread (%s): everything stays on TCP", std::strerror(failed));
    return nullptr;
  }
  return service;
}

/// 0, or an error number.
int Service::start_thread(std::uint32_t number) noexcept {
  auto* start = new (std::nothrow) ThreadStart{this, number};
  if (start == nullptr) return ENOMEM;
  sigset_t all, old;
  sigfillset(&all);
  pthread_sigmask(SIG_SETMASK, &all, &old);
  pthread_attr_t attr;
  pthread_attr_init(&attr);
  pthread_attr_setdetachstate(&attr, PTHREAD_CREATE_DETACHED);
  pthread_attr_setstacksize(&attr, 512 * 1024);
  pthread_t thread;
  starting_.fetch_add(1);
  const int failed = pthread_create(&thread, &attr, thread_main, start);
  pthread_attr_destroy(&attr);
  pthread_sigmask(SIG_SETMASK, &old, nullptr);
  if (failed == 0) return 0;
  starting_.fetch_sub(1);
  delete start;
  return failed;
}

void* Service::thread_main(void* mine) noexcept {
  const std::unique_ptr<ThreadStart> start(static_cast<ThreadStart*>(mine));
  Service& service = *start->service;
  pthread_setname_np(pthread_self(), kServiceThreadName);
  service.starting_.fetch_sub(1);
  ask_for_short_slices();
  const std::lock_guard turn(service.turn_);  // the one before it leaves first
  service.number_ = start->number;
  service.run();
  return nullptr;
}

bool Service::open() noexcept {
  composition_ = compose_ != nullptr ? compose_(options_) : nullptr;
  if (composition_ == nullptr) return false;
  auto* client = new (std::nothrow) Client(*this);
  if (client == nullptr) return false;
  composition_->registry().register_client(*client);
  if (device_ == nullptr) return false;
  auto channel = device_->create_channel();
  if (!channel) return false;
  channel_ = std::move(channel.value());
  cm_ = &composition_->cm();
  composition_->ask_before_opening([this] { return may_leave_host(); });
  cm_->on_event([this](const cm::Event& event) { on_cm_event(event); });
  cm_->on_transcript([this](std::uint64_t cookie) { return transcript_of(cookie); });
  const auto watch = [this](int fd, std::uint32_t events, std::uint64_t tag) {
    epoll_event ev{events, {.u64 = tag}};
    sys::call(SYS_epoll_ctl, epoll_fd_, EPOLL_CTL_ADD, fd, sys::arg(&ev));
  };
  watch(wake_fd_.load(), EPOLLIN, kWakeTag);
  watch(cm_->fd(), EPOLLIN, kCmTag);
  open_links();
  watch(links_->fd(), EPOLLIN, kLinksTag);
  watch(channel_->fd(), EPOLLIN | EPOLLET, kBellTag);
  bell_fd_.store(channel_->fd(), std::memory_order_release);
  return true;
}

void Service::run() noexcept {
  if (cm_ == nullptr && !open()) {
    RDMA_LOG(warn, "no device carries SDP here: everything stays on TCP");
    return;
  }
  take_turn();
  while (newest_.load() <= number_) {
    take_commands();
    poll_handshakes();
    tend_watched();
    look_after_lanes();
    release_buffers();
    const bool leaving = see_to_leaving();
    int timeout = cm_->next_timeout_ms();
    const bool busy = !handshakes_.empty() || !dying_.empty();
    const bool lingering = !engine::flush_lingering();
    const auto at_most = [&timeout](int ms) { timeout = timeout < 0 ? ms : std::min(timeout, ms); };
    if (busy || needs_looks_ || lingering) at_most(kTendMs);
    if (leaving) at_most(kLeaveMs);
    if (releasing_.load(std::memory_order_relaxed)) at_most(kReleaseMs);
    if (links_->strangers() != 0) {
      links_->progress();
      at_most(kStrangersMs);
    }
    if (!laned_.empty() && had_unordered_lane_.load(std::memory_order_relaxed)) at_most(next_words_ms());
    epoll_event events[32];
    const long n = sys::call(SYS_epoll_pwait, epoll_fd_, sys::arg(events), 32, timeout, 0, 8);
    for (long i = 0; i < n; ++i) {
      const std::uint64_t tag = events[i].data.u64;
      if (tag == kWakeTag) {
        std::uint64_t count = 0;
        sys::call(SYS_read, wake_fd_.load(), sys::arg(&count), sizeof count);
      } else if (tag == kLinksTag) {
        links_->progress();
      } else if (tag != kCmTag && tag != kBellTag && !pass_on(tag)) {
        on_anchor(reinterpret_cast<StreamImpl*>(tag));
      }
    }
    cm_->progress();
  }
}

// A push never waits, locks or allocates: close() may come from a signal handler.
void Service::submit(StreamImpl* stream, std::uint8_t what) noexcept {
  if (stream->commands.fetch_or(what, std::memory_order_acq_rel) == 0) {
    StreamImpl* head = inbox_.load(std::memory_order_relaxed);
    do {
      stream->next_command = head;
    } while (!inbox_.compare_exchange_weak(head, stream, std::memory_order_release, std::memory_order_relaxed));
  }
  nudge();
}

void Service::pursue(StreamImpl* stream) noexcept {
  if (thread_.load() == Thread::stale) renew_thread();
  submit(stream, kPursue);
}

// The cell goes back only through the service thread, after it has forgotten the stream: nothing of a stream outlives it here.
void Service::closed(StreamImpl* stream, int fd) noexcept {
  if (stream->watched) sys::call(SYS_epoll_ctl, epoll_fd_, EPOLL_CTL_DEL, fd, 0);
  submit(stream, kClosed);
}

void Service::buffer_is_large() noexcept {
  if (!releasing_.exchange(true, std::memory_order_seq_cst)) nudge();
}

// A large send buffer is for the moment in which a reader is far behind. This thread looks now and then whether that is over.
void Service::release_buffers() noexcept {
  if (!releasing_.exchange(false, std::memory_order_seq_cst)) return;
  bool left = false;
  for (StreamImpl* s : laned_) {
    if (!s->has_large_buffer.load(std::memory_order_seq_cst)) continue;
    (void)s->lock.lock();
    const bool empty = s->lane == nullptr || s->lane->buffered() == 0;
    if (empty) {
      if (s->lane != nullptr) s->lane->release_buffer();
      s->has_large_buffer.store(false, std::memory_order_seq_cst);
    }
    left = left || !empty;
    s->lock.unlock();
  }
  if (left) releasing_.store(true, std::memory_order_seq_cst);
}

void Service::nudge() noexcept {
  const std::uint64_t one = 1;
  sys::call(SYS_write, wake_fd_.load(std::memory_order_relaxed), sys::arg(&one), sizeof one);
}

void Service::take_commands() noexcept {
  for (StreamImpl* stream = inbox_.exchange(nullptr, std::memory_order_acquire); stream != nullptr;) {
    StreamImpl* const next = stream->next_command;
    if (newest_.load() > number_) {  // they are the next thread's, which has the credentials for them
      stream->next_command = inbox_.load(std::memory_order_relaxed);
      while (!inbox_.compare_exchange_weak(stream->next_command, stream, std::memory_order_release, std::memory_order_relaxed)) {
      }
      stream = next;
      continue;
    }
    const std::uint8_t what = stream->commands.exchange(0, std::memory_order_acq_rel);
    if (what & kClosed)
      forget(stream);
    else if (what & kPursue)
      begin(stream, stream->generation.load());
    stream = next;
  }
}

void Service::forget(StreamImpl* stream) noexcept {
  for (auto it = handshakes_.begin(); it != handshakes_.end();) {
    if (it->second.stream != stream) {
      ++it;
      continue;
    }
    cm_->withdraw(it->first);
    if (it->second.conn != cm::ConnId::none) cm_->disconnect(it->second.conn);
    if (it->second.may_recover) links_->forget(it->second.key);
    if (it->second.lane != nullptr) retire(nullptr, it->second.lane, 0, true);
    it = handshakes_.erase(it);
  }
  if (stream->lane == nullptr) {
    const std::lock_guard guard(laned_lock_);
    std::erase(laned_, stream);
    return engine::free_stream(stream);
  }
  (void)stream->lock.lock();
  if (stream->phase.load() == Phase::laned) {  // closed in a signal handler, under the hands of its own thread
    if (!stream->has_said_end()) stream->end_tx_locked();
    stream->lane->write_word(kGone, 0);
    stream->phase.store(Phase::final, std::memory_order_seq_cst);
    stream->lane->wake_sleepers();
  }
  stream->lock.unlock();
  Arrived last = stream->arrived();
  last.closed = !engine::lingers_behind(stream->lane);
  end_watch(*stream->lane, last);
  retire(stream, stream->lane, stream->conn, stream->peer_gone);
  const std::lock_guard guard(laned_lock_);
  std::erase(laned_, stream);
}

void Service::retire(StreamImpl* stream, Lane* lane, std::uint64_t conn, bool peer_gone) noexcept {
  const std::lock_guard guard(laned_lock_);
  dying_.push_back({stream, lane, conn, peer_gone, engine::grace().epoch()});
}

void Service::begin(StreamImpl* stream, std::uint16_t generation) noexcept {
  Handshake h;
  h.stream = stream;
  h.generation = generation;
  (void)stream->lock.lock();
  const bool current = stream->generation.load() == generation && stream->phase.load() == Phase::pursued;
  LaneReason refused = LaneReason::none;
  if (current) {
    h.anchor.fd = stream->fd;
    socklen_t len = sizeof h.anchor.cookie;
    if (sys::call(SYS_getsockopt, stream->fd, SOL_SOCKET, 57 /* SO_COOKIE */, sys::arg(&h.anchor.cookie), sys::arg(&len)) != 0)
      refused = LaneReason::not_tcp;
    len = sizeof h.anchor.local;
    if (sys::call(SYS_getsockname, stream->fd, sys::arg(&h.anchor.local), sys::arg(&len)) != 0) refused = LaneReason::not_tcp;
    len = sizeof h.anchor.remote;
    if (sys::call(SYS_getpeername, stream->fd, sys::arg(&h.anchor.remote), sys::arg(&len)) != 0) refused = LaneReason::not_tcp;
    stream->cookie = h.anchor.cookie;
    if (stream->stats != nullptr) stream->stats->set_addresses(h.anchor.local, h.anchor.remote);
    if (refused == LaneReason::none && engine::policy_for(stream->role, h.anchor.local, h.anchor.remote) == Family::tcp)
      refused = engine::policy_reason();
    if (refused != LaneReason::none) stream->take_down_locked(refused);
  }
  stream->lock.unlock();
  if (current && refused != LaneReason::none) search_is_over(stream);
  if (!current || refused != LaneReason::none) return;
  if (stream->stats != nullptr) stream->stats->set_reason(LaneReason::no_peer);  // until somebody is found
  h.cookie = h.anchor.cookie;
  h.active = stream->role == Role::acceptor;
  h.deadline_ns = now_ns() + kHandshakeNs + static_cast<std::int64_t>(kMeetMs) * 1'000'000;
  auto [it, fresh] = handshakes_.insert_or_assign(h.cookie, h);
  (void)fresh;
  Handshake& kept = it->second;
  const std::uint64_t cookie = h.cookie;
  const rdma::Result<rdma::Unit> begun = h.active
                                             ? cm_->dial(kept.anchor, kMeetMs,
                                                         [this, cookie](rdma::Device& device, const rdma::Path& path,
                                                                        cm::ConnId conn) -> cm::ConnectionManager::Proposal {
                                                           const auto found = handshakes_.find(cookie);
                                                           if (found == handshakes_.end()) return {};
                                                           Handshake& mine = found->second;
                                                           mine.conn = conn;
                                                           mine.lane = make_lane(device, path);
                                                           if (mine.lane == nullptr) return {};
                                                           mine.proposal = mine.lane->proposal();
                                                           return {&mine.lane->qp(), std::as_bytes(std::span(&mine.proposal, 1))};
                                                         })
                                             : cm_->offer(kept.anchor, kMeetMs);
  if (!begun) {
    RDMA_LOG(info, "fd %d: %s", stream->fd.load(), begun.error().what);
    const auto again = handshakes_.find(cookie);
    if (again != handshakes_.end()) give_up(again->second, LaneReason::no_resources);
  }
}

// Who waits for a strict stream's lane must look again.
void Service::search_is_over(StreamImpl* stream) noexcept {
  if (!stream->strict.load()) return;
  stream->phase_word.fetch_add(1, std::memory_order_release);
  sys::call(SYS_futex, sys::arg(&stream->phase_word), FUTEX_WAKE, INT_MAX);
  engine::notify(engine::handle_of(stream));
  if (channel_ != nullptr) channel_->ring();
}

void Service::give_up(Handshake& h, LaneReason reason) noexcept {
  (void)h.stream->lock.lock();
  if (h.stream->generation.load() == h.generation && h.stream->phase.load() == Phase::pursued) h.stream->take_down_locked(reason);
  h.stream->lock.unlock();
  search_is_over(h.stream);
  if (h.may_recover) links_->forget(h.key);
  if (h.lane != nullptr) retire(nullptr, h.lane, 0, true);
  const std::uint64_t cookie = h.cookie;
  handshakes_.erase(cookie);
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
  auto heap = rdma::RegisteredHeap::create(*context->pd);
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
    channel->progress();
    channel_->ring();
    return true;
  }
  return false;
}

/// A device beside the primary one goes: so does all that was made on it, before this returns. What was under way is lost, and its
/// connections fail.
void Service::leave_device(rdma::Device& device) noexcept {
  const auto is_on_it = [&](Lane* lane) { return lane != nullptr && &lane->device() == &device; };
  std::vector<std::uint64_t> cookies;
  for (const auto& [cookie, h] : handshakes_)
    if (is_on_it(h.lane)) cookies.push_back(cookie);
  for (const std::uint64_t cookie : cookies) {
    Handshake& h = handshakes_[cookie];
    if (h.conn != cm::ConnId::none) cm_->disconnect(h.conn);
    cm_->withdraw(cookie);
    give_up(h, LaneReason::device_lost);
  }
  recover_from(device);
  for (;;) {
    take_commands();  // a stream that is just being closed leaves by these
    const auto on_it = std::find_if(laned_.begin(), laned_.end(), [&](const StreamImpl* s) { return is_on_it(s->lane); });
    if (on_it == laned_.end()) break;
    if (!detach(*on_it)) sys::call(SYS_sched_yield);
  }
  {
    const std::lock_guard guard(laned_lock_);
    for (Dying& d : dying_)
      if (is_on_it(d.lane)) d.peer_gone = true;
  }
  while (std::any_of(dying_.begin(), dying_.end(), [&](const Dying& d) { return is_on_it(d.lane); })) {
    look_after_lanes();
    sys::call(SYS_sched_yield);  // for threads that look, which are not long about it
  }
  std::erase_if(peers_, [&](const auto& each) { return each.first.first == &device; });
  channels_.erase(&device);
}

/// Takes a stream off its lane, whatever it still wanted there. False: not yet, a thread waits on it or is closing it.
bool Service::detach(StreamImpl* s) noexcept {
  (void)s->lock.lock();
  const bool laned = s->phase.load() == Phase::laned;
  if (laned && (s->tx.load() != TxState::ended || s->rx.load() != RxState::ended)) {
    s->take_down_locked(LaneReason::device_lost);
    // Not a shutdown, which would pass for an orderly end: neither side may take the stream for complete.
    const sockaddr nowhere{AF_UNSPEC, {}};
    if (s->names_us(s->fd)) sys::call(SYS_connect, s->fd, sys::arg(&nowhere), sizeof nowhere);
    s->resend.clear();
    s->tx.store(TxState::ended);
    s->rx.store(RxState::ended);
  }
  s->state_edges.fetch_add(1);  // who waits finds that nothing is to be had from the lane, and leaves it
  s->lane->wake_sleepers();
  s->reset_by_peer = s->bytes_missing = false;
  Lane* const lane = laned ? s->take_spent_lane() : nullptr;
  s->lock.unlock();
  if (lane == nullptr) return false;
  if (s->watched) sys::call(SYS_epoll_ctl, epoll_fd_, EPOLL_CTL_DEL, s->fd, 0);
  s->watched = false;
  streams_by_conn_.erase(s->conn);
  {
    const std::lock_guard guard(laned_lock_);
    std::erase(laned_, s);
  }
  retire(nullptr, lane, s->conn, true);
  engine::notify(engine::handle_of(s));
  return true;
}

Lane* Service::make_lane(rdma::Device& device, const rdma::Path& path) noexcept {
  if (!may_have_lanes_on(device)) return nullptr;
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
  Lane* lane = new (cell) Lane(peer, limits);
  const auto opened = lane->open(channel);
  if (!opened) {
    RDMA_LOG(info, "no lane: %s", opened.error().what);
    lane->close();
    engine::free_lane_cell(cell);
    return nullptr;
  }
  if (lane->unordered()) {
    had_unordered_lane_.store(true, std::memory_order_release);
    left_host_.store(true);
  }
  return lane;
}

bool Service::accept_proposal(Handshake& h, std::span<const std::byte> data) noexcept {
  LaneProposal p;
  if (data.size() < sizeof p) return false;
  std::memcpy(&p, data.data(), sizeof p);
  if (p.magic != LaneProposal::kMagic || p.address() % 8 != 0) return false;
  h.lane->set_peer(p);
  if (Capture* capture = engine::capture()) {
    Capture::Endpoint endpoint;
    endpoint.local = h.anchor.local;
    endpoint.remote = h.anchor.remote;
    endpoint.active = h.active;
    h.lane->capture_to(capture, endpoint);
  }
  return true;
}

cm::Transcript Service::transcript_of(std::uint64_t cookie) {
  const auto it = handshakes_.find(cookie);
  if (it == handshakes_.end()) return {};
  const StreamImpl& stream = *it->second.stream;
  const auto copy = [](const Transcript::Record& record) {
    const auto bytes = record.bytes();
    return std::vector(bytes.begin(), bytes.end());
  };
  return {copy(stream.transcript.sent), copy(stream.transcript.received), stream.strict.load()};
}

void Service::on_cm_event(const cm::Event& event) noexcept {
  const auto it = handshakes_.find(event.anchor_cookie);
  switch (event.kind) {
    case cm::EventKind::request: {
      if (it == handshakes_.end() || it->second.lane != nullptr) return cm_->reject(event.conn, cm::Reason::refused, {});
      Handshake& h = it->second;
      h.conn = event.conn;
      h.lane = make_lane(*event.device, event.path);
      if (h.lane == nullptr) {
        cm_->reject(event.conn, cm::Reason::no_resources, {});
        return give_up(h, LaneReason::no_resources);
      }
      if (!accept_proposal(h, event.private_data)) {
        cm_->reject(event.conn, cm::Reason::version_mismatch, {});
        return give_up(h, LaneReason::version);
      }
      h.lane->conn.await_hello();
      h.reply = reply_for(h);
      if (!cm_->accept(event.conn, h.lane->qp(), std::as_bytes(std::span(&h.reply, 1)))) give_up(h, LaneReason::no_resources);
      return;
    }
    case cm::EventKind::reply: {
      if (it == handshakes_.end()) return cm_->disconnect(event.conn);
      Handshake& h = it->second;
      if (!accept_proposal(h, event.private_data)) {
        cm_->disconnect(event.conn);
        return give_up(h, LaneReason::version);
      }
      if (!cm_->establish(event.conn)) return give_up(h, LaneReason::no_resources);
      if (event.private_data.size() >= sizeof h.reply) {
        std::memcpy(&h.reply, event.private_data.data(), sizeof h.reply);
        take_reply(h, h.reply);
      }
      h.lane->send_hello(hello_addresses(h.anchor));
      return;
    }
    case cm::EventKind::rejected:
    case cm::EventKind::unreachable:
      if (it != handshakes_.end()) give_up(it->second, reason_of_end(reason_of(event.reason)));
      return;
    case cm::EventKind::established:
      return;  // Hello decides
    case cm::EventKind::disconnected: {
      if (it != handshakes_.end() && it->second.conn == event.conn) return give_up(it->second, LaneReason::peer_gone);
      const auto conn = static_cast<std::uint64_t>(event.conn);
      const auto found = streams_by_conn_.find(conn);
      if (found != streams_by_conn_.end()) {
        StreamImpl* stream = found->second;
        streams_by_conn_.erase(found);
        (void)stream->lock.lock();
        stream->lane_is_disconnected();
        stream->lock.unlock();
        tend(stream);
      }
      const std::lock_guard guard(laned_lock_);
      for (Dying& d : dying_)
        if (d.conn == conn) d.peer_gone = true;
      return;
    }
  }
}

void Service::poll_handshakes() noexcept {
  if (handshakes_.empty()) return;
  bool waiting = false;
  for (int pass = 0; pass < 2; ++pass) {
    std::vector<std::uint64_t> done, late;
    for (auto& [cookie, h] : handshakes_) {
      if (h.lane != nullptr) {
        h.lane->drain();
        if (h.lane->conn.state() == ConnState::established && !h.lane->dead())
          done.push_back(cookie);
        else if (h.lane->dead())
          late.push_back(cookie);
        else if (pass == 0) {
          h.lane->arm(rdma::kWakeChannel);
          waiting = true;
        }
      }
      if (now_ns() > h.deadline_ns) late.push_back(cookie);
    }
    for (const std::uint64_t cookie : done) finish(handshakes_[cookie]);
    for (const std::uint64_t cookie : late)
      if (const auto it = handshakes_.find(cookie); it != handshakes_.end()) {
        if (it->second.conn != cm::ConnId::none) cm_->disconnect(it->second.conn);
        cm_->withdraw(cookie);
        give_up(it->second, it->second.lane != nullptr ? LaneReason::protocol_error : LaneReason::no_peer);
      }
    if (pass == 0 && waiting) device_->arm_fence();  // other devices' arm() needs none
    if (!waiting) break;
  }
}

void Service::finish(Handshake& h) noexcept {
  StreamImpl* stream = h.stream;
  (void)stream->lock.lock();
  const bool current = stream->generation.load() == h.generation && stream->phase.load() == Phase::pursued;
  if (current) {
    stream->conn = static_cast<std::uint64_t>(h.conn);
    stream->watched = true;
    epoll_event ev{EPOLLIN | EPOLLRDHUP | EPOLLET, {.u64 = reinterpret_cast<std::uint64_t>(stream)}};
    sys::call(SYS_epoll_ctl, epoll_fd_, EPOLL_CTL_ADD, stream->fd, sys::arg(&ev));
    if (stream->stats != nullptr) stream->stats->set_transport(transport_of(h.lane->device().attr()));
    begin_watch(h);
    stream->attach(h.lane);
    last_lane_up_ns_ = now_ns();
    {
      const std::lock_guard guard(laned_lock_);
      laned_.push_back(stream);
    }
    streams_by_conn_[stream->conn] = stream;
  }
  const Stream handle = engine::handle_of(stream);
  stream->lock.unlock();
  if (current) {
    RDMA_LOG(info, "fd %d: lane up", stream->fd.load());
    engine::notify(handle);
    search_is_over(stream);
  } else {
    if (h.may_recover) links_->forget(h.key);
    h.lane->write_word(kGone, 0);
    cm_->disconnect(h.conn);
    retire(nullptr, h.lane, 0, true);
  }
  const std::uint64_t cookie = h.cookie;
  handshakes_.erase(cookie);
}

// FIN, RST or bytes on an anchor beside its lane: whoever sleeps on the lane must look.
void Service::on_anchor(StreamImpl* stream) noexcept {
  if (std::find(laned_.begin(), laned_.end(), stream) == laned_.end()) return;
  stream->anchor_event.store(true, std::memory_order_release);
  tend(stream);
}

void Service::tend(StreamImpl* stream) noexcept {
  (void)stream->lock.lock();
  if (stream->lane != nullptr && stream->phase.load() == Phase::laned) {
    stream->tend();
    stream->lane->wake_sleepers();
  }
  stream->lock.unlock();
  channel_->ring();
}

// Lanes that are over on both sides: the stream forgets its lane; memory goes back when the peer writes no more.
void Service::look_after_lanes() noexcept {
  needs_looks_ = false;
  for (std::size_t i = 0; i < laned_.size();) {
    StreamImpl* s = laned_[i];
    bool gone = false;
    const Stream handle = engine::handle_of(s);
    (void)s->lock.lock();
    s->tend();
    wake_for_words(*s);
    needs_looks_ = needs_looks_ || s->needs_looks();
    const Arrived last = s->lane != nullptr ? s->arrived() : Arrived{};
    if (Lane* const spent = s->take_spent_lane()) {
      end_watch(*spent, last);
      retire(nullptr, spent, s->conn, s->peer_gone);
      if (s->watched) sys::call(SYS_epoll_ctl, epoll_fd_, EPOLL_CTL_DEL, s->fd, 0);
      s->watched = false;
      streams_by_conn_.erase(s->conn);
      gone = true;
    }
    s->lock.unlock();
    if (gone) {
      engine::notify(handle);
      const std::lock_guard guard(laned_lock_);
      laned_[i] = laned_.back();
      laned_.pop_back();
    } else {
      ++i;
    }
  }
  for (std::size_t i = 0; i < dying_.size();) {
    Dying& d = dying_[i];
    const bool waiters = d.stream != nullptr && d.stream->waiters != 0;
    if (d.lane->unordered() && !d.lane->dead()) d.lane->drain();
    if (waiters || !(d.peer_gone || d.lane->is_left_alone()) || waits_for_peer(*d.lane) || !engine::grace().passed(d.epoch)) {
      ++i;
      continue;
    }
    if (d.conn != 0) {
      streams_by_conn_.erase(d.conn);
      cm_->disconnect(static_cast<cm::ConnId>(d.conn));
    }
    const Dying over = d;
    {
      const std::lock_guard guard(laned_lock_);
      dying_[i] = dying_.back();
      dying_.pop_back();
    }
    engine::release_lingering(over.lane);
    forget_lane(*over.lane);
    over.lane->close();
    engine::free_lane_cell(over.lane);
    if (over.stream != nullptr) engine::free_stream(over.stream);
  }
}

// PREPARE and READY follow soon after a lane is up, and a program may be asleep until they are seen: the next look is due when as
// much time again has passed since then.
int Service::next_words_ms() const noexcept {
  return static_cast<int>(std::clamp<std::int64_t>((now_ns() - last_lane_up_ns_) / 1'000'000, 1, kWordsMs));
}

// Not every device wakes a sleeper for a word. Where it does, the sleeper has seen it long ago.
void Service::wake_for_words(StreamImpl& s) noexcept {
  if (s.lane == nullptr || !s.lane->unordered()) return;
  const std::uint8_t words = s.lane->words_said();
  if (std::exchange(s.words_seen, words) == words) return;
  s.lane->wake_sleepers();
  channel_->ring();
}

bool Service::ends_are_seen() noexcept {
  if (!had_unordered_lane_.load(std::memory_order_acquire)) return true;
  if (inbox_.load(std::memory_order_acquire) != nullptr) return false;  // closed a moment ago
  const auto seen = [](const Lane& lane) { return !lane.unordered() || lane.said(kEndSeen) || lane.said(kGone) || lane.dead(); };
  const Grace::Look look(engine::grace());
  const std::lock_guard guard(laned_lock_);
  return std::all_of(laned_.begin(), laned_.end(),
                     [&](const StreamImpl* s) {
                       const Lane* const lane = s->published_lane.load(std::memory_order_acquire);
                       return lane == nullptr || s->peer_gone.load() || (seen(*lane) && !s->is_recovering());
                     }) &&
         std::all_of(dying_.begin(), dying_.end(), [&](const Dying& d) { return d.peer_gone || seen(*d.lane); });
}

bool Service::stop_at_exit() noexcept {
  const std::lock_guard guard(laned_lock_);
  bool all = true;
  for (StreamImpl* s : laned_) {
    if (s->gone_is_said) continue;
    if (!s->lock.try_lock()) {
      all = all && s->lock.held_by_me();  // exit() in a handler that interrupted this thread inside: nothing can be said
      continue;
    }
    if (s->lane != nullptr && s->phase.load() == Phase::laned) {
      s->tend();
      if (!s->has_said_end()) s->end_tx_locked();
      s->unguard_resend();
      if (!s->resend.empty()) engine::linger(s->fd, s->resend.take(), s->end_is_settled() ? nullptr : s->lane);
      s->lane->write_word(kGone, s->rx.load() == RxState::lane && s->lane->unread() != 0 ? 1 : 0);
      s->gone_is_said = true;
    }
    s->lock.unlock();
  }
  return all;
}

void Service::abandon_in_child() noexcept {
  if (composition_ != nullptr) composition_->abandon_in_child();
  if (links_ != nullptr) links_->abandon_in_child();
  for (const auto& [device, channel] : channels_) channel->abandon_in_child();
  engine::forget_helper_fd(epoll_fd_);
  sys::call(SYS_close, epoll_fd_);
}

}  // namespace sdp
