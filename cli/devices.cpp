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
  std::printf("%s (software device: shared memory between processes of this host)\n", device.name());
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
}

}  // namespace

int devices() {
  sdp::OptionProblems problems;
  const sdp::Options options = sdp::parse_options(::environ, problems);
  rdma::DeviceRegistry registry;
  auto made = rdma::make_software_device(registry, options.device_flavour);
  if (made)
    print(made.value()->device());
  else
    std::printf("software device: cannot be opened here: %s (%s)\n", made.error().what, strerror(made.error().code));
  std::printf("\nInfiniBand, RoCE and iWARP devices: the verbs driver is not built yet, so none is looked for.\n");
  return made ? 0 : 1;
}

}  // namespace cli
