#include "sdp/wire/describe.hpp"

#include <cstdarg>
#include <cstdio>

#include "sdp/wire/avail.hpp"
#include "sdp/wire/bsdh.hpp"
#include "sdp/wire/hello.hpp"
#include "sdp/wire/mode_change.hpp"
#include "sdp/wire/rdma_compl.hpp"
#include "sdp/wire/recv_buf.hpp"
#include "sdp/wire/susp_comm.hpp"

namespace sdp::wire {

const char* to_string(Mid mid) noexcept {
  switch (mid) {
    case Mid::hello:
      return "Hello";
    case Mid::hello_ack:
      return "HelloAck";
    case Mid::disconn:
      return "DisConn";
    case Mid::abort_conn:
      return "AbortConn";
    case Mid::send_sm:
      return "SendSm";
    case Mid::rdma_wr_compl:
      return "RdmaWrCompl";
    case Mid::rdma_rd_compl:
      return "RdmaRdCompl";
    case Mid::mode_change:
      return "ModeChange";
    case Mid::src_avail_cancel:
      return "SrcAvailCancel";
    case Mid::sink_avail_cancel:
      return "SinkAvailCancel";
    case Mid::sink_cancel_ack:
      return "SinkCancelAck";
    case Mid::ch_rcv_buf:
      return "ChRcvBuf";
    case Mid::ch_rcv_buf_ack:
      return "ChRcvBufAck";
    case Mid::susp_comm:
      return "SuspComm";
    case Mid::susp_comm_ack:
      return "SuspCommAck";
    case Mid::sink_avail:
      return "SinkAvail";
    case Mid::src_avail:
      return "SrcAvail";
    case Mid::data:
      return "Data";
  }
  return "unknown";
}

const char* to_string(WireError error) noexcept {
  switch (error) {
    case WireError::truncated:
      return "shorter than its headers";
    case WireError::unknown_mid:
      return "unknown message identifier";
    case WireError::wrong_mid:
      return "not the message expected here";
    case WireError::bad_length:
      return "length field does not fit the message";
    case WireError::bad_flags:
      return "illegal flags";
    case WireError::bad_version:
      return "another major version of SDP";
    case WireError::bad_ip_version:
      return "illegal IP version or address";
    case WireError::no_adverts:
      return "MaxAdverts is zero";
    case WireError::bad_size:
      return "receive buffer too small for any payload";
    case WireError::bad_sequence:
      return "sequence numbers of a greeting are not zero";
    case WireError::bad_mode:
      return "no such flow-control mode";
    case WireError::bad_range:
      return "advertised memory is empty or wraps round";
    case WireError::bad_payload:
      return "the whole advertised buffer is in line";
  }
  return "unknown error";
}

namespace {

/// Appends to a Description; what does not fit is cut.
class Writer {
 public:
  explicit Writer(Description& d) noexcept : d_(d) {}

  void add(const char* format, ...) noexcept __attribute__((format(printf, 2, 3))) {
    va_list args;
    va_start(args, format);
    const std::size_t room = d_.text.size() - used_;
    const int n = std::vsnprintf(d_.text.data() + used_, room, format, args);
    va_end(args);
    if (n > 0) used_ += static_cast<std::size_t>(n) < room ? static_cast<std::size_t>(n) : room - 1;
  }

