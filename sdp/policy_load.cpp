// The process's policy: reads the rules once, and does what their log statements say.
#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <sys/stat.h>
#include <sys/types.h>

#include <atomic>
#include <cstring>
#include <new>

#include "rdma_core/base/high_fd.hpp"
#include "rdma_core/base/sys.hpp"
#include "sdp/policy.hpp"

namespace sdp {
namespace {

namespace sys = rdma::sys;

constexpr std::size_t kMaxBytes = 1 << 20;

PolicyError whole_file(const char* filename, std::string what) {
  PolicyError e;
  e.file = filename;
  e.what = std::move(what);
  return e;
}

std::string text_of(long negative_errno) {
  char text[128];
  return strerror_r(static_cast<int>(-negative_errno), text, sizeof text);
}

/// What is wrong, or an empty string.
std::string read_all(int fd, std::string& text) {
  struct stat st {};
  if (const long r = sys::call(SYS_fstat, fd, sys::arg(&st)); r < 0) return "cannot be looked at: " + text_of(r);
  if (!S_ISREG(st.st_mode)) return "is no regular file; name a file of rules";
  if (st.st_size > static_cast<off_t>(kMaxBytes)) return "is larger than 1 MiB; rules are not that long";
  // One byte more than there is shows the end; files such as those of /proc say that they are empty.
  text.resize(st.st_size > 0 ? static_cast<std::size_t>(st.st_size) + 1 : kMaxBytes + 1);
  std::size_t n = 0;
  while (n < text.size()) {
    const long r = sys::call(SYS_read, fd, sys::arg(text.data() + n), static_cast<long>(text.size() - n));
    if (r == -EINTR) continue;
    if (r < 0) return "cannot be read: " + text_of(r);
    if (r == 0) break;
    n += static_cast<std::size_t>(r);
  }
  if (n == text.size()) return "grew while it was read; try again";
  text.resize(n);
  return {};
}

// --- log statements

/// libsdp's way, for the name may be anything: root's log is in /var/log; anybody else's in a directory of his own that nobody else
/// can write, so that no link planted in /tmp is followed. -1: refused.
int open_libsdp_log(const std::string& name) {
  const std::size_t slash = name.rfind('/');
  const long uid = sys::call(SYS_geteuid);
  const int flags = O_WRONLY | O_CREAT | O_APPEND | O_CLOEXEC | O_NOFOLLOW | O_NONBLOCK | O_NOCTTY;
  long fd = -1;
  if (uid == 0) {
    const std::string path = "/var/log/" + (slash == std::string::npos ? name : name.substr(slash + 1));
    fd = sys::call(SYS_openat, AT_FDCWD, sys::arg(path.c_str()), flags, 0600);
  } else {
    const std::string dir = (slash == std::string::npos ? "/tmp/" : "") + name + "." + std::to_string(uid);
    sys::call(SYS_mkdirat, AT_FDCWD, sys::arg(dir.c_str()), 0700);
    const long d = sys::call(SYS_openat, AT_FDCWD, sys::arg(dir.c_str()), O_RDONLY | O_DIRECTORY | O_NOFOLLOW | O_CLOEXEC);
    if (d < 0) return -1;
    struct stat st {};
    const bool ours = sys::call(SYS_fstat, d, sys::arg(&st)) == 0 && static_cast<long>(st.st_uid) == uid && (st.st_mode & 077) == 0;
    if (ours) fd = sys::call(SYS_openat, d, sys::arg("log"), flags, 0600);
    sys::call(SYS_close, d);
  }
  if (fd < 0) return -1;
  struct stat st {};
  if (sys::call(SYS_fstat, fd, sys::arg(&st)) == 0 && S_ISREG(st.st_mode) && st.st_nlink == 1 &&
      static_cast<long>(st.st_uid) == uid)
    return rdma::keep_fd(static_cast<int>(fd));
  sys::call(SYS_close, fd);
  return -1;
}

void apply(const LogStatements& log, const Options& options) {
  using Destination = LogStatements::Destination;
  if (options.log_is_set) return;
  if (log.has_level) rdma::log::threshold.store(level_from_libsdp(log.min_level), std::memory_order_relaxed);
  if (log.destination == Destination::syslog)
    RDMA_LOG(info, "%s: there is no log to syslog; it goes to standard error", options.config_file.c_str());
  if (log.destination != Destination::file) return;
  const int fd = open_libsdp_log(log.file);
  if (fd >= 0)
    keep_log_file(fd);
  else
    RDMA_LOG(warn, "%s: the log file that it names cannot be opened safely; logging to standard error",
             options.config_file.c_str());
}

// --- once per process

struct Loaded {
  PolicyRules rules;
  bool broken = false;
};
constinit std::atomic<const Loaded*> loaded{nullptr};  // never freed: threads may be inside at exit
constinit std::atomic<const Options*> loading_for{nullptr};
pthread_once_t load_once = PTHREAD_ONCE_INIT;

void load() {
  const Options& options = *loading_for.load(std::memory_order_acquire);
  auto* made = new Loaded;
  if (!options.config_file.empty()) {
    auto result = load_policy(options.config_file.c_str());
    apply(result ? result->log : result.error().log, options);
    if (result) {
      made->rules = std::move(*result);
    } else {
      made->broken = true;
      RDMA_LOG(error, "%s; everything stays on TCP", to_string(result.error()).c_str());
    }
    for (const auto* list : {&made->rules.server, &made->rules.client})
      for (const PolicyRule& rule : *list)
        if (rule.network.is_empty())
          RDMA_LOG(warn, "%s:%u: the address has bits beyond its prefix, so that the rule matches nothing",
                   options.config_file.c_str(), rule.line);
  }
  loaded.store(made, std::memory_order_release);
}

const Loaded& rules_of(const Options& options) noexcept {
  if (const Loaded* l = loaded.load(std::memory_order_acquire)) return *l;
  loading_for.store(&options, std::memory_order_release);
  pthread_once(&load_once, load);
  return *loaded.load(std::memory_order_acquire);
}

}  // namespace

rdma::Result<PolicyRules, PolicyError> load_policy(const char* filename) {
  const int flags = O_RDONLY | O_CLOEXEC | O_NOCTTY | O_NONBLOCK;
  const long fd = sys::call(SYS_openat, AT_FDCWD, sys::arg(filename), flags);
  if (fd < 0) return rdma::Err{whole_file(filename, "cannot be opened: " + text_of(fd))};
  std::string text;
  std::string wrong = read_all(static_cast<int>(fd), text);
  sys::call(SYS_close, fd);
  if (!wrong.empty()) return rdma::Err{whole_file(filename, std::move(wrong))};
  return parse_policy(text, filename);
}

Family decide(const Options& options, Role role, const sockaddr_storage& local, const sockaddr_storage& remote) noexcept {
  if (options.policy == Family::tcp) return Family::tcp;  // SDP_POLICY=tcp switches everything off, rules or not
  const Loaded& l = rules_of(options);
  if (l.broken) return Family::tcp;
  return l.rules.decide(role, program_invocation_short_name, local, remote, options.policy);
}

LaneReason tcp_reason(const Options& options) noexcept {
  if (options.forced_to_tcp != nullptr) return LaneReason::bad_settings;
  if (options.policy == Family::tcp) return LaneReason::policy_tcp;
  return rules_of(options).broken ? LaneReason::bad_settings : LaneReason::policy_tcp;
}

}  // namespace sdp
