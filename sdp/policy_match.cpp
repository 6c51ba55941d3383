#include <fnmatch.h>
#include <netinet/in.h>

#include <cstring>

#include "sdp/policy.hpp"

namespace sdp {
namespace {

/// An address as the rules see it.
struct Seen {
  Network::Kind kind = Network::Kind::any;  ///< any: neither IPv4 nor IPv6
  std::uint8_t bytes[16]{};
  std::uint16_t port = 0;
};

Seen seen(const sockaddr_storage& address) noexcept {
  Seen s;
  if (address.ss_family == AF_INET) {
    sockaddr_in in;
    std::memcpy(&in, &address, sizeof in);
    s.kind = Network::Kind::v4;
    s.port = ntohs(in.sin_port);
    std::memcpy(s.bytes, &in.sin_addr, 4);
  } else if (address.ss_family == AF_INET6) {
    sockaddr_in6 in6;
    std::memcpy(&in6, &address, sizeof in6);
    const bool mapped = IN6_IS_ADDR_V4MAPPED(&in6.sin6_addr) != 0;
    s.kind = mapped ? Network::Kind::v4 : Network::Kind::v6;
    s.port = ntohs(in6.sin6_port);
    std::memcpy(s.bytes, in6.sin6_addr.s6_addr + (mapped ? 12 : 0), mapped ? 4 : 16);
  }
  return s;
}

/// The mask's byte number `i` of a prefix.
std::uint8_t mask_byte(unsigned prefix, unsigned i) noexcept {
  if (prefix >= (i + 1) * 8) return 0xff;
  if (prefix <= i * 8) return 0;
  return static_cast<std::uint8_t>(0xff00U >> (prefix - i * 8));
}

bool contains(const Network& n, const Seen& s) noexcept {
  if (n.kind == Network::Kind::any) return true;
  if (n.kind != s.kind) return false;
  for (unsigned i = 0; i < (n.kind == Network::Kind::v4 ? 4U : 16U); ++i)
    if ((s.bytes[i] & mask_byte(n.prefix, i)) != n.address[i]) return false;
  return true;
}

}  // namespace

bool Network::contains(const sockaddr_storage& other) const noexcept { return sdp::contains(*this, seen(other)); }

bool Network::is_empty() const noexcept {
  if (kind == Kind::any) return false;
  for (unsigned i = 0; i < (kind == Kind::v4 ? 4U : 16U); ++i)
    if ((address[i] & ~mask_byte(prefix, i) & 0xff) != 0) return true;
  return false;
}

bool PolicyRule::matches(const char* program_name, const sockaddr_storage& address) const noexcept {
  const Seen s = seen(address);
  if (s.port < first_port || s.port > last_port || !sdp::contains(network, s)) return false;
  return program == "*" || fnmatch(program.c_str(), program_name, 0) == 0;
}

Family PolicyRules::decide(Role role, const char* program_name, const sockaddr_storage& local, const sockaddr_storage& remote,
                           Family without_rules) const noexcept {
  if (empty()) return without_rules;
  const bool accepted = role == Role::acceptor;
  for (const PolicyRule& rule : accepted ? server : client)
    if (rule.matches(program_name, accepted ? local : remote)) return rule.family;
  return Family::both;
}

rdma::log::Level level_from_libsdp(std::uint32_t min_level) noexcept {
  using rdma::log::Level;
  if (min_level > 9) return Level::off;
  if (min_level == 9) return Level::error;
  if (min_level == 8) return Level::warn;
  return min_level >= 3 ? Level::info : Level::debug;  // 7 connections, 4 and 3 matches; 2 calls, 1 all
}

}  // namespace sdp
