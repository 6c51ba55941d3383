// Two streams, each an anchor and a lane, driven by one seed: what one program sends the other gets, in order and once, then the
// end where the sender ended, whatever carried the bytes and whenever the carrier changed; nobody is stuck; every buffer comes
// home.
#include <poll.h>
#include <sys/mman.h>

#include <algorithm>
#include <vector>

#include "tests/sim/served_pair.hpp"

namespace sdp::sim {
namespace {

/// How a seed's connection lives and ends.
struct Case {
  LaneLimits limits;
  int kernel_buffer = 0;
  std::uint64_t actions = 0;
  std::array<std::uint64_t, 2> attach_at{};      ///< action before which each side's lane is up
  std::array<unsigned, 2> sending{}, serving{};  ///< per cent
  unsigned take_down_permille = 0, end_permille = 0;
  bool deaths = false;
  unsigned fail_permille = 0;
  unsigned return_percent = 0;  ///< how soon another lane takes a failed one's place
  std::size_t largest = 0;
  unsigned arriving = 0;  ///< per cent: how often something posted on an unordered lane arrives
};

Case case_of(std::uint64_t seed) {
  Chance chance(seed * 131 + 7);
  Case c;
  c.limits.conn.recv_size = 256U << chance.pick(0, 4);
  c.limits.conn.recv_size_max = c.limits.conn.recv_size << chance.pick(0, 4);
  c.limits.conn.recv_buffers = static_cast<std::uint16_t>(chance.pick(4, 16));
  c.limits.recv_buffers_max = static_cast<std::uint16_t>(c.limits.conn.recv_buffers + chance.pick(0, 48));
  c.kernel_buffer = chance.percent(50) ? static_cast<int>(4096U << chance.pick(0, 4)) : 0;
  c.actions = chance.pick(20, 400);
  for (unsigned i : {0U, 1U}) {
    c.attach_at[i] = chance.percent(5) ? ~0ULL : chance.pick(0, chance.percent(70) ? 20 : c.actions);
    c.sending[i] = static_cast<unsigned>(chance.pick(0, 100));
    c.serving[i] = static_cast<unsigned>(chance.pick(2, 60));
  }
  c.take_down_permille = chance.percent(50) ? static_cast<unsigned>(chance.pick(1, 20)) : 0;
  c.end_permille = chance.percent(50) ? static_cast<unsigned>(chance.pick(1, 10)) : 0;
  c.deaths = chance.percent(30);
  c.fail_permille = chance.percent(40) ? static_cast<unsigned>(chance.pick(1, 20)) : 0;
  c.return_percent = static_cast<unsigned>(chance.pick(0, 50));
  c.largest = std::size_t{1} << chance.pick(4, 19);
  c.arriving = static_cast<unsigned>(chance.pick(1, 60));
  c.limits.bulk_copy = static_cast<BulkCopy>(chance.pick(0, 2));
  return c;
}

/// The devices of both flavours, ordered with TCP and not; they outlive all seeds, as in a program.
Hosts& hosts_of(std::uint64_t seed) {
  using Order = Hosts::Order;
  static std::array<Hosts, 4> hosts{Hosts(rdma::NodeType::ib_ca), Hosts(rdma::NodeType::rnic),
                                    Hosts(rdma::NodeType::ib_ca, Order::late), Hosts(rdma::NodeType::rnic, Order::late, 64)};
  return hosts[seed % hosts.size()];
}

class Rig {
 public:
  Rig(std::uint64_t seed, const Case& c, Hosts& hosts)
      : seed_(seed), case_(c), chance_(seed ^ 0x51D3), ends_(hosts, c.limits, c.kernel_buffer) {}

