// IbCm and RnicCm as Fixtures of the CM suite: two managers, each with a device of its own, as two hosts would have them.
#pragma once

#include <poll.h>

#include <map>

#include "rdma_core/cm/rdma_cm.hpp"
#include "tests/verbs/verbs_fixture.hpp"

namespace rdma::conformance {

class RdmaCmPair : public VerbsPair {
 public:
  using Secrets = std::array<cm::Secret, 2>;  ///< by side
  RdmaCmPair(std::array<Port, 2> ports, bool rnic, const Secrets& secrets = {}) : VerbsPair(std::move(ports)) {
    for (const Side side : kSides) {
      auto find = [this, side](const char* name) -> Device* { return name == std::string(at(side).name()) ? &at(side) : nullptr; };
      auto made = rnic ? cm::make_rnic_cm(find, secrets[index(side)]) : cm::make_ib_cm(find, secrets[index(side)]);
      BOOST_REQUIRE_MESSAGE(made.ok(), (made ? "" : made.error().what));
      cms_[index(side)] = std::move(*made);
      cms_[index(side)]->on_transcript([this](std::uint64_t cookie) { return transcripts[cookie]; });
    }
  }
  ~RdmaCmPair() {
    for (const int fd : fds_) close(fd);
  }
  cm::ConnectionManager& cm(Side side) { return *cms_[index(side)]; }

  /// A TCP connection on the way that the devices share: side b has made it, side a has accepted.
  std::array<cm::Anchor, 2> anchors() {
    const cm::IpAddress here = port(Side::a).ip(), from = port(Side::b).ip();
    const int listener = socket(here.family, SOCK_STREAM | SOCK_CLOEXEC, 0);
    sockaddr_storage server = here.to_sockaddr(), client = from.to_sockaddr();
    socklen_t length = sizeof server;
    BOOST_REQUIRE_EQUAL(bind(listener, reinterpret_cast<sockaddr*>(&server), here.sockaddr_size()), 0);
    BOOST_REQUIRE_EQUAL(listen(listener, 1), 0);
    BOOST_REQUIRE_EQUAL(getsockname(listener, reinterpret_cast<sockaddr*>(&server), &length), 0);
    // A link-local address is the other's on the way out by one's own device.
    const cm::IpAddress at = cm::IpAddress::from(server);
    sockaddr_storage there = at.scope == 0 ? server : with_scope(at, from.scope);
    const int connected = socket(here.family, SOCK_STREAM | SOCK_CLOEXEC, 0);
    BOOST_REQUIRE_EQUAL(bind(connected, reinterpret_cast<sockaddr*>(&client), from.sockaddr_size()), 0);
    BOOST_REQUIRE_EQUAL(connect(connected, reinterpret_cast<sockaddr*>(&there), length), 0);
    const int accepted = accept4(listener, nullptr, nullptr, SOCK_CLOEXEC);
    close(listener);
    const std::array<cm::Anchor, 2> ends{anchor_of(accepted), anchor_of(connected)};
    transcripts[ends[0].cookie].sent = transcripts[ends[1].cookie].received = some(300, ends[0].cookie);
    transcripts[ends[1].cookie].sent = transcripts[ends[0].cookie].received = some(40, ends[1].cookie);
    return ends;
  }
  std::map<std::uint64_t, cm::Transcript> transcripts;  ///< by cookie
  bool pump() {
    for (auto& cm : cms_) {
      pollfd p{cm->fd(), POLLIN, 0};
      const int timeout = cm->next_timeout_ms();
      if (poll(&p, 1, 0) == 1 || timeout == 0) cm->progress();
    }
    return VerbsPair::pump();
  }

 private:
  static std::size_t index(Side side) { return side == Side::a ? 0 : 1; }
  static sockaddr_storage with_scope(cm::IpAddress address, std::uint32_t scope) {
    address.scope = scope;
    return address.to_sockaddr();
  }
  static std::vector<std::byte> some(std::size_t count, std::uint64_t seed) {
    std::vector<std::byte> bytes(count);
    for (std::size_t i = 0; i < count; ++i) bytes[i] = static_cast<std::byte>(i * 7 + seed * 31);
    return bytes;
  }
  cm::Anchor anchor_of(int fd) {
    fds_.push_back(fd);
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

  std::array<std::unique_ptr<cm::ConnectionManager>, 2> cms_;
  std::vector<int> fds_;
};

class IbCmPair : public RdmaCmPair {
 public:
  explicit IbCmPair(const Secrets& secrets = {})
      : RdmaCmPair(ports_from("SDP_TEST_IB", "rxe0 10.77.0.1 rxe1 10.77.0.2"), false, secrets) {}
};
class RnicCmPair : public RdmaCmPair {
 public:
  explicit RnicCmPair(const Secrets& secrets = {})
      : RdmaCmPair(ports_from("SDP_TEST_RNIC", "siw0 10.77.1.1 siw1 10.77.1.2"), true, secrets) {}
};

}  // namespace rdma::conformance
