#include "rdma_core/verbs_module.hpp"

#include <errno.h>
#include <infiniband/verbs.h>

#include <algorithm>
#include <array>
#include <cstring>
#include <map>
#include <utility>
#include <vector>

#include "rdma_core/base/high_fd.hpp"
#include "rdma_core/base/log.hpp"
#include "rdma_core/cm/rdma_cm.hpp"
#include "rdma_core/drivers/verbs/verbs_device.hpp"

namespace rdma::verbs {
namespace {

class Module final : public VerbsModule {
 public:
  Module(std::vector<VerbsDevice*> devices, const cm::Secret& secret) : devices_(std::move(devices)), secret_(secret) {}

  Told<cm::ConnectionManager*> cm(NodeType type) override {
    const bool rnic = type == NodeType::rnic;
    std::vector<VerbsDevice*> mine;
    for (VerbsDevice* each : devices_)
      if (each->attr().node_type == type) mine.push_back(each);
    if (mine.empty()) return Err{std::string(rnic ? "no iWARP device" : "no InfiniBand or RoCE device")};
    std::unique_ptr<cm::ConnectionManager>& slot = cms_[rnic ? 1 : 0];
    if (slot == nullptr) {
      auto find = [mine](const char* name) -> Device* {
        const auto it =
            std::find_if(mine.begin(), mine.end(), [name](const VerbsDevice* d) { return std::strcmp(d->name(), name) == 0; });
        return it != mine.end() ? *it : nullptr;
      };
      auto made = rnic ? cm::make_rnic_cm(std::move(find), secret_) : cm::make_ib_cm(std::move(find), secret_);
      if (!made) return Err{std::string(made.error().what) + " (" + strerror(made.error().code) + ")"};
      slot = std::move(*made);
    }
    return slot.get();
  }
  std::vector<const Device*> devices() const override { return {devices_.begin(), devices_.end()}; }
  void retire() noexcept override {
    is_retired_ = true;
    for (const auto& each : cms_)
      if (each != nullptr) each->retire();
  }
  void abandon_in_child() noexcept override {
    for (VerbsDevice* each : devices_) each->abandon_in_child();
    for (const auto& each : cms_)
      if (is_retired_ && each != nullptr) each->abandon_in_child();
  }

 private:
  std::vector<VerbsDevice*> devices_;  ///< the registry's
  cm::Secret secret_;
  std::array<std::unique_ptr<cm::ConnectionManager>, 2> cms_;
  bool is_retired_ = false;
};

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
  const std::vector<std::string> names = device_names();
  if (names.empty()) {
    why = "libibverbs knows none of this host's RDMA devices (Debian: ibverbs-providers)";
    return nullptr;
  }
  std::vector<VerbsDevice*> opened;
  std::string reasons;
  for (const std::string& name : names) {
    auto device = VerbsDevice::open(name);
    if (device) {
      opened.push_back(device->get());
      registry.add_device(std::move(*device));
      continue;
    }
    const int code = device.error().code;
    const std::string reason = name + ": " +
                               (code == EACCES || code == EPERM ? "no permission for /dev/infiniband/uverbs*"
                                                                : std::string(device.error().what) + " (" + strerror(code) + ")");
    RDMA_LOG(info, "%s", reason.c_str());
    reasons += (reasons.empty() ? "" : "; ") + reason;
  }
  if (!opened.empty()) return new Module(std::move(opened), secret);
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
