#include "preload/ring_requests.hpp"

#include <sys/stat.h>

#include <algorithm>
#include <atomic>

#include "preload/fd_table.hpp"
#include "rdma_core/base/sys.hpp"
#include "sdp/engine.hpp"

namespace preload {

namespace {

enum class Use : std::uint8_t {
  unknown,  ///< of sockets, or of who knows what
  none,     ///< of descriptors; or of one in which a socket could not be harmed
  file,     ///< of `fd`, which has to be a file
};

Use use_of(unsigned opcode) noexcept {
  constexpr unsigned kFtruncate = 55;
  switch (opcode) {
    case IORING_OP_READV:
    case IORING_OP_WRITEV:
    case IORING_OP_READ_FIXED:
    case IORING_OP_WRITE_FIXED:
    case IORING_OP_READ:
    case IORING_OP_WRITE:
    case IORING_OP_FSYNC:
    case IORING_OP_SYNC_FILE_RANGE:
    case IORING_OP_FALLOCATE:
    case IORING_OP_FADVISE:
    case IORING_OP_CLOSE:
    case kFtruncate:
      return Use::file;
    case IORING_OP_NOP:
    case IORING_OP_TIMEOUT:
    case IORING_OP_TIMEOUT_REMOVE:
    case IORING_OP_LINK_TIMEOUT:
    case IORING_OP_ASYNC_CANCEL:
    case IORING_OP_OPENAT:
    case IORING_OP_OPENAT2:
    case IORING_OP_STATX:
    case IORING_OP_MADVISE:
    case IORING_OP_RENAMEAT:
    case IORING_OP_UNLINKAT:
    case IORING_OP_MKDIRAT:
    case IORING_OP_SYMLINKAT:
    case IORING_OP_LINKAT:
      return Use::none;
    default:
      return Use::unknown;
  }
}

/// A file's descriptor, a pipe's, an eventfd's…: no socket, and nothing of ours.
bool is_file(int fd) noexcept {
  if (sdp::engine::is_helper_fd(fd) || fds().kind(fd) == Kind::epoll_set) return false;
  struct stat st {};
  return rdma::sys::call(SYS_fstat, fd, rdma::sys::arg(&st)) == 0 && !S_ISSOCK(st.st_mode);
}

}  // namespace

bool can_follow_ring(unsigned flags) noexcept {
  constexpr unsigned kNoArray = 1U << 16;
  constexpr unsigned kFollowed = IORING_SETUP_IOPOLL | IORING_SETUP_CQSIZE | IORING_SETUP_CLAMP | IORING_SETUP_R_DISABLED |
                                 IORING_SETUP_SUBMIT_ALL | IORING_SETUP_COOP_TASKRUN | IORING_SETUP_TASKRUN_FLAG |
                                 IORING_SETUP_CQE32 | IORING_SETUP_SINGLE_ISSUER | IORING_SETUP_DEFER_TASKRUN | kNoArray;
  return (flags & ~kFollowed) == 0;
}

sdp::FollowedRings::Memory memory_of(const io_uring& ring) noexcept {
  const auto address = [](const void* at) { return reinterpret_cast<std::uintptr_t>(at); };
  return {address(ring.requests), address(ring.head), address(ring.completions_head)};
}

// liburing uses the entries in their order. What a thread has taken and not filled in yet the kernel may not be told of either.
bool asks_for_files_only(const io_uring& ring) noexcept {
  const unsigned mask = *ring.mask, end = ring.behind_last;
  const unsigned begin = std::atomic_ref(*ring.head).load(std::memory_order_acquire);
  if (end - begin > mask + 1) return false;
  int known = -1;  // to be one
  for (unsigned i = begin; i != end; ++i) {
    const io_uring_sqe& request = ring.requests[i & mask];
    const Use use = use_of(request.opcode);
    if (use == Use::unknown) return false;
    // The ring's own table has no others: each that came into it was looked at.
    const bool is_of_table =
        (request.flags & IOSQE_FIXED_FILE) != 0 || (request.opcode == IORING_OP_CLOSE && request.file_index != 0);
    if (use == Use::none || is_of_table || (request.fd == known && request.opcode != IORING_OP_CLOSE)) continue;
    if (!is_file(request.fd)) return false;
    known = request.fd;
  }
  return true;
}

bool are_files(const int* list, unsigned count) noexcept {
  return std::all_of(list, list + count, [](int fd) { return fd < 0 || is_file(fd); });
}

}  // namespace preload
