#include "trace.hpp"

#include <arpa/inet.h>
#include <fcntl.h>
#include <linux/tcp.h>
#include <netinet/in.h>
#include <poll.h>
#include <signal.h>
#include <spawn.h>
#include <sys/socket.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#include <cerrno>
#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>

#include "blocking.hpp"

extern char** environ;

namespace differential {

namespace {

std::int64_t now_ms() {
  timespec now{};
  clock_gettime(CLOCK_MONOTONIC, &now);
  return static_cast<std::int64_t>(now.tv_sec) * 1000 + now.tv_nsec / 1'000'000;
}

constexpr std::size_t kChunk = 64 * 1024;

bool is_set(const char* variable) {
  const char* value = std::getenv(variable);
  return value != nullptr && *value != '\0';
}

}  // namespace

void say(const char* format, ...) {
  va_list args;
  va_start(args, format);
  std::vprintf(format, args);
  va_end(args);
  std::putchar('\n');
  std::fflush(stdout);
}

std::string error_name(int error) {
  const char* name = strerrorname_np(error);
  return name != nullptr ? name : "errno " + std::to_string(error);
}

long told(const char* what, long result) {
  const int saved = errno;
  if (result < 0)
    say("%s = %ld %s", what, result, error_name(saved).c_str());
  else
    say("%s = %ld", what, result);
  errno = saved;
  return result;
}

std::string events(std::uint32_t bits) {
  struct Name {
    std::uint32_t bit;
    const char* name;
  };
  constexpr Name kNames[] = {{POLLIN, "IN"},         {POLLPRI, "PRI"},       {POLLOUT, "OUT"},       {POLLERR, "ERR"},
                             {POLLHUP, "HUP"},       {POLLNVAL, "NVAL"},     {POLLRDNORM, "RDNORM"}, {POLLRDBAND, "RDBAND"},
                             {POLLWRNORM, "WRNORM"}, {POLLWRBAND, "WRBAND"}, {0x2000, "RDHUP"}};
  std::string text;
  for (const Name& n : kNames)
    if (bits & n.bit) {
      if (!text.empty()) text += '|';
      text += n.name;
      bits &= ~n.bit;
    }
  if (bits != 0) text += "|+" + std::to_string(bits);
  return text.empty() ? "none" : text;
}

Stopwatch::Stopwatch() : start_(now_ms()) {}
int Stopwatch::ms() const { return static_cast<int>(now_ms() - start_); }
bool Stopwatch::waited(int least_ms) const {
  constexpr int kHang = 20'000;  // a busy machine is no fault
  const int passed = ms();
  if (passed < least_ms || passed > kHang) std::fprintf(stderr, "took %d ms, not at least %d\n", passed, least_ms);
  return passed >= least_ms && passed <= kHang;
}

void settle(int ms) {
  timespec left{ms / 1000, static_cast<long>(ms % 1000) * 1'000'000};
  while (nanosleep(&left, &left) != 0 && errno == EINTR) {
  }
}

void fail(const char* what) {
  say("FAILED: %s: %s", what, error_name(errno).c_str());
  std::exit(3);
}

std::byte pattern(std::uint64_t position) { return static_cast<std::byte>((position * 0x9e3779b97f4a7c15ULL) >> 56); }
void fill(void* to, std::size_t bytes, std::uint64_t position) {
  auto* out = static_cast<std::byte*>(to);
  for (std::size_t i = 0; i < bytes; ++i) out[i] = pattern(position + i);
}
bool matches(const void* from, std::size_t bytes, std::uint64_t position) {
  const auto* in = static_cast<const std::byte*>(from);
  for (std::size_t i = 0; i < bytes; ++i)
    if (in[i] != pattern(position + i)) return false;
  return true;
}

// --- the peer

Peer::Peer() {
  int ends[2];
  if (socketpair(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0, ends) != 0) fail("socketpair");
  control_ = fcntl(ends[0], F_DUPFD_CLOEXEC, 200);
  close(ends[0]);
  // Its environment is ours, but whether it runs the library is for the runner to say.
  std::vector<std::string> kept;
  for (char** e = environ; *e != nullptr; ++e)
    if (std::strncmp(*e, "LD_PRELOAD=", 11) != 0) kept.emplace_back(*e);
  if (is_set("PEER_PRELOAD")) kept.push_back(std::string("LD_PRELOAD=") + std::getenv("PEER_PRELOAD"));
  std::vector<char*> env;
  env.reserve(kept.size() + 1);
  for (std::string& e : kept) env.push_back(e.data());
  env.push_back(nullptr);
  std::string number = "3";
  char self[] = "/proc/self/exe", option[] = "--peer";
  char* argv[] = {self, option, number.data(), nullptr};
  posix_spawn_file_actions_t actions;
  posix_spawn_file_actions_init(&actions);
  const int other = fcntl(ends[1], F_DUPFD_CLOEXEC, 201);
  close(ends[1]);
  posix_spawn_file_actions_adddup2(&actions, other, 3);
  if (posix_spawn(&pid_, "/proc/self/exe", &actions, nullptr, argv, env.data()) != 0) fail("posix_spawn");
  posix_spawn_file_actions_destroy(&actions);
  close(other);
}

Peer::~Peer() {
  const Command command{Do::quit, 0, 0, 0, 0, 0};
  (void)!::send(control_, &command, sizeof command, MSG_NOSIGNAL);
  close(control_);
  int status = 0;
  for (int i = 0; i < 200; ++i) {
    if (waitpid(pid_, &status, WNOHANG) == pid_) {
      if (status != 0) say("the peer ended with status %#x", status);
      return;
    }
    settle(10);
  }
  say("the peer does not end");
  kill(pid_, SIGKILL);
  waitpid(pid_, &status, 0);
}

void Peer::later(int delay_ms, Do what, int slot, long a, long b, long c) {
  const Command command{what, slot, delay_ms, a, b, c};
  if (::send(control_, &command, sizeof command, MSG_NOSIGNAL) != sizeof command) fail("the peer's control socket");
}
Answer Peer::answer() {
  Answer answer{};
  ssize_t n = 0;
  do n = ::recv(control_, &answer, sizeof answer, 0);
  while (n < 0 && errno == EINTR);
  if (n != sizeof answer) fail("the peer's answer");
  return answer;
}
long Peer::call(Do what, int slot, long a, long b, long c) {
  later(0, what, slot, a, b, c);
  const Answer answer = this->answer();
  if (what == Do::send) settle(2);  // loopback delivers soon, not at once
  errno = answer.error;
  return answer.result;
}

namespace {

struct Slot {
  Conn conn;
};

Answer done(long result) { return {result, result < 0 ? errno : 0}; }

Answer obey(const Command& c, std::vector<Slot>& slots, int& listening) {
  if (c.slot >= static_cast<int>(slots.size())) slots.resize(static_cast<std::size_t>(c.slot) + 1);
  Conn& conn = slots[static_cast<std::size_t>(c.slot)].conn;
  switch (c.what) {
    case Do::listen: {
      int port = 0;
      if (listening >= 0) close(listening);
      listening = listener(&port);
      return done(port);
    }
    case Do::connect:
      conn = Conn{socket_to(static_cast<int>(c.a)), c.slot, 0, 0};
      return done(conn.fd < 0 ? -1 : 0);
    case Do::accept:
      conn = Conn{accept(listening, nullptr, nullptr), c.slot, 0, 0};
      no_delay(conn.fd);
      return done(conn.fd < 0 ? -1 : 0);
    case Do::send:
      return done(static_cast<long>(conn.send_all(static_cast<std::size_t>(c.a))));
    case Do::recv:
      return done(static_cast<long>(conn.recv_all(static_cast<std::size_t>(c.a))));
    case Do::echo: {
      const std::size_t n = conn.recv_all(static_cast<std::size_t>(c.a));
      return done(static_cast<long>(conn.send_all(n)));
    }
    case Do::drain: {  // to the end of the stream; the count, or the error in its place
      long total = 0;
      for (;;) {
        const ssize_t n = conn.recv(kChunk);
        if (n < 0) return done(-1);
        if (n == 0) return done(total);
        total += n;
      }
    }
    case Do::shutdown:
      return done(shutdown(conn.fd, static_cast<int>(c.a)));
    case Do::close:
      return done(close(conn.fd));
    case Do::reset: {
      const linger now{1, 0};
      setsockopt(conn.fd, SOL_SOCKET, SO_LINGER, &now, sizeof now);
      return done(close(conn.fd));
    }
    case Do::oob: {
      const std::byte one = pattern(conn.tx);
      return done(::send(conn.fd, &one, 1, MSG_OOB));
    }
    case Do::option: {
      const int value = static_cast<int>(c.c);
      return done(setsockopt(conn.fd, static_cast<int>(c.a), static_cast<int>(c.b), &value, sizeof value));
    }
    case Do::fill:
      return done(static_cast<long>(fill_up(conn)));
    case Do::push:  // one send, with what it says
      return done(conn.send(static_cast<std::size_t>(c.a), MSG_NOSIGNAL));
    case Do::poll_in:
    case Do::poll_out: {
      pollfd p{conn.fd, static_cast<short>(c.what == Do::poll_in ? POLLIN | POLLRDHUP : POLLOUT), 0};
      return done(poll(&p, 1, static_cast<int>(c.a)) > 0 ? p.revents : 0);
    }
    case Do::quit:
      break;
  }
  return {0, 0};
}

}  // namespace

int serve_as_peer(int control_in) {
  signal(SIGPIPE, SIG_IGN);
  const int control = fcntl(control_in, F_DUPFD_CLOEXEC, 200);
  close(control_in);
  std::vector<Slot> slots;
  int listening = -1;
  Command command{};
  while (::recv(control, &command, sizeof command, 0) == sizeof command && command.what != Do::quit) {
    if (command.delay_ms > 0) settle(command.delay_ms);
    const Answer answer = obey(command, slots, listening);
    if (::send(control, &answer, sizeof answer, MSG_NOSIGNAL) != sizeof answer) break;
  }
  return 0;
}

// --- connections

bool lane_expected() { return is_set("LANE_EXPECTED"); }

std::uint64_t kernel_bytes(int fd) {
  tcp_info info{};
  socklen_t len = sizeof info;
  if (getsockopt(fd, IPPROTO_TCP, TCP_INFO, &info, &len) != 0) return 0;
  return info.tcpi_bytes_sent + info.tcpi_bytes_received;
}

ssize_t Conn::send(std::size_t bytes, int flags) {
  std::vector<std::byte> data(bytes);
  fill(data.data(), bytes, tx);
  const ssize_t n = ::send(fd, data.data(), bytes, flags);
  if (n > 0) tx += static_cast<std::uint64_t>(n);
  return n;
}
ssize_t Conn::recv(std::size_t bytes, int flags) {
  std::vector<std::byte> data(bytes);
  const ssize_t n = ::recv(fd, data.data(), bytes, flags);
  const int saved = errno;
  if (n > 0 && !(flags & MSG_TRUNC) && !matches(data.data(), static_cast<std::size_t>(n), rx))
    say("wrong bytes in %zd at %llu", n, static_cast<unsigned long long>(rx));
  if (n > 0 && !(flags & MSG_PEEK)) rx += static_cast<std::uint64_t>(n);
  errno = saved;
  return n;
}
std::size_t Conn::recv_all(std::size_t bytes) {
  std::size_t total = 0;
  while (total < bytes) {
    const ssize_t n = recv(bytes - total < kChunk ? bytes - total : kChunk);
    if (n < 0 && errno == EINTR) continue;
    if (n <= 0) break;
    total += static_cast<std::size_t>(n);
  }
  return total;
}
std::size_t Conn::send_all(std::size_t bytes) {
  std::size_t total = 0;
  while (total < bytes) {
    const ssize_t n = send(bytes - total < kChunk ? bytes - total : kChunk, MSG_NOSIGNAL);
    if (n < 0 && errno == EINTR) continue;
    if (n <= 0) break;
    total += static_cast<std::size_t>(n);
  }
  return total;
}

namespace {
/// An address of this host, of the family that the run asks for: FAMILY=6 for IPv6, FAMILY=mapped for an IPv4 client of an IPv6
/// listener.
class Here {
 public:
  explicit Here(bool listens, int port = 0) {
    const char* family = std::getenv("FAMILY");
    const bool mapped = family != nullptr && std::strcmp(family, "mapped") == 0;
    if (family != nullptr && (listens || !mapped)) {
      v6_.sin6_family = AF_INET6;
      v6_.sin6_port = htons(static_cast<std::uint16_t>(port));
      v6_.sin6_addr = mapped ? in6addr_any : in6addr_loopback;
    } else {
      v4_.sin_family = AF_INET;
      v4_.sin_port = htons(static_cast<std::uint16_t>(port));
      v4_.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
    }
  }
  sockaddr* get() { return &any_; }
  socklen_t size() const { return any_.sa_family == AF_INET6 ? sizeof v6_ : sizeof v4_; }
  int family() const { return any_.sa_family; }
  int port() const { return ntohs(any_.sa_family == AF_INET6 ? v6_.sin6_port : v4_.sin_port); }

