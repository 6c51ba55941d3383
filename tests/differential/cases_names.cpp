// The same calls by libc's other names: those of old libraries, of large files, of fortified programs, and libc's own threads.
#include <aio.h>
#include <fcntl.h>
#include <poll.h>
#include <stdarg.h>
#include <sys/select.h>
#include <sys/socket.h>
#include <sys/uio.h>
#include <unistd.h>

#include <cerrno>
#include <cstdio>
#include <string>

#include "blocking.hpp"
#include "trace.hpp"

using namespace differential;

extern "C" {
ssize_t __read(int, void*, size_t);
ssize_t __write(int, const void*, size_t);
ssize_t __send(int, const void*, size_t, int);
int __poll(pollfd*, nfds_t, int);
int __select(int, fd_set*, fd_set*, fd_set*, timeval*);
int __close(int);
int __fcntl(int, int, ...);
int __dprintf_chk(int, int, const char*, ...);
int __vdprintf_chk(int, int, const char*, va_list);
FILE* _IO_fdopen(int, const char*);
int _IO_fclose(FILE*);
}

namespace {

/// The next bytes of the connection's sequence, to be sent in a way of the case's own.
std::string next_bytes(Conn& c, std::size_t bytes) {
  std::string text(bytes, 0);
  fill(text.data(), bytes, c.tx);
  c.tx += bytes;
  return text;
}
void say_got(const char* name, Conn& c, const char* bytes, ssize_t n) {
  told(name, n);
  say("right: %d", n <= 0 || matches(bytes, static_cast<std::size_t>(n), c.rx));
  if (n > 0) c.rx += static_cast<std::uint64_t>(n);
}
void say_taken(Peer& peer, long bytes) { told("the peer got", peer.call(Do::recv, 0, bytes)); }

long await(aiocb& request) {
  const aiocb* const list[] = {&request};
  while (aio_error(&request) == EINPROGRESS) aio_suspend(list, 1, nullptr);
  const int error = aio_error(&request);
  const long n = aio_return(&request);
  errno = error;
  return n;
}
aiocb request_for(int fd, int opcode, void* buffer, std::size_t bytes) {
  aiocb request{};
  request.aio_fildes = fd;
  request.aio_lio_opcode = opcode;
  request.aio_buf = buffer;
  request.aio_nbytes = bytes;
  return request;
}

}  // namespace

