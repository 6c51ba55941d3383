// Lane: an SDP connection on a QP, as the engine of one stream: buffers, queue of unread payload, and the switch words.
//
// The switch words say where each direction of the stream changes between TCP and the lane. The peer writes ours by RDMA Write and
// we write the peer's: no SDP credit, no sequence number, legal at any time, each a single 8-byte store. A lane of the software
// device can therefore be taken down by stores alone, also by a fork's child and before an exec.
//
// Memory: Lanes lie in a slab that fork's children share. The Qp, Cq and heap they point to are the maker's; a child uses nothing
// of them but write_word(). Threads: the stream's lock guards everything but maybe_ready(), words() and the sleeping functions.
#pragma once

#include <sys/uio.h>

#include <array>
#include <atomic>
#include <cstddef>
#include <cstdint>
#include <memory>

#include "rdma_core/device.hpp"
#include "rdma_core/registered_heap.hpp"
#include "sdp/capture/capture.hpp"
#include "sdp/connection.hpp"
#include "sdp/copy_trial.hpp"
#include "sdp/iov_cursor.hpp"
#include "sdp/kept_bytes.hpp"
#include "sdp/recv_queue.hpp"
#include "sdp/send_buffer.hpp"
#include "sdp/staging.hpp"
#include "sdp/zero_copy.hpp"

namespace sdp {

/// What belongs to one peer process on one device. Made by the service thread, shared by the lanes to that peer.
struct PeerContext {
  rdma::Device* device = nullptr;
  rdma::Path path{};
  std::unique_ptr<rdma::Pd> pd;
  std::unique_ptr<rdma::RegisteredHeap> heap;
};

/// Written by the peer, each once, as value + 1 (0: not yet said). Positions count bytes of that direction.
enum Word : std::uint8_t {
  kPrepare,  ///< "I would like to send by the lane"
  kReady,    ///< "I read the anchor only up to the byte that kSwitch will name"
  kSwitch,   ///< position of the anchor's stream: all later bytes come by the lane
  kEnd,      ///< position of the lane's stream: all later bytes come by the anchor
  kAbandon,  ///< position of the lane's stream: "I have read this far; send the rest by the anchor, unless you have said kEnd"
  kResend,   ///< position of the lane's stream, in place of kEnd: "the anchor brings what you abandoned, up to here"
  kEndSeen,  ///< "I have seen kEnd": said on devices where the lane's words come later than the anchor's bytes; then those may
             ///< follow
  kGone,     ///< "I write no more to your memory": buffers may be given back
  kWords = 8,
};
struct alignas(64) SwitchWords {
  std::array<std::atomic<std::uint64_t>, kWords> word;
};
static_assert(sizeof(SwitchWords) == 64);

/// The registered block of a lane, all of it written by the peer: as sender of one direction the cursors, as reader of the other
/// how far it has pulled.
struct LaneBlock {
  SwitchWords words;
  alignas(64) std::array<RingCursor, kRings> cursors;
  alignas(64) std::atomic<std::uint64_t> pulled;
};
static_assert(sizeof(LaneBlock) == 192 && offsetof(LaneBlock, cursors) == 64 && offsetof(LaneBlock, pulled) == 128);

/// Where either device mixes messages (device.hpp) one that may be more than a packet ends with its MSeq once more, which Len does
/// not count: the packets at its end may be another's.
inline constexpr std::uint32_t kOnePacketBytes = 256;  ///< a message of so many is one packet on every path
inline constexpr std::uint32_t kMarkBytes = 4;

/// Private data of the CM's request and reply: where our switch words lie.
struct LaneProposal {
  static constexpr std::uint32_t kMagic = 0x4C504405;  // "DPL", version
  std::uint32_t magic = kMagic;
  std::uint32_t words_rkey = 0;
  std::array<std::uint32_t, 2> words_addr{};  ///< low, high
  static constexpr std::uint32_t kMarksEnds = 1U << 31, kQpn = 0xffffff;
  std::uint32_t shown_qpn = 0;  ///< names this side's QP in captures; and kMarksEnds, if its device mixes messages

