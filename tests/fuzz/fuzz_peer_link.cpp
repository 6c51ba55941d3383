// Any bytes at the two processes' own connection, from a stranger and from a peer that has gone mad: a frame makes the round trip
// or is none, nobody is heard of a lane that is not his, and what is kept for him has an end.
#include <poll.h>
#include <sys/socket.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstdint>
#include <cstring>
#include <span>
#include <vector>

#include "rdma_core/base/byte_order.hpp"
#include "sdp/peer_link.hpp"
#include "tests/fuzz/require.hpp"

using sdp::PeerLinks;
using Bytes = std::span<const std::uint8_t>;

namespace {

bool same(const PeerLinks::Message& a, const PeerLinks::Message& b) { return PeerLinks::emit(a) == PeerLinks::emit(b); }

void check_frame(const PeerLinks::Frame& frame) {
  PeerLinks::Message message, again;
  if (!PeerLinks::parse(frame, message)) return;
  require(PeerLinks::parse(PeerLinks::emit(message), again) && same(message, again), "a message makes the round trip");
}

/// One process that listens, has a lane with a caller and is called by `sends`. A fuzzer's run has many: the port stays.
class Listener {
 public:
  Listener() {
    sockaddr_in in{};
    in.sin_family = AF_INET;
    in.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
    sockaddr_storage address{};
    std::memcpy(&address, &in, sizeof in);
    here_ = rdma::cm::IpAddress::from(address);
    here_.port = links_.port_at(here_);
    require(here_.port != 0, "there is a port");
    links_.on_message = [this](const PeerLinks::Message& m) { require(m.key == mine_, "only what has a link is heard"); };
  }

  /// With `attached` the caller has shown his key first.
  void is_sent(Bytes bytes, bool attached) {
    mine_ = PeerLinks::new_key();
    links_.announce(mine_);
    const int fd = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
    const sockaddr_storage to = here_.to_sockaddr();
    require(connect(fd, reinterpret_cast<const sockaddr*>(&to), here_.sockaddr_size()) == 0, "a caller gets through");
    const linger at_once{1, 0};
    setsockopt(fd, SOL_SOCKET, SO_LINGER, &at_once, sizeof at_once);
    if (attached) {
      const auto frame = PeerLinks::emit({PeerLinks::Kind::attach, mine_, {}});
      (void)send(fd, frame.data(), frame.size(), MSG_NOSIGNAL);
    }
    (void)send(fd, bytes.data(), bytes.size(), MSG_NOSIGNAL);
    shutdown(fd, SHUT_WR);
    pollfd p{fd, POLLIN, 0};
    std::uint8_t byte;
    for (int rounds = 0; rounds < 1000; ++rounds) {  // to the end of what he sent, which ends the link
      links_.progress();
      if (poll(&p, 1, 0) == 1 && recv(fd, &byte, 1, MSG_DONTWAIT) <= 0 && errno != EAGAIN) break;
    }
    close(fd);
    links_.progress();
    links_.forget(mine_);
  }

 private:
  PeerLinks links_;
  rdma::cm::IpAddress here_;
  PeerLinks::Key mine_{};
};

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  const Bytes in(data, size);
  PeerLinks::Frame frame{};
  std::memcpy(frame.data(), in.data(), std::min(size, frame.size()));
  check_frame(frame);
  rdma::store_be32(frame.data(), 0x53444B01);
  check_frame(frame);
  static Listener listener;
  for (const bool attached : {false, true}) listener.is_sent(in, attached);
  return 0;
}
