// A ServedPair both of whose directions have gone to the lane. What its programs send is known at every byte, and none of their
// calls waits.
#pragma once

#include <poll.h>

#include <vector>

#include "rdma_core/base/sys.hpp"
#include "tests/sim/served_pair.hpp"

namespace sdp::sim {

class LanedEnds {
 public:
  explicit LanedEnds(Hosts& hosts, int kernel_buffer = 0) : LanedEnds(hosts, kernel_buffer, true) {}
  ~LanedEnds() {
    for (unsigned i : {0U, 1U})
      if (ends.at(i).open) ends.close(i);
    for (int round = 0; round < 6; ++round) pass();
  }
  LanedEnds(const LanedEnds&) = delete;
  LanedEnds& operator=(const LanedEnds&) = delete;

  /// What has been posted arrives, and both service threads look.
  void pass() {
    ends.hosts().release_all();
    for (unsigned i : {0U, 1U}) ends.serve(i);
  }
  std::int64_t send(unsigned i, std::size_t bytes) {
    std::vector<std::byte> data(bytes);
    fill(data.data(), bytes, i, sent[i]);
    const std::int64_t n = handle(i).send(fd(i), data.data(), bytes, MSG_DONTWAIT | MSG_NOSIGNAL);
    if (n > 0) sent[i] += static_cast<std::uint64_t>(n);
    return n;
  }
  std::int64_t receive(unsigned i, std::size_t most = 65536, int flags = 0) {
    std::vector<std::byte> data(most);
    const std::int64_t n = handle(i).recv(fd(i), data.data(), data.size(), MSG_DONTWAIT | flags);
    if (n > 0) verify(data.data(), static_cast<std::size_t>(n), 1 - i, received[i], "recv");
    if (n > 0 && (flags & MSG_PEEK) == 0) received[i] += static_cast<std::uint64_t>(n);
    return n;
  }
  /// Until there is nothing more; the last result.
  std::int64_t receive_all(unsigned i) {
    std::int64_t n = 0;
    while ((n = receive(i)) > 0) {
    }
    return n;
  }
  /// What the kernel itself says on that side, past us.
  long kernel_says(unsigned i) {
    pollfd end{fd(i), POLLIN, 0};
    ::poll(&end, 1, 30'000);
    std::byte one;
    return rdma::sys::call(SYS_recvfrom, fd(i), rdma::sys::arg(&one), 1, MSG_DONTWAIT, 0, 0);
  }
  StreamImpl& stream(unsigned i) { return *ends.end(i).stream; }
  Stream handle(unsigned i) { return ends.end(i).handle(); }
  int fd(unsigned i) { return ends.end(i).fd; }

  ServedPair ends;
  std::array<std::uint64_t, 2> sent{}, received{};

 protected:
  LanedEnds(Hosts& hosts, int kernel_buffer, bool comes_up) : ends(hosts, LaneLimits{}, kernel_buffer) {
    if (comes_up) come_up();
  }
  void come_up() {
    for (unsigned i : {0U, 1U}) ends.attach(i);
    for (int round = 0; round < 100 && !(on_lane(0) && on_lane(1)); ++round) {
      for (unsigned i : {0U, 1U}) {
        send(i, 1);
        pass();
        receive(1 - i);
      }
    }
    if (!on_lane(0) || !on_lane(1)) broken("no lane");
    while (receive(0) > 0 || receive(1) > 0) pass();
  }

 private:
  bool on_lane(unsigned i) { return stream(i).tx.load() == TxState::lane && stream(i).rx.load() == RxState::lane; }
};

}  // namespace sdp::sim
