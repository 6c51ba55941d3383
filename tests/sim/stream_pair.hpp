// Two StreamImpls over one TCP connection of the loopback device, with their lanes on two software devices tied to each other: what
// two processes have, in one thread, so that a test decides who does what when.
#pragma once

#include <fcntl.h>
#include <linux/tcp.h>
#include <netinet/in.h>
#include <sys/socket.h>
#include <unistd.h>

#include <array>
#include <memory>

#include "rdma_core/drivers/shm/shm_device.hpp"
#include "rdma_core/drivers/wrap/late_device.hpp"
#include "tests/rdma_core/shm_pair.hpp"
#include "tests/sim/lane_ends.hpp"
#include "tests/support/forgetful_device.hpp"

namespace sdp::sim {

/// The devices of both processes. They outlive all seeds, as in a program.
struct Hosts {
  std::array<std::unique_ptr<rdma::shm::ShmDevice>, 2> device;
  std::array<std::unique_ptr<rdma::wrap::LateDevice>, 2> late;            ///< round them, if the lanes are to be unordered
  std::array<std::unique_ptr<rdma::test::ForgetfulDevice>, 2> forgetful;  ///< or these, for programs with threads
  std::array<LaneHost, 2> host;

  enum class Order : std::uint8_t { at_once, late, unpromised, at_once_in_place };  ///< the last: programs' memory is read, too
  explicit Hosts(rdma::NodeType flavour, Order order = Order::at_once, std::uint32_t max_inline = 0) {
    std::array<rdma::Path, 2> path;
    for (auto& d : device)
      d = std::move(*rdma::shm::ShmDevice::create(
          {.flavour = flavour, .segment_bytes = std::size_t{256} << 20, .reads_program_memory = order == Order::at_once_in_place}));
    rdma::shm::test::link_devices(*device[0], *device[1], path[0], path[1]);
    for (unsigned i : {0U, 1U}) {
      if (order == Order::late) late[i] = std::make_unique<rdma::wrap::LateDevice>(*device[i], max_inline);
      if (order == Order::unpromised) forgetful[i] = std::make_unique<rdma::test::ForgetfulDevice>(*device[i]);
      rdma::Device* const outer = late[i] != nullptr ? static_cast<rdma::Device*>(late[i].get()) : forgetful[i].get();
      host[i].open(outer != nullptr ? *outer : *device[i], path[i]);
    }
  }
  bool unordered() const { return late[0] != nullptr || forgetful[0] != nullptr; }
  /// What side `i` has posted arrives, up to `most` requests of each lane.
  void release(unsigned i, std::size_t most = ~std::size_t{0}) {
    if (late[i] != nullptr) late[i]->release(most);
  }
  void release_all() {
    for (unsigned i : {0U, 1U}) release(i);
  }
};

/// `buffer`: bytes of each socket buffer of the kernel's; 0: as the system has them.
inline void connected_pair(std::array<int, 2>& fds, int buffer = 0) {
  const int listener = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
  sockaddr_in here{};
  here.sin_family = AF_INET;
  here.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
  socklen_t len = sizeof here;
  const auto address = reinterpret_cast<sockaddr*>(&here);
  if (bind(listener, address, len) != 0 || listen(listener, 1) != 0 || getsockname(listener, address, &len) != 0)
    broken("no listener");
  fds[0] = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
  for (const int fd : {listener, fds[0]}) {
    if (buffer == 0) break;
    const int segment = 1024;  // well below the buffers, or TCP waits for its timers
    setsockopt(fd, IPPROTO_TCP, TCP_MAXSEG, &segment, sizeof segment);
    setsockopt(fd, SOL_SOCKET, SO_RCVBUF, &buffer, sizeof buffer);
    setsockopt(fd, SOL_SOCKET, SO_SNDBUF, &buffer, sizeof buffer);
  }
  if (connect(fds[0], address, len) != 0) broken("no connection");
  fds[1] = accept4(listener, nullptr, nullptr, SOCK_CLOEXEC);
  close(listener);
  for (const int fd : fds) {
    const int on = 1;
    setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &on, sizeof on);
    fcntl(fd, F_SETFL, O_NONBLOCK);
  }
}

/// One end: what a process knows of the connection.
struct StreamEnd {
  int fd = -1;
  StreamImpl* stream = nullptr;
  Lane* lane = nullptr;

  Stream handle() const { return engine::handle_of(stream); }
};

/// Two ends whose lanes have said Hello and are not attached yet.
class StreamPair {
 public:
  StreamPair(Hosts& hosts, const LaneLimits& limits, int kernel_buffer = 0) {
    std::array<int, 2> fds{};
    connected_pair(fds, kernel_buffer);
    for (unsigned i : {0U, 1U}) {
      StreamEnd& end = ends_[i];
      end.fd = fds[i];
      end.stream = engine::new_stream();
      end.stream->fd = end.fd;
      end.stream->blocking = Blocking::no;
      end.stream->phase = Phase::pursued;
      socklen_t len = sizeof end.stream->cookie;
      if (getsockopt(end.fd, SOL_SOCKET, SO_COOKIE, &end.stream->cookie, &len) != 0) broken("no cookie");
      end.stream->transcript.restart(true);
    }
    make_lanes(hosts, limits);
  }
  void make_lanes(Hosts& hosts, const LaneLimits& limits) {
    for (unsigned i : {0U, 1U}) ends_[i].lane = hosts.host[i].make(limits);
    for (unsigned i : {0U, 1U}) {
      const auto peer = static_cast<std::uint32_t>(ends_[1 - i].lane->qp().qpn());
      rdma::shm::test::qp_to_rts(ends_[i].lane->qp(), peer, hosts.device[i]->attr().node_type);
      ends_[i].lane->set_peer(ends_[1 - i].lane->proposal());
    }
    ends_[1].lane->conn.await_hello();
    ends_[0].lane->send_hello({});
    for (int i = 0; i < 3; ++i)
      for (StreamEnd& end : ends_) {
        hosts.release_all();
        end.lane->drain();
      }
    for (const StreamEnd& end : ends_)
      if (end.lane->conn.state() != ConnState::established) broken("no lane: ", end.lane->conn.error());
  }
  StreamPair(const StreamPair&) = delete;
  StreamPair& operator=(const StreamPair&) = delete;
  ~StreamPair() {
    for (StreamEnd& end : ends_) {
      if (end.fd < 0) continue;
      if (end.stream != nullptr) end.handle().close(end.fd);
      close(end.fd);
    }
    for (StreamEnd& end : ends_) free_lane(end.lane);
  }
  StreamEnd& operator[](unsigned side) { return ends_[side]; }
  const StreamEnd& operator[](unsigned side) const { return ends_[side]; }

  void attach(unsigned side) {
    StreamImpl& s = *ends_[side].stream;
    (void)s.lock.lock();
    s.attach(ends_[side].lane);
    s.lock.unlock();
  }

 private:
  std::array<StreamEnd, 2> ends_;
};

}  // namespace sdp::sim
