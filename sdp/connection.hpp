// Connection: the SDP protocol of one lane. Decides; never posts, waits, locks, allocates or reads a clock.
//
//   getters       const
//   on_*          a message came: on_message()
//   emit_*        the caller is about to post this message: writes its header and counts it
//   next_control  which control message is due now; emit it, post it, ask again
//
// Threads: externally serialised (the stream's lock). Memory: plain data, also in memory shared with fork's children.
// Payload is never seen here: the caller knows where a message lies and what is left of it.
#pragma once

#include <cstddef>
#include <cstdint>
#include <optional>
#include <span>
#include <utility>

#include "sdp/adverts.hpp"
#include "sdp/conn_state.hpp"
#include "sdp/credit.hpp"
#include "sdp/wire/bsdh.hpp"
#include "sdp/wire/hello.hpp"

namespace sdp {

struct ConnLimits {
  std::uint32_t recv_size = 2048;       ///< bytes of each private receive buffer at first, BSDH included
  std::uint32_t recv_size_max = 65536;  ///< what a ChRcvBuf of the peer may ask for
  std::uint16_t recv_buffers = 16;      ///< posted at first, Hello's own not included
};

/// What on_message() found; anything the caller must act on.
enum class Rx : std::uint8_t {
  payload,      ///< payload bytes follow the header: queue them
  placed,       ///< likewise, and the buffer that we advertised is over by it: take_sunk()
  sunk,         ///< that buffer is over: take_sunk(); the message's own can go home
  advert,       ///< likewise behind a SrcAvail's headers; sink() may have more to read
  control,      ///< consumed; the buffer can go home
  established,  ///< Hello or HelloAck completed the set-up; the buffer can go home
  disconn,      ///< the peer's half is closed, after the payload queued so far
  resize,       ///< the peer asks for larger buffers: wanted_recv_size(); answer when the last small one is gone (resize_done)
  shrink,       ///< the peer sends nothing longer than wanted_recv_size() any more; answer when the last large one is gone
  resized,      ///< our wish was answered: max_payload() says how
  answered,     ///< the peer has told of our advert: source() has changed
  abort,        ///< AbortConn or an illegal message: error() says which; the lane is over
};

class Connection {
 public:
  explicit Connection(const ConnLimits& limits) noexcept : limits_(limits), recv_size_(limits.recv_size) {}

  ConnState state() const noexcept { return state_; }
  const CreditWindow& credit() const noexcept { return credit_; }
  const char* error() const noexcept { return error_; }
  bool may_send_payload() const noexcept { return sending_ && credit_.may_send_payload(); }
  std::uint32_t max_payload() const noexcept { return peer_recv_size_ - static_cast<std::uint32_t>(wire::kBsdhBytes); }
  std::uint32_t wanted_recv_size() const noexcept { return wanted_recv_size_; }
  std::uint32_t recv_size() const noexcept { return recv_size_; }  ///< in force: no message of the peer's is longer, in bytes

  /// Writes the header of a Data message; may_send_payload() must hold (or credit().may_send_update() with `payload` 0).
  void emit_data(std::uint32_t payload, std::byte* out) noexcept {
    if (payload != 0) source_.on_data_sent();
    wire::Bsdh h;
    h.flags = std::exchange(hint_, 0);
    h.bufs = credit_.posted();
    h.len = static_cast<std::uint32_t>(wire::kBsdhBytes) + payload;
    h.mseq_ack = credit_.received();
    h.mseq = credit_.on_send();
    wire::emit_bsdh(h, out);
  }
  void on_posted(std::uint32_t buffers) noexcept { credit_.on_posted(buffers); }

