// Links: one per peer process. A link is two segments, one per direction, and the ways to wake the peer. Made by the CM, used by
// Pds.
#pragma once

#include <atomic>
#include <cstdint>
#include <memory>
#include <mutex>
#include <vector>

#include "rdma_core/base/result.hpp"
#include "rdma_core/drivers/shm/shm_bell.hpp"
#include "rdma_core/drivers/shm/shm_program_memory.hpp"
#include "rdma_core/drivers/shm/shm_segment.hpp"

namespace rdma::shm {

/// Who is at the other end, as the kernel and the peer's Hello say.
struct PeerIdentity {
  ProcessId process;
  std::uint32_t uid = 0;       ///< SO_PEERCRED
  std::int32_t pid = 0;        ///< SO_PEERCRED; 0 in a foreign pid namespace
  std::uint32_t own_euid = 0;  ///< ours when the link was made: other credentials need another link
  friend bool operator==(const PeerIdentity&, const PeerIdentity&) = default;
};

class ShmLink {
 public:
  ~ShmLink();
  std::uint64_t id = 0;  ///< Path::id
  ProcessId nonce;       ///< names the link between its two ends; only they know it
  PeerIdentity peer;
  bool self = false;         ///< both ends are this process; one segment serves both
  bool needs_fence = false;  ///< one of the two processes has no membarrier: senders fence
  int socket = -1;           ///< the CM's connection to the peer; owned
  PeerBell bell;             ///< the peer's completion channel
  std::unique_ptr<OwnSegment> own;
  std::unique_ptr<PeerSegment> theirs;  ///< nullptr on a self link
  OwnProof proof;                       ///< by which the peer may read this process's memory
  ProgramReader reader;                 ///< by which we read the peer's
  std::atomic<bool> alive{true};        ///< false: the peer is gone, or this process is a fork's child
  std::atomic<bool> impatient{false};   ///< the peer once kept us waiting in the middle of a message

  std::byte* peer_base() const noexcept { return self ? own->base() : theirs->base(); }
  std::size_t peer_bytes() const noexcept { return self ? own->bytes() : theirs->bytes(); }
  /// Once, when nonce, peer and segments are known and before any QP is: the peer may read memory of the program's, if it can.
  void open_program_memory() noexcept { proof.publish({nonce, peer.process}, own->window()); }
  /// Can we read the peer's? It is told. `myself`: what our Hello said. Any thread.
  void try_to_read(const ProcessId& myself) noexcept;
};

/// Threads: any.
class ShmLinks {
 public:
  std::shared_ptr<ShmLink> find(std::uint64_t id) const;
  /// Enters a link and gives it its id.
  void add(const std::shared_ptr<ShmLink>& link);
  /// Forgets it; it lives on while a Pd uses it.
  void drop(std::uint64_t id) noexcept;
  std::vector<std::shared_ptr<ShmLink>> all() const;
  std::size_t count_uid(std::uint32_t uid) const noexcept;
  /// In a fork's child: no link is ours. The descriptors of ours are closed, what Pds use stays mapped.
  void abandon_in_child() noexcept;

 private:
  mutable std::mutex mutex_;
  std::vector<std::shared_ptr<ShmLink>> links_;
  std::uint64_t next_id_ = 1;
};

}  // namespace rdma::shm