  std::uint64_t address() const noexcept { return words_addr[0] | static_cast<std::uint64_t>(words_addr[1]) << 32; }
};
static_assert(sizeof(LaneProposal) == 20, "fits what an IB REQ leaves: 56 bytes less the 36 of the dial");

/// Private data of the reply: that, and where and by which key the peer may be called when the lane has failed (peer_link.hpp).
struct LaneReply {
  LaneProposal proposal;
  std::uint16_t port = 0;  ///< 0: nowhere
  std::uint16_t zero = 0;
  std::array<std::byte, 16> key{};
};
static_assert(sizeof(LaneReply) == 40);

struct LaneLimits {
  ConnLimits conn;
  std::uint16_t recv_buffers_max = 64;           ///< grown to under load
  std::size_t staging = std::size_t{512} << 10;  ///< bytes to gather messages in, on a device that cannot take them inline
  BulkCopy bulk_copy = BulkCopy::tried;          ///< on a device where this side copies into the peer's memory
  std::uint32_t zero_copy_from = 0;              ///< bytes of a send that is worth to be offered in place; 0: none is
};

class Lane {
 public:
  static constexpr std::uint32_t kMaxInFlight = 256;  ///< messages that the peer has not acknowledged
  static constexpr std::uint32_t kSendDepth = 256;    ///< entries of the send queue
  /// Where the queue takes memory of the kernel's, for each lane: devices keep one entry back and round up to a power of two, with
  /// room for the inline bytes in each.
  static constexpr std::uint32_t kWireDepth = 127, kWireInline = 192;
  static constexpr std::uint32_t kSpareSends = 32;   ///< entries that payload leaves to control messages and switch words
  static constexpr std::uint32_t kSignalEvery = 32;  ///< requests for which one completion is asked
  static constexpr std::uint32_t kCutsToGrow = 8;    ///< see weigh_cuts()
  static constexpr std::uint32_t kGatherFrom = 4;    ///< unacknowledged messages, behind which small sends wait for each other
  static constexpr std::uint32_t kAckAtWait = 2;     ///< messages that a waiting reader acknowledges; at most kGatherFrom
  static constexpr std::size_t kBurstSend = 16384;   ///< bytes: sends so small are a burst's, if many follow each other
  static constexpr std::uint32_t kBurstBegins = 8;   ///< sends that go out as messages of their own first
  static constexpr std::uint32_t kLeastInline = 32;  ///< bytes: what a device must take inline, for the words in the peer's block
  static constexpr std::uint32_t kBulkPiece = 8192;  ///< bytes: payloads worth the choice of a copy
  static constexpr std::size_t kLittle = 8192;       ///< bytes: a receive of less has caught up with the burst
  static constexpr std::int64_t kGatherNs = 2500;    ///< between two looks of a reader that has caught up
  static constexpr std::int64_t kIdleNs = 1'000'000'000;  ///< without a byte: then an unordered lane keeps nothing to send from

  Lane(std::shared_ptr<PeerContext>* peer, const LaneLimits& limits) noexcept
      : conn(limits.conn),
        limits_(limits),
        recv_(conn, limits.conn, limits.recv_buffers_max),
        copy_(copy_paces, limits.bulk_copy, std::int64_t{limits.recv_buffers_max} * limits.conn.recv_size_max),
        send_buffer_(copy_),
        staging_(limits.staging),
        peer_(peer) {}

  /// Makes words, CQ and QP and posts the first buffers. Errors: those of the device.
  rdma::Result<rdma::Unit> open(rdma::CompletionChannel* channel) noexcept;
  /// Gives everything back. Only in the process that opened it, and only after the peer said kGone or its link is dead.
  void close() noexcept;

  rdma::Qp& qp() noexcept { return *qp_; }
  rdma::Device* device() const noexcept { return device_; }  ///< nullptr: it has left that
  LaneProposal proposal() const noexcept;
  void set_peer(const LaneProposal& proposal) noexcept;  ///< the caller has checked magic and version
  void send_hello(const wire::HelloHeader& addresses) noexcept;

