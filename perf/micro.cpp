// What a call costs on descriptors that are none of our business, and what starting a program costs. Run by perf/overhead, bare and
// preloaded in turns; it does not know which.
//   micro calls              one line a call: NAME NANOSECONDS (the best batch: what others on the machine did is not the call's
//   cost) micro startup [LIBRARY]  median microseconds of starting /bin/true, with LIBRARY preloaded if given
#include <fcntl.h>
#include <netinet/in.h>
#include <poll.h>
#include <spawn.h>
#include <sys/socket.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>
#include <vector>

namespace {

using SteadyClock = std::chrono::steady_clock;

double median(std::vector<double> values) {
  std::sort(values.begin(), values.end());
  return values[values.size() / 2];
}

[[noreturn]] void fail(const char* what) {
  std::perror(what);
  std::exit(1);
}

template <class Call>
void measure(const char* name, Call&& call) {
  constexpr int kCalls = 5000;
  std::vector<double> batches;
  for (int batch = 0; batch < 101; ++batch) {
    const auto start = SteadyClock::now();
    for (int i = 0; i < kCalls; ++i) call();
    batches.push_back(std::chrono::duration<double, std::nano>(SteadyClock::now() - start).count() / kCalls);
  }
  std::printf("%s %.2f\n", name, *std::min_element(batches.begin(), batches.end()));
}

/// The cheapest calls of each kind of descriptor: on a dear one ten nanoseconds would not be seen.
void calls() {
  char byte = 'x';
  const int null = open("/dev/null", O_RDWR | O_CLOEXEC);
  int pipe_fds[2];
  int unix_fds[2];
  const int udp = socket(AF_INET, SOCK_DGRAM | SOCK_CLOEXEC, 0);
  sockaddr_in here{};
  here.sin_family = AF_INET;
  here.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
  if (null < 0 || udp < 0 || pipe2(pipe_fds, O_NONBLOCK | O_CLOEXEC) != 0 ||
      socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0, unix_fds) != 0 ||
      bind(udp, reinterpret_cast<sockaddr*>(&here), sizeof here) != 0) {
    fail("descriptors");
  }
  const auto no_bytes = [&](ssize_t n) {
    if (n >= 0) fail("a read that should have found nothing");
  };
  measure("file_write", [&] { (void)!write(null, &byte, 1); });
  measure("file_read", [&] { (void)!read(null, &byte, 1); });
  measure("pipe_read_empty", [&] { no_bytes(read(pipe_fds[0], &byte, 1)); });
  measure("unix_recv_empty", [&] { no_bytes(recv(unix_fds[0], &byte, 1, 0)); });
  measure("udp_recv_empty", [&] { no_bytes(recv(udp, &byte, 1, MSG_DONTWAIT)); });
  measure("unix_write_read", [&] {
    (void)!write(unix_fds[0], &byte, 1);
    (void)!read(unix_fds[1], &byte, 1);
  });
  pollfd waits[2] = {{pipe_fds[0], POLLIN, 0}, {udp, POLLIN, 0}};
  measure("poll_pipe_udp", [&] { (void)poll(waits, 2, 0); });
  measure("fcntl_getfl", [&] { (void)fcntl(udp, F_GETFL); });
  measure("dup_close", [&] { close(dup(null)); });
}

void startup(const char* library) {
  const std::string preload = library != nullptr ? std::string("LD_PRELOAD=") + library : "SDP_NOT_PRELOADED=1";
  char program[] = "/bin/true";
  char* argv[] = {program, nullptr};
  std::string preload_copy = preload;
  char* env[] = {preload_copy.data(), nullptr};
  std::vector<double> times;
  for (int i = 0; i < 300; ++i) {
    const auto start = SteadyClock::now();
    pid_t child = 0;
    int status = 0;
    if (posix_spawn(&child, program, nullptr, nullptr, argv, env) != 0 || waitpid(child, &status, 0) != child || status != 0) {
      fail("starting /bin/true");
    }
    times.push_back(std::chrono::duration<double, std::micro>(SteadyClock::now() - start).count());
  }
  std::printf("startup_us %.1f\n", median(times));
}

}  // namespace

int main(int argc, char** argv) {
  if (argc == 2 && std::strcmp(argv[1], "calls") == 0) {
    calls();
  } else if (argc >= 2 && std::strcmp(argv[1], "startup") == 0) {
    startup(argc > 2 ? argv[2] : nullptr);
  } else {
    std::fprintf(stderr, "usage: micro calls | micro startup [LIBRARY]\n");
    return 2;
  }
  return 0;
}
