#include "sdp/options.hpp"

#include <errno.h>
#include <fcntl.h>
#include <sys/auxv.h>
#include <unistd.h>

#include <atomic>
#include <cstdio>
#include <optional>

#include "rdma_core/base/high_fd.hpp"
#include "rdma_core/base/sys.hpp"
#include "sdp/stats.hpp"

namespace sdp {
namespace {

namespace sys = rdma::sys;
using rdma::log::Level;
using ValueText = decltype(OptionRow::in_force);

// --- values: each parser takes a value that is not empty and changes the options only when it is right

struct NamedLevel {
  const char* name;
  Level level;
};
constexpr NamedLevel kLevels[] = {
    {"off", Level::off}, {"error", Level::error}, {"warn", Level::warn}, {"info", Level::info}, {"debug", Level::debug}};

std::optional<std::uint32_t> parse_number(std::string_view s) noexcept {
  std::uint64_t value = 0;
  std::uint64_t unit = 1;
  if (s.size() > 1 && (s.back() == 'K' || s.back() == 'k')) unit = 1024;
  if (s.size() > 1 && (s.back() == 'M' || s.back() == 'm')) unit = 1024 * 1024;
  if (unit != 1) s.remove_suffix(1);
  if (s.empty()) return std::nullopt;
  for (const char c : s) {
    if (c < '0' || c > '9') return std::nullopt;
    value = value * 10 + static_cast<std::uint64_t>(c - '0');
    if (value > UINT32_MAX) return std::nullopt;
  }
  value *= unit;
  if (value > UINT32_MAX) return std::nullopt;
  return static_cast<std::uint32_t>(value);
}

void print_number(std::uint32_t value, ValueText& out) noexcept {
  char text[16];
  out.assign({text, static_cast<std::size_t>(std::snprintf(text, sizeof text, "%u", value))});
}

template <std::uint32_t Options::*Member, std::uint32_t Min, std::uint32_t Max, bool PowerOfTwo = false>
struct Number {
  static bool parse(Options& o, std::string_view s) noexcept {
    const auto value = parse_number(s);
    if (!value || *value < Min || *value > Max) return false;
    if (PowerOfTwo && (*value & (*value - 1)) != 0) return false;
    o.*Member = *value;
    return true;
  }
  static void print(const Options& o, ValueText& out) noexcept { print_number(o.*Member, out); }
};

/// A path stands in lines of the log, so it may not hold what a terminal would obey.
bool assign_path(PathText& path, std::string_view s) noexcept {
  for (const char c : s)
    if ((c >= 0 && c < ' ') || c == 0x7f) return false;
  return path.assign(s);
}

template <PathText Options::*Member>
struct Path {
  static bool parse(Options& o, std::string_view s) noexcept { return assign_path(o.*Member, s); }
  static void print(const Options& o, ValueText& out) noexcept { out.assign((o.*Member).view()); }
};

struct Policy {
  static bool parse(Options& o, std::string_view s) noexcept {
    for (const Family f : {Family::both, Family::sdp, Family::tcp}) {
      if (s != to_string(f)) continue;
      o.policy = f;
      return true;
    }
    return false;
  }
  static void print(const Options& o, ValueText& out) noexcept { out.assign(to_string(o.policy)); }
};

struct Transports {
  static bool parse(Options& o, std::string_view s) noexcept {
    if (s == "auto") {
      o.transports = TransportOrder{};
      return true;
    }
    TransportOrder order;
    order.count = 0;
    for (bool more = true; more;) {
      const std::size_t comma = s.find(',');
      more = comma != std::string_view::npos;
      if (!add(order, s.substr(0, comma))) return false;
      if (more) s.remove_prefix(comma + 1);
    }
    o.transports = order;
    return true;
  }
  static bool add(TransportOrder& order, std::string_view name) noexcept {
    for (const Transport t : TransportOrder{}) {
      if (name != to_string(t) || order.contains(t)) continue;
      order.item[order.count++] = t;
      return true;
    }
    return false;
  }
  static void print(const Options& o, ValueText& out) noexcept {
    char text[32];
    std::size_t n = 0;
    for (const Transport t : o.transports)
      n += static_cast<std::size_t>(std::snprintf(text + n, sizeof text - n, "%s%s", n == 0 ? "" : ",", to_string(t)));
    out.assign({text, n});
  }
};

struct Log {
  static bool parse(Options& o, std::string_view s) noexcept {
    const std::size_t colon = s.find(':');
    const bool has_file = colon != std::string_view::npos;
    for (const NamedLevel& l : kLevels) {
      if (s.substr(0, colon) != l.name) continue;
      PathText file;
      if (has_file && (colon + 1 == s.size() || !assign_path(file, s.substr(colon + 1)))) return false;
      o.log_level = l.level;
      o.log_is_set = true;
      o.log_file = file;
      return true;
    }
    return false;
  }
  static void print(const Options& o, ValueText& out) noexcept {
    char text[1100];
    const char* level = kLevels[static_cast<std::size_t>(o.log_level)].name;
    const int n = std::snprintf(text, sizeof text, "%s%s%s", level, o.log_file.empty() ? "" : ":", o.log_file.c_str());
    out.assign({text, static_cast<std::size_t>(n)});
  }
};

/// SDP_CONFIG stands before it in the table and wins.
struct LibsdpConfig {
  static bool parse(Options& o, std::string_view s) noexcept { return !o.config_file.empty() || assign_path(o.config_file, s); }
  static void print(const Options&, ValueText&) noexcept {}
};

struct Flavour {
  static bool parse(Options& o, std::string_view s) noexcept {
    if (s != "ib" && s != "rnic") return false;
    o.device_flavour = s == "ib" ? rdma::NodeType::ib_ca : rdma::NodeType::rnic;
    return true;
  }
  static void print(const Options& o, ValueText& out) noexcept {
    out.assign(o.device_flavour == rdma::NodeType::rnic ? "rnic" : "ib");
  }
};

struct Copying {
  static constexpr const char* kNames[] = {"auto", "cached", "direct"};
  static bool parse(Options& o, std::string_view s) noexcept {
    for (const BulkCopy way : {BulkCopy::tried, BulkCopy::cached, BulkCopy::direct}) {
      if (s != kNames[static_cast<std::size_t>(way)]) continue;
      o.bulk_copy = way;
      return true;
    }
    return false;
  }
  static void print(const Options& o, ValueText& out) noexcept { out.assign(kNames[static_cast<std::size_t>(o.bulk_copy)]); }
};

struct ZeroCopy {
  static constexpr std::uint32_t kLeast = 16384, kMost = 1U << 30;
  static bool parse(Options& o, std::string_view s) noexcept {
    const auto value = s == "off" ? std::optional<std::uint32_t>(0) : parse_number(s);
    if (!value || (*value != 0 && (*value < kLeast || *value > kMost))) return false;
    o.zero_copy_from = *value;
    return true;
  }
  static void print(const Options& o, ValueText& out) noexcept {
    if (o.zero_copy_from == 0)
      out.assign("off");
    else
      print_number(o.zero_copy_from, out);
  }
};

struct Rings {
  static bool parse(Options& o, std::string_view s) noexcept {
    if (s != "tcp" && s != "ignore") return false;
    o.rings_mean_tcp = s == "tcp";
    return true;
  }
  static void print(const Options& o, ValueText& out) noexcept { out.assign(o.rings_mean_tcp ? "tcp" : "ignore"); }
};

/// Any value counts, also an empty one; what they do is in settle().
struct Flag {
  static bool parse(Options&, std::string_view) noexcept { return true; }
  static void print(const Options&, ValueText&) noexcept {}
};

// --- the table

struct Row {
  const char* variable;
  const char* meaning;
  const char* unit;
  const char* accepted;
  bool (*parse)(Options&, std::string_view) noexcept;
  void (*print)(const Options&, ValueText&) noexcept;
  bool decides_carrier = false;  ///< a wrong value puts everything on TCP
};

template <class T>
constexpr Row row(const char* variable, const char* meaning, const char* unit, const char* accepted, bool decides_carrier = false) {
  return {variable, meaning, unit, accepted, &T::parse, &T::print, decides_carrier};
}

enum Index : std::size_t {
  kPolicy,
  kTransport,
  kConfig,
  kLibsdpConfig,
  kSimpleLibsdp,
  kAlwaysUseSdp,
  kSecretFile,
  kLog,
  kStats,
  kPcap,
  kSpin,
  kRecvBuffer,
  kRecvBufferMax,
  kRecvBuffersInitial,
  kRecvBuffers,
  kBulkCopy,
  kZeroCopy,
  kIoUring,
  kUpgradeMessages,
  kUpgradeBytes,
  kLaneTimeout,
  kExitTimeout,
  kFlavour,
  kRows
};

constexpr Row kTable[] = {
    row<Policy>("SDP_POLICY", "how connections are carried when no rule says otherwise; tcp switches the library off", "",
                "both, sdp or tcp", true),
    row<Transports>("SDP_TRANSPORT", "which devices may carry them, the preferred one first", "",
                    "auto (all of them), or a list of local, ib and rnic separated by commas", true),
    row<Path<&Options::config_file>>("SDP_CONFIG", "file of rules by role, program, address and port (libsdp grammar)", "",
                                     "a path of less than 1024 bytes without control characters", true),
    row<LibsdpConfig>("LIBSDP_CONFIG_FILE", "the same, by libsdp's name; SDP_CONFIG wins", "",
                      "a path of less than 1024 bytes without control characters", true),
    row<Flag>("SIMPLE_LIBSDP", "set at all: LIBSDP_CONFIG_FILE is not read", "", "anything"),
    row<Flag>("ALWAYS_USE_SDP", "the same as SIMPLE_LIBSDP", "", "anything"),
    row<Path<&Options::secret_file>>("SDP_SECRET_FILE", "secret that both ends of a lane between hosts must have", "",
                                     "a path of less than 1024 bytes without control characters", true),
    row<Log>("SDP_LOG", "what is logged, and to which file instead of standard error (%p: process id)", "",
             "off, error, warn, info or debug, then perhaps :FILE"),
    row<Path<&Options::stats_file>>("SDP_STATS", "file for a JSON report at exit (%p: process id)", "",
                                    "a path of less than 1024 bytes without control characters"),
    row<Path<&Options::pcap_file>>("SDP_PCAP", "file for a capture that tshark decodes (%p: process id)", "",
                                   "a path of less than 1024 bytes without control characters"),
    row<Number<&Options::spin_us, 0, 1'000'000>>(
        "SDP_SPIN_US", "how long a waiting thread looks before it sleeps, on a fast machine; 0: not at all", "microseconds",
        "a number from 0 to 1000000"),
    row<Number<&Options::recv_buffer_bytes, 512, 1U << 20, true>>("SDP_RECV_BUFFER", "size of a lane's receive buffers at first",
                                                                  "bytes", "a power of two from 512 to 1M"),
    row<Number<&Options::recv_buffer_max, 512, 1U << 20, true>>("SDP_RECV_BUFFER_MAX", "size to which they grow with the traffic",
                                                                "bytes", "a power of two from 512 to 1M"),
    row<Number<&Options::recv_buffers_initial, 4, 128>>("SDP_RECV_BUFFERS_INITIAL", "number of a lane's receive buffers at first",
                                                        "buffers", "a number from 4 to 128"),
    row<Number<&Options::recv_buffers, 4, 128>>("SDP_RECV_BUFFERS", "number to which they grow with the traffic", "buffers",
                                                "a number from 4 to 128"),
    row<Copying>("SDP_BULK_COPY", "how bulk is copied between two processes of one host: into the cache, or past it (direct)", "",
                 "auto (what is faster), cached or direct"),
    row<ZeroCopy>("SDP_ZCOPY_THRESHOLD", "blocking sends from so long on are read by the peer in place", "bytes",
                  "off, or a number from 16K to 1024M"),
    row<Rings>("SDP_IO_URING",
               "what a program gets whose io_uring may serve more than files: TCP alone, or lanes, if it never serves sockets", "",
               "tcp or ignore"),
    row<Number<&Options::upgrade_messages, 0, UINT32_MAX>>("SDP_UPGRADE_MESSAGES",
                                                           "a connection gets a lane after so many sends and receives; 0: at once",
                                                           "messages", "a number from 0 to 4294967295"),
    row<Number<&Options::upgrade_bytes, 0, UINT32_MAX>>("SDP_UPGRADE_BYTES", "or after so many bytes; 0: at once", "bytes",
                                                        "a number from 0 to 4294967295, also as 64K or 1M"),
    row<Number<&Options::lane_timeout_s, 1, 3600>>("SDP_LANE_TIMEOUT",
                                                   "a lane between hosts on which nothing arrives for so long is given up",
                                                   "seconds", "a number from 1 to 3600"),
    row<Number<&Options::exit_timeout_s, 0, 3600>>(
        "SDP_EXIT_TIMEOUT",
        "exit, exec, setuid and its kin, and fdopen where it may not block, wait so long at most for what is under way", "seconds",
        "a number from 0 to 3600"),
    row<Flavour>("SDP_DEVICE_FLAVOUR", "what the software device looks like", "", "ib or rnic"),
};
static_assert(std::size(kTable) == kRows && kRows + 2 <= kMaxOptionProblems, "Index and kTable go together");
static_assert(std::string_view(kTable[kConfig].variable) == "SDP_CONFIG" &&
              std::string_view(kTable[kFlavour].variable) == "SDP_DEVICE_FLAVOUR");

std::optional<std::string_view> look_up(const char* const* environment, std::string_view name) noexcept {
  for (; environment != nullptr && *environment != nullptr; ++environment) {
    const std::string_view entry(*environment);
    if (entry.size() > name.size() && entry[name.size()] == '=' && entry.starts_with(name)) return entry.substr(name.size() + 1);
  }
  return std::nullopt;
}

/// What the environment says: a flag counts when it is there, every other variable when it is not empty.
struct Settings {
  std::string_view value[kRows];
  bool set[kRows] = {};

