// Two streams over a real TCP connection of the loopback device, with lanes on two software devices tied to each other, driven step
// by step by one seed: lanes come up and are taken down on either side at any byte, in any order, while both sides send, read,
// peek, shut down or die. What arrives is what was sent, in order and once; then comes the end that TCP shows.
#include <linux/sockios.h>
#include <poll.h>
#include <sys/ioctl.h>
#include <sys/socket.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <cerrno>
#include <string>
#include <vector>

#include "tests/sim/stream_pair.hpp"

namespace sdp::sim {
namespace {

using rdma::NodeType;

/// What the runs of all seeds did together: a test in which everything stays on TCP proves nothing.
struct Totals {
  std::uint64_t lane_bytes = 0, tcp_bytes = 0, ups = 0, downs = 0, deaths = 0;
};

class Switching {
 public:
  Switching(std::uint64_t seed, Hosts& hosts, Totals& totals)
      : seed_(seed), chance_(seed ^ 0x5717C4), totals_(totals), pair_(hosts, limits()) {
    for (unsigned i : {0U, 1U}) static_cast<StreamEnd&>(end_[i]) = pair_[i];
  }

  void run() {
    const std::uint64_t actions = chance_.pick(20, 300);
    const unsigned reading = static_cast<unsigned>(chance_.pick(5, 95));
    const bool may_die = chance_.percent(15), may_go_down = chance_.percent(60);
    for (std::uint64_t i = 0; i < actions && !anyone_dead(); ++i) {
      const auto side = static_cast<unsigned>(chance_.pick(0, 1));
      switch (chance_.pick(0, 19)) {
        case 0:
          attach(side);
          break;
        case 1:
          if (may_go_down && chance_.percent(20)) take_down(side);
          break;
        case 2:
          if (chance_.percent(5)) shut_down(side);
          break;
        case 3:
          if (may_die && chance_.percent(10)) die(side);
          break;
        case 4:
        case 5:
          serve(side);
          break;
        case 6:
          look(side);
          break;
        default:
          if (chance_.percent(reading))
            receive(side);
          else
            send(side);
      }
    }
    finish();
  }

 private:
  struct End : StreamEnd {
    std::uint64_t sent = 0, received = 0;
    bool attached = false, shut = false, at_end = false, dead = false, went_down = false;
  };

  LaneLimits limits() {
    LaneLimits limits;
    limits.conn.recv_size = static_cast<std::uint32_t>(chance_.pick(128, 2048));
    limits.conn.recv_size_max = static_cast<std::uint32_t>(chance_.pick(limits.conn.recv_size, 16384));
    limits.conn.recv_buffers = static_cast<std::uint16_t>(chance_.pick(4, 16));
    limits.recv_buffers_max = static_cast<std::uint16_t>(chance_.pick(limits.conn.recv_buffers, 64));
    return limits;
  }
  static Stream handle(const End& end) { return end.handle(); }
  bool anyone_dead() const { return end_[0].dead || end_[1].dead; }
  std::uint64_t stream_of(unsigned sender) const { return seed_ * 2 + sender; }
  const char* name(unsigned side) const { return side == 0 ? "side 0" : "side 1"; }

  /// SDP_SEED_TRACE: what a replayed seed does, step by step.
  void trace(unsigned side, const char* what, std::int64_t result) const {
    static const bool on = std::getenv("SDP_SEED_TRACE") != nullptr;
    if (on) BOOST_TEST_MESSAGE(what << " " << result << ": " << tell(side));
  }

