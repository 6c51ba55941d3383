// RnicCm: iWARP. Every number of an RNIC's listener is a TCP port of the host's, and a request to one that a TCP program has would
// put bytes into its stream. So offers go by UDP, and requests only to a port that an offer names.
#include <errno.h>
#include <pthread.h>
#include <signal.h>
#include <sys/epoll.h>

#include <algorithm>
#include <array>
#include <map>
#include <unordered_map>
#include <utility>
#include <vector>

#include "rdma_core/base/high_fd.hpp"
#include "rdma_core/base/sys.hpp"
#include "rdma_core/cm/rdma_manner.hpp"

namespace rdma::cm {
namespace {

/// UDP ports of the rendezvous: a block above the kernel's ephemeral ports (32768 to 60999, unless somebody changed that). TCP
/// ports that share one tell their offers apart.
constexpr std::uint16_t kFirstPort = 61000, kPorts = 4096;
constexpr std::uint16_t rendezvous_port(std::uint16_t tcp_port) noexcept {
  return static_cast<std::uint16_t>(kFirstPort + tcp_port % kPorts);
}

class UdpRendezvous final : public Rendezvous {
 public:
  UdpRendezvous(int epoll_fd, OnOffer on_offer, OnAnswer on_answer)
      : epoll_fd_(epoll_fd), on_offer_(std::move(on_offer)), on_answer_(std::move(on_answer)) {}
  ~UdpRendezvous() override { abandon_in_child(); }

  void send(std::uint64_t cookie, const IpAddress& from, const IpAddress& server, const offer::Offer& o) override {
    cancel(cookie);
    const int fd = open_bound(from.with_port(0));
    if (fd < 0) return on_answer_(cookie, std::nullopt);
    const IpAddress to = server.with_port(rendezvous_port(server.port));
    const sockaddr_storage address = to.to_sockaddr();
    const auto bytes = o.bytes();
    // Connected, so that only the server's host can answer, and a refusal is told.
    long r = sys::call(SYS_connect, fd, sys::arg(&address), to.sockaddr_size());
    if (r == 0) r = sys::call(SYS_sendto, fd, sys::arg(bytes.data()), static_cast<long>(bytes.size()), MSG_NOSIGNAL | MSG_DONTWAIT);
    if (r < 0) {
      close_fd(fd);
      return on_answer_(cookie, std::nullopt);
    }
    tries_[cookie] = {fd, o.token};
  }
  void cancel(std::uint64_t cookie) noexcept override {
    const auto it = tries_.find(cookie);
    if (it == tries_.end()) return;
    close_fd(it->second.fd);
    tries_.erase(it);
  }

  // Of several datagrams to ports that nobody has yet the kernel refuses a few a second, and drops the others in silence.
  unsigned patience_ms() const noexcept override { return 100; }

  // One socket for all TCP ports of a host that share its number.
  bool hold(const IpAddress& server) override {
    const IpAddress here = server.with_port(rendezvous_port(server.port));
    auto it = held_.find(here);
    if (it == held_.end()) {
      const int fd = open_bound(here);
      if (fd < 0) return false;
      it = held_.emplace(here, Held{fd, {}}).first;
    }
    it->second.for_ports.push_back(server.port);
    return true;
  }
  void let_go(const IpAddress& server) noexcept override {
    const auto it = held_.find(server.with_port(rendezvous_port(server.port)));
    if (it == held_.end()) return;
    std::erase(it->second.for_ports, server.port);
    if (!it->second.for_ports.empty()) return;
    close_fd(it->second.fd);
    held_.erase(it);
  }

