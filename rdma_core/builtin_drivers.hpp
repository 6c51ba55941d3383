// The devices and connection managers that are built in: with builtin_drivers.cpp the only files that name concrete ones.
#pragma once

#include <memory>

#include "rdma_core/cm/connection_manager.hpp"
#include "rdma_core/device_registry.hpp"

namespace rdma {

/// A device and the CM that makes connections on it. Destroy it before the registry that holds the device.
class Builtin {
 public:
  virtual ~Builtin() = default;
  virtual Device& device() noexcept = 0;
  virtual cm::ConnectionManager& cm() noexcept = 0;
  /// In the child of a fork, first thing and with one thread: forgets what is the parent's; post_send on inherited QPs goes on
  /// working.
  virtual void abandon_in_child() noexcept = 0;
};

/// What is cheap only while the process has one thread; once, early, before a device is made. A device works without it, but takes
/// its time to be made.
void prepare_process() noexcept;

/// Makes the software device, enters it into `registry`, and makes its CM. `flavour`: ib_ca or rnic.
/// Errors: EMFILE, ENOMEM, ENOSYS: this process can have no local lanes.
Result<std::unique_ptr<Builtin>> make_software_device(DeviceRegistry& registry, NodeType flavour = NodeType::ib_ca);

}  // namespace rdma
