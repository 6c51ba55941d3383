// Adverts: who may read or write whose memory on one half-pipe, and when that is over. Read ZCopy, Write ZCopy, their cancels and
// the flow-control modes, from either end. PROTOCOL.md, "Adverts", has the rules and why they are safe; tests/model has them for
// spin.
//
//   on_X_sent  the caller has just sent that message of its own       on_X  the peer's message came
//   want_X     the caller would like it sent                          next  which message is due; emit it, call sent(), ask again
//   on_ack     the MSeqAck of each message of the peer's, before anything else of it
//
// Both classes decide and never post, wait, allocate or read a clock. Bytes are of the stream. A false or `error` result is a peer
// that broke the protocol: the lane is over. Threads: externally serialised. Memory: plain data.
#pragma once

#include <array>
#include <cstdint>
#include <optional>

#include "sdp/wire/avail.hpp"
#include "sdp/wire/mode_change.hpp"

namespace sdp {

using wire::FlowMode;

inline constexpr unsigned kAdvertsHeld = 8;  ///< of a kind, in one direction: what we keep, and what we say in Hello at the most

/// A short queue in place. `Index` is the age: 0 is the oldest.
template <class T>
class AdvertQueue {
 public:
  bool empty() const noexcept { return size_ == 0; }
  bool full() const noexcept { return size_ == kAdvertsHeld; }
  unsigned size() const noexcept { return size_; }
  T& front() noexcept { return at_[head_ % kAdvertsHeld]; }
  const T& front() const noexcept { return at_[head_ % kAdvertsHeld]; }
  T& back() noexcept { return at_[(head_ + size_ - 1) % kAdvertsHeld]; }
  void push(const T& value) noexcept {
    ++size_;
    back() = value;
  }
  void pop() noexcept {
    ++head_;
    --size_;
  }
  void clear() noexcept { size_ = 0; }

 private:
  std::array<T, kAdvertsHeld> at_{};
  unsigned head_ = 0;
  unsigned size_ = 0;
};

/// A message of ours that changes the meaning of what the peer said before it took it.
class UnseenMessage {
 public:
  bool is_unseen() const noexcept { return unseen_; }
  void sent(std::uint32_t mseq) noexcept {
    unseen_ = true;
    mseq_ = mseq;
  }
  void on_ack(std::uint32_t mseq_ack) noexcept {
    if (unseen_ && static_cast<std::int32_t>(mseq_ack - mseq_) >= 0) unseen_ = false;
  }

 private:
  bool unseen_ = false;
  std::uint32_t mseq_ = 0;
};

/// A message that a half-pipe's end has to send.
struct DueAdvert {
  enum class Kind : std::uint8_t { none, rd_compl, wr_compl, send_sm, src_cancel, sink_cancel, sink_cancel_ack, mode_change };
  Kind kind = Kind::none;
  std::uint32_t bytes = 0;             ///< rd_compl, wr_compl
  FlowMode mode = FlowMode::combined;  ///< mode_change
  friend bool operator==(const DueAdvert&, const DueAdvert&) = default;
};

/// The end that has bytes to send. It advertises them (SrcAvail) for the sink to read, or writes them where the sink says
/// (SinkAvail).
class SourceAdverts {
 public:
  /// What a message of the peer's did to the adverts that were open.
  enum class Rx : std::uint8_t {
    nothing,
    progress,  ///< bytes crossed: moved() grew
    over,      ///< no advert is open any more, the memory is the program's. What has not crossed is to be sent again
    error,
  };

  /// `peer_adverts`: how many the peer takes from this half. MaxAdverts counts both kinds of both halves, so the caller divides it.
  /// `least_sink`: the longest payload that we may put into a Data; a SinkAvail has as much room.
  void start(unsigned peer_adverts, std::uint32_t least_sink) noexcept {
    limit_ = peer_adverts < kAdvertsHeld ? peer_adverts : kAdvertsHeld;
    least_sink_ = least_sink;
  }
  void set_least_sink(std::uint32_t bytes) noexcept { least_sink_ = bytes; }  ///< our payloads have become longer, or shorter

  FlowMode mode() const noexcept { return mode_; }
  bool is_open() const noexcept { return !open_.empty(); }  ///< the peer may still read memory of ours
  bool is_cancelling() const noexcept { return cancel_ != Cancel::no; }
  /// Bytes that crossed by RDMA, those in line not counted.
  std::uint64_t moved() const noexcept { return moved_; }

  /// No byte may pass one that is advertised: a SendSm would bring that one later.
  bool may_send_data() const noexcept {
    return open_.empty() && cancel_ == Cancel::no && !write_is_over_ && !cancel_ack_ &&
           (sinks_.empty() || sinks_.front().written == 0);
  }
  /// SrcAvail: with payload in line in Combined, without in Pipelined. `sink_is_busy`: the other half-pipe has an advert of the
  /// peer's that is not finished. Two sides that both wait for a reader would wait for ever.
  bool may_advertise(bool sink_is_busy) const noexcept {
    if (sink_is_busy || is_cancelling() || write_is_over_ || cancel_ack_ || wanted_mode_ || !sinks_.empty()) return false;
    return mode_ == FlowMode::combined ? open_.empty() && limit_ > 0 : mode_ == FlowMode::pipelined && open_.size() < limit_;
  }