  /// From here on `capture` sees every message; it outlives the lane.
  void capture_to(Capture* capture, const Capture::Endpoint& endpoint) noexcept;

  // --- datapath (lane_datapath.cpp)
  /// Takes what credits allow, and small sends of a burst as far as there is room; returns the bytes taken. `from` advances.
  std::size_t send(IovCursor& from) noexcept;
  /// send() of bytes that lie together, at most kBurstSend, where that is one message or a place in the buffer and nothing else is
  /// to be done. False: nothing is taken, and send() knows the way.
  bool send_at_once(const std::byte* bytes, std::uint32_t count) noexcept;
  /// Keeps what send() did not take, up to `limit` bytes in all; the peer fetches it. Returns the bytes taken; `from` advances.
  std::size_t buffer(IovCursor& from, std::size_t limit) noexcept;
  /// Bytes that the peer has still to fetch. Any thread.
  std::uint64_t buffered() const noexcept { return send_buffer_.buffered(block_->pulled.load(std::memory_order_acquire)); }
  /// The program waits for bytes: what it sends next is a message again.
  void burst_is_over() noexcept { burst_ = 0; }
  /// The send buffer has memory that is worth to be given back when it is empty.
  bool has_large_buffer() const noexcept { return send_buffer_.has_large(); }
  void release_buffer() noexcept;
  /// Copies unread payload; `consume` false leaves it (MSG_PEEK). Returns the bytes copied; -EFAULT if there are some and the first
  /// piece of them cannot be written where `to` says.
  std::int64_t recv(IovCursor& to, bool consume) noexcept;
  /// recv() of what one message holds, where that is all there is or all that was asked for. 0: nothing is taken, and recv() knows
  /// what there is.
  std::size_t recv_at_once(std::byte* to, std::size_t room) noexcept;
  /// Drops unread payload as if it had been read (MSG_TRUNC).
  std::size_t discard(std::size_t bytes) noexcept;
  /// Handles what has come: headers, credits, control. Payload waits in the queue. Then sends the control messages that are due.
  void drain() noexcept;
  /// Before a wait, and after the last receive: gives the peer what has been read, as buffers and credits, and what send() has
  /// held.
  void settle() noexcept;
  void send_due_control() noexcept { send_control(); }  ///< after something became due outside drain()
  /// Something that drain() will take in.
  bool maybe_ready() const noexcept {
    return cq_->maybe_ready() || peer_buffer_.ends() != seen_ends_.load(std::memory_order_relaxed);
  }
  /// A message may go; while the buffer holds bytes none may.
  bool may_send() const noexcept {
    return may_post() && buffered() == 0 && (!staging_.active() || staging_.may_grow() || staging_.has_room(staging_.longest()));
  }
  /// Bytes that recv() finds.
  std::uint64_t unread() const noexcept { return recv_.bytes() + peer_buffer_.held(arrived_.load(std::memory_order_relaxed)); }

  /// Position of the sending direction: payload taken since the lane came up, buffered or sent.
  std::uint64_t tx_bytes() const noexcept { return tx_bytes_; }
  std::uint64_t rx_bytes() const noexcept { return rx_bytes_; }  ///< payload that the program has read
  std::uint64_t rx_arrivals() const noexcept { return rx_arrivals_; }
  std::uint64_t tx_messages() const noexcept { return tx_messages_; }
  std::uint64_t rx_messages() const noexcept { return rx_arrivals_; }
  bool dead() const noexcept {
    return dead_.load(std::memory_order_relaxed);
  }  ///< protocol or transport failure: conn.error() says what
  const char* failure() const noexcept { return failure_ != nullptr ? failure_ : conn.error(); }
  bool violated() const noexcept { return violated_; }  ///< dead by a message that breaks the protocol; the words still go through
  bool peer_disconn() const noexcept { return peer_disconn_; }