 private:
  union {
    sockaddr any_;
    sockaddr_in v4_;
    sockaddr_in6 v6_{};
  };
};
}  // namespace

int listener(int* port, int type_flags, int backlog, Prepare prepare) {
  Here address(true);
  const int fd = socket(address.family(), SOCK_STREAM | SOCK_CLOEXEC | type_flags, 0);
  const int on = 1;
  setsockopt(fd, SOL_SOCKET, SO_REUSEADDR, &on, sizeof on);
  if (prepare != nullptr) prepare(fd);
  socklen_t len = address.size();
  if (fd < 0 || bind(fd, address.get(), len) != 0 || listen(fd, backlog) != 0 || getsockname(fd, address.get(), &len) != 0)
    fail("listener");
  *port = address.port();
  return fd;
}

// Nagle and delayed acknowledgements hold small messages back on TCP alone: off, on both ends.
void no_delay(int fd) {
  const int on = 1;
  setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &on, sizeof on);
}

int unconnected() { return socket(Here(true).family(), SOCK_STREAM | SOCK_CLOEXEC, 0); }

int socket_to(int port, Prepare prepare) {
  Here address(false, port);
  const int fd = socket(address.family(), SOCK_STREAM | SOCK_CLOEXEC, 0);
  no_delay(fd);
  if (prepare != nullptr) prepare(fd);
  if (fd < 0 || connect(fd, address.get(), address.size()) != 0) fail("connect");
  return fd;
}

