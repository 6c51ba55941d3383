// A StreamPair and what happens round its programs: the service thread of each process, one step at a time when the test says so,
// and the kernel's part in a death.
#pragma once

#include <sys/epoll.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <optional>

#include "tests/sim/stream_pair.hpp"

namespace sdp::sim {

/// What carried the bytes: a test that passes because everything fell back to TCP is none.
struct Carried {
  std::uint64_t by_lane = 0, by_tcp = 0, switches_up = 0, switches_down = 0;
  std::uint64_t returned = 0, by_returned = 0;  ///< lanes in place of failed ones, and the bytes of those among `by_lane`
};

/// One process: its program's stream and what its service thread knows of the lane.
struct Served {
  int epoll = -1;                               ///< the service thread's, with the anchor in it
  bool open = true;                             ///< the program has not closed it
  bool dead = false;                            ///< the process was killed
  bool retiring = false;                        ///< the stream is through with the lane; it goes when the peer writes no more
  bool peer_gone = false;                       ///< the CM said so
  bool disconnected = false;                    ///< the CM will say so
  bool asks = false;                            ///< its lane has failed
  std::optional<Arrived> said;                  ///< to a peer that asks after the lane has failed
  std::optional<std::uint64_t> by_lane_before;  ///< bytes received when the first lane came in place of a failed one
};

class ServedPair {
 public:
  ServedPair(Hosts& hosts, const LaneLimits& limits, int kernel_buffer)
      : hosts_(hosts), limits_(limits), pair_(hosts, limits, kernel_buffer) {
    for (unsigned i : {0U, 1U}) {
      served_[i].epoll = epoll_create1(EPOLL_CLOEXEC);
      pair_[i].stream->stats = acquire_stats(pair_[i].fd);
    }
  }
  ~ServedPair() {
    for (const Served& s : served_) ::close(s.epoll);
  }
  ServedPair(const ServedPair&) = delete;
  ServedPair& operator=(const ServedPair&) = delete;

  const Served& at(unsigned i) const { return served_[i]; }
  StreamEnd& end(unsigned i) { return pair_[i]; }
  const Carried& carried() const { return carried_; }

  /// The end of the handshake on one side, if the stream still wants its lane.
  void attach(unsigned i) {
    Served& s = served_[i];
    StreamEnd& e = pair_[i];
    if (e.lane == nullptr || s.retiring || s.dead) return;
    if (s.open && s.peer_gone && e.stream->phase.load() == Phase::pursued) {  // the handshake has failed
      if (e.stream->lane_was_up)
        e.stream->phase = Phase::resting;
      else
        e.handle().take_down(LaneReason::peer_gone);
    }
    if (!s.open || e.stream->phase.load() != Phase::pursued) {
      if (s.open && e.stream->lane != nullptr) return;
      e.lane->write_word(kGone, 0);
      s.retiring = s.peer_gone = true;
      return;
    }
    epoll_event ev{EPOLLIN | EPOLLRDHUP | EPOLLET, {}};
    epoll_ctl(s.epoll, EPOLL_CTL_ADD, e.fd, &ev);
    e.stream->stats->set_transport(Transport::local);
    if (hosts_.unordered()) e.stream->recovery = Recovery::possible;
    if (e.stream->lane_was_up && !s.by_lane_before) s.by_lane_before = e.stream->stats->lane.bytes_received.get();
    pair_.attach(i);
  }

