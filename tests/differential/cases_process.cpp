// Processes: vfork, fork, exec and spawn around connections; sockets handed to another process; stdio on a socket.
#include <fcntl.h>
#include <netinet/in.h>
#include <poll.h>
#include <spawn.h>
#include <sys/epoll.h>
#include <sys/select.h>
#include <sys/socket.h>
#include <sys/uio.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cerrno>
#include <cstdio>
#include <cstring>
#include <string>

#include "trace.hpp"

using namespace differential;

extern char** environ;

namespace {

void ended(const char* what, pid_t pid) {
  int status = 0;
  if (waitpid(pid, &status, 0) != pid) fail("waitpid");
  say("%s: %#x", what, status);
}
/// The lane, where there is one, carries the bytes as before.
void still_on_its_lane(Peer& peer, Conn& c) {
  const std::uint64_t before = kernel_bytes(c.fd);
  told("send", c.send(100));
  told("peer", peer.call(Do::echo, 0, 100));
  told("recv", static_cast<long>(c.recv_all(100)));
  say("as before: %d", !lane_expected() || kernel_bytes(c.fd) == before);
}
void still_good(Peer& peer, Conn& c) {
  told("send", c.send(100));
  told("peer", peer.call(Do::echo, 0, 100));
  told("recv", static_cast<long>(c.recv_all(100)));
}

}  // namespace

