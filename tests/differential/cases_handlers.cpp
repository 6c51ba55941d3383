// The program's own signal handlers, while there is a library that has to know when they run.
#include <poll.h>
#include <pthread.h>
#include <setjmp.h>
#include <signal.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/time.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cerrno>
#include <csignal>
#include <cstdlib>
#include <thread>
#include <vector>

#include "bad_memory.hpp"
#include "trace.hpp"

using namespace differential;

namespace {

volatile sig_atomic_t handled = 0;
void handler(int number) { handled = number; }
jmp_buf back;
void leap(int number) { siglongjmp(back, number); }

void set_handler(int number, void (*to)(int), int flags) {
  struct sigaction action {};
  action.sa_handler = to;
  action.sa_flags = flags;
  told("sigaction", sigaction(number, &action, nullptr));
}
const char* name_of(void (*to)(int)) {
  return to == SIG_DFL ? "default" : to == SIG_IGN ? "ignore" : to == handler ? "handler" : to == leap ? "leap" : "another";
}
void say_handler(int number) {
  struct sigaction action {};
  told("sigaction", sigaction(number, nullptr, &action));
  say("%d: %s flags %#x", number, name_of(action.sa_handler), static_cast<unsigned>(action.sa_flags) & ~0x04000000U);
}
/// How a child ends that does that.
template <class What>
void in_child(const char* name, What&& what) {
  const pid_t child = fork();
  if (child == 0) {
    what();
    _exit(0);
  }
  int status = 0;
  if (waitpid(child, &status, 0) != child) fail("waitpid");
  say("%s: %s %d", name, WIFSIGNALED(status) ? "signal" : "exit", WIFSIGNALED(status) ? WTERMSIG(status) : WEXITSTATUS(status));
}
void touch(char* at) { *static_cast<volatile char*>(at) = 1; }

CASE(own_handlers) {
  say_handler(SIGSEGV);
  set_handler(SIGBUS, handler, SA_RESTART | SA_ONSTACK);
  Peer peer;
  Conn c = connection(peer);
  say_handler(SIGSEGV);
  say_handler(SIGBUS);
  set_handler(SIGSEGV, leap, SA_NODEFER);
  say_handler(SIGSEGV);
  if (const int number = sigsetjmp(back, 1); number == 0)
    touch(nowhere());
  else
    say("leapt by %d", number);
  told("send", send(c.fd, nowhere(), 100, 0));
  told("send", send(c.fd, nullptr, 100, 0));
  say("handled %d", handled);
  raise(SIGBUS);
  say("handled %d", handled);
  say("signal: %s", name_of(signal(SIGSEGV, handler)));
  say_handler(SIGSEGV);
  raise(SIGSEGV);
  say("handled %d", handled);
  say("signal: %s", name_of(signal(SIGSEGV, SIG_IGN)));
  raise(SIGSEGV);
  say_handler(SIGSEGV);
  say("signal: %s", name_of(signal(SIGSEGV, SIG_DFL)));
  told("send", send(c.fd, nowhere(), 100, 0));
  told("a bad number", sigaction(SIGKILL, nullptr, nullptr));
  struct sigaction wanted {};
  told("that no one may set", sigaction(SIGKILL, &wanted, nullptr));
  works(peer, c);
}
CASE(once_and_blocked) {
  Peer peer;
  Conn c = connection(peer);
  set_handler(SIGSEGV, handler, SA_RESETHAND);
  raise(SIGSEGV);
  say("handled %d", handled);
  say_handler(SIGSEGV);
  struct sigaction action {};
  action.sa_sigaction = [](int, siginfo_t* info, void*) {
    sigset_t now;
    sigprocmask(SIG_BLOCK, nullptr, &now);
    say("code %d, SIGUSR1 blocked %d, SIGUSR2 %d", info->si_code, sigismember(&now, SIGUSR1), sigismember(&now, SIGUSR2));
  };
  action.sa_flags = SA_SIGINFO;
  sigaddset(&action.sa_mask, SIGUSR1);
  told("sigaction", sigaction(SIGSEGV, &action, nullptr));
  raise(SIGSEGV);
  works(peer, c);
}
CASE(ends_of_children) {
  Peer peer;
  Conn c = connection(peer);
  in_child("a bad store", [] { touch(nowhere()); });
  in_child("a signal", [] { raise(SIGSEGV); });
  in_child("abort", [] { abort(); });
  set_handler(SIGSEGV, SIG_IGN, 0);
  in_child("ignored", [] { raise(SIGSEGV); });
  in_child("a bad store, ignored", [] { touch(nowhere()); });
  set_handler(SIGSEGV, handler, SA_RESETHAND);
  in_child("handled once", [] { touch(nowhere()); });
  set_handler(
      SIGSEGV, [](int) { _exit(7); }, 0);
  in_child("handled", [] { touch(nowhere()); });
  in_child("a cut file", [] {
    const int file = memfd_create("cut", MFD_CLOEXEC);
    touch(static_cast<char*>(mmap(nullptr, kPage, PROT_READ | PROT_WRITE, MAP_SHARED, file, 0)));
  });
  set_handler(SIGSEGV, SIG_DFL, 0);
  in_child("exec", [] {
    char shell[] = "/bin/sh", flag[] = "-c", what[] = "kill -SEGV $$";
    char* argv[] = {shell, flag, what, nullptr};
    execv(shell, argv);
  });
  works(peer, c);
}
// What a vfork child sets is its own.
CASE(vfork_handlers) {
  Peer peer;
  Conn c = connection(peer);
  set_handler(SIGSEGV, handler, 0);
  set_handler(SIGUSR1, handler, 0);
  // NOLINTBEGIN(clang-analyzer-security.insecureAPI.vfork,clang-analyzer-unix.Vfork): what run times do, warned against or not
  const pid_t child = vfork();
  if (child == 0) {
    signal(SIGSEGV, SIG_DFL);
    signal(SIGUSR1, SIG_DFL);
    _exit(0);
  }
  // NOLINTEND(clang-analyzer-security.insecureAPI.vfork,clang-analyzer-unix.Vfork)
  int status = 0;
  if (waitpid(child, &status, 0) != child) fail("waitpid");
  for (const int number : {SIGSEGV, SIGUSR1}) {
    say_handler(number);
    raise(number);
    say("handled %d", handled);
  }
  told("send", send(c.fd, nowhere(), 100, 0));
  works(peer, c);
}

int leapt_by(int number) {
  const int by = sigsetjmp(back, 1);
  if (by == 0) raise(number);
  return by;
}

// What is deprecated is what old programs call.
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wdeprecated-declarations"
// Each kind of handler, asked for in each way, of signals that say nothing of memory.
CASE(own_actions) {
  set_handler(SIGUSR1, handler, SA_NODEFER);
  set_handler(SIGPIPE, SIG_IGN, 0);
  Peer peer;
  Conn c = connection(peer);
  for (const int number : {SIGUSR1, SIGPIPE, SIGTERM, SIGRTMIN, SIGRTMAX}) {
    say_handler(number);
    set_handler(number, handler, SA_ONSTACK);
    raise(number);
    say("handled %d", handled);
    set_handler(number, SIG_IGN, SA_RESTART);
    raise(number);
    say_handler(number);
    set_handler(number, leap, SA_NODEFER | SA_RESTART);
    say("leapt by %d", leapt_by(number));
    say("signal: %s", name_of(signal(number, handler)));
    say_handler(number);
    told("siginterrupt", siginterrupt(number, 1));
    say_handler(number);
    say("signal: %s", name_of(signal(number, SIG_IGN)));
    say_handler(number);
    told("siginterrupt", siginterrupt(number, 0));
    say("sysv_signal: %s", name_of(sysv_signal(number, handler)));
    say_handler(number);
    raise(number);
    say_handler(number);
    in_child("by the default", [number] { raise(number); });
    say("sigset: %s", name_of(sigset(number, handler)));
    say_handler(number);
    say("signal: %s", name_of(signal(number, SIG_DFL)));
    say_handler(number);
  }
  struct sigaction action {};
  action.sa_sigaction = [](int number, siginfo_t* info, void*) {
    sigset_t now;
    sigprocmask(SIG_BLOCK, nullptr, &now);
    say("%d with %d, code %d, itself blocked %d, SIGUSR2 %d", number, info->si_value.sival_int, info->si_code,
        sigismember(&now, number), sigismember(&now, SIGUSR2));
  };
  action.sa_flags = SA_SIGINFO;
  sigaddset(&action.sa_mask, SIGUSR2);
  told("sigaction", sigaction(SIGRTMIN, &action, nullptr));
  sigqueue(getpid(), SIGRTMIN, {.sival_int = 42});
  for (const int number : {-1, 0, 32, 33, SIGKILL, SIGSTOP, 65, 1000}) {
    told("sigaction", sigaction(number, &action, nullptr));
    told("asked", sigaction(number, nullptr, &action));
    say("signal: %d", signal(number, handler) == SIG_ERR ? errno : 0);
    told("siginterrupt", siginterrupt(number, 1));
  }
  say("signal: %d", signal(SIGUSR1, SIG_ERR) == SIG_ERR ? errno : 0);
  works(peer, c);
}
#pragma GCC diagnostic pop

// --- handlers that come in the middle of a call

constexpr int kInterruptions = 300;

/// SIGALRM each so often, to this thread, until it goes.
class Ticks {
 public:
  explicit Ticks(int us) { set({.it_interval = {0, us}, .it_value = {0, us}}); }
  ~Ticks() { set({}); }
  Ticks(const Ticks&) = delete;
  Ticks& operator=(const Ticks&) = delete;