  /// One round of the service thread: the CM's news, the anchor's, and lanes that are over.
  void serve(unsigned i) {
    Served& s = served_[i];
    StreamEnd& e = pair_[i];
    engine::flush_lingering();
    if (s.dead) return;
    if (s.disconnected && !s.peer_gone) {
      s.peer_gone = true;
      if (s.open) {
        (void)e.stream->lock.lock();
        e.stream->lane_is_disconnected();
        e.stream->lock.unlock();
      }
    }
    if (s.open)
      exchange(i);
    else if (e.lane != nullptr && s.retiring && e.lane->dead() && !served_[1 - i].dead)
      exchange_when_closed(i);
    if (s.open) serve_stream(s, e);
    if (e.lane != nullptr && s.retiring && e.lane->unordered()) e.lane->drain();
    if (e.lane != nullptr && s.retiring && (s.peer_gone || (e.lane->is_left_alone() && !engine::lingers_behind(e.lane)))) {
      engine::release_lingering(e.lane);
      free_lane(e.lane);
      served_[1 - i].disconnected = true;
    }
  }
  Hosts& hosts() { return hosts_; }

  /// If both have left a failed lane and look for another, there is one; attach() is due on each side.
  bool renew() {
    for (unsigned i : {0U, 1U}) {
      const StreamEnd& e = pair_[i];
      if (!served_[i].open || e.lane != nullptr || e.stream->phase.load() != Phase::resting) return false;
    }
    check_transcripts();
    for (unsigned i : {0U, 1U}) {
      Served& s = served_[i];
      s.retiring = s.peer_gone = s.disconnected = s.asks = false;
      s.said.reset();
      pair_[i].stream->phase = Phase::pursued;
    }
    pair_.make_lanes(hosts_, limits_);
    return true;
  }

  /// The path of the lane fails, as this side sees it.
  bool fail(unsigned i) {
    StreamEnd& e = pair_[i];
    if (!hosts_.unordered() || !served_[i].open || e.stream->lane == nullptr) return false;
    rdma::QpAttributes over;
    over.state = rdma::QpState::error;
    return e.lane->qp().modify(over).ok();
  }

  /// The device of this side's lane goes: nothing of the lane may stay on it.
  bool lose_device(unsigned i) {
    StreamEnd& e = pair_[i];
    if (!hosts_.unordered() || !served_[i].open || e.stream->lane == nullptr || e.lane->device() == nullptr) return false;
    StreamImpl& s = *e.stream;
    (void)s.lock.lock();
    const bool goes_on = s.is_recovering() || s.is_recovered() || s.begin_recovery();
    Lane* const left = goes_on ? s.lane->outlive_device(engine::lane_cell()) : nullptr;
    if (left != nullptr) {
      s.lane = left;
      s.published_lane = left;
      free_lane(e.lane);
      e.lane = left;
    }
    s.lock.unlock();
    return left != nullptr;
  }

  void close(unsigned i) {
    StreamEnd& e = pair_[i];
    count(e);
    if (e.stream->lane != nullptr) {
      served_[i].retiring = true;
      if (!served_[i].said) served_[i].said = e.stream->arrived();
    }
    e.handle().close(e.fd);
    if (e.lane != nullptr && served_[i].said) served_[i].said->closed = !engine::lingers_behind(e.lane);
    gone(i);
  }

  /// kill -9: the kernel closes what the process had. Nothing is said on the lane; what lies in shared memory stays there.
  void kill(unsigned i) {
    count(pair_[i]);
    served_[i].dead = true;
    served_[1 - i].disconnected = true;
    if (hosts_.late[i] != nullptr) hosts_.late[i]->die();
    gone(i);
  }

  void come_home() {
    for (unsigned i : {0U, 1U}) {
      StreamEnd& e = pair_[i];
      if (served_[i].dead) {
        e.stream->generation.fetch_add(1);
        engine::free_stream(e.stream);
        free_lane(e.lane);
      }
      if (e.lane != nullptr) broken("side ", i, " keeps its lane");
      const std::size_t left = hosts_.host[i].context->heap->bytes_in_use();
      if (left != 0) broken("side ", i, ": ", left, " bytes did not come home");
    }
  }

