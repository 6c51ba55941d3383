#include "rdma_core/verbs_module.hpp"

#include <dirent.h>
#include <dlfcn.h>
#include <fcntl.h>

#include <cstddef>

#include "rdma_core/base/high_fd.hpp"
#include "rdma_core/base/sys.hpp"

namespace rdma {
namespace {

constexpr char kModuleName[] = "libsdpverbs.so";
constexpr char kDevices[] = "/sys/class/infiniband";

/// Is there a name in the directory?
bool has_entries(const char* directory) noexcept {
  const long fd = sys::call(SYS_openat, AT_FDCWD, sys::arg(directory), O_RDONLY | O_DIRECTORY | O_CLOEXEC, 0);
  if (fd < 0) return false;
  bool found = false;
  alignas(dirent64) char entries[2048];
  for (long bytes; !found && (bytes = sys::call(SYS_getdents64, fd, sys::arg(entries), sizeof entries)) > 0;) {
    for (long at = 0; at < bytes;) {
      const auto* entry = static_cast<const dirent64*>(static_cast<const void*>(entries + at));
      found |= entry->d_name[0] != '.';
      at += entry->d_reclen;
    }
  }
  sys::call(SYS_close, fd);
  return found;
}

/// Beside the library that this code is in; for a program in bin, in the lib beside that.
std::string module_path() {
  Dl_info own{};
  if (dladdr(&kModuleName, &own) == 0 || own.dli_fname == nullptr) return kModuleName;
  const std::string file = own.dli_fname;
  const std::string folder = file.substr(0, file.rfind('/') == std::string::npos ? 0 : file.rfind('/') + 1);
  const std::string beside = folder + kModuleName;
  if (sys::call(SYS_faccessat, AT_FDCWD, sys::arg(beside.c_str()), R_OK) == 0) return beside;
  return folder + "../lib/" + kModuleName;
}

}  // namespace

bool has_rdma_devices() noexcept { return has_entries(kDevices); }

Told<std::unique_ptr<VerbsModule>> open_verbs_module(DeviceRegistry& registry, const std::string& secret_file) {
  if (!has_rdma_devices()) return Err{std::string("this host has no RDMA device")};
  const std::string path = module_path();
  if (sys::call(SYS_faccessat, AT_FDCWD, sys::arg(path.c_str()), R_OK) != 0)
    return Err{"the module for RDMA devices is not installed: " + path};
  void* module = dlopen(path.c_str(), RTLD_NOW | RTLD_LOCAL);  // for good: the devices' code is in it
  if (module == nullptr) {
    const char* said = dlerror();
    return Err{std::string("the module for RDMA devices cannot be loaded: ") + (said != nullptr ? said : path.c_str())};
  }
  const auto entry = reinterpret_cast<VerbsModuleEntry>(dlsym(module, kVerbsModuleEntry));
  if (entry == nullptr) return Err{path + " is not the module for RDMA devices"};
  const ModuleHost host{SDPRELOAD_VERSION, log::threshold.load(), log::fd(), secret_file.c_str(), &keep_fd, &forget_fd};
  const char* why = "";
  VerbsModule* opened = entry(&host, &registry, &why);
  if (opened == nullptr) return Err{std::string(why)};
  return std::unique_ptr<VerbsModule>(opened);
}

}  // namespace rdma
