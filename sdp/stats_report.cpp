// The JSON report at exit. Written with a small emitter of its own: the library brings no JSON code into other people's programs.
#include <errno.h>
#include <fcntl.h>
#include <sys/stat.h>

#include <cstdio>
#include <cstring>
#include <string_view>

#include "rdma_core/base/sys.hpp"
#include "sdp/stats_process.hpp"

namespace sdp {
namespace {

namespace sys = rdma::sys;

/// JSON onto a descriptor, through a buffer. Commas come by themselves; begin and end must match.
class Json {
 public:
  explicit Json(int fd) noexcept : fd_(fd) {}

  Json& object(std::string_view key = {}) noexcept { return open(key, '{'); }
  Json& array(std::string_view key) noexcept { return open(key, '['); }
  Json& end_object() noexcept { return close('}'); }
  Json& end_array() noexcept { return close(']'); }

  Json& number(std::string_view key, std::uint64_t value) noexcept {
    return digits(key, "%llu", static_cast<unsigned long long>(value));
  }
  Json& integer(std::string_view key, std::int64_t value) noexcept { return digits(key, "%lld", static_cast<long long>(value)); }

  Json& string(std::string_view key, std::string_view value) noexcept {
    name(key);
    quoted(value);
    fresh_ = false;
    return *this;
  }

  bool finish() noexcept {
    put("\n");
    flush();
    return good_;
  }

 private:
  Json& open(std::string_view key, char bracket) noexcept {
    name(key);
    put({&bracket, 1});
    fresh_ = true;
    return *this;
  }
  Json& close(char bracket) noexcept {
    put({&bracket, 1});
    fresh_ = false;
    return *this;
  }
  template <class T>
  Json& digits(std::string_view key, const char* format, T value) noexcept {
    char text[24];
    name(key);
    put({text, static_cast<std::size_t>(std::snprintf(text, sizeof text, format, value))});
    fresh_ = false;
    return *this;
  }

  void name(std::string_view key) noexcept {
    if (!fresh_) put(",");
    if (key.empty()) return;
    quoted(key);
    put(":");
  }

  /// Bytes above ASCII are taken for Latin-1: names of programs need not be UTF-8, JSON must be.
  void quoted(std::string_view s) noexcept {
    put("\"");
    for (const char c : s) {
      const auto byte = static_cast<unsigned char>(c);
      char text[8] = {c};
      std::size_t n = 1;
      if (c == '"' || c == '\\')
        n = static_cast<std::size_t>(std::snprintf(text, sizeof text, "\\%c", c));
      else if (byte < 0x20 || byte >= 0x7f)
        n = static_cast<std::size_t>(std::snprintf(text, sizeof text, "\\u%04x", byte));
      put({text, n});
    }
    put("\"");
  }

  void put(std::string_view s) noexcept {
    if (used_ + s.size() > sizeof buffer_) flush();
    std::memcpy(buffer_ + used_, s.data(), s.size());  // pieces are short
    used_ += s.size();
  }

  void flush() noexcept {
    for (std::size_t done = 0; good_ && done < used_;) {
      const long n = sys::call(SYS_write, fd_, sys::arg(buffer_ + done), static_cast<long>(used_ - done));
      if (n > 0) done += static_cast<std::size_t>(n);
      if (n <= 0 && n != -EINTR) good_ = false;
    }
    used_ = 0;
  }

