#include "preload/runtime.hpp"

#include <fcntl.h>
#include <pthread.h>

#include <atomic>
#include <new>

#include "preload/epoll_set.hpp"
#include "preload/fd_table.hpp"
#include "preload/libc.hpp"
#include "rdma_core/base/log.hpp"
#include "rdma_core/base/sys.hpp"
#include "rdma_core/builtin_drivers.hpp"
#include "sdp/engine.hpp"

namespace preload {

namespace {

class SoftwareOnly final : public sdp::engine::Composition {
 public:
  static std::unique_ptr<sdp::engine::Composition> make(const sdp::Options& options) {
    auto mine = std::make_unique<SoftwareOnly>();
    auto built = rdma::make_software_device(mine->registry_, options.device_flavour);
    if (!built) {
      RDMA_LOG(warn, "the software device cannot be made: %s", built.error().what);
      return nullptr;
    }
    mine->device_ = std::move(built.value());
    return mine;
  }
  rdma::DeviceRegistry& registry() noexcept override { return registry_; }
  rdma::cm::ConnectionManager& cm() noexcept override { return device_->cm(); }
  void abandon_in_child() noexcept override { device_->abandon_in_child(); }

 private:
  rdma::DeviceRegistry registry_;
  std::unique_ptr<rdma::Builtin> device_;
};

void before_fork() noexcept {
  fds().before_fork();
  sdp::engine::before_fork();
}
void after_fork_parent() noexcept { sdp::engine::after_fork_parent(); }
void after_fork_child() noexcept {
  sdp::engine::after_fork_child();
  EpollSet::forget_all();
  fds().inherit();
}

std::atomic<bool> started{false};

}  // namespace

void start() noexcept {
  if (started.load(std::memory_order_acquire)) return;
  if (started.exchange(true)) return;
  sdp::engine::configure(&SoftwareOnly::make, &EpollSet::on_lane_changed);
  pthread_atfork(before_fork, after_fork_parent, after_fork_child);
}

void before_exec() noexcept {
  const int high = fds().highest();
  for (int fd = 0; fd <= high; ++fd) {
    const sdp::Stream stream = fds().find(fd);
    if (!stream || !stream.has_lane()) continue;
    const long flags = rdma::sys::call(SYS_fcntl, fd, F_GETFD);
    // In a vfork child the number may stand for another file by now.
    if (flags >= 0 && (flags & FD_CLOEXEC) == 0 && stream.is_named_by(fd)) stream.take_down(sdp::LaneReason::exec);
  }
}

namespace {
// Settings are read here, before main: programs such as nginx clear or overwrite their environment.
__attribute__((constructor)) void at_load() {
  (void)libc();
  if (sdp::engine::options().policy != sdp::Family::tcp) rdma::prepare_process();
}
__attribute__((destructor)) void at_exit() {
  if (started.load(std::memory_order_acquire)) sdp::engine::at_exit();
}
}  // namespace

}  // namespace preload