  void run() {
    for (std::uint64_t n = 0; n < case_.actions; ++n) {
      if (chance_.percent(case_.return_percent) && ends_.renew())
        for (std::uint64_t& at : case_.attach_at) at = n + chance_.pick(0, 10);
      for (unsigned i : {0U, 1U})
        if (n == case_.attach_at[i]) ends_.attach(i);
      act(static_cast<unsigned>(chance_.pick(0, 1)));
    }
    finish();
  }
  /// Both send until TCP or the lane takes no more; then both read. At the latest then everything moves again.
  void fill() {
    for (unsigned i : {0U, 1U}) ends_.attach(i);
    for (int round = 0; round < 3; ++round) {
      for (bool more = true; more;) {
        more = false;
        for (unsigned i : {0U, 1U}) {
          more = send(i, chance_.size(case_.largest)) > 0 || more;
          arrive(i);
          if (chance_.percent(case_.serving[i])) ends_.serve(i);
        }
      }
      const auto i = static_cast<unsigned>(chance_.pick(0, 1));
      if (chance_.percent(20)) ends_.end(i).handle().take_down(LaneReason::mode);
      settle("after both had filled their buffers");
    }
    finish();
  }

  /// Lanes fail, in whatever state, and each time another one takes the failed one's place.
  void lose_and_return() {
    for (std::uint64_t round = chance_.pick(1, 5); round != 0; --round) {
      std::array<std::uint64_t, 2> attach_at{chance_.pick(0, 10), chance_.pick(0, 10)};
      const std::uint64_t fails_at = chance_.pick(11, case_.actions - 1);
      for (std::uint64_t n = 0; n < case_.actions; ++n) {
        for (unsigned i : {0U, 1U})
          if (n == attach_at[i]) ends_.attach(i);
        if (n == fails_at) lose(static_cast<unsigned>(chance_.pick(0, 1)));
        act(static_cast<unsigned>(chance_.pick(0, 1)));
      }
      settle("after a failure");
      for (int patience = 100; !ends_.renew(); --patience) {
        if (patience == 0) broken("no lane again: ", state(0), " / ", state(1));
        ends_.hosts().release_all();
        for (unsigned i : {0U, 1U}) {
          ends_.serve(i);
          if (receive(i, 1) > 0) broken("side ", i, " got a byte that nobody sent");
        }
      }
    }
    finish();
  }

  const Carried& carried() const { return ends_.carried(); }
  bool lossless() const { return !lossy(0) && !lossy(1); }
  bool unordered() { return ends_.hosts().unordered(); }

 private:
  struct Flow {  ///< of the direction that this side sends
    std::uint64_t sent = 0, received = 0;
    bool shut = false;       ///< the sender half-closed
    bool end_seen = false;   ///< the receiver got 0 or an error
    bool reset = false;      ///< it was an error; the next receives get 0
    bool unread = false;     ///< the receiver closed, and bytes of this direction were unread
    bool after_end = false;  ///< bytes were sent after the receiver had closed
  };

  StreamEnd& at(unsigned i) { return ends_.end(i); }
  std::uint64_t stream(unsigned i) const { return seed_ * 2 + i; }
  bool gone(unsigned i) { return !ends_.at(i).open; }
  /// May the direction that i sends lose its tail, as with TCP? When i's socket is gone and answered bytes with RST, or may have
  /// refused some.
  bool lossy(unsigned i) const { return flow_[1 - i].unread || flow_[1 - i].after_end || shut_for_both_; }

  /// Unordered: may the direction that i sends lose its tail? Only with i's process, and the reader must be told.
  bool died(unsigned i) { return unordered() && ends_.at(i).dead; }
  void arrive(unsigned i) {
    if (chance_.percent(case_.arriving)) ends_.hosts().release(i, chance_.size(16));
  }

  void act(unsigned i) {
    StreamEnd& e = at(i);
    trace(i);
    for (unsigned side : {0U, 1U}) arrive(side);
    if (gone(i)) return ends_.serve(1 - i);
    if (chance_.percent(case_.serving[i])) return ends_.serve(i);
    const std::uint64_t rare = chance_.pick(0, 999);
    if (rare < case_.take_down_permille) return e.handle().take_down(LaneReason::mode);
    if (rare >= 1000 - case_.end_permille) return end(i);
    if (rare >= 500 && rare < 500 + case_.fail_permille) return lose(i);
    if (chance_.percent(10)) return poll_agrees(i);
    if (chance_.percent(case_.sending[i]))
      send(i, chance_.size(case_.largest));
    else
      receive(i, chance_.size(case_.largest));
  }

