#include "rdma_core/base/program_call.hpp"

#include <linux/futex.h>
#include <setjmp.h>
#include <signal.h>
#include <sys/syscall.h>
#include <ucontext.h>
#include <unistd.h>

#include <algorithm>
#include <boost/test/unit_test.hpp>
#include <cerrno>
#include <ctime>
#include <string>
#include <vector>

#include "rdma_core/base/sys.hpp"

namespace rdma::sys {
namespace {

// The thread sanitizer keeps handlers back until it finds it convenient.
#if defined(__SANITIZE_THREAD__)
constexpr bool kHandlersRunAtOnce = false;
#else
constexpr bool kHandlersRunAtOnce = true;
#endif

std::uint32_t word = 0;

long sleep_for(EndedBy by, long ms) {
  const timespec limit{ms / 1000, ms % 1000 * 1'000'000};
  return sleeping_call(by, SYS_futex, arg(&word), FUTEX_WAIT, 0, arg(&limit));
}
constexpr long kAtOnce = 20'000, kShort = 10;  // a sleep that must not begin; one that must

template <bool restarts>
void on_signal(int, siginfo_t*, void* context) {
  handler_has_run(context, restarts);
}

struct Handler {
  explicit Handler(int number, void (*to)(int, siginfo_t*, void*)) : number_(number) {
    struct sigaction action {};
    action.sa_sigaction = to;
    action.sa_flags = SA_SIGINFO;
    BOOST_REQUIRE_EQUAL(sigaction(number_, &action, &before_), 0);
  }
  ~Handler() { sigaction(number_, &before_, nullptr); }
  Handler(const Handler&) = delete;
  Handler& operator=(const Handler&) = delete;