  /// `msg` is what the completion reported, still in memory that the peer can write to; header bytes are copied before they are
  /// read.
  Rx on_message(std::span<const std::byte> msg) noexcept {
    if (msg.size() >= wire::kBsdhBytes) {
      std::byte head[wire::kBsdhBytes];
      std::memcpy(head, msg.data(), sizeof head);
      if (takes_data_ && std::to_integer<std::uint8_t>(head[0]) == static_cast<std::uint8_t>(wire::Mid::data) &&
          std::to_integer<std::uint8_t>(head[1]) == 0 && rdma::load_be32(head + 4) == msg.size()) [[likely]] {
        if (!credit_.on_receive(rdma::load_be32(head + 8), rdma::load_be32(head + 12), rdma::load_be16(head + 2),
                                msg.size() == wire::kBsdhBytes))
          return fail("sequence or credit error");
        if (msg.size() == wire::kBsdhBytes) return Rx::control;
        sink_.on_queued();
        return Rx::payload;
      }
    }
    return on_message_slow(msg);
  }

  // --- set-up. Active: emit_hello first. Passive: await_hello, then on_message says established, then emit_hello_ack.
  void emit_hello(const wire::HelloHeader& addresses, std::span<std::byte, wire::kHelloBytes> out) noexcept;
  void await_hello() noexcept;
  void emit_hello_ack(std::span<std::byte, wire::kHelloAckBytes> out) noexcept;
  bool hello_ack_due() const noexcept { return hello_ack_due_; }

  // --- adverts (adverts.hpp). In Combined mode one SrcAvail at a time, and while it is open no payload may be sent; in Pipelined
  // one SinkAvail at a time, and between an RDMA Write and the peer's word that it has it no payload either.
  /// What Hello says that we hold at once: one of each half-pipe's. To a peer that says less than two nothing is advertised.
  static constexpr std::uint8_t kAdverts = 2;
  const SourceAdverts& source() const noexcept { return source_; }
  const SinkAdverts& sink() const noexcept { return sink_; }
  bool may_advertise() const noexcept {
    return may_send_payload() && source_.mode() == FlowMode::combined && source_.may_advertise(sink_.is_open());
  }
  /// Writes both headers; `in_line` bytes of payload follow. may_advertise() must hold.
  void emit_src_avail(const wire::SrcAvail& advert, std::uint32_t in_line,
                      std::span<std::byte, wire::payload_offset(wire::Mid::src_avail)> out) noexcept;
  void want_src_cancel() noexcept { (void)source_.want_cancel(); }
  void advert_withdrawn(std::uint32_t read) noexcept;  ///< as SourceAdverts::withdrawn()
  void want_send_sm() noexcept;                        ///< the rest of the peer's advert is to come as Data; not while it is read
  void read_started(std::uint32_t bytes) noexcept { sink_.read_started(bytes); }
  void read_done(std::uint32_t started, std::uint32_t bytes) noexcept;

  /// The peer's wishes for Pipelined mode are granted: this end writes to its reader's memory.
  void grant_pipelined() noexcept { grants_pipelined_ = true; }
  void want_mode(FlowMode mode) noexcept;  ///< of our sending half
  /// The peer should know, as soon as something is to be said, that our reader would take bytes by RDMA Write.
  void want_pipelined() noexcept;
  bool may_advertise_sink() const noexcept {
    return (state_ == ConnState::established || state_ == ConnState::disconn_sent) && credit_.may_send_control() &&
           sink_.may_advertise();
  }
  static constexpr std::size_t kSinkAvailBytes = wire::payload_offset(wire::Mid::sink_avail);
  /// may_advertise_sink() must hold. `bytes` are at least ConnLimits::recv_size_max, or a Data that crosses may not fit.
  void emit_sink_avail(std::uint32_t bytes, std::uint32_t rkey, std::uint64_t address,
                       std::span<std::byte, kSinkAvailBytes> out) noexcept;
  void want_sink_cancel() noexcept { (void)sink_.want_sink_cancel(); }
  /// The buffer that we have advertised is over, with so many bytes written there.
  std::optional<std::uint32_t> take_sunk() noexcept;
  /// write_target()'s first `bytes` are posted: RdmaWrCompl is the next control message.
  void on_written(std::uint32_t bytes) noexcept;
  /// The peer has not said yet that it has the last RdmaWrCompl.
  bool is_writing() const noexcept { return source_.owes_wr_compl() || write_.is_unseen(); }