  // --- sends and receives in place, on devices where a copy is worth to be saved (lane_zcopy.cpp)
  static constexpr std::uint32_t kLongestOffer = 4U << 20;  ///< bytes
  static constexpr std::uint32_t kLongestRead = 4U << 20;   ///< bytes, in one receive
  static constexpr std::uint32_t kLeastRead = 16384;        ///< bytes: for less the copy is cheaper than to register the memory
  static constexpr std::uint32_t kReadPiece = 65536;        ///< bytes of one RDMA Read
  static constexpr std::uint32_t kReadsAhead = 4;           ///< reads under way, if the device can have so many
  static constexpr std::uint32_t kReadAtOnce = 1U << 20;    ///< bytes of one that is done when it is posted
  /// Bytes that lie together and are worth to be offered; more than any send has: none are.
  std::size_t zero_copy_from() const noexcept { return zero_copy_from_; }
  enum class Offered : std::uint8_t { yes, not_now, unregistered };
  /// Offers `count` bytes to the peer's reader, the first of them in line. yes: the caller waits until the offer is over and then
  /// takes its end; the memory stays as it is until then, and nobody sends anything behind it.
  Offered offer(const std::byte* bytes, std::uint32_t count) noexcept;
  bool is_offering() const noexcept { return zero_copy_.offer.is_open; }
  std::uint32_t offer_crossed() const noexcept { return zero_copy_.offer.crossed; }  ///< bytes, so far
  void cancel_offer() noexcept;  ///< over when the peer has answered; at once where the device can withdraw it
  /// Cancels an offer, and waits for the peer's answer, or for its word that it has what was written, for 20 ms at the most. False:
  /// there was none.
  bool settle_lent() noexcept;
  /// An offer that is not cancelled yet, though the peer has said `which`.
  bool may_cancel_for(Word which) const noexcept { return is_offering() && !zero_copy_.offer.is_cancelled && said(which); }
  struct OfferEnd {
    std::uint32_t sent;      ///< bytes from the first on. Of the others nobody reads any more
    std::uint32_t in_place;  ///< of those the peer has read so many by RDMA
    bool whole, cancelled;
  };
  OfferEnd take_offer() noexcept;
  bool has_offer_end() const noexcept { return zero_copy_.offer.has_owner && !zero_copy_.offer.is_open; }
  ZeroCopy& zero_copy() noexcept { return zero_copy_; }

  bool has_advert() const noexcept { return conn.sink().is_open(); }  ///< the peer has more to be read in place
  /// Reads what the peer offers next into `to`. True: the caller waits until !is_reading() and then takes the bytes. False: it is
  /// not worth it, or cannot be.
  bool begin_read(std::byte* to, std::size_t room) noexcept;
  bool is_reading() const noexcept { return zero_copy_.read.under_way != 0; }
  std::uint32_t read_done() const noexcept { return zero_copy_.read.done; }  ///< bytes, so far
  bool has_read() const noexcept { return zero_copy_.read.has_owner && !is_reading(); }
  std::uint32_t take_read() noexcept;  ///< bytes
  void end_read() noexcept;            ///< the program's memory is left in any case; waits for 50 ms at the most
  void refuse_advert() noexcept;       ///< the rest is to come as messages; not while it is read

  // --- the same by the peer's sender, which writes where our reader waits (lane_sink.cpp)
  static constexpr std::uint32_t kLongestSink = 4U << 20;   ///< bytes
  static constexpr std::uint32_t kLongestWrite = 4U << 20;  ///< bytes, in one send
  /// Bytes that lie together and are worth to be advertised; more than any receive has: none are.
  std::size_t sink_from() const noexcept { return sink_from_; }
  enum class Sunk : std::uint8_t { yes, not_now, not_pipelined, unregistered };
  /// Lets the peer write into `to`. yes: the caller waits until !has_sink() and then takes the bytes; the memory stays as it is
  /// until then. not_pipelined: the peer would have to wish it, too.
  Sunk advertise(std::byte* to, std::size_t room) noexcept;
  void wish_pipelined() noexcept;
  bool has_sink() const noexcept { return zero_copy_.sink.is_open; }
  bool has_sink_end() const noexcept { return zero_copy_.sink.has_owner && !zero_copy_.sink.is_open; }
  void cancel_sink() noexcept;         ///< over when the peer has answered
  void drop_sink() noexcept;           ///< the peer writes no more, by what it has said, and if it does its lane fails
  void end_sink() noexcept;            ///< the program's memory is left in any case; waits for 50 ms at the most
  std::uint32_t take_sunk() noexcept;  ///< bytes; whatever else has come is unread()

