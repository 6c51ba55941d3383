#include "sdp/capture/roce_frame.hpp"

#include <cstring>

#include "rdma_core/base/byte_order.hpp"

namespace sdp::capture {

using rdma::store_be16;
using rdma::store_be32;
using rdma::store_be64;

namespace {

constexpr std::uint16_t kRoceUdpPort = 4791;
constexpr std::uint32_t kQp1QKey = 0x80010000;
constexpr std::uint8_t kUdSendOnly = 0x64;
/// RDMA_PS_IB in the CM's scheme: (port space << 16) + port. Wireshark takes a service id for SDP when bit 16 is set, as it is
/// here.
constexpr std::uint64_t kServiceIdBase = 0x00000000013F0000;
constexpr std::uint8_t kMtu4096 = 5;

std::byte* put_mac(std::byte* out, const End& end) noexcept {
  out[0] = std::byte{0x02};  // locally administered
  out[1] = std::byte{0};
  std::memcpy(out + 2, end.gid.data() + 12, 4);
  return out + 6;
}

std::uint16_t ipv4_checksum(const std::byte* header) noexcept {
  std::uint32_t sum = 0;
  for (int i = 0; i < 20; i += 2) sum += rdma::load_be16(header + i);
  sum = (sum & 0xFFFF) + (sum >> 16);
  return static_cast<std::uint16_t>(~((sum & 0xFFFF) + (sum >> 16)));
}

std::byte* put_ip(std::byte* out, bool v4, const End& from, const End& to, std::size_t udp_bytes) noexcept {
  constexpr std::byte kUdp{17};
  constexpr std::byte kHops{64};
  if (v4) {
    std::memset(out, 0, 20);
    out[0] = std::byte{0x45};
    store_be16(out + 2, static_cast<std::uint16_t>(20 + udp_bytes));
    out[6] = std::byte{0x40};  // don't fragment
    out[8] = kHops;
    out[9] = kUdp;
    std::memcpy(out + 12, from.gid.data() + 12, 4);
    std::memcpy(out + 16, to.gid.data() + 12, 4);
    store_be16(out + 10, ipv4_checksum(out));
    return out + 20;
  }
  std::memset(out, 0, 8);
  out[0] = std::byte{0x60};
  store_be16(out + 4, static_cast<std::uint16_t>(udp_bytes));
  out[6] = kUdp;
  out[7] = kHops;
  std::memcpy(out + 8, from.gid.data(), 16);
  std::memcpy(out + 24, to.gid.data(), 16);
  return out + 40;
}

/// Everything up to and with the BTH.
std::byte* put_headers(std::byte* out, bool v4, const End& from, const End& to, std::uint8_t opcode, std::uint32_t dest_qpn,
                       std::uint32_t psn, std::size_t payload) noexcept {
  out = put_mac(out, to);
  out = put_mac(out, from);
  store_be16(out, v4 ? 0x0800 : 0x86DD);
  const std::size_t udp_bytes = 8 + 12 + payload + pad_bytes(payload) + kIcrcBytes;
  out = put_ip(out + 2, v4, from, to, udp_bytes);
  store_be16(out, static_cast<std::uint16_t>(0xC000 | (from.qpn & 0x3FFF)));
  store_be16(out + 2, kRoceUdpPort);
  store_be16(out + 4, static_cast<std::uint16_t>(udp_bytes));
  store_be16(out + 6, 0);  // no checksum: the ICRC's task on RoCE
  out += 8;
  out[0] = std::byte{opcode};
  out[1] = static_cast<std::byte>(0x40 | pad_bytes(payload) << 4);  // migrated, as adapters send
  store_be16(out + 2, 0xFFFF);
  store_be32(out + 4, dest_qpn & 0xFFFFFF);
  store_be32(out + 8, psn & 0xFFFFFF);
  return out + 12;
}

/// The 36 bytes that the kernel's CM puts in front of a REQ's private data for IP addresses; ours have no private data behind them.
void put_ip_cm_header(std::byte* out, const CmExchange& x) noexcept {
  out[1] = x.v4 ? std::byte{0x40} : std::byte{0x60};
  store_be16(out + 2, x.active.port);
  const std::size_t skip = x.v4 ? 12 : 0;
  std::memcpy(out + 4 + skip, x.active.gid.data() + skip, 16 - skip);
  std::memcpy(out + 20 + skip, x.passive.gid.data() + skip, 16 - skip);
}

/// `req` points behind the MAD header and is zeroed, as for the next two.
void put_req(std::byte* req, const CmExchange& x) noexcept {
  store_be32(req, x.active_id);
  store_be64(req + 8, kServiceIdBase + x.passive.port);
  store_be32(req + 32, x.active.qpn << 8 | 4);                  // responder resources
  store_be32(req + 36, 4);                                      // initiator depth
  store_be32(req + 40, 20 << 3);                                // remote CM timeout; RC is service type 0
  store_be32(req + 44, x.active.first_psn << 8 | 20 << 3 | 7);  // local CM timeout, retry count
  store_be16(req + 48, 0xFFFF);                                 // partition
  req[50] = std::byte{kMtu4096 << 4};
  req[51] = std::byte{15 << 4};  // CM retries
  std::memcpy(req + 56, x.active.gid.data(), 16);
  std::memcpy(req + 72, x.passive.gid.data(), 16);
  req[93] = std::byte{64};  // hop limit
  put_ip_cm_header(req + 140, x);
}

void put_rep(std::byte* rep, const CmExchange& x) noexcept {
  store_be32(rep, x.passive_id);
  store_be32(rep + 4, x.active_id);
  store_be32(rep + 12, x.passive.qpn << 8);
  store_be32(rep + 20, x.passive.first_psn << 8);
  rep[24] = std::byte{4};
  rep[25] = std::byte{4};
}

void put_rtu(std::byte* rtu, const CmExchange& x) noexcept {
  store_be32(rtu, x.active_id);
  store_be32(rtu + 4, x.passive_id);
}

}  // namespace

std::byte* put_rc_headers(std::byte* out, bool v4, const End& from, const End& to, std::uint8_t opcode, std::uint32_t psn,
                          std::size_t payload) noexcept {
  return put_headers(out, v4, from, to, opcode, to.qpn, psn, payload);
}

std::byte* put_cm_packet(std::byte* out, const CmExchange& x, CmMessage message) noexcept {
  const bool from_active = message != CmMessage::rep;
  out = put_headers(out, x.v4, from_active ? x.active : x.passive, from_active ? x.passive : x.active, kUdSendOnly, 1,
                    static_cast<std::uint32_t>(message), kCmPayloadBytes);
  std::memset(out, 0, kCmPayloadBytes + kIcrcBytes);
  store_be32(out, kQp1QKey);
  store_be32(out + 4, 1);  // source QP
  out += 8;
  out[0] = std::byte{1};  // base version
  out[1] = std::byte{7};  // communication management
  out[2] = std::byte{2};  // class version
  out[3] = std::byte{3};  // Send
  store_be64(out + 8, x.transaction);
  store_be16(out + 16, static_cast<std::uint16_t>(message));
  switch (message) {
    case CmMessage::req:
      put_req(out + 24, x);
      break;
    case CmMessage::rep:
      put_rep(out + 24, x);
      break;
    case CmMessage::rtu:
      put_rtu(out + 24, x);
      break;
  }
  return out + kMadBytes + kIcrcBytes;
}

}  // namespace sdp::capture
