#include "rdma_core/base/log.hpp"

#include <errno.h>

#include <algorithm>
#include <cstdarg>
#include <cstddef>
#include <cstdio>

#include "rdma_core/base/sys.hpp"

namespace rdma::log {
namespace {

constexpr std::size_t kMaxLine = 1000;  // bytes, the newline included

std::atomic<int> line_fd{2};

const char* name_of(Level level) noexcept {
  switch (level) {
    case Level::off:
      break;
    case Level::error:
      return "error";
    case Level::warn:
      return "warning";
    case Level::info:
      return "info";
    case Level::debug:
      return "debug";
  }
  return "?";
}

}  // namespace

constinit std::atomic<Level> threshold{Level::warn};

void set_fd(int fd) noexcept { line_fd.store(fd, std::memory_order_relaxed); }
int fd() noexcept { return line_fd.load(std::memory_order_relaxed); }

void write(Level level, const char* format, ...) noexcept {
  const int saved_errno = errno;
  char line[kMaxLine];
  // Asked anew for each line: a cached one would be the parent's after fork.
  const long pid = sys::call(SYS_getpid);
  // snprintf ends with a NUL, whose place the newline takes; so it may have the whole line.
  const int head = std::snprintf(line, kMaxLine, "sdpreload[%ld]: %s: ", pid, name_of(level));
  auto length = static_cast<std::size_t>(std::max(head, 0));
  va_list args;
  va_start(args, format);
  errno = saved_errno;  // for %m
  const int text = std::vsnprintf(line + length, kMaxLine - length, format, args);
  va_end(args);
  length = std::min(length + static_cast<std::size_t>(std::max(text, 0)), kMaxLine - 1);
  line[length++] = '\n';
  // One attempt: a full pipe loses the line, which is better than to hold the program up or to spin.
  sys::call(SYS_write, line_fd.load(std::memory_order_relaxed), sys::arg(line), static_cast<long>(length));
  errno = saved_errno;
}

}  // namespace rdma::log