Conn cold(Peer& peer, int slot, Prepare prepare) {
  Conn conn;
  conn.slot = slot;
  if (is_set("ROLE_ACCEPT")) {
    int port = 0;
    const int listening = listener(&port, 0, 64, prepare);
    if (peer.call(Do::connect, slot, port) != 0) fail("the peer's connect");
    conn.fd = accept4(listening, nullptr, nullptr, SOCK_CLOEXEC);
    close(listening);
  } else {
    const int port = static_cast<int>(peer.call(Do::listen, slot));
    conn.fd = socket_to(port, prepare);
    if (peer.call(Do::accept, slot) != 0) fail("the peer's accept");
  }
  if (conn.fd < 0) fail("no connection");
  no_delay(conn.fd);
  return conn;
}

namespace {
/// `round` sends and receives on both ends; goes on until TCP's own counters say that it took no part.
template <class Round>
void until_lane(int fd, Round round) {
  const Stopwatch watch;
  for (int i = 0;; ++i) {
    const std::uint64_t before = kernel_bytes(fd);
    round();
    if (!lane_expected() ? i >= 3 : kernel_bytes(fd) == before) return;
    if (watch.ms() > 8000) {
      say("NO LANE came up");
      return;
    }
    if (i > 20) settle(1);
  }
}
}  // namespace

