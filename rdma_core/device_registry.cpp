#include "rdma_core/device_registry.hpp"

#include <algorithm>
#include <cassert>

namespace rdma {

DeviceRegistry::~DeviceRegistry() {
  const std::lock_guard lock(mutex_);
  while (!devices_.empty()) {
    tell_removed(*devices_.back());
    devices_.pop_back();
  }
  clients_.clear();
}

void DeviceRegistry::add_device(std::unique_ptr<Device> device) {
  assert(device);
  const std::lock_guard lock(mutex_);
  Device& added = *device;
  devices_.push_back(std::move(device));
  for (DeviceClient* client : clients_) client->device_added(added);
}

// Reverse iterators, not std::views::reverse: clang 14 rejects the views of libstdc++ 12.
void DeviceRegistry::tell_removed(Device& device) noexcept {
  std::for_each(clients_.rbegin(), clients_.rend(), [&](DeviceClient* client) { client->device_removed(device); });
}

bool DeviceRegistry::remove_device(const Device& device) noexcept {
  const std::lock_guard lock(mutex_);
  const auto found = std::ranges::find(devices_, &device, &std::unique_ptr<Device>::get);
  if (found == devices_.end()) return false;
  tell_removed(**found);
  devices_.erase(found);
  return true;
}

void DeviceRegistry::register_client(DeviceClient& client) {
  const std::lock_guard lock(mutex_);
  assert(std::ranges::find(clients_, &client) == clients_.end() && "registered twice");
  clients_.push_back(&client);
  for (const auto& device : devices_) client.device_added(*device);
}

void DeviceRegistry::unregister_client(DeviceClient& client) noexcept {
  const std::lock_guard lock(mutex_);
  const auto found = std::ranges::find(clients_, &client);
  if (found == clients_.end()) return;
  std::for_each(devices_.rbegin(), devices_.rend(), [&](const auto& device) { client.device_removed(*device); });
  clients_.erase(found);
}

std::size_t DeviceRegistry::device_count() const {
  const std::lock_guard lock(mutex_);
  return devices_.size();
}

}  // namespace rdma
