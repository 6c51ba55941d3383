#include "rdma_core/device_registry.hpp"

#include <errno.h>

#include <algorithm>
#include <boost/test/unit_test.hpp>
#include <string>
#include <thread>
#include <utility>
#include <vector>

namespace rdma {
namespace {

using Diary = std::vector<std::string>;

class FakeDevice final : public Device {
 public:
  FakeDevice(Diary& diary, const char* name, NodeType type) : diary_(diary), name_(name) { attr_.node_type = type; }
  ~FakeDevice() override { diary_.push_back(std::string(name_) + " gone"); }
  const char* name() const noexcept override { return name_; }
  const DeviceAttr& attr() const noexcept override { return attr_; }
  Result<std::unique_ptr<Pd>> create_pd(const Path&) override { return fail(ENOTSUP, "fake"); }
  Result<std::unique_ptr<CompletionChannel>> create_channel() override { return fail(ENOTSUP, "fake"); }
  Result<std::unique_ptr<Cq>> create_cq(std::uint32_t, CompletionChannel*) override { return fail(ENOTSUP, "fake"); }
  void arm_fence() noexcept override {}
  void on_async_event(std::function<void(AsyncEvent)>) override {}

 private:
  Diary& diary_;
  const char* name_;
  DeviceAttr attr_;
};

/// Writes down what it is told and keeps the devices that it cares for.
class FakeClient final : public DeviceClient {
 public:
  using Cares = bool (*)(NodeType);
  FakeClient(Diary& diary, const char* name, Cares cares) : diary_(diary), name_(name), cares_(cares) {}
  const char* name() const noexcept override { return name_; }
  void device_added(Device& device) override {
    if (!cares_(device.attr().node_type)) {
      diary_.push_back(std::string(name_) + " passes over " + device.name());
      return;
    }
    diary_.push_back(std::string(name_) + " takes " + device.name());
    devices.push_back(&device);
  }
  void device_removed(Device& device) noexcept override {
    const auto found = std::find(devices.begin(), devices.end(), &device);
    if (found == devices.end()) return;
    diary_.push_back(std::string(name_) + " lets go of " + device.name());
    devices.erase(found);
  }
  std::vector<Device*> devices;

 private:
  Diary& diary_;
  const char* name_;
  Cares cares_;
};

bool any(NodeType) { return true; }
bool rnic_only(NodeType type) { return type == NodeType::rnic; }
bool no_rnic(NodeType type) { return type != NodeType::rnic; }

struct Fixture {
  Diary diary;
  FakeClient ipoib{diary, "ipoib", no_rnic};
  FakeClient rnic_cm{diary, "rnic_cm", rnic_only};
  FakeClient sdp{diary, "sdp", any};
  FakeClient iser{diary, "iser", any};
  DeviceRegistry registry;

