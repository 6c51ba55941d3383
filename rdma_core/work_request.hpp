// Work requests and completions: what goes into a QP and what comes out of a CQ.
#pragma once

#include <cstddef>
#include <cstdint>

#include "rdma_core/types.hpp"

namespace rdma {

/// A local piece of memory. `lkey` may be anything on an inline request: the bytes are taken before post_send returns.
struct Sge {
  const std::byte* addr = nullptr;
  std::uint32_t length = 0;  ///< bytes
  Lkey lkey{};
};

enum class WrOpcode : std::uint8_t { send, rdma_write, rdma_read };

/// Flags of a SendWr; a bit set.
enum WrFlags : std::uint8_t {
  kSignalled = 1,  ///< makes a completion on success too; errors always complete
  kInline = 2,     ///< at most DeviceAttr::max_inline bytes, copied before post_send returns
  kSolicited = 4,  ///< wakes a peer that armed its CQ. A device with rdma_write_wakes does so for RDMA Writes as well
  kFence = 8,      ///< starts after every earlier RDMA Read of this QP has completed
  kDirect = 16,    ///< of many kInline bytes: a device that copies them itself does so past this core's cache (base/copy.hpp)
};

struct SendWr {
  std::uint64_t wr_id = 0;
  WrOpcode opcode = WrOpcode::send;
  std::uint8_t flags = 0;
  std::uint8_t sge_count = 0;
  const Sge* sges = nullptr;      ///< read before post_send returns; the bytes they name only if kInline
  std::uint64_t remote_addr = 0;  ///< RDMA only: address in the peer's address space
  Rkey rkey{};                    ///< RDMA only
};

/// A buffer for one incoming Send. The device may use DeviceAttr::recv_prefix_bytes bytes in front of `addr`.
struct RecvWr {
  std::uint64_t wr_id = 0;
  std::byte* addr = nullptr;
  std::uint32_t length = 0;  ///< bytes, prefix not included
  Lkey lkey{};
};

enum class WcStatus : std::uint8_t {
  success,
  local_length_error,  ///< message larger than the posted buffer
  local_protection_error,
  remote_access_error,  ///< bad rkey, bounds or permission
  remote_invalid_request,
  rnr_retry_exceeded,  ///< the peer had no receive posted
  retry_exceeded,      ///< the peer does not answer
  flushed,             ///< the QP went to error before this request was done
  fatal,               ///< device gone
};
const char* to_string(WcStatus) noexcept;

enum class WcOpcode : std::uint8_t { send, rdma_write, rdma_read, recv };

struct Wc {
  std::uint64_t wr_id = 0;
  WcStatus status = WcStatus::success;
  WcOpcode opcode = WcOpcode::recv;
  /// recv and rdma_read: bytes placed. Peer-controlled, but never above the posted length. An rdma_read of the peer program's
  /// memory (DeviceAttr::reads_program_memory) completes well with fewer bytes than asked for, or none, where there are no more:
  /// the peer has unmapped or withdrawn them, or is gone. What else lies in the buffer then means nothing.
  std::uint32_t byte_len = 0;
  Qpn qpn{};
};

}  // namespace rdma
