#include "rdma_core/drivers/shm/shm_device.hpp"

#include <errno.h>
#include <linux/membarrier.h>
#include <sys/random.h>

#include <atomic>
#include <new>

#include "rdma_core/base/clock.hpp"
#include "rdma_core/base/sys.hpp"
#include "rdma_core/drivers/shm/shm_qp.hpp"

namespace rdma::shm {

ShmDevice::ShmDevice(const ShmOptions& options) noexcept : segment_bytes_(options.segment_bytes) {
  attr_.node_type = options.flavour;
  attr_.link_layer = LinkLayer::memory;
  attr_.max_send_wr = 1024;
  attr_.max_recv_wr = kMaxDepth;
  attr_.max_inline = 1u << 20;
  attr_.max_sge = 16;
  attr_.max_sge_read = options.flavour == NodeType::rnic ? 1 : 16;
  attr_.max_read_outstanding = 16;
  attr_.recv_prefix_bytes = sizeof(std::uint64_t);
  attr_.recv_needs_extent = true;
  attr_.rnr_retry = false;
  attr_.rdma_write_wakes = true;
  attr_.remembers_sent_data = true;
  attr_.posts_arrive_at_once = true;
  attr_.maps_peer_memory = true;
  attr_.reads_program_memory = options.reads_program_memory;
}

Result<std::unique_ptr<ShmDevice>> ShmDevice::create(const ShmOptions& options) {
  if (options.flavour != NodeType::ib_ca && options.flavour != NodeType::rnic) return fail(EINVAL, "shm: flavour");
  std::unique_ptr<ShmDevice> device(new ShmDevice(options));
  if (const int rc = device->bell_.open(); rc < 0) return fail(-rc, "shm: no bell");
  device->become_new_process();
  return device;
}

ShmDevice::~ShmDevice() = default;

const char* ShmDevice::name() const noexcept { return attr_.node_type == NodeType::rnic ? "shm_rnic" : "shm_ib"; }

bool ShmDevice::register_for_fences() noexcept {
  return sys::call(SYS_membarrier, MEMBARRIER_CMD_REGISTER_GLOBAL_EXPEDITED, 0) == 0;
}

void ShmDevice::become_new_process() noexcept {
  if (sys::call(SYS_getrandom, sys::arg(&process_id_), sizeof process_id_, GRND_NONBLOCK) != sizeof process_id_) {
    // Early in boot. It has to be unique, not secret.
    process_id_.word[0] = static_cast<std::uint64_t>(SteadyClock().now());
    process_id_.word[1] = static_cast<std::uint64_t>(sys::call(SYS_getpid)) << 32 | reinterpret_cast<std::uintptr_t>(this) >> 4;
  }
  // The kernel forgets the registration at exec, and a child's memory is a new one: each process registers for itself.
  has_membarrier_ = register_for_fences() && sys::call(SYS_membarrier, MEMBARRIER_CMD_GLOBAL_EXPEDITED, 0) == 0;
}

void ShmDevice::arm_fence() noexcept {
  if (ShmCq::take_barrier_due()) return pass_barrier();
  std::atomic_thread_fence(std::memory_order_seq_cst);
}

void ShmDevice::pass_barrier() noexcept {
  if (has_membarrier_) sys::call(SYS_membarrier, MEMBARRIER_CMD_GLOBAL_EXPEDITED, 0);
  std::atomic_thread_fence(std::memory_order_seq_cst);
}

Result<std::unique_ptr<Pd>> ShmDevice::create_pd(const Path& path) {
  auto link = links_.find(path.id);
  if (link == nullptr || !link->alive.load(std::memory_order_relaxed)) return fail(ENOTCONN, "shm: no such link");
  return std::unique_ptr<Pd>(std::make_unique<ShmPd>(*this, std::move(link)));
}

Result<std::unique_ptr<CompletionChannel>> ShmDevice::create_channel() {
  return std::unique_ptr<CompletionChannel>(std::make_unique<ShmChannel>(bell_));
}

Result<std::unique_ptr<Cq>> ShmDevice::create_cq(std::uint32_t depth, CompletionChannel* channel) {
  if (depth == 0) return fail(EINVAL, "shm: a CQ of no depth");
  return std::unique_ptr<Cq>(std::make_unique<ShmCq>(channel));  // completions lie in the QPs' own rings: it cannot overflow
}

Result<Path> ShmDevice::self_path() {
  const std::lock_guard lock(self_mutex_);
  for (const auto& link : links_.all())
    if (link->self) return Path{link->id};
  auto segment = OwnSegment::create(segment_bytes_, process_id_);
  if (!segment) return Err{segment.error()};
  auto link = std::make_shared<ShmLink>();
  link->own = std::move(*segment);
  link->own->close_fd();
  link->self = true;
  link->needs_fence = !has_membarrier_;
  link->peer.process = process_id_;
  link->bell.use_own(bell_);
  link->peer.pid = static_cast<std::int32_t>(sys::call(SYS_getpid));
  link->peer.uid = link->peer.own_euid = static_cast<std::uint32_t>(sys::call(SYS_geteuid));
  sys::call(SYS_getrandom, sys::arg(&link->nonce), sizeof link->nonce, GRND_NONBLOCK);
  if (attr_.reads_program_memory) link->open_program_memory();
  links_.add(link);
  return Path{link->id};
}

void ShmDevice::abandon_in_child() noexcept {
  ++generation_;
  new (&self_mutex_) std::mutex;
  links_.abandon_in_child();
  bell_.renew_in_child();
  become_new_process();
}

}  // namespace rdma::shm