  void attach(unsigned side) {
    End& end = end_[side];
    if (end.attached || end.dead) return;
    trace(side, "attach", 0);
    end.attached = true;
    pair_.attach(side);
  }
  void take_down(unsigned side) {
    End& end = end_[side];
    if (!end.attached || end.dead) return;
    if (end.stream->tx.load() == TxState::lane) ++totals_.downs;
    end.went_down = true;
    handle(end).take_down(LaneReason::mode);
    trace(side, "take down", 0);
  }
  /// What the service thread does now and then, and what it hears of the anchor.
  void serve(unsigned side) {
    End& end = end_[side];
    if (!end.attached || end.dead) return;
    StreamImpl& s = *end.stream;
    pollfd p{end.fd, POLLIN | POLLRDHUP, 0};
    if (::poll(&p, 1, 0) > 0) s.anchor_event = true;
    (void)s.lock.lock();
    if (s.phase.load() == Phase::laned) {
      if (s.tx.load() != TxState::ended && s.lane->said(kAbandon)) s.handle_abandon(end.fd);
      if (s.resend != nullptr) (void)s.flush_resend(end.fd);
      if (s.tx.load() == TxState::lane && !s.lane_is_over()) {
        s.lane->drain();
        s.lane->flush_buffer();
      }
    }
    s.lock.unlock();
  }
  void look(unsigned side) {
    if (!end_[side].dead) (void)handle(end_[side]).poll(POLLIN | POLLOUT);
  }
  void send(unsigned side) {
    End& end = end_[side];
    if (end.shut || end.dead) return;
    std::vector<std::byte> data(chance_.size(100'000));
    fill(data.data(), data.size(), stream_of(side), end.sent);
    const TxState before = end.stream->tx.load();
    const std::int64_t n = handle(end).send(end.fd, data.data(), data.size(), MSG_DONTWAIT | MSG_NOSIGNAL);
    trace(side, "send", n);
    if (n > 0) {
      end.sent += static_cast<std::uint64_t>(n);
    } else if (n != -EAGAIN && !(end_[1 - side].dead && (n == -EPIPE || n == -ECONNRESET))) {
      broken(name(side), ": send says ", n);
    }
    const TxState after = end.stream->tx.load();
    if (before != TxState::lane && after == TxState::lane) ++totals_.ups;
    (before == TxState::lane && after == TxState::lane ? totals_.lane_bytes : totals_.tcp_bytes) +=
        static_cast<std::uint64_t>(std::max<std::int64_t>(n, 0));
  }
  /// Returns what the receive said.
  std::int64_t receive(unsigned side) {
    End& end = end_[side];
    if (end.at_end || end.dead) return 0;
    std::vector<std::byte> data(chance_.size(100'000));
    const bool peek = chance_.percent(15);
    const int flags = MSG_DONTWAIT | (peek ? MSG_PEEK : 0) | (chance_.percent(10) ? MSG_WAITALL : 0);
    const std::int64_t n = handle(end).recv(end.fd, data.data(), data.size(), flags);
    const End& peer = end_[1 - side];
    if (n != -EAGAIN) trace(side, peek ? "peek" : "recv", n);
    if (n > 0) {
      if (end.received + static_cast<std::uint64_t>(n) > peer.sent) broken(name(side), " received more than was sent");
      verify(data.data(), static_cast<std::size_t>(n), stream_of(1 - side), end.received, name(side));
      if (!peek) end.received += static_cast<std::uint64_t>(n);
    } else if (n == 0) {
      if (!peer.shut && !peer.dead) broken(name(side), ": an end that nobody made, after ", end.received);
      if (end.received != peer.sent) broken("a wrong end: ", tell(side), "; ", tell(1 - side));
      if (!peek) end.at_end = true;
    } else if (n != -EAGAIN) {
      if (!(peer.dead && lost_allowed_)) broken(name(side), ": recv says ", n);
      end.at_end = true;
    }
    return n;
  }
  void shut_down(unsigned side) {
    End& end = end_[side];
    if (end.shut || end.dead) return;
    end.shut = true;
    trace(side, "shut down", 0);
    if (const int r = handle(end).shutdown(end.fd, SHUT_WR); r != 0 && !(r == -ENOTCONN && end_[1 - side].dead))
      broken(name(side), ": shutdown says ", r);
  }
  /// kill -9: no word of the lane is said any more, the kernel closes the descriptor. Bytes that lie unread in its socket make that
  /// an RST, as without lanes.
  void die(unsigned side) {
    End& end = end_[side];
    if (end.dead) return;
    ++totals_.deaths;
    int unread = 0;  // what has come; what is on its way counts too
    ioctl(end.fd, SIOCINQ, &unread);
    lost_allowed_ = unread != 0 || end_[1 - side].stream->tcp_sent.load() > end.stream->tcp_received.load() ||
                    end_[1 - side].stream->tx.load() != TxState::lane || end.stream->resend != nullptr || end.went_down ||
                    end_[1 - side].went_down;
    end.dead = true;
    trace(side, "die", unread);
    close(end.fd);
    pair_[side].fd = end.fd = -1;
    StreamImpl& survivor = *end_[1 - side].stream;
    survivor.peer_gone = true;
    survivor.anchor_event = true;
  }

  void finish() {
    for (unsigned side : {0U, 1U}) shut_down(side);
    int idle = 0;
    for (int round = 0; !(over(0) && over(1)); ++round) {
      bool moved = false;
      for (unsigned side : {0U, 1U}) {
        serve(side);
        if (end_[side].dead) continue;
        const std::uint64_t before = end_[side].received;
        receive(side);
        moved = moved || end_[side].received != before || end_[side].at_end;
      }
      // The loopback device delivers within microseconds: if nothing moves for a second, nothing will.
      if (moved)
        idle = 0;
      else if (++idle > 50)
        usleep(1000);
      if (idle > 1050) broken("stuck: ", tell(0), "; ", tell(1));
    }
  }
  bool over(unsigned side) const { return end_[side].dead || end_[side].at_end; }
  std::string tell(unsigned side) const {
    const End& e = end_[side];
    const StreamImpl& s = *e.stream;
    return std::string(name(side)) + " received " + std::to_string(e.received) + " of " + std::to_string(end_[1 - side].sent) +
           ", phase " + std::to_string(static_cast<int>(s.phase.load())) + " tx " + std::to_string(static_cast<int>(s.tx.load())) +
           " rx " + std::to_string(static_cast<int>(s.rx.load())) + " lane " + std::to_string(e.lane->tx_bytes()) + " sent " +
           std::to_string(e.lane->rx_bytes()) + " read" + (e.went_down ? " taken down" : "") + (e.dead ? " dead" : "") +
           (e.shut ? " shut" : "");
  }

  std::uint64_t seed_;
  Chance chance_;
  Totals& totals_;
  StreamPair pair_;
  std::array<End, 2> end_;
  bool lost_allowed_ = false;
};

void all_seeds(NodeType flavour, const char* name) {
  Hosts hosts(flavour);
  Totals totals;
  std::uint64_t seeds = 0;
  for_each_seed(name, 1000, [&](std::uint64_t seed) {
    ++seeds;
    Switching(seed, hosts, totals).run();
  });
  if (seeds < 100) return;  // a replay
  BOOST_TEST_MESSAGE(name << ": " << totals.lane_bytes << " bytes by lane, " << totals.tcp_bytes << " by TCP, " << totals.ups
                          << " switches up, " << totals.downs << " down, " << totals.deaths << " deaths");
  BOOST_TEST(totals.ups > seeds / 2);
  BOOST_TEST(totals.downs > seeds / 50);
  BOOST_TEST(totals.deaths > seeds / 50);
  BOOST_TEST(totals.lane_bytes > seeds * 1000);
}

BOOST_AUTO_TEST_CASE(ib) { all_seeds(NodeType::ib_ca, "switch, ib"); }
BOOST_AUTO_TEST_CASE(rnic) { all_seeds(NodeType::rnic, "switch, rnic"); }

}  // namespace
}  // namespace sdp::sim
