#include "sdp/adverts.hpp"

#include <algorithm>

namespace sdp {

using Kind = DueAdvert::Kind;

// ---- the source

SourceAdverts::Rx SourceAdverts::on_rdma_rd_compl(std::uint32_t bytes) noexcept {
  if (reports_owed_ != 0) {
    if (bytes > reports_owed_) return Rx::error;
    reports_owed_ -= bytes;
    return Rx::nothing;
  }
  if (open_.empty()) return Rx::nothing;
  Open& oldest = open_.front();
  if (bytes > oldest.left) return Rx::error;
  oldest.left -= bytes;
  oldest.reported += bytes;
  moved_ += bytes;
  if (oldest.left != 0) return Rx::progress;
  open_.pop();
  return open_.empty() ? over() : Rx::progress;
}

void SourceAdverts::withdrawn(std::uint32_t read) noexcept {
  if (open_.empty()) return;
  const Open advert = open_.front();
  const std::uint32_t owed = std::clamp(read, advert.reported, advert.reported + advert.left) - advert.reported;
  moved_ += owed;
  reports_owed_ += owed;
  open_.clear();
  if (owed == advert.left)
    cancel_ = Cancel::no;
  else
    cancel_ = cancel_ == Cancel::sent ? Cancel::no : Cancel::due;
}

// Whatever we advertised before we took it is void: the sink drops what it has, and what was on its way to it.
SourceAdverts::Rx SourceAdverts::on_send_sm() noexcept { return open_.empty() ? Rx::nothing : over(); }

SourceAdverts::Rx SourceAdverts::on_sink_avail(const wire::SinkAvail& advert) noexcept {
  if (advert.len < least_sink_) return Rx::error;
  if (left_pipelined_.is_unseen()) {
    // The sink takes it back when our ModeChange comes, unless a Data that we sent before that has filled it.
    if (advert.non_discards != left_at_payloads_) {
      --left_at_payloads_;
      --sent_payloads_;
    }
    return Rx::nothing;
  }
  if (mode_ != FlowMode::pipelined) return Rx::error;
  if (advert.non_discards != sent_payloads_) {  // a Data is on its way that the sink will put there
    --sent_payloads_;
    return Rx::nothing;
  }
  if (sinks_.size() >= kAdvertsHeld) return Rx::error;
  sinks_.push({advert.address, advert.rkey, advert.len, 0});
  return open_.empty() ? Rx::nothing : over();  // the sink drops what we advertised, unseen
}

SourceAdverts::Rx SourceAdverts::on_sink_avail_cancel() noexcept {
  if (sinks_.empty()) return Rx::nothing;
  if (write_is_over_ || sinks_.front().written != 0) {
    write_is_over_ = true;
    const Sink oldest = sinks_.front();
    cancel_ack_ = sinks_.size() > 1;
    sinks_.clear();
    sinks_.push(oldest);
  } else {
    cancel_ack_ = true;
    sinks_.clear();
  }
  return Rx::nothing;
}

SourceAdverts::Rx SourceAdverts::on_mode_change(FlowMode mode) noexcept {
  if (mode != FlowMode::combined || mode_ != FlowMode::buffered) return Rx::error;
  mode_ = mode;
  return Rx::nothing;
}

DueAdvert SourceAdverts::next() const noexcept {
  if (write_is_over_) return {.kind = Kind::wr_compl, .bytes = sinks_.front().written};
  if (cancel_ack_) return {.kind = Kind::sink_cancel_ack};
  if (cancel_ == Cancel::due) return {.kind = Kind::src_cancel};
  if (wanted_mode_ && open_.empty() && (sinks_.empty() || sinks_.front().written == 0))
    return {.kind = Kind::mode_change, .mode = *wanted_mode_};
  return {};
}

void SourceAdverts::sent(const DueAdvert& message, std::uint32_t mseq) noexcept {
  switch (message.kind) {
    case Kind::wr_compl:
      write_is_over_ = false;
      sinks_.pop();
      break;
    case Kind::sink_cancel_ack:
      cancel_ack_ = false;
      break;
    case Kind::src_cancel:
      cancel_ = open_.empty() ? Cancel::no : Cancel::sent;
      break;
    case Kind::mode_change:
      if (mode_ == FlowMode::pipelined) {
        left_pipelined_.sent(mseq);
        left_at_payloads_ = sent_payloads_;
        sinks_.clear();
      }
      mode_ = message.mode;
      wanted_mode_.reset();
      break;
    default:
      break;
  }
}

// ---- the sink

SinkAdverts::Rx SinkAdverts::on_payload(std::uint32_t bytes) noexcept {
  if (!open_.empty()) return Rx::error;  // it would pass what is advertised
  if (!sinks_.empty()) {
    if (bytes > sinks_.front()) return Rx::error;
    complete(bytes);
    return Rx::placed;
  }
  ++received_payloads_;
  return Rx::queue;
}

SinkAdverts::Rx SinkAdverts::on_src_avail(const wire::SrcAvail& advert, std::uint32_t in_line) noexcept {
  if (mode_ == FlowMode::buffered || cancelled_) return Rx::error;
  if ((mode_ == FlowMode::combined) != (in_line != 0) || in_line >= advert.len) return Rx::error;
  if (in_line != 0) ++received_payloads_;
  // Sent before the source could know that we take no more, or before it saw our buffers: it will send the bytes anew.
  if (send_sm_ || !sinks_.empty() || said_send_sm_.is_unseen()) return Rx::dropped;
  if (open_.size() >= limit_ || (mode_ == FlowMode::combined && !open_.empty())) return Rx::error;
  open_.push({advert.address + in_line, advert.rkey, advert.len - in_line});
  return Rx::opened;
}

SinkAdverts::Rx SinkAdverts::drop_all() noexcept {
  cancelled_ = cut_ = false;
  if (open_.empty()) return Rx::nothing;
  open_.clear();
  report_is_whole_ = true;
  send_sm_ = true;
  return Rx::dropped;
}

SinkAdverts::Rx SinkAdverts::on_src_avail_cancel() noexcept {
  if (!is_reading()) return drop_all();
  cancelled_ = true;
  return Rx::nothing;
}

void SinkAdverts::read_done(std::uint32_t started, std::uint32_t bytes) noexcept {
  reading_ -= started;
  if (cut_) bytes = 0;
  cut_ = cut_ || bytes != started;
  Source& source = open_.front();
  source.address += bytes;
  source.left -= bytes;
  if (bytes != 0) {
    if (report_is_whole_) reports_.push(0);
    reports_.back() += bytes;
    report_is_whole_ = source.left == 0;
  }
  if (source.left == 0) open_.pop();
  if (reading_ == 0 && (cancelled_ || cut_)) drop_all();
}

bool SinkAdverts::want_send_sm() noexcept {
  if (open_.empty() || is_reading()) return false;
  drop_all();
  return true;
}

SinkAdverts::Rx SinkAdverts::on_rdma_wr_compl(std::uint32_t bytes) noexcept {
  if (sinks_.empty() || bytes > sinks_.front()) return Rx::error;
  return complete(bytes);
}

SinkAdverts::Rx SinkAdverts::on_sink_cancel_ack() noexcept {
  if (cancel_ != Cancel::sent) return Rx::error;
  while (!sinks_.empty()) complete(0);
  return Rx::finished;
}

SinkAdverts::Rx SinkAdverts::on_mode_change(FlowMode mode) noexcept {
  // The source moves with nothing advertised; our own buffers it leaves behind.
  if (!SourceAdverts::is_source_move(mode_, mode) || !open_.empty()) return Rx::error;
  mode_ = mode;
  if (sinks_.empty()) return Rx::nothing;
  while (!sinks_.empty()) complete(0);
  return Rx::finished;
}

DueAdvert SinkAdverts::next() const noexcept {
  if (!reports_.empty()) return {.kind = Kind::rd_compl, .bytes = reports_.front()};
  if (send_sm_) return {.kind = Kind::send_sm};
  if (cancel_ == Cancel::due) return {.kind = Kind::sink_cancel};
  if (wants_combined_) return {.kind = Kind::mode_change, .mode = FlowMode::combined};
  return {};
}

void SinkAdverts::sent(const DueAdvert& message, std::uint32_t mseq) noexcept {
  switch (message.kind) {
    case Kind::rd_compl:
      reports_.pop();
      if (reports_.empty()) report_is_whole_ = true;
      break;
    case Kind::send_sm:
      send_sm_ = false;
      said_send_sm_.sent(mseq);
      break;
    case Kind::sink_cancel:
      cancel_ = Cancel::sent;
      break;
    case Kind::mode_change:
      wants_combined_ = false;
      mode_ = message.mode;
      break;
    default:
      break;
  }
}

}  // namespace sdp
