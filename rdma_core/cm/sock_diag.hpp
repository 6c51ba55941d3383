// Who holds the other end of a TCP connection of this host: the kernel's own answer (NETLINK_SOCK_DIAG, unprivileged).
#pragma once

#include <cstdint>

#include "rdma_core/base/result.hpp"
#include "rdma_core/cm/connection_manager.hpp"

namespace rdma::cm {

struct SocketOwner {
  std::uint32_t uid = 0;
  std::uint64_t cookie = 0;  ///< SO_COOKIE
  bool held = false;         ///< false: no process has it (not yet accepted, or orphaned)
};

/// Is the connection in the network namespace of this thread's new sockets? sock_diag and abstract names know it only there.
bool in_our_namespace(int anchor_fd) noexcept;

/// Looks for the socket with the anchor's addresses reversed, in this network namespace. Does not block.
/// Errors: ENOENT, it is not on this host; EAFNOSUPPORT; or why sock_diag cannot be asked (EPERM, EMFILE…).
Result<SocketOwner> find_other_end(const Anchor& anchor) noexcept;

}  // namespace rdma::cm
