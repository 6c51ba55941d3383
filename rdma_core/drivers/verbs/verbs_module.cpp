#include "rdma_core/verbs_module.hpp"

#include <errno.h>
#include <infiniband/verbs.h>
#include <sys/epoll.h>

#include <algorithm>
#include <array>
#include <cstring>
#include <map>
#include <string_view>
#include <utility>
#include <vector>

#include "rdma_core/base/high_fd.hpp"
#include "rdma_core/base/log.hpp"
#include "rdma_core/base/sys.hpp"
#include "rdma_core/cm/rdma_channel.hpp"
#include "rdma_core/cm/rdma_cm.hpp"
#include "rdma_core/drivers/verbs/verbs_device.hpp"

namespace rdma::verbs {
namespace {

class Module final : public VerbsModule {
 public:
  Module(DeviceRegistry& registry, const cm::Secret& secret)
      : registry_(registry), secret_(secret), epoll_fd_(keep_fd(static_cast<int>(sys::call(SYS_epoll_create1, EPOLL_CLOEXEC)))) {}
  ~Module() override { close_epoll(); }

  /// Enters the devices that are not yet there. Returns why some could not be opened, in words for the operator.
  std::string enter_devices();
  bool has_devices() const noexcept { return !devices_.empty(); }

  Told<cm::ConnectionManager*> cm(NodeType type) override;
  void progress(bool look) override;
  int fd() const noexcept override { return epoll_fd_; }
  std::vector<const Device*> devices() const override { return {devices_.begin(), devices_.end()}; }
  void retire() noexcept override {
    is_retired_ = true;
    for (const auto& each : cms_)
      if (each != nullptr) each->retire();
    close_epoll();
  }
  void abandon_in_child() noexcept override {
    for (VerbsDevice* each : devices_) each->abandon_in_child();
    for (const auto& each : cms_)
      if (is_retired_ && each != nullptr) each->abandon_in_child();
    close_epoll();
    abandon_mappings_in_child();
  }

 private:
  VerbsDevice* find(std::string_view name) const noexcept {
    const auto it = std::find_if(devices_.begin(), devices_.end(), [name](const VerbsDevice* d) { return name == d->name(); });
    return it != devices_.end() ? *it : nullptr;
  }
  VerbsDevice* find_or_enter(const char* name) {
    if (VerbsDevice* known = find(name)) return known;
    enter_devices();
    return find(name);
  }
  void leave(VerbsDevice& device) noexcept;
  void tell_cms(const Device* going) noexcept {
    for (const auto& each : cms_)
      if (each != nullptr) each->devices_changed(going);
  }
  void close_epoll() noexcept {
    if (epoll_fd_ < 0) return;
    forget_fd(epoll_fd_);
    sys::call(SYS_close, std::exchange(epoll_fd_, -1));
  }