 private:
  /// What both ends show each other of TCP's first bytes before they make another lane: one knows what the other does, or its
  /// beginning.
  void check_transcripts() {
    for (unsigned i : {0U, 1U}) {
      const StreamImpl& from = *pair_[i].stream;
      const StreamImpl& to = *pair_[1 - i].stream;
      const auto sent = from.transcript.sent.bytes(), received = to.transcript.received.bytes();
      if (received.size() > sent.size() || !std::equal(received.begin(), received.end(), sent.begin()))
        broken("transcripts differ: ", sent.size(), " bytes sent, ", received.size(), " received");
      const auto is_whole = [](const Transcript::Record& record, std::uint64_t all) {
        return !record.is_open() || record.bytes().size() == all;
      };
      if (!is_whole(from.transcript.sent, from.tcp_sent)) broken("side ", i, " does not know what it has sent by TCP");
      if (!is_whole(to.transcript.received, to.tcp_received)) broken("side ", 1 - i, " does not know what TCP has brought");
    }
  }
  void exchange_when_closed(unsigned i) {
    Served& s = served_[i];
    Lane& lane = *pair_[i].lane;
    lane.stop();
    s.asks = true;
    s.said->received = lane.rx_arrived();
    if (const auto& peers = served_[1 - i].said; peers) engine::recover_lingering(&lane, *peers);
  }
  /// The two processes' own connection.
  void exchange(unsigned i) {
    Served& mine = served_[i];
    Served& peers = served_[1 - i];
    StreamImpl& stream = *pair_[i].stream;
    (void)stream.lock.lock();
    const bool laned = stream.phase.load() == Phase::laned;
    if (laned && pair_[1 - i].stream->wants_peers_look.exchange(false)) stream.lane->drain();
    if (laned && peers.said && peers.asks) (void)stream.begin_recovery();
    if (laned && stream.is_recovering()) {
      if (!mine.said) mine.said = stream.arrived();
      mine.asks = true;
      const bool will_say = !peers.dead && (peers.said || pair_[1 - i].stream->phase.load() == Phase::laned);
      if (peers.said && !peers.dead)
        stream.recover(*peers.said);
      else if (!will_say)
        stream.give_up_recovery();
    }
    stream.lock.unlock();
  }
  void serve_stream(Served& s, StreamEnd& e) {
    StreamImpl& stream = *e.stream;
    epoll_event ev;
    const bool has_event = epoll_wait(s.epoll, &ev, 1, 0) == 1;
    if (has_event) stream.anchor_event = true;
    (void)stream.lock.lock();
    if (has_event && stream.lane != nullptr) stream.lane->wake_sleepers();
    stream.tend();
    const Arrived now = stream.lane != nullptr ? stream.arrived() : Arrived{};
    if (stream.take_spent_lane() != nullptr) {
      s.retiring = true;
      if (!s.said) s.said = now;
    }
    if (stream.lane != nullptr && stream.tx.load() == TxState::lane && !stream.lane_is_over()) {
      stream.lane->drain();
      if (stream.lane->held() != 0) (void)stream.lane->flush();
      stream.lane->release_buffer();
      stream.lane->rest_if_idle(looks_ += Lane::kIdleNs);
    }
    stream.lock.unlock();
  }
  void gone(unsigned i) {
    ::close(pair_[i].fd);
    pair_[i].fd = -1;
    served_[i].open = false;
  }
  void count(const StreamEnd& e) {
    carried_.by_lane += e.stream->stats->lane.bytes_received.get();
    carried_.by_tcp += e.stream->stats->tcp.bytes_received.get();
    carried_.switches_up += e.stream->stats->switches_up.get();
    carried_.switches_down += e.stream->stats->switches_down.get();
    carried_.returned += e.stream->stats->lanes_returned.get();
    const Served& s = served_[e.fd == pair_[0].fd ? 0 : 1];
    if (s.by_lane_before) carried_.by_returned += e.stream->stats->lane.bytes_received.get() - *s.by_lane_before;
  }

  Hosts& hosts_;
  LaneLimits limits_;
  StreamPair pair_;
  std::array<Served, 2> served_;
  Carried carried_;
  std::int64_t looks_ = 0;  ///< the clock of those who look for idle lanes
};

}  // namespace sdp::sim
