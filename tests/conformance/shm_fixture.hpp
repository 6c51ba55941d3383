// The software device with LocalCm as a Fixture of both suites: two devices in one process, two managers, and TCP connections over
// loopback as anchors.
#pragma once

#include <arpa/inet.h>
#include <netinet/in.h>
#include <poll.h>
#include <sys/socket.h>
#include <unistd.h>

#include <array>
#include <vector>

#include "rdma_core/cm/local_cm.hpp"
#include "rdma_core/drivers/shm/shm_device.hpp"
#include "tests/conformance/ends.hpp"

namespace rdma::conformance {

class ShmProcesses {
 public:
  explicit ShmProcesses(NodeType flavour) {
    shm::ShmOptions options;
    options.flavour = flavour;
    options.reads_program_memory = true;
    options.segment_bytes = std::size_t{16} << 20;
    for (Process& p : processes_) {
      p.device = Ends<ShmProcesses>::must(shm::ShmDevice::create(options));
      p.cm = Ends<ShmProcesses>::must(cm::LocalCm::create(*p.device));
    }
  }
  ~ShmProcesses() {
    for (Process& p : processes_) p.cm.reset();
    for (int fd : fds_) close(fd);
  }
  ShmProcesses(const ShmProcesses&) = delete;
  ShmProcesses& operator=(const ShmProcesses&) = delete;

  cm::ConnectionManager& cm(Side side) { return *at(side).cm; }
  Device& device(Side side) { return *at(side).device; }

  std::array<cm::Anchor, 2> anchors() {
    sockaddr_in address{};
    address.sin_family = AF_INET;
    address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
    socklen_t length = sizeof address;
    const int listener = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
    BOOST_REQUIRE_EQUAL(bind(listener, reinterpret_cast<sockaddr*>(&address), length), 0);
    BOOST_REQUIRE_EQUAL(listen(listener, 1), 0);
    BOOST_REQUIRE_EQUAL(getsockname(listener, reinterpret_cast<sockaddr*>(&address), &length), 0);
    const int client = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
    BOOST_REQUIRE_EQUAL(::connect(client, reinterpret_cast<sockaddr*>(&address), length), 0);
    const int server = accept(listener, nullptr, nullptr);
    BOOST_REQUIRE(server >= 0);
    close(listener);
    fds_.push_back(client);
    fds_.push_back(server);
    return {anchor_of(server), anchor_of(client)};  // who has the accepted socket dials
  }

  bool pump() {
    std::array<pollfd, 2> wanted{};
    for (std::size_t i = 0; i < 2; ++i) {
      wanted[i] = {processes_[i].cm ? processes_[i].cm->fd() : -1, POLLIN, 0};
    }
    poll(wanted.data(), wanted.size(), 0);  // both ends are here: what was sent has arrived
    for (std::size_t i = 0; i < 2; ++i) {
      Process& p = processes_[i];
      if (p.cm && ((wanted[i].revents & POLLIN) != 0 || p.cm->next_timeout_ms() == 0)) p.cm->progress();
    }
    return true;
  }

  /// As a Fixture of devices: one connection by the managers.
  void connect(const MakeQp& make) {
    const auto ends = anchors();
    unsigned established = 0;
    for (Side side : {Side::a, Side::b})
      cm(side).on_event([&, side](const cm::Event& e) {
        switch (e.kind) {
          case cm::EventKind::request:
            BOOST_REQUIRE(cm(side).accept(e.conn, make(side, *e.device, e.path), {}));
            break;
          case cm::EventKind::reply:
            BOOST_REQUIRE(cm(side).establish(e.conn));
            break;
          case cm::EventKind::established:
            ++established;
            break;
          default:
            BOOST_ERROR("no connection: " << cm::to_string(e.reason));
        }
      });
    BOOST_REQUIRE(cm(Side::b).offer(ends[1], 5000));
    BOOST_REQUIRE(cm(Side::a).dial(ends[0], 5000, [&](Device& device, const Path& path, cm::ConnId) {
      return cm::ConnectionManager::Proposal{&make(Side::a, device, path), {}};
    }));
    const SteadyClock clock;
    const Nanos deadline = clock.now() + kPatience;
    while (established < 2 && clock.now() < deadline) pump();
    BOOST_REQUIRE_EQUAL(established, 2u);
    for (Side side : {Side::a, Side::b}) cm(side).on_event([](const cm::Event&) {});
  }

  /// Everything of a process goes, as the kernel would close it.
  void kill(Side side) {
    at(side).cm.reset();
    at(side).device.reset();
  }
  void finish() {}

 private:
  struct Process {
    std::unique_ptr<shm::ShmDevice> device;
    std::unique_ptr<cm::LocalCm> cm;
  };
  Process& at(Side side) { return processes_[static_cast<std::size_t>(side)]; }

  static cm::Anchor anchor_of(int fd) {
    cm::Anchor anchor;
    anchor.fd = fd;
    socklen_t length = sizeof anchor.cookie;
    BOOST_REQUIRE_EQUAL(getsockopt(fd, SOL_SOCKET, SO_COOKIE, &anchor.cookie, &length), 0);
    length = sizeof anchor.local;
    BOOST_REQUIRE_EQUAL(getsockname(fd, reinterpret_cast<sockaddr*>(&anchor.local), &length), 0);
    length = sizeof anchor.remote;
    BOOST_REQUIRE_EQUAL(getpeername(fd, reinterpret_cast<sockaddr*>(&anchor.remote), &length), 0);
    return anchor;
  }

  std::array<Process, 2> processes_;
  std::vector<int> fds_;
};

struct ShmIb : ShmProcesses {
  ShmIb() : ShmProcesses(NodeType::ib_ca) {}
};
struct ShmRnic : ShmProcesses {
  ShmRnic() : ShmProcesses(NodeType::rnic) {}
};

}  // namespace rdma::conformance
