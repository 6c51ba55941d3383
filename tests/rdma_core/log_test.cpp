#include "rdma_core/base/log.hpp"

#include <errno.h>
#include <fcntl.h>
#include <sys/wait.h>
#include <unistd.h>

#include <boost/test/unit_test.hpp>
#include <string>

namespace rdma::log {
namespace {

/// Lines go into a pipe while it lives.
class Capture {
 public:
  Capture() {
    BOOST_REQUIRE(pipe2(fds_, O_CLOEXEC | O_NONBLOCK) == 0);
    set_fd(fds_[1]);
  }
  ~Capture() {
    set_fd(2);
    threshold = Level::warn;
    close(fds_[0]);
    close(fds_[1]);
  }
  /// What one write(2) put there at most, if lines are not mixed; "" if nothing.
  std::string read_all() {
    char buffer[65536];
    const ssize_t n = read(fds_[0], buffer, sizeof buffer);
    return n > 0 ? std::string(buffer, static_cast<std::size_t>(n)) : std::string();
  }
  int write_end() const { return fds_[1]; }

 private:
  int fds_[2];
};

std::string prefix(const char* level) { return "sdpreload[" + std::to_string(getpid()) + "]: " + level + ": "; }

}  // namespace

BOOST_AUTO_TEST_CASE(levels_below_the_threshold_are_not_even_evaluated) {
  Capture capture;
  int evaluated = 0;
  RDMA_LOG(info, "%d", ++evaluated);
  RDMA_LOG(debug, "%d", ++evaluated);
  BOOST_TEST(evaluated == 0);
  BOOST_TEST(capture.read_all() == "");
  RDMA_LOG(warn, "%d", ++evaluated);
  BOOST_TEST(capture.read_all() == prefix("warning") + "1\n");
  threshold = Level::off;
  RDMA_LOG(error, "%d", ++evaluated);
  BOOST_TEST(capture.read_all() == "");
  threshold = Level::debug;
  RDMA_LOG(debug, "%s", "all");
  BOOST_TEST(capture.read_all() == prefix("debug") + "all\n");
}

BOOST_AUTO_TEST_CASE(a_long_line_is_cut_at_1000_bytes) {
  Capture capture;
  const std::string text(5000, 'x');
  write(Level::error, "%s", text.c_str());
  const std::string line = capture.read_all();
  BOOST_TEST(line.size() == 1000u);
  BOOST_TEST(line == prefix("error") + std::string(999 - prefix("error").size(), 'x') + "\n");
  const std::string fits(999 - prefix("error").size(), 'y');
  write(Level::error, "%s", fits.c_str());
  BOOST_TEST(capture.read_all() == prefix("error") + fits + "\n");
}

BOOST_AUTO_TEST_CASE(errno_is_left_alone_also_when_the_write_fails) {
  Capture capture;
  errno = EXDEV;
  write(Level::error, "%m");
  BOOST_TEST(errno == EXDEV);
  BOOST_TEST(capture.read_all() == prefix("error") + "Invalid cross-device link\n");
  set_fd(-1);
  errno = EXDEV;
  write(Level::error, "nowhere");
  BOOST_TEST(errno == EXDEV);
}

BOOST_AUTO_TEST_CASE(a_full_pipe_loses_the_line_and_holds_nobody_up) {
  Capture capture;
  const std::string page(4096, 'z');
  while (::write(capture.write_end(), page.data(), page.size()) > 0) {
  }
  write(Level::error, "lost");
  BOOST_TEST(capture.read_all().find("lost") == std::string::npos);
}

BOOST_AUTO_TEST_CASE(a_forks_child_logs_under_its_own_number) {
  Capture capture;
  const pid_t pid = fork();
  if (pid == 0) {
    write(Level::error, "child");
    _exit(0);
  }
  BOOST_REQUIRE(waitpid(pid, nullptr, 0) == pid);
  BOOST_TEST(capture.read_all() == "sdpreload[" + std::to_string(pid) + "]: error: child\n");
}

}  // namespace rdma::log
