// A lane's adverts: how the program's own memory is offered to the peer's reader, and how the peer's is read. Rules: adverts.hpp.
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

namespace {
constexpr auto kHeaders = static_cast<std::uint32_t>(wire::payload_offset(wire::Mid::src_avail));
constexpr auto kMoreHeader = static_cast<std::uint32_t>(kHeaders - wire::kBsdhBytes);
constexpr std::uint32_t kPageBytes = 4096;

/// Takes in what comes until `done`; false: not in time.
template <class Done>
bool await(Lane& lane, std::int64_t ns, Done done) noexcept {
  const rdma::SteadyClock clock;
  const std::int64_t until = clock.now() + ns;
  for (;;) {
    lane.drain();
    if (done()) return true;
    if (lane.dead() || clock.now() >= until) return false;
    rdma::sys::call(SYS_sched_yield);
  }
}
}  // namespace

// --- the source

/// In line goes what lies before the next page, so that the rest is whole pages, as far as a message holds it.
Lane::Offered Lane::offer(const std::byte* bytes, std::uint32_t count) noexcept {
  ZeroCopy::Offer& offer = zero_copy_.offer;
  if (offer.has_owner || buffered() != 0 || !flush() || !may_send() || !conn.may_advertise() || !make_room(kPageBytes))
    return Offered::not_now;
  const std::uint32_t longest = longest_payload();
  const auto to_next_page = static_cast<std::uint32_t>(kPageBytes - reinterpret_cast<std::uintptr_t>(bytes) % kPageBytes);
  if (longest <= kMoreHeader || count <= to_next_page) return Offered::not_now;
  const std::uint32_t in_line = std::min(to_next_page, longest - kMoreHeader);
  auto mr = (*peer_)->pd->register_memory({const_cast<std::byte*>(bytes), count}, Access::remote_read);
  if (!mr) {
    RDMA_LOG(info, "%u bytes go by messages: %s (%s)", count, mr.error().what, std::strerror(mr.error().code));
    return Offered::unregistered;
  }
  if ((*mr)->rkey == rdma::Rkey{}) return Offered::unregistered;  // the peer cannot read there

  std::array<std::byte, kHeaders> head;
  const rdma::Sge sges[2] = {{head.data(), kHeaders, {}}, {bytes, in_line, {}}};
  offer.moved_before = conn.source().moved();
  conn.emit_src_avail({count, static_cast<std::uint32_t>((*mr)->rkey), (*mr)->remote_base}, in_line, head);
  Sent& sent = sent_[conn.credit().sent() % kMaxInFlight];
  sent = Sent{tx_bytes_, sends_, in_line, kHeaders, staging_.position()};
  if (!post_message(sges, 2)) return Offered::not_now;
  sent.staged = staging_.position();
  tx_bytes_ += in_line;
  ++tx_messages_;
  burst_ = 0;
  offer.mr = std::move(*mr);
  offer.rkey = offer.mr->rkey;
  offer.memory = bytes;
  offer.bytes = count;
  offer.in_line = offer.crossed = in_line;
  offer.kept = 0;
  offer.is_open = offer.has_owner = true;
  offer.is_cancelled = false;
  return Offered::yes;
}

/// The peer has told how far it is.
void Lane::follow_offer() noexcept {
  ZeroCopy::Offer& offer = zero_copy_.offer;
  if (!offer.is_open) return;
  const auto crossed = offer.in_line + static_cast<std::uint32_t>(conn.source().moved() - offer.moved_before);
  if (capture_ != nullptr && crossed != offer.crossed)
    capture_->read_response(capture_conn_, true, {offer.memory + offer.crossed, crossed - offer.crossed});
  tx_bytes_ += crossed - offer.crossed;
  offer.crossed = crossed;
  if (conn.source().is_open()) return;
  offer.is_open = false;
  if (!may_withdraw_) offer.mr.reset();  // else a fork's child may be here: its owner does it
}

void Lane::cancel_offer() noexcept {
  if (!is_offering()) return;
  zero_copy_.offer.is_cancelled = true;
  conn.want_src_cancel();
  (void)withdraw_offer();
  send_control();
}

bool Lane::withdraw_offer() noexcept {
  if (!may_withdraw_ || !is_offering()) return false;
  // A peer that has spoilt the word has read what it has reported.
  conn.advert_withdrawn(qp_->withdraw(zero_copy_.offer.rkey).value_or(0));
  follow_offer();
  return true;
}

bool Lane::settle_lent() noexcept {
  constexpr std::int64_t kLongest = 20'000'000;
  cancel_offer();
  return await(*this, kLongest, [this] { return !is_lent(); });
}

Lane::OfferEnd Lane::take_offer() noexcept {
  ZeroCopy::Offer& offer = zero_copy_.offer;
  offer.has_owner = false;
  offer.mr.reset();
  return {offer.crossed, offer.crossed - offer.in_line - offer.kept, offer.crossed == offer.bytes, offer.is_cancelled};
}

// --- the sink

