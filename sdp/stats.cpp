#include "sdp/stats.hpp"

#include <arpa/inet.h>
#include <fcntl.h>
#include <netinet/in.h>
#include <sys/syscall.h>

#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <new>
#include <string>

#include "rdma_core/base/log.hpp"
#include "rdma_core/base/shared_lock.hpp"
#include "rdma_core/base/sys.hpp"

namespace sdp {

namespace {

constexpr int kListed = 256;  ///< closed connections that the report names; the totals hold all

struct Sum {
  std::uint64_t lane[4] = {}, tcp[4] = {}, up = 0, down = 0, sockets = 0, lanes[4] = {}, reasons[kLaneReasons] = {};

  void take(const ConnStats& s) noexcept {
    const auto add = [](std::uint64_t(&to)[4], const Traffic& t) noexcept {
      to[0] += t.bytes_sent.get();
      to[1] += t.bytes_received.get();
      to[2] += t.messages_sent.get();
      to[3] += t.messages_received.get();
    };
    add(lane, s.lane);
    add(tcp, s.tcp);
    up += s.switches_up.get();
    down += s.switches_down.get();
    ++sockets;
    ++lanes[static_cast<int>(s.transport.load(std::memory_order_relaxed))];
    const auto reason = static_cast<int>(s.reason.load(std::memory_order_relaxed));
    if (reason != 0 && reason < kLaneReasons) ++reasons[reason];
  }
};

struct Registry {
  rdma::SharedLock lock;
  ConnStats* live = nullptr;
  ConnStats* closed = nullptr;  ///< newest first
  int closed_count = 0;
  Sum total;  ///< of closed connections
};

Registry& registry() noexcept {
  alignas(Registry) static std::byte storage[sizeof(Registry)];
  static Registry* const r = new (storage) Registry;
  return *r;
}

void unlink(ConnStats*& head, ConnStats* s) noexcept {
  for (ConnStats** p = &head; *p != nullptr; p = &(*p)->next)
    if (*p == s) {
      *p = s->next;
      return;
    }
}

void print(std::string& out, const char* format, ...) __attribute__((format(printf, 2, 3)));
void print(std::string& out, const char* format, ...) {
  char text[512];
  va_list args;
  va_start(args, format);
  std::vsnprintf(text, sizeof text, format, args);
  va_end(args);
  out += text;
}

std::string address_text(const sockaddr_storage& a) {
  char ip[INET6_ADDRSTRLEN] = "?";
  unsigned port = 0;
  if (a.ss_family == AF_INET) {
    const auto& v4 = reinterpret_cast<const sockaddr_in&>(a);
    inet_ntop(AF_INET, &v4.sin_addr, ip, sizeof ip);
    port = ntohs(v4.sin_port);
    return std::string(ip) + ":" + std::to_string(port);
  }
  if (a.ss_family == AF_INET6) {
    const auto& v6 = reinterpret_cast<const sockaddr_in6&>(a);
    inet_ntop(AF_INET6, &v6.sin6_addr, ip, sizeof ip);
    port = ntohs(v6.sin6_port);
    return "[" + std::string(ip) + "]:" + std::to_string(port);
  }
  return "";
}

void print_traffic(std::string& out, const char* name, std::uint64_t sent, std::uint64_t received) {
  print(out, "\"%s\":{\"sent\":%llu,\"received\":%llu}", name, static_cast<unsigned long long>(sent),
        static_cast<unsigned long long>(received));
}

const char* transport_text(Transport t) noexcept {
  constexpr const char* kNames[] = {"tcp", "local", "ib", "rnic"};
  return kNames[static_cast<int>(t)];
}

void print_connection(std::string& out, const ConnStats& s) {
  print(out, "{\"fd\":%d,\"local\":\"%s\",\"remote\":\"%s\",\"transport\":\"%s\",\"reason\":\"%s\",\"open\":%s,", s.fd,
        address_text(s.local).c_str(), address_text(s.remote).c_str(), transport_text(s.transport.load()),
        to_string(s.reason.load()), s.live ? "true" : "false");
  print_traffic(out, "lane", s.lane.bytes_sent.get(), s.lane.bytes_received.get());
  out += ",";
  print_traffic(out, "tcp", s.tcp.bytes_sent.get(), s.tcp.bytes_received.get());
  out += "}";
}

std::string expand(std::string_view pattern) {
  std::string path;
  for (std::size_t i = 0; i < pattern.size(); ++i) {
    if (pattern[i] == '%' && i + 1 < pattern.size() && pattern[i + 1] == 'p') {
      path += std::to_string(rdma::sys::call(SYS_getpid));
      ++i;
    } else {
      path += pattern[i];
    }
  }
  return path;
}

}  // namespace

const char* to_string(LaneReason r) noexcept {
  switch (r) {
    case LaneReason::none:
      return "none";
    case LaneReason::below_threshold:
      return "below_threshold";
    case LaneReason::policy_tcp:
      return "policy_tcp";
    case LaneReason::no_peer:
      return "no_peer";
    case LaneReason::wrong_owner:
      return "wrong_owner";
    case LaneReason::version:
      return "version";
    case LaneReason::refused:
      return "refused";
    case LaneReason::no_resources:
      return "no_resources";
    case LaneReason::foreign_use:
      return "foreign_use";
    case LaneReason::second_process:
      return "second_process";
    case LaneReason::mode:
      return "mode";
    case LaneReason::exec:
      return "exec";
    case LaneReason::peer_gone:
      return "peer_gone";
    case LaneReason::protocol_error:
      return "protocol_error";
    case LaneReason::not_tcp:
      return "not_tcp";
  }
  return "?";
}

ConnStats* acquire_stats(int fd) noexcept {
  Registry& r = registry();
  (void)r.lock.lock();
  ConnStats* s = nullptr;
  if (r.closed_count >= kListed) {
    ConnStats** last = &r.closed;
    while ((*last)->next != nullptr) last = &(*last)->next;
    s = *last;
    *last = nullptr;
    --r.closed_count;
  } else {
    s = static_cast<ConnStats*>(std::aligned_alloc(64, sizeof(ConnStats)));
  }
  if (s != nullptr) {
    new (s) ConnStats;
    s->fd = fd;
    s->live = true;
    s->next = r.live;
    r.live = s;
  }
  r.lock.unlock();
  return s;
}

void release_stats(ConnStats* s) noexcept {
  Registry& r = registry();
  (void)r.lock.lock();
  unlink(r.live, s);
  r.total.take(*s);
  s->live = false;
  s->next = r.closed;
  r.closed = s;
  ++r.closed_count;
  r.lock.unlock();
}

void forget_stats_in_child() noexcept { new (&registry()) Registry; }

void write_stats_report(const Options& options) noexcept {
  try {
    Registry& r = registry();
    std::string out;
    (void)r.lock.lock();
    Sum sum = r.total;
    for (const ConnStats* s = r.live; s != nullptr; s = s->next) sum.take(*s);
    char program[64] = "?";
    const long fd = rdma::sys::call(SYS_openat, AT_FDCWD, rdma::sys::arg("/proc/self/comm"), O_RDONLY | O_CLOEXEC);
    if (fd >= 0) {
      const long n = rdma::sys::call(SYS_read, fd, rdma::sys::arg(program), sizeof program - 1);
      program[n > 0 ? n - 1 : 0] = '\0';
      rdma::sys::call(SYS_close, fd);
    }
    for (char* c = program; *c != '\0'; ++c)
      if (*c < ' ' || *c == '"' || *c == '\\' || *c > '~') *c = '?';
    print(out, "{\"pid\":%ld,\"program\":\"%s\",\"sockets\":%llu,", rdma::sys::call(SYS_getpid), program,
          static_cast<unsigned long long>(sum.sockets));
    print(out, "\"lanes\":{\"local\":%llu,\"ib\":%llu,\"rnic\":%llu},\"bytes\":{", static_cast<unsigned long long>(sum.lanes[1]),
          static_cast<unsigned long long>(sum.lanes[2]), static_cast<unsigned long long>(sum.lanes[3]));
    print_traffic(out, "lane", sum.lane[0], sum.lane[1]);
    out += ",";
    print_traffic(out, "tcp", sum.tcp[0], sum.tcp[1]);
    out += "},\"messages\":{";
    print_traffic(out, "lane", sum.lane[2], sum.lane[3]);
    out += ",";
    print_traffic(out, "tcp", sum.tcp[2], sum.tcp[3]);
    print(out, "},\"switches\":{\"up\":%llu,\"down\":%llu},\"reasons\":{", static_cast<unsigned long long>(sum.up),
          static_cast<unsigned long long>(sum.down));
    bool first = true;
    for (int i = 1; i < kLaneReasons; ++i) {
      if (sum.reasons[i] == 0) continue;
      print(out, "%s\"%s\":%llu", first ? "" : ",", to_string(static_cast<LaneReason>(i)),
            static_cast<unsigned long long>(sum.reasons[i]));
      first = false;
    }
    out += "},\"connections\":[";
    first = true;
    for (const ConnStats* list : {static_cast<const ConnStats*>(r.live), static_cast<const ConnStats*>(r.closed)}) {
      for (const ConnStats* s = list; s != nullptr; s = s->next) {
        if (!first) out += ",";
        print_connection(out, *s);
        first = false;
      }
    }
    out += "]}\n";
    r.lock.unlock();
    const std::string path = expand(options.stats_file);
    const long file =
        rdma::sys::call(SYS_openat, AT_FDCWD, rdma::sys::arg(path.c_str()), O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0644);
    if (file < 0) {
      RDMA_LOG(error, "SDP_STATS: %s cannot be written: %s", path.c_str(), std::strerror(static_cast<int>(-file)));
      return;
    }
    std::size_t done = 0;
    while (done < out.size()) {
      const long n = rdma::sys::call(SYS_write, file, rdma::sys::arg(out.data() + done), static_cast<long>(out.size() - done));
      if (n <= 0) break;
      done += static_cast<std::size_t>(n);
    }
    rdma::sys::call(SYS_close, file);
  } catch (...) {
    RDMA_LOG(error, "SDP_STATS: no memory for the report");
  }
}

}  // namespace sdp