  void lose(unsigned i) { failed_ = (chance_.percent(50) ? ends_.lose_device(i) : ends_.fail(i)) || failed_; }

  /// SDP_SEED_TRACE: how both stand before each action of a replayed seed.
  void trace(unsigned i) {
    static const bool on = std::getenv("SDP_SEED_TRACE") != nullptr;
    if (!on) return;
    for (unsigned side : {0U, 1U})
      BOOST_TEST_MESSAGE((side == i ? "> " : "  ") << side << ": sent " << flow_[side].sent << ", received "
                                                   << flow_[1 - side].received << ", " << state(side));
  }
  void end(unsigned i) {
    switch (chance_.pick(0, 4)) {
      case 4:
        return shutdown(i, SHUT_RDWR);
      case 0:
        return close(i);
      case 1:
        return case_.deaths ? kill(i) : shutdown(i);
      default:
        return shutdown(i);
    }
  }
  void shutdown(unsigned i, int how = SHUT_WR) {
    const int r = at(i).handle().shutdown(at(i).fd, how);
    // The second of both finds no connection.
    if (r != 0 && !flow_[i].shut && !gone(1 - i) && !shut_for_both_) broken("shutdown: ", r);
    if (how == SHUT_RDWR) shut_for_both_ = true;
    flow_[i].shut = true;
  }
  void close(unsigned i) {
    note_end(i);
    ends_.close(i);
  }
  void kill(unsigned i) {
    note_end(i);
    ends_.kill(i);
  }
  void note_end(unsigned i) { flow_[1 - i].unread = flow_[1 - i].sent != flow_[1 - i].received; }

  std::int64_t send(unsigned i, std::size_t bytes) {
    StreamEnd& e = at(i);
    Flow& flow = flow_[i];
    out_.resize(bytes);
    fill_bytes(out_.data(), bytes, i, flow.sent);
    std::int64_t n = 0;
    switch (chance_.pick(0, 9)) {
      case 0: {
        const int file = memfd_create("bytes", MFD_CLOEXEC);
        if (file < 0 || write(file, out_.data(), bytes) != static_cast<ssize_t>(bytes)) broken("no file");
        std::int64_t offset = 0;
        const bool dies = flow.shut || gone(1 - i) || shut_for_both_;  // sendfile has no MSG_NOSIGNAL
        n = dies ? -EAGAIN : e.handle().sendfile(e.fd, file, &offset, bytes);
        if (n > 0 && offset != n) broken("sendfile moved the offset by ", offset, " for ", n, " bytes");
        ::close(file);
        break;
      }
      case 1:
      case 2: {
        std::array<iovec, 3> iov;
        msghdr msg{};
        msg.msg_iov = iov.data();
        msg.msg_iovlen = cut(iov, out_);
        n = e.handle().sendmsg(e.fd, &msg, MSG_NOSIGNAL);
        break;
      }
      default:
        n = e.handle().send(e.fd, out_.data(), bytes, MSG_NOSIGNAL | (chance_.percent(50) ? MSG_DONTWAIT : 0));
    }
    if (n >= 0) {
      if (flow.shut) broken("side ", i, " sent after its shutdown");
      if (static_cast<std::size_t>(n) > bytes || n == 0) broken("send of ", bytes, " returned ", n);
      if (gone(1 - i)) flow.after_end = true;
      flow.sent += static_cast<std::uint64_t>(n);
    } else if (n == -EPIPE || n == -ECONNRESET) {
      if (!(n == -EPIPE && flow.shut) && !gone(1 - i) && !shut_for_both_)
        broken("side ", i, ": send failed with ", n, " though nobody closed");
      if (n == -ECONNRESET) flow_[1 - i].reset = true;  // the kernel tells it once
    } else if (n != -EAGAIN) {
      broken("send: ", n);
    }
    return n;
  }

