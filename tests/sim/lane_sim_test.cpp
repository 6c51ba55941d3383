// Two Lanes on the simulated fabric, driven by one seed: what one sends the other gets, in order and once, whatever the delays; no
// credit is lost; a failure ends a lane with a reason; every buffer comes home.
#include <algorithm>
#include <array>
#include <vector>

#include "tests/sim/lane_ends.hpp"
#include "tests/support/sim_fabric.hpp"

namespace sdp::sim {
namespace {

using rdma::sim::Side;
using rdma::sim::SimFabric;
using rdma::sim::SimOptions;

enum class Fault : std::uint8_t { none, refused_posts, broken_link, removed_device, dead_peer };

struct Case {
  SimOptions fabric;
  LaneLimits limits;
  Fault fault = Fault::none;
  std::uint32_t far_size_max = 0;  ///< bytes: side 1's recv_size_max; 0: that of `limits`
  unsigned in_place = 0;           ///< per cent of sends and receives that go without a copy
  unsigned sinks = 0;              ///< of these, per cent by what the reader advertises
};

/// A program's call that sends or receives in place, and the memory that it has given.
struct InPlaceCall {
  std::vector<std::byte> memory;
  std::uint64_t from = 0;  ///< position in the stream
  bool is_under_way = false;
};

/// Sums over the seeds: a test in which nothing crosses in place is none.
struct InPlaceTotals {
  std::uint64_t offers = 0, whole = 0, cancelled = 0, refused = 0, bytes = 0, crossings = 0, in_the_middle = 0;
  std::uint64_t sinks = 0, sinks_cancelled = 0, sinks_unused = 0, written = 0, placed = 0;
};

class Rig {
 public:
  Rig(std::uint64_t seed, const Case& c)
      : seed_(seed),
        fault_(c.fault),
        in_place_(c.in_place),
        sinks_(c.sinks),
        chance_(seed ^ 0x5EED),
        fabric_(c.fabric),
        limits_(c.limits) {
    for (unsigned i : {0U, 1U}) {
      host_[i].open(fabric_.device(side(i)), fabric_.path(side(i)));
      LaneLimits limits = c.limits;
      if (i == 1 && c.far_size_max != 0) limits.conn.recv_size_max = c.far_size_max;
      lane_[i] = host_[i].make(limits);
    }
    fabric_.connect(lane_[0]->qp(), lane_[1]->qp());
    for (unsigned i : {0U, 1U}) lane_[i]->set_peer(lane_[1 - i]->proposal());
    lane_[1]->conn.await_hello();
    lane_[0]->send_hello({});
    for (int i = 0; i < 1000 && !(up(0) && up(1)); ++i) {
      fabric_.step();
      for (Lane* lane : lane_) lane->drain();
    }
    if (!up(0) || !up(1)) broken("the lanes did not come up: ", lane_[0]->conn.error(), " / ", lane_[1]->conn.error());
  }
  ~Rig() {
    for (Lane*& lane : lane_) free_lane(lane);
  }

  void run() {
    if (fault_ == Fault::broken_link || fault_ == Fault::removed_device || fault_ == Fault::dead_peer)
      fabric_.at_step(chance_.pick(1, 400), [this] { strike(); });
    const std::uint64_t actions = chance_.pick(10, 250);
    const unsigned reading = static_cast<unsigned>(chance_.pick(0, 100));
    for (std::uint64_t i = 0; i < actions; ++i) {
      act(reading);
      see_ends();
    }
    if (fault_ == Fault::none)
      finish();
    else
      end_badly();
    come_home();
  }