  explicit Settings(const char* const* environment) noexcept {
    for (std::size_t i = 0; i < kRows; ++i) {
      const auto found = look_up(environment, kTable[i].variable);
      const bool is_flag = i == kSimpleLibsdp || i == kAlwaysUseSdp;
      set[i] = found.has_value() && (is_flag || !found->empty());
      if (set[i]) value[i] = *found;
    }
  }
};

/// A value as it may stand in a line of the log: cut, and without anything that a terminal would obey.
struct Printable {
  char text[81];
  explicit Printable(std::string_view s) noexcept {
    std::size_t n = 0;
    for (const char c : s.substr(0, 77)) text[n++] = c >= ' ' && c <= '~' ? c : '?';
    if (s.size() > 77)
      for (int i = 0; i < 3; ++i) text[n++] = '.';
    text[n] = '\0';
  }
};

template <class... Args>
void complain(OptionProblems& problems, Index index, const char* format, Args... args) noexcept {
  if (problems.count == kMaxOptionProblems) return;
  OptionProblem& p = problems.item[problems.count++];
  char line[384];
  const int n = std::snprintf(line, sizeof line, format, args...);
  p.variable = kTable[index].variable;
  p.message.assign({line, std::min(static_cast<std::size_t>(n), sizeof line - 1)});
}

void parse_row(std::size_t i, const Settings& settings, Options& o, OptionProblems& problems) noexcept {
  const Row& r = kTable[i];
  if (!settings.set[i] || r.parse(o, settings.value[i])) return;
  const Printable shown(settings.value[i]);
  if (r.decides_carrier) {
    complain(problems, static_cast<Index>(i), "%s=%s: must be %s; everything stays on TCP", r.variable, shown.text, r.accepted);
    if (o.forced_to_tcp == nullptr) o.forced_to_tcp = r.variable;
    return;
  }
  ValueText standard;
  r.print(Options{}, standard);
  complain(problems, static_cast<Index>(i), "%s=%s: must be %s; %s is used", r.variable, shown.text, r.accepted,
           standard.empty() ? "nothing" : standard.c_str());
}

/// `low` may not be above `high`. When the environment sets one of them only, the other follows it; when both, both are wrong.
template <std::uint32_t Options::*Low, std::uint32_t Options::*High>
void keep_in_order(Index low, Index high, const Settings& settings, Options& o, OptionProblems& problems) noexcept {
  if (o.*Low <= o.*High) return;
  if (!settings.set[low]) {
    o.*Low = o.*High;
  } else if (!settings.set[high]) {
    o.*High = o.*Low;
  } else {
    const Options standard;
    complain(problems, low, "%s=%u: must not be above %s=%u; %u and %u are used", kTable[low].variable, o.*Low,
             kTable[high].variable, o.*High, standard.*Low, standard.*High);
    o.*Low = standard.*Low;
    o.*High = standard.*High;
  }
}

/// Where variables depend on each other.
void settle(const Settings& settings, Options& o, OptionProblems& problems) noexcept {
  const bool simple = settings.set[kSimpleLibsdp] || settings.set[kAlwaysUseSdp];
  if (simple && !settings.set[kConfig]) o.config_file = PathText{};
  keep_in_order<&Options::recv_buffer_bytes, &Options::recv_buffer_max>(kRecvBuffer, kRecvBufferMax, settings, o, problems);
  keep_in_order<&Options::recv_buffers_initial, &Options::recv_buffers>(kRecvBuffersInitial, kRecvBuffers, settings, o, problems);
  if (o.forced_to_tcp != nullptr) o.policy = Family::tcp;
}

constinit std::atomic<int> log_fd{-1};
constinit OptionProblems found_problems;  // by parse_options() of the process
constinit std::atomic<bool> unreported{false};

/// A relative path stays one when the whole would be too long.
void make_absolute(PathText& path) noexcept {
  if (path.empty() || path.view().front() == '/') return;
  char whole[1024] = {};
  const long size = sys::call(SYS_getcwd, sys::arg(whole), sizeof whole);  // the NUL included
  if (size <= 1 || whole[0] != '/') return;
  std::size_t n = static_cast<std::size_t>(size) - 1;
  if (n + 1 + path.view().size() >= sizeof whole) return;
  // In the pattern of a report or a log a percent sign of the directory must stay one; rare enough to leave such a path alone.
  if (std::memchr(whole, '%', n) != nullptr) return;
  if (n > 1) whole[n++] = '/';
  std::memcpy(whole + n, path.view().data(), path.view().size());
  path.assign({whole, n + path.view().size()});
}

}  // namespace

const char* to_string(Family f) noexcept {
  switch (f) {
    case Family::tcp:
      return "tcp";
    case Family::sdp:
      return "sdp";
    case Family::both:
      return "both";
  }
  return "?";
}

const char* to_string(Transport t) noexcept {
  switch (t) {
    case Transport::local:
      return "local";
    case Transport::ib:
      return "ib";
    case Transport::rnic:
      return "rnic";
  }
  return "?";
}

Options parse_options(const char* const* environment, OptionProblems& problems) noexcept {
  const Settings settings(environment);
  Options o;
  for (std::size_t i = 0; i < kRows; ++i) parse_row(i, settings, o, problems);
  settle(settings, o, problems);
  return o;
}

Options parse_options() noexcept {
  // The environment of a set-user-id program is its caller's, and ours can name files to write.
  const char* const* environment = getauxval(AT_SECURE) != 0 ? nullptr : ::environ;
  Options o = parse_options(environment, found_problems);
  unreported.store(found_problems.count != 0, std::memory_order_release);
  for (PathText* path : {&o.config_file, &o.log_file, &o.secret_file, &o.stats_file, &o.pcap_file}) make_absolute(*path);
  apply_log_options(o);
  keep_closed_connections(!o.stats_file.empty());
  return o;
}

void report_option_problems() noexcept {
  if (!unreported.load(std::memory_order_relaxed) || !unreported.exchange(false, std::memory_order_acquire)) return;
  for (const OptionProblem& p : found_problems.all()) RDMA_LOG(error, "%s", p.message.c_str());
}

void apply_log_options(const Options& options) noexcept {
  rdma::log::threshold.store(options.log_level, std::memory_order_relaxed);
  if (options.log_file.empty() || options.log_level == Level::off || log_fd.load(std::memory_order_relaxed) >= 0) return;
  PathText path;
  long fd = -ENAMETOOLONG;
  if (expand_path(options.log_file.view(), sys::call(SYS_getpid), path)) {
    // Without O_NONBLOCK a FIFO without a reader would hold the program up here for good.
    const int flags = O_WRONLY | O_CREAT | O_APPEND | O_CLOEXEC | O_NOCTTY | O_NONBLOCK;
    fd = sys::call(SYS_openat, AT_FDCWD, sys::arg(path.c_str()), flags, 0644);
  }
  if (fd < 0) {
    const int saved_errno = errno;
    errno = static_cast<int>(-fd);  // for %m
    RDMA_LOG(warn, "SDP_LOG: %s cannot be opened: %m; logging to standard error", Printable(path.view()).text);
    errno = saved_errno;
    return;
  }
  keep_log_file(rdma::keep_fd(static_cast<int>(fd)));
}

void keep_log_file(int fd) noexcept {
  log_fd.store(fd, std::memory_order_relaxed);
  rdma::log::set_fd(fd);
}

int log_file_fd() noexcept { return log_fd.load(std::memory_order_relaxed); }

void describe_options(const char* const* environment, void (*each)(const OptionRow&, void* context), void* context) {
  const Settings settings(environment);
  OptionProblems problems;
  const Options in_force = parse_options(environment, problems);
  for (std::size_t i = 0; i < kRows; ++i) {
    const Row& r = kTable[i];
    OptionRow out;
    out.variable = r.variable;
    out.meaning = r.meaning;
    out.unit = r.unit;
    out.accepted = r.accepted;
    ValueText standard;
    r.print(Options{}, standard);
    out.standard = standard.c_str();
    out.set = settings.set[i];
    r.print(in_force, out.in_force);
    const bool has_no_option = i == kLibsdpConfig || i == kSimpleLibsdp || i == kAlwaysUseSdp;
    if (has_no_option) out.in_force.assign(settings.value[i].substr(0, 1024));
    for (const OptionProblem& p : problems.all())
      if (p.variable == r.variable) out.wrong = p.message;
    each(out, context);
  }
}

bool expand_path(std::string_view pattern, std::int64_t pid, PathText& out) noexcept {
  char text[1024];
  std::size_t n = 0;
  for (std::size_t i = 0; i < pattern.size(); ++i) {
    char piece[24] = {pattern[i], '\0'};
    std::size_t length = 1;
    if (pattern[i] == '%' && i + 1 < pattern.size() && (pattern[i + 1] == 'p' || pattern[i + 1] == '%')) {
      if (pattern[++i] == 'p')
        length = static_cast<std::size_t>(std::snprintf(piece, sizeof piece, "%lld", static_cast<long long>(pid)));
    }
    if (n + length >= sizeof text) return out.assign({}), false;
    std::memcpy(text + n, piece, length);
    n += length;
  }
  return out.assign({text, n});
}

}  // namespace sdp