  std::int64_t receive(unsigned i, std::size_t bytes) {
    StreamEnd& e = at(i);
    Flow& flow = flow_[1 - i];
    in_.assign(bytes, std::byte{});
    int flags = chance_.percent(50) ? MSG_DONTWAIT : 0;
    if (chance_.percent(10)) flags |= MSG_WAITALL;
    const std::uint64_t kind = chance_.pick(0, 19);
    const bool peek = kind < 3, trunc = kind == 3;
    if (peek) flags |= MSG_PEEK;
    if (trunc) flags |= MSG_TRUNC;
    std::int64_t n = 0;
    if (chance_.percent(20) && !trunc) {
      std::array<iovec, 3> iov;
      msghdr msg{};
      msg.msg_iov = iov.data();
      msg.msg_iovlen = cut(iov, in_);
      n = e.handle().recvmsg(e.fd, &msg, flags);
    } else {
      n = e.handle().recv(e.fd, in_.data(), bytes, flags);
    }
    took(i, n, bytes, peek, trunc);
    if (n > 0 && !peek) flow.received += static_cast<std::uint64_t>(n);
    return peek && n > 0 ? -EAGAIN : n;
  }
  void took(unsigned i, std::int64_t n, std::size_t bytes, bool peek, bool trunc) {
    Flow& flow = flow_[1 - i];
    if (n > 0) {
      if (static_cast<std::size_t>(n) > bytes || flow.received + static_cast<std::uint64_t>(n) > flow.sent)
        broken("side ", i, " got ", n, " of ", flow.sent - flow.received, " bytes");
      if (flow.end_seen && !shut_for_both_) broken("side ", i, " got bytes after the end");
      if (!trunc) verify(in_.data(), static_cast<std::size_t>(n), stream(1 - i), flow.received, peek ? "peek" : "recv");
    } else if (n == 0) {
      if (!flow.shut && !gone(1 - i) && !shut_for_both_)
        broken("side ", i, " got an end that nobody made, at ", flow.received, " of ", flow.sent);
      if (flow.received != flow.sent && !lossy(1 - i) && !flow.reset)
        broken("side ", i, ": the end came at ", flow.received, " of ", flow.sent);
      flow.end_seen = true;
    } else if (n == -ECONNRESET) {
      if (!lossy(1 - i) && !died(1 - i) && !(failed_ && gone(1 - i)))
        broken("side ", i, ": ECONNRESET at ", flow.received, " of ", flow.sent, " without a reason");
      flow.end_seen = flow.reset = true;
    } else if (n != -EAGAIN) {
      broken("recv: ", n);
    }
  }

  /// What a waiting program is told is what its next call finds.
  void poll_agrees(unsigned i) {
    StreamEnd& e = at(i);
    e.handle().on_wait_entry(e.fd);
    const std::uint32_t by_lane = e.handle().poll(POLLIN | POLLOUT);
    pollfd anchor{e.fd, static_cast<short>(e.handle().kernel_events(POLLIN | POLLOUT)), 0};
    ::poll(&anchor, 1, 0);
    const std::uint32_t ready = by_lane | static_cast<std::uint32_t>(anchor.revents);
    if (anchor.revents & (POLLHUP | POLLERR)) ends_.serve(i);  // the service thread hears of it as well
    const bool readable = (ready & (POLLIN | POLLHUP | POLLERR)) != 0;
    if (chance_.percent(50)) {
      in_.assign(1, std::byte{});
      const std::int64_t n = e.handle().recv(e.fd, in_.data(), 1, MSG_DONTWAIT);
      took(i, n, 1, false, false);
      if (n > 0) ++flow_[1 - i].received;
      // On an unordered lane FIN may have come before the lane's end, and nobody can tell the kernel.
      const bool early = unordered() && (flow_[1 - i].shut || gone(1 - i));
      if (readable && n == -EAGAIN && !early) broken("side ", i, " is readable, and recv finds nothing: ", state(i));
      if (!readable && n != -EAGAIN) broken("side ", i, " is not readable, and recv finds ", n, ": ", state(i));
    } else if ((ready & POLLOUT) != 0 && send(i, 1) == -EAGAIN && e.stream->resend.empty() && !flow_[i].shut && !gone(1 - i) &&
               !shut_for_both_) {
      broken("side ", i, " is writable, and send takes nothing: ", state(i));
    }
  }

