// For cases in which a call blocks: signals, time-outs, full sockets.
#pragma once

#include <signal.h>
#include <sys/socket.h>
#include <sys/time.h>

#include <atomic>
#include <cstdint>

#include "trace.hpp"

namespace differential {

inline std::atomic<int> signals{0};
inline void count_signal(int) { signals.fetch_add(1); }

inline void on_signal(int number, int flags) {
  struct sigaction action {};
  action.sa_handler = count_signal;
  action.sa_flags = flags;
  sigaction(number, &action, nullptr);
  signals = 0;
}
/// SIGALRM after a while, and again each second as long as it lives: the first may come before the call that it is to interrupt.
class Alarm {
 public:
  explicit Alarm(int ms) { set({.it_interval = {1, 0}, .it_value = {0, ms * 1000}}); }
  ~Alarm() { set({}); }
  Alarm(const Alarm&) = delete;
  Alarm& operator=(const Alarm&) = delete;

 private:
  static void set(const itimerval& when) { setitimer(ITIMER_REAL, &when, nullptr); }
};
inline void timeout(int fd, int option, int ms) {
  const timeval tv{ms / 1000, static_cast<suseconds_t>(ms % 1000) * 1000};
  told("setsockopt", setsockopt(fd, SOL_SOCKET, option, &tv, sizeof tv));
}
/// Sends until the buffers are full; how much that is may differ.
inline std::uint64_t fill_up(Conn& c) {
  std::uint64_t total = 0;
  for (int quiet = 0; quiet < 3;) {
    const ssize_t n = c.send(65536, MSG_DONTWAIT);
    if (n > 0) {
      total += static_cast<std::uint64_t>(n);
      quiet = 0;
    } else {
      ++quiet;
      settle(5);
    }
  }
  return total;
}

}  // namespace differential