  void progress() override {
    std::vector<std::pair<std::uint64_t, std::optional<offer::Code>>> answers;
    for (const auto& [cookie, each] : tries_) {
      std::array<std::byte, 64> bytes;
      const long n = sys::call(SYS_recvfrom, each.fd, sys::arg(bytes.data()), static_cast<long>(bytes.size()), MSG_DONTWAIT);
      if (n == -EAGAIN || n == -EINTR) continue;
      const auto answer = n > 0 ? offer::Answer::parse(std::span(bytes).first(static_cast<std::size_t>(n))) : std::nullopt;
      if (n > 0 && !(answer && answer->token == each.token)) continue;
      answers.emplace_back(cookie, answer ? std::optional(answer->code) : std::nullopt);
    }
    for (const auto& [cookie, code] : answers) {
      cancel(cookie);
      on_answer_(cookie, code);
    }
    for (const auto& [here, each] : held_)
      for (int datagrams = 0; datagrams < 64 && take_offer(here, each.fd); ++datagrams) {
      }
  }
  void abandon_in_child() noexcept override {
    for (const auto& [cookie, each] : tries_) close_fd(each.fd);
    for (const auto& [here, each] : held_) close_fd(each.fd);
    tries_.clear();
    held_.clear();
  }

 private:
  struct Try {
    int fd = -1;
    offer::Token token{};
  };
  struct Held {
    int fd = -1;
    std::vector<std::uint16_t> for_ports;
  };

  /// -1: not to be had.
  int open_bound(const IpAddress& here) noexcept {
    const long low = sys::call(SYS_socket, here.family, SOCK_DGRAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0);
    if (low < 0) return -1;
    const int fd = keep_fd(static_cast<int>(low));
    const sockaddr_storage address = here.to_sockaddr();
    if (sys::call(SYS_bind, fd, sys::arg(&address), here.sockaddr_size()) != 0) {
      close_fd(fd);
      return -1;
    }
    epoll_event event{EPOLLIN, {.u64 = 0}};
    sys::call(SYS_epoll_ctl, epoll_fd_, EPOLL_CTL_ADD, fd, sys::arg(&event));
    return fd;
  }
  void close_fd(int fd) noexcept {
    forget_fd(fd);
    sys::call(SYS_close, fd);
  }
  bool take_offer(const IpAddress& here, int fd) {
    std::array<std::byte, 64> bytes;
    sockaddr_storage from{};
    socklen_t length = sizeof from;
    const long n = sys::call(SYS_recvfrom, fd, sys::arg(bytes.data()), static_cast<long>(bytes.size()), MSG_DONTWAIT,
                             sys::arg(&from), sys::arg(&length));
    if (n < 0) return false;
    auto o = offer::Offer::parse(std::span(bytes).first(static_cast<std::size_t>(n)));
    if (!o || !IpAddress::from(from).same_host(o->client)) return true;
    o->client.scope = here.scope;
    const auto answer = offer::Answer{on_offer_(*o, here), o->token}.bytes();
    sys::call(SYS_sendto, fd, sys::arg(answer.data()), static_cast<long>(answer.size()), MSG_NOSIGNAL | MSG_DONTWAIT,
              sys::arg(&from), length);
    return true;
  }

