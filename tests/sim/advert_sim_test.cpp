// Two peers that both send and receive by adverts of every kind, driven by one seed: messages and RDMA Writes arrive in order after
// any delay, RDMA Reads take any time, and cancels, refusals, Data and changes of mode come at any moment. What one sends the other
// gets, in order and once; no memory is read or written after its owner had it back; nobody waits for ever.
#include <deque>
#include <map>
#include <vector>

#include "sdp/adverts.hpp"
#include "tests/sim/seeds.hpp"

namespace sdp::sim {
namespace {

using Kind = DueAdvert::Kind;

/// Bytes are their positions in the stream of their direction.
using Bytes = std::vector<std::uint32_t>;

struct Message {
  enum class What : std::uint8_t { data, src_avail, sink_avail, due, rdma_write } what = What::data;
  std::uint32_t mseq = 0, mseq_ack = 0;
  Bytes payload;
  wire::SrcAvail src;
  wire::SinkAvail sink;
  DueAdvert due;
  bool for_source = false;  ///< due: it is the receiver's source half that it concerns
};

constexpr std::uint32_t kBuffer = 8;  ///< payload of a Data
constexpr std::size_t kReadsAtOnce = 3;

class Peer {
 public:
  Peer(unsigned me, Chance& chance, std::uint32_t total, unsigned adverts, bool modes)
      : me_(me), chance_(chance), total_(total), modes_(modes) {
    source_.start(adverts, kBuffer);
    sink_.start(adverts, adverts);
  }
  void meet(Peer& other) { other_ = &other; }

  /// One step of this peer's, chosen by chance; false: it had nothing to do.
  bool step(bool quiet) {
    switch (chance_.pick(0, 9)) {
      case 0:
      case 1:
      case 2:
        return take();
      case 3:
      case 4:
        return send_due();
      case 5:
        return send();
      case 6:
      case 7:
        return read();
      default:
        return quiet ? false : disturb();
    }
  }
  bool is_done() const { return sent_ == total_ && !source_.is_open() && delivered_ == other_->total_; }
  std::string where() const {
    return "peer " + std::to_string(me_) + " sent " + std::to_string(sent_) + "/" + std::to_string(total_) + " got " +
           std::to_string(delivered_) + " open " + std::to_string(source_.is_open()) + std::to_string(sink_.is_open()) + " modes " +
           std::to_string(static_cast<int>(source_.mode())) + std::to_string(static_cast<int>(sink_.mode()));
  }
  std::map<std::string, unsigned> seen;

 private:
  void post(Message m) {
    if (m.what != Message::What::rdma_write) m.mseq = ++mseq_;
    m.mseq_ack = received_;
    out_.push_back(std::move(m));
  }
  Bytes positions(std::uint32_t from, std::uint32_t n) const {
    Bytes b(n);
    for (std::uint32_t i = 0; i < n; ++i) b[i] = from + i;
    return b;
  }

  bool send_due() {
    const bool first = chance_.percent(50);
    for (const bool of_source : {first, !first}) {
      const DueAdvert due = of_source ? source_.next() : sink_.next();
      if (due.kind == Kind::none) continue;
      // What is due of a source half concerns the peer's sink half.
      Message m{.what = Message::What::due, .due = due, .for_source = !of_source};
      post(m);
      of_source ? source_.sent(due, mseq_) : sink_.sent(due, mseq_);
      ++seen["sent " + std::to_string(static_cast<int>(due.kind))];
      return true;
    }
    return false;
  }

  bool send() {
    if (sent_ == total_ && !source_.write_target()) return false;
    const std::uint32_t left = total_ - sent_;
    if (left == 0) return false;
    if (const auto target = source_.write_target(); target && chance_.percent(80)) {
      const auto n = static_cast<std::uint32_t>(chance_.pick(1, std::min(left, target->room)));
      Message m{.what = Message::What::rdma_write, .payload = positions(sent_, n)};
      m.sink.address = target->address;
      post(m);
      sent_ += n;
      advertised_ = sent_;
      source_.on_written(n, sent_ != total_ && chance_.percent(70));
      moved_seen_ = source_.moved();
      ++seen["written"];
      return true;
    }
    if (left > 2 && chance_.percent(60) && source_.may_advertise(sink_.is_open())) {
      const std::uint32_t ahead = advertised_ - sent_;
      if (left <= ahead + 2) return false;
      const auto len = static_cast<std::uint32_t>(chance_.pick(2, std::min<std::uint32_t>(left - ahead, 40)));
      const std::uint32_t in_line =
          source_.mode() == FlowMode::combined ? static_cast<std::uint32_t>(chance_.pick(1, std::min(len - 1, kBuffer))) : 0;
      const std::uint32_t from = sent_ + ahead;
      Message m{.what = Message::What::src_avail, .payload = positions(from, in_line), .src = {len, 1, 1000 + from}};
      post(m);
      source_.on_advert_sent(len, in_line);
      sent_ += in_line;
      advertised_ = from + len;
      ++seen["advertised"];
      return true;
    }
    if (source_.write_target() && !source_.may_send_data()) {  // partly written: that one is to be finished first
      source_.on_written(0, false);
      return true;
    }
    if (!source_.may_send_data()) return false;
    const auto n = static_cast<std::uint32_t>(chance_.pick(1, std::min(left, kBuffer)));
    post({.what = Message::What::data, .payload = positions(sent_, n)});
    source_.on_data_sent();
    sent_ += n;
    advertised_ = sent_;
    return true;
  }