  bool writes_in_place() const noexcept { return conn.source().mode() == FlowMode::pipelined; }  ///< and offers nothing
  bool has_target() const noexcept { return conn.source().write_target().has_value(); }
  /// Writes the first of `count` bytes where the peer's reader waits. yes: the caller waits until !is_writing() and then takes the
  /// bytes, all of which are sent; the memory stays as it is until then, and nobody sends anything behind it.
  Offered write(const std::byte* bytes, std::uint32_t count) noexcept;
  bool is_writing() const noexcept { return zero_copy_.write.is_open; }
  bool is_lent() const noexcept { return is_offering() || is_writing(); }  ///< memory of the program's, to be read
  bool has_written() const noexcept { return zero_copy_.write.has_owner && !zero_copy_.write.is_open; }
  std::uint32_t take_written() noexcept;  ///< bytes
  /// The sends go by offers, or by messages, until the peer's reader asks again.
  void leave_writing() noexcept;

  // --- small sends that wait for others, to go in one message (lane_gather.cpp)
  /// Bytes that send() took and that wait. Any thread.
  std::uint32_t held() const noexcept { return held_.load(std::memory_order_relaxed); }
  /// They go now. False: they may not, the peer has no buffer for them or the lane is dead.
  bool flush() noexcept;
  /// Takes them back, held() bytes: as if send() had not.
  void take_held(std::byte* out) noexcept;

  // --- after a failure of the device or the path (stream_recovery.cpp)
  /// Ends the QP, and takes in what has arrived until then: afterwards nothing arrives any more. Waits for the device for 50 ms at
  /// the most.
  void stop() noexcept;
  bool stopped() const noexcept { return stopped_; }
  /// Of a stopped lane: another in its place, in `cell`, that needs no device any more. What has arrived is read from it, and
  /// read_back() finds what the peer may not have. nullptr: no memory. This one is to be closed.
  Lane* outlive_device(void* cell) const noexcept;
  /// The peer writes no more to our memory: it has said so, or this end is one that nothing reaches any more.
  bool is_left_alone() const noexcept { return said(kGone) || stopped_ || (unordered_ && dead()); }
  /// Position up to which the peer's payload has arrived.
  std::uint64_t rx_arrived() const noexcept { return arrived_.load(std::memory_order_relaxed); }
  /// As if the peer had said it; the lane is stopped.
  void suppose(Word which, std::uint64_t value) noexcept { words_->word[which].store(value + 1, std::memory_order_release); }
  /// Messages whose arrival the peer has not acknowledged yet; the one that is held, and an offer, are among them.
  std::uint32_t unacknowledged() const noexcept {
    return in_flight() + (held() != 0 ? 1 : 0) + (is_offering() || is_writing() || !zero_copy_.rest.empty() ? 1 : 0);
  }

  // --- switch words
  /// What the anchor carries later may arrive earlier than what was posted here, and what is posted here may be lost with its
  /// sender.
  bool unordered() const noexcept { return unordered_; }
  /// Which words the peer has said, to see that there are new ones.
  std::uint8_t words_said() const noexcept {
    std::uint8_t bits = 0;
    for (unsigned i = 0; i < kWords; ++i) bits |= static_cast<std::uint8_t>(said(static_cast<Word>(i)) << i);
    return bits;
  }
  void write_word(Word which, std::uint64_t value) noexcept;
  /// Asks for a completion behind all that was posted, END_SEEN among it; are_posts_done() is true when drain() has found it. On a
  /// device that acknowledges all of that is in the peer's memory then.
  void await_posts() noexcept;
  bool are_posts_done() const noexcept { return reaped_ >= awaited_; }
  /// The peer's word, or nothing if not said yet.
  bool said(Word which, std::uint64_t* value = nullptr) const noexcept {
    const std::uint64_t raw = words_->word[which].load(std::memory_order_acquire);
    if (raw == 0) return false;
    if (value != nullptr) *value = raw - 1;
    return true;
  }
  /// The peer said END, and the program has read up to there.
  bool end_reached() const noexcept {
    std::uint64_t end = 0;
    return said(kEnd, &end) && rx_bytes_ == end;
  }
  /// Copies lane bytes [from, tx_bytes) that the peer has not read, or not received, out of its memory and the send buffer, or
  /// where they were gathered, for the anchor. False: they are not there.
  bool read_back(std::uint64_t from, std::byte* out, std::size_t bytes) const noexcept;