void warm(Peer& peer, Conn& conn) {
  until_lane(conn.fd, [&] {
    peer.later(0, Do::echo, conn.slot, 1);
    if (conn.send(1) != 1 || conn.recv_all(1) != 1 || peer.answer().result != 1) fail("warming up");
  });
}

Conn connection(Peer& peer, int slot, Prepare prepare) {
  Conn conn = cold(peer, slot, prepare);
  warm(peer, conn);
  return conn;
}

Pair self_pair() {
  int port = 0;
  const int listening = listener(&port);
  Pair pair;
  pair.a.fd = socket_to(port);
  pair.b.fd = accept4(listening, nullptr, nullptr, SOCK_CLOEXEC);
  close(listening);
  if (pair.b.fd < 0) fail("accept");
  no_delay(pair.b.fd);
  until_lane(pair.a.fd, [&] {
    if (pair.a.send(1) != 1 || pair.b.recv_all(1) != 1 || pair.b.send(1) != 1 || pair.a.recv_all(1) != 1) fail("warming up");
  });
  return pair;
}

std::vector<Case>& cases() {
  static std::vector<Case> all;
  return all;
}

}  // namespace differential

int main(int argc, char** argv) {
  using namespace differential;
  if (argc == 3 && std::strcmp(argv[1], "--peer") == 0) return serve_as_peer(std::atoi(argv[2]));
  if (argc == 2 && std::strcmp(argv[1], "--list") == 0) {
    for (const Case& c : cases()) std::puts(c.name);
    return 0;
  }
  for (const Case& c : cases())
    if (argc == 2 && std::strcmp(argv[1], c.name) == 0) {
      c.body();
      return 0;
    }
  std::fprintf(stderr, "usage: %s --list | CASE\n", argv[0]);
  return 2;
}
