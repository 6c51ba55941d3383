// A process with two devices: lanes on the one that is not the primary, and its removal under them.
#include <arpa/inet.h>
#include <netinet/in.h>
#include <sys/socket.h>
#include <unistd.h>

#include <array>
#include <atomic>
#include <boost/test/unit_test.hpp>
#include <cstdlib>
#include <thread>

#include "rdma_core/base/clock.hpp"
#include "rdma_core/cm/local_cm.hpp"
#include "rdma_core/drivers/shm/shm_device.hpp"
#include "sdp/engine.hpp"
#include "sdp/stream_impl.hpp"

namespace sdp {
namespace {

using rdma::cm::ConnectionManager;

std::atomic<bool> remove_now{false}, removing{false}, may_remove{false}, removed{false};
const rdma::Device* second_device = nullptr;

/// LocalCm on the second device, which goes in the service thread when the test says so, as a driver's would.
class SecondDevice final : public engine::Composition {
 public:
  static std::unique_ptr<engine::Composition> make(const Options&) {
    auto mine = std::make_unique<SecondDevice>();
    for (rdma::Device** which : {&mine->primary_, &mine->second_}) {
      auto device = rdma::shm::ShmDevice::create({rdma::NodeType::ib_ca, std::size_t{64} << 20});
      if (!device) return nullptr;
      *which = device->get();
      if (which == &mine->second_) {
        auto cm = rdma::cm::LocalCm::create(**device);
        if (!cm) return nullptr;
        mine->cm_.local = std::move(*cm);
      }
      mine->registry_.add_device(std::move(*device));
    }
    second_device = mine->second_;
    mine->cm_.remove = [m = mine.get()] { BOOST_TEST(m->registry_.remove_device(*m->second_)); };
    return mine;
  }
  rdma::DeviceRegistry& registry() noexcept override { return registry_; }
  ConnectionManager& cm() noexcept override { return cm_; }
  void abandon_in_child() noexcept override {}