  // --- control. The largest control message:
  static constexpr std::size_t kControlBytes = 24;
  /// Length of the next control message that is due and may be sent now, written to `out`; 0: none. Post it before asking again.
  std::size_t next_control(std::span<std::byte, kControlBytes> out) noexcept;
  void want_update() noexcept { update_wanted_ = true; }             ///< the peer would like an acknowledgement
  void want_ack() noexcept { update_wanted_ = ack_wanted_ = true; }  ///< the peer waits for it, also if it grants nothing
  bool wants_update() const noexcept { return update_wanted_; }
  void want_disconn() noexcept { disconn_due_ = true; }
  void want_peer_recv_size(std::uint32_t bytes) noexcept { ask_recv_size_ = bytes; }
  bool resize_pending() const noexcept { return ask_recv_size_ != 0 || resize_asked_; }
  /// All posted buffers take messages of `bytes`; the size in force refuses the peer's wish.
  void resize_done(std::uint32_t bytes) noexcept;
  /// The peer has more or larger buffers than at first.
  bool peer_has_grown() const noexcept { return peer_recv_size_ > first_peer_size_ || credit_.peer_posted() > first_peer_bufs_; }
  /// It may go back to those: nothing longer is sent from here on, until it grants that again.
  void want_peer_to_shrink() noexcept { ask_recv_size_ = first_peer_size_; }
  bool peer_shrinks() const noexcept { return resize_asked_ && asked_recv_size_ == first_peer_size_; }
  std::uint16_t first_peer_bufs() const noexcept { return first_peer_bufs_; }
  void abort(const char* why) noexcept { (void)fail(why); }

 private:
  Rx on_message_slow(std::span<const std::byte> msg) noexcept;
  Rx fail(const char* why) noexcept;
  bool move(ConnEvent event) noexcept;
  void greeted(std::uint32_t peer_size, std::uint16_t peer_bufs, unsigned peer_adverts) noexcept;
  void see_adverts() noexcept;
  Rx on_src_avail(std::span<const std::byte> copy, std::size_t bytes) noexcept;
  Rx on_source(SourceAdverts::Rx rx) noexcept;
  Rx on_sink(SinkAdverts::Rx rx) noexcept;
  Rx on_sink_avail(std::span<const std::byte> msg) noexcept;
  Rx on_mode_change(std::span<const std::byte> msg) noexcept;
  std::size_t emit_control(wire::Mid mid, std::uint32_t value, bool has_value, std::byte* out) noexcept;
  std::size_t emit_advert_control(const DueAdvert& due, bool of_source, std::byte* out) noexcept;
  std::size_t next_advert_control(std::byte* out) noexcept;

  ConnLimits limits_;
  CreditWindow credit_;
  ConnState state_ = ConnState::idle;
  bool sending_ = false;      ///< established, our half open, and no byte that a Data would pass
  bool takes_data_ = false;   ///< established, and Data concerns no advert
  bool had_adverts_ = false;  ///< of either side
  bool hello_ack_due_ = false;
  bool update_wanted_ = false;
  bool ack_wanted_ = false;
  bool disconn_due_ = false;
  bool resize_asked_ = false;
  bool grants_pipelined_ = false;
  std::uint8_t hint_ = 0;  ///< flags of our next message
  UnseenMessage write_;    ///< our last RdmaWrCompl
  std::uint32_t recv_size_;
  std::uint32_t peer_recv_size_ = static_cast<std::uint32_t>(wire::kBsdhBytes);
  std::uint32_t first_peer_size_ = 0;  ///< peer_recv_size_ as it was in its greeting
  std::uint16_t first_peer_bufs_ = 0;
  std::uint32_t wanted_recv_size_ = 0;
  std::uint32_t ack_recv_size_ = 0;  ///< ChRcvBufAck due with this size
  std::uint32_t ask_recv_size_ = 0;  ///< ChRcvBuf due with this size
  std::uint32_t asked_recv_size_ = 0;
  SourceAdverts source_;
  SinkAdverts sink_;
  const char* error_ = "";
};

}  // namespace sdp