  void on_data_sent() noexcept {
    if (sinks_.empty())
      ++sent_payloads_;
    else
      sinks_.pop();  // the sink puts it there, and does not count it either
  }
  void on_advert_sent(std::uint32_t len, std::uint32_t in_line) noexcept {
    if (in_line != 0) ++sent_payloads_;
    open_.push({len - in_line, 0});
  }
  /// The only advert is over without the sink's word: of its memory `read` bytes have been read, and no read that ends later
  /// counts. What is left of it goes as Data behind a SrcAvailCancel; the sink's reports, and its SendSm, may still come.
  void withdrawn(std::uint32_t read) noexcept;
  /// False: nothing is open. Nothing more is advertised until it is over, which on_X() says.
  bool want_cancel() noexcept {
    if (open_.empty()) return false;
    if (cancel_ == Cancel::no) cancel_ = Cancel::due;
    return true;
  }

  void on_ack(std::uint32_t mseq_ack) noexcept { left_pipelined_.on_ack(mseq_ack); }
  Rx on_rdma_rd_compl(std::uint32_t bytes) noexcept;
  Rx on_send_sm() noexcept;
  Rx on_sink_avail(const wire::SinkAvail& advert) noexcept;
  Rx on_sink_avail_cancel() noexcept;
  Rx on_mode_change(FlowMode mode) noexcept;  ///< the sink moves us from Buffered to Combined

  bool owes_wr_compl() const noexcept { return write_is_over_; }
  /// Where the next bytes go by RDMA Write; they must not pass Data, so only while may_advertise's other conditions hold.
  struct Target {
    std::uint64_t address;
    std::uint32_t rkey;
    std::uint32_t room;
  };
  std::optional<Target> write_target() const noexcept {
    if (sinks_.empty() || !open_.empty() || write_is_over_) return std::nullopt;
    const Sink& s = sinks_.front();
    return Target{s.address + s.written, s.rkey, s.len - s.written};
  }
  /// Posted; `more`: the program has more to send. RdmaWrCompl is due when the rest of the buffer is too short, or nothing follows.
  void on_written(std::uint32_t bytes, bool more) noexcept {
    Sink& s = sinks_.front();
    s.written += bytes;
    moved_ += bytes;
    if (!more || s.len - s.written < least_sink_) write_is_over_ = true;
  }

  /// Combined to Buffered or Pipelined, Pipelined to Combined. It waits for the end of open adverts. Nothing is done about a wish
  /// for Pipelined while the sink may not have seen that we left it: of what it says meanwhile we could not tell which time it
  /// means.
  void want_mode(FlowMode mode) noexcept {
    if (mode == FlowMode::pipelined && left_pipelined_.is_unseen()) return;
    if (mode != mode_ && is_source_move(mode_, mode)) wanted_mode_ = mode;
  }

  DueAdvert next() const noexcept;
  void sent(const DueAdvert& message, std::uint32_t mseq) noexcept;

  static constexpr bool is_source_move(FlowMode from, FlowMode to) noexcept {
    return from == FlowMode::combined ? to != FlowMode::combined : from == FlowMode::pipelined && to == FlowMode::combined;
  }

 private:
  enum class Cancel : std::uint8_t { no, due, sent };
  struct Open {
    std::uint32_t left;      ///< bytes not known to have crossed
    std::uint32_t reported;  ///< bytes that have, by the sink's word
  };
  struct Sink {
    std::uint64_t address;
    std::uint32_t rkey, len, written;
  };
  Rx over() noexcept {
    open_.clear();
    cancel_ = Cancel::no;
    return Rx::over;
  }

  FlowMode mode_ = FlowMode::combined;
  std::optional<FlowMode> wanted_mode_;
  unsigned limit_ = 1;
  std::uint32_t least_sink_ = 0;
  Cancel cancel_ = Cancel::no;
  bool write_is_over_ = false;  ///< RdmaWrCompl for the oldest sink buffer is due
  bool cancel_ack_ = false;     ///< SinkCancelAck is due
  AdvertQueue<Open> open_;
  AdvertQueue<Sink> sinks_;
  std::uint64_t moved_ = 0;
  std::uint32_t reports_owed_ = 0;   ///< bytes of a withdrawn advert that the sink has read and not reported yet
  std::uint32_t sent_payloads_ = 0;  ///< messages with payload, less those that went into a sink buffer: compared with NonDiscards
  UnseenMessage left_pipelined_;     ///< the ModeChange by which we did
  std::uint32_t left_at_payloads_ = 0;  ///< sent_payloads_ then
};

/// The end that takes the bytes.
class SinkAdverts {
 public:
  enum class Rx : std::uint8_t {
    queue,   ///< payload goes behind what has come before
    placed,  ///< payload goes into the oldest sink buffer, which is finished by it: completed() has one more
    nothing,
    opened,    ///< there is more to read: front()
    dropped,   ///< the source has taken its adverts back, or will hear that we dropped them
    finished,  ///< completed() sink buffers have something to tell
    error,
  };

