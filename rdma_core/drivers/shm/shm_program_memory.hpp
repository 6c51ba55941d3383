// Reading what lies in the peer's address space outside of its segment: process_vm_readv(2), with a proof in each call of whose
// address space that is (shm_layout.hpp). The kernel decides who may: as for ptrace(2), so between processes of one user that are
// dumpable, and where Yama or another module does not forbid it. No right is asked for or given.
//
// A page of the peer's may take as long to come as the peer likes (a file on a slow network, userfaultfd): the reader waits for it
// inside the call. That is a process of the reader's own user's.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <span>

#include "rdma_core/drivers/shm/shm_layout.hpp"
#include "rdma_core/work_request.hpp"

namespace rdma::shm {

/// Our Proof towards one peer.
class OwnProof {
 public:
  OwnProof() = default;
  ~OwnProof();
  OwnProof(const OwnProof&) = delete;
  OwnProof& operator=(const OwnProof&) = delete;
  /// Without memory for it nothing is published, and the peer cannot read.
  void publish(const Proof& proof, ProgramWindow& window) noexcept;

 private:
  void* page_ = nullptr;
};

/// Reads one peer's program memory. Threads: any.
class ProgramReader {
 public:
  /// Tries, at the first call only, and tells the peer in its window. `pid`: the peer's in our namespace, 0: it cannot be named.
  void try_peer(std::int32_t pid, const Proof& proof, ProgramWindow& window) noexcept;
  /// Up to `bytes` from `address` on, in order, into `to`, which has that much room; returns how many. When it turns out that
  /// nothing can be read any more the peer is told that, too. No allocation, one system call.
  std::uint32_t read(std::span<const Sge> to, std::uint64_t address, std::uint32_t bytes) noexcept;

 private:
  std::uint32_t error_for(long result, const Proof& found) const noexcept;
  void tell(std::uint32_t answer) noexcept;

  std::atomic<bool> has_tried_{false};
  std::atomic<bool> can_read_{false};
  std::int32_t pid_ = 0;
  Proof proof_;
  std::uint64_t proof_at_ = 0;
  ProgramWindow* window_ = nullptr;
};

}  // namespace rdma::shm