// What run times do to start a program: the child has descriptors of its own and the parent's memory.
CASE(vfork_child_closes_and_duplicates) {
  Peer peer;
  Conn c = connection(peer);
  const int ep = epoll_create1(EPOLL_CLOEXEC);
  epoll_event event{EPOLLIN, {.u64 = 5}};
  epoll_ctl(ep, EPOLL_CTL_ADD, c.fd, &event);
  const int null = open("/dev/null", O_RDWR | O_CLOEXEC);
  // NOLINTBEGIN(clang-analyzer-security.insecureAPI.vfork,clang-analyzer-unix.Vfork): what run times do, warned against or not
  const pid_t pid = vfork();
  if (pid == 0) {
    close(c.fd);
    close(ep);
    dup2(null, c.fd);
    fcntl(c.fd, F_SETFL, O_NONBLOCK);
    execl("/bin/true", "true", static_cast<char*>(nullptr));
    _exit(127);
  }
  // NOLINTEND(clang-analyzer-security.insecureAPI.vfork,clang-analyzer-unix.Vfork)
  ended("true", pid);
  still_on_its_lane(peer, c);
  peer.call(Do::send, 0, 3);
  told("epoll_wait", epoll_wait(ep, &event, 1, 1000));
  told("recv", c.recv(10));
}
CASE(spawned_program_without_the_socket) {
  Peer peer;
  Conn c = connection(peer);
  fcntl(c.fd, F_SETFD, FD_CLOEXEC);
  char name[] = "true";
  char* argv[] = {name, nullptr};
  pid_t pid = 0;
  told("posix_spawn", posix_spawn(&pid, "/bin/true", nullptr, nullptr, argv, environ));
  ended("true", pid);
  still_on_its_lane(peer, c);
}
// The program that gets it writes through the kernel; both go on by TCP then.
CASE(any_spawned_program_with_the_socket) {
  Peer peer;
  Conn c = connection(peer);
  const std::byte text[] = {pattern(c.tx), pattern(c.tx + 1)};
  char command[64];
  std::snprintf(command, sizeof command, "printf '\\%03o\\%03o'", static_cast<unsigned>(text[0]), static_cast<unsigned>(text[1]));
  char shell[] = "sh", flag[] = "-c";
  char* argv[] = {shell, flag, command, nullptr};
  posix_spawn_file_actions_t actions;
  posix_spawn_file_actions_init(&actions);
  posix_spawn_file_actions_adddup2(&actions, c.fd, 1);
  pid_t pid = 0;
  told("posix_spawn", posix_spawn(&pid, "/bin/sh", &actions, nullptr, argv, environ));
  posix_spawn_file_actions_destroy(&actions);
  ended("sh", pid);
  told("peer", peer.call(Do::recv, 0, 2));
  c.tx += 2;
  still_good(peer, c);
}
CASE(fork_both_use_it_in_turn) {
  Peer peer;
  Conn c = connection(peer);
  told("send", c.send(10));
  const pid_t pid = fork();
  if (pid == 0) {
    const bool good = c.send(20) == 20;
    _exit(good ? 0 : 1);
  }
  ended("child", pid);
  c.tx += 20;
  told("peer", peer.call(Do::recv, 0, 30));
  still_good(peer, c);
}
CASE(fork_child_reads_what_has_come) {
  Peer peer;
  Conn c = connection(peer);
  peer.call(Do::send, 0, 50);
  const pid_t pid = fork();
  if (pid == 0) _exit(c.recv_all(30) == 30 ? 0 : 1);
  ended("child", pid);
  c.rx += 30;
  told("recv", static_cast<long>(c.recv_all(20)));
  still_good(peer, c);
}
CASE(fork_child_only_closes) {
  Peer peer;
  Conn c = connection(peer);
  const pid_t pid = fork();
  if (pid == 0) {
    close(c.fd);
    _exit(0);
  }
  ended("child", pid);
  still_on_its_lane(peer, c);
}
CASE(fork_parent_closes_child_goes_on) {
  Peer peer;
  Conn c = connection(peer);
  int ready[2];
  told("pipe", pipe(ready));
  const pid_t pid = fork();
  if (pid == 0) {
    char byte = 0;
    if (read(ready[0], &byte, 1) != 1) _exit(2);
    const bool good = c.send(40) == 40 && c.recv_all(5) == 5;
    _exit(good ? 0 : 1);
  }
  told("close", close(c.fd));
  told("write", write(ready[1], "x", 1));
  told("peer", peer.call(Do::recv, 0, 40));
  told("peer sends", peer.call(Do::send, 0, 5));
  ended("child", pid);
  told("peer sees the end", peer.call(Do::drain));
}
CASE(any_socket_passed_to_another_process) {
  Peer peer;
  Conn c = connection(peer);
  int pair[2];
  told("socketpair", socketpair(AF_UNIX, SOCK_STREAM, 0, pair));
  const pid_t pid = fork();
  if (pid == 0) {
    close(c.fd);
    char byte = 0, control[CMSG_SPACE(sizeof(int))];
    iovec iov{&byte, 1};
    msghdr msg{};
    msg.msg_iov = &iov;
    msg.msg_iovlen = 1;
    msg.msg_control = control;
    msg.msg_controllen = sizeof control;
    if (recvmsg(pair[1], &msg, 0) != 1) _exit(2);
    const cmsghdr* head = CMSG_FIRSTHDR(&msg);
    if (head == nullptr) _exit(3);
    std::memcpy(&c.fd, CMSG_DATA(head), sizeof(int));
    const bool good = c.send(40) == 40 && c.recv_all(5) == 5;
    _exit(good ? 0 : 1);
  }
  char byte = 'x';
  alignas(cmsghdr) char control[CMSG_SPACE(sizeof(int))] = {};
  iovec iov{&byte, 1};
  msghdr msg{};
  msg.msg_iov = &iov;
  msg.msg_iovlen = 1;
  msg.msg_control = control;
  msg.msg_controllen = sizeof control;
  cmsghdr* head = CMSG_FIRSTHDR(&msg);
  head->cmsg_level = SOL_SOCKET;
  head->cmsg_type = SCM_RIGHTS;
  head->cmsg_len = CMSG_LEN(sizeof(int));
  std::memcpy(CMSG_DATA(head), &c.fd, sizeof(int));
  told("sendmsg", sendmsg(pair[0], &msg, 0));
  told("peer", peer.call(Do::recv, 0, 40));
  told("peer sends", peer.call(Do::send, 0, 5));
  ended("child", pid);
}
CASE(any_stdio_on_a_socket) {
  Peer peer;
  Conn c = connection(peer);
  told("send", c.send(10));
  told("peer", peer.call(Do::echo, 0, 10));
  FILE* file = fdopen(c.fd, "r+");
  say("fdopen: %d", file != nullptr);
  std::string bytes(10, '\0');
  told("fread", static_cast<long>(fread(bytes.data(), 1, 10, file)));
  say("right bytes: %d", matches(bytes.data(), 10, c.rx));
  fill(bytes.data(), 10, c.tx);
  told("fwrite", static_cast<long>(fwrite(bytes.data(), 1, 10, file)));
  told("fclose", fclose(file));
  told("peer", peer.call(Do::recv, 0, 10));
  told("peer sees the end", peer.call(Do::drain));
  // The number is free again, and means what the kernel gives it to next. A descriptor of the library's in the making may have it,
  // or a lower one, for a moment.
  int next = -1;
  for (int i = 0; i < 1000 && next != c.fd; ++i) {
    if (next > c.fd) {
      close(next);
      usleep(1000);
    }
    next = open("/dev/null", O_RDWR);
  }
  say("the same number: %d", next == c.fd);
  char byte = 0;
  told("read", read(next, &byte, 1));
}
CASE(bad_timeouts) {
  Peer peer;
  Conn c = connection(peer);
  pollfd p{c.fd, POLLIN, 0};
  const timespec negative{-1, 0}, large{0, 1'000'000'000};
  told("ppoll negative", ppoll(&p, 1, &negative, nullptr));
  told("ppoll nanoseconds", ppoll(&p, 1, &large, nullptr));
  fd_set in;
  FD_ZERO(&in);
  FD_SET(c.fd, &in);
  timeval before{-1, 0};
  told("select", select(c.fd + 1, &in, nullptr, nullptr, &before));
  told("pselect", pselect(c.fd + 1, &in, nullptr, nullptr, &negative, nullptr));
  const int ep = epoll_create1(0);
  epoll_event event{EPOLLIN, {}};
  epoll_ctl(ep, EPOLL_CTL_ADD, c.fd, &event);
  told("epoll_pwait2", epoll_pwait2(ep, &event, 1, &negative, nullptr));
}
