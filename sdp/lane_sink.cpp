// A lane's SinkAvails: how the peer's sender writes where a reader of ours waits, and how ours writes where the peer's does. Rules:
// adverts.hpp.
//
// One buffer at a time, and one write, which fills or ends it. A write is over when the peer has acknowledged its RdmaWrCompl, not
// when the device has done with it: until then its bytes may have to go again by another way.
#include <algorithm>
#include <cstring>
#include <tuple>
#include <utility>

#include "rdma_core/base/clock.hpp"
#include "rdma_core/base/log.hpp"
#include "rdma_core/base/sys.hpp"
#include "sdp/lane.hpp"

namespace sdp {

using rdma::Access;
using rdma::Post;

// --- the reader

Lane::Sunk Lane::advertise(std::byte* to, std::size_t room) noexcept {
  ZeroCopy::Sink& sink = zero_copy_.sink;
  if (sink.has_owner || room < sink_from_ || dead() || unread() != 0 || has_advert()) return Sunk::not_now;
  if (conn.sink().mode() != FlowMode::pipelined) return Sunk::not_pipelined;
  // What is held goes first: the message may need the place in which it is gathered.
  if (!flush() || !conn.may_advertise_sink() || requests_ - reaped_ >= send_depth_ - kSpareSends) return Sunk::not_now;
  const auto bytes = static_cast<std::uint32_t>(std::min<std::size_t>(room, kLongestSink));
  auto mr = (*peer_)->pd->register_memory({to, bytes}, Access::local_write | Access::remote_write);
  if (!mr) RDMA_LOG(info, "%u bytes come by messages: %s (%s)", bytes, mr.error().what, std::strerror(mr.error().code));
  if (!mr || (*mr)->rkey == rdma::Rkey{}) return Sunk::unregistered;

  std::array<std::byte, Connection::kSinkAvailBytes> message;
  conn.emit_sink_avail(bytes, static_cast<std::uint32_t>((*mr)->rkey), (*mr)->remote_base, message);
  sent_[conn.credit().sent() % kMaxInFlight] = Sent{tx_bytes_, sends_, 0, 0, staging_.position()};
  const rdma::Sge sge{message.data(), static_cast<std::uint32_t>(message.size()), {}};
  if (!post_message(&sge, 1)) return Sunk::not_now;
  sink.mr = std::move(*mr);
  sink.memory = to;
  sink.done = 0;
  sink.is_open = sink.has_owner = true;
  sink.is_cancelled = false;
  return Sunk::yes;
}

void Lane::wish_pipelined() noexcept {
  conn.want_pipelined();
  recv_.post();
  send_control();
}

/// The peer has told how much it has written, or will not write: then a message may have come in place of that. Its sender waits
/// for an acknowledgement.
void Lane::follow_sink(bool by_message) noexcept {
  ZeroCopy::Sink& sink = zero_copy_.sink;
  while (const std::optional<std::uint32_t> bytes = conn.take_sunk()) {
    if (!std::exchange(sink.is_open, false) || *bytes == 0 || by_message) continue;
    if (capture_ != nullptr) capture_->write(capture_conn_, false, {sink.memory, *bytes});
    sink.done = *bytes;
    rx_bytes_ += *bytes;
    arrived_.store(arrived_.load(std::memory_order_relaxed) + *bytes, std::memory_order_relaxed);
    conn.want_ack();
  }
}

void Lane::cancel_sink() noexcept {
  if (!has_sink()) return;
  zero_copy_.sink.is_cancelled = true;
  conn.want_sink_cancel();
  send_control();
}

void Lane::drop_sink() noexcept {
  zero_copy_.sink.is_open = false;
  zero_copy_.sink.mr.reset();
}

void Lane::end_sink() noexcept {
  constexpr std::int64_t kLongest = 50'000'000;
  cancel_sink();
  const rdma::SteadyClock clock;
  for (const std::int64_t until = clock.now() + kLongest; has_sink() && !dead() && clock.now() < until;) {
    drain();
    rdma::sys::call(SYS_sched_yield);
  }
  if (has_sink()) stop();
  drop_sink();
}

std::uint32_t Lane::take_sunk() noexcept {
  ZeroCopy::Sink& sink = zero_copy_.sink;
  sink.has_owner = false;
  sink.mr.reset();
  return sink.done;
}

// --- the sender

/// Always with a completion: devices that take memory unread for as long as TCP may need it do so only without.
Lane::Offered Lane::write(const std::byte* bytes, std::uint32_t count) noexcept {
  ZeroCopy::Write& write = zero_copy_.write;
  if (write.has_owner || !flush() || !may_post()) return Offered::not_now;
  const auto target = conn.source().write_target();
  if (!target) return Offered::not_now;
  count = std::min({count, target->room, kLongestWrite});
  auto mr = (*peer_)->pd->register_memory({const_cast<std::byte*>(bytes), count}, Access::local_read);
  if (!mr) {
    RDMA_LOG(info, "%u bytes go by messages: %s (%s)", count, mr.error().what, std::strerror(mr.error().code));
    return Offered::unregistered;
  }
  const rdma::Sge all{bytes, count, (*mr)->lkey};
  rdma::SendWr wr;
  wr.opcode = rdma::WrOpcode::rdma_write;
  wr.sge_count = 1;
  wr.sges = &all;
  wr.remote_addr = target->address;
  wr.rkey = static_cast<rdma::Rkey>(target->rkey);
  const auto before = std::pair(requests_, signalled_);
  number_request(wr);
  wr.flags |= rdma::kSignalled;
  signalled_ = requests_;
  if (const Post posted = qp_->post_send(wr); posted != Post::ok) {
    std::tie(requests_, signalled_) = before;
    if (posted == Post::qp_error) fail("the QP is in error");
    return Offered::not_now;
  }
  write.mr = std::move(*mr);
  write.memory = bytes;
  write.bytes = count;
  write.from = tx_bytes_;
  write.request = requests_;
  write.is_open = write.has_owner = true;
  if (capture_ != nullptr) capture_->write(capture_conn_, true, {bytes, count});
  tx_bytes_ += count;
  ++tx_messages_;
  burst_ = 0;
  conn.on_written(count);
  send_control();
  return Offered::yes;
}

void Lane::follow_write() noexcept {
  if (conn.is_writing() || reaped_ < zero_copy_.write.request) return;
  zero_copy_.write.is_open = false;
  zero_copy_.write.mr.reset();
}

std::uint32_t Lane::take_written() noexcept {
  ZeroCopy::Write& write = zero_copy_.write;
  write.has_owner = false;
  write.mr.reset();
  return write.bytes;
}

void Lane::leave_writing() noexcept {
  conn.want_mode(FlowMode::combined);
  send_control();
}

}  // namespace sdp
