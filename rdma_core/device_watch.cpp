#include "rdma_core/device_watch.hpp"

#include <linux/netlink.h>
#include <sys/socket.h>

#include <cerrno>
#include <string_view>
#include <utility>

#include "rdma_core/base/high_fd.hpp"
#include "rdma_core/base/sys.hpp"

namespace rdma {
namespace {

constexpr std::uint32_t kKernel = 1, kDeviceManager = 2;    // multicast groups
constexpr std::string_view kOurs = "SUBSYSTEM=infiniband";  // and infiniband_verbs

int open_uevents() noexcept {
  const long fd = sys::call(SYS_socket, AF_NETLINK, SOCK_DGRAM | SOCK_NONBLOCK | SOCK_CLOEXEC, NETLINK_KOBJECT_UEVENT);
  if (fd < 0) return -1;
  sockaddr_nl groups{};
  groups.nl_family = AF_NETLINK;
  groups.nl_groups = kKernel | kDeviceManager;
  if (sys::call(SYS_bind, fd, sys::arg(&groups), sizeof groups) == 0) return keep_fd(static_cast<int>(fd));
  sys::call(SYS_close, fd);
  return -1;
}

}  // namespace

DeviceWatch::DeviceWatch() noexcept : fd_(open_uevents()) {}
DeviceWatch::~DeviceWatch() { abandon_in_child(); }

bool DeviceWatch::changed() noexcept {
  bool found = false;
  for (char event[4096]; fd_ >= 0;) {
    const long n = sys::call(SYS_recvfrom, fd_, sys::arg(event), sizeof event, MSG_DONTWAIT, 0, 0);
    if (n >= 0)
      found |= std::string_view(event, static_cast<std::size_t>(n)).find(kOurs) != std::string_view::npos;
    else if (n == -ENOBUFS)
      found = true;  // some were lost
    else if (n != -EINTR)
      break;
  }
  return found;
}

void DeviceWatch::abandon_in_child() noexcept {
  if (fd_ < 0) return;
  forget_fd(fd_);
  sys::call(SYS_close, std::exchange(fd_, -1));
}

}  // namespace rdma
