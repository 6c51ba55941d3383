// The devices and connection managers of a process, composed: with builtin_drivers.cpp the only files that name concrete ones.
#pragma once

#include <functional>
#include <memory>
#include <span>
#include <string>
#include <vector>

#include "rdma_core/cm/connection_manager.hpp"
#include "rdma_core/device_registry.hpp"
#include "rdma_core/verbs_module.hpp"

namespace rdma {

/// A way for lanes: the software device, InfiniBand and RoCE, iWARP.
enum class Carrier : std::uint8_t { local, ib, rnic };

/// What there is. The software device is always made, and is the registry's first: its completion channel is the process's bell.
/// RDMA devices are looked for when a connection gets as far as them, and come and go from then on in progress() of the CM. Destroy
/// it before the registry.
class Builtin {
 public:
  virtual ~Builtin() = default;
  virtual cm::ConnectionManager& cm() noexcept = 0;
  /// Asked before RDMA devices and their CMs are opened: those serve only who has the credentials of that moment.
  virtual void ask_before_opening(std::function<bool()> may_open) = 0;
  /// Lets the RDMA devices go: what is up on them stays, the next connection has them opened anew. Returns which they are.
  virtual std::vector<const Device*> retire_devices() = 0;
  /// Takes those out of the registry of which none is used.
  virtual void remove_retired(const std::function<bool(const Device&)>& is_used) = 0;
  /// In the child of a fork, first thing and with one thread: forgets what is the parent's; post_send on inherited QPs of the
  /// software device goes on working.
  virtual void abandon_in_child() noexcept = 0;
};

/// What is cheap only while the process has one thread; once, early, before a device is made. A device works without it, but takes
/// its time to be made.
void prepare_process() noexcept;

/// `order`: the carriers that connections may use, the preferred first; not empty. `flavour`: what the software device plays, ib_ca
/// or rnic. `secret_file`: as open_verbs_module() has it. `reads_program_memory`: its RDMA Reads are to reach program memory.
/// Errors: EMFILE, ENOMEM, ENOSYS: this process can have no lanes.
Result<std::unique_ptr<Builtin>> compose_builtin(DeviceRegistry& registry, std::span<const Carrier> order, NodeType flavour,
                                                 std::string secret_file, bool reads_program_memory);

/// The software device alone, to look at. Errors as above.
Result<std::unique_ptr<Device>> make_software_device(NodeType flavour);

}  // namespace rdma
