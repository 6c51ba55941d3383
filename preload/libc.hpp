// The real functions behind the names that we interpose.
//
// Before they are resolved, and while dlsym itself runs, the table holds plain system calls: a wrapper works in a constructor that
// ran before ours and inside an allocator's start-up. Resolving allocates nothing of ours and happens once.
#pragma once

#include <fcntl.h>
#include <grp.h>
#include <poll.h>
#include <sched.h>
#include <signal.h>
#include <spawn.h>
#include <sys/epoll.h>
#include <sys/fsuid.h>
#include <sys/ioctl.h>
#include <sys/select.h>
#include <sys/sendfile.h>
#include <sys/socket.h>
#include <sys/uio.h>
#include <unistd.h>

#include <cstdio>
#include <cstdlib>

namespace preload {

struct Libc {
  decltype(&::read) read;
  decltype(&::write) write;
  decltype(&::readv) readv;
  decltype(&::writev) writev;
  decltype(&::recv) recv;
  decltype(&::send) send;
  decltype(&::recvfrom) recvfrom;
  decltype(&::sendto) sendto;
  decltype(&::recvmsg) recvmsg;
  decltype(&::sendmsg) sendmsg;
  ssize_t (*sendfile)(int, int, off_t*, size_t);
  int (*accept4)(int, sockaddr*, socklen_t*, int);
  int (*accept)(int, sockaddr*, socklen_t*);
  int (*connect)(int, const sockaddr*, socklen_t);
  decltype(&::socket) socket;
  decltype(&::shutdown) shutdown;
  decltype(&::setsockopt) setsockopt;
  decltype(&::getsockopt) getsockopt;
  decltype(&::close) close;
  decltype(&::dup) dup;
  decltype(&::dup2) dup2;
  decltype(&::dup3) dup3;
  decltype(&::fcntl) fcntl;
  int (*ioctl)(int, unsigned long, ...);
  decltype(&::poll) poll;
  decltype(&::ppoll) ppoll;
  decltype(&::select) select;
  decltype(&::pselect) pselect;
  decltype(&::epoll_create1) epoll_create1;
  decltype(&::epoll_ctl) epoll_ctl;
  decltype(&::epoll_wait) epoll_wait;
  decltype(&::epoll_pwait) epoll_pwait;
  // Resolved with the rest, for a vfork child may not call dlsym. Those that are no plain system call stand at null before that.
  decltype(&::close_range) close_range;
  decltype(&::execve) execve;
  decltype(&::execvpe) execvpe;
  decltype(&::fexecve) fexecve;
  int (*posix_spawn)(pid_t*, const char*, const posix_spawn_file_actions_t*, const posix_spawnattr_t*, char* const[],
                     char* const[]);
  int (*posix_spawnp)(pid_t*, const char*, const posix_spawn_file_actions_t*, const posix_spawnattr_t*, char* const[],
                      char* const[]);
  decltype(&::posix_spawn_file_actions_adddup2) posix_spawn_file_actions_adddup2;
  int (*execveat)(int, const char*, char* const[], char* const[], int);
  int (*system)(const char*);
  FILE* (*popen)(const char*, const char*);
  int (*fclose)(FILE*);
  FILE* (*freopen)(const char*, const char*, FILE*);
  decltype(&::sigaction) sigaction;
  decltype(&::setuid) setuid;
  decltype(&::setgid) setgid;
  decltype(&::seteuid) seteuid;
  decltype(&::setegid) setegid;
  decltype(&::setreuid) setreuid;
  decltype(&::setregid) setregid;
  decltype(&::setresuid) setresuid;
  decltype(&::setresgid) setresgid;
  decltype(&::setgroups) setgroups;
  decltype(&::initgroups) initgroups;
  decltype(&::setfsuid) setfsuid;
  decltype(&::setfsgid) setfsgid;
  int (*capset)(void*, const void*);
  int (*prctl)(int, ...);
  decltype(&::unshare) unshare;
  decltype(&::setns) setns;
};

/// Resolves on first use.
const Libc& libc() noexcept;

/// Any other function of the next library in line; nullptr if it has none.
void* next_symbol(const char* name) noexcept;

}  // namespace preload
