#include "preload/runtime.hpp"

#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <unistd.h>

#include <atomic>
#include <cstdlib>
#include <vector>

#include "preload/dispatch.hpp"
#include "preload/epoll_set.hpp"
#include "preload/fd_table.hpp"
#include "preload/handlers.hpp"
#include "preload/libc.hpp"
#include "rdma_core/base/log.hpp"
#include "rdma_core/base/program_call.hpp"
#include "rdma_core/base/sys.hpp"
#include "rdma_core/builtin_drivers.hpp"
#include "sdp/engine.hpp"

namespace preload {

namespace {

rdma::Carrier carrier_of(sdp::Transport transport) noexcept {
  switch (transport) {
    case sdp::Transport::ib:
      return rdma::Carrier::ib;
    case sdp::Transport::rnic:
      return rdma::Carrier::rnic;
    case sdp::Transport::local:
      break;
  }
  return rdma::Carrier::local;
}

class Composed final : public sdp::engine::Composition {
 public:
  static std::unique_ptr<sdp::engine::Composition> make(const sdp::Options& options) {
    std::vector<rdma::Carrier> order;
    for (const sdp::Transport each : options.transports) order.push_back(carrier_of(each));
    auto mine = std::make_unique<Composed>();
    auto built = rdma::compose_builtin(mine->registry_, order, options.device_flavour, options.secret_file.c_str(),
                                       options.zero_copy_from != 0);
    if (!built) {
      RDMA_LOG(warn, "the software device cannot be made: %s", built.error().what);
      return nullptr;
    }
    mine->built_ = std::move(built.value());
    return mine;
  }
  rdma::DeviceRegistry& registry() noexcept override { return registry_; }
  rdma::cm::ConnectionManager& cm() noexcept override { return built_->cm(); }
  void ask_before_opening(const std::function<bool()>& may_open) override { built_->ask_before_opening(may_open); }
  std::vector<const rdma::Device*> retire_devices() override { return built_->retire_devices(); }
  void remove_retired(const std::function<bool(const rdma::Device&)>& is_used) override { built_->remove_retired(is_used); }
  void abandon_in_child() noexcept override { built_->abandon_in_child(); }

 private:
  rdma::DeviceRegistry registry_;
  std::unique_ptr<rdma::Builtin> built_;
};

void before_fork() noexcept {
  EpollSet::before_fork();  // their locks come before a stream's, and that before the engine's
  fds().before_fork();
  sdp::engine::before_fork();
}
void after_fork_parent() noexcept {
  sdp::engine::after_fork_parent();
  EpollSet::after_fork_parent();
}
void after_fork_child() noexcept {
  sdp::engine::after_fork_child();
  fds().inherit();
  EpollSet::inherit();
}

pthread_once_t started = PTHREAD_ONCE_INIT;
std::atomic<bool> had_connections{false};

void start() noexcept {
  pthread_once(&started, [] {
    sdp::engine::configure(&Composed::make, &EpollSet::on_lane_changed);
    std::at_quick_exit(before_quick_end);
    pthread_atfork(before_fork, after_fork_parent, after_fork_child);
  });
}

}  // namespace

sdp::Stream track(int fd, sdp::Role role) noexcept {
  const rdma::sys::ProgramCall here;
  start();
  take_handlers();
  had_connections.store(true, std::memory_order_relaxed);
  return sdp::engine::track(fd, role);
}

bool leave_lane_to_libc(int fd, sdp::LaneReason why) noexcept {
  constexpr std::int64_t kStepMs = 2;
  const sdp::Stream stream = fds().find(fd);
  if (!stream) return true;
  int state = PTHREAD_CANCEL_ENABLE;
  pthread_setcancelstate(PTHREAD_CANCEL_DISABLE, &state);
  const bool blocks = (rdma::sys::call(SYS_fcntl, fd, F_GETFL) & O_NONBLOCK) == 0;
  const std::int64_t most_ms = std::int64_t{sdp::engine::options().exit_timeout_s} * 1000;
  int result = 0;
  for (std::int64_t waited = 0;; waited += kStepMs) {
    const rdma::sys::ProgramCall here;  // a new one: handlers have run, and the wait goes on
    result = stream.await_tcp(fd, why, !blocks);
    const bool again = result == -EINTR || (result == -EAGAIN && !blocks && waited < most_ms);
    if (!again) break;
    if (!blocks) rdma::sys::sleeping_call(rdma::sys::EndedBy::nothing, SYS_poll, 0, 0, kStepMs);
  }
  pthread_setcancelstate(state, nullptr);
  if (result != -EAGAIN) return true;  // what else there is, of an end, the kernel says again
  errno = EAGAIN;
  return false;
}

namespace {
void leave_to_parent() noexcept {
  for (int fd = fds().highest(); fd >= 0; --fd)
    if (const sdp::Stream stream = fds().find(fd)) stream.leave_heirs();
}
}  // namespace

void before_quick_end() noexcept {
  if (!had_connections.load(std::memory_order_acquire) || sdp::engine::in_vfork_child()) return;
  leave_to_parent();
  sdp::engine::at_quick_end();
}

namespace {
template <class Each>
void for_inherited(Each&& each) noexcept {
  const int high = fds().highest();
  for (int fd = 0; fd <= high; ++fd) {
    const sdp::Stream stream = fds().find(fd);
    if (!stream || !stream.has_lane()) continue;
    const long flags = rdma::sys::call(SYS_fcntl, fd, F_GETFD);
    // In a vfork child the number may stand for another file by now.
    if (flags >= 0 && (flags & FD_CLOEXEC) == 0 && stream.is_named_by(fd)) each(stream, fd);
  }
}
}  // namespace

void before_spawn() noexcept {
  for_inherited([](sdp::Stream stream, int) { stream.leave_to_program(); });
}

void before_ring() noexcept {
  if (!sdp::engine::ring_may_serve_sockets()) return;
  const rdma::sys::ProgramCall here;
  const int high = fds().highest();
  for (int fd = 0; fd <= high; ++fd)
    if (const sdp::Stream stream = fds().find(fd)) stream.take_down(sdp::LaneReason::io_uring);
  sdp::engine::finish_lanes_for_ring();
}

Exec::Exec(const char* path) noexcept {
  if (path != nullptr && rdma::sys::call(SYS_faccessat2, AT_FDCWD, rdma::sys::arg(path), X_OK, AT_EACCESS) == -ENOENT) return;
  attempt_.emplace();
  before_spawn();
  if (!sdp::engine::in_vfork_child()) for_inherited([](sdp::Stream stream, int fd) { stream.reset_if_bytes_stay(fd); });
}

namespace {
// Settings are read here, before main: programs such as nginx clear or overwrite their environment.
__attribute__((constructor)) void at_load() {
  (void)libc();
  if (sdp::engine::options().policy == sdp::Family::tcp) return;
  rdma::prepare_process();
  start();  // before there are threads that could meet in it, and handlers that could interrupt it
}
__attribute__((destructor)) void at_exit() {
  if (!had_connections.load(std::memory_order_acquire)) return;
  leave_to_parent();
  sdp::engine::at_exit();
}
}  // namespace

}  // namespace preload
