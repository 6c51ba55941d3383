#include <unistd.h>

#include <cstdio>
#include <cstring>

#include "cli/commands.hpp"
#include "rdma_core/builtin_drivers.hpp"
#include "sdp/options.hpp"

namespace cli {
namespace {

const char* yes_no(bool b) { return b ? "yes" : "no"; }

void print(const rdma::Device& device) {
  const rdma::DeviceAttr& a = device.attr();
  if (a.link_layer == rdma::LinkLayer::memory)
    std::printf("%s (software device: shared memory between processes of this host)\n", device.name());
  else
    std::printf("\n%s\n", device.name());
  std::printf("  node type               %s\n", to_string(a.node_type));
  std::printf("  link layer              %s\n", to_string(a.link_layer));
  std::printf("  send queue              %u requests\n", a.max_send_wr);
  std::printf("  receive queue           %u requests\n", a.max_recv_wr);
  std::printf("  inline data             %u bytes\n", a.max_inline);
  std::printf("  gather elements         %u (send), %u (RDMA Read)\n", a.max_sge, a.max_sge_read);
  std::printf("  outstanding RDMA Reads  %u\n", a.max_read_outstanding);
  std::printf("  RNR retry               %s\n", yes_no(a.rnr_retry));
  std::printf("  RDMA Write wakes        %s\n", yes_no(a.rdma_write_wakes));
  std::printf("  sent data outlives      %s\n", yes_no(a.remembers_sent_data));
  std::printf("  posts arrive at once    %s\n", yes_no(a.posts_arrive_at_once));
}

/// Shows the RDMA devices as they come into the registry.
class Printer final : public rdma::DeviceClient {
 public:
  const char* name() const noexcept override { return "sdp devices"; }
  void device_added(rdma::Device& device) override { print(device); }
  void device_removed(rdma::Device&) noexcept override {}
};

}  // namespace

int devices() {
  sdp::OptionProblems problems;
  const sdp::Options options = sdp::parse_options(::environ, problems);
  auto made = rdma::make_software_device(options.device_flavour);
  if (made)
    print(**made);
  else
    std::printf("software device: cannot be opened here: %s (%s)\n", made.error().what, strerror(made.error().code));
  Printer printer;
  rdma::DeviceRegistry registry;
  registry.register_client(printer);
  if (const auto module = rdma::open_verbs_module(registry, options.secret_file.c_str()); !module)
    std::printf("\nInfiniBand, RoCE and iWARP devices: none: %s.\n", module.error().c_str());
  return made ? 0 : 1;
}

}  // namespace cli