  // --- sleeping
  void arm(std::uint8_t wake) noexcept { cq_->arm(wake); }
  std::atomic<std::uint32_t>* wake_word() noexcept { return cq_->wake_word(); }
  void wake_sleepers() noexcept { cq_->wake_sleepers(); }

  std::uint16_t recv_credits() const noexcept { return conn.credit().posted(); }
  std::size_t memory_bytes() const noexcept { return recv_.memory_bytes(); }
  std::size_t grown_bytes() const noexcept { return recv_.grown_bytes(); }  ///< registered for buffers beyond the first ones
  std::size_t staging_bytes() const noexcept { return staging_.bytes(); }   ///< registered to gather messages in
  /// Called now and then: when nothing has gone by an unordered lane for kIdleNs, gives back what it gathers messages in, once the
  /// peer has acknowledged all of them, and lets the peer give back what receive buffers have grown by. What the peer waits for to
  /// do the same is said.
  void rest_if_idle(std::int64_t now_ns) noexcept;

  Connection conn;

 private:
  std::uint32_t in_flight() const noexcept { return conn.credit().sent() - conn.credit().acked(); }
  bool may_post() const noexcept {
    return conn.may_send_payload() && in_flight() < kMaxInFlight && requests_ - reaped_ < send_depth_ - kSpareSends && !dead();
  }
  /// What is held has a buffer at the peer: it can go before the direction ends, unless control messages take that one.
  bool may_hold() const noexcept { return in_flight() >= kGatherFrom && may_post(); }
  bool gathers(std::size_t bytes) const noexcept { return held() != 0 || (bytes <= conn.max_payload() / 4 && may_hold()); }
  /// A message of its own, for which staging_ has a place as it is.
  bool may_stage_at_once(std::uint32_t count) const noexcept {
    return !gathers(count) && count < zero_copy_from_ && staging_.active() &&
           count + wire::kBsdhBytes + kMarkBytes <= staging_.longest() && staging_.has_room(staging_.longest());
  }
  std::uint32_t mark_bytes(std::uint32_t message) const noexcept {
    return marks_ends_ && message > kOnePacketBytes ? kMarkBytes : 0;
  }
  static void put_mark(std::byte* message, std::uint32_t bytes) noexcept {
    std::memcpy(message + bytes, message + wire::kMseqOffset, kMarkBytes);
  }
  std::uint32_t max_payload() const noexcept {
    return conn.max_payload() - mark_bytes(conn.max_payload() + static_cast<std::uint32_t>(wire::kBsdhBytes));
  }
  std::uint32_t take_mark(const std::byte* message, std::uint32_t bytes) noexcept;
  std::size_t gather(IovCursor& from, std::size_t bytes) noexcept;
  bool open_gathered() noexcept;
  rdma::Sge close_gathered() noexcept;
  void return_buffers() noexcept;
  bool awaits_ack() const noexcept { return unordered_ && rx_arrivals_ - told_arrivals_ >= kAckAtWait; }
  std::uint32_t shown_qpn() const noexcept;
  bool post_message(const rdma::Sge* sges, std::uint8_t count, std::uint8_t flags = rdma::kInline) noexcept;
  bool post_copy(const rdma::SendWr& wr) noexcept;
  bool post_staged(const rdma::Sge& whole) noexcept;
  bool has_left(bool posted, std::span<const std::byte> header, std::span<const std::byte> payload) noexcept;
  std::uint32_t longest_payload() noexcept;
  void weigh_cuts(std::size_t bytes, std::uint32_t cuts) noexcept;
  bool make_room(std::size_t bytes) noexcept;
  bool post_data(rdma::Sge* sges, std::uint8_t count, std::uint32_t payload) noexcept;
  void send_control() noexcept;
  void release_peers_buffers() noexcept;
  void queue(std::uint32_t buffer, std::uint32_t headers, std::uint32_t bytes) noexcept;
  void follow_offer() noexcept;
  void follow_sink(bool by_message) noexcept;
  void follow_write() noexcept;
  bool keep_rest(const std::byte* bytes, std::uint32_t count, std::uint64_t from) noexcept;
  void continue_read() noexcept;
  void on_read_done(bool success, std::uint32_t bytes) noexcept;
  /// The offer is over now, whatever the peer does. False: the device cannot do that, or there is none.
  bool withdraw_offer() noexcept;
  void leave_programs_memory() noexcept;
  bool may_not_wait() const noexcept;
  void show(bool outgoing, std::span<const std::byte> header, std::span<const std::byte> payload) noexcept;
  void show_read(bool outgoing, IovCursor at, std::size_t bytes) noexcept;
  /// Entries of the send queue come back only when a completion behind them is polled.
  void number_request(rdma::SendWr& wr) noexcept {
    wr.wr_id = ++requests_;
    if (requests_ - signalled_ >= kSignalEvery) [[unlikely]] {
      signalled_ = requests_;
      wr.flags |= rdma::kSignalled;
    }
    if (staging_.active()) [[unlikely]]
      remember_staged(wr);
  }
  void remember_staged(rdma::SendWr& wr) noexcept;
  void free_staged() noexcept;
  void fail(const char* why) noexcept;
  bool ack_is_due() const noexcept;
  /// Bytes of payload and headers: what they took of the peer's staging.
  std::uint64_t arrived_in_all() const noexcept {
    return arrived_.load(std::memory_order_relaxed) + rx_arrivals_ * wire::kBsdhBytes;
  }
  /// An RDMA Write of words into the peer's LaneBlock.
  rdma::SendWr to_peers_block(std::size_t offset, const rdma::Sge& words, bool wake) const noexcept {
    rdma::SendWr wr;
    wr.opcode = rdma::WrOpcode::rdma_write;
    wr.flags = wake ? rdma::kInline | rdma::kSolicited : rdma::kInline;
    wr.sge_count = 1;
    wr.sges = &words;
    wr.remote_addr = peer_words_addr_ + offset;
    wr.rkey = peer_words_rkey_;
    return wr;
  }
  bool publish(unsigned ring) noexcept;
  bool write_peer(std::size_t offset, const std::uint64_t* words, unsigned count, bool wake) noexcept;
  bool read_kept(std::uint64_t from, std::byte* out, std::size_t bytes) const noexcept;
  std::span<const std::byte> peer_bytes(std::uint64_t at, bool* last) noexcept;
  void let_gather() noexcept;
  void say_pulled() noexcept;
  void took(std::size_t total, std::size_t pulled) noexcept;
  void on_completion(const rdma::Wc& wc) noexcept;
  void reap() noexcept;

