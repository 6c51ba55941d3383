// An IP address with a TCP port, of either family. IPv4-mapped IPv6 addresses become IPv4: it is one connection, whichever way a
// program names it, and neither sock_diag nor the RDMA stack knows it by the other.
#pragma once

#include <netinet/in.h>
#include <sys/socket.h>

#include <array>
#include <compare>
#include <cstddef>
#include <cstdint>
#include <cstring>

namespace rdma::cm {

struct IpAddress {
  sa_family_t family = AF_UNSPEC;
  std::uint16_t port = 0;             ///< host order
  std::uint32_t scope = 0;            ///< index of the network device, of a link-local address
  std::array<std::byte, 16> bytes{};  ///< IPv4: the first four

  // clang-tidy 14 takes the operator for a comparison with 0.
  friend auto operator<=>(const IpAddress&, const IpAddress&) = default;  // NOLINT(modernize-use-nullptr)

  /// Of another family: `family` is AF_UNSPEC.
  static IpAddress from(const sockaddr_storage& address) noexcept {
    IpAddress ip;
    if (address.ss_family == AF_INET) {
      sockaddr_in v4;
      std::memcpy(&v4, &address, sizeof v4);
      ip.family = AF_INET;
      ip.port = ntohs(v4.sin_port);
      std::memcpy(ip.bytes.data(), &v4.sin_addr, 4);
    } else if (address.ss_family == AF_INET6) {
      sockaddr_in6 v6;
      std::memcpy(&v6, &address, sizeof v6);
      ip.port = ntohs(v6.sin6_port);
      if (IN6_IS_ADDR_V4MAPPED(&v6.sin6_addr)) {
        ip.family = AF_INET;
        std::memcpy(ip.bytes.data(), v6.sin6_addr.s6_addr + 12, 4);
      } else {
        ip.family = AF_INET6;
        ip.scope = v6.sin6_scope_id;
        std::memcpy(ip.bytes.data(), &v6.sin6_addr, 16);
      }
    }
    return ip;
  }
  sockaddr_storage to_sockaddr() const noexcept {
    sockaddr_storage address{};
    if (family == AF_INET) {
      sockaddr_in v4{};
      v4.sin_family = AF_INET;
      v4.sin_port = htons(port);
      std::memcpy(&v4.sin_addr, bytes.data(), 4);
      std::memcpy(&address, &v4, sizeof v4);
    } else if (family == AF_INET6) {
      sockaddr_in6 v6{};
      v6.sin6_family = AF_INET6;
      v6.sin6_port = htons(port);
      v6.sin6_scope_id = scope;
      std::memcpy(&v6.sin6_addr, bytes.data(), 16);
      std::memcpy(&address, &v6, sizeof v6);
    }
    return address;
  }
  socklen_t sockaddr_size() const noexcept { return family == AF_INET ? sizeof(sockaddr_in) : sizeof(sockaddr_in6); }
  IpAddress with_port(std::uint16_t other) const noexcept {
    IpAddress ip = *this;
    ip.port = other;
    return ip;
  }
  /// Of a link-local address the scope may not be known: it is not sent, and an IB CM does not tell that of a request's sender.
  bool same_host(const IpAddress& other) const noexcept {
    return family == other.family && bytes == other.bytes && (scope == other.scope || scope == 0 || other.scope == 0);
  }
  bool is_loopback() const noexcept {
    if (family == AF_INET) return bytes[0] == std::byte{127};
    return family == AF_INET6 && std::memcmp(bytes.data(), &in6addr_loopback, 16) == 0;
  }
};

}  // namespace rdma::cm
