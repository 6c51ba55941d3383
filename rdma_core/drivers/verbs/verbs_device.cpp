#include "rdma_core/drivers/verbs/verbs_device.hpp"

#include <errno.h>
#include <fcntl.h>
#include <infiniband/verbs.h>
#include <sys/mman.h>

#include <algorithm>
#include <array>
#include <bit>
#include <charconv>
#include <cstring>
#include <optional>
#include <string_view>
#include <utility>

#include "rdma_core/base/high_fd.hpp"
#include "rdma_core/base/sys.hpp"
#include "rdma_core/drivers/verbs/verbs_qp.hpp"

namespace rdma::verbs {
namespace {

/// libibverbs' list, freed at the end of the scope. The array is empty when there is none.
class DeviceList {
 public:
  DeviceList() noexcept : list_(ibv_get_device_list(&count_)) {}
  ~DeviceList() {
    if (list_ != nullptr) ibv_free_device_list(list_);
  }
  DeviceList(const DeviceList&) = delete;
  DeviceList& operator=(const DeviceList&) = delete;
  std::span<ibv_device* const> devices() const noexcept {
    return list_ != nullptr ? std::span<ibv_device* const>(list_, static_cast<std::size_t>(count_))
                            : std::span<ibv_device* const>{};
  }

 private:
  int count_ = 0;
  ibv_device** list_;
};

constexpr std::uint8_t kPort = 1;
constexpr std::uint32_t kDeepest = 1024;  ///< of a queue: more than any lane asks for, and every device has it
constexpr std::uint32_t kWantedInline = 512;
constexpr std::uint32_t kShallowest = 64;                             ///< completion queue
constexpr std::uint32_t kSoftIwarp = 0x626d74, kSoftRoce = 0xffffff;  ///< their vendors

/// What a Qp really gets: some devices refuse a wish that is too large, others grant less than their attributes say. Nothing: there
/// is no memory for any.
std::optional<std::uint32_t> probe_inline(ibv_context* context) noexcept {
  ibv_pd* pd = ibv_alloc_pd(context);
  ibv_cq* cq = ibv_create_cq(context, 64, nullptr, nullptr, 0);
  std::optional<std::uint32_t> found;
  for (std::uint32_t wanted = kWantedInline; pd != nullptr && cq != nullptr && !found; wanted /= 2) {
    ibv_qp_init_attr init{};
    init.send_cq = init.recv_cq = cq;
    init.qp_type = IBV_QPT_RC;
    init.cap = {.max_send_wr = 64, .max_recv_wr = 64, .max_send_sge = 1, .max_recv_sge = 1, .max_inline_data = wanted};
    if (ibv_qp* qp = ibv_create_qp(pd, &init)) {
      found = std::min(init.cap.max_inline_data, kWantedInline);
      ibv_destroy_qp(qp);
    } else if (wanted == 0) {
      break;
    }
  }
  if (cq != nullptr) ibv_destroy_cq(cq);
  if (pd != nullptr) ibv_dealloc_pd(pd);
  return found;
}

/// Queues are mapped at the lowest free offset of the device's file, from 0 on. The library for Soft-iWARP takes the offset 0x90000
/// for a failure of the kernel's: once it is the lowest that is free no queue can be made, and that is so with a handful of lanes.
/// A queue that lies across it keeps it from being free. nullptr: this library has no such offset. Errors: ENOMEM.
Result<ibv_cq*> cover_bad_offset(ibv_context* context) noexcept {
  constexpr int kDepth = 1024;  // nine pages of 4 KiB, one of 64: either way some queue would begin there
  std::array<ibv_cq*, 32> before{};
  std::size_t made = 0;
  while (made < before.size() && (before[made] = ibv_create_cq(context, kDepth, nullptr, nullptr, 0)) != nullptr) ++made;
  ibv_cq* kept = nullptr;
  const bool has_it = made < before.size();
  if (made > 0 && has_it) {
    ibv_destroy_cq(before[--made]);
    kept = ibv_create_cq(context, 2 * kDepth, nullptr, nullptr, 0);
  }
  while (made > 0) ibv_destroy_cq(before[--made]);
  if (has_it && kept == nullptr) return fail(ENOMEM, "verbs: no memory for completion queues");
  return kept;
}

}  // namespace

std::vector<std::string> device_names() {
  std::vector<std::string> names;
  const DeviceList list;  // named: a range-for keeps only what devices() returns
  for (ibv_device* each : list.devices()) names.emplace_back(ibv_get_device_name(each));
  return names;
}

void abandon_mappings_in_child() noexcept {
  const long fd = sys::call(SYS_openat, AT_FDCWD, sys::arg("/proc/self/maps"), O_RDONLY | O_CLOEXEC, 0);
  if (fd < 0) return;
  char text[8192];  // longer than any line
  std::size_t have = 0;
  for (long n; (n = sys::call(SYS_read, fd, sys::arg(text + have), static_cast<long>(sizeof text - have))) > 0;) {
    have += static_cast<std::size_t>(n);
    std::string_view lines(text, have);
    for (std::size_t end; (end = lines.find('\n')) != std::string_view::npos; lines.remove_prefix(end + 1)) {
      const std::string_view line = lines.substr(0, end);
      if (line.find(" /dev/infiniband/uverbs") == std::string_view::npos) continue;
      std::uintptr_t from = 0, to = 0;
      const auto dash = std::from_chars(line.data(), line.data() + line.size(), from, 16).ptr;
      std::from_chars(dash + 1, line.data() + line.size(), to, 16);
      sys::call(SYS_mmap, static_cast<long>(from), static_cast<long>(to - from), PROT_READ | PROT_WRITE,
                MAP_FIXED | MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    }
    have = lines.size();
    std::memmove(text, lines.data(), have);
  }
  sys::call(SYS_close, fd);
}

Result<std::unique_ptr<VerbsDevice>> VerbsDevice::open(const std::string& name) {
  const DeviceList list;
  for (ibv_device* each : list.devices()) {
    if (name != ibv_get_device_name(each)) continue;
    errno = 0;
    ibv_context* context = ibv_open_device(each);
    if (context == nullptr) return fail(errno != 0 ? errno : ENODEV, "verbs: the device cannot be opened");
    std::unique_ptr<VerbsDevice> device(new VerbsDevice(context, name));
    if (auto looked = device->look_around(); !looked) return Err{looked.error()};
    return device;
  }
  return fail(ENODEV, "verbs: no such device");
}

// libibverbs goes by these fields whenever it needs the descriptors, and closes them.
VerbsDevice::VerbsDevice(ibv_context* context, std::string name) : context_(context), name_(std::move(name)) {
  context_->cmd_fd = keep_fd(context_->cmd_fd);
  context_->async_fd = keep_fd(context_->async_fd);
}

VerbsDevice::~VerbsDevice() {
  forget_fd(context_->cmd_fd);
  forget_fd(context_->async_fd);
  if (cover_ != nullptr) ibv_destroy_cq(cover_);
  ibv_close_device(context_);
}

void VerbsDevice::abandon_in_child() noexcept {
  for (int* fd : {&context_->cmd_fd, &context_->async_fd}) {
    forget_fd(*fd);
    sys::call(SYS_close, std::exchange(*fd, -1));
  }
}

Result<Unit> VerbsDevice::look_around() {
  ibv_device_attr limits{};
  ibv_port_attr port{};
  if (const int failed = ibv_query_device(context_, &limits)) return fail(failed, "verbs: the device does not tell its limits");
  if (const int failed = ibv_query_port(context_, kPort, &port)) return fail(failed, "verbs: the device does not tell of its port");
  switch (context_->device->transport_type) {
    case IBV_TRANSPORT_IB:
      attr_.node_type = context_->device->node_type == IBV_NODE_SWITCH   ? NodeType::ib_switch
                        : context_->device->node_type == IBV_NODE_ROUTER ? NodeType::ib_router
                                                                         : NodeType::ib_ca;
      break;
    case IBV_TRANSPORT_IWARP:
      attr_.node_type = NodeType::rnic;
      break;
    default:
      return fail(ENOTSUP, "verbs: neither an IB nor an iWARP device");
  }
  const bool rnic = attr_.node_type == NodeType::rnic;
  if (limits.vendor_id == kSoftIwarp) {
    auto cover = cover_bad_offset(context_);
    if (!cover) return Err{cover.error()};
    cover_ = *cover;
  }
  const auto at_most = [](int limit, std::uint32_t most) { return std::min(static_cast<std::uint32_t>(std::max(limit, 1)), most); };
  attr_.link_layer = port.link_layer == IBV_LINK_LAYER_ETHERNET ? LinkLayer::ethernet : LinkLayer::infiniband;
  attr_.max_send_wr = at_most(limits.max_qp_wr, kDeepest);
  attr_.max_recv_wr = std::bit_floor(at_most(limits.max_qp_wr, kDeepest));
  attr_.max_sge = at_most(limits.max_sge, 8);
  attr_.max_sge_read = rnic ? 1 : at_most(limits.max_sge_rd != 0 ? limits.max_sge_rd : limits.max_sge, 8);
  attr_.max_read_outstanding = at_most(limits.max_qp_init_rd_atom, 255);
  attr_.rnr_retry = !rnic;
  attr_.acknowledges = !rnic;
  attr_.mixes_messages = limits.vendor_id == kSoftRoce;
  // A device that was short of memory once must not look for ever like one that can do less.
  const std::optional<std::uint32_t> max_inline = probe_inline(context_);
  if (!max_inline) return fail(ENOMEM, "verbs: no memory for a Qp");
  attr_.max_inline = *max_inline;
  max_cqe_ = static_cast<std::uint32_t>(std::max(limits.max_cqe, 1));
  gid_entries_ = port.gid_tbl_len;
  set_nonblocking(context_->async_fd);
  return Unit{};
}

Result<std::uint8_t> VerbsDevice::gid_index(const Gid& wanted) const {
  std::uint8_t found = 0;
  bool any = false;
  for (int i = 0; i < std::min(gid_entries_, 256); ++i) {
    ibv_gid_entry entry{};
    if (ibv_query_gid_ex(context_, kPort, static_cast<std::uint32_t>(i), &entry, 0) != 0) continue;
    if (std::memcmp(entry.gid.raw, wanted.data(), wanted.size()) != 0) continue;
    // The same address stands there for RoCE v1 too; v2 passes routers and firewalls.
    if (!any || entry.gid_type == IBV_GID_TYPE_ROCE_V2) found = static_cast<std::uint8_t>(i);
    any = true;
    if (entry.gid_type == IBV_GID_TYPE_ROCE_V2) break;
  }
  if (!any) return fail(ENOENT, "verbs: the device has no such address");
  return found;
}

Result<std::unique_ptr<Pd>> VerbsDevice::create_pd(const Path&) {
  ibv_pd* pd = ibv_alloc_pd(context_);
  if (pd == nullptr) return fail(errno, "verbs: no protection domain");
  return std::unique_ptr<Pd>(new VerbsPd(*this, pd));
}

Result<std::unique_ptr<CompletionChannel>> VerbsDevice::create_channel() { return VerbsChannel::open(context_, max_cqe_); }

Result<std::unique_ptr<Cq>> VerbsDevice::create_cq(std::uint32_t depth, CompletionChannel* channel) {
  auto* own = static_cast<VerbsChannel*>(channel);
  depth = std::max(depth, kShallowest);
  auto queue = own != nullptr ? own->queue_for(depth) : SharedQueue::make(context_, depth, nullptr);
  if (queue == nullptr) return fail(errno, "verbs: no completion queue");
  return std::unique_ptr<Cq>(std::make_unique<VerbsCq>(std::move(queue), depth, own));
}

int VerbsDevice::async_fd() const noexcept { return context_->async_fd; }

// The number in the way in's name may be another device's by then.
bool VerbsDevice::is_lost() const noexcept {
  if (lost_) return true;
  const std::string folder = "/sys/class/infiniband_verbs/";
  const std::string file = folder + context_->device->dev_name + "/ibdev";
  const long fd = sys::call(SYS_openat, AT_FDCWD, sys::arg(file.c_str()), O_RDONLY | O_CLOEXEC, 0);
  if (fd < 0)  // in a chroot there may be no such folder
    return (fd == -ENOENT || fd == -ENODEV) && sys::call(SYS_faccessat, AT_FDCWD, sys::arg(folder.c_str()), R_OK) == 0;
  char text[IBV_SYSFS_NAME_MAX] = {};
  const long n = sys::call(SYS_read, fd, sys::arg(text), sizeof text);
  sys::call(SYS_close, fd);
  return n < 0 ? n == -ENODEV : std::string_view(text, static_cast<std::size_t>(n)) != name_ + "\n";
}

void VerbsDevice::progress() {
  ibv_async_event event{};
  while (ibv_get_async_event(context_, &event) == 0) {
    const ibv_event_type type = event.event_type;
    ibv_ack_async_event(&event);
    lost_ |= type == IBV_EVENT_DEVICE_FATAL;
    if (!async_handler_) continue;
    switch (type) {
      case IBV_EVENT_PORT_ACTIVE:
        async_handler_(AsyncEvent::port_active);
        break;
      case IBV_EVENT_PORT_ERR:
        async_handler_(AsyncEvent::port_error);
        break;
      case IBV_EVENT_GID_CHANGE:
        async_handler_(AsyncEvent::gid_change);
        break;
      case IBV_EVENT_DEVICE_FATAL:
        async_handler_(AsyncEvent::device_fatal);
        break;
      default:
        break;  // of a Qp or Cq: its completions tell
    }
  }
}

}  // namespace rdma::verbs