  /// The program reads what is there, and by RDMA what is advertised behind it.
  bool read() {
    if (!reads_.empty() && (reads_.size() == kReadsAtOnce || chance_.percent(70))) {
      // The read has taken its time; the memory must still be there.
      const Read r = reads_.front();
      reads_.pop_front();
      auto n = r.is_cut ? static_cast<std::uint32_t>(chance_.pick(0, r.bytes)) : r.bytes;
      if (!other_->owns_out(r.from, r.bytes)) broken("a read of memory that is the program's again");
      sink_.read_done(r.bytes, n);
      if (was_cut_) n = 0;  // there is a gap before it
      was_cut_ = (was_cut_ || n != r.bytes) && !reads_.empty();
      for (std::uint32_t i = 0; i < n; ++i) deliver(r.from + i);
      return true;
    }
    if (!queue_.empty()) {
      auto n = chance_.pick(1, queue_.size());
      for (; n != 0; --n) {
        deliver(queue_.front());
        queue_.pop_front();
      }
      return true;
    }
    if (const auto next = sink_.next_read(); next.left != 0) {
      reads_.push_back({static_cast<std::uint32_t>(next.address - 1000), static_cast<std::uint32_t>(chance_.pick(1, next.left)),
                        chance_.percent(5)});
      sink_.read_started(reads_.back().bytes);
      ++seen[reads_.size() > 1 ? "read behind another" : "read"];
      return true;
    }
    return false;
  }

  bool disturb() {
    switch (chance_.pick(0, 11)) {
      case 0:
        if (source_.want_cancel()) ++seen["cancel"];
        return true;
      case 1:
        if (sink_.want_send_sm()) ++seen["refused"];
        return true;
      case 2:
      case 3:
      case 4:
        if (sink_.may_advertise() && queue_.empty() && sinks_.size() < kAdvertsHeld) {
          const auto len = static_cast<std::uint32_t>(chance_.pick(kBuffer, 40));
          sinks_.push_back({next_sink_, len, {}});
          Message m{.what = Message::What::sink_avail, .sink = {len, 1, next_sink_, sink_.non_discards()}};
          next_sink_ += 1000;
          post(m);
          sink_.on_sink_avail_sent(len);
          ++seen["sink"];
        }
        return true;
      case 5:
        if (sink_.want_sink_cancel()) ++seen["sink cancel"];
        return true;
      case 6:
      case 7:
        if (modes_) source_.want_mode(static_cast<FlowMode>(chance_.pick(0, 2)));
        return true;
      case 8:
        if (modes_) sink_.want_combined();
        return true;
      default:
        return true;
    }
  }

  bool take() {
    if (other_->out_.empty()) return false;
    Message m = std::move(other_->out_.front());
    other_->out_.pop_front();
    if (m.what == Message::What::rdma_write) {
      for (Buffer& b : sinks_) {
        if (m.sink.address < b.address || m.sink.address >= b.address + b.len) continue;
        if (m.sink.address - b.address != b.got.size() || b.got.size() + m.payload.size() > b.len)
          broken("a write that does not fit");
        b.got.insert(b.got.end(), m.payload.begin(), m.payload.end());
        return true;
      }
      broken("a write to memory that is the program's again");
    }
    if (m.mseq != received_ + 1) broken("the test lost a message");
    received_ = m.mseq;
    source_.on_ack(m.mseq_ack);
    sink_.on_ack(m.mseq_ack);
    switch (m.what) {
      case Message::What::data:
        on_payload(m);
        break;
      case Message::What::src_avail: {
        const auto rx = sink_.on_src_avail(m.src, static_cast<std::uint32_t>(m.payload.size()));
        check(rx != SinkAdverts::Rx::error, "SrcAvail");
        queue_.insert(queue_.end(), m.payload.begin(), m.payload.end());
        if (source_.is_open() && source_.want_cancel()) ++seen["crossing"];
        if (rx == SinkAdverts::Rx::dropped) ++seen["dropped"];
        break;
      }
      case Message::What::sink_avail:
        on_source(source_.on_sink_avail(m.sink), "SinkAvail");
        break;
      default:
        on_due(m);
    }
    complete();
    return true;
  }

  void on_payload(const Message& m) {
    const auto rx = sink_.on_payload(static_cast<std::uint32_t>(m.payload.size()));
    check(rx != SinkAdverts::Rx::error, "Data");
    if (rx == SinkAdverts::Rx::queue) {
      queue_.insert(queue_.end(), m.payload.begin(), m.payload.end());
      return;
    }
    if (!sinks_.front().got.empty()) broken("Data into a buffer that is partly written");
    sinks_.front().got = m.payload;
    ++seen["placed"];
  }