  /// Everything that was sent and can still arrive arrives.
  void settle(const char* when) {
    constexpr int kPatience = 30;
    const auto missing = [this](unsigned i) {
      return !gone(i) && !flow_[1 - i].end_seen && flow_[1 - i].received != flow_[1 - i].sent;
    };
    drive(when, kPatience, missing);
  }
  /// Each side that is open reads to the end.
  void read_to_the_end() {
    const auto waits = [this](unsigned i) { return !gone(i) && !flow_[1 - i].end_seen; };
    drive("while the ends were awaited", 30, waits);
  }
  template <class Unfinished>
  void drive(const char* when, int patience, Unfinished unfinished) {
    for (int idle = 0; unfinished(0) || unfinished(1);) {
      bool moved = false;
      for (unsigned i : {0U, 1U}) {
        if (idle > 4)
          ends_.hosts().release(i);
        else
          arrive(i);
        ends_.serve(i);
        if (!gone(i) && unfinished(i)) moved = receive(i, 1 << 18) > 0 || moved;
      }
      idle = moved ? 0 : idle + 1;
      if (idle > patience)
        broken("stuck ", when, ": ", flow_[0].received, " of ", flow_[0].sent, ", ", flow_[1].received, " of ", flow_[1].sent, "; ",
               state(0), " / ", state(1));
      if (idle <= 4) continue;
      std::array<pollfd, 2> fds{};
      for (unsigned i : {0U, 1U}) fds[i] = {unfinished(i) ? at(i).fd : -1, POLLIN, 0};
      ::poll(fds.data(), fds.size(), 100);
    }
  }

  void finish() {
    settle("at the end");
    for (unsigned i : {0U, 1U})
      if (!gone(i) && !flow_[i].shut) shutdown(i);
    read_to_the_end();
    for (unsigned i : {0U, 1U}) {
      if (gone(i)) continue;
      if (const int left = at(i).handle().inq(at(i).fd); left != 0 && !lossy(1 - i)) broken("FIONREAD at the end: ", left);
      close(i);
    }
    for (unsigned i : {0U, 1U}) ends_.attach(i);  // a handshake that ends after everything
    for (int round = 0; round < 6; ++round) {
      ends_.hosts().release_all();
      for (unsigned i : {0U, 1U}) ends_.serve(i);
    }
    ends_.come_home();
  }

  std::string state(unsigned i) {
    StreamEnd& e = at(i);
    if (gone(i)) return ends_.at(i).dead ? "dead" : "closed";
    std::string text = "phase " + std::to_string(static_cast<int>(e.stream->phase.load())) + " tx " +
                       std::to_string(static_cast<int>(e.stream->tx.load())) + " rx " +
                       std::to_string(static_cast<int>(e.stream->rx.load()));
    if (e.stream->lane != nullptr)
      text += " unread " + std::to_string(e.lane->unread()) + " buffered " + std::to_string(e.lane->buffered());
    if (!e.stream->resend.empty()) text += " resend " + std::to_string(e.stream->resend.size());
    if (flow_[i].shut) text += " shut";
    return text;
  }
  void fill_bytes(std::byte* out, std::size_t n, unsigned i, std::uint64_t position) { sim::fill(out, n, stream(i), position); }
  std::size_t cut(std::array<iovec, 3>& iov, std::vector<std::byte>& bytes) {
    const std::size_t a = chance_.pick(0, bytes.size()), b = chance_.pick(a, bytes.size());
    iov = {iovec{bytes.data(), a}, iovec{bytes.data() + a, b - a}, iovec{bytes.data() + b, bytes.size() - b}};
    return iov.size();
  }

