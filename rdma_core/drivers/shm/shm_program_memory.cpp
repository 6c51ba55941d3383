#include "rdma_core/drivers/shm/shm_program_memory.hpp"

#include <errno.h>
#include <sys/mman.h>
#include <sys/uio.h>

#include <cstring>
#include <new>

#include "rdma_core/base/log.hpp"
#include "rdma_core/base/sys.hpp"

namespace rdma::shm {

namespace {
constexpr std::size_t kMostPieces = 16;  ///< DeviceAttr::max_sge_read
}

OwnProof::~OwnProof() {
  if (page_ != nullptr) munmap(page_, kPageBytes);
}

void OwnProof::publish(const Proof& proof, ProgramWindow& window) noexcept {
  void* const page = mmap(nullptr, kPageBytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (page == MAP_FAILED) return;
  page_ = page;
  // Else a child that comes to the process id of its parent would pass for it.
  if (madvise(page_, kPageBytes, MADV_WIPEONFORK) != 0) return;
  new (page_) Proof(proof);
  window.proof.store(reinterpret_cast<std::uint64_t>(page_), std::memory_order_release);
}

void ProgramReader::try_peer(std::int32_t pid, const Proof& proof, ProgramWindow& window) noexcept {
  if (has_tried_.exchange(true, std::memory_order_relaxed)) return;
  pid_ = pid;
  proof_ = proof;
  proof_at_ = window.proof.load(std::memory_order_acquire);
  window_ = &window;
  if (pid == 0 || proof_at_ == 0) return tell(pid == 0 ? ESRCH : EOPNOTSUPP);
  Proof found;
  const iovec here{&found, sizeof found}, there{reinterpret_cast<void*>(proof_at_), sizeof found};
  const long n = sys::call(SYS_process_vm_readv, pid_, sys::arg(&here), 1, sys::arg(&there), 1, 0);
  if (const std::uint32_t error = error_for(n, found); error != 0) return tell(error);
  can_read_.store(true, std::memory_order_release);
  window_->answer.store(kCanRead, std::memory_order_release);
}

std::uint32_t ProgramReader::error_for(long result, const Proof& found) const noexcept {
  if (result < 0) return static_cast<std::uint32_t>(-result);
  return static_cast<std::size_t>(result) < sizeof found || found != proof_ ? ESRCH : 0;
}

void ProgramReader::tell(std::uint32_t answer) noexcept {
  can_read_.store(false, std::memory_order_relaxed);
  window_->answer.store(answer, std::memory_order_release);
  RDMA_LOG(info, "shm: the memory of process %d cannot be read: %s", pid_, std::strerror(static_cast<int>(answer)));
}

std::uint32_t ProgramReader::read(std::span<const Sge> to, std::uint64_t address, std::uint32_t bytes) noexcept {
  if (!can_read_.load(std::memory_order_acquire) || to.size() > kMostPieces) return 0;
  Proof found;
  iovec here[kMostPieces + 1] = {{&found, sizeof found}};
  std::size_t count = 1;
  for (const Sge& each : to) here[count++] = {const_cast<std::byte*>(each.addr), each.length};
  const iovec there[2] = {{reinterpret_cast<void*>(proof_at_), sizeof found}, {reinterpret_cast<void*>(address), bytes}};
  const long n = sys::call(SYS_process_vm_readv, pid_, sys::arg(here), static_cast<long>(count), sys::arg(there), 2, 0);
  if (const std::uint32_t error = error_for(n, found); error != 0) {
    tell(error);
    return 0;
  }
  const auto read = static_cast<std::uint32_t>(static_cast<std::size_t>(n) - sizeof found);
  return read < bytes ? read : bytes;
}

}  // namespace rdma::shm
