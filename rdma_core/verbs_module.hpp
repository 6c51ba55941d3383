// The module that has the verbs driver and its connection managers, libsdpverbs.so. It is opened when a connection wants it, so
// that a process whose connections stay on its host, or whose host has no RDMA device, never loads the vendors' libraries.
//
// Module and library have copies of rdma_core of their own; what belongs to the process (log, descriptors that the program may not
// close) the library lends. They must be of one version.
#pragma once

#include <memory>
#include <string>
#include <vector>

#include "rdma_core/base/log.hpp"
#include "rdma_core/cm/connection_manager.hpp"
#include "rdma_core/device_registry.hpp"

namespace rdma {

/// What the library lends to the module.
struct ModuleHost {
  const char* version = "";
  log::Level log_level = log::Level::warn;
  int log_fd = 2;
  const char* secret_file = "";               ///< what both ends of a connection between hosts must know; empty: nothing. Copied
  int (*keep_fd)(int fd) noexcept = nullptr;  ///< see base/high_fd.hpp
  void (*forget_fd)(int fd) noexcept = nullptr;
};

/// An error is told in words for the operator.
template <class T>
using Told = Result<T, std::string>;

/// The RDMA devices of this host that could be opened, and the CMs for them. The devices are the registry's. Threads: one.
class VerbsModule {
 public:
  virtual ~VerbsModule() = default;
  /// For devices of that type (ib_ca, rnic); made at the first call. It stays the module's.
  virtual Told<cm::ConnectionManager*> cm(NodeType type) = 0;
  virtual std::vector<const Device*> devices() const = 0;
  /// Nobody uses its CMs any more: ConnectionManager::retire() of those that were made. From here on it abandons them itself.
  virtual void retire() noexcept = 0;
  /// Takes devices that are to go out of the registry and closes them; that they go waits for it. `look`: there is news of this
  /// host's devices, and those that have come are entered. Never from within a call of a CM's.
  virtual void progress(bool look) = 0;
  virtual int fd() const noexcept = 0;  ///< an epoll descriptor: a device has news of its own for progress()
  /// In the child of a fork: closes its copies of the devices' descriptors, so that the parent's death shows at its peers. Who uses
  /// a CM abandons that. The child opens the module anew, with a new registry.
  virtual void abandon_in_child() noexcept = 0;
};

/// Has the host an RDMA device?
bool has_rdma_devices() noexcept;

/// Opens the module, which enters the devices that it can open into `registry`; those stay when the VerbsModule goes, which it does
/// before the registry. Nothing is loaded where the host has no RDMA device. May take some milliseconds. `secret_file`: a path, or
/// empty; one that cannot be read is an error. A process reads it once.
Told<std::unique_ptr<VerbsModule>> open_verbs_module(DeviceRegistry& registry, const std::string& secret_file = {});

/// The one function that the module exports, by this name. nullptr: `*why`, a text of the module's, says why.
inline constexpr char kVerbsModuleEntry[] = "sdpreload_open_verbs";
using VerbsModuleEntry = VerbsModule* (*)(const ModuleHost* host, DeviceRegistry* registry, const char** why) noexcept;

}  // namespace rdma
