// A differential case prints a trace of what the socket calls said: return values, errno, events, bytes. The runner compares the
// trace over kernel TCP with the traces over lanes. A case is one process with a peer process that does what it is told, so that
// either end may run with or without the library.
#pragma once

#include <sys/socket.h>
#include <sys/types.h>

#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

namespace differential {

// --- the trace
[[gnu::format(printf, 1, 2)]] void say(const char* format, ...);
/// Prints `what = result`, with the name of errno if it is negative; returns it and leaves errno as it was.
long told(const char* what, long result);
std::string events(std::uint32_t poll_or_epoll_bits);
std::string error_name(int error);
/// Time that passed, in tenths of a second; for time-outs, whose order of size must agree.
class Stopwatch {
 public:
  Stopwatch();
  bool waited(int least_ms) const;  ///< that long at least, and not for ever
  int ms() const;

 private:
  std::int64_t start_;
};
/// Lets what the peer did reach us: a FIN needs no byte of ours, but a moment.
void settle(int ms = 30);
[[noreturn]] void fail(const char* what);

// --- bytes: each direction of a connection carries one known sequence
std::byte pattern(std::uint64_t position);
void fill(void* to, std::size_t bytes, std::uint64_t position);
bool matches(const void* from, std::size_t bytes, std::uint64_t position);

// --- the peer
enum class Do : int {
  listen,
  connect,
  accept,
  send,
  recv,
  echo,
  shutdown,
  close,
  reset,
  oob,
  option,
  drain,
  fill,
  push,
  poll_in,
  poll_out,
  quit
};
struct Command {
  Do what;
  int slot;
  int delay_ms;
  long a, b, c;
};
struct Answer {
  long result;
  int error;
};

class Peer {
 public:
  Peer();
  ~Peer();
  long call(Do what, int slot = 0, long a = 0, long b = 0, long c = 0);
  /// Done while we go on; take answer() later, once for each.
  void later(int delay_ms, Do what, int slot = 0, long a = 0, long b = 0, long c = 0);
  Answer answer();
  pid_t pid() const { return pid_; }
  int control() const { return control_; }

 private:
  int control_ = -1;
  pid_t pid_ = -1;
};
int serve_as_peer(int control);

// --- connections
bool lane_expected();
std::uint64_t kernel_bytes(int fd);  ///< that TCP sent and received for this connection: they stand still when a lane carries it

struct Conn {
  int fd = -1;
  int slot = 0;
  std::uint64_t tx = 0, rx = 0;

  ssize_t send(std::size_t bytes, int flags = 0);  ///< the next bytes of the pattern; counts what was taken
  ssize_t recv(std::size_t bytes, int flags = 0);  ///< checks them; says "wrong bytes" in the trace if they are not the next
  std::size_t recv_all(std::size_t bytes);         ///< until so many have come, or the end, or an error
  std::size_t send_all(std::size_t bytes);
};

/// What is done to the socket that connects before it does, or to the one that listens.
using Prepare = void (*)(int fd);
int listener(int* port, int type_flags = 0, int backlog = 64, Prepare prepare = nullptr);
void no_delay(int fd);
int socket_to(int port, Prepare prepare = nullptr);  ///< connected, blocking
int unconnected();                                   ///< a TCP socket of the family that the run asks for
/// A connection to the peer, by the role that the run asks for, not warmed up.
Conn cold(Peer& peer, int slot = 0, Prepare prepare = nullptr);
/// Messages go to and fro until a lane carries both directions (if this run shall have one).
void warm(Peer& peer, Conn& conn);
Conn connection(Peer& peer, int slot = 0, Prepare prepare = nullptr);  ///< cold() and warm()
/// Both ends in this process.
struct Pair {
  Conn a, b;  ///< a connected, b accepted
};
Pair self_pair();

// --- cases
using Body = void (*)();
struct Case {
  const char* name;
  Body body;
};
std::vector<Case>& cases();
struct Registration {
  Registration(const char* name, Body body) { cases().push_back({name, body}); }
};
#define CASE(name)                                                               \
  static void case_##name();                                                     \
  static const differential::Registration registered_##name{#name, case_##name}; \
  static void case_##name()

}  // namespace differential
