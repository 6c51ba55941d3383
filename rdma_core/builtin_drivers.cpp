#include "rdma_core/builtin_drivers.hpp"

#include <algorithm>
#include <optional>
#include <utility>

#include "rdma_core/cm/cm_chain.hpp"
#include "rdma_core/cm/local_cm.hpp"
#include "rdma_core/device_watch.hpp"
#include "rdma_core/drivers/shm/shm_device.hpp"

namespace rdma {

namespace {

Result<std::unique_ptr<shm::ShmDevice>> make_shm(NodeType flavour, bool reads_program_memory) {
  shm::ShmOptions options;
  options.flavour = flavour;
  options.reads_program_memory = reads_program_memory;
  return shm::ShmDevice::create(options);
}

class Composed final : public Builtin {
 public:
  static Result<std::unique_ptr<Builtin>> make(DeviceRegistry& registry, std::span<const Carrier> order, NodeType flavour,
                                               std::string secret_file, bool reads_program_memory) {
    auto device = make_shm(flavour, reads_program_memory);
    if (!device) return Err{device.error()};
    auto local = cm::LocalCm::create(**device);
    if (!local) return Err{local.error()};
    std::unique_ptr<Composed> mine(new Composed(registry, std::move(secret_file)));
    mine->local_ = std::move(*local);
    registry.add_device(std::move(*device));
    std::vector<cm::CmChain::Transport> transports;
    for (const Carrier each : order) transports.push_back(mine->transport(each));
    const bool alone = mine->has_local_ && transports.size() == 1;
    auto chain = cm::CmChain::create(std::move(transports), mine->clock_);
    if (!chain) return Err{chain.error()};
    mine->chain_ = std::move(*chain);
    if (!alone) mine->watch_devices();
    return std::unique_ptr<Builtin>(std::move(mine));
  }
  cm::ConnectionManager& cm() noexcept override { return *chain_; }
  void ask_before_opening(std::function<bool()> may_open) override {
    chain_->ask_before_opening([ask = std::move(may_open)] { return !has_rdma_devices() || ask(); });
  }
  std::vector<const Device*> retire_devices() override {
    if (module_ == nullptr) return {};
    chain_->forget_opened();
    module_->retire();
    retired_.push_back(std::move(module_));
    return retired_.back()->devices();
  }
  void remove_retired(const std::function<bool(const Device&)>& is_used) override {
    std::erase_if(retired_, [&](std::unique_ptr<VerbsModule>& module) {
      const std::vector<const Device*> devices = module->devices();
      if (std::ranges::any_of(devices, [&](const Device* each) { return is_used(*each); })) return false;
      module = nullptr;
      for (const Device* each : devices) registry_.remove_device(*each);
      return true;
    });
  }
  void abandon_in_child() noexcept override {
    chain_->abandon_in_child();
    if (!has_local_) local_->abandon_in_child();  // the device's links, which the chain does not know
    if (module_ != nullptr) module_->abandon_in_child();
    for (const auto& each : retired_) each->abandon_in_child();
    if (watch_) watch_->abandon_in_child();
  }

 private:
  Composed(DeviceRegistry& registry, std::string secret_file) : registry_(registry), secret_file_(std::move(secret_file)) {}
  cm::CmChain::Transport transport(Carrier carrier) {
    switch (carrier) {
      case Carrier::ib:
        return {"ib", [this] { return verbs(NodeType::ib_ca); }};
      case Carrier::rnic:
        return {"rnic", [this] { return verbs(NodeType::rnic); }};
      case Carrier::local:
        break;
    }
    has_local_ = true;
    return {"local", {}, local_.get()};
  }
  Told<cm::ConnectionManager*> verbs(NodeType type) {
    if (module_ == nullptr) {
      auto opened = open_verbs_module(registry_, secret_file_);
      if (!opened) return Err{opened.error()};
      module_ = std::move(*opened);
      chain_->watch(module_->fd());
    }
    return module_->cm(type);
  }
  void watch_devices() {
    watch_.emplace();
    if (watch_->fd() >= 0) chain_->watch(watch_->fd());
    chain_->accompany([this] {
      const bool changed = watch_->changed();
      if (module_ != nullptr) module_->progress(changed);
      if (changed) chain_->try_again();
    });
  }

  DeviceRegistry& registry_;
  const std::string secret_file_;
  SteadyClock clock_;
  std::unique_ptr<cm::LocalCm> local_;
  bool has_local_ = false;
  std::optional<DeviceWatch> watch_;
  std::unique_ptr<VerbsModule> module_;
  std::vector<std::unique_ptr<VerbsModule>> retired_;
  std::unique_ptr<cm::CmChain> chain_;
};

}  // namespace

void prepare_process() noexcept { (void)shm::ShmDevice::register_for_fences(); }

Result<std::unique_ptr<Builtin>> compose_builtin(DeviceRegistry& registry, std::span<const Carrier> order, NodeType flavour,
                                                 std::string secret_file, bool reads_program_memory) {
  return Composed::make(registry, order, flavour, std::move(secret_file), reads_program_memory);
}

Result<std::unique_ptr<Device>> make_software_device(NodeType flavour) {
  auto device = make_shm(flavour, false);
  if (!device) return Err{device.error()};
  return std::unique_ptr<Device>(std::move(*device));
}

}  // namespace rdma
