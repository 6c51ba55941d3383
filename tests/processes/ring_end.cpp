// One end of a connection whose bytes go through libc for a while and then through an io_uring.
//
//     ring_end server|client PORT DOOR WHEN
//
// DOOR: none (libc to the end), liburing, table (the same; the socket is in the ring's own table), number (libc's syscall()),
// instruction; past: no ring, but sends by an instruction. WHEN: start (before there is a connection), connected, laned (after libc
// has carried enough for a lane), idle (at the start, and no socket is handed to it), files (the same, and it serves a file to the
// end, beside a lane for whose bytes TCP stands still), turned (as files, and then the socket is handed to it), unread (as laned,
// with bytes that libc has sent and nobody has read yet). A server says its port on standard output.
#include <sys/ioctl.h>
#include <sys/mman.h>

#include <memory>
#include <string_view>

#include "end.hpp"
#include "ring.hpp"

namespace {

constexpr int kNoSuchDoor = 77;  // also where the kernel lets nobody make a ring

std::unique_ptr<Ring> open_ring(std::string_view door) {
#ifdef HAVE_LIBURING
  if (door == "liburing" || door == "table") return std::make_unique<LibRing>(door == "table");
#endif
  if (door == "number") return std::make_unique<BareRing<doors::by_libc>>();
  if (door == "instruction") return std::make_unique<BareRing<doors::by_instruction>>();
  if (door == "past") return std::make_unique<PastLibc>();
  if (door != "none") std::exit(kNoSuchDoor);
  return nullptr;
}

/// The client leaves the lane first, with a thousand bytes on it, and a thousand behind it by TCP. Its peer's ring may never take
/// the later ones for the earlier: rather no connection.
int meet_unread_bytes(const End& libc, bool is_server, std::string_view door) {
  const std::vector<char> earlier(1000, 'e'), later(1000, 'l');
  if (!is_server) {
    libc.put(earlier.data(), earlier.size());
    const auto ring = open_ring(door);
    End{libc.fd, ring.get()}.put(later.data(), later.size());
    char one = 0;
    return ring->recv(libc.fd, &one, 1) < 0 ? 0 : 1;
  }
  for (int waiting = 0; waiting < 2000;)
    if (ioctl(libc.fd, FIONREAD, &waiting) != 0) fail("FIONREAD");
  const auto ring = open_ring(door);
  std::vector<char> got(1000);
  const int n = ring->recv(libc.fd, got.data(), 1000);
  return n < 0 || (n == 1000 && got == earlier) ? 0 : 1;
}

/// What it writes into a file it reads again.
void serve_a_file(Ring* ring) {
  if (ring == nullptr) return;
  const int file = memfd_create("file", 0);
  const std::vector<char> wrote(5000, 'f');
  std::vector<char> read(wrote.size());
  const auto count = static_cast<unsigned>(wrote.size());
  if (ring->write(file, wrote.data(), count) != static_cast<int>(count) ||
      ring->read(file, read.data(), count) != static_cast<int>(count) || read != wrote)
    fail("the file");
  close(file);
}

}  // namespace

int main(int argc, char** argv) {
  if (argc != 5) return 2;
  const bool is_server = std::string_view(argv[1]) == "server";
  const std::string_view door = argv[3], when = argv[4];
  io_uring_params none{};
  if (const long r = doors::by_instruction(SYS_io_uring_setup, 0, reinterpret_cast<long>(&none), 0, 0, 0, 0);
      r != -EINVAL && door != "none")
    return kNoSuchDoor;
  std::unique_ptr<Ring> ring;
  const bool is_preloaded = std::getenv("LD_PRELOAD") != nullptr;
  const bool has_files = when == "files" || when == "turned";
  if (when == "start" || when == "idle" || has_files) ring = open_ring(door);
  if (has_files) serve_a_file(ring.get());
  End libc{connected(is_server, static_cast<std::uint16_t>(std::atoi(argv[2])))};
  if (when == "connected") ring = open_ring(door);
  const bool may_have_lane = is_preloaded && (when == "laned" || when == "unread" || has_files);
  warm_up(libc, is_server, std::chrono::milliseconds(may_have_lane ? 10'000 : 1000));
  std::uint64_t position = 0;
  exchange(libc, is_server, position);
  if (when == "unread") return meet_unread_bytes(libc, is_server, door);
  if (when == "laned") ring = open_ring(door);
  const End other{libc.fd, when == "idle" || when == "files" ? nullptr : ring.get()};
  const std::uint64_t before = by_tcp(libc.fd);
  if (has_files) serve_a_file(ring.get());
  exchange(other, is_server, position);
  exchange(libc, is_server, position);
  exchange(other, is_server, position);
  if (when == "files") {
    serve_a_file(ring.get());
    if (is_preloaded && door != "number" && by_tcp(libc.fd) != before) fail("TCP carries bytes of a lane");
  }
  if (when == "laned" || has_files) {  // long enough for a look of the library's at what the process has
    const auto until = std::chrono::steady_clock::now() + std::chrono::seconds(1);
    play_ball(libc, is_server, [&] { return std::chrono::steady_clock::now() > until; });
  }
  if (!is_server) shutdown(libc.fd, SHUT_WR);
  char one = 0;
  if (other.get(&one, 1)) fail("more than was sent");
  return 0;
}
