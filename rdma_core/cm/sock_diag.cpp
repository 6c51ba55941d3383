#include "rdma_core/cm/sock_diag.hpp"

#include <linux/inet_diag.h>
#include <linux/netlink.h>
#include <linux/sock_diag.h>
#include <netinet/in.h>
#include <netinet/tcp.h>

#include <cerrno>
#include <cstring>

#include "rdma_core/base/sys.hpp"
#include "rdma_core/cm/ip_address.hpp"

namespace rdma::cm {

bool in_our_namespace(int anchor_fd) noexcept {
  std::uint64_t theirs = 0, ours = 0;
  socklen_t length = sizeof theirs;
  if (anchor_fd < 0 || sys::call(SYS_getsockopt, anchor_fd, SOL_SOCKET, SO_NETNS_COOKIE, sys::arg(&theirs), sys::arg(&length)) != 0)
    return true;  // an older kernel: sock_diag finds nothing, or what the cookies then contradict
  const long probe = sys::call(SYS_socket, AF_UNIX, SOCK_DGRAM | SOCK_CLOEXEC, 0);
  if (probe < 0) return false;
  length = sizeof ours;
  const long rc = sys::call(SYS_getsockopt, probe, SOL_SOCKET, SO_NETNS_COOKIE, sys::arg(&ours), sys::arg(&length));
  sys::call(SYS_close, probe);
  return rc != 0 || ours == theirs;
}

Result<SocketOwner> find_other_end(const Anchor& anchor) noexcept {
  const IpAddress mine = IpAddress::from(anchor.local), theirs = IpAddress::from(anchor.remote);
  if (mine.family == AF_UNSPEC || mine.family != theirs.family) return fail(EAFNOSUPPORT, "sock_diag: not an IP connection");
  const long fd = sys::call(SYS_socket, AF_NETLINK, SOCK_RAW | SOCK_CLOEXEC | SOCK_NONBLOCK, NETLINK_SOCK_DIAG);
  if (fd < 0) return fail(static_cast<int>(-fd), "sock_diag: no netlink socket");
  struct {
    nlmsghdr head;
    inet_diag_req_v2 body;
  } request{};
  request.head.nlmsg_len = sizeof request;
  request.head.nlmsg_type = SOCK_DIAG_BY_FAMILY;
  request.head.nlmsg_flags = NLM_F_REQUEST;
  request.body.sdiag_family = static_cast<std::uint8_t>(mine.family);
  request.body.sdiag_protocol = IPPROTO_TCP;
  request.body.idiag_states = ~0U;
  request.body.id.idiag_sport = htons(theirs.port);
  request.body.id.idiag_dport = htons(mine.port);
  std::memcpy(request.body.id.idiag_src, theirs.bytes.data(), 16);
  std::memcpy(request.body.id.idiag_dst, mine.bytes.data(), 16);
  request.body.id.idiag_if = mine.scope;
  request.body.id.idiag_cookie[0] = request.body.id.idiag_cookie[1] = INET_DIAG_NOCOOKIE;
  const long sent = sys::call(SYS_sendto, fd, sys::arg(&request), sizeof request, 0);
  alignas(nlmsghdr) char answer[4096];
  // The kernel answers inside the send: nothing to wait for.
  const long got = sent < 0 ? sent : sys::call(SYS_recvfrom, fd, sys::arg(answer), sizeof answer, 0);
  sys::call(SYS_close, fd);
  if (got < 0) return fail(static_cast<int>(-got), "sock_diag: no answer");
  nlmsghdr head;
  if (static_cast<std::size_t>(got) < sizeof head) return fail(EBADMSG, "sock_diag: short answer");
  std::memcpy(&head, answer, sizeof head);
  if (head.nlmsg_type == NLMSG_ERROR) {
    nlmsgerr error{};
    if (static_cast<std::size_t>(got) >= NLMSG_HDRLEN + sizeof error) std::memcpy(&error, answer + NLMSG_HDRLEN, sizeof error);
    return fail(error.error < 0 ? -error.error : ENOENT, "sock_diag: no such socket on this host");
  }
  inet_diag_msg msg;
  if (head.nlmsg_type != SOCK_DIAG_BY_FAMILY || static_cast<std::size_t>(got) < NLMSG_HDRLEN + sizeof msg)
    return fail(EBADMSG, "sock_diag: unexpected answer");
  std::memcpy(&msg, answer + NLMSG_HDRLEN, sizeof msg);
  // Where there is no such connection the kernel looks for a listener on the port: that is somebody else.
  if (msg.idiag_state == TCP_LISTEN || msg.id.idiag_sport != htons(theirs.port) || msg.id.idiag_dport != htons(mine.port))
    return fail(ENOENT, "sock_diag: no such connection on this host");
  SocketOwner owner;
  owner.uid = msg.idiag_uid;
  owner.cookie = msg.id.idiag_cookie[0] | static_cast<std::uint64_t>(msg.id.idiag_cookie[1]) << 32;
  owner.held = msg.idiag_inode != 0;
  return owner;
}

}  // namespace rdma::cm
