// Which socket modes can have no lane: one predicate, asked before the kernel sees the option (architecture, rule 5).
#pragma once

#include <linux/tcp.h>
#include <netinet/in.h>
#include <sys/socket.h>

#include "rdma_core/base/user_memory.hpp"

namespace preload {

inline bool no_lane_with(int level, int name, const void* value, socklen_t len) noexcept {
  const int number = len >= sizeof(int) && rdma::is_readable(value, sizeof(int)) ? *static_cast<const int*>(value) : 0;
  if (level == SOL_SOCKET) {
    switch (name) {
      case SO_RCVLOWAT:
        return number > 1;
      case SO_PEEK_OFF:
      case SO_ZEROCOPY:
      case SO_TIMESTAMP:
      case SO_TIMESTAMPNS:
      case SO_TIMESTAMPING:
      case SO_ATTACH_FILTER:
      case SO_ATTACH_BPF:
        return true;
      default:
        return false;
    }
  }
  if (level == IPPROTO_TCP) return name == TCP_ULP || name == TCP_REPAIR || name == TCP_MD5SIG;
  return false;
}

}  // namespace preload