  Device& add(const char* name, NodeType type) {
    auto device = std::make_unique<FakeDevice>(diary, name, type);
    Device& added = *device;
    registry.add_device(std::move(device));
    return added;
  }
  Diary take() { return std::exchange(diary, {}); }
};

void check(const Diary& got, const Diary& want) { BOOST_CHECK_EQUAL_COLLECTIONS(got.begin(), got.end(), want.begin(), want.end()); }

}  // namespace

BOOST_FIXTURE_TEST_CASE(clients_decide_by_node_type_in_the_order_of_registration, Fixture) {
  for (DeviceClient* client : {static_cast<DeviceClient*>(&ipoib), static_cast<DeviceClient*>(&rnic_cm),
                               static_cast<DeviceClient*>(&sdp), static_cast<DeviceClient*>(&iser)})
    registry.register_client(*client);
  check(take(), {});
  add("hca", NodeType::ib_ca);
  check(take(), {"ipoib takes hca", "rnic_cm passes over hca", "sdp takes hca", "iser takes hca"});
  add("nic", NodeType::rnic);
  check(take(), {"ipoib passes over nic", "rnic_cm takes nic", "sdp takes nic", "iser takes nic"});
  BOOST_TEST(registry.device_count() == 2u);
}

BOOST_FIXTURE_TEST_CASE(a_late_client_is_told_of_every_device_present, Fixture) {
  add("hca", NodeType::ib_ca);
  add("nic", NodeType::rnic);
  add("switch", NodeType::ib_switch);
  registry.register_client(sdp);
  check(take(), {"sdp takes hca", "sdp takes nic", "sdp takes switch"});
  registry.register_client(ipoib);
  check(take(), {"ipoib takes hca", "ipoib passes over nic", "ipoib takes switch"});
}

BOOST_FIXTURE_TEST_CASE(a_device_goes_in_the_reverse_order_and_dies_last, Fixture) {
  registry.register_client(ipoib);
  registry.register_client(sdp);
  registry.register_client(iser);
  Device& hca = add("hca", NodeType::ib_ca);
  Device& nic = add("nic", NodeType::rnic);
  take();
  BOOST_TEST(registry.remove_device(hca));
  check(take(), {"iser lets go of hca", "sdp lets go of hca", "ipoib lets go of hca", "hca gone"});
  BOOST_TEST(registry.device_count() == 1u);
  BOOST_TEST((sdp.devices == std::vector<Device*>{&nic}));
  // The other stays as it is, and a new one may come.
  add("hca2", NodeType::ib_ca);
  check(take(), {"ipoib takes hca2", "sdp takes hca2", "iser takes hca2"});
  BOOST_TEST(registry.remove_device(nic));
  check(take(), {"iser lets go of nic", "sdp lets go of nic", "nic gone"});
}

BOOST_FIXTURE_TEST_CASE(an_unknown_device_is_not_removed, Fixture) {
  registry.register_client(sdp);
  FakeDevice stranger(diary, "stranger", NodeType::ib_ca);
  BOOST_TEST(!registry.remove_device(stranger));
  check(take(), {});
}

BOOST_FIXTURE_TEST_CASE(a_client_that_leaves_is_told_of_removals_and_then_nothing_more, Fixture) {
  add("hca", NodeType::ib_ca);
  add("nic", NodeType::rnic);
  registry.register_client(sdp);
  registry.register_client(iser);
  take();
  registry.unregister_client(sdp);
  check(take(), {"sdp lets go of nic", "sdp lets go of hca"});
  registry.unregister_client(sdp);
  add("late", NodeType::ib_ca);
  check(take(), {"iser takes late"});
  registry.register_client(sdp);  // and it may come back, as the last
  check(take(), {"sdp takes hca", "sdp takes nic", "sdp takes late"});
}

BOOST_AUTO_TEST_CASE(a_registry_that_goes_removes_every_device_the_newest_first) {
  Diary diary;
  FakeClient sdp(diary, "sdp", any);
  FakeClient iser(diary, "iser", any);
  {
    DeviceRegistry registry;
    registry.register_client(sdp);
    registry.register_client(iser);
    registry.add_device(std::make_unique<FakeDevice>(diary, "hca", NodeType::ib_ca));
    registry.add_device(std::make_unique<FakeDevice>(diary, "nic", NodeType::rnic));
    diary.clear();
  }
  check(diary, {"iser lets go of nic", "sdp lets go of nic", "nic gone", "iser lets go of hca", "sdp lets go of hca", "hca gone"});
}

BOOST_AUTO_TEST_CASE(devices_come_and_go_while_clients_do) {
  Diary unused;
  Diary unused2;
  DeviceRegistry registry;
  FakeClient sdp(unused2, "sdp", any);
  std::thread plugger([&] {
    for (int i = 0; i < 2000; ++i) {
      auto device = std::make_unique<FakeDevice>(unused, "hca", NodeType::ib_ca);
      const Device& added = *device;
      registry.add_device(std::move(device));
      registry.remove_device(added);
    }
  });
  for (int i = 0; i < 2000; ++i) {
    registry.register_client(sdp);
    registry.unregister_client(sdp);
    BOOST_REQUIRE(sdp.devices.empty());
  }
  plugger.join();
  BOOST_TEST(registry.device_count() == 0u);
}

}  // namespace rdma
