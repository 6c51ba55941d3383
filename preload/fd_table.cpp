#include "preload/fd_table.hpp"

#include <algorithm>
#include <cstddef>
#include <new>
#include <vector>

#include "sdp/engine.hpp"

namespace preload {

namespace {
/// A stream of the parent's and the child's own in its place.
struct Noted {
  sdp::StreamSnapshot was;
  sdp::Stream mine;
  std::uint64_t word() const noexcept { return was.parents.word(); }
};
/// By word. Never destroyed: a program may fork while it exits.
std::vector<Noted>& noted_streams() noexcept {
  alignas(std::vector<Noted>) static std::byte memory[sizeof(std::vector<Noted>)];
  static auto* const noted = new (memory) std::vector<Noted>;
  return *noted;
}
Noted* find_noted(std::uint64_t word) noexcept {
  auto& noted = noted_streams();
  const auto at = std::lower_bound(noted.begin(), noted.end(), word, [](const Noted& n, std::uint64_t w) { return n.word() < w; });
  return at != noted.end() && at->word() == word ? &*at : nullptr;
}
}  // namespace

constinit FdTable fd_table{};

void FdTable::set(int fd, sdp::Stream stream) noexcept {
  if (static_cast<unsigned>(fd) >= kMax) return;
  streams_[fd].store(stream.word(), std::memory_order_release);
  if (stream) used_.store(true, std::memory_order_relaxed);
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
    if (streams_[i].load(std::memory_order_relaxed) == word) {
      stream->renumber(i);
      return false;
    }
  return true;
}

void FdTable::before_fork() noexcept {
  auto& noted = noted_streams();
  noted.clear();
  const int high = highest();
  for (int i = 0; i <= high; ++i)
    if (const sdp::Stream stream = find(i)) noted.push_back({{.parents = stream}, {}});
  std::sort(noted.begin(), noted.end(), [](const Noted& a, const Noted& b) { return a.word() < b.word(); });
  // One heir of each, by however many descriptors.
  const auto same = [](const Noted& a, const Noted& b) { return a.word() == b.word(); };
  noted.erase(std::unique(noted.begin(), noted.end(), same), noted.end());
  for (Noted& each : noted) each.was = each.was.parents.snapshot();
}

void FdTable::inherit() noexcept {
  const int high = highest();
  for (int i = 0; i <= high; ++i) {
    const std::uint64_t word = streams_[i].load(std::memory_order_relaxed);
    Noted* const noted = word != 0 ? find_noted(word) : nullptr;
    if (noted == nullptr) continue;
    if (!noted->mine) noted->mine = sdp::engine::inherit(noted->was);
    streams_[i].store(noted->mine.word(), std::memory_order_relaxed);
  }
}

sdp::Stream FdTable::heir_of(sdp::Stream parents) const noexcept {
  const Noted* const noted = find_noted(parents.word());
  return noted != nullptr ? noted->mine : sdp::Stream{};
}

}  // namespace preload