  inline static CopyPaces copy_paces;

  LaneLimits limits_;
  RecvQueue recv_;
  CopyTrial copy_;  ///< of messages into the peer's buffers, and into ours
  std::atomic<bool> dead_{false};
  bool violated_ = false;
  bool peer_disconn_ = false;
  bool may_buffer_ = false;
  bool unordered_ = false;  ///< then sent payload is kept until the peer has acknowledged it
  bool marks_ends_ = false;
  bool stopped_ = false;
  const char* failure_ = nullptr;
  std::uint32_t cuts_ = 0;         ///< ends of messages within a send, for the size of the peer's buffers; see weigh_cuts()
  std::uint32_t wished_size_ = 0;  ///< bytes: the last ChRcvBuf
  std::uint32_t max_sge_ = 1;
  std::uint32_t send_depth_ = kSendDepth;
  std::uint32_t max_inline_ = 0;  ///< bytes; a longer message is gathered in staging_
  std::size_t zero_copy_from_ = ~std::size_t{0}, sink_from_ = ~std::size_t{0};
  bool may_withdraw_ = false;  ///< reads in place are the process's own work, done when they are posted; offers end at our word

  std::uint64_t rx_bytes_ = 0, rx_arrivals_ = 0;
  std::uint64_t tx_bytes_ = 0, tx_messages_ = 0;
  std::uint32_t burst_ = 0;                   ///< small sends in a row, without a receive or a wait
  std::atomic<std::uint64_t> arrived_{0};     ///< position up to which messages have come and buffered bytes been read
  std::atomic<std::uint64_t> seen_ends_{0};   ///< PeerBuffer::ends() as drain() saw it last
  std::int64_t caught_up_at_ = 0;             ///< when the last receive emptied the peer's buffer and found little; 0: it did not
  std::uint64_t told_arrived_ = 0;            ///< arrived_in_all() when a message left last
  std::uint64_t told_arrivals_ = 0;           ///< rx_arrivals_ at that moment
  std::uint64_t pulled_loudly_ = 0;           ///< position at which the peer's writer was woken last
  std::uint64_t sends_ = 0;                   ///< Sends posted since the QP was made, of every kind
  std::uint64_t requests_ = 0;                ///< those and the RDMA Writes: what takes an entry of the send queue
  std::uint64_t signalled_ = 0, reaped_ = 0;  ///< the last of them that asked for a completion; that completed
  std::uint64_t awaited_ = 0;                 ///< the one that await_posts() made
  std::uint64_t idle_moves_ = 0;              ///< messages with payload, both ways, at the last rest_if_idle() that saw news
  std::int64_t idle_since_ = 0;               ///< when that was, ns
  bool awaits_idle_ = false;                  ///< a completion behind all of them
  bool asked_to_shrink_ = false;              ///< since then
  std::uint32_t sweeps_left_ = 0;             ///< see release_peers_buffers(); as many as a peer can have, and those on their way

