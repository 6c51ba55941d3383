#include "sdp/engine.hpp"

#include <fcntl.h>
#include <pthread.h>
#include <signal.h>
#include <sys/epoll.h>
#include <sys/mman.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <cerrno>
#include <cstdlib>
#include <new>

#include "rdma_core/base/clock.hpp"
#include "rdma_core/base/high_fd.hpp"
#include "rdma_core/base/log.hpp"
#include "rdma_core/base/sys.hpp"
#include "sdp/policy.hpp"
#include "sdp/rings.hpp"
#include "sdp/service.hpp"
#include "sdp/stats_process.hpp"
#include "sdp/stream_impl.hpp"

namespace sdp::engine {

namespace sys = rdma::sys;

namespace {

/// A connection that the program closed with bytes of an abandoned lane still to send.
/// In a page of its own, mapped like its bytes.
struct Lingering {
  int fd;
  KeptBytes bytes;
  Lingering* next;
  const Lane* behind;  ///< its END is not acknowledged yet
  ::linger option;     ///< how it is closed
  bool lost = false;   ///< bytes before these are
  bool may_go() const noexcept { return behind == nullptr || behind->said(kEndSeen) || behind->said(kGone); }
};
constexpr long kPageBytes = 4096;

constexpr std::int64_t kFastTurnNs = 1250;
constexpr std::int64_t kLongTurn = 4;  ///< times what a turn takes at the least: others have run

/// All there is per process. Constructed on first use and never destroyed: threads may be inside when the process exits.
struct Engine {
  Compose compose = nullptr;
  LaneListener listener = nullptr;
  Options options = parse_options();
  rdma::SharedSlab streams{sizeof(StreamImpl)};
  rdma::SharedSlab lanes{sizeof(Lane)};
  rdma::SharedLock lock;  ///< guards service creation and the free list
  StreamImpl* free_streams = nullptr;
  StreamImpl* leaving_streams = nullptr;  ///< closed while a thread was inside: free when it has left
  std::atomic<Service*> service{nullptr};
  std::atomic<bool> has_ring{false};
  std::atomic<bool> said_no_memory{false};
  std::atomic<bool> finishes{false};  ///< a thread is in finish_lanes()
  bool service_failed = false;
  std::unique_ptr<Capture> capture;  ///< made by the service thread
  bool capture_tried = false;
  std::atomic<int> parents_wake_fd{-1};
  std::atomic<long> parents_pid{0};                ///< in a fork's child
  std::atomic<std::uint64_t> helper_fds[64] = {};  ///< bit set of descriptors 0..4095
  std::atomic<std::uint32_t> spin_success{128};    ///< 0..255: how often spinning paid lately
  std::atomic<std::uint32_t> spin_probe{0};
  std::atomic<std::int64_t> full_spin_ns{std::int64_t{options.spin_us} * 1000};
  std::atomic<std::int64_t> long_turn_ns{kLongTurn * kFastTurnNs};
  Lingering* lingering = nullptr;  ///< guarded by `lock`
  Grace grace;
};

alignas(Engine) std::byte engine_storage[sizeof(Engine)];
std::atomic<Engine*> engine_pointer{nullptr};
pthread_once_t engine_once = PTHREAD_ONCE_INIT;

Engine& engine() noexcept {
  Engine* e = engine_pointer.load(std::memory_order_acquire);
  if (e != nullptr) [[likely]]
    return *e;
  pthread_once(&engine_once, [] { engine_pointer.store(new (engine_storage) Engine, std::memory_order_release); });
  return *engine_pointer.load(std::memory_order_acquire);
}

/// One word that fork wipes: the process id, 0 in a new child.
std::atomic<std::uint32_t>* pid_word() noexcept {
  static std::atomic<std::uint32_t>* const word = [] {
    void* page = mmap(nullptr, 4096, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (page == MAP_FAILED || madvise(page, 4096, MADV_WIPEONFORK) != 0) return static_cast<std::atomic<std::uint32_t>*>(nullptr);
    return new (page) std::atomic<std::uint32_t>(0);
  }();
  return word;
}

Service* service() noexcept {
  Engine& e = engine();
  if (Service* s = e.service.load(std::memory_order_acquire)) return s;
  (void)e.lock.lock();
  Service* s = e.service.load(std::memory_order_relaxed);
  if (s == nullptr && !e.service_failed) {
    s = Service::start(e.options, e.compose);
    e.service_failed = s == nullptr;
    e.service.store(s, std::memory_order_release);
  }
  e.lock.unlock();
  return s;
}

struct ThreadBell {
  int fd = -1;
  Service* of = nullptr;
  ~ThreadBell() {
    if (fd >= 0) {
      forget_helper_fd(fd);
      sys::call(SYS_close, fd);
    }
  }
};
thread_local ThreadBell thread_bell;

}  // namespace

const Options& options() noexcept { return engine().options; }

void configure(Compose compose, LaneListener listener) noexcept {
  rdma::set_fd_keeper(&high_fd, &forget_helper_fd);
  if (log_file_fd() >= 0) remember_helper_fd(log_file_fd());
  engine().compose = compose;
  engine().listener = listener;
}

std::uint32_t process_id() noexcept {
  std::atomic<std::uint32_t>* word = pid_word();
  if (word == nullptr) return static_cast<std::uint32_t>(sys::call(SYS_getpid));
  std::uint32_t pid = word->load(std::memory_order_relaxed);
  if (pid == 0) [[unlikely]] {
    pid = static_cast<std::uint32_t>(sys::call(SYS_getpid));
    word->store(pid, std::memory_order_relaxed);
  }
  return pid;
}

bool in_vfork_child() noexcept { return process_id() != static_cast<std::uint32_t>(sys::call(SYS_getpid)); }

int high_fd(int fd) noexcept {
  if (fd < 0) return fd;
  rlimit limit{};
  sys::call(SYS_prlimit64, 0, RLIMIT_NOFILE, 0, sys::arg(&limit));
  // High enough to be out of the way of the lowest-free rule and of close loops, low enough for any limit.
  const int floor = limit.rlim_cur > 2048 ? 960 : static_cast<int>(limit.rlim_cur * 3 / 4);
  const long high = sys::call(SYS_fcntl, fd, F_DUPFD_CLOEXEC, floor);
  if (high >= 0) {
    sys::call(SYS_close, fd);
    fd = static_cast<int>(high);
  }
  remember_helper_fd(fd);
  return fd;
}

void remember_helper_fd(int fd) noexcept {
  if (fd >= 0 && fd < 4096) engine().helper_fds[fd / 64].fetch_or(std::uint64_t{1} << (fd % 64));
}
void forget_helper_fd(int fd) noexcept {
  if (fd >= 0 && fd < 4096) engine().helper_fds[fd / 64].fetch_and(~(std::uint64_t{1} << (fd % 64)));
}
bool is_helper_fd(int fd) noexcept {
  const Engine* e = engine_pointer.load(std::memory_order_acquire);
  return e != nullptr && fd >= 0 && fd < 4096 && (e->helper_fds[fd / 64].load(std::memory_order_relaxed) >> (fd % 64) & 1) != 0;
}

StreamImpl* new_stream() noexcept {
  Engine& e = engine();
  (void)e.lock.lock();
  StreamImpl* s = e.free_streams;
  std::uint16_t generation = 1;
  if (s != nullptr) {
    e.free_streams = s->next;
    generation = s->generation.load(std::memory_order_relaxed);
  } else {
    s = static_cast<StreamImpl*>(e.streams.allocate());
  }
  e.lock.unlock();
  if (s == nullptr) return nullptr;
  new (s) StreamImpl;
  s->generation.store(generation == 0 ? 1 : generation, std::memory_order_release);
  return s;
}

void free_stream(StreamImpl* s) noexcept {
  if (s->stats != nullptr) release_stats(s->stats);
  s->stats = nullptr;
  s->lane = nullptr;
  s->resend.clear();
  Engine& e = engine();
  (void)e.lock.lock();
  s->next = e.leaving_streams;
  e.leaving_streams = s;
  for (StreamImpl** at = &e.leaving_streams; *at != nullptr;) {
    StreamImpl* const each = *at;
    if (each->somebody_inside()) {
      at = &each->next;
      continue;
    }
    *at = each->next;
    each->next = e.free_streams;
    e.free_streams = each;
  }
  e.lock.unlock();
}

bool free_at_once(StreamImpl* s) noexcept {
  Engine& e = engine();
  if (e.lock.held_by_me()) return false;
  free_stream(s);
  return true;
}

Stream handle_of(const StreamImpl* s) noexcept {
  return Stream::from_word(reinterpret_cast<std::uint64_t>(s) | static_cast<std::uint64_t>(s->generation.load()) << 48);
}

void* lane_cell() noexcept { return engine().lanes.allocate(); }
void free_lane_cell(void* cell) noexcept { engine().lanes.deallocate(cell); }

Stream track(int fd, Role role) noexcept {
  Engine& e = engine();
  report_option_problems();
  if (e.compose == nullptr || e.options.policy == Family::tcp) return {};
  StreamImpl* s = new_stream();
  if (s == nullptr) {
    if (!e.said_no_memory.exchange(true)) RDMA_LOG(warn, "no memory of the library's own is to be had: connections stay on TCP");
    return {};
  }
  s->role = role;
  s->fd = fd;
  s->stats = acquire_stats(fd);
  s->transcript.restart(e.options.transports.leaves_host());
  // Only then can the rules say sdp, and the first byte have to wait for it.
  if (e.options.policy == Family::sdp || !e.options.config_file.empty()) s->phase.store(Phase::unjudged, std::memory_order_relaxed);
  // A stream that has to have a lane learns by its search for one that there is none.
  if (e.has_ring.load(std::memory_order_relaxed) && s->phase.load(std::memory_order_relaxed) == Phase::plain) {
    s->phase.store(Phase::final, std::memory_order_relaxed);
    if (s->stats != nullptr) s->stats->set_reason(LaneReason::io_uring);
  }
  return handle_of(s);
}

Stream inherit(const StreamSnapshot& was) noexcept {
  StreamImpl* s = new_stream();
  if (s == nullptr) return {};
  s->inherit(was);
  return handle_of(s);
}

void closed(StreamImpl* s, int fd) noexcept {
  Service* running = engine().service.load(std::memory_order_acquire);
  if (running == nullptr)
    free_stream(s);
  else
    running->closed(s, fd);
}

void pursue(StreamImpl* s) noexcept {
  if (Service* running = service()) {
    running->pursue(s);
    return;
  }
  (void)s->lock.lock();
  s->take_down_locked(LaneReason::no_resources);
  s->lock.unlock();
}

void bytes_are_held() noexcept {
  if (Service* running = engine().service.load(std::memory_order_acquire)) running->bytes_are_held();
}
void buffer_is_large() noexcept {
  if (Service* running = engine().service.load(std::memory_order_acquire)) running->buffer_is_large();
}

bool parent_lives() noexcept { return sys::call(SYS_getppid) == engine().parents_pid.load(std::memory_order_relaxed); }

void nudge_parent() noexcept {
  const int fd = engine().parents_wake_fd.load(std::memory_order_relaxed);
  const std::uint64_t one = 1;
  if (fd >= 0) sys::call(SYS_write, fd, sys::arg(&one), sizeof one);
}

void nudge() noexcept {
  Engine& e = engine();
  if (Service* running = e.service.load(std::memory_order_acquire)) return running->nudge();
  nudge_parent();
}

void linger(int fd, KeptBytes bytes, const Lane* behind, Farewell farewell) noexcept {
  ::linger option{};
  socklen_t option_len = sizeof option;
  sys::call(SYS_getsockopt, fd, SOL_SOCKET, SO_LINGER, sys::arg(&option), sys::arg(&option_len));
  if (option.l_onoff != 0 && option.l_linger == 0) {  // the program wants a reset, which drops what is unsent
    bytes.clear();
    return;
  }
  Engine& e = engine();
  const bool can = !e.lock.held_by_me();  // a signal handler may close
  const int own = can ? high_fd(static_cast<int>(sys::call(SYS_fcntl, fd, F_DUPFD_CLOEXEC, 0))) : -1;
  const long page = own >= 0 ? sys::call(SYS_mmap, 0, kPageBytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0) : own;
  if (page < 0) {
    if (own >= 0) {
      forget_helper_fd(own);
      sys::call(SYS_close, own);
    }
    if (farewell == Farewell::reset) return KeptBytes::set_linger(fd, {1, 0});
    RDMA_LOG(error, "fd %d: closed with %zu bytes unsent: no memory or descriptor to keep them", fd, bytes.size());
    bytes.clear();
    return;
  }
  if (farewell == Farewell::reset) option = {1, 0};
  auto* entry = new (reinterpret_cast<void*>(page)) Lingering{own, bytes.take(), nullptr, behind, option};
  KeptBytes::set_linger(own, {1, 0});  // also if we are killed meanwhile
  (void)e.lock.lock();
  entry->next = e.lingering;
  e.lingering = entry;
  e.lock.unlock();
  nudge();
}

bool flush_lingering() noexcept {
  Engine& e = engine();
  if (e.lock.held_by_me()) return true;  // exit() in a signal handler
  (void)e.lock.lock();
  for (Lingering** at = &e.lingering; *at != nullptr;) {
    Lingering& l = **at;
    if (l.lost) l.bytes.clear();
    long n = l.may_go() ? 0 : -EAGAIN;
    while (!l.bytes.empty() && n >= 0) n = l.bytes.send_by(l.fd);
    if (n == -EAGAIN || n == -EINTR) {
      at = &l.next;
      continue;
    }
    *at = l.next;
    if (!l.lost) KeptBytes::set_linger(l.fd, l.option);
    forget_helper_fd(l.fd);
    sys::call(SYS_close, l.fd);
    l.bytes.clear();
    sys::call(SYS_munmap, sys::arg(&l), kPageBytes);
  }
  const bool none = e.lingering == nullptr;
  e.lock.unlock();
  return none;
}

void release_lingering(const Lane* lane) noexcept {
  Engine& e = engine();
  (void)e.lock.lock();
  for (Lingering* l = e.lingering; l != nullptr; l = l->next) {
    if (l->behind != lane) continue;
    l->lost = lane->dead() && !l->may_go();
    l->behind = nullptr;
  }
  e.lock.unlock();
}

void recover_lingering(const Lane* lane, const Arrived& peer) noexcept {
  Engine& e = engine();
  (void)e.lock.lock();
  for (Lingering* l = e.lingering; l != nullptr; l = l->next) {
    if (l->behind != lane) continue;
    const std::uint64_t from = peer.received, sent = lane->tx_bytes();
    const auto missing = static_cast<std::size_t>(sent - std::min(from, sent));
    l->lost = from > sent || !l->bytes.put_before(missing, [&](std::byte* out) { return lane->read_back(from, out, missing); });
    l->behind = nullptr;
  }
  e.lock.unlock();
  nudge();
}

void move_lingering(const Lane* lane, const Lane* left) noexcept {
  Engine& e = engine();
  (void)e.lock.lock();
  for (Lingering* l = e.lingering; l != nullptr; l = l->next)
    if (l->behind == lane) l->behind = left;
  e.lock.unlock();
}

bool lingers_behind(const Lane* lane) noexcept {
  Engine& e = engine();
  (void)e.lock.lock();
  bool found = false;
  for (const Lingering* l = e.lingering; l != nullptr; l = l->next) found = found || l->behind == lane;
  e.lock.unlock();
  return found;
}

void notify(Stream stream) noexcept {
  if (engine().listener != nullptr) engine().listener(stream);
}

Capture* capture() noexcept {
  Engine& e = engine();
  if (!e.capture_tried && !e.options.pcap_file.empty()) e.capture = Capture::open(e.options.pcap_file.c_str(), &high_fd);
  e.capture_tried = true;
  return e.capture.get();
}

bool ring_may_serve_sockets() noexcept { return rings_matter() && !in_vfork_child() && !engine().has_ring.exchange(true); }
bool has_ring() noexcept { return engine().has_ring.load(std::memory_order_relaxed); }
bool rings_matter() noexcept {
  const Engine& e = engine();
  return e.options.rings_mean_tcp && e.options.policy != Family::tcp && !e.has_ring.load(std::memory_order_relaxed);
}

Family policy_for(Role role, const sockaddr_storage& local, const sockaddr_storage& remote) noexcept {
  return decide(engine().options, role, local, remote);
}
LaneReason policy_reason() noexcept { return tcp_reason(engine().options); }

// --- waiting

int bell_fd() noexcept {
  Service* s = engine().service.load(std::memory_order_acquire);
  return s != nullptr ? s->bell_fd() : -1;
}

int thread_bell_fd() noexcept {
  Service* s = engine().service.load(std::memory_order_acquire);
  if (s == nullptr || s->bell_fd() < 0) return -1;
  if (thread_bell.fd >= 0 && thread_bell.of == s) return thread_bell.fd;
  const int fd = high_fd(static_cast<int>(sys::call(SYS_epoll_create1, EPOLL_CLOEXEC)));
  if (fd < 0) return -1;
  epoll_event ev{EPOLLIN | EPOLLET, {.u64 = 0}};
  sys::call(SYS_epoll_ctl, fd, EPOLL_CTL_ADD, s->bell_fd(), sys::arg(&ev));
  thread_bell.fd = fd;
  thread_bell.of = s;
  return fd;
}

void prepare_sleep() noexcept {
  const int fd = thread_bell_fd();
  if (fd < 0) return;
  epoll_event ev[1];
  sys::call(SYS_epoll_pwait, fd, sys::arg(ev), 1, 0, 0, 8);
}

void arm_fence() noexcept {
  Service* s = engine().service.load(std::memory_order_acquire);
  if (s != nullptr && s->device() != nullptr) s->device()->arm_fence();
}

void ring_bell() noexcept {
  Service* s = engine().service.load(std::memory_order_acquire);
  if (s != nullptr && s->channel() != nullptr) s->channel()->ring();
}

// Spinning pays while what is waited for comes sooner than a sleep and a wake-up would cost. The share of spins that found
// something decides: below a quarter the budget shrinks with it, and near nothing only one wait in 16 still tries.
std::int64_t spin_budget() noexcept {
  Engine& e = engine();
  const std::int64_t full = e.full_spin_ns.load(std::memory_order_relaxed);
  const std::uint32_t success = e.spin_success.load(std::memory_order_relaxed);
  if (success >= 64) return full;
  if (success < 8) return (e.spin_probe.fetch_add(1, std::memory_order_relaxed) & 15) == 0 ? full : 0;
  return full * success / 64;
}

void spin_result(bool found, bool others_ran) noexcept {
  Engine& e = engine();
  const std::uint32_t success = e.spin_success.load(std::memory_order_relaxed);
  const std::uint32_t lost = success / (others_ran ? 4 : 8) + (success != 0 ? 1 : 0);
  e.spin_success.store(found ? success + (255 - success) / 8 : success - std::min(success, lost), std::memory_order_relaxed);
}

void spin_turn_takes(std::int64_t ns) noexcept {
  constexpr std::int64_t kSlowestTurnNs = 20 * kFastTurnNs;
  Engine& e = engine();
  const std::int64_t turn_ns = std::clamp(ns, kFastTurnNs, kSlowestTurnNs);
  e.long_turn_ns.store(kLongTurn * turn_ns, std::memory_order_relaxed);
  e.full_spin_ns.store(std::int64_t{e.options.spin_us} * 1000 * turn_ns / kFastTurnNs, std::memory_order_relaxed);
}

std::int64_t long_turn_ns() noexcept { return engine().long_turn_ns.load(std::memory_order_relaxed); }

bool has_one_processor() noexcept {
  static const bool one = sysconf(_SC_NPROCESSORS_ONLN) == 1;
  return one;
}

Grace& grace() noexcept { return engine().grace; }

// --- fork and exit

void before_fork() noexcept {
  if (engine_pointer.load(std::memory_order_acquire) != nullptr) (void)engine().lock.lock();
}
void after_fork_parent() noexcept {
  if (engine_pointer.load(std::memory_order_acquire) != nullptr) engine().lock.unlock();
}
void after_fork_child() noexcept {
  Engine* e = engine_pointer.load(std::memory_order_acquire);
  if (e == nullptr) return;
  new (&e->lock) rdma::SharedLock;
  e->parents_pid.store(sys::call(SYS_getppid));
  if (Service* parents = e->service.load()) {
    e->parents_wake_fd.store(parents->wake_fd());
    parents->abandon_in_child();
  }
  e->service.store(nullptr);
  e->finishes = e->service_failed = false;
  e->free_streams = e->leaving_streams = nullptr;                                         // the parent's cells
  for (Lingering* l = std::exchange(e->lingering, nullptr); l != nullptr; l = l->next) {  // the parent sends their bytes
    forget_helper_fd(l->fd);
    sys::call(SYS_close, l->fd);
  }
  if (e->capture != nullptr) {
    e->capture->abandon_in_child();
    (void)e->capture.release();  // the parent's lanes, which the child may still end, point to it
  }
  e->capture_tried = false;
  thread_bell.fd = -1;
  e->grace.forget();
  followed_rings().forget_changes_in_child();
  forget_stats_in_child();
}

Service* running_service() noexcept {
  const Engine* e = engine_pointer.load(std::memory_order_acquire);
  return e != nullptr ? e->service.load(std::memory_order_acquire) : nullptr;
}

namespace {
/// What could not be sent in time is missing: the reader must not take the end of the connection for the end of the stream.
void reset_lingering() noexcept {
  Engine& e = engine();
  if (e.lock.held_by_me()) return;
  (void)e.lock.lock();
  for (const Lingering* l = e.lingering; l != nullptr; l = l->next) {
    const ::linger reset{.l_onoff = 1, .l_linger = 0};
    sys::call(SYS_setsockopt, l->fd, SOL_SOCKET, SO_LINGER, sys::arg(&reset), sizeof reset);
  }
  e.lock.unlock();
}
}  // namespace

void finish_lanes() noexcept {
  constexpr int kStepMs = 5;
  Engine* e = engine_pointer.load(std::memory_order_acquire);
  if (e == nullptr || e->finishes.exchange(true)) return;
  // The kernel sends on after a process has ended, we cannot: what the lanes' readers gave back gets a moment.
  // On devices whose posts are lost with the process their readers get it to acknowledge that they have everything.
  Service* const running = e->service.load(std::memory_order_acquire);
  bool stopped = running == nullptr;
  const auto done = [&] {
    if (!stopped) stopped = running->stop_at_exit();
    const bool seen = running == nullptr || running->ends_are_seen();
    return flush_lingering() && stopped && seen;
  };
  const int patience_ms = static_cast<int>(e->options.exit_timeout_s) * 1000;
  for (int waited = 0; !done() && waited < patience_ms; waited += kStepMs) sys::call(SYS_poll, 0, 0, kStepMs);
  reset_lingering();
  e->finishes.store(false);
}

void at_exit() noexcept {
  finish_lanes();
  const Engine* e = engine_pointer.load(std::memory_order_acquire);
  if (e == nullptr) return;
  if (e->capture != nullptr) e->capture->flush();
  if (!e->options.stats_file.empty()) write_stats_report(e->options);
}

void at_quick_end() noexcept {
  finish_lanes();
  const Engine* e = engine_pointer.load(std::memory_order_acquire);
  stack_t stack{};
  if (e == nullptr || e->options.stats_file.empty() || !is_own_process() || sys::call(SYS_sigaltstack, 0, sys::arg(&stack)) != 0 ||
      (stack.ss_flags & SS_ONSTACK) != 0)
    return;
  write_stats_report(e->options);
}

}  // namespace sdp::engine
