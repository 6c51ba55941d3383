// Bytes of a stream that lie aside until they can go where they belong. In memory of their own from the kernel: whoever keeps some
// may be a signal handler that has interrupted malloc().
//
// Trivially destructible, for it lies in cells that fork's children share: the owner calls clear(). Threads: externally serialised.
#pragma once

#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/syscall.h>

#include <cstddef>
#include <cstring>
#include <utility>

#include "rdma_core/base/sys.hpp"

namespace sdp {

class KeptBytes {
 public:
  bool empty() const noexcept { return begin_ == end_; }
  std::size_t size() const noexcept { return end_ - begin_; }
  const std::byte* data() const noexcept { return memory_ + begin_; }

  /// Room for `bytes` more behind those that are there, which count once added() says so. nullptr: no memory; nothing is lost.
  std::byte* room(std::size_t bytes) noexcept {
    if (capacity_ - end_ < bytes && !grow(bytes)) return nullptr;
    return memory_ + end_;
  }
  void added(std::size_t bytes) noexcept { end_ += bytes; }
  /// Puts `bytes` more before those that are there; `fill` writes them and may refuse. False: all is as it was.
  template <class Fill>
  bool put_before(std::size_t bytes, Fill fill) noexcept {
    if (bytes == 0) return true;
    KeptBytes whole;
    std::byte* const memory = whole.room(bytes + size());
    if (memory == nullptr || !fill(memory)) {
      whole.clear();
      return false;
    }
    if (!empty()) std::memcpy(memory + bytes, data(), size());
    whole.added(bytes + size());
    clear();
    *this = whole;
    return true;
  }
  /// Forgets the oldest; with the last one the memory goes back.
  void drop(std::size_t bytes) noexcept {
    begin_ += bytes;
    if (empty()) clear();
  }
  void clear() noexcept {
    if (memory_ != nullptr) rdma::sys::call(SYS_munmap, rdma::sys::arg(memory_), static_cast<long>(capacity_));
    *this = KeptBytes{};
  }
  /// What the socket takes of them now; they are forgotten here. As send(): bytes, or -errno.
  long send_by(int fd) noexcept {
    const long n = rdma::sys::call(SYS_sendto, fd, rdma::sys::arg(data()), static_cast<long>(size()), MSG_DONTWAIT | MSG_NOSIGNAL);
    if (n > 0) drop(static_cast<std::size_t>(n));
    return n;
  }
  /// A socket whose bytes lie here and whose process is killed must not look as if it had ended in order: the kernel is told to
  /// reset it. `option` is what the program has set.
  static void reset_if_killed(int fd, linger& option) noexcept {
    socklen_t size = sizeof option;
    if (rdma::sys::call(SYS_getsockopt, fd, SOL_SOCKET, SO_LINGER, rdma::sys::arg(&option), rdma::sys::arg(&size)) != 0)
      option = {};
    set_linger(fd, {1, 0});
  }
  static void set_linger(int fd, const linger& option) noexcept {
    rdma::sys::call(SYS_setsockopt, fd, SOL_SOCKET, SO_LINGER, rdma::sys::arg(&option), sizeof option);
  }
  KeptBytes take() noexcept { return std::exchange(*this, KeptBytes{}); }

 private:
  static constexpr std::size_t kPageBytes = 4096;

  bool grow(std::size_t bytes) noexcept {
    const std::size_t kept = size();
    const std::size_t wanted = (kept + bytes + kPageBytes - 1) & ~(kPageBytes - 1);
    const long mapped =
        rdma::sys::call(SYS_mmap, 0, static_cast<long>(wanted), PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (mapped < 0 && mapped > -4096) return false;
    auto* memory = reinterpret_cast<std::byte*>(mapped);
    if (kept != 0) std::memcpy(memory, data(), kept);
    clear();
    memory_ = memory;
    capacity_ = wanted;
    end_ = kept;
    return true;
  }

  std::byte* memory_ = nullptr;
  std::size_t capacity_ = 0, begin_ = 0, end_ = 0;
};

}  // namespace sdp
