#include "sdp/socket_modes.hpp"

#include <fcntl.h>
#include <linux/tcp.h>
#include <netinet/in.h>

#include <algorithm>
#include <cerrno>
#include <iterator>

#include "rdma_core/base/sys.hpp"
#include "rdma_core/base/user_memory.hpp"

namespace sdp {

namespace sys = rdma::sys;

namespace {

// Of SO_TIMESTAMP and its kin each has a second number, for programs whose time_t is not the kernel's long; <sys/socket.h> gives
// but one of the two.
constexpr int kTimestampNew = 63, kTimestampNsNew = 64, kTimestampingNew = 65;

using Excludes = bool (*)(int value);
constexpr Excludes kAny = [](int) { return true; };
constexpr Excludes kOn = [](int value) { return value != 0; };

/// Options whose value says whether they are in force.
struct Mode {
  int level, name;
  Excludes excludes;
};
constexpr Mode kModes[] = {
    {SOL_SOCKET, SO_RCVLOWAT, [](int value) { return value > 1 || value < 0; }},  // a negative one is the largest
    {SOL_SOCKET, SO_PEEK_OFF, [](int value) { return value >= 0; }},
    {SOL_SOCKET, SO_ZEROCOPY, kOn},
    {SOL_SOCKET, SO_TIMESTAMP, kOn},
    {SOL_SOCKET, SO_TIMESTAMPNS, kOn},
    {SOL_SOCKET, SO_TIMESTAMPING, kOn},
    {SOL_SOCKET, kTimestampNew, kOn},
    {SOL_SOCKET, kTimestampNsNew, kOn},
    {SOL_SOCKET, kTimestampingNew, kOn},
    {IPPROTO_TCP, TCP_INQ, kOn},
    {IPPROTO_TCP, TCP_REPAIR, [](int value) { return value == TCP_REPAIR_ON; }},
};
/// Those that are no number.
constexpr Mode kOthers[] = {
    {SOL_SOCKET, SO_ATTACH_FILTER, kAny},
    {SOL_SOCKET, SO_ATTACH_BPF, kAny},
    {IPPROTO_TCP, TCP_ULP, kAny},
    {IPPROTO_TCP, TCP_MD5SIG, kAny},
};

long get(int fd, int level, int name, void* value, socklen_t* len) noexcept {
  return sys::call(SYS_getsockopt, fd, level, name, sys::arg(value), sys::arg(len));
}

bool has_filter(int fd) noexcept {
  socklen_t instructions = 0;
  const long r = get(fd, SOL_SOCKET, SO_GET_FILTER, nullptr, &instructions);
  return r == -EACCES || (r == 0 && instructions != 0);  // of an eBPF program nothing is told
}
bool has_upper_protocol(int fd) noexcept {
  char name[16];
  socklen_t len = sizeof name;
  return get(fd, IPPROTO_TCP, TCP_ULP, name, &len) == 0 && len != 0;
}

}  // namespace

bool is_mode_without_lane(int level, int name, const void* value, socklen_t len) noexcept {
  const int number = len >= sizeof(int) && rdma::is_readable(value, sizeof(int)) ? *static_cast<const int*>(value) : 0;
  const auto excludes = [&](const Mode& mode) { return mode.level == level && mode.name == name && mode.excludes(number); };
  return std::any_of(std::begin(kModes), std::end(kModes), excludes) ||
         std::any_of(std::begin(kOthers), std::end(kOthers), excludes);
}

bool has_mode_without_lane(int fd) noexcept {
  const auto in_force = [&](const Mode& mode) {
    int value = 0;
    socklen_t len = sizeof value;
    return get(fd, mode.level, mode.name, &value, &len) == 0 && mode.excludes(value);
  };
  const long flags = sys::call(SYS_fcntl, fd, F_GETFL);
  return (flags >= 0 && (flags & O_ASYNC) != 0) || std::any_of(std::begin(kModes), std::end(kModes), in_force) || has_filter(fd) ||
         has_upper_protocol(fd);
}

}  // namespace sdp