  void on_due(const Message& m) {
    switch (m.due.kind) {
      case Kind::rd_compl:
        return on_source(source_.on_rdma_rd_compl(m.due.bytes), "RdmaRdCompl");
      case Kind::send_sm:
        return on_source(source_.on_send_sm(), "SendSm");
      case Kind::sink_cancel:
        return on_source(source_.on_sink_avail_cancel(), "SinkAvailCancel");
      case Kind::mode_change:
        if (m.for_source) return on_source(source_.on_mode_change(m.due.mode), "ModeChange");
        return check(sink_.on_mode_change(m.due.mode) != SinkAdverts::Rx::error, "ModeChange");
      case Kind::wr_compl:
        return check(sink_.on_rdma_wr_compl(m.due.bytes) != SinkAdverts::Rx::error, "RdmaWrCompl");
      case Kind::src_cancel:
        return check(sink_.on_src_avail_cancel() != SinkAdverts::Rx::error, "SrcAvailCancel");
      case Kind::sink_cancel_ack:
        return check(sink_.on_sink_cancel_ack() != SinkAdverts::Rx::error, "SinkCancelAck");
      case Kind::none:
        break;
    }
  }

  void on_source(SourceAdverts::Rx rx, const char* what) {
    check(rx != SourceAdverts::Rx::error, what);
    sent_ += static_cast<std::uint32_t>(source_.moved() - moved_seen_);
    moved_seen_ = source_.moved();
    if (rx == SourceAdverts::Rx::over) advertised_ = sent_;
  }

  /// Sink buffers that are finished, in order.
  void complete() {
    while (const auto bytes = sink_.take_completed()) {
      const Buffer b = sinks_.front();
      sinks_.pop_front();
      if (b.got.size() != *bytes) broken("a buffer with ", b.got.size(), " bytes is finished with ", *bytes);
      if (!queue_.empty()) broken("a buffer passes what is queued");
      for (const std::uint32_t p : b.got) deliver(p);
    }
  }

  void deliver(std::uint32_t position) {
    if (position != delivered_) broken(where(), ": byte ", position, " in place of ", delivered_);
    ++delivered_;
  }
  bool owns_out(std::uint32_t from, std::uint32_t n) const { return source_.is_open() && from >= sent_ && from + n <= advertised_; }
  void check(bool ok, const char* what) const {
    if (!ok) broken(where(), ": ", what, " is refused");
  }

  struct Buffer {
    std::uint64_t address;
    std::uint32_t len;
    Bytes got;
  };
  struct Read {
    std::uint32_t from, bytes;
    bool is_cut;
  };
  unsigned me_;
  Chance& chance_;
  std::uint32_t total_;
  bool modes_;
  Peer* other_ = nullptr;
  SourceAdverts source_;
  SinkAdverts sink_;
  std::deque<Message> out_;
  std::deque<std::uint32_t> queue_;
  std::deque<Buffer> sinks_;
  std::uint64_t next_sink_ = 1'000'000, moved_seen_ = 0;
  std::uint32_t mseq_ = 0, received_ = 0, sent_ = 0, advertised_ = 0, delivered_ = 0;
  bool was_cut_ = false;    ///< a read before those that are under way
  std::deque<Read> reads_;  ///< under way, oldest first
};

std::map<std::string, unsigned> seen;

void one(std::uint64_t seed, unsigned adverts, bool modes) {
  Chance chance(seed * 4 + adverts + (modes ? 2 : 0));
  const auto total = static_cast<std::uint32_t>(chance.pick(1, 400));
  Peer a(0, chance, total, adverts, modes), b(1, chance, chance.percent(70) ? total : 0, adverts, modes);
  a.meet(b);
  b.meet(a);
  std::uint64_t idle = 0, steps = 0;
  while (!a.is_done() || !b.is_done()) {
    const bool quiet = idle > 300;
    idle = (chance.percent(50) ? a : b).step(quiet) && !quiet ? 0 : idle + 1;
    if (idle > 60'000 || ++steps > 3'000'000) broken("stuck: ", a.where(), "; ", b.where());
  }
  for (const Peer* p : {&a, &b})
    for (const auto& [what, n] : p->seen) seen[what] += n;
}

BOOST_AUTO_TEST_CASE(combined_one_advert) {
  for_each_seed("combined", 4000, [](std::uint64_t seed) { one(seed, 1, false); });
}
BOOST_AUTO_TEST_CASE(all_modes_many_adverts) {
  for_each_seed("modes", 8000, [](std::uint64_t seed) { one(seed, static_cast<unsigned>(1 + seed % kAdvertsHeld), true); });
}
// A race that no seed ever runs is not tested.
BOOST_AUTO_TEST_CASE(every_kind_of_event_was_there) {
  for (const char* what : {"advertised", "read", "read behind another", "written", "placed", "cancel", "refused", "crossing",
                           "dropped", "sink", "sink cancel"})
    BOOST_TEST(seen[what] > 100U, what << ": " << seen[what]);
  for (int kind = 1; kind <= 7; ++kind) BOOST_TEST(seen["sent " + std::to_string(kind)] > 100U, "message " << kind);
}

}  // namespace
}  // namespace sdp::sim
