#include "sdp/peer_link.hpp"

#include <netinet/in.h>
#include <netinet/tcp.h>
#include <sys/epoll.h>
#include <sys/socket.h>

#include <algorithm>
#include <cerrno>
#include <cstring>

#include "rdma_core/base/byte_order.hpp"
#include "rdma_core/base/clock.hpp"
#include "rdma_core/base/high_fd.hpp"
#include "rdma_core/base/sys.hpp"

namespace sdp {

namespace sys = rdma::sys;
using rdma::cm::IpAddress;

namespace {

constexpr std::uint32_t kMagic = 0x53444B01;         // "SDK", version
constexpr std::int64_t kPatienceNs = 5'000'000'000;  ///< for a caller that attaches nothing
constexpr std::size_t kMostUnsent = 1 << 20;         ///< bytes for a peer that does not read
constexpr std::uint8_t kSwitched = 1, kClosed = 2;

std::int64_t now_ns() noexcept { return rdma::SteadyClock{}.now(); }

}  // namespace

PeerLinks::Frame PeerLinks::emit(const Message& m) noexcept {
  Frame f{};
  rdma::store_be32(f.data(), kMagic);
  f[4] = static_cast<std::byte>(m.kind);
  f[5] = static_cast<std::byte>((m.arrived.switched ? kSwitched : 0) | (m.arrived.closed ? kClosed : 0));
  std::memcpy(f.data() + 8, m.key.data(), m.key.size());
  rdma::store_be64(f.data() + 24, m.arrived.switch_at);
  rdma::store_be64(f.data() + 32, m.arrived.sent);
  rdma::store_be64(f.data() + 40, m.arrived.received);
  return f;
}

bool PeerLinks::parse(const Frame& f, Message& m) noexcept {
  const auto kind = std::to_integer<std::uint8_t>(f[4]), flags = std::to_integer<std::uint8_t>(f[5]);
  if (rdma::load_be32(f.data()) != kMagic || kind < static_cast<std::uint8_t>(Kind::attach) ||
      kind > static_cast<std::uint8_t>(Kind::again))
    return false;
  m.kind = static_cast<Kind>(kind);
  std::memcpy(m.key.data(), f.data() + 8, m.key.size());
  m.arrived.switched = (flags & kSwitched) != 0;
  m.arrived.closed = (flags & kClosed) != 0;
  m.arrived.switch_at = rdma::load_be64(f.data() + 24);
  m.arrived.sent = rdma::load_be64(f.data() + 32);
  m.arrived.received = rdma::load_be64(f.data() + 40);
  return true;
}

PeerLinks::PeerLinks() : epoll_fd_(rdma::keep_fd(static_cast<int>(sys::call(SYS_epoll_create1, EPOLL_CLOEXEC)))) {}
PeerLinks::~PeerLinks() { abandon_in_child(); }

void PeerLinks::abandon_in_child() noexcept {
  const auto close_fd = [](int fd) {
    rdma::forget_fd(fd);
    sys::call(SYS_close, fd);
  };
  for (const auto& [fd, link] : links_) close_fd(fd);
  for (const auto& [address, fd] : listeners_) close_fd(fd);
  if (epoll_fd_ >= 0) close_fd(epoll_fd_);
  links_.clear();
  listeners_.clear();
  epoll_fd_ = -1;
}

PeerLinks::Key PeerLinks::new_key() noexcept {
  Key key{};
  sys::call(SYS_getrandom, sys::arg(key.data()), static_cast<long>(key.size()), 0);
  return key;
}

void PeerLinks::watch(int fd, std::uint32_t events, int operation) noexcept {
  epoll_event event{events, {.fd = fd}};
  sys::call(SYS_epoll_ctl, epoll_fd_, operation, fd, sys::arg(&event));
}

/// -1: none to be had.
int PeerLinks::open_socket(const IpAddress& address) noexcept {
  const long low = sys::call(SYS_socket, address.family, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0);
  if (low < 0) return -1;
  const int fd = rdma::keep_fd(static_cast<int>(low));
  const int on = 1;
  sys::call(SYS_setsockopt, fd, IPPROTO_TCP, TCP_NODELAY, sys::arg(&on), sizeof on);
  return fd;
}

std::uint16_t PeerLinks::port_at(const IpAddress& here) {
  const IpAddress any = here.with_port(0);
  sockaddr_storage address = any.to_sockaddr();
  auto it = listeners_.find(any);
  if (it == listeners_.end()) {
    const int fd = open_socket(any);
    if (fd < 0) return 0;
    if (sys::call(SYS_bind, fd, sys::arg(&address), any.sockaddr_size()) != 0 || sys::call(SYS_listen, fd, 64) != 0) {
      rdma::forget_fd(fd);
      sys::call(SYS_close, fd);
      return 0;
    }
    watch(fd, EPOLLIN, EPOLL_CTL_ADD);
    it = listeners_.emplace(any, fd).first;
  }
  socklen_t size = sizeof address;
  if (sys::call(SYS_getsockname, it->second, sys::arg(&address), sys::arg(&size)) != 0) return 0;
  return IpAddress::from(address).port;
}

void PeerLinks::announce(const Key& key) { link_of_[key] = -1; }

void PeerLinks::connect(const Key& key, const IpAddress& there) {
  auto it = std::find_if(links_.begin(), links_.end(), [&](const auto& each) { return each.second.there == there; });
  if (it == links_.end()) {
    const int fd = open_socket(there);
    if (fd < 0) return;
    const sockaddr_storage address = there.to_sockaddr();
    const long r = sys::call(SYS_connect, fd, sys::arg(&address), there.sockaddr_size());
    if (r != 0 && r != -EINPROGRESS) {
      rdma::forget_fd(fd);
      sys::call(SYS_close, fd);
      return;
    }
    Link link;
    link.fd = fd;
    link.there = there;
    link.since = now_ns();
    it = links_.emplace(fd, std::move(link)).first;
    watch(fd, EPOLLIN | EPOLLOUT, EPOLL_CTL_ADD);
  }
  link_of_[key] = it->first;
  it->second.keys.push_back(key);
  queue(it->second, {Kind::attach, key, {}});
}

bool PeerLinks::send(const Message& message) {
  const auto it = link_of_.find(message.key);
  if (it == link_of_.end() || it->second < 0) return false;
  queue(links_.at(it->second), message);
  return true;
}

void PeerLinks::forget(const Key& key) {
  const auto it = link_of_.find(key);
  if (it == link_of_.end()) return;
  const int fd = it->second;
  link_of_.erase(it);
  if (fd < 0) return;
  Link& link = links_.at(fd);
  std::erase(link.keys, key);
  link.since = now_ns();
}

/// A link that fails here is found by the next progress().
void PeerLinks::queue(Link& link, const Message& message) {
  if (link.out.size() >= kMostUnsent) {
    sys::call(SYS_shutdown, link.fd, SHUT_RDWR);
    return;
  }
  const Frame frame = emit(message);
  link.out.insert(link.out.end(), frame.begin(), frame.end());
  if (link.connected) (void)flush(link);
}

/// False: the link is over.
bool PeerLinks::flush(Link& link) noexcept {
  while (!link.out.empty()) {
    const long n =
        sys::call(SYS_sendto, link.fd, sys::arg(link.out.data()), static_cast<long>(link.out.size()), MSG_DONTWAIT | MSG_NOSIGNAL);
    if (n == -EAGAIN || n == -EINTR) break;
    if (n < 0) return false;
    link.out.erase(link.out.begin(), link.out.begin() + n);
  }
  watch(link.fd, link.out.empty() ? EPOLLIN : EPOLLIN | EPOLLOUT, EPOLL_CTL_MOD);
  return true;
}

/// False: the link is over.
bool PeerLinks::receive(Link& link) {
  for (int frames = 0; frames < 64; ++frames) {
    const long n = sys::call(SYS_recvfrom, link.fd, sys::arg(link.in.data() + link.filled),
                             static_cast<long>(link.in.size() - link.filled), MSG_DONTWAIT);
    if (n == -EAGAIN || n == -EINTR) return true;
    if (n <= 0) return false;
    link.filled += static_cast<std::size_t>(n);
    if (link.filled < link.in.size()) continue;
    link.filled = 0;
    Message message;
    if (!parse(link.in, message)) return false;
    const int fd = link.fd;
    take(link, message);
    if (!links_.contains(fd)) return true;
  }
  return true;
}

void PeerLinks::take(Link& link, const Message& message) {
  const auto it = link_of_.find(message.key);
  if (message.kind == Kind::attach && it != link_of_.end() && it->second < 0) {
    it->second = link.fd;
    link.keys.push_back(message.key);
  } else if (it == link_of_.end() || it->second != link.fd) {
    if (message.kind == Kind::ask || message.kind == Kind::again) queue(link, {Kind::unknown, message.key, {}});
    return;
  }
  if (on_message) on_message(message);
}

std::size_t PeerLinks::strangers() const noexcept {
  return static_cast<std::size_t>(
      std::count_if(links_.begin(), links_.end(), [](const auto& each) { return each.second.keys.empty(); }));
}

void PeerLinks::accept_from(int listener) {
  for (;;) {
    sockaddr_storage from{};
    socklen_t size = sizeof from;
    const long low = sys::call(SYS_accept4, listener, sys::arg(&from), sys::arg(&size), SOCK_NONBLOCK | SOCK_CLOEXEC);
    if (low < 0) return;
    if (strangers() >= kStrangers) {
      sys::call(SYS_close, low);
      continue;
    }
    Link link;
    link.fd = rdma::keep_fd(static_cast<int>(low));
    link.there = IpAddress::from(from).with_port(0);
    link.connected = true;
    link.since = now_ns();
    watch(link.fd, EPOLLIN, EPOLL_CTL_ADD);
    const int fd = link.fd;
    links_.emplace(fd, std::move(link));
  }
}

void PeerLinks::drop(int fd) {
  const auto it = links_.find(fd);
  if (it == links_.end()) return;
  const std::vector<Key> keys = std::move(it->second.keys);
  links_.erase(it);
  rdma::forget_fd(fd);
  sys::call(SYS_close, fd);
  for (const Key& key : keys) {
    link_of_.erase(key);
    if (on_lost) on_lost(key);
  }
}

void PeerLinks::progress() {
  epoll_event events[32];
  const long n = sys::call(SYS_epoll_pwait, epoll_fd_, sys::arg(events), 32, 0, 0, 8);
  for (long i = 0; i < n; ++i) {
    const int fd = events[i].data.fd;
    const auto it = links_.find(fd);
    if (it == links_.end()) {
      accept_from(fd);
      continue;
    }
    Link& link = it->second;
    if ((events[i].events & EPOLLOUT) != 0) link.connected = true;
    const bool over = (events[i].events & (EPOLLERR | EPOLLHUP)) != 0 || (link.connected && !flush(link));
    if (over || !receive(link)) drop(fd);
  }
  std::vector<int> idle;
  const std::int64_t now = now_ns();
  for (const auto& [fd, link] : links_)
    if (link.keys.empty() && now - link.since > kPatienceNs) idle.push_back(fd);
  for (const int fd : idle) drop(fd);
}

}  // namespace sdp
