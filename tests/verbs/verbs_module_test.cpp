// The module as programs open it, where there are RDMA devices.
#include <boost/test/unit_test.hpp>
#include <fstream>
#include <map>

#include "rdma_core/verbs_module.hpp"

namespace rdma {
namespace {

class Listing final : public DeviceClient {
 public:
  const char* name() const noexcept override { return "listing"; }
  void device_added(Device& device) override { types[device.name()] = device.attr().node_type; }
  void device_removed(Device& device) noexcept override { types.erase(device.name()); }
  std::map<std::string, NodeType> types;
};

bool is_loaded(const char* library) {
  std::ifstream maps("/proc/self/maps");
  for (std::string line; std::getline(maps, line);)
    if (line.find(library) != std::string::npos) return true;
  return false;
}

}  // namespace

BOOST_AUTO_TEST_CASE(it_is_loaded_when_it_is_opened_and_enters_the_devices_into_the_registry) {
  BOOST_TEST(!is_loaded("libsdpverbs.so"));
  BOOST_TEST(!is_loaded("libibverbs.so"));
  Listing listing;
  DeviceRegistry registry;
  registry.register_client(listing);
  auto module = open_verbs_module(registry);
  BOOST_REQUIRE_MESSAGE(module.ok(), (module ? "" : module.error()));
  BOOST_TEST(is_loaded("libibverbs.so"));
  BOOST_TEST((listing.types.at("rxe0") == NodeType::ib_ca));
  BOOST_TEST((listing.types.at("siw0") == NodeType::rnic));
  for (const NodeType type : {NodeType::ib_ca, NodeType::rnic}) {
    auto cm = (*module)->cm(type);
    BOOST_REQUIRE(cm);
    BOOST_TEST(*(*module)->cm(type) == *cm);
  }
  BOOST_TEST((*module)->cm(NodeType::ib_switch).error() == "no InfiniBand or RoCE device");
}

// As a fork's child does: the first one is the parent's and is left as it is.
BOOST_AUTO_TEST_CASE(it_can_be_opened_anew_after_it_was_abandoned) {
  auto& parents_registry = *new DeviceRegistry;
  auto parents = open_verbs_module(parents_registry);
  BOOST_REQUIRE(parents);
  parents->release()->abandon_in_child();
  Listing listing;
  DeviceRegistry registry;
  registry.register_client(listing);
  auto module = open_verbs_module(registry);
  BOOST_REQUIRE(module);
  BOOST_TEST(listing.types.size() == parents_registry.device_count());
}

}  // namespace rdma