 private:
  Description& d_;
  std::size_t used_ = 0;
};

void add_flags(Writer& w, std::uint8_t flags) noexcept {
  if (flags & kOobPres) w.add(" OOB_PRES");
  if (flags & kOobPend) w.add(" OOB_PEND");
  if (flags & kReqPipe) w.add(" REQ_PIPE");
  if (flags & ~kKnownFlags) w.add(" reserved_flags=%#x", flags & ~kKnownFlags);
}

void show(Writer& w, const HelloHeader& h) noexcept {
  w.add(" v%u.%u IPv%u cap=%u adverts=%u rcv=%u want=%u port=%u", h.version >> 4, h.version & 0x0F, h.ip_version, h.capabilities,
        h.adverts(), h.local_rcv_size, h.desired_remote_rcv_size, h.local_port);
}
void show(Writer& w, const HelloAckHeader& h) noexcept {
  w.add(" v%u.%u adverts=%u rcv=%u", h.version >> 4, h.version & 0x0F, h.max_adverts, h.actual_rcv_size);
}
void show(Writer& w, const RdmaWrCompl& v) noexcept { w.add(" written=%u", v.bytes); }
void show(Writer& w, const RdmaRdCompl& v) noexcept { w.add(" read=%u", v.bytes); }
void show(Writer& w, const ModeChange& v) noexcept {
  static constexpr const char* kNames[] = {"buffered", "combined", "pipelined"};
  w.add(" %s half to %s", v.send_half ? "send" : "receive", kNames[static_cast<unsigned>(v.mode)]);
}
void show(Writer& w, const ChRcvBuf& v) noexcept { w.add(" size=%u", v.size); }
void show(Writer& w, const ChRcvBufAck& v) noexcept { w.add(" size=%u", v.size); }
void show(Writer& w, const SuspComm& v) noexcept { w.add(" service=%#llx", static_cast<unsigned long long>(v.service_id)); }
void show(Writer& w, const SinkAvail& v) noexcept {
  w.add(" bytes=%u rkey=%#x address=%#llx non_discards=%u", v.len, v.rkey, static_cast<unsigned long long>(v.address),
        v.non_discards);
}
void show(Writer& w, const SrcAvail& v) noexcept {
  w.add(" bytes=%u rkey=%#x address=%#llx", v.len, v.rkey, static_cast<unsigned long long>(v.address));
}

template <class T>
void show_or_blame(Writer& w, const rdma::Result<T, WireError>& parsed) noexcept {
  if (parsed)
    show(w, parsed.value());
  else
    w.add(" : %s", to_string(parsed.error()));
}

void add_extended(Writer& w, Mid mid, std::span<const std::byte> msg) noexcept {
  switch (mid) {
    case Mid::hello:
      return show_or_blame(w, parse_hello(msg));
    case Mid::hello_ack:
      return show_or_blame(w, parse_hello_ack(msg));
    case Mid::rdma_wr_compl:
      return show_or_blame(w, parse_rdma_wr_compl(msg));
    case Mid::rdma_rd_compl:
      return show_or_blame(w, parse_rdma_rd_compl(msg));
    case Mid::mode_change:
      return show_or_blame(w, parse_mode_change(msg));
    case Mid::ch_rcv_buf:
      return show_or_blame(w, parse_ch_rcv_buf(msg));
    case Mid::ch_rcv_buf_ack:
      return show_or_blame(w, parse_ch_rcv_buf_ack(msg));
    case Mid::susp_comm:
      return show_or_blame(w, parse_susp_comm(msg));
    case Mid::sink_avail:
      return show_or_blame(w, parse_sink_avail(msg));
    case Mid::src_avail:
      return show_or_blame(w, parse_src_avail(msg));
    default:
      return;  // no extended header
  }
}

}  // namespace

Description describe(std::span<const std::byte> msg) noexcept {
  Description result;
  Writer w(result);
  const auto view = BsdhView::checked(msg);
  if (!view) {
    w.add("%zu bytes, shorter than a header", msg.size());
    return result;
  }
  if (is_known_mid(view->mid()))
    w.add("%s", to_string(static_cast<Mid>(view->mid())));
  else
    w.add("message %#04x", view->mid());
  w.add(" mseq=%u ack=%u bufs=%u len=%u", view->mseq(), view->mseq_ack(), view->bufs(), view->len());
  add_flags(w, view->flags());
  const auto base = parse_bsdh(msg);
  if (!base) {
    w.add(" : %s", to_string(base.error()));
    return result;
  }
  add_extended(w, base.value().mid, msg);
  return result;
}

}  // namespace sdp::wire
