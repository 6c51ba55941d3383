// Names of the verbs world that carry no behaviour.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>

namespace rdma {

/// What a device is. Clients of the registry decide by it whether they care for the device.
enum class NodeType : std::uint8_t { ib_ca, ib_switch, ib_router, rnic };
enum class LinkLayer : std::uint8_t { infiniband, ethernet, memory };
enum class PortState : std::uint8_t { down, init, armed, active };

using Gid = std::array<std::byte, 16>;

enum class Qpn : std::uint32_t {};
enum class Lkey : std::uint32_t {};
enum class Rkey : std::uint32_t {};

/// What an MR may be used for; a bit set. An RNIC's RDMA Read sink needs remote_write too (RFC 5040).
enum class Access : std::uint32_t { local_read = 0, local_write = 1, remote_write = 2, remote_read = 4 };
constexpr Access operator|(Access a, Access b) noexcept {
  return static_cast<Access>(static_cast<std::uint32_t>(a) | static_cast<std::uint32_t>(b));
}
constexpr bool allows(Access have, Access want) noexcept {
  return (static_cast<std::uint32_t>(have) & static_cast<std::uint32_t>(want)) == static_cast<std::uint32_t>(want);
}

const char* to_string(NodeType) noexcept;
const char* to_string(LinkLayer) noexcept;

}  // namespace rdma