 private:
  int number_;
  struct sigaction before_ {};
};

// How many instructions are still to be made until the handler has run; is the system call among those that were?
int steps_left = 0;
bool is_made = false;
#if defined(__x86_64__)
const unsigned char* next_instruction = nullptr;
#endif
void on_step(int, siginfo_t*, void* context) {
#if defined(__x86_64__)
  constexpr greg_t kTrapFlag = 0x100;
  is_made = is_made || (next_instruction != nullptr && next_instruction[0] == 0x0f && next_instruction[1] == 0x05);
  next_instruction = reinterpret_cast<const unsigned char*>(static_cast<ucontext_t*>(context)->uc_mcontext.gregs[REG_RIP]);
  if (--steps_left > 0) return;
  next_instruction = nullptr;
  static_cast<ucontext_t*>(context)->uc_mcontext.gregs[REG_EFL] &= ~kTrapFlag;
  handler_has_run(context, false);
#endif
}
[[gnu::noinline]] void go_by_steps() {
#if defined(__x86_64__)
  asm volatile("pushfq\n orq $0x100, (%%rsp)\n popfq" ::: "cc", "memory");
#endif
}

// What handlers see of a call: the order of things.
std::string seen;
template <char name>
void note(int number, siginfo_t* info, void* context) {
  if (put_off(number, *info, context)) return;
  seen += name;
  handler_has_run(context, false);
}
bool is_blocked(int number) {
  sigset_t now;
  sigprocmask(SIG_BLOCK, nullptr, &now);
  return sigismember(&now, number) == 1;
}

}  // namespace

BOOST_AUTO_TEST_CASE(a_handler_runs_where_the_call_sleeps_or_returns, *boost::unit_test::enable_if<kHandlersRunAtOnce>()) {
  const Handler one(SIGUSR1, note<'1'>), two(SIGUSR2, note<'2'>), abort(SIGABRT, note<'a'>);
  seen.clear();
  raise(SIGUSR1);
  {
    const ProgramCall call;
    raise(SIGUSR1);
    seen += '<';
    raise(SIGUSR2);
    raise(SIGABRT);
    seen += '>';
  }
  BOOST_TEST(seen == "1<a>21");  // the kernel nests what it delivers at once
  BOOST_TEST(!is_blocked(SIGUSR1));
  seen.clear();
  {
    const ProgramCall call;
    raise(SIGUSR1);
    seen += '<';
    BOOST_TEST(sleep_for(EndedBy::any, kAtOnce) == -EINTR);
    seen += '>';
    {
      const ProgramCall in_it;
      raise(SIGUSR2);
    }
    seen += ')';
  }
  BOOST_TEST(seen == "<1>)2");
  BOOST_TEST(!is_blocked(SIGUSR2));
}

// Two that the kernel delivers at once, and what each of them was told.
BOOST_AUTO_TEST_CASE(nothing_of_a_signal_is_lost, *boost::unit_test::enable_if<kHandlersRunAtOnce>()) {
  static std::vector<int> values;
  values.clear();
  const auto note_value = [](int number, siginfo_t* info, void* context) {
    if (!put_off(number, *info, context)) values.push_back(info->si_value.sival_int);
  };
  const Handler first(SIGRTMIN, note_value), second(SIGRTMIN + 1, note_value);
  sigset_t both, before;
  sigemptyset(&both);
  sigaddset(&both, SIGRTMIN);
  sigaddset(&both, SIGRTMIN + 1);
  sigaddset(&both, SIGWINCH);
  {
    const ProgramCall call;
    sigprocmask(SIG_BLOCK, &both, &before);
    for (const int value : {1, 2, 3}) sigqueue(getpid(), SIGRTMIN + value % 2, {.sival_int = value});
    sigdelset(&both, SIGWINCH);
    sigprocmask(SIG_UNBLOCK, &both, nullptr);
    BOOST_TEST(values.empty());
    BOOST_TEST(is_blocked(SIGUSR1));
  }
  BOOST_TEST(values.size() == 3U);
  std::sort(values.begin(), values.end());
  BOOST_TEST(values == (std::vector<int>{1, 2, 3}), boost::test_tools::per_element());
  BOOST_TEST(is_blocked(SIGWINCH));
  BOOST_TEST(!is_blocked(SIGUSR1));
  sigprocmask(SIG_SETMASK, &before, nullptr);
}

BOOST_AUTO_TEST_CASE(a_leap_out_of_a_handler_leaves_no_call_behind, *boost::unit_test::enable_if<kHandlersRunAtOnce>()) {
  static jmp_buf back;
  const auto leap = [](int number, siginfo_t* info, void* context) {
    if (!put_off(number, *info, context)) siglongjmp(back, 1);
  };
  const Handler handler(SIGUSR1, leap);
  for (const bool asleep : {false, true}) {
    if (sigsetjmp(back, 1) == 0) {
      const ProgramCall call;
      raise(SIGUSR1);
      if (asleep) (void)sleep_for(EndedBy::any, kAtOnce);
    }
    BOOST_TEST(!detail::call_state.is_inside);
    BOOST_TEST(!is_blocked(SIGUSR1));
  }
}

BOOST_AUTO_TEST_CASE(a_handler_before_the_sleep_ends_it_as_it_was_installed) {
  forget_handlers();
  BOOST_TEST(sleep_for(EndedBy::any, kShort) == -ETIMEDOUT);
  {
    const Handler handler(SIGUSR1, on_signal<true>);
    raise(SIGUSR1);
    BOOST_TEST(sleep_for(EndedBy::no_restart, kShort) == -ETIMEDOUT);
    BOOST_TEST(sleep_for(EndedBy::any, kAtOnce) == -EINTR);
    BOOST_TEST(!is_ended(EndedBy::no_restart));
    BOOST_TEST(is_ended(EndedBy::any));
  }
  {
    const Handler handler(SIGUSR1, on_signal<false>);
    raise(SIGUSR1);
    BOOST_TEST(sleep_for(EndedBy::nothing, kShort) == -ETIMEDOUT);
    BOOST_TEST(sleep_for(EndedBy::no_restart, kAtOnce) == -EINTR);
    BOOST_TEST(blocking_call(EndedBy::any, SYS_pause) == -EINTR);
    BOOST_TEST(is_ended(EndedBy::no_restart));
  }
  forget_handlers();
  BOOST_TEST(sleep_for(EndedBy::any, kShort) == -ETIMEDOUT);
  BOOST_TEST(is_ended(EndedBy::no_restart), "by a handler of which nobody told");
}

// With a handler after each single instruction between here and the kernel: before the system call it ends it, and from then on the
// time does.
BOOST_AUTO_TEST_CASE(no_instruction_lets_a_handler_slip, *boost::unit_test::enable_if<kHandlersRunAtOnce>()) {
  const Handler handler(SIGTRAP, on_step);
  int ended = 0;
  for (int step = 1; !is_made; ++step) {
    BOOST_REQUIRE_MESSAGE(step < 1000, "the system call was never reached");
    const timespec limit{0, kShort * 1'000'000};
    steps_left = step;
    forget_handlers();
    go_by_steps();
    const long r = sleeping_call(EndedBy::any, SYS_futex, arg(&word), FUTEX_WAIT, 0, arg(&limit));
    BOOST_TEST(r == (is_made ? -ETIMEDOUT : -EINTR), "a handler after instruction " << step << ": " << r);
    ended += r == -EINTR;
  }
  BOOST_TEST_MESSAGE(ended << " instructions before the system call");
  BOOST_TEST(ended > 10);
}

}  // namespace rdma::sys