 private:
  static void set(const itimerval& when) { setitimer(ITIMER_REAL, &when, nullptr); }
};

/// What runs beside the thread that the signals are for.
template <class What>
std::thread beside(What what) {
  sigset_t all, before;
  sigfillset(&all);
  pthread_sigmask(SIG_SETMASK, &all, &before);
  std::thread thread(what);
  pthread_sigmask(SIG_SETMASK, &before, nullptr);
  return thread;
}
void swallow(int fd) {
  std::vector<char> buffer(1 << 20);
  while (read(fd, buffer.data(), buffer.size()) > 0) {
  }
}

jmp_buf after_leap;
volatile sig_atomic_t may_leap = 0;
void leap_if_may(int) {
  if (may_leap != 0) siglongjmp(after_leap, 1);
}
template <class Call>
void leap_out_of(Call call) {
  volatile int leaps = 0;
  const Ticks ticks(700);
  while (leaps < kInterruptions) {
    if (sigsetjmp(after_leap, 1) == 0) {
      may_leap = 1;
      for (;;) call();
    }
    may_leap = 0;
    leaps = leaps + 1;
  }
}

// Old programs leave a call that takes too long by siglongjmp: whatever it was doing, the connection goes on.
CASE(self_leap_out_of_send) {
  const Pair pair = self_pair();
  set_handler(SIGALRM, leap_if_may, 0);
  std::thread reader = beside([&] { swallow(pair.b.fd); });
  const std::vector<char> data(1 << 20);
  leap_out_of([&] { (void)!write(pair.a.fd, data.data(), data.size()); });
  told("write", write(pair.a.fd, data.data(), 1000));
  told("shutdown", shutdown(pair.a.fd, SHUT_WR));
  reader.join();
}
CASE(self_leap_out_of_recv) {
  const Pair pair = self_pair();
  set_handler(SIGALRM, leap_if_may, 0);
  std::thread writer = beside([&] {
    const std::vector<char> data(100'000);
    while (send(pair.b.fd, data.data(), data.size(), MSG_NOSIGNAL) > 0) {
    }
  });
  std::vector<char> buffer(1 << 20);
  pollfd p{pair.a.fd, POLLIN, 0};
  leap_out_of([&] {
    (void)!poll(&p, 1, 1000);
    (void)!read(pair.a.fd, buffer.data(), buffer.size());
  });
  told("read", read(pair.a.fd, buffer.data(), 1));
  told("close", close(pair.a.fd));
  writer.join();
}

// And others do their own input and output in a handler, on the connection that it finds in use.
int handlers_fd = -1;
volatile sig_atomic_t handlers_calls = 0, handlers_errors = 0;
CASE(self_handler_sends_and_receives) {
  const Pair pair = self_pair();
  handlers_fd = pair.a.fd;
  handlers_calls = 0;
  handlers_errors = 0;
  set_handler(
      SIGALRM,
      [](int) {
        char bytes[10];
        handlers_calls = handlers_calls + 1;
        if (send(handlers_fd, "x", 1, 0) != 1) handlers_errors = handlers_errors + 1;
        if (recv(handlers_fd, bytes, sizeof bytes, MSG_DONTWAIT) < 0 && errno != EAGAIN) handlers_errors = handlers_errors + 1;
      },
      SA_RESTART);
  std::thread echo = beside([&] {
    std::vector<char> buffer(1 << 20);
    for (;;) {
      const ssize_t n = read(pair.b.fd, buffer.data(), buffer.size());
      if (n <= 0 || send(pair.b.fd, "yy", 2, MSG_NOSIGNAL | MSG_DONTWAIT) == 0) return;
    }
  });
  std::vector<char> data(1 << 20);
  int errors = 0;
  {
    const Ticks ticks(700);
    while (handlers_calls < kInterruptions) {
      errors += write(pair.a.fd, data.data(), 300'000) <= 0;
      errors += recv(pair.a.fd, data.data(), data.size(), 0) <= 0;
    }
  }
  say("errors %d, of handlers %d", errors, static_cast<int>(handlers_errors));
  told("shutdown", shutdown(pair.a.fd, SHUT_WR));
  echo.join();
}

}  // namespace
