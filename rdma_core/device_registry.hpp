// Devices and their clients. A user of the midlayer registers a client and is told of every device, decides by node type whether
// it cares, and is told when one goes. Devices come and go at run time.
#pragma once

#include <memory>
#include <mutex>
#include <vector>

#include "rdma_core/device.hpp"

namespace rdma {

/// Clients are told of a device in registration order and of its removal in the reverse order; one that joins late is first told of
/// every device present. Callbacks are serialised by the registry and must not call it back.
class DeviceClient {
 public:
  virtual ~DeviceClient() = default;
  virtual const char* name() const noexcept = 0;
  virtual void device_added(Device&) = 0;
  virtual void device_removed(Device&) noexcept = 0;  ///< must release everything it made on that device before it returns
};

/// Threads: every call takes the registry's lock; any thread may call.
class DeviceRegistry {
 public:
  DeviceRegistry() = default;
  ~DeviceRegistry();  ///< removes every device, then forgets the clients
  DeviceRegistry(const DeviceRegistry&) = delete;
  DeviceRegistry& operator=(const DeviceRegistry&) = delete;

  void add_device(std::unique_ptr<Device>);
  /// Tells the clients in reverse order, then destroys the device. Unknown: nothing happens, false.
  bool remove_device(const Device&) noexcept;

  void register_client(DeviceClient&);             ///< the client must outlive the registry or unregister
  void unregister_client(DeviceClient&) noexcept;  ///< it is first told of the removal of every device

  std::size_t device_count() const;

 private:
  void tell_removed(Device&) noexcept;

  mutable std::mutex mutex_;
  std::vector<std::unique_ptr<Device>> devices_;
  std::vector<DeviceClient*> clients_;
};

}  // namespace rdma