  Capture* capture_ = nullptr;
  std::uint32_t capture_conn_ = Capture::kNoConnection;
  std::uint32_t peer_shown_qpn_ = 0;

  rdma::Device* device_ = nullptr;
  rdma::Cq* cq_ = nullptr;
  rdma::Qp* qp_ = nullptr;
  LaneBlock* block_ = nullptr;
  SwitchWords* words_ = nullptr;  ///< block_'s
  SendBuffer send_buffer_;
  Staging staging_;
  ZeroCopy zero_copy_;
  std::byte* gathered_ = nullptr;                         ///< the message that is open: where staging_ has its next piece
  std::uint32_t gathered_most_ = 0;                       ///< bytes of payload that it may get
  std::atomic<std::uint32_t> held_{0};                    ///< bytes of payload that it has; 0: none is open
  std::uint64_t staged_signalled_ = 0;                    ///< Staging::position() at the last request that asked for a completion
  std::array<std::uint64_t, kSendDepth> staged_up_to_{};  ///< Staging::position() behind each request
  PeerBuffer peer_buffer_;
  std::shared_ptr<PeerContext>* peer_;
  rdma::Mr words_mr_view_;
  std::uint64_t peer_words_addr_ = 0;
  rdma::Rkey peer_words_rkey_{};
  std::array<std::atomic<std::uint64_t>*, kRings> peer_end_{};  ///< each ring's end in the peer's cursors, once it is in use
  KeptBytes kept_;               ///< without a device: the block, what is unread, what the peer may not have
  std::uint64_t kept_from_ = 0;  ///< position of the first byte of the latter

  struct Sent {
    std::uint64_t start;    ///< lane position of the first payload byte
    std::uint64_t number;   ///< which Send of the QP
    std::uint32_t payload;  ///< bytes; 0: control
    std::uint32_t headers;  ///< bytes before it
    std::uint64_t staged;   ///< Staging::position() behind it
  };
  std::array<Sent, kMaxInFlight> sent_{};  ///< by MSeq, for read_back
};

}  // namespace sdp