bool Lane::begin_read(std::byte* to, std::size_t room) noexcept {
  ZeroCopy::Read& read = zero_copy_.read;
  if (read.has_owner || dead() || unread() != 0) return false;
  const SinkAdverts::Source source = conn.sink().next_read();
  const auto bytes = static_cast<std::uint32_t>(std::min({room, std::size_t{source.left}, std::size_t{kLongestRead}}));
  if (bytes == 0 || (bytes < kLeastRead && bytes < source.left)) return false;
  // On an RNIC the peer's response writes there.
  const bool rnic = device_->attr().node_type == rdma::NodeType::rnic;
  auto mr = (*peer_)->pd->register_memory({to, bytes}, rnic ? Access::local_write | Access::remote_write : Access::local_write);
  if (!mr) {
    RDMA_LOG(info, "%u bytes come by messages: %s (%s)", bytes, mr.error().what, std::strerror(mr.error().code));
    return false;
  }
  read.mr = std::move(*mr);
  read.memory = to;
  read.bytes = bytes;
  read.started = read.done = read.under_way = 0;
  continue_read();
  read.has_owner = is_reading();
  // Without leaving the lock: what has been read counts as arrived before anybody can ask.
  while (may_withdraw_ && is_reading()) {
    drain();
    if (!is_reading() && unread() == 0) continue_read();
  }
  if (!is_reading()) read.mr.reset();
  return read.has_owner;
}

/// Several pieces are under way, so that the peer hears of each and none waits for another's way there and back.
void Lane::continue_read() noexcept {
  ZeroCopy::Read& read = zero_copy_.read;
  const std::uint32_t most = may_withdraw_ ? 1 : std::min(kReadsAhead, device_->attr().max_read_outstanding);
  while (!dead() && read.started < read.bytes && read.under_way < most && requests_ - reaped_ < send_depth_ - kSpareSends) {
    const SinkAdverts::Source source = conn.sink().next_read();
    if (source.left == 0) return;
    const rdma::Sge piece{read.memory + read.started, std::min(may_withdraw_ ? kReadAtOnce : kReadPiece, read.bytes - read.started),
                          read.mr->lkey};
    rdma::SendWr wr;
    wr.opcode = rdma::WrOpcode::rdma_read;
    wr.sge_count = 1;
    wr.sges = &piece;
    wr.remote_addr = source.address;
    wr.rkey = static_cast<rdma::Rkey>(source.rkey);
    const auto before = std::pair(requests_, signalled_);
    number_request(wr);
    wr.flags |= rdma::kSignalled;
    signalled_ = requests_;
    const Post posted = qp_->post_send(wr);
    if (posted != Post::ok) {
      std::tie(requests_, signalled_) = before;
      if (posted == Post::qp_error) fail("the QP is in error");
      return;
    }
    ++read.under_way;
    read.started += piece.length;
    conn.read_started(piece.length);
  }
}

/// Reads complete in the order in which they were posted, and none behind one that has failed brings anything.
void Lane::on_read_done(bool success, std::uint32_t bytes) noexcept {
  ZeroCopy::Read& read = zero_copy_.read;
  if (read.under_way == 0) return;
  --read.under_way;
  if (success) {
    const std::uint32_t asked = may_withdraw_ ? read.started - read.done : std::min(kReadPiece, read.bytes - read.done);
    const std::uint32_t piece = may_withdraw_ ? std::min(bytes, asked) : asked;
    if (piece < asked) read.bytes = read.started;
    if (capture_ != nullptr) capture_->read_response(capture_conn_, false, {read.memory + read.done, piece});
    read.done += piece;
    rx_bytes_ += piece;
    arrived_.store(arrived_.load(std::memory_order_relaxed) + piece, std::memory_order_relaxed);
    conn.read_done(asked, piece);
    if (!stopped_ && !may_withdraw_) continue_read();
  }
  if (read.under_way == 0 && !may_withdraw_) read.mr.reset();
}

std::uint32_t Lane::take_read() noexcept {
  zero_copy_.read.has_owner = false;
  return zero_copy_.read.done;
}

void Lane::end_read() noexcept {
  constexpr std::int64_t kLongest = 50'000'000;
  if (is_reading() && !await(*this, kLongest, [this] { return !is_reading(); })) stop();
}

void Lane::refuse_advert() noexcept {
  if (!has_advert() || is_reading()) return;
  conn.want_send_sm();
  send_control();
}

// --- the end

bool Lane::keep_rest(const std::byte* bytes, std::uint32_t count, std::uint64_t from) noexcept {
  std::byte* const room = zero_copy_.rest.room(count);
  if (room == nullptr) return false;
  std::memcpy(room, bytes, count);
  zero_copy_.rest.added(count);
  zero_copy_.rest_from = from;
  return true;
}

/// Nothing reaches the program's memory any more. What the peer may have read of it, or been written, or not, counts as sent:
/// read_back() finds it. What it may have written here and not told of does not count as arrived.
void Lane::leave_programs_memory() noexcept {
  ZeroCopy::Offer& offer = zero_copy_.offer;
  (void)withdraw_offer();
  if (offer.is_open) {
    const std::uint32_t left = offer.bytes - offer.crossed;
    if (keep_rest(offer.memory + offer.crossed, left, tx_bytes_)) {
      tx_bytes_ += left;
      offer.kept = left;
      offer.crossed = offer.bytes;
    }
    offer.is_open = false;
    offer.mr.reset();
  }
  zero_copy_.read.under_way = 0;
  zero_copy_.read.mr.reset();
  ZeroCopy::Write& write = zero_copy_.write;
  if (write.is_open && conn.is_writing()) (void)keep_rest(write.memory, write.bytes, write.from);
  write.is_open = false;
  write.mr.reset();
  drop_sink();
}

}  // namespace sdp
