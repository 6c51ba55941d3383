#include "rdma_core/builtin_drivers.hpp"

#include "rdma_core/cm/local_cm.hpp"
#include "rdma_core/drivers/shm/shm_device.hpp"

namespace rdma {

namespace {

class SoftwareDevice final : public Builtin {
 public:
  SoftwareDevice(shm::ShmDevice& device, std::unique_ptr<cm::LocalCm> manager) : device_(device), cm_(std::move(manager)) {}
  Device& device() noexcept override { return device_; }
  cm::ConnectionManager& cm() noexcept override { return *cm_; }
  void abandon_in_child() noexcept override { cm_->abandon_in_child(); }

 private:
  shm::ShmDevice& device_;  ///< the registry's
  std::unique_ptr<cm::LocalCm> cm_;
};

}  // namespace

void prepare_process() noexcept { (void)shm::ShmDevice::register_for_fences(); }

Result<std::unique_ptr<Builtin>> make_software_device(DeviceRegistry& registry, NodeType flavour) {
  shm::ShmOptions options;
  options.flavour = flavour;
  auto device = shm::ShmDevice::create(options);
  if (!device) return Err{device.error()};
  shm::ShmDevice& kept = *device.value();
  auto manager = cm::LocalCm::create(kept);
  if (!manager) return Err{manager.error()};
  registry.add_device(std::move(device.value()));
  return std::unique_ptr<Builtin>(new SoftwareDevice(kept, std::move(manager.value())));
}

}  // namespace rdma