  DeviceRegistry& registry_;
  const cm::Secret secret_;
  int epoll_fd_;
  std::vector<VerbsDevice*> devices_;  ///< the registry's
  std::array<std::unique_ptr<cm::ConnectionManager>, 2> cms_;
  bool is_retired_ = false;
};

std::string Module::enter_devices() {
  std::string reasons;
  for (const std::string& name : device_names()) {
    if (find(name) != nullptr) continue;
    auto device = VerbsDevice::open(name);
    if (device) {
      epoll_event event{EPOLLIN, {.u64 = 0}};
      sys::call(SYS_epoll_ctl, epoll_fd_, EPOLL_CTL_ADD, (*device)->async_fd(), sys::arg(&event));
      devices_.push_back(device->get());
      registry_.add_device(std::move(*device));
      continue;
    }
    const int code = device.error().code;
    const std::string reason = name + ": " +
                               (code == EACCES || code == EPERM ? "no permission for /dev/infiniband/uverbs*"
                                                                : std::string(device.error().what) + " (" + strerror(code) + ")");
    RDMA_LOG(info, "%s", reason.c_str());
    reasons += (reasons.empty() ? "" : "; ") + reason;
  }
  return reasons;
}

Told<cm::ConnectionManager*> Module::cm(NodeType type) {
  const bool rnic = type == NodeType::rnic;
  if (std::none_of(devices_.begin(), devices_.end(), [type](const VerbsDevice* d) { return d->attr().node_type == type; }))
    return Err{std::string(rnic ? "no iWARP device" : "no InfiniBand or RoCE device")};
  std::unique_ptr<cm::ConnectionManager>& slot = cms_[rnic ? 1 : 0];
  if (slot != nullptr) return slot.get();
  auto find_device = [this](const char* name) -> Device* { return find_or_enter(name); };
  auto goes = [this](Device& device) { static_cast<VerbsDevice&>(device).lose(); };
  auto made = rnic ? cm::make_rnic_cm(find_device, secret_, goes) : cm::make_ib_cm(find_device, secret_, goes);
  if (!made) return Err{std::string(made.error().what) + " (" + strerror(made.error().code) + ")"};
  slot = std::move(*made);
  return slot.get();
}

void Module::progress(bool look) {
  epoll_event event;
  if (sys::call(SYS_epoll_pwait, epoll_fd_, sys::arg(&event), 1, 0, 0, 8) > 0)
    for (VerbsDevice* each : devices_) each->progress();
  const auto is_over = [look](const VerbsDevice* d) { return look ? d->is_lost() : d->was_lost(); };
  for (auto it = devices_.begin(); (it = std::find_if(devices_.begin(), devices_.end(), is_over)) != devices_.end();) leave(**it);
  if (!look) return;
  enter_devices();
  tell_cms(nullptr);
}

void Module::leave(VerbsDevice& device) noexcept {
  const std::string name = device.name();
  RDMA_LOG(info, "%s goes", name.c_str());
  std::erase(devices_, &device);
  tell_cms(&device);
  registry_.remove_device(device);
  cm::close_librdmacm_context(name.c_str());
}

/// Kept for who asked, who copies it.
const char* say(std::string text) {
  static std::string kept;
  kept = std::move(text);
  return kept.c_str();
}

}  // namespace

static VerbsModule* open_module(const ModuleHost& host, DeviceRegistry& registry, const char*& why) {
  if (std::strcmp(host.version, SDPRELOAD_VERSION) != 0) {
    why = say(std::string("the module for RDMA devices is of version " SDPRELOAD_VERSION ", the library of ") + host.version);
    return nullptr;
  }
  log::threshold.store(host.log_level);
  log::set_fd(host.log_fd);
  set_fd_keeper(host.keep_fd, host.forget_fd);
  cm::Secret secret{};
  if (*host.secret_file != '\0') {
    static std::map<std::string, cm::Secret> known;  // the process may not read it any more: it may have been root before
    if (const auto it = known.find(host.secret_file); it != known.end()) {
      secret = it->second;
    } else if (auto read = cm::secret_from(host.secret_file)) {
      known[host.secret_file] = secret = *read;
    } else {
      why = say(read.error());
      RDMA_LOG(error, "%s: no lanes between hosts", why);
      return nullptr;
    }
  }
  ibv_fork_init();  // programs fork; does nothing where the kernel copies registered pages at once
  if (device_names().empty()) {
    why = "libibverbs knows none of this host's RDMA devices (Debian: ibverbs-providers)";
    return nullptr;
  }
  auto opened = std::make_unique<Module>(registry, secret);
  std::string reasons = opened->enter_devices();
  if (opened->has_devices()) return opened.release();
  why = say(std::move(reasons));
  return nullptr;
}

}  // namespace rdma::verbs

extern "C" __attribute__((visibility("default"))) rdma::VerbsModule* sdpreload_open_verbs(const rdma::ModuleHost* host,
                                                                                          rdma::DeviceRegistry* registry,
                                                                                          const char** why) noexcept {
  return rdma::verbs::open_module(*host, *registry, *why);
}
static_assert(std::is_same_v<decltype(&sdpreload_open_verbs), rdma::VerbsModuleEntry>);
