// A process whose threads make its first connections all at once, as a pool of clients does.
#include <arpa/inet.h>
#include <netinet/in.h>
#include <sys/socket.h>
#include <sys/wait.h>
#include <unistd.h>

#include <barrier>
#include <boost/test/unit_test.hpp>
#include <cstdlib>
#include <fstream>
#include <nlohmann/json.hpp>
#include <string>
#include <thread>
#include <vector>

namespace {

constexpr int kThreads = 4;
constexpr int kProcesses = 150;
const std::string kLibrary = BUILD_DIR "/lib/libsdpreload.so";

/// A socket that listens on a loopback port of the kernel's choice.
int listen_on(sockaddr_in& address) {
  const int fd = socket(AF_INET, SOCK_STREAM, 0);
  address = {};
  address.sin_family = AF_INET;
  address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
  socklen_t size = sizeof address;
  BOOST_REQUIRE(bind(fd, reinterpret_cast<const sockaddr*>(&address), size) == 0);
  BOOST_REQUIRE(listen(fd, kThreads) == 0);
  BOOST_REQUIRE(getsockname(fd, reinterpret_cast<sockaddr*>(&address), &size) == 0);
  return fd;
}

}  // namespace

/// What the preloaded process does: this test's own program, run again.
BOOST_AUTO_TEST_CASE(connect_at_once, *boost::unit_test::disabled()) {
  const char* const port = std::getenv("PORT");
  BOOST_REQUIRE(port != nullptr);
  sockaddr_in address{};
  address.sin_family = AF_INET;
  address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
  address.sin_port = htons(static_cast<std::uint16_t>(std::atoi(port)));
  std::barrier ready(kThreads);
  std::vector<std::jthread> threads;
  for (int i = 0; i < kThreads; ++i)
    threads.emplace_back([&] {
      const int fd = socket(AF_INET, SOCK_STREAM, 0);
      ready.arrive_and_wait();
      if (connect(fd, reinterpret_cast<const sockaddr*>(&address), sizeof address) != 0) std::abort();
    });
}

BOOST_AUTO_TEST_CASE(threads_that_connect_at_once_are_all_seen) {
  char folder[] = "/tmp/sdp-first-XXXXXX";
  BOOST_REQUIRE(mkdtemp(folder) != nullptr);
  const std::string report = std::string(folder) + "/report.json";
  sockaddr_in address;
  const int listener = listen_on(address);
  const std::string port = "PORT=" + std::to_string(ntohs(address.sin_port));
  const std::string preload = "LD_PRELOAD=" + kLibrary, stats = "SDP_STATS=" + report;
  for (int i = 0; i < kProcesses; ++i) {
    const pid_t pid = fork();
    if (pid == 0) {
      const char* argv[] = {"first_connections", "--run_test=connect_at_once", "--log_level=nothing", "--report_level=no", nullptr};
      const char* environment[] = {port.c_str(), preload.c_str(), stats.c_str(), nullptr};
      execve("/proc/self/exe", const_cast<char**>(argv), const_cast<char**>(environment));
      _exit(99);
    }
    for (int n = 0; n < kThreads; ++n) close(accept(listener, nullptr, nullptr));
    int status = 0;
    BOOST_REQUIRE(waitpid(pid, &status, 0) == pid);
    BOOST_REQUIRE(status == 0);
    std::ifstream in(report);
    BOOST_TEST(nlohmann::json::parse(in)["sockets"] == kThreads);
  }
  close(listener);
  unlink(report.c_str());
  rmdir(folder);
}
