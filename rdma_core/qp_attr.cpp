// The tables. One row per legal move; what is not in the table is illegal. tests/rdma_core/qp_moves.txt shows the whole matrix:
// a change here changes that file, and its diff is what a reviewer reads.
//
// Sources: IBA vol. 1, 10.3.1 (QP states) and 11.2.5.3 (attributes per move); RDMA Protocol Verbs Specification 1.0, 6.2 (states of
// an RNIC's QP).
#include "rdma_core/qp_attr.hpp"

#include <errno.h>

namespace rdma {
namespace {

/// Attributes as bits, in the order in which a missing one is reported.
enum Need : std::uint32_t {
  kNothing = 0,
  kAccess = 1u << 0,
  kReadOutstanding = 1u << 1,
  kReadIncoming = 1u << 2,
  kPkeyIndex = 1u << 3,
  kPort = 1u << 4,
  kDgid = 1u << 5,
  kDestQpn = 1u << 6,
  kRqPsn = 1u << 7,
  kSqPsn = 1u << 8,
  kPathMtu = 1u << 9,
  kMinRnrTimer = 1u << 10,
  kAckTimeout = 1u << 11,
  kRetryCount = 1u << 12,
  kRnrRetry = 1u << 13,
  kPeer = 1u << 14,
  kStreamMode = 1u << 15,
};

struct Missing {
  Need need;
  const char* what;
};
constexpr Missing kMissing[] = {
    {kAccess, "qp: access missing"},
    {kReadOutstanding, "qp: max_read_outstanding missing"},
    {kReadIncoming, "qp: max_read_incoming missing"},
    {kPkeyIndex, "qp: pkey_index missing"},
    {kPort, "qp: port missing"},
    {kDgid, "qp: dgid missing"},
    {kDestQpn, "qp: dest_qpn missing"},
    {kRqPsn, "qp: rq_psn missing"},
    {kSqPsn, "qp: sq_psn missing"},
    {kPathMtu, "qp: path_mtu missing"},
    {kMinRnrTimer, "qp: min_rnr_timer missing"},
    {kAckTimeout, "qp: ack_timeout missing"},
    {kRetryCount, "qp: retry_count missing"},
    {kRnrRetry, "qp: rnr_retry missing"},
    {kPeer, "qp: peer missing"},
    {kStreamMode, "qp: stream_mode missing"},
};

struct Move {
  QpState from;
  QpState to;
  std::uint32_t needs;  ///< Need bits
};

constexpr Move kIbMoves[] = {
    {QpState::reset, QpState::init, kPkeyIndex | kPort | kAccess},
    {QpState::init, QpState::init, kNothing},  // other port or partition before the path is known
    {QpState::init, QpState::rtr, kDgid | kDestQpn | kRqPsn | kPathMtu | kMinRnrTimer | kReadIncoming},
    {QpState::rtr, QpState::rts, kSqPsn | kAckTimeout | kRetryCount | kRnrRetry | kReadOutstanding},
    {QpState::rts, QpState::rts, kNothing},  // other access or RNR timer while it runs
    {QpState::rts, QpState::sqd, kNothing},
    {QpState::sqd, QpState::rts, kNothing},
    {QpState::sqd, QpState::sqd, kNothing},  // the path may change only while the send queue is drained
    {QpState::reset, QpState::reset, kNothing},
    {QpState::init, QpState::reset, kNothing},
    {QpState::rtr, QpState::reset, kNothing},
    {QpState::rts, QpState::reset, kNothing},
    {QpState::sqd, QpState::reset, kNothing},
    {QpState::error, QpState::reset, kNothing},
    {QpState::reset, QpState::error, kNothing},
    {QpState::init, QpState::error, kNothing},
    {QpState::rtr, QpState::error, kNothing},
    {QpState::rts, QpState::error, kNothing},
    {QpState::sqd, QpState::error, kNothing},
    {QpState::error, QpState::error, kNothing},
};

// An RNIC's QP has no path of its own: the move to rts binds it to an established TCP stream, which both sides have just left RDMA
// mode's negotiation on. `reset` is what the Verbs Specification calls idle.
constexpr Move kRnicMoves[] = {
    {QpState::reset, QpState::init, kAccess},
    {QpState::init, QpState::rts, kPeer | kStreamMode},
    {QpState::rts, QpState::rts, kNothing},
    {QpState::reset, QpState::reset, kNothing},
    {QpState::init, QpState::reset, kNothing},
    {QpState::rts, QpState::reset, kNothing},
    {QpState::error, QpState::reset, kNothing},
    {QpState::reset, QpState::error, kNothing},
    {QpState::init, QpState::error, kNothing},
    {QpState::rts, QpState::error, kNothing},  // `terminate` says whether the peer is told why
    {QpState::error, QpState::error, kNothing},
};

constexpr QpState kStates[] = {QpState::reset, QpState::init, QpState::rtr, QpState::rts, QpState::sqd, QpState::error};

constexpr std::span<const Move> moves_of(NodeType node) noexcept {
  return node == NodeType::rnic ? std::span<const Move>(kRnicMoves) : std::span<const Move>(kIbMoves);
}

constexpr const Move* find_move(NodeType node, QpState from, QpState to) noexcept {
  for (const Move& move : moves_of(node))
    if (move.from == from && move.to == to) return &move;
  return nullptr;
}

constexpr bool deterministic(std::span<const Move> moves) noexcept {
  for (std::size_t i = 0; i < moves.size(); ++i)
    for (std::size_t j = i + 1; j < moves.size(); ++j)
      if (moves[i].from == moves[j].from && moves[i].to == moves[j].to) return false;
  return true;
}
constexpr bool always_has_a_way_out(NodeType node) noexcept {
  for (QpState to : {QpState::reset, QpState::error})
    for (const Move& move : moves_of(node))
      if (find_move(node, move.from, to) == nullptr || find_move(node, move.to, to) == nullptr) return false;
  return true;
}
constexpr bool every_need_has_a_name() noexcept {
  std::uint32_t named = 0;
  for (const Missing& missing : kMissing) named |= missing.need;
  for (NodeType node : {NodeType::ib_ca, NodeType::rnic})
    for (const Move& move : moves_of(node))
      if ((move.needs & ~named) != 0) return false;
  return true;
}
constexpr bool never_touches(NodeType node, QpState state) noexcept {
  for (QpState other : kStates)
    if (find_move(node, other, state) != nullptr || find_move(node, state, other) != nullptr) return false;
  return true;
}

static_assert(deterministic(kIbMoves) && deterministic(kRnicMoves));  // no two rows for one pair
static_assert(always_has_a_way_out(NodeType::ib_ca) && always_has_a_way_out(NodeType::rnic));
static_assert(every_need_has_a_name());
static_assert(find_move(NodeType::ib_ca, QpState::init, QpState::rts) == nullptr);
static_assert(find_move(NodeType::ib_ca, QpState::error, QpState::rts) == nullptr);
static_assert(never_touches(NodeType::rnic, QpState::rtr) && never_touches(NodeType::rnic, QpState::sqd));

std::uint32_t present(const QpAttributes& attr) noexcept {
  std::uint32_t have = 0;
  const auto note = [&have](const auto& attribute, Need need) {
    if (attribute) have |= need;
  };
  note(attr.access, kAccess);
  note(attr.max_read_outstanding, kReadOutstanding);
  note(attr.max_read_incoming, kReadIncoming);
  if (const auto* ib = std::get_if<IbQpAttributes>(&attr.transport)) {
    note(ib->pkey_index, kPkeyIndex);
    note(ib->port, kPort);
    note(ib->dgid, kDgid);
    note(ib->dest_qpn, kDestQpn);
    note(ib->rq_psn, kRqPsn);
    note(ib->sq_psn, kSqPsn);
    note(ib->path_mtu, kPathMtu);
    note(ib->min_rnr_timer, kMinRnrTimer);
    note(ib->ack_timeout, kAckTimeout);
    note(ib->retry_count, kRetryCount);
    note(ib->rnr_retry, kRnrRetry);
  } else if (const auto* rnic = std::get_if<RnicQpAttributes>(&attr.transport)) {
    note(rnic->peer, kPeer);
    note(rnic->stream_mode, kStreamMode);
  }
  return have;
}

/// nullptr, or which value is outside its field.
const char* out_of_range(const IbQpAttributes& ib) noexcept {
  constexpr std::uint32_t kLast24Bit = 0xFFFFFF;
  if (ib.dest_qpn > kLast24Bit) return "qp: dest_qpn has more than 24 bits";
  if (ib.rq_psn > kLast24Bit) return "qp: rq_psn has more than 24 bits";
  if (ib.sq_psn > kLast24Bit) return "qp: sq_psn has more than 24 bits";
  if (ib.path_mtu && (*ib.path_mtu < 1 || *ib.path_mtu > 5)) return "qp: path_mtu not 1..5";
  if (ib.min_rnr_timer > 31) return "qp: min_rnr_timer not 0..31";
  if (ib.ack_timeout > 31) return "qp: ack_timeout not 0..31";
  if (ib.retry_count > 7) return "qp: retry_count not 0..7";
  if (ib.rnr_retry > 7) return "qp: rnr_retry not 0..7";
  if (ib.port && *ib.port == 0) return "qp: port 0";
  return nullptr;
}

}  // namespace

const char* to_string(QpState state) noexcept {
  switch (state) {
    case QpState::reset:
      return "reset";
    case QpState::init:
      return "init";
    case QpState::rtr:
      return "rtr";
    case QpState::rts:
      return "rts";
    case QpState::sqd:
      return "sqd";
    case QpState::error:
      return "error";
  }
  return "?";
}

Result<Unit> check_move(NodeType node, QpState from, const QpAttributes& attr) noexcept {
  const Move* move = find_move(node, from, attr.state);
  if (move == nullptr) return fail(EINVAL, "qp: illegal move");
  const auto* ib = std::get_if<IbQpAttributes>(&attr.transport);
  const auto* rnic = std::get_if<RnicQpAttributes>(&attr.transport);
  if (node == NodeType::rnic && ib != nullptr) return fail(EINVAL, "qp: IB attributes for an RNIC");
  if (node != NodeType::rnic && rnic != nullptr) return fail(EINVAL, "qp: RNIC attributes for an IB device");
  const std::uint32_t have = present(attr);
  for (const Missing& missing : kMissing)
    if ((move->needs & missing.need) != 0 && (have & missing.need) == 0) return fail(EINVAL, missing.what);
  if (ib != nullptr)
    if (const char* what = out_of_range(*ib)) return fail(EINVAL, what);
  if (rnic != nullptr && attr.state == QpState::rts && rnic->stream_mode == true)
    return fail(EINVAL, "qp: rts needs stream_mode false");
  return Unit{};
}

bool legal_move(NodeType node, QpState from, QpState to) noexcept { return find_move(node, from, to) != nullptr; }

}  // namespace rdma
