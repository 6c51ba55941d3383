// The module as programs open it, where there are RDMA devices.
#include <arpa/inet.h>
#include <poll.h>
#include <sys/wait.h>
#include <unistd.h>

#include <boost/test/unit_test.hpp>
#include <cstring>
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

constexpr std::uint64_t kCookie = 4711;

/// Offers a connection between the two addresses, which nobody takes, and returns how that ended.
cm::Reason offer_in_vain(cm::ConnectionManager& cm, const char* local, const char* remote) {
  cm::Anchor anchor;
  anchor.cookie = kCookie;
  for (auto [text, to] : {std::pair{local, &anchor.local}, {remote, &anchor.remote}}) {
    sockaddr_in in{};
    in.sin_family = AF_INET;
    in.sin_port = htons(9);
    BOOST_REQUIRE_EQUAL(inet_pton(AF_INET, text, &in.sin_addr), 1);
    std::memcpy(to, &in, sizeof in);
  }
  cm::Reason reason = cm::Reason::none;
  cm.on_event([&](const cm::Event& event) { reason = event.reason; });
  BOOST_REQUIRE(cm.offer(anchor, 1));
  while (reason == cm::Reason::none) cm.progress();
  return reason;
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

// In a child librdmacm cannot make anew what it gives up when the last identifier on a device goes.
BOOST_AUTO_TEST_CASE(a_child_uses_devices_that_its_parent_has_not_used_for_some_time) {
  DeviceRegistry& registry = *new DeviceRegistry;  // whose devices a child does not destroy
  auto module = open_verbs_module(registry);
  BOOST_REQUIRE(module);
  struct {
    NodeType type;
    const char *near, *far;
  } const ways[] = {{NodeType::ib_ca, "10.77.0.1", "10.77.0.2"}, {NodeType::rnic, "10.77.1.1", "10.77.1.2"}};
  for (const auto& [type, near, far] : ways) BOOST_TEST((offer_in_vain(**(*module)->cm(type), near, far) == cm::Reason::no_peer));
  for (const auto& way : ways) {
    cm::ConnectionManager& cm = **(*module)->cm(way.type);
    for (int timeout; (timeout = cm.next_timeout_ms()) >= 0;) {  // until it has let go of everything that is for a time
      pollfd p{cm.fd(), POLLIN, 0};
      poll(&p, 1, timeout);
      cm.progress();
    }
  }
  const pid_t child = fork();
  if (child == 0) {
    for (const auto& way : ways) (*(*module)->cm(way.type))->abandon_in_child();
    module->release()->abandon_in_child();
    auto own = open_verbs_module(*new DeviceRegistry);
    int bad = own ? 0 : 1;
    for (const auto& [type, near, far] : ways)
      if (own && offer_in_vain(**(*own)->cm(type), near, far) != cm::Reason::no_peer) bad |= 2;
    _exit(bad);
  }
  int status = -1;
  BOOST_REQUIRE_EQUAL(waitpid(child, &status, 0), child);
  BOOST_TEST(status == 0);
}

}  // namespace rdma
