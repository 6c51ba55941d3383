// TCP sockets become SMC's, as smc_run (smc-tools, not in Debian 12) makes them: preload it. The kernel falls back to TCP by
// itself.
#include <sys/socket.h>
#include <sys/syscall.h>
#include <unistd.h>

#ifndef AF_SMC
#define AF_SMC 43
#endif

extern "C" [[gnu::visibility("default")]] int socket(int domain, int type, int protocol) noexcept {
  constexpr int kFlags = SOCK_CLOEXEC | SOCK_NONBLOCK, kSmc = 0, kSmc6 = 1;
  const bool tcp = (domain == AF_INET || domain == AF_INET6) && (type & ~kFlags) == SOCK_STREAM;
  return static_cast<int>(tcp ? syscall(SYS_socket, AF_SMC, type, domain == AF_INET ? kSmc : kSmc6)
                              : syscall(SYS_socket, domain, type, protocol));
}
