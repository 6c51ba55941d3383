#include "sdp/connection.hpp"

#include <algorithm>

#include "sdp/wire/recv_buf.hpp"

namespace sdp {

using wire::Mid;

namespace {
/// A peer may say any size up to 4 GiB. Longer messages than this bring nothing and could not be counted in memory for long.
constexpr std::uint32_t kLongestMessage = std::uint32_t{16} << 20;
constexpr std::uint32_t believable(std::uint32_t size) noexcept { return std::min(size, kLongestMessage); }
}  // namespace

bool Connection::move(ConnEvent event) noexcept {
  const auto next = next_state(state_, event);
  if (!next) return false;
  state_ = *next;
  see_adverts();
  return true;
}

/// What the state and the adverts together allow.
void Connection::see_adverts() noexcept {
  sending_ = (state_ == ConnState::established || state_ == ConnState::disconn_rcvd) && source_.may_send_data() && !is_writing();
  takes_data_ = state_ == ConnState::established && !sink_.is_open() && sink_.sinks_open() == 0 && !is_writing();
}

void Connection::greeted(std::uint32_t peer_size, std::uint16_t peer_bufs, unsigned peer_adverts) noexcept {
  peer_recv_size_ = first_peer_size_ = believable(peer_size);
  first_peer_bufs_ = peer_bufs;
  credit_.start(peer_bufs, limits_.recv_buffers);
  source_.start(peer_adverts / kAdverts, max_payload());
  sink_.start(1, peer_adverts / kAdverts);
}

Rx Connection::fail(const char* why) noexcept {
  if (state_ != ConnState::aborted) error_ = why;
  move(ConnEvent::abort);
  return Rx::abort;
}

void Connection::emit_hello(const wire::HelloHeader& addresses, std::span<std::byte, wire::kHelloBytes> out) noexcept {
  wire::HelloHeader hello = addresses;
  hello.max_adverts = kAdverts;
  hello.local_rcv_size = recv_size_;
  hello.desired_remote_rcv_size = recv_size_;
  wire::emit_hello(hello, limits_.recv_buffers, out);
  move(ConnEvent::send_hello);
}

void Connection::await_hello() noexcept { move(ConnEvent::await_hello); }

void Connection::emit_hello_ack(std::span<std::byte, wire::kHelloAckBytes> out) noexcept {
  wire::HelloAckHeader ack;
  ack.max_adverts = kAdverts;
  ack.actual_rcv_size = recv_size_;
  wire::emit_hello_ack(ack, limits_.recv_buffers, out);
  hello_ack_due_ = false;
}

Rx Connection::on_message_slow(std::span<const std::byte> shared) noexcept {
  // The peer can still write to the message: everything but payload is judged on a copy.
  std::byte copy[wire::kNativeHelloAckBytes];
  const std::size_t n = std::min(shared.size(), sizeof copy);
  std::memcpy(copy, shared.data(), n);
  const std::span<const std::byte> msg(copy, n);

  if (state_ == ConnState::hello_wait) {
    const auto hello = wire::parse_hello(msg);
    if (!hello) return fail(to_string(hello.error()));
    greeted(hello.value().local_rcv_size, rdma::load_be16(copy + 2), hello.value().adverts());
    hello_ack_due_ = true;
    move(ConnEvent::rx_hello);
    return Rx::established;
  }
  if (state_ == ConnState::hello_sent) {
    const auto ack = wire::parse_hello_ack(msg);
    if (!ack) return fail(to_string(ack.error()));
    greeted(ack.value().actual_rcv_size, rdma::load_be16(copy + 2), ack.value().max_adverts);
    move(ConnEvent::rx_hello_ack);
    return Rx::established;
  }
  if (state_ == ConnState::idle || state_ == ConnState::aborted) return fail("message in a state that takes none");

  if (n < wire::kBsdhBytes) return fail("truncated message");
  const wire::BsdhView head = *wire::BsdhView::checked(msg);
  if (head.len() != shared.size()) return fail("length field differs from the message's length");
  if (!wire::is_known_mid(head.mid())) return fail("unknown message identifier");
  const Mid mid = static_cast<Mid>(head.mid());
  if (shared.size() < wire::payload_offset(mid)) return fail("extended header cut short");
  if (!wire::may_carry_payload(mid) && shared.size() != wire::payload_offset(mid)) return fail("payload in a message without one");
  if (head.flags() & ~wire::kKnownFlags) return fail("reserved flags");
  const bool update = mid == Mid::data && shared.size() == wire::kBsdhBytes;
  if (!credit_.on_receive(head.mseq(), head.mseq_ack(), head.bufs(), update)) return fail("sequence or credit error");

  sink_.on_ack(head.mseq_ack());
  source_.on_ack(head.mseq_ack());
  write_.on_ack(head.mseq_ack());
  if ((head.flags() & wire::kReqPipe) != 0 && grants_pipelined_) want_mode(FlowMode::pipelined);
  see_adverts();
  switch (mid) {
    case Mid::data:
      if (shared.size() == wire::kBsdhBytes) return Rx::control;
      if (state_ == ConnState::disconn_rcvd || state_ == ConnState::closed) return fail("data after DisConn");
      if (head.flags() & wire::kOobPres) return fail("urgent data on a lane: the anchor carries it");
      return on_sink(sink_.on_payload(static_cast<std::uint32_t>(shared.size() - wire::kBsdhBytes)));
    case Mid::disconn:
      if (!move(ConnEvent::rx_disconn)) return fail("second DisConn");
      return Rx::disconn;
    case Mid::abort_conn:
      return fail("the peer sent AbortConn");
    case Mid::ch_rcv_buf: {
      const auto wish = wire::parse_ch_rcv_buf(msg);
      if (!wish) return fail("bad ChRcvBuf");
      if (wanted_recv_size_ != 0) {
        ack_recv_size_ = recv_size_;  // a refusal acks the size in force
        return Rx::control;
      }
      wanted_recv_size_ = std::clamp(wish.value().size, limits_.recv_size, std::max(limits_.recv_size_max, recv_size_));
      return wanted_recv_size_ > recv_size_ ? Rx::resize : Rx::shrink;
    }
    case Mid::ch_rcv_buf_ack: {
      const auto granted = wire::parse_ch_rcv_buf_ack(msg);
      if (!granted || !resize_asked_) return fail("bad ChRcvBufAck");
      resize_asked_ = false;
      if (believable(granted.value().size) < peer_recv_size_) return fail("ChRcvBufAck shrinks the buffers");
      peer_recv_size_ = believable(granted.value().size);
      source_.set_least_sink(max_payload());
      return Rx::resized;
    }
    case Mid::src_avail:
      return on_src_avail(msg, shared.size());
    case Mid::src_avail_cancel:
      (void)sink_.on_src_avail_cancel();
      see_adverts();
      return Rx::control;
    case Mid::rdma_rd_compl:
      return on_source(source_.on_rdma_rd_compl(rdma::load_be32(copy + wire::kBsdhBytes)));
    case Mid::send_sm:
      return on_source(source_.on_send_sm());
    case Mid::sink_avail:
      return on_sink_avail(msg);
    case Mid::sink_avail_cancel:
      return on_source(source_.on_sink_avail_cancel());
    case Mid::rdma_wr_compl:
      return on_sink(sink_.on_rdma_wr_compl(rdma::load_be32(copy + wire::kBsdhBytes)));
    case Mid::sink_cancel_ack:
      return on_sink(sink_.on_sink_cancel_ack());
    case Mid::mode_change:
      return on_mode_change(msg);
    case Mid::susp_comm:
    case Mid::susp_comm_ack:
      return Rx::control;
    default:
      return fail("message that is illegal here");
  }
}

Rx Connection::on_src_avail(std::span<const std::byte> msg, std::size_t bytes) noexcept {
  constexpr std::size_t kHeaders = wire::payload_offset(Mid::src_avail);
  if (state_ == ConnState::disconn_rcvd || state_ == ConnState::closed) return fail("advert after DisConn");
  const auto advert = wire::parse_src_avail_headers(msg.first<kHeaders>(), bytes);
  if (!advert) return fail(to_string(advert.error()));
  if (sink_.on_src_avail(advert.value(), static_cast<std::uint32_t>(bytes - kHeaders)) == SinkAdverts::Rx::error)
    return fail("an advert that is illegal here");
  had_adverts_ = true;
  want_src_cancel();  // both programs send: neither may wait for the other to read
  see_adverts();
  return Rx::advert;
}

Rx Connection::on_sink_avail(std::span<const std::byte> msg) noexcept {
  const auto advert = wire::parse_sink_avail(msg);  // with payload it is longer than what was copied, or than its header says
  if (!advert || msg.size() != kSinkAvailBytes) return fail("an advert that we do not take");
  had_adverts_ = true;
  return on_source(source_.on_sink_avail(advert.value()));
}

Rx Connection::on_mode_change(std::span<const std::byte> msg) noexcept {
  const auto change = wire::parse_mode_change(msg);
  if (!change) return fail("bad ModeChange");
  had_adverts_ = true;
  return change.value().send_half ? on_source(source_.on_mode_change(change.value().mode))
                                  : on_sink(sink_.on_mode_change(change.value().mode));
}

Rx Connection::on_sink(SinkAdverts::Rx rx) noexcept {
  if (rx == SinkAdverts::Rx::error) return fail("not where we advertised");
  see_adverts();
  switch (rx) {
    case SinkAdverts::Rx::queue:
      return Rx::payload;
    case SinkAdverts::Rx::placed:
      return Rx::placed;
    case SinkAdverts::Rx::finished:
      return Rx::sunk;
    default:
      return Rx::control;
  }
}

void Connection::want_mode(FlowMode mode) noexcept {
  source_.want_mode(mode);
  had_adverts_ = true;
}

void Connection::want_pipelined() noexcept {
  hint_ = wire::kReqPipe;
  want_update();
}

void Connection::emit_sink_avail(std::uint32_t bytes, std::uint32_t rkey, std::uint64_t address,
                                 std::span<std::byte, kSinkAvailBytes> out) noexcept {
  wire::Bsdh h;
  h.mid = Mid::sink_avail;
  h.bufs = credit_.posted();
  h.len = static_cast<std::uint32_t>(out.size());
  h.mseq_ack = credit_.received();
  h.mseq = credit_.on_send();
  wire::emit_bsdh(h, out.first<wire::kBsdhBytes>());
  wire::emit_extended(wire::SinkAvail{bytes, rkey, address, sink_.non_discards()}, out.last<out.size() - wire::kBsdhBytes>());
  sink_.on_sink_avail_sent(bytes);
  had_adverts_ = true;
  see_adverts();
}

std::optional<std::uint32_t> Connection::take_sunk() noexcept { return sink_.take_completed(); }

void Connection::on_written(std::uint32_t bytes) noexcept {
  source_.on_written(bytes, false);
  see_adverts();
}

Rx Connection::on_source(SourceAdverts::Rx rx) noexcept {
  if (rx == SourceAdverts::Rx::error) return fail("an advert, or a report of one, that is illegal here");
  see_adverts();
  return rx == SourceAdverts::Rx::nothing ? Rx::control : Rx::answered;
}

void Connection::emit_src_avail(const wire::SrcAvail& advert, std::uint32_t in_line,
                                std::span<std::byte, wire::payload_offset(Mid::src_avail)> out) noexcept {
  wire::Bsdh h;
  h.mid = Mid::src_avail;
  h.bufs = credit_.posted();
  h.len = static_cast<std::uint32_t>(out.size()) + in_line;
  h.mseq_ack = credit_.received();
  h.mseq = credit_.on_send();
  wire::emit_bsdh(h, out.first<wire::kBsdhBytes>());
  wire::emit_extended(advert, out.last<out.size() - wire::kBsdhBytes>());
  source_.on_advert_sent(advert.len, in_line);
  had_adverts_ = true;
  see_adverts();
}

void Connection::advert_withdrawn(std::uint32_t read) noexcept {
  source_.withdrawn(read);
  see_adverts();
}

void Connection::want_send_sm() noexcept {
  (void)sink_.want_send_sm();
  see_adverts();
}

void Connection::read_done(std::uint32_t started, std::uint32_t bytes) noexcept {
  sink_.read_done(started, bytes);
  see_adverts();
}

namespace {
Mid mid_of(DueAdvert::Kind kind) noexcept {
  using Kind = DueAdvert::Kind;
  switch (kind) {
    case Kind::rd_compl:
      return Mid::rdma_rd_compl;
    case Kind::wr_compl:
      return Mid::rdma_wr_compl;
    case Kind::send_sm:
      return Mid::send_sm;
    case Kind::src_cancel:
      return Mid::src_avail_cancel;
    case Kind::sink_cancel:
      return Mid::sink_avail_cancel;
    case Kind::sink_cancel_ack:
      return Mid::sink_cancel_ack;
    default:
      return Mid::mode_change;
  }
}
}  // namespace

std::size_t Connection::emit_advert_control(const DueAdvert& due, bool of_source, std::byte* out) noexcept {
  using Kind = DueAdvert::Kind;
  const bool is_change = due.kind == Kind::mode_change;
  const bool has_value = is_change || due.kind == Kind::rd_compl || due.kind == Kind::wr_compl;
  const std::size_t n = emit_control(mid_of(due.kind), due.bytes, has_value, out);
  if (is_change)  // of a source the peer's receiving half
    wire::emit_extended(wire::ModeChange{due.mode, !of_source}, std::span<std::byte, 4>(out + wire::kBsdhBytes, 4));
  if (due.kind == Kind::wr_compl) write_.sent(credit_.sent());
  of_source ? source_.sent(due, credit_.sent()) : sink_.sent(due, credit_.sent());
  see_adverts();
  return n;
}

/// Of what the adverts have to say, which is what the peer waits for. RdmaWrCompl goes first: right behind what it tells of.
std::size_t Connection::next_advert_control(std::byte* out) noexcept {
  const DueAdvert of_source = source_.next();
  if (of_source.kind == DueAdvert::Kind::wr_compl) return emit_advert_control(of_source, true, out);
  if (const DueAdvert due = sink_.next(); due.kind != DueAdvert::Kind::none) return emit_advert_control(due, false, out);
  return of_source.kind != DueAdvert::Kind::none ? emit_advert_control(of_source, true, out) : 0;
}

void Connection::resize_done(std::uint32_t bytes) noexcept {
  recv_size_ = bytes;
  wanted_recv_size_ = 0;
  ack_recv_size_ = bytes;
}

std::size_t Connection::emit_control(Mid mid, std::uint32_t value, bool has_value, std::byte* out) noexcept {
  wire::Bsdh h;
  h.mid = mid;
  h.flags = std::exchange(hint_, 0);
  h.bufs = credit_.posted();
  h.len = static_cast<std::uint32_t>(wire::kBsdhBytes) + (has_value ? 4 : 0);
  h.mseq_ack = credit_.received();
  h.mseq = credit_.on_send();
  wire::emit_bsdh(h, out);
  if (has_value) rdma::store_be32(out + wire::kBsdhBytes, value);
  return h.len;
}

std::size_t Connection::next_control(std::span<std::byte, kControlBytes> out) noexcept {
  if (state_ == ConnState::idle || state_ == ConnState::hello_sent || state_ == ConnState::hello_wait ||
      state_ == ConnState::aborted)
    return 0;
  if (hello_ack_due_) return 0;
  if (credit_.may_send_control()) {
    if (had_adverts_) [[unlikely]]
      if (const std::size_t n = next_advert_control(out.data()); n != 0) return n;
    if (ack_recv_size_ != 0) {
      const std::uint32_t size = ack_recv_size_;
      ack_recv_size_ = 0;
      return emit_control(Mid::ch_rcv_buf_ack, size, true, out.data());
    }
    if (ask_recv_size_ != 0 && sending_ && !resize_asked_) {
      const std::uint32_t size = ask_recv_size_;
      ask_recv_size_ = 0;
      resize_asked_ = true;
      asked_recv_size_ = size;
      peer_recv_size_ = std::min(peer_recv_size_, size);
      source_.set_least_sink(max_payload());
      return emit_control(Mid::ch_rcv_buf, size, true, out.data());
    }
    if (disconn_due_ && sending_) {
      disconn_due_ = false;
      const std::size_t n = emit_control(Mid::disconn, 0, false, out.data());
      move(ConnEvent::send_disconn);
      return n;
    }
  }
  const bool may_update = credit_.may_send_update() || (ack_wanted_ && credit_.may_send_payload());
  if ((update_wanted_ || credit_.update_is_due()) && may_update) {
    update_wanted_ = ack_wanted_ = false;
    emit_data(0, out.data());
    return wire::kBsdhBytes;
  }
  return 0;
}

}  // namespace sdp
