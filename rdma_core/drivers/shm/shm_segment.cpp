#include "rdma_core/drivers/shm/shm_segment.hpp"

#include <errno.h>
#include <fcntl.h>
#include <linux/magic.h>
#include <signal.h>
#include <sys/mman.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <sys/vfs.h>

#include <cstring>
#include <new>

#include "rdma_core/base/sys.hpp"

namespace rdma::shm {
namespace {

constexpr int kSeals = F_SEAL_SHRINK | F_SEAL_GROW | F_SEAL_SEAL;

std::byte* map_whole(int fd, std::size_t bytes) noexcept {
  void* p = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_NORESERVE, fd, 0);
  if (p == MAP_FAILED) return nullptr;
  madvise(p, bytes, MADV_DONTDUMP);
  return static_cast<std::byte*>(p);
}

/// A memfd of `bytes`, sealed. Growing a file beyond RLIMIT_FSIZE raises SIGXFSZ in the program: ask first.
int make_memfd(std::size_t bytes) noexcept {
  rlimit limit{};
  if (getrlimit(RLIMIT_FSIZE, &limit) == 0 && limit.rlim_cur != RLIM_INFINITY && limit.rlim_cur < bytes) return -EFBIG;
  const char* name = "sdpreload";
  const long fd = sys::call(SYS_memfd_create, sys::arg(name), MFD_CLOEXEC | MFD_ALLOW_SEALING);
  if (fd < 0) return static_cast<int>(fd);
  long rc = sys::call(SYS_ftruncate, fd, static_cast<long>(bytes));
  if (rc == 0) rc = sys::call(SYS_fcntl, fd, F_ADD_SEALS, kSeals);
  if (rc == 0) return static_cast<int>(fd);
  sys::call(SYS_close, fd);
  return static_cast<int>(rc);
}

constexpr std::size_t round_up(std::size_t bytes) noexcept { return (bytes + kPageBytes - 1) & ~(kPageBytes - 1); }

}  // namespace

Result<std::unique_ptr<OwnSegment>> OwnSegment::create(std::size_t bytes, const ProcessId& owner) {
  bytes = round_up(bytes);
  if (bytes > kMaxSegmentBytes) bytes = kMaxSegmentBytes;
  if (bytes < kMinSegmentBytes) bytes = kMinSegmentBytes;
  std::unique_ptr<OwnSegment> segment(new OwnSegment);
  int error = ENOMEM;
  for (const std::size_t size : {bytes, std::size_t{64} << 20, std::size_t{16} << 20, std::size_t{4} << 20}) {
    if (size > bytes) continue;
    const int fd = make_memfd(size);
    if (fd < 0) {
      error = -fd;
      if (error != EFBIG && error != ENOMEM) break;
      continue;
    }
    if (std::byte* base = map_whole(fd, size)) {
      segment->fd_ = fd;
      segment->base_ = base;
      segment->bytes_ = size;
      break;
    }
    sys::call(SYS_close, fd);
    error = ENOMEM;
  }
  if (segment->base_ == nullptr) return fail(error, "shm: no memory for a segment");
  new (segment->base_) SegmentHeader{.magic = kSegmentMagic,
                                     .version = kLayoutVersion,
                                     .bytes = segment->bytes_,
                                     .owner = owner,
                                     .mr_capacity = kMrCapacity,
                                     .mr_offset = kMrOffset,
                                     .page_bytes = kPageBytes,
                                     .first_page = kFirstPage};
  segment->free_[kFirstPage] = segment->bytes_ - kFirstPage;
  return segment;
}

OwnSegment::~OwnSegment() {
  close_fd();
  if (base_ != nullptr) munmap(base_, bytes_);
}

void OwnSegment::close_fd() noexcept {
  if (fd_ >= 0) sys::call(SYS_close, fd_);
  fd_ = -1;
}

Result<std::size_t> OwnSegment::allocate(std::size_t bytes) {
  if (bytes == 0 || bytes > bytes_) return fail(ENOSPC, "shm: segment full");
  bytes = round_up(bytes);
  const std::lock_guard lock(mutex_);
  for (auto it = free_.begin(); it != free_.end(); ++it) {
    if (it->second < bytes) continue;
    const auto [offset, length] = *it;
    free_.erase(it);
    if (length > bytes) free_[offset + bytes] = length - bytes;
    return offset;
  }
  return fail(ENOSPC, "shm: segment full");
}

void OwnSegment::release(std::size_t offset, std::size_t bytes) noexcept {
  bytes = round_up(bytes);
  // Frees the pages of the file, not only of this mapping. Where that is refused the next owner must still find zeros.
  if (madvise(base_ + offset, bytes, MADV_REMOVE) != 0) std::memset(base_ + offset, 0, bytes);
  const std::lock_guard lock(mutex_);
  auto [it, inserted] = free_.emplace(offset, bytes);
  if (!inserted) return;
  if (auto next = std::next(it); next != free_.end() && it->first + it->second == next->first) {
    it->second += next->second;
    free_.erase(next);
  }
  if (it != free_.begin()) {
    auto before = std::prev(it);
    if (before->first + before->second == it->first) {
      before->second += it->second;
      free_.erase(it);
    }
  }
}

