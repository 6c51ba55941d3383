// The addresses of an anchor, as Hello carries them.
#pragma once

#include <netinet/in.h>

#include <cstring>

#include "rdma_core/cm/connection_manager.hpp"
#include "sdp/wire/hello.hpp"

namespace sdp {

inline wire::HelloIp hello_ip(const sockaddr_storage& address) noexcept {
  if (address.ss_family == AF_INET) {
    sockaddr_in v4;
    std::memcpy(&v4, &address, sizeof v4);
    return wire::hello_ip_from_v4(v4.sin_addr.s_addr);
  }
  sockaddr_in6 v6;
  std::memcpy(&v6, &address, sizeof v6);
  wire::HelloIp ip;
  std::memcpy(ip.data(), &v6.sin6_addr, ip.size());
  return ip;
}

inline std::uint16_t host_port(const sockaddr_storage& address) noexcept {
  sockaddr_in any;  // the port stands at the same place in both families
  std::memcpy(&any, &address, sizeof any);
  return ntohs(any.sin_port);
}

/// The active side's Hello for the connection that `anchor` names from its own end.
inline wire::HelloHeader hello_addresses(const rdma::cm::Anchor& anchor) noexcept {
  wire::HelloHeader hello;
  hello.ip_version = anchor.local.ss_family == AF_INET6 ? 6 : 4;
  hello.local_port = host_port(anchor.local);
  hello.src_ip = hello_ip(anchor.local);
  hello.dst_ip = hello_ip(anchor.remote);
  return hello;
}

}  // namespace sdp
