// Several processes of one host may wait for offers to one port, and one of them has the rendezvous. It passes on what is
// another's: a process that waits binds a datagram socket whose abstract name is the cookie of its accepted socket, which sock_diag
// tells.
//
// Who may pass offers on to a process: its own user and root. From others nothing is taken; those connections stay on TCP.
#pragma once

#include <cstdint>
#include <functional>
#include <unordered_map>

#include "rdma_core/base/result.hpp"
#include "rdma_core/cm/offer_wire.hpp"

namespace rdma::cm {

/// One thread. Lifetime: the epoll descriptor is the owner's and outlives it.
class OfferRelay {
 public:
  explicit OfferRelay(int epoll_fd) noexcept : epoll_fd_(epoll_fd) {}
  ~OfferRelay();
  OfferRelay(const OfferRelay&) = delete;
  OfferRelay& operator=(const OfferRelay&) = delete;

  /// Takes what is passed on for the socket of that cookie. Errors: EADDRINUSE (a stranger has the name), EMFILE.
  Result<Unit> wait_for(std::uint64_t cookie) noexcept;
  void forget(std::uint64_t cookie) noexcept;
  /// To the process that has the accepted socket of this connection. False: none waits.
  bool pass_on(const offer::Offer& offer, const IpAddress& server) noexcept;
  /// Hands over what has come.
  void progress(const std::function<void(std::uint64_t cookie, const offer::Offer&)>& take);
  void close_all() noexcept;

 private:
  int epoll_fd_;
  std::unordered_map<std::uint64_t, int> waiting_;  ///< descriptor by cookie
};

}  // namespace rdma::cm