CASE(names_of_libcs_own) {
  Peer peer;
  Conn c = connection(peer);
  const std::string first = next_bytes(c, 100), second = next_bytes(c, 50);
  told("__write", __write(c.fd, first.data(), first.size()));
  told("__send", __send(c.fd, second.data(), second.size(), 0));
  say_taken(peer, 150);
  peer.later(50, Do::send, 0, 60);
  pollfd p{c.fd, POLLIN, 0};
  told("__poll", __poll(&p, 1, 5000));
  fd_set set;
  FD_ZERO(&set);
  FD_SET(c.fd, &set);
  timeval limit{5, 0};
  told("__select", __select(c.fd + 1, &set, nullptr, nullptr, &limit));
  char got[100];
  say_got("__read", c, got, __read(c.fd, got, sizeof got));
  peer.answer();
  const int copy = __fcntl(c.fd, F_DUPFD, 100);
  say("copy: %d", copy >= 100);
  told("__close", __close(copy));
  told("send", c.send(10));
  say_taken(peer, 10);
}
CASE(names_of_large_files) {
  Peer peer;
  Conn c = connection(peer);
  std::string text = next_bytes(c, 100);
  const iovec out{text.data(), text.size()};
  told("pwritev64v2", pwritev64v2(c.fd, &out, 1, -1, 0));
  say_taken(peer, 100);
  peer.call(Do::send, 0, 70);
  char got[100];
  const iovec in{got, sizeof got};
  say_got("preadv64v2", c, got, preadv64v2(c.fd, &in, 1, -1, 0));
  told("at a place", pwritev64v2(c.fd, &out, 1, 10, 0));
}
CASE(names_of_fortified_programs) {
  Peer peer;
  Conn c = connection(peer);
  warm(peer, c);
  const std::string text = next_bytes(c, 40);
  told("__dprintf_chk", __dprintf_chk(c.fd, 1, "%.*s", 40, text.c_str()));
  say_taken(peer, 40);
}
CASE(stdio_by_other_names) {
  Peer peer;
  Conn c = connection(peer);
  FILE* const file = _IO_fdopen(c.fd, "r+");
  const std::string text = next_bytes(c, 5000);
  told("fwrite", static_cast<long>(fwrite(text.data(), 1, text.size(), file)));
  told("fflush", fflush(file));
  say_taken(peer, 5000);
  told("_IO_fclose", _IO_fclose(file));
  told("the peer got", peer.call(Do::recv, 0, 1));
}
CASE(asynchronous_io) {
  Peer peer;
  Conn c = connection(peer);
  std::string text = next_bytes(c, 1000);
  aiocb write = request_for(c.fd, 0, text.data(), text.size());
  told("aio_write", aio_write(&write));
  told("wrote", await(write));
  say_taken(peer, 1000);
  char got[500];
  peer.call(Do::send, 0, 300);
  aiocb read = request_for(c.fd, 0, got, sizeof got);
  told("aio_read", aio_read(&read));
  say_got("read", c, got, await(read));
  std::string more = next_bytes(c, 200);
  peer.call(Do::send, 0, 400);
  aiocb both[] = {request_for(c.fd, LIO_WRITE, more.data(), more.size()), request_for(c.fd, LIO_READ, got, sizeof got)};
  aiocb* const list[] = {&both[0], nullptr, &both[1]};
  told("lio_listio", lio_listio(LIO_WAIT, list, 3, nullptr));
  told("wrote", await(both[0]));
  say_got("read", c, got, await(both[1]));
  say_taken(peer, 200);
  aiocb none = request_for(-1, 0, got, sizeof got);
  told("aio_read of none", aio_read(&none));
  told("read", await(none));
}

namespace {
/// The peer leaves the lane with more unread on it than TCP takes at once: it is sent again, and libc's own threads and streams may
/// not send anything before. Bytes that the peer is about to read, with the case's.
struct SentAgain {
  Peer peer;
  Conn c;
  long bytes = 0;
  explicit SentAgain(long more)
      : c(cold(peer, 0, [](int fd) {
          const int little = 4096;
          setsockopt(fd, SOL_SOCKET, SO_SNDBUF, &little, sizeof little);
          setsockopt(fd, SOL_SOCKET, SO_RCVBUF, &little, sizeof little);
        })) {
    peer.call(Do::option, 0, SOL_SOCKET, SO_RCVBUF, 4096);
    warm(peer, c);
    bytes = static_cast<long>(fill_up(c)) + more;
    peer.call(Do::option, 0, SOL_SOCKET, SO_TIMESTAMP, 1);
    settle(300);  // the peer's word is heard
    peer.later(200, Do::recv, 0, bytes);
  }
  void tell() { say("the peer got all: %d", peer.answer().result == bytes); }
};
}  // namespace

CASE(stdio_waits_for_its_turn) {
  for (const bool blocks : {true, false}) {
    SentAgain e(5000);
    if (!blocks) fcntl(e.c.fd, F_SETFL, O_NONBLOCK);
    FILE* const file = fdopen(e.c.fd, "r+");
    if (file == nullptr) fail("fdopen");
    fcntl(e.c.fd, F_SETFL, 0);
    const std::string text = next_bytes(e.c, 5000);
    told("fwrite", static_cast<long>(fwrite(text.data(), 1, text.size(), file)));
    told("fflush", fflush(file));
    e.tell();
  }
}
CASE(asynchronous_writes_wait_for_their_turn) {
  for (const bool by_list : {false, true}) {
    SentAgain e(1000);
    std::string text = next_bytes(e.c, 1000);
    aiocb write = request_for(e.c.fd, LIO_WRITE, text.data(), text.size());
    aiocb* const list[] = {&write};
    told("asked for", by_list ? lio_listio(LIO_NOWAIT, list, 1, nullptr) : aio_write(&write));
    told("wrote", await(write));
    e.tell();
  }
}
