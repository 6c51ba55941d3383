// A position in an iovec array. Never copies the array; the caller's iovecs stay as they are.
#pragma once

#include <sys/uio.h>

#include <cstddef>
#include <span>

namespace sdp {

class IovCursor {
 public:
  IovCursor(const iovec* iov, std::size_t count) noexcept : iov_(iov), end_(iov + count) { skip_empty(); }

  bool done() const noexcept { return iov_ == end_; }
  std::byte* data() const noexcept { return static_cast<std::byte*>(iov_->iov_base) + offset_; }
  std::size_t chunk() const noexcept { return iov_->iov_len - offset_; }  ///< bytes at data(); > 0 unless done()
  void advance(std::size_t bytes) noexcept {                              ///< at most chunk()
    offset_ += bytes;
    if (offset_ == iov_->iov_len) {
      ++iov_;
      offset_ = 0;
      skip_empty();
    }
  }
  void skip(std::size_t bytes) noexcept {  ///< at most remaining()
    while (bytes > 0) {
      const std::size_t step = bytes < chunk() ? bytes : chunk();
      advance(step);
      bytes -= step;
    }
  }
  std::size_t remaining() const noexcept {
    std::size_t sum = 0;
    for (const iovec* v = iov_; v != end_; ++v) sum += v->iov_len;
    return sum - offset_;
  }
  static constexpr std::size_t kMost = 1024;  ///< IOV_MAX
  /// What is left, for a system call: `call` gets the caller's own iovecs or, if the first is used up in part, a copy.
  template <class Call>
  auto with_rest(Call call) const {
    if (offset_ == 0) [[likely]]
      return call(std::span(const_cast<iovec*>(iov_), static_cast<std::size_t>(end_ - iov_)));
    return with_copy(call);
  }
  /// What is left as iovecs of its own, at most `max`, and of `bytes` in all; returns how many were written.
  std::size_t rest(iovec* out, std::size_t max, std::size_t bytes = ~std::size_t{0}) const noexcept {
    std::size_t n = 0;
    for (const iovec* v = iov_; v != end_ && n < max && bytes != 0; ++v) {
      const std::size_t skip = v == iov_ ? offset_ : 0;
      if (v->iov_len == skip) continue;
      const std::size_t here = v->iov_len - skip < bytes ? v->iov_len - skip : bytes;
      out[n++] = iovec{static_cast<std::byte*>(v->iov_base) + skip, here};
      bytes -= here;
    }
    return n;
  }

 private:
  // Its frame is for those who need it: handlers may run on small stacks.
  template <class Call>
  [[gnu::noinline]] auto with_copy(Call& call) const {
    iovec copy[kMost];
    return call(std::span(copy, rest(copy, kMost)));
  }
  void skip_empty() noexcept {
    while (iov_ != end_ && iov_->iov_len == 0) ++iov_;
  }
  const iovec* iov_;
  const iovec* end_;
  std::size_t offset_ = 0;
};

}  // namespace sdp