 private:
  struct Cm final : ConnectionManager {
    const char* name() const noexcept override { return "second"; }
    const rdma::cm::Caps& caps() const noexcept override { return local->caps(); }
    void on_event(std::function<void(const rdma::cm::Event&)> h) override { local->on_event(std::move(h)); }
    // Both may open another transport's devices, for which they need the registry: not while it tells of a removal.
    rdma::Result<rdma::Unit> offer(const rdma::cm::Anchor& a, unsigned ms) override {
      BOOST_TEST(!removing);
      return local->offer(a, ms);
    }
    void withdraw(std::uint64_t cookie) noexcept override { local->withdraw(cookie); }
    rdma::Result<rdma::Unit> dial(const rdma::cm::Anchor& a, unsigned ms, MakeQp make) override {
      BOOST_TEST(!removing);
      return local->dial(a, ms, std::move(make));
    }
    rdma::Result<rdma::Unit> accept(rdma::cm::ConnId c, rdma::Qp& qp, std::span<const std::byte> d) override {
      return local->accept(c, qp, d);
    }
    void reject(rdma::cm::ConnId c, rdma::cm::Reason r, std::span<const std::byte> d) noexcept override { local->reject(c, r, d); }
    rdma::Result<rdma::Unit> establish(rdma::cm::ConnId c) override { return local->establish(c); }
    void disconnect(rdma::cm::ConnId c) noexcept override { local->disconnect(c); }
    int fd() const noexcept override { return local->fd(); }
    int next_timeout_ms() const noexcept override { return removed ? -1 : local->next_timeout_ms(); }
    void progress() override {
      if (remove_now && !removed) {
        removing = true;
        while (!may_remove) std::this_thread::yield();
        remove();
        removed = true;
        removing = false;
      }
      if (!removed) local->progress();
    }
    std::unique_ptr<rdma::cm::LocalCm> local;
    std::function<void()> remove;
  };
  rdma::DeviceRegistry registry_;
  rdma::Device* primary_ = nullptr;
  rdma::Device* second_ = nullptr;
  Cm cm_;
};

struct End {
  int fd = -1;
  Stream stream;
  StreamImpl& impl() const { return *reinterpret_cast<StreamImpl*>(stream.word() & 0xffffffffffffULL); }
  std::uint64_t lane_bytes() const { return impl().stats->lane.bytes_received.get(); }
};

std::array<End, 2> connected() {
  sockaddr_in address{};
  address.sin_family = AF_INET;
  address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
  socklen_t length = sizeof address;
  const int listener = socket(AF_INET, SOCK_STREAM, 0);
  BOOST_REQUIRE_EQUAL(bind(listener, reinterpret_cast<sockaddr*>(&address), length), 0);
  BOOST_REQUIRE_EQUAL(listen(listener, 1), 0);
  BOOST_REQUIRE_EQUAL(getsockname(listener, reinterpret_cast<sockaddr*>(&address), &length), 0);
  const int client = socket(AF_INET, SOCK_STREAM, 0);
  BOOST_REQUIRE_EQUAL(connect(client, reinterpret_cast<sockaddr*>(&address), length), 0);
  const int server = accept(listener, nullptr, nullptr);
  BOOST_REQUIRE(server >= 0);
  close(listener);
  return {End{client, engine::track(client, Role::connector)}, End{server, engine::track(server, Role::acceptor)}};
}

template <class Done>
bool wait_until(Done done) {
  const rdma::SteadyClock clock;
  const rdma::Nanos deadline = clock.now() + 20'000'000'000;
  while (!done()) {
    if (clock.now() > deadline) return false;
    engine::nudge();
    std::this_thread::yield();
  }
  return true;
}

/// One message each way.
void talk(const std::array<End, 2>& ends) {
  for (const unsigned from : {0U, 1U}) {
    char out[100] = {}, in[100];
    const End &sender = ends[from], &receiver = ends[1 - from];
    BOOST_REQUIRE_EQUAL(sender.stream.send(sender.fd, out, sizeof out, 0), 100);
    BOOST_REQUIRE_EQUAL(receiver.stream.recv(receiver.fd, in, sizeof in, MSG_WAITALL), 100);
  }
}

}  // namespace

BOOST_AUTO_TEST_CASE(lanes_run_on_a_second_device_until_it_goes_and_then_their_connections_fail) {
  setenv("SDP_UPGRADE_MESSAGES", "2", 1);
  engine::configure(&SecondDevice::make, nullptr);
  const auto ends = connected();
  // One that sleeps on its lane while the device goes, beside two that nobody waits on.
  const auto sleepers = connected();
  for (const auto* pair : {&ends, &sleepers})
    BOOST_REQUIRE(wait_until([&] {
      talk(*pair);
      return (*pair)[0].lane_bytes() > 1000 && (*pair)[1].lane_bytes() > 1000;
    }));
  for (const End& end : ends) BOOST_TEST(end.impl().lane->device() == second_device);

  std::int64_t woken = 0;
  std::thread sleeper([&] {
    char byte;
    woken = sleepers[0].stream.recv(sleepers[0].fd, &byte, 1, 0);
  });
  BOOST_REQUIRE(wait_until([&] { return sleepers[0].impl().waiters.load() != 0; }));
  // The service thread has no time for this one's wish for a lane before the device goes.
  const auto late = connected();
  remove_now = true;
  BOOST_REQUIRE(wait_until([] { return removing.load(); }));
  for (int i = 0; i < 4; ++i) talk(late);
  may_remove = true;
  BOOST_REQUIRE(wait_until([] { return removed.load(); }));
  sleeper.join();
  BOOST_TEST(woken < 0);
  for (const auto* pair : {&ends, &sleepers})
    for (const End& end : *pair) {
      char byte;
      BOOST_TEST(end.stream.recv(end.fd, &byte, 1, MSG_DONTWAIT) < 0);
      BOOST_TEST(end.stream.send(end.fd, "x", 1, MSG_NOSIGNAL) < 0);
      BOOST_TEST(wait_until([&] { return !end.stream.has_lane(); }));
      BOOST_TEST((end.impl().stats->reason.load() == LaneReason::device_lost));
      end.stream.close(end.fd);
      close(end.fd);
    }
  talk(late);
  for (const End& end : late) {
    end.stream.close(end.fd);
    close(end.fd);
  }
}

}  // namespace sdp