  int fd_;
  bool fresh_ = true, good_ = true;
  std::size_t used_ = 0;
  char buffer_[4096];
};

void emit_traffic(Json& out, const char* key, const TrafficView& t) noexcept {
  out.object(key);
  out.number("bytes_sent", t.bytes_sent).number("bytes_received", t.bytes_received);
  out.number("messages_sent", t.messages_sent).number("messages_received", t.messages_received);
  out.end_object();
}

void emit_zero_copy(Json& out, const ZeroCopyView& z) noexcept {
  out.object("zero_copy");
  out.number("adverts", z.adverts).number("bytes_sent", z.bytes_sent).number("bytes_received", z.bytes_received);
  out.number("cancelled", z.cancelled).number("refused", z.refused).number("unregistered", z.unregistered);
  out.number("bytes_written", z.bytes_written).number("bytes_placed", z.bytes_placed);
  out.number("sinks", z.sinks).number("sinks_cancelled", z.sinks_cancelled).number("sinks_unused", z.sinks_unused);
  out.end_object();
}

/// Connections that have not been worth a lane are tracked without their addresses; an open one can still tell them.
void complete(ConnView& c) noexcept {
  if (!c.local.empty() || c.fd < 0) return;
  ConnStats asked;
  sockaddr_storage local{}, remote{};
  socklen_t size = sizeof local;
  if (sys::call(SYS_getsockname, c.fd, sys::arg(&local), sys::arg(&size)) != 0) return;
  size = sizeof remote;
  if (sys::call(SYS_getpeername, c.fd, sys::arg(&remote), sys::arg(&size)) != 0) remote = {};
  asked.set_addresses(local, remote);
  const ConnView view = view_of(asked);
  c.local = view.local;
  c.remote = view.remote;
}

void emit_connection(Json& out, const ConnView& c, bool open) noexcept {
  out.object();
  out.integer("fd", c.fd)
      .string("state", open ? "open" : "closed")
      .string("local", c.local.view())
      .string("remote", c.remote.view());
  const bool has_lane = c.transport >= 1 && c.transport <= kTransports;
  out.string("transport", has_lane ? to_string(static_cast<Transport>(c.transport - 1)) : "tcp");
  out.string("reason", to_string(c.reason));
  emit_traffic(out, "lane", c.lane);
  emit_traffic(out, "tcp", c.tcp);
  emit_zero_copy(out, c.zero_copy);
  out.object("switches").number("up", c.switches_up).number("down", c.switches_down).end_object();
  out.object("failures").number("lanes", c.lanes_failed).number("returned", c.lanes_returned).end_object();
  out.object("looks").number("again", c.looks_again).number("to_come", c.will_look ? 1 : 0).end_object();
  out.object("credits").number("send", c.credits_send).number("recv", c.credits_recv).end_object();
  out.end_object();
}

void emit_pair(Json& out, const char* key, std::uint64_t sent, std::uint64_t received) noexcept {
  out.object(key).number("sent", sent).number("received", received).end_object();
}

void emit_totals(Json& out, const ProcessTotals& t) noexcept {
  const auto get = [](const std::atomic<std::uint64_t>& a) noexcept { return a.load(std::memory_order_relaxed); };
  out.number("sockets", get(t.sockets));
  out.object("lanes");
  for (const Transport transport : TransportOrder{})
    out.number(to_string(transport), get(t.lanes[static_cast<std::size_t>(transport)]));
  out.end_object();
  out.object("bytes");
  emit_pair(out, "lane", get(t.lane[0]), get(t.lane[2]));
  emit_pair(out, "tcp", get(t.tcp[0]), get(t.tcp[2]));
  out.end_object();
  out.object("messages");
  emit_pair(out, "lane", get(t.lane[1]), get(t.lane[3]));
  emit_pair(out, "tcp", get(t.tcp[1]), get(t.tcp[3]));
  out.end_object();
  const auto& z = t.zero_copy;
  emit_zero_copy(out, {get(z[0]), get(z[1]), get(z[2]), get(z[3]), get(z[4]), get(z[5]), get(z[6]), get(z[7]), get(z[8]), get(z[9]),
                       get(z[10])});
  out.object("switches").number("up", get(t.up)).number("down", get(t.down)).end_object();
  out.object("failures").number("lanes", get(t.failed)).number("returned", get(t.returned)).end_object();
  out.object("reasons");
  for (std::size_t r = 0; r < kLaneReasons; ++r)
    if (const std::uint64_t n = get(t.reasons[r]); n != 0) out.number(to_string(static_cast<LaneReason>(r)), n);
  out.end_object();
}

bool emit_report(int fd, const Options& options) noexcept {
  const bool own = is_own_process();
  ProcessTotals totals;
  sum_up(totals);

  Json out(fd);
  out.object();
  out.integer("pid", sys::call(SYS_getpid)).string("program", program_invocation_short_name).string("version", library_version());
  out.string("policy", to_string(options.policy));
  if (options.forced_to_tcp != nullptr) out.string("forced_to_tcp", options.forced_to_tcp);
  emit_totals(out, totals);
  out.array("connections");
  // Open ones are the newest; closed ones fill up what they leave of the limit.
  struct Rest {
    Json& out;
    std::uint64_t left;
  } rest{out, kMaxReported};
  for_each_open(
      [](const ConnStats& s, void* context) {
        auto& r = *static_cast<Rest*>(context);
        if (r.left == 0) return;
        --r.left;
        ConnView view = view_of(s);
        complete(view);
        emit_connection(r.out, view, true);
      },
      &rest);
  const ClosedConnections* closed = own ? closed_connections() : nullptr;
  for (std::uint64_t i = closed != nullptr ? closed->count : 0; i > 0 && rest.left > 0; --i, --rest.left)
    emit_connection(out, closed->item[(i - 1) % kMaxReported], false);
  out.end_array().end_object();
  return out.finish();
}

/// A new file beside the final name, then renamed: a reader finds the old report or the whole new one. What is there already and is
/// no regular file (/dev/stderr, a FIFO) is written to instead.
bool write_to(const char* path, const Options& options, long& error) noexcept {
  struct stat st {};
  if (sys::call(SYS_newfstatat, AT_FDCWD, sys::arg(path), sys::arg(&st), 0) == 0 && !S_ISREG(st.st_mode)) {
    const long fd = error = sys::call(SYS_openat, AT_FDCWD, sys::arg(path), O_WRONLY | O_CLOEXEC | O_NOCTTY | O_NONBLOCK);
    if (fd < 0) return false;
    const bool good = emit_report(static_cast<int>(fd), options);
    sys::call(SYS_close, fd);
    error = -EIO;
    return good;
  }
  char temporary[1100];
  const int n = std::snprintf(temporary, sizeof temporary, "%s.%ld.tmp", path, sys::call(SYS_getpid));
  if (n < 0 || static_cast<std::size_t>(n) >= sizeof temporary) return error = -ENAMETOOLONG, false;
  const int flags = O_WRONLY | O_CREAT | O_EXCL | O_CLOEXEC | O_NOFOLLOW;
  const long fd = error = sys::call(SYS_openat, AT_FDCWD, sys::arg(temporary), flags, 0644);
  if (fd < 0) return false;
  const bool good = emit_report(static_cast<int>(fd), options);
  sys::call(SYS_close, fd);
  error = good ? sys::call(SYS_renameat, AT_FDCWD, sys::arg(temporary), AT_FDCWD, sys::arg(path)) : -EIO;
  if (error < 0) sys::call(SYS_unlinkat, AT_FDCWD, sys::arg(temporary), 0);
  return error >= 0;
}

}  // namespace

bool write_stats_report(const Options& options) noexcept {
  PathText path;
  long error = -ENAMETOOLONG;
  if (expand_path(options.stats_file.view(), sys::call(SYS_getpid), path) && write_to(path.c_str(), options, error)) return true;
  const int saved_errno = errno;
  errno = static_cast<int>(-error);  // for %m
  RDMA_LOG(warn, "SDP_STATS: the report %s cannot be written: %m", path.c_str());
  errno = saved_errno;
  return false;
}

}  // namespace sdp