  int epoll_fd_;
  OnOffer on_offer_;
  OnAnswer on_answer_;
  std::unordered_map<std::uint64_t, Try> tries_;  ///< by cookie
  std::map<IpAddress, Held> held_;
};

Result<Unit> to_init(Qp& qp) {
  if (qp.state() == QpState::init) return Unit{};  // the second try of a request
  QpAttributes attr;
  attr.state = QpState::init;
  attr.access = kPeerAccess;
  attr.transport = RnicQpAttributes{};
  return qp.modify(attr);
}

/// The kernel's CM has moved it; the QP is told.
Result<Unit> tell_rts(Qp& qp) {
  RnicQpAttributes rnic;
  rnic.peer = 1U;
  rnic.stream_mode = false;
  QpAttributes attr;
  attr.state = QpState::rts;
  attr.transport = rnic;
  return qp.modify(attr);
}

/// Runs `call` in a thread of its own, for it may wait in the kernel: rdma_connect() for TCP's connection, and the end of an
/// identifier whose request is not answered for that answer.
bool run_apart(std::function<void()> call) {
  auto kept = std::make_unique<std::function<void()>>(std::move(call));
  const auto run = [](void* mine) noexcept -> void* {
    const std::unique_ptr<std::function<void()>> self(static_cast<std::function<void()>*>(mine));
    (*self)();
    return nullptr;
  };
  sigset_t all, old;
  sigfillset(&all);
  pthread_attr_t attr;
  pthread_attr_init(&attr);
  pthread_attr_setdetachstate(&attr, PTHREAD_CREATE_DETACHED);
  pthread_attr_setstacksize(&attr, 128 * 1024);
  pthread_sigmask(SIG_SETMASK, &all, &old);
  pthread_t thread;
  const bool started = pthread_create(&thread, &attr, run, kept.get()) == 0;
  pthread_sigmask(SIG_SETMASK, &old, nullptr);
  pthread_attr_destroy(&attr);
  if (started) (void)kept.release();
  return started;
}

class RnicManner final : public Manner {
 public:
  const char* name() const noexcept override { return "rnic"; }
  NodeType node_type() const noexcept override { return NodeType::rnic; }
  rdma_port_space port_space() const noexcept override { return RDMA_PS_TCP; }
  const Caps& caps() const noexcept override { return caps_; }
  std::unique_ptr<Rendezvous> make_rendezvous(RdmaChannel&, int epoll_fd, Rendezvous::OnOffer on_offer,
                                              Rendezvous::OnAnswer on_answer) override {
    return std::make_unique<UdpRendezvous>(epoll_fd, std::move(on_offer), std::move(on_answer));
  }

  std::uint32_t near_end(const Qp&, rdma_cm_id* id) const noexcept override { return ntohs(rdma_get_src_port(id)); }
  std::uint32_t far_end(const CmEvent&, rdma_cm_id* id) const noexcept override { return ntohs(rdma_get_dst_port(id)); }
  Result<Unit> connect(Qp& qp, const RdmaId& id, const rdma_conn_param& parameters, std::span<const std::byte> data,
                       std::function<void()> failed) override {
    if (auto moved = to_init(qp); !moved) return moved;
    const auto send = [id, p = parameters, bytes = std::vector<std::byte>(data.begin(), data.end()),
                       failed = std::move(failed)]() mutable {
      p.private_data = bytes.data();
      p.private_data_len = static_cast<std::uint8_t>(bytes.size());
      if (rdma_connect(id.get(), &p) != 0) failed();
    };
    if (!run_apart(send)) return fail(EAGAIN, "rnic cm: no thread to send the request");
    return Unit{};
  }
  void abandon(RdmaId id) noexcept override {
    (void)run_apart([id = std::move(id)]() mutable { id = nullptr; });
  }
  Result<Unit> establish(Qp& qp, rdma_cm_id*, const rdma_conn_param&) override { return tell_rts(qp); }
  Result<Unit> accept(Qp& qp, rdma_cm_id* id, rdma_conn_param parameters) override {
    if (auto moved = to_init(qp); !moved) return moved;
    if (rdma_accept(id, &parameters) != 0) return fail(errno, "rnic cm: the reply cannot be sent");
    return tell_rts(qp);
  }

 private:
  // Soft-iWARP's MPA frames carry 197 bytes in a request and 251 in a reply.
  Caps caps_{197 - offer::kDialBytes, 251 - offer::kProofBytes, 251 - offer::kRefusalBytes, true, true};
};

}  // namespace

Result<std::unique_ptr<ConnectionManager>> make_rnic_cm(FindDevice find_device, const Secret& secret, DeviceGoes device_goes) {
  return make_rdma_cm(std::make_unique<RnicManner>(), std::move(find_device), secret, std::move(device_goes));
}

}  // namespace rdma::cm
