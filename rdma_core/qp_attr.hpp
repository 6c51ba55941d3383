// QP states, and the attributes that a move between them takes: a part common to every transport and a union of the IB and the
// RNIC part. Which moves are legal and what each needs are tables per node type (qp_attr.cpp).
#pragma once

#include <cstdint>
#include <optional>
#include <span>
#include <variant>

#include "rdma_core/base/result.hpp"
#include "rdma_core/types.hpp"

namespace rdma {

enum class QpState : std::uint8_t { reset, init, rtr, rts, sqd, error };
const char* to_string(QpState) noexcept;

/// Used by IB and RoCE. Sources: IBA vol. 1, 11.2.4 (Modify QP).
struct IbQpAttributes {
  std::optional<std::uint16_t> pkey_index;
  std::optional<std::uint8_t> port;
  std::optional<Gid> dgid;
  std::optional<std::uint32_t> dest_qpn;
  std::optional<std::uint32_t> rq_psn;
  std::optional<std::uint32_t> sq_psn;
  std::optional<std::uint8_t> path_mtu;       ///< ibv_mtu code, 1..5
  std::optional<std::uint8_t> min_rnr_timer;  ///< 0..31
  std::optional<std::uint8_t> ack_timeout;    ///< 4.096 us * 2^n
  std::optional<std::uint8_t> retry_count;    ///< 0..6; 7 means for ever on Soft-RoCE
  std::optional<std::uint8_t> rnr_retry;      ///< 0..7
  // Goes with dgid; no move insists on it, for not every link layer has it.
  std::optional<std::uint8_t> sgid_index;     ///< which of the port's own addresses; RoCE
  std::optional<std::uint16_t> dlid;          ///< InfiniBand link layer
  std::optional<std::uint8_t> service_level;  ///< 0..15
};

/// Used by RNICs. Sources: RDMA Protocol Verbs Specification 1.0, section 6; RFC 5044.
struct RnicQpAttributes {
  std::optional<bool> mpa_markers;
  std::optional<bool> mpa_crc;
  std::optional<bool> stream_mode;    ///< true while the TCP stream is not yet in RDMA mode
  std::optional<bool> terminate;      ///< send a Terminate on the move to error
  std::optional<std::uint32_t> peer;  ///< which established stream: the CM's number for it
};

struct QpAttributes {
  QpState state = QpState::reset;
  std::optional<Access> access;                      ///< what the peer may do in this QP's Pd
  std::optional<std::uint8_t> max_read_outstanding;  ///< ORD
  std::optional<std::uint8_t> max_read_incoming;     ///< IRD
  std::variant<std::monostate, IbQpAttributes, RnicQpAttributes> transport;
};

/// Errors: EINVAL illegal move, missing attribute, or the part of the other transport. `what` names which.
Result<Unit> check_move(NodeType node, QpState from, const QpAttributes& attr) noexcept;
bool legal_move(NodeType node, QpState from, QpState to) noexcept;

}  // namespace rdma
