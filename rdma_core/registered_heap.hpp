// A heap whose memory is registered: a jemalloc arena of its own whose extents come from Pd::map_extent. jemalloc is linked into
// the library under names of its own (see cmake/jemalloc.cmake); the program's malloc is not touched, whatever it is.
//
// The arena's own metadata never lies in the extents: a peer that maps them can spoil bytes, not the heap.
// Threads: allocate and deallocate from any thread (the arena locks); no thread cache. Not for what each message needs: a pair of
//   calls costs about 0.5-0.8 us. To a signal handler that has interrupted either call, or a fork, allocate() says EDEADLK; it must
//   not deallocate(). A block of 16 KiB and more takes a page of address space besides; aligned to a page, it does not touch it.
// Fork: the heap is its maker's. In a child allocate() fails with EPERM, deallocate() and the destructor do nothing; a child may
//   create heaps.
#pragma once

#include <cstddef>
#include <memory>

#include "rdma_core/device.hpp"

namespace rdma {

class RegisteredHeap {
 public:
  struct Block {
    std::byte* addr = nullptr;
    const Mr* mr = nullptr;  ///< the extent it lies in; lives as long as the heap
  };

  static constexpr std::size_t kExtentBytes = std::size_t{2} << 20;
  /// The Pd must outlive the heap. `first_extent`: bytes that it grows by at first; then by as much as it has, up to kExtentBytes.
  /// An extent stays as long as the heap.
  static Result<std::unique_ptr<RegisteredHeap>> create(Pd& pd, std::size_t first_extent = kExtentBytes);
  ~RegisteredHeap();  ///< every block must be back

  /// `alignment` is a power of two. Contents are undefined. Errors: ENOMEM, EDEADLK, EPERM; go on without.
  Result<Block> allocate(std::size_t bytes, std::size_t alignment);
  void deallocate(std::byte* addr) noexcept;
  std::size_t bytes_in_use() const noexcept;
  std::size_t bytes_mapped() const noexcept;

 private:
  struct State;
  explicit RegisteredHeap(std::unique_ptr<State>);
  std::unique_ptr<State> state_;
};

}  // namespace rdma