bool OwnSegment::contains(const std::byte* p, std::size_t bytes) const noexcept {
  const auto offset = static_cast<std::size_t>(p - base_);
  return p >= base_ && offset >= kFirstPage && offset <= bytes_ && bytes <= bytes_ - offset;
}

Result<std::uint32_t> OwnSegment::publish(const std::byte* addr, std::size_t bytes, std::uint32_t access) {
  if (!contains(addr, bytes)) return fail(EINVAL, "shm: not in this segment");
  return enter(addr, static_cast<std::uint64_t>(addr - base_), bytes, access);
}

Result<std::uint32_t> OwnSegment::publish_program(const std::byte* addr, std::size_t bytes, std::uint32_t access) {
  return enter(addr, kProgramMemory, bytes, access);
}

Result<std::uint32_t> OwnSegment::enter(const std::byte* addr, std::uint64_t offset, std::size_t bytes, std::uint32_t access) {
  const std::lock_guard lock(mutex_);
  for (std::size_t w = 0; w < std::size(used_); ++w) {
    if (used_[w] == ~std::uint64_t{0}) continue;
    const auto bit = static_cast<std::uint32_t>(__builtin_ctzll(~used_[w]));
    used_[w] |= std::uint64_t{1} << bit;
    const auto index = static_cast<std::uint32_t>(w * 64 + bit);
    // A new key each time: one that the peer kept from an earlier region does not open this one.
    const std::uint32_t number = ((generation_++ * static_cast<std::uint32_t>(kMrCapacity)) | index) & ~kKeyKind;
    const std::uint32_t key = offset == kProgramMemory ? number | kProgramKey : number;
    MrEntry& entry = mr_table()[index];
    entry.base.store(reinterpret_cast<std::uint64_t>(addr), std::memory_order_relaxed);
    entry.offset.store(offset, std::memory_order_relaxed);
    entry.bytes.store(bytes, std::memory_order_relaxed);
    entry.access.store(access, std::memory_order_relaxed);
    entry.taken.store(offset == kProgramMemory ? taken_word(key, 0) : 0, std::memory_order_relaxed);
    entry.key.store(key, std::memory_order_release);
    return key;
  }
  return fail(ENOSPC, "shm: too many memory regions");
}

void OwnSegment::retract(std::uint32_t key) noexcept {
  const std::uint32_t index = key & (kMrCapacity - 1);
  if (index == 0) return;
  const std::lock_guard lock(mutex_);
  MrEntry& entry = mr_table()[index];
  (void)withdraw(key);
  entry.key.store(0, std::memory_order_release);
  entry.bytes.store(0, std::memory_order_relaxed);
  used_[index / 64] &= ~(std::uint64_t{1} << (index % 64));
}

std::optional<std::uint32_t> OwnSegment::withdraw(std::uint32_t key) noexcept {
  std::atomic<std::uint64_t>& taken = mr_table()[key & (kMrCapacity - 1)].taken;
  std::uint64_t word = taken.load(std::memory_order_relaxed);
  if (key == 0) return std::nullopt;
  do {
    if (static_cast<std::uint32_t>(word >> 32) != key) return std::nullopt;
  } while (!taken.compare_exchange_weak(word, 0, std::memory_order_seq_cst));
  return static_cast<std::uint32_t>(word);
}

Result<std::unique_ptr<PeerSegment>> PeerSegment::adopt(int fd, const ProcessId& owner) {
  struct statfs fs {};
  if (sys::call(SYS_fstatfs, fd, sys::arg(&fs)) != 0 || static_cast<std::uint64_t>(fs.f_type) != TMPFS_MAGIC)
    return fail(EBADF, "shm: the peer's segment is no tmpfs memory");
  // A file that cannot shrink can have holes, but never raises SIGBUS for its size.
  const long seals = sys::call(SYS_fcntl, fd, F_GET_SEALS);
  if (seals < 0 || (seals & F_SEAL_SHRINK) == 0) return fail(EBADF, "shm: the peer's segment is not sealed");
  struct stat st {};
  if (sys::call(SYS_fstat, fd, sys::arg(&st)) != 0 || !S_ISREG(st.st_mode))
    return fail(EBADF, "shm: the peer's segment is no file");
  const auto bytes = static_cast<std::uint64_t>(st.st_size);
  if (st.st_size < 0 || bytes < kMinSegmentBytes || bytes > kMaxSegmentBytes || bytes % kPageBytes != 0)
    return fail(EBADF, "shm: the peer's segment has an illegal size");
  std::unique_ptr<PeerSegment> segment(new PeerSegment);
  segment->base_ = map_whole(fd, bytes);
  if (segment->base_ == nullptr) return fail(ENOMEM, "shm: the peer's segment cannot be mapped");
  segment->bytes_ = bytes;
  SegmentHeader header;
  std::memcpy(&header, segment->base_, sizeof header);
  if (header.magic != kSegmentMagic || header.version != kLayoutVersion || header.bytes != bytes || header.owner != owner ||
      header.mr_capacity != kMrCapacity || header.mr_offset != kMrOffset || header.page_bytes != kPageBytes ||
      header.first_page != kFirstPage)
    return fail(EBADF, "shm: the peer's segment has another layout");
  return segment;
}

PeerSegment::~PeerSegment() {
  if (base_ != nullptr) munmap(base_, bytes_);
}

}  // namespace rdma::shm