  /// Both send until neither can, then both read: nobody may wait for the other for ever.
  void fill_and_drain(std::uint64_t rounds) {
    for (std::uint64_t r = 0; r < rounds; ++r) {
      for (bool more = true; more;) {
        more = false;
        for (unsigned i : {0U, 1U})
          while (send(i, chance_.size(200'000)) != 0) more = true;
        settle();
        for (Lane* lane : lane_) more = more || (lane->may_send() && !lane->dead());
      }
      drain_all();
    }
  }
  void finish() {
    drain_all();
    for (unsigned i : {0U, 1U}) {
      if (sent_[i] != received_[i]) broken("side ", i, " sent ", sent_[i], ", ", received_[i], " arrived");
      if (lane_[i]->tx_bytes() != sent_[i] || lane_[1 - i]->rx_bytes() != received_[i]) broken("the lane's counts differ");
    }
    // A full round in which everything can be said: the credits must be what they were.
    for (int round = 0; round < 4; ++round)
      for (unsigned i : {0U, 1U}) {
        if (!lane_[i]->may_send()) broken("side ", i, " has no credit though everything was read");
        if (send(i, 10) == 0) broken("side ", i, " could not send after everything was read");
        drain_all();
      }
    close_politely();
  }
  void come_home() {
    for (unsigned i : {0U, 1U}) free_lane(lane_[i]);
    fabric_.run_until_idle();
    for (unsigned i : {0U, 1U})
      if (host_[i].context->heap->bytes_in_use() != 0)
        broken("side ", i, ": ", host_[i].context->heap->bytes_in_use(), " bytes did not come home");
    const std::string rules = fabric_.check();
    if (!rules.empty()) broken(rules);
  }

  /// What send() in place does, up to its wait. False: not offered.
  bool offer(unsigned i, std::size_t bytes) {
    InPlaceCall& call = offer_[i];
    Lane& lane = *lane_[i];
    if (call.is_under_way || bytes == 0 || !fabric_.alive(side(i))) return false;
    call.memory.resize(bytes);
    call.from = sent_[i];
    fill(call.memory.data(), bytes, stream(i), sent_[i]);
    if (lane.offer(call.memory.data(), static_cast<std::uint32_t>(bytes)) != Lane::Offered::yes) return false;
    call.is_under_way = true;
    ++totals_.offers;
    totals_.crossings += offer_[1 - i].is_under_way;
    return true;
  }
  /// What recv() in place does, likewise.
  bool read_in_place(unsigned i, std::size_t bytes) {
    InPlaceCall& call = read_[i];
    if (call.is_under_way || sink_[i].is_under_way || !fabric_.alive(side(i))) return false;
    lend_to_device(call, bytes, i);
    if (!lane_[i]->begin_read(call.memory.data(), bytes)) return false;
    call.is_under_way = true;
    return true;
  }
  /// What recv() does before it waits where the peer may write.
  bool advertise(unsigned i, std::size_t bytes) {
    InPlaceCall& call = sink_[i];
    if (call.is_under_way || read_[i].is_under_way || !fabric_.alive(side(i))) return false;
    lend_to_device(call, bytes, i);
    const Lane::Sunk sunk = lane_[i]->advertise(call.memory.data(), bytes);
    if (sunk == Lane::Sunk::not_pipelined) lane_[i]->wish_pipelined();
    if (sunk != Lane::Sunk::yes) return false;
    call.is_under_way = true;
    ++totals_.sinks;
    return true;
  }
  /// What send() does that finds a reader's memory.
  bool write(unsigned i, std::size_t bytes) {
    InPlaceCall& call = write_[i];
    Lane& lane = *lane_[i];
    if (call.is_under_way || offer_[i].is_under_way || bytes == 0 || !fabric_.alive(side(i)) || !lane.has_target()) return false;
    call.memory.resize(bytes);
    call.from = sent_[i];
    fill(call.memory.data(), bytes, stream(i), sent_[i]);
    call.is_under_way = lane.write(call.memory.data(), static_cast<std::uint32_t>(bytes)) == Lane::Offered::yes;
    return call.is_under_way;
  }
  /// The calls return that can; their programs write to the memory at once.
  void see_ends() {
    for (unsigned i : {0U, 1U}) {
      if (offer_[i].is_under_way && lane_[i]->has_offer_end()) {
        const Lane::OfferEnd end = lane_[i]->take_offer();
        sent_[i] = offer_[i].from + end.sent;
        totals_.whole += end.whole;
        totals_.cancelled += end.cancelled;
        totals_.refused += !end.whole && !end.cancelled;
        totals_.bytes += end.in_place;
        std::fill(offer_[i].memory.begin(), offer_[i].memory.end(), kLeft);
        offer_[i].is_under_way = false;
      }
      if (read_[i].is_under_way && lane_[i]->has_read()) {
        const std::uint32_t n = lane_[i]->take_read();
        verify(read_[i].memory.data(), n, stream(1 - i), received_[1 - i], "read in place");
        received_[1 - i] += n;
        std::fill(read_[i].memory.begin(), read_[i].memory.end(), kLeft);
        read_[i].is_under_way = false;
      }
      if (write_[i].is_under_way && lane_[i]->has_written()) {
        const std::uint32_t n = lane_[i]->take_written();
        sent_[i] = write_[i].from + n;
        totals_.written += n;
        std::fill(write_[i].memory.begin(), write_[i].memory.end(), kLeft);
        write_[i].is_under_way = false;
      }
      if (sink_[i].is_under_way && lane_[i]->has_sink_end()) {
        const bool cancelled = lane_[i]->zero_copy().sink.is_cancelled;
        const std::uint32_t n = lane_[i]->take_sunk();
        verify(sink_[i].memory.data(), n, stream(1 - i), received_[1 - i], "written in place");
        received_[1 - i] += n;
        totals_.placed += n;
        totals_.sinks_cancelled += cancelled;
        totals_.sinks_unused += n == 0 && !cancelled;
        std::fill(sink_[i].memory.begin(), sink_[i].memory.end(), kLeft);
        sink_[i].is_under_way = false;
      }
    }
  }

  Lane& lane(unsigned i) { return *lane_[i]; }
  const InPlaceTotals& totals() const { return totals_; }
  SimFabric& fabric() { return fabric_; }
  bool send_at_once(unsigned i, std::size_t bytes) {
    out_.resize(bytes);
    fill(out_.data(), bytes, stream(i), sent_[i]);
    const bool dead = lane_[i]->dead();
    if (!lane_[i]->send_at_once(out_.data(), static_cast<std::uint32_t>(bytes))) return false;
    if (dead) broken("a dead lane took bytes");
    if (is_lent(i)) broken("bytes passed an offer");
    sent_[i] += bytes;
    return true;
  }
  /// As a stream does, by the short way or the long one.
  std::size_t send(unsigned i, std::size_t bytes) {
    if (bytes != 0 && bytes <= Lane::kBurstSend && chance_.percent(50) && send_at_once(i, bytes)) return bytes;
    Lane& lane = *lane_[i];
    out_.resize(bytes);
    fill(out_.data(), bytes, stream(i), sent_[i]);
    std::array<iovec, 5> iov;
    const std::size_t pieces = cut(iov, out_);
    IovCursor from(iov.data(), pieces);
    const bool dead = lane.dead();
    const std::size_t n = lane.send(from);
    if (dead && n != 0) broken("a dead lane took bytes");
    if (n > bytes || (n < bytes && lane.may_send() && !lane.dead())) broken("send stopped before it had to");
    sent_[i] += n;
    if (n != 0 && is_lent(i)) broken("bytes passed an offer");
    return n;
  }
  std::size_t receive(unsigned i, std::size_t bytes, bool peek = false) {
    Lane& lane = *lane_[i];
    if (sink_[i].is_under_way) {  // the program's thread waits there
      lane.drain();
      see_ends();
      if (sink_[i].is_under_way) return 0;
    }
    in_.resize(bytes);
    std::array<iovec, 5> iov;
    const std::size_t pieces = cut(iov, in_);
    IovCursor to(iov.data(), pieces);
    const std::uint64_t unread = lane.unread();
    const auto n = static_cast<std::size_t>(lane.recv(to, !peek));
    if (n < std::min<std::size_t>(unread, bytes)) broken("recv gave ", n, " of ", unread, " unread bytes");
    verify(in_.data(), n, stream(1 - i), received_[1 - i], peek ? "peek" : "recv");
    if (!peek) received_[1 - i] += n;
    return n;
  }
  void drain_all() {
    for (bool more = true; more;) {
      more = false;
      for (unsigned i : {0U, 1U}) {
        while (receive(i, 1 << 16) != 0) more = true;
        if (lane_[i]->unread() == 0) lane_[i]->cancel_sink();
        if (lane_[i]->has_advert() && !(chance_.percent(50) && read_in_place(i, chance_.size(200'000)))) lane_[i]->refuse_advert();
      }
      if (fabric_.step()) more = true;
      see_ends();
      patience("while both sides read");
    }
    settle();
    for (unsigned i : {0U, 1U})
      if (is_lent(i) || read_[i].is_under_way || sink_[i].is_under_way) broken("side ", i, " waits though both sides read");
  }
  /// Nobody sends payload or reads: the lanes must fall silent.
  void settle() {
    for (int round = 0; fabric_.run_until_idle() != 0; ++round) {
      for (Lane* lane : lane_) lane->drain();
      if (round > 50) broken("two idle lanes go on talking");
    }
  }

 private:
  void patience(const char* when) {
    if (++actions_ > 3'000'000) broken("no end ", when);
  }
  static Side side(unsigned i) { return i == 0 ? Side::a : Side::b; }
  bool up(unsigned i) { return lane_[i]->conn.state() == ConnState::established; }
  std::uint64_t stream(unsigned i) const { return seed_ * 2 + i; }
  std::size_t cut(std::array<iovec, 5>& iov, std::vector<std::byte>& bytes) {
    std::size_t pieces = 0, at = 0;
    while (pieces + 1 < iov.size() && at < bytes.size() && chance_.percent(40)) {
      const std::size_t n = chance_.pick(0, bytes.size() - at);
      iov[pieces++] = {bytes.data() + at, n};
      at += n;
    }
    iov[pieces++] = {bytes.data() + at, bytes.size() - at};
    return pieces;
  }

  void discard(unsigned i, std::size_t bytes) {
    if (!sink_[i].is_under_way) received_[1 - i] += lane_[i]->discard(bytes);
  }
  bool is_lent(unsigned i) const { return offer_[i].is_under_way || write_[i].is_under_way; }
  static void lend_to_device(InPlaceCall& call, std::size_t bytes, unsigned i) {
    if (std::any_of(call.memory.begin(), call.memory.end(), [](std::byte b) { return b != kLeft; }))
      broken("side ", i, "'s memory was written to when it was the program's again");
    call.memory.assign(bytes, kLeft);
  }

  void act(unsigned reading) {
    const auto i = static_cast<unsigned>(chance_.pick(0, 1));
    if (!fabric_.alive(side(i))) {
      fabric_.step();
      return;
    }
    if (chance_.percent(50)) {
      for (std::uint64_t n = chance_.pick(0, 30); n > 0; --n) fabric_.step();
    } else if (chance_.percent(in_place_)) {
      act_in_place(i);
    } else if (chance_.percent(50)) {
      send(i, chance_.size(100'000));
    } else if (chance_.percent(reading)) {
      const std::size_t n = chance_.size(100'000);
      switch (chance_.pick(0, 7)) {
        case 0:
          discard(i, n);
          break;
        case 1:
          receive(i, n, true);
          break;
        default:
          receive(i, n);
      }
    } else {
      lane_[i]->drain();
    }
  }

  void act_in_place(unsigned i) {
    if (chance_.percent(sinks_)) return act_by_sinks(i);
    const std::uint64_t what = chance_.pick(0, 29);
    if (what == 0 && lane_[i]->is_offering())
      lane_[i]->cancel_offer();
    else if (what == 1)
      lane_[i]->refuse_advert();
    else if (what < 20)
      (void)read_in_place(i, chance_.size(300'000));
    else
      (void)offer(i, chance_.size(300'000));
  }

  void act_by_sinks(unsigned i) {
    const std::uint64_t what = chance_.pick(0, 39);
    if (what == 0)
      lane_[i]->leave_writing();
    else if (what == 1)
      lane_[i]->cancel_sink();
    else if (lane_[i]->has_target())
      (void)write(i, chance_.size(300'000));
    else if (lane_[i]->unread() != 0)
      receive(i, chance_.size(300'000));
    else
      (void)advertise(i, limits_.conn.recv_size_max + chance_.size(300'000));
  }

  /// Both have stopped their lanes and tell each other how far they are: what one does not have the other does.
  void recover() {
    for (unsigned i : {0U, 1U}) lane_[i]->stop();
    for (unsigned i : {0U, 1U}) {
      see_ends();
      if (is_lent(i) || read_[i].is_under_way || sink_[i].is_under_way) broken("side ", i, " waits on a lane that is stopped");
    }
    for (unsigned i : {0U, 1U}) {
      receive_rest(1 - i);
      const std::uint64_t arrived = lane_[1 - i]->rx_arrived(), sent = lane_[i]->tx_bytes();
      if (sent != sent_[i]) broken("side ", i, " counts ", sent, " bytes, its calls have sent ", sent_[i]);
      if (arrived != received_[i] || arrived > sent) broken("side ", i, ": ", arrived, " of ", sent, " bytes arrived");
      std::vector<std::byte> rest(sent - arrived);
      if (!lane_[i]->read_back(arrived, rest.data(), rest.size())) broken("bytes of side ", i, " are not to be had again");
      verify(rest.data(), rest.size(), stream(i), arrived, "read_back");
    }
  }
  void receive_rest(unsigned i) {
    while (receive(i, 1 << 16) != 0) {
    }
  }

  void close_politely() {
    for (unsigned i : {0U, 1U}) {
      lane_[i]->conn.want_disconn();
      lane_[i]->send_due_control();
    }
    fabric_.run_until_idle();
    for (Lane* lane : lane_) lane->drain();
    for (unsigned i : {0U, 1U}) {
      if (!lane_[i]->peer_disconn() || lane_[i]->conn.state() != ConnState::closed)
        broken("side ", i, " is not closed: ", to_string(lane_[i]->conn.state()), " ", lane_[i]->conn.error());
      if (lane_[i]->dead()) broken("side ", i, " died: ", lane_[i]->conn.error());
    }
  }

  void strike() {
    if (lane_[0] == nullptr) return;  // the test was faster
    const auto i = static_cast<unsigned>(chance_.pick(0, 1));
    struck_ = true;
    totals_.in_the_middle += is_lent(0) || is_lent(1) || sink_[0].is_under_way || sink_[1].is_under_way;
    if (fault_ == Fault::broken_link)
      fabric_.break_qp(lane_[i]->qp());
    else if (fault_ == Fault::removed_device)
      fabric_.remove_device(side(i));
    else
      fabric_.kill(side(i));
    hit_ = i;
  }

  /// Whatever happened: what arrived is a prefix (receive() checks that), and nobody goes on as if nothing had been.
  void end_badly() {
    for (bool more = true; more;) {
      more = fabric_.step();
      for (unsigned i : {0U, 1U})
        while (fabric_.alive(side(i)) && receive(i, 1 << 16) != 0) more = true;
      see_ends();
      patience("after the fault");
    }
    if (in_place_ != 0 && fault_ != Fault::dead_peer) return recover();
    for (unsigned i : {0U, 1U}) {
      if (lane_[i]->is_lent() || lane_[i]->has_sink()) lane_[i]->stop();
      see_ends();
      if (received_[i] > sent_[i]) broken("more arrived than was sent");
    }
    if (fault_ == Fault::refused_posts) {
      for (unsigned i : {0U, 1U})
        if (lane_[i]->dead()) expect_reason(i);
      if (!lane_[0]->dead() && !lane_[1]->dead() && (received_[0] != sent_[0] || received_[1] != sent_[1]))
        broken("bytes are missing and no lane is dead");
      return;
    }
    if (!struck_) return;
    // The end is noticed at the latest when the survivor says something.
    for (unsigned i : {0U, 1U}) {
      if (!fabric_.alive(side(i)) || lane_[i]->dead()) continue;
      for (int tries = 0; tries < 300 && !lane_[i]->dead() && send(i, 1) == 1; ++tries) {
        fabric_.run_until_idle();
        lane_[i]->drain();
      }
    }
    for (unsigned i : {0U, 1U}) {
      if (!fabric_.alive(side(i))) continue;
      if (lane_[i]->dead()) {
        expect_reason(i);
        if (send(i, 100) != 0) broken("a dead lane took bytes");
      } else if (lane_[i]->may_send()) {
        broken("side ", i, " does not notice that side ", hit_, " is gone");
      }
    }
  }
  void expect_reason(unsigned i) {
    if (!lane_[i]->dead() || lane_[i]->failure()[0] == '\0')
      broken("side ", i, " is dead without a reason, state ", to_string(lane_[i]->conn.state()));
  }

  static constexpr std::byte kLeft{0x5A};  ///< what programs write to memory that is theirs again

  std::uint64_t seed_;
  Fault fault_;
  unsigned in_place_, sinks_;
  Chance chance_;
  SimFabric fabric_;
  LaneLimits limits_;
  std::array<LaneHost, 2> host_;
  std::array<Lane*, 2> lane_{};
  std::array<std::uint64_t, 2> sent_{}, received_{};  ///< by sending side
  std::array<InPlaceCall, 2> offer_, read_, sink_, write_;
  InPlaceTotals totals_;
  std::vector<std::byte> out_, in_;
  std::uint64_t actions_ = 0;
  bool struck_ = false;
  unsigned hit_ = 0;
};

/// What the seed makes of the world. Half of the devices take any message inline, half make the lane gather it.
Case case_of(std::uint64_t seed, Fault fault) {
  Chance chance(seed * 77 + 5);
  Case c;
  c.fault = fault;
  c.limits.conn.recv_size = 256U << chance.pick(0, 3);
  c.limits.conn.recv_size_max = c.limits.conn.recv_size << chance.pick(0, 3);
  c.limits.conn.recv_buffers = static_cast<std::uint16_t>(chance.pick(4, 16));
  c.limits.recv_buffers_max =
      static_cast<std::uint16_t>(c.limits.conn.recv_buffers + (chance.percent(50) ? chance.pick(0, 48) : 0));
  c.fabric.seed = seed;
  c.fabric.flavour = chance.percent(50) ? rdma::NodeType::ib_ca : rdma::NodeType::rnic;
  c.fabric.recv_prefix_bytes = chance.percent(50) ? 8 : 0;
  c.fabric.recv_needs_extent = chance.percent(50);
  c.fabric.rdma_write_wakes = chance.percent(50);
  c.fabric.max_inline = chance.percent(50) ? c.limits.conn.recv_size_max : static_cast<std::uint32_t>(chance.pick(32, 200));
  c.limits.staging = std::size_t{4} * c.limits.conn.recv_size_max;
  c.fabric.max_sge = static_cast<std::uint32_t>(chance.pick(2, 8));
  c.fabric.max_send_wr = 1024;
  c.fabric.delay_max = static_cast<rdma::Nanos>(chance.percent(30) ? 200 : chance.pick(300, 20'000));
  c.fabric.rnr_retry = false;  // the credits must see to it that a receive is posted
  if (fault == Fault::refused_posts) c.fabric.fail_post_percent = static_cast<unsigned>(chance.pick(1, 30));
  return c;
}

void run_seeds(const char* name, Fault fault, std::uint64_t count) {
  for_each_seed(name, count, [fault](std::uint64_t seed) {
    Rig rig(seed, case_of(seed, fault));
    rig.run();
  });
}

}  // namespace

namespace {

/// Sends and receives in place, among others. Half of the devices take only few reads at a time.
Case in_place_case(std::uint64_t seed, Fault fault) {
  Case c = case_of(seed, fault);
  Chance chance(seed * 31 + 11);
  c.in_place = static_cast<unsigned>(chance.pick(10, 100));
  c.limits.zero_copy_from = 1;
  c.fabric.recv_needs_extent = false;
  c.fabric.max_read_outstanding = static_cast<std::uint32_t>(chance.pick(1, 8));
  return c;
}

InPlaceTotals run_in_place(const char* name, Fault fault, std::uint64_t count, bool sinks = false) {
  InPlaceTotals all;
  for_each_seed(name, count, [&](std::uint64_t seed) {
    Case c = in_place_case(seed, fault);
    if (sinks) c.sinks = static_cast<unsigned>(30 + seed % 71);
    Rig rig(seed, c);
    rig.run();
    const InPlaceTotals& t = rig.totals();
    all.offers += t.offers;
    all.whole += t.whole;
    all.cancelled += t.cancelled;
    all.refused += t.refused;
    all.bytes += t.bytes;
    all.crossings += t.crossings;
    all.in_the_middle += t.in_the_middle;
    all.sinks += t.sinks;
    all.sinks_cancelled += t.sinks_cancelled;
    all.sinks_unused += t.sinks_unused;
    all.written += t.written;
    all.placed += t.placed;
  });
  BOOST_TEST_MESSAGE(name << ": " << all.offers << " offers, " << all.whole << " whole, " << all.cancelled << " cancelled, "
                          << all.refused << " refused, " << all.crossings << " crossing, " << all.bytes << " bytes in place, "
                          << all.in_the_middle << " faults in the middle, " << all.sinks << " sinks, " << all.sinks_cancelled
                          << " cancelled, " << all.sinks_unused << " unused, " << all.placed << " bytes of " << all.written
                          << " written");
  return all;
}

}  // namespace

BOOST_AUTO_TEST_CASE(what_crosses_in_place_is_whole_and_the_memory_is_left_alone_afterwards) {
  const InPlaceTotals all = run_in_place("in_place", Fault::none, 3000);
  if (Seeds(3000).count < 1000) return;  // a replay
  BOOST_TEST(all.whole > 400U);
  BOOST_TEST(all.cancelled > 400U);
  BOOST_TEST(all.refused > 400U);
  BOOST_TEST(all.crossings > 200U);
  BOOST_TEST(all.bytes > 10'000'000U);
}

BOOST_AUTO_TEST_CASE(what_is_written_where_a_reader_waits_is_whole_and_the_memory_is_left_alone_afterwards) {
  const InPlaceTotals all = run_in_place("sinks", Fault::none, 3000, true);
  if (Seeds(3000).count < 1000) return;  // a replay
  BOOST_TEST(all.written == all.placed);
  BOOST_TEST(all.placed > 2'000'000U);
  BOOST_TEST(all.sinks_cancelled > 400U);
  BOOST_TEST(all.sinks_unused > 400U);
  BOOST_TEST(all.bytes > 1'000'000U, "what is offered crosses beside it");
}

BOOST_AUTO_TEST_CASE(a_lane_that_fails_in_the_middle_of_a_write_loses_nothing) {
  for (const Fault fault : {Fault::refused_posts, Fault::broken_link, Fault::removed_device}) {
    const InPlaceTotals all = run_in_place("sinks_fault", fault, 1500, true);
    if (Seeds(1500).count < 1000) continue;
    BOOST_TEST(all.placed > 300'000U);
    if (fault != Fault::refused_posts) BOOST_TEST(all.in_the_middle > 20U);
  }
}

BOOST_AUTO_TEST_CASE(a_peer_that_dies_in_the_middle_of_a_write_leaves_nobody_waiting) {
  BOOST_TEST(run_in_place("sinks_death", Fault::dead_peer, 1000, true).sinks > 0U);
}

BOOST_AUTO_TEST_CASE(a_lane_that_fails_in_the_middle_of_an_offer_loses_nothing) {
  for (const Fault fault : {Fault::refused_posts, Fault::broken_link, Fault::removed_device}) {
    const InPlaceTotals all = run_in_place("in_place_fault", fault, 1000);
    if (Seeds(1000).count < 1000) continue;
    BOOST_TEST(all.bytes > 1'000'000U);
    if (fault != Fault::refused_posts) BOOST_TEST(all.in_the_middle > 20U);
  }
}

BOOST_AUTO_TEST_CASE(a_peer_that_dies_in_the_middle_of_an_offer_leaves_nobody_waiting) {
  BOOST_TEST(run_in_place("in_place_death", Fault::dead_peer, 1000).offers > 0U);
}

BOOST_AUTO_TEST_CASE(bytes_arrive_in_order_and_once) { run_seeds("in_order_and_once", Fault::none, 1500); }

BOOST_AUTO_TEST_CASE(both_may_send_without_reading_and_nobody_is_stuck) {
  for_each_seed("no_deadlock", 300, [](std::uint64_t seed) {
    Rig rig(seed, case_of(seed, Fault::none));
    rig.fill_and_drain(2);
    rig.finish();
    rig.come_home();
  });
}

BOOST_AUTO_TEST_CASE(refused_posts_end_a_lane_with_a_reason) { run_seeds("refused_posts", Fault::refused_posts, 400); }
BOOST_AUTO_TEST_CASE(a_broken_link_ends_both_lanes) { run_seeds("broken_link", Fault::broken_link, 400); }
BOOST_AUTO_TEST_CASE(a_removed_device_ends_both_lanes) { run_seeds("removed_device", Fault::removed_device, 400); }
BOOST_AUTO_TEST_CASE(a_dead_peer_ends_the_lane) { run_seeds("dead_peer", Fault::dead_peer, 400); }

BOOST_AUTO_TEST_CASE(buffers_grow_under_load) {
  Case c = case_of(3, Fault::none);
  c.limits.conn.recv_size = 512;
  c.limits.conn.recv_size_max = c.fabric.max_inline = 8192;
  c.limits.conn.recv_buffers = 8;
  c.limits.recv_buffers_max = 32;
  Rig rig(3, c);
  const std::size_t memory = rig.lane(1).memory_bytes();
  BOOST_TEST(rig.lane(0).conn.max_payload() == 512 - wire::kBsdhBytes);
  BOOST_TEST(rig.lane(1).recv_credits() == 8U);
  for (int i = 0; i < 200; ++i) {
    rig.send(0, 20'000);
    rig.drain_all();
  }
  BOOST_TEST(rig.lane(0).conn.max_payload() == 8192 - wire::kBsdhBytes, "the sender got its ChRcvBufAck");
  BOOST_TEST(rig.lane(1).memory_bytes() > memory);
  rig.fill_and_drain(1);  // a reader that lags gets more buffers
  rig.lane(1).settle();
  BOOST_TEST(rig.lane(1).recv_credits() == 32U);
  // Hello's own buffer stays small and is not posted again.
  BOOST_TEST(rig.lane(1).memory_bytes() >= 32 * 8192U);
  BOOST_TEST(rig.lane(1).memory_bytes() <= 32 * (8192U + 64) + 512 + 64);
  rig.finish();
  rig.come_home();
}

namespace {
Case with_sizes(std::uint32_t recv_size, std::uint32_t recv_size_max) {
  Case c = case_of(3, Fault::none);
  c.limits.conn.recv_size = recv_size;
  c.limits.conn.recv_size_max = c.fabric.max_inline = recv_size_max;
  c.limits.staging = std::size_t{4} * recv_size_max;
  return c;
}
/// How many messages a send takes, with a reader that reads everything.
std::uint64_t messages_of(Rig& rig, std::size_t bytes) {
  const std::uint64_t before = rig.lane(0).tx_messages();
  while (bytes != 0) {
    bytes -= rig.send(0, bytes);
    rig.drain_all();
  }
  return rig.lane(0).tx_messages() - before;
}
}  // namespace

BOOST_AUTO_TEST_CASE(sends_that_do_not_fit_grow_the_buffers_to_their_size) {
  Rig rig(3, with_sizes(2048, 65536));
  BOOST_TEST(messages_of(rig, 4096) >= 3U);
  for (int i = 0; i < 8; ++i) messages_of(rig, 4096);
  BOOST_TEST(rig.lane(0).conn.max_payload() >= 4096U);
  BOOST_TEST(rig.lane(0).conn.max_payload() <= 8192U, "larger than what is sent needs them");
  BOOST_TEST(messages_of(rig, 4096) <= 5U);  // cut where its pieces are too many for one message
  for (int i = 0; i < 16; ++i) messages_of(rig, 30'000);
  BOOST_TEST(rig.lane(0).conn.max_payload() >= 30'000U);
  rig.finish();
  rig.come_home();
}

BOOST_AUTO_TEST_CASE(small_sends_with_a_large_one_now_and_then_do_not_grow_the_buffers) {
  Rig rig(3, with_sizes(2048, 65536));
  for (int i = 0; i < 1000; ++i) messages_of(rig, i % 10 == 0 ? 6000 : 64);
  for (int i = 0; i < 100; ++i) messages_of(rig, 2048 - wire::kBsdhBytes - kMarkBytes);
  BOOST_TEST(rig.lane(0).conn.max_payload() == 2048 - wire::kBsdhBytes);
  rig.finish();
  rig.come_home();
}

BOOST_AUTO_TEST_CASE(a_wish_that_was_not_granted_in_full_is_not_repeated) {
  for (const std::uint32_t granted : {2048U, 16384U}) {
    Case c = with_sizes(2048, 65536);
    c.far_size_max = granted;
    Rig rig(3, c);
    for (int i = 0; i < 20; ++i) messages_of(rig, 60'000);
    BOOST_TEST(rig.lane(0).conn.max_payload() == granted - wire::kBsdhBytes);
    for (int i = 0; i < 20; ++i) {
      rig.send(0, 60'000);
      BOOST_TEST(!rig.lane(0).conn.resize_pending());
      rig.drain_all();
    }
    rig.finish();
    rig.come_home();
  }
}

namespace {
/// Small enough for what gathers small sends, without a byte that goes inline beside the words.
Case with_gathering() {
  Case c = with_sizes(2048, 2048);
  c.fabric.max_inline = 32;
  return c;
}
}  // namespace

BOOST_AUTO_TEST_CASE(small_sends_behind_unacknowledged_ones_go_together) {
  constexpr std::uint32_t kSends = 200, kBytes = 10;
  Rig rig(3, with_gathering());
  for (std::uint32_t i = 0; i < kSends; ++i) BOOST_REQUIRE_EQUAL(rig.send(0, kBytes), kBytes);
  BOOST_TEST(rig.lane(0).tx_messages() == Lane::kGatherFrom);
  BOOST_TEST(rig.lane(0).held() == (kSends - Lane::kGatherFrom) * kBytes);
  rig.settle();
  BOOST_TEST(rig.lane(0).held() != 0U);
  // A reader that has what is there, and waits, acknowledges it: the rest follows though the sender makes no call.
  BOOST_TEST(rig.receive(1, 1 << 16) == Lane::kGatherFrom * kBytes);
  rig.lane(1).settle();
  rig.settle();
  BOOST_TEST(rig.lane(0).held() == 0U);
  BOOST_TEST(rig.lane(0).tx_messages() == Lane::kGatherFrom + 1);
  BOOST_TEST(rig.receive(1, 1 << 16) == (kSends - Lane::kGatherFrom) * kBytes);
  rig.finish();
  rig.come_home();
}

BOOST_AUTO_TEST_CASE(the_short_way_is_for_what_is_a_message_of_its_own) {
  Rig rig(3, with_gathering());
  BOOST_REQUIRE_EQUAL(rig.send(0, 10), 10U);  // by the long way if there is no memory to send from yet
  while (rig.lane(0).tx_messages() < Lane::kGatherFrom) BOOST_REQUIRE(rig.send_at_once(0, 10));
  BOOST_TEST(!rig.send_at_once(0, 10), "it has to wait for others");
  BOOST_TEST(!rig.send_at_once(0, rig.lane(0).conn.max_payload() + 1), "it takes two");
  BOOST_REQUIRE_EQUAL(rig.send(0, 10), 10U);
  BOOST_TEST(rig.lane(0).held() == 10U);
  BOOST_TEST(!rig.send_at_once(0, rig.lane(0).conn.max_payload()), "it would pass what waits");
  rig.finish();
  rig.come_home();
}

BOOST_AUTO_TEST_CASE(held_bytes_go_with_what_the_program_does_next) {
  enum class Next : std::uint8_t { waits, receives, sends_more, sends_much };
  for (const Next next : {Next::waits, Next::receives, Next::sends_more, Next::sends_much}) {
    Rig rig(3, with_gathering());
    for (int i = 0; i < 20; ++i) rig.send(0, 10);
    BOOST_TEST(rig.lane(0).held() != 0U);
    const std::uint64_t before = rig.lane(0).tx_messages();
    switch (next) {
      case Next::waits:
        rig.lane(0).settle();
        break;
      case Next::receives:
        rig.receive(0, 1);
        break;
      case Next::sends_more:
        for (int i = 0; i < 200; ++i) rig.send(0, 10);
        break;
      case Next::sends_much:
        rig.send(0, 1500);
        break;
    }
    BOOST_TEST(rig.lane(0).tx_messages() > before);
    rig.finish();
    rig.come_home();
  }
}

BOOST_AUTO_TEST_CASE(held_bytes_can_be_taken_back_and_are_read_back_after_a_failure) {
  std::vector<std::byte> bytes(300);
  fill(bytes.data(), bytes.size(), 7, 0);
  for (const bool fails : {false, true}) {
    Rig rig(3, with_gathering());
    Lane& lane = rig.lane(0);
    for (std::size_t at = 0; at < bytes.size(); at += 10) {
      const iovec piece{bytes.data() + at, 10};
      IovCursor from(&piece, 1);
      BOOST_REQUIRE_EQUAL(lane.send(from), 10U);
    }
    const std::uint32_t held = lane.held();
    BOOST_REQUIRE(held != 0);
    BOOST_TEST(lane.tx_bytes() == bytes.size());
    BOOST_TEST(lane.unacknowledged() == Lane::kGatherFrom + 1);
    std::vector<std::byte> out(bytes.size());
    if (fails) {
      lane.stop();
      BOOST_TEST(lane.unacknowledged() == Lane::kGatherFrom + 1);
      BOOST_REQUIRE(lane.read_back(0, out.data(), out.size()));
      BOOST_TEST(out == bytes);
    } else {
      lane.take_held(out.data());
      BOOST_TEST(lane.tx_bytes() == bytes.size() - held);
      BOOST_TEST(std::equal(out.begin(), out.begin() + held, bytes.end() - held));
    }
    BOOST_TEST(lane.held() == 0U);
    rig.come_home();
  }
}

BOOST_AUTO_TEST_CASE(more_messages_than_the_send_queue_holds) {
  for (const auto flavour : {rdma::NodeType::ib_ca, rdma::NodeType::rnic}) {
    Case c = case_of(4, Fault::none);
    c.fabric.flavour = flavour;
    Rig rig(4, c);
    for (int i = 0; i < 3000; ++i) {
      if (rig.send(0, 1) != 1) {
        rig.drain_all();
        BOOST_REQUIRE_EQUAL(rig.send(0, 1), 1U);
      }
      if (i % 3 == 0) rig.drain_all();
    }
    rig.finish();
    rig.come_home();
  }
}

}  // namespace sdp::sim
