#include "preload/fd_table.hpp"

#include "sdp/engine.hpp"

namespace preload {

namespace {
constinit FdTable table{};  // zero pages until touched
}

FdTable& fds() noexcept { return table; }

void FdTable::set(int fd, sdp::Stream stream) noexcept {
  if (static_cast<unsigned>(fd) >= kMax) return;
  streams_[fd].store(stream.word(), std::memory_order_release);
  int high = highest_.load(std::memory_order_relaxed);
  while (fd > high && !highest_.compare_exchange_weak(high, fd, std::memory_order_relaxed)) {
  }
}

void FdTable::duplicate(int from, int to) noexcept {
  const sdp::Stream stream = find(from);
  set_kind(to, kind(from));
  if (stream) duplicates_.store(true, std::memory_order_relaxed);
  set(to, stream);
}

bool FdTable::take(int fd, sdp::Stream* stream) noexcept {
  if (static_cast<unsigned>(fd) >= kMax) return false;
  kinds_[fd].store(Kind::none, std::memory_order_relaxed);
  if (streams_[fd].load(std::memory_order_relaxed) == 0) return false;
  const std::uint64_t word = streams_[fd].exchange(0, std::memory_order_acq_rel);
  if (word == 0) return false;
  *stream = sdp::Stream::from_word(word);
  if (!duplicates_.load(std::memory_order_relaxed)) return true;
  for (int i = 0; i <= highest(); ++i)
    if (streams_[i].load(std::memory_order_relaxed) == word) return false;
  return true;
}

void FdTable::inherit() noexcept {
  const int high = highest();
  for (int i = 0; i <= high; ++i) {
    const std::uint64_t word = streams_[i].load(std::memory_order_relaxed);
    if (word == 0) continue;
    const sdp::Stream mine = sdp::engine::inherit(sdp::Stream::from_word(word));
    for (int j = high; j >= i; --j)
      if (streams_[j].load(std::memory_order_relaxed) == word) streams_[j].store(mine.word(), std::memory_order_relaxed);
  }
}

}  // namespace preload
