// Whether RDMA devices come or go on this host, by the kernel's uevents, which any process may hear; those of its device manager
// too, which come when the permissions are set. The events say that it is time for a look, and nothing else is believed of them.
//
// A device whose driver cannot take it away from its users (Soft-RoCE, Soft-iWARP) goes when the last of them has closed it. Of the
// kernel's two ways to ask for that, RDMA CM tells only who has an identifier on the device, and nobody where its module was loaded
// before ib_uverbs or is built in. A uevent always comes.
#pragma once

namespace rdma {

class DeviceWatch {
 public:
  DeviceWatch() noexcept;
  ~DeviceWatch();
  DeviceWatch(const DeviceWatch&) = delete;
  DeviceWatch& operator=(const DeviceWatch&) = delete;

  /// Non-blocking; readable when changed() has something to look at. -1: none; in a user namespace of one's own nothing comes.
  int fd() const noexcept { return fd_; }
  /// Since the last call a device may have come, or be about to go.
  bool changed() noexcept;
  void abandon_in_child() noexcept;

 private:
  int fd_;
};

}  // namespace rdma
