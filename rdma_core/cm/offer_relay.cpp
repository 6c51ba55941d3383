#include "rdma_core/cm/offer_relay.hpp"

#include <sys/epoll.h>
#include <sys/un.h>

#include <cerrno>
#include <cstddef>
#include <cstdio>
#include <vector>

#include "rdma_core/base/high_fd.hpp"
#include "rdma_core/base/sys.hpp"
#include "rdma_core/cm/sock_diag.hpp"

namespace rdma::cm {
namespace {

/// "\0sdpreload/offer/1/COOKIE": abstract, so it belongs to the network namespace and leaves nothing behind.
socklen_t name_of(std::uint64_t cookie, sockaddr_un& address) noexcept {
  address = {};
  address.sun_family = AF_UNIX;
  const int length = std::snprintf(address.sun_path + 1, sizeof address.sun_path - 1, "sdpreload/offer/1/%llx",
                                   static_cast<unsigned long long>(cookie));
  return static_cast<socklen_t>(offsetof(sockaddr_un, sun_path) + 1 + static_cast<unsigned>(length));
}

int datagram_socket() noexcept {
  return static_cast<int>(sys::call(SYS_socket, AF_UNIX, SOCK_DGRAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0));
}

/// One datagram, from a process that may pass offers on. Negative: -errno; 0: nothing to be used.
long receive(int fd, std::span<std::byte> out) noexcept {
  iovec iov{out.data(), out.size()};
  alignas(cmsghdr) char control[CMSG_SPACE(sizeof(ucred))];
  msghdr msg{};
  msg.msg_iov = &iov;
  msg.msg_iovlen = 1;
  msg.msg_control = control;
  msg.msg_controllen = sizeof control;
  const long n = sys::call(SYS_recvmsg, fd, sys::arg(&msg), MSG_CMSG_CLOEXEC);
  if (n < 0) return n;
  const cmsghdr* head = CMSG_FIRSTHDR(&msg);
  if (head == nullptr || head->cmsg_level != SOL_SOCKET || head->cmsg_type != SCM_CREDENTIALS) return 0;
  ucred from{};
  std::memcpy(&from, CMSG_DATA(head), sizeof from);
  const bool may = from.uid == 0 || from.uid == static_cast<uid_t>(sys::call(SYS_geteuid));
  return may ? n : 0;
}

}  // namespace

OfferRelay::~OfferRelay() { close_all(); }

void OfferRelay::close_all() noexcept {
  for (const auto& [cookie, fd] : waiting_) {
    forget_fd(fd);
    sys::call(SYS_close, fd);
  }
  waiting_.clear();
}

Result<Unit> OfferRelay::wait_for(std::uint64_t cookie) noexcept {
  if (waiting_.contains(cookie)) return Unit{};
  const int low = datagram_socket();
  if (low < 0) return fail(-low, "offers: no descriptor");
  const int fd = keep_fd(low);
  sockaddr_un address;
  const socklen_t length = name_of(cookie, address);
  const int on = 1;
  sys::call(SYS_setsockopt, fd, SOL_SOCKET, SO_PASSCRED, sys::arg(&on), sizeof on);
  if (const long r = sys::call(SYS_bind, fd, sys::arg(&address), length); r != 0) {
    forget_fd(fd);
    sys::call(SYS_close, fd);
    return fail(static_cast<int>(-r), "offers: the name of this connection is taken");
  }
  epoll_event event{EPOLLIN, {.u64 = 0}};
  sys::call(SYS_epoll_ctl, epoll_fd_, EPOLL_CTL_ADD, fd, sys::arg(&event));
  waiting_[cookie] = fd;
  return Unit{};
}

void OfferRelay::forget(std::uint64_t cookie) noexcept {
  const auto it = waiting_.find(cookie);
  if (it == waiting_.end()) return;
  forget_fd(it->second);
  sys::call(SYS_close, it->second);
  waiting_.erase(it);
}

bool OfferRelay::pass_on(const offer::Offer& offer, const IpAddress& server) noexcept {
  // sock_diag is asked for the other end of the client's.
  const Anchor clients{.local = offer.client.to_sockaddr(), .remote = server.to_sockaddr()};
  const auto accepted = find_other_end(clients);
  if (!accepted || !accepted.value().held) return false;
  const int fd = datagram_socket();
  if (fd < 0) return false;
  sockaddr_un address;
  const socklen_t length = name_of(accepted.value().cookie, address);
  const auto bytes = offer.bytes();
  const long sent = sys::call(SYS_sendto, fd, sys::arg(bytes.data()), static_cast<long>(bytes.size()), MSG_NOSIGNAL | MSG_DONTWAIT,
                              sys::arg(&address), length);
  sys::call(SYS_close, fd);
  return sent == static_cast<long>(bytes.size());
}

void OfferRelay::progress(const std::function<void(std::uint64_t, const offer::Offer&)>& take) {
  std::vector<std::pair<std::uint64_t, offer::Offer>> came;  // taking one may end the wait for it
  for (const auto& [cookie, fd] : waiting_) {
    std::array<std::byte, offer::kOfferBytes> bytes;
    for (int each = 0; each < 16; ++each) {
      const long n = receive(fd, bytes);
      if (n < 0) break;
      if (const auto offer = offer::Offer::parse(std::span(bytes).first(static_cast<std::size_t>(n))))
        came.emplace_back(cookie, *offer);
    }
  }
  for (const auto& [cookie, offer] : came) take(cookie, offer);
}

}  // namespace rdma::cm