  /// `adverts`: the MaxAdverts that we have told the peer. `peer_adverts`: the peer's.
  void start(unsigned adverts, unsigned peer_adverts) noexcept {
    limit_ = adverts < kAdvertsHeld ? adverts : kAdvertsHeld;
    peer_limit_ = peer_adverts < kAdvertsHeld ? peer_adverts : kAdvertsHeld;
  }

  FlowMode mode() const noexcept { return mode_; }
  bool is_open() const noexcept { return !open_.empty(); }  ///< an advert of the peer's that we have not finished

  void on_ack(std::uint32_t mseq_ack) noexcept { said_send_sm_.on_ack(mseq_ack); }
  Rx on_payload(std::uint32_t bytes) noexcept;         ///< of a Data
  void on_queued() noexcept { ++received_payloads_; }  ///< likewise, while nothing is advertised by either side
  /// `in_line` bytes of it follow the header and are queued like Data.
  Rx on_src_avail(const wire::SrcAvail& advert, std::uint32_t in_line) noexcept;
  Rx on_src_avail_cancel() noexcept;
  Rx on_rdma_wr_compl(std::uint32_t bytes) noexcept;
  Rx on_sink_cancel_ack() noexcept;
  Rx on_mode_change(FlowMode mode) noexcept;  ///< the source moves

  /// What is to be read next, once everything queued before it has been.
  struct Source {
    std::uint64_t address = 0;
    std::uint32_t rkey = 0;
    std::uint32_t left = 0;  ///< bytes
  };
  const Source& front() const noexcept { return open_.front(); }
  bool is_reading() const noexcept { return reading_ != 0; }
  /// What of front() no read under way is to bring. left 0: nothing is to be read now.
  Source next_read() const noexcept {
    if (open_.empty() || cancelled_ || cut_) return {};
    const Source& s = open_.front();
    return {s.address + reading_, s.rkey, s.left - reading_};
  }
  void read_started(std::uint32_t bytes) noexcept { reading_ += bytes; }  ///< the first of next_read()
  /// The oldest read under way, of `started` bytes, has brought `bytes`: only now may they be reported. Fewer than started: the
  /// rest could not be had, reads behind it bring nothing, and SendSm follows.
  void read_done(std::uint32_t started, std::uint32_t bytes) noexcept;
  /// The rest of what is advertised is to come as Data. False: nothing is open, or a read is under way.
  bool want_send_sm() noexcept;

  /// SinkAvail. Only with nothing advertised by the source, and all of it reported: a source that sees ours takes its own for void.
  /// `len` >= a Data's payload.
  bool may_advertise() const noexcept {
    return mode_ == FlowMode::pipelined && open_.empty() && reports_.empty() && !send_sm_ && cancel_ == Cancel::no &&
           sinks_.size() < peer_limit_;
  }
  std::uint32_t non_discards() const noexcept { return received_payloads_; }
  void on_sink_avail_sent(std::uint32_t len) noexcept { sinks_.push(len); }
  bool want_sink_cancel() noexcept {
    if (sinks_.empty()) return false;
    if (cancel_ == Cancel::no) cancel_ = Cancel::due;
    return true;
  }
  unsigned sinks_open() const noexcept { return sinks_.size(); }
  /// The oldest sink buffer that is finished, and with how many bytes.
  std::optional<std::uint32_t> take_completed() noexcept {
    if (completed_.empty()) return std::nullopt;
    const std::uint32_t bytes = completed_.front();
    completed_.pop();
    return bytes;
  }

  void want_combined() noexcept { wants_combined_ = mode_ == FlowMode::buffered; }  ///< Buffered to Combined

  DueAdvert next() const noexcept;
  void sent(const DueAdvert& message, std::uint32_t mseq) noexcept;

 private:
  enum class Cancel : std::uint8_t { no, due, sent };
  Rx drop_all() noexcept;
  Rx complete(std::uint32_t bytes) noexcept {
    completed_.push(bytes);
    sinks_.pop();
    if (sinks_.empty()) cancel_ = Cancel::no;
    return Rx::finished;
  }

  FlowMode mode_ = FlowMode::combined;
  bool wants_combined_ = false;
  bool cancelled_ = false;  ///< by the source, while we read: dealt with when the read is done
  bool send_sm_ = false;    ///< due; what comes until it is sent is void, too
  Cancel cancel_ = Cancel::no;
  unsigned limit_ = 1, peer_limit_ = 1;
  std::uint32_t reading_ = 0;  ///< bytes of the oldest advert that reads under way are to bring
  bool cut_ = false;           ///< one of them has brought less
  AdvertQueue<Source> open_;
  AdvertQueue<std::uint32_t> reports_;  ///< bytes per advert that the source has to be told
  bool report_is_whole_ = true;         ///< the last of them is of an advert that is finished
  AdvertQueue<std::uint32_t> sinks_, completed_;
  std::uint32_t received_payloads_ = 0;
  UnseenMessage said_send_sm_;
};

}  // namespace sdp
