// A heap whose memory is registered: a jemalloc arena of its own whose extents come from Pd::map_extent. jemalloc is linked into the
// library under names of its own (see cmake/jemalloc.cmake); the program's malloc is not touched, whatever it is.
//
// The arena's own metadata never lies in the extents: a peer that maps them can spoil bytes, not the heap.
// Threads: allocate and deallocate from any thread (the arena locks); no thread cache.
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

  static Result<std::unique_ptr<RegisteredHeap>> create(Pd& pd);  ///< the Pd must outlive the heap
  ~RegisteredHeap();                                              ///< every block must be back

  /// `alignment` is a power of two. Contents are undefined. Errors: ENOMEM.
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
