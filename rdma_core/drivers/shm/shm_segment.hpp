// The memory behind the software device: own segments (made here, cut into pages) and a peer's (taken over after a check).
#pragma once

#include <cstddef>
#include <cstdint>
#include <map>
#include <memory>
#include <mutex>
#include <optional>

#include "rdma_core/base/result.hpp"
#include "rdma_core/drivers/shm/shm_layout.hpp"

namespace rdma::shm {

/// A segment of our own. Threads: any.
class OwnSegment {
 public:
  /// Maps `bytes`, or less (64 MiB, 16 MiB, 4 MiB) where the address space or the file size limit does not allow it. Errors:
  /// ENOMEM, EMFILE…
  static Result<std::unique_ptr<OwnSegment>> create(std::size_t bytes, const ProcessId& owner);
  ~OwnSegment();
  OwnSegment(const OwnSegment&) = delete;
  OwnSegment& operator=(const OwnSegment&) = delete;

  std::byte* base() const noexcept { return base_; }
  std::size_t bytes() const noexcept { return bytes_; }
  /// The memfd, until close_fd(); the mapping does not need it.
  int fd() const noexcept { return fd_; }
  void close_fd() noexcept;

  /// Whole pages, zeroed; returns the offset. Errors: ENOSPC.
  Result<std::size_t> allocate(std::size_t bytes);
  /// Gives the memory back to the system; the pages read as zeros.
  void release(std::size_t offset, std::size_t bytes) noexcept;
  bool contains(const std::byte* p, std::size_t bytes) const noexcept;

  /// Enters a region that lies in this segment; returns its key. Errors: ENOSPC.
  Result<std::uint32_t> publish(const std::byte* addr, std::size_t bytes, std::uint32_t access);
  /// Likewise one of the program's memory.
  Result<std::uint32_t> publish_program(const std::byte* addr, std::size_t bytes, std::uint32_t access);
  void retract(std::uint32_t key) noexcept;
  /// As Qp::withdraw(). Any process that has the mapping.
  std::optional<std::uint32_t> withdraw(std::uint32_t key) noexcept;
  ProgramWindow& window() const noexcept { return *at<ProgramWindow>(base_ + kWindowOffset); }

 private:
  OwnSegment() = default;
  Result<std::uint32_t> enter(const std::byte* addr, std::uint64_t offset, std::size_t bytes, std::uint32_t access);
  MrEntry* mr_table() const noexcept { return at<MrEntry>(base_ + kMrOffset); }

  std::byte* base_ = nullptr;
  std::size_t bytes_ = 0;
  int fd_ = -1;
  std::mutex mutex_;
  std::map<std::size_t, std::size_t> free_;  ///< offset -> bytes, coalesced
  std::uint64_t used_[kMrCapacity / 64] = {1};
  std::uint32_t generation_ = 1;
};

/// A peer's segment, mapped read-write.
class PeerSegment {
 public:
  /// Checks `fd` (any descriptor that a stranger may have sent) and maps it. Does not keep fd. Errors: EBADF with the reason.
  static Result<std::unique_ptr<PeerSegment>> adopt(int fd, const ProcessId& owner);
  ~PeerSegment();
  PeerSegment(const PeerSegment&) = delete;
  PeerSegment& operator=(const PeerSegment&) = delete;
  std::byte* base() const noexcept { return base_; }
  std::size_t bytes() const noexcept { return bytes_; }

 private:
  PeerSegment() = default;
  std::byte* base_ = nullptr;
  std::size_t bytes_ = 0;
};

}  // namespace rdma::shm
