#include "rdma_core/cm/rdma_proof.hpp"

#include <fcntl.h>
#include <nettle/hmac.h>
#include <nettle/memops.h>
#include <nettle/sha2.h>

#include <cstring>

#include "rdma_core/base/sys.hpp"

namespace rdma::cm {
namespace {

const std::uint8_t* raw(const std::byte* bytes) noexcept { return reinterpret_cast<const std::uint8_t*>(bytes); }

/// Every field by its length, so that no two claims are one string of bytes.
class Digest {
 public:
  explicit Digest(const Secret& secret) noexcept { hmac_sha256_set_key(&context_, secret.size(), raw(secret.data())); }
  void add(std::span<const std::byte> bytes) noexcept {
    add(static_cast<std::uint32_t>(bytes.size()));
    hmac_sha256_update(&context_, bytes.size(), raw(bytes.data()));
  }
  void add(std::uint32_t number) noexcept {
    std::array<std::byte, 4> bytes;
    store_be32(bytes.data(), number);
    hmac_sha256_update(&context_, bytes.size(), raw(bytes.data()));
  }
  void add(const IpAddress& address) noexcept {
    add(static_cast<std::uint32_t>(address.family == AF_INET ? 4 : 6));
    add(static_cast<std::uint32_t>(address.port));
    add(address.bytes);
  }
  offer::Proof end() noexcept {
    offer::Proof proof;
    hmac_sha256_digest(&context_, proof.size(), reinterpret_cast<std::uint8_t*>(proof.data()));
    return proof;
  }

 private:
  hmac_sha256_ctx context_;
};

}  // namespace

Result<Secret, std::string> secret_from(const char* path) {
  constexpr long kLeast = 16, kMost = 4096;
  const auto refuse = [path](const char* why) { return Err{std::string("the secret ") + path + " " + why}; };
  const long fd = sys::call(SYS_openat, AT_FDCWD, sys::arg(path), O_RDONLY | O_CLOEXEC | O_NONBLOCK, 0);
  if (fd < 0) return refuse((std::string("cannot be read: ") + strerror(static_cast<int>(-fd))).c_str());
  std::array<std::uint8_t, kMost + 1> bytes;
  long size = 0, n = 0;
  while (size < static_cast<long>(bytes.size()) &&
         (n = sys::call(SYS_read, fd, sys::arg(bytes.data() + size), static_cast<long>(bytes.size()) - size)) > 0)
    size += n;
  sys::call(SYS_close, fd);
  if (n < 0) return refuse((std::string("cannot be read: ") + strerror(static_cast<int>(-n))).c_str());
  if (size < kLeast) return refuse("has fewer than 16 bytes");
  if (size > kMost) return refuse("has more than 4096 bytes");
  sha256_ctx context;
  sha256_init(&context);
  sha256_update(&context, static_cast<std::size_t>(size), bytes.data());
  Secret secret;
  sha256_digest(&context, secret.size(), reinterpret_cast<std::uint8_t*>(secret.data()));
  return secret;
}

offer::Proof prove(const Secret& secret, Says what, const Claim& claim) noexcept {
  constexpr std::array<std::byte, 4> kName{std::byte{'S'}, std::byte{'D'}, std::byte{'P'}, std::byte{1}};
  Digest digest(secret);
  digest.add(kName);
  digest.add(static_cast<std::uint32_t>(what));
  digest.add(claim.token);
  digest.add(claim.client);
  digest.add(claim.server);
  digest.add(claim.dialler);
  digest.add(claim.listener);
  digest.add(claim.data);
  digest.add(claim.from_client);
  digest.add(claim.from_server);
  return digest.end();
}

bool is_proved(const offer::Proof& proof, const Secret& secret, Says what, const Claim& claim) noexcept {
  const offer::Proof right = prove(secret, what, claim);
  return memeql_sec(proof.data(), right.data(), right.size()) != 0;
}

}  // namespace rdma::cm