  std::uint64_t seed_;
  Case case_;
  Chance chance_;
  ServedPair ends_;
  std::array<Flow, 2> flow_;
  bool failed_ = false;         ///< the lane
  bool shut_for_both_ = false;  ///< one side is
  std::vector<std::byte> out_, in_;
};

struct Totals {
  std::uint64_t seeds = 0, lossless = 0, with_lane = 0;
  Carried carried;
  void add(Rig& rig) {
    ++seeds;
    lossless += rig.lossless();
    with_lane += rig.carried().by_lane != 0;
    carried.by_lane += rig.carried().by_lane;
    carried.by_tcp += rig.carried().by_tcp;
    carried.switches_up += rig.carried().switches_up;
    carried.switches_down += rig.carried().switches_down;
    carried.returned += rig.carried().returned;
    carried.by_returned += rig.carried().by_returned;
  }
  std::string text() const {
    return std::to_string(seeds) + " seeds, " + std::to_string(with_lane) + " with bytes by lane, " + std::to_string(lossless) +
           " without a reset; bytes by lane " + std::to_string(carried.by_lane) + ", by TCP " + std::to_string(carried.by_tcp) +
           "; switches up " + std::to_string(carried.switches_up) + ", down " + std::to_string(carried.switches_down) +
           "; lanes returned " + std::to_string(carried.returned) + " with " + std::to_string(carried.by_returned) + " bytes";
  }
};

}  // namespace

BOOST_AUTO_TEST_CASE(the_stream_is_whole_whatever_carries_it) {
  Totals totals;
  for_each_seed("switch", 400, [&totals](std::uint64_t seed) {
    Rig rig(seed, case_of(seed), hosts_of(seed));
    rig.run();
    totals.add(rig);
  });
  BOOST_TEST_MESSAGE(totals.text());
  if (totals.seeds < 100) return;  // a replay
  BOOST_TEST(totals.with_lane * 2 > totals.seeds, totals.text());
  BOOST_TEST(totals.lossless * 2 > totals.seeds, totals.text());
  BOOST_TEST(totals.carried.by_lane > totals.carried.by_tcp / 6, totals.text());
  BOOST_TEST(totals.carried.switches_up > totals.seeds, totals.text());
  BOOST_TEST(totals.carried.switches_down > totals.seeds / 4, totals.text());
  BOOST_TEST(totals.carried.returned > totals.seeds / 40, totals.text());
}

BOOST_AUTO_TEST_CASE(another_lane_takes_the_place_of_a_failed_one) {
  Totals totals;
  std::uint64_t with_returned = 0;
  for_each_seed("return", 150, [&](std::uint64_t seed) {
    Case c = case_of(seed);
    c.take_down_permille = c.end_permille = c.fail_permille = 0;
    c.actions = std::max<std::uint64_t>(c.actions, 40);
    Rig rig(seed, c, hosts_of(seed % 2 + 2));  // the unordered ones
    rig.lose_and_return();
    totals.add(rig);
    with_returned += rig.carried().by_returned != 0;
  });
  BOOST_TEST_MESSAGE(totals.text());
  if (totals.seeds < 100) return;
  BOOST_TEST(totals.lossless == totals.seeds, totals.text());
  BOOST_TEST(totals.carried.returned >= 2 * totals.seeds, totals.text());
  BOOST_TEST(with_returned * 2 > totals.seeds, totals.text());
}

BOOST_AUTO_TEST_CASE(both_may_fill_their_buffers_and_nobody_is_stuck) {
  Totals totals;
  for_each_seed("fill", 40, [&totals](std::uint64_t seed) {
    Case c = case_of(seed);
    c.largest = std::max<std::size_t>(c.largest, 1 << 16);
    Rig rig(seed, c, hosts_of(seed));
    rig.fill();
    totals.add(rig);
  });
  BOOST_TEST_MESSAGE(totals.text());
  if (totals.seeds < 20) return;
  BOOST_TEST(totals.with_lane * 2 > totals.seeds, totals.text());
}

}  // namespace sdp::sim
