#include "sdp/capture/capture.hpp"

#include <fcntl.h>
#include <netinet/in.h>
#include <sys/file.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <time.h>

#include <algorithm>
#include <cerrno>
#include <climits>
#include <cstdio>
#include <cstring>
#include <new>

#include "rdma_core/base/log.hpp"
#include "rdma_core/base/sys.hpp"
#include "sdp/capture/pcapng.hpp"
#include "sdp/wire/mid.hpp"

namespace sdp {

namespace sys = rdma::sys;

namespace {

std::int64_t clock_nanos(clockid_t clock) noexcept {
  timespec ts{};
  clock_gettime(clock, &ts);
  return static_cast<std::int64_t>(ts.tv_sec) * 1'000'000'000 + ts.tv_nsec;
}

bool expand_path(const char* path, std::int32_t pid, std::span<char> out) noexcept {
  std::size_t used = 0;
  for (const char* p = path; *p != '\0'; ++p) {
    char number[16];
    const char* text = number;
    if (p[0] == '%' && p[1] == 'p') {
      std::snprintf(number, sizeof number, "%d", pid);
      ++p;
    } else {
      if (p[0] == '%' && p[1] == '%') ++p;
      number[0] = *p;
      number[1] = '\0';
    }
    const std::size_t size = std::strlen(text);
    if (used + size >= out.size()) return false;
    std::memcpy(out.data() + used, text, size);
    used += size;
  }
  out[used] = '\0';
  return true;
}

capture::End end_of(const sockaddr_storage& address, std::uint32_t qpn) noexcept {
  capture::End end;
  // 0 and 1 belong to management: Wireshark would look for a CM datagram in every message.
  end.qpn = qpn < 2 ? 0xFFFFF0 | qpn : qpn & 0xFFFFFF;
  end.first_psn = (qpn * 0x9E3779B1u) >> 8;  // any number, but not the same for all
  if (address.ss_family == AF_INET6) {
    sockaddr_in6 v6;
    std::memcpy(&v6, &address, sizeof v6);
    std::memcpy(end.gid.data(), &v6.sin6_addr, 16);
    end.port = __builtin_bswap16(v6.sin6_port);
    return end;
  }
  std::uint32_t ip = __builtin_bswap32(INADDR_LOOPBACK);
  if (address.ss_family == AF_INET) {
    sockaddr_in v4;
    std::memcpy(&v4, &address, sizeof v4);
    ip = v4.sin_addr.s_addr;
    end.port = __builtin_bswap16(v4.sin_port);
  }
  end.gid[10] = end.gid[11] = std::byte{0xFF};
  std::memcpy(end.gid.data() + 12, &ip, 4);
  return end;
}

bool is_v4(const capture::End& end) noexcept {
  static constexpr std::byte kMapped[12] = {{}, {}, {}, {}, {}, {}, {}, {}, {}, {}, std::byte{0xFF}, std::byte{0xFF}};
  return std::memcmp(end.gid.data(), kMapped, sizeof kMapped) == 0;
}

/// Cuts the next `bytes` off the front of the two spans, which follow each other.
struct Cut {
  std::span<const std::byte> header, payload;
};
Cut cut_front(Cut& rest, std::size_t bytes) noexcept {
  const std::size_t from_header = bytes < rest.header.size() ? bytes : rest.header.size();
  const std::size_t from_payload = bytes - from_header;
  const Cut front{rest.header.first(from_header), rest.payload.first(from_payload)};
  rest = {rest.header.subspan(from_header), rest.payload.subspan(from_payload)};
  return front;
}

}  // namespace

std::unique_ptr<Capture> Capture::open(const char* path, AdoptFd adopt) noexcept {
  const auto pid = static_cast<std::int32_t>(sys::call(SYS_getpid));
  char name[PATH_MAX];
  const auto refuse = [&](const char* why, int code) noexcept {
    // The reason first: a log line that is too long is cut at its end.
    rdma::log::write(rdma::log::Level::error, "SDP_PCAP: no capture: %s%s%s: %s", why, code != 0 ? ": " : "",
                     code != 0 ? strerrordesc_np(code) : "", path);
    return nullptr;
  };
  if (!expand_path(path, pid, name)) return refuse("the name is too long", 0);

  // Non-blocking, lest a pipe without a reader hold the program up; emptied only when the file is known to be one, and ours.
  long fd = sys::call(SYS_openat, AT_FDCWD, sys::arg(name), O_WRONLY | O_CREAT | O_CLOEXEC | O_NOCTTY | O_NONBLOCK, 0600);
  if (fd < 0) return refuse("cannot open the file", static_cast<int>(-fd));
  if (adopt != nullptr) fd = adopt(static_cast<int>(fd));
  const auto refuse_open = [&](const char* why, long result) noexcept {
    sys::call(SYS_close, fd);
    return refuse(why, static_cast<int>(-result));
  };
  struct stat st {};
  if (fstat(static_cast<int>(fd), &st) != 0 || !S_ISREG(st.st_mode)) return refuse_open("not a regular file", 0);
  // A file system that knows no locks does not forbid captures.
  if (sys::call(SYS_flock, fd, LOCK_EX | LOCK_NB) == -EWOULDBLOCK)
    return refuse_open("another process writes to this file; %p in the name gives each process its own", 0);
  if (const long r = sys::call(SYS_ftruncate, fd, 0); r != 0) return refuse_open("cannot empty the file", r);

  std::unique_ptr<Capture> capture(new (std::nothrow) Capture(static_cast<int>(fd), pid, st.st_dev, st.st_ino));
  if (!capture) return refuse_open("out of memory", 0);
  return capture;
}

Capture::Capture(int fd, std::int32_t pid, std::uint64_t device, std::uint64_t inode) noexcept
    : pid_(pid), device_(device), inode_(inode), fd_(fd), last_flush_(clock_nanos(CLOCK_MONOTONIC)) {
  used_ = static_cast<std::size_t>(capture::put_file_header(buffer_.data()) - buffer_.data());
  flush_locked();
}

Capture::~Capture() { close(); }

std::uint32_t Capture::add_connection(const Endpoint& endpoint) noexcept {
  if (foreign_process()) return kNoConnection;
  const std::lock_guard lock(mutex_);
  std::uint32_t conn = 0;
  while (conn < connections_.size() && connections_[conn].used) ++conn;
  if (conn == connections_.size()) {
    try {
      connections_.emplace_back();
    } catch (const std::bad_alloc&) {
      return kNoConnection;
    }
  }
  Connection& c = connections_[conn];
  c.used = true;
  c.local = end_of(endpoint.local, endpoint.local_qpn);
  c.remote = end_of(endpoint.remote, endpoint.remote_qpn);
  c.v4 = is_v4(c.local) && is_v4(c.remote);
  c.local_psn = c.local.first_psn;
  c.remote_psn = c.remote.first_psn;
  write_cm_locked(c, endpoint.active);
  flush_locked();
  return conn;
}

void Capture::remove_connection(std::uint32_t conn) noexcept {
  if (foreign_process()) return;
  const std::lock_guard lock(mutex_);
  if (conn < connections_.size()) connections_[conn].used = false;
}

void Capture::message(std::uint32_t conn, bool outgoing, std::span<const std::byte> header,
                      std::span<const std::byte> payload) noexcept {
  if (foreign_process()) return;
  const std::lock_guard lock(mutex_);
  Connection* const known = find_locked(conn);
  if (known == nullptr) return;
  Connection& c = *known;
  const std::size_t total = header.size() + payload.size();
  if (total <= kMaxFrameBytes) {
    write_packet_locked(c, outgoing, capture::kSendOnly, header, payload);
  } else {
    Cut rest{header, payload};
    for (std::size_t left = total; left > 0;) {
      const std::size_t now = left < kSegmentBytes ? left : kSegmentBytes;
      const Cut segment = cut_front(rest, now);
      const std::uint8_t opcode = left == total ? capture::kSendFirst : left == now ? capture::kSendLast : capture::kSendMiddle;
      write_packet_locked(c, outgoing, opcode, segment.header, segment.payload);
      left -= now;
    }
  }
  const bool is_data = !header.empty() && header[0] == static_cast<std::byte>(wire::Mid::data);
  is_data ? maybe_flush_locked() : flush_locked();
}

template <class HeaderOf>
void Capture::write_packets(std::uint32_t conn, bool outgoing, std::uint8_t opcode, std::span<const std::byte> bytes,
                            HeaderOf header_of) noexcept {
  if (foreign_process()) return;
  const std::lock_guard lock(mutex_);
  Connection* const c = find_locked(conn);
  while (c != nullptr && !bytes.empty()) {
    const std::span<const std::byte> now = bytes.first(std::min(bytes.size(), kSegmentBytes));
    write_packet_locked(*c, outgoing, opcode, header_of(now.size()), now);
    bytes = bytes.subspan(now.size());
  }
  maybe_flush_locked();
}

void Capture::read_response(std::uint32_t conn, bool outgoing, std::span<const std::byte> bytes) noexcept {
  write_packets(conn, outgoing, capture::kReadResponseOnly, bytes, [](std::size_t) { return capture::kAeth; });
}

void Capture::write(std::uint32_t conn, bool outgoing, std::span<const std::byte> bytes) noexcept {
  write_packets(conn, outgoing, capture::kWriteOnly, bytes,
                [](std::size_t n) { return capture::reth(static_cast<std::uint32_t>(n)); });
}

Capture::Connection* Capture::find_locked(std::uint32_t conn) noexcept {
  return conn < connections_.size() && connections_[conn].used && fd_ >= 0 ? &connections_[conn] : nullptr;
}

void Capture::maybe_flush_locked() noexcept {
  if (clock_nanos(CLOCK_MONOTONIC) - last_flush_ >= kFlushNanos) flush_locked();
}

void Capture::flush() noexcept {
  if (foreign_process()) return;
  const std::lock_guard lock(mutex_);
  flush_locked();
}

void Capture::close() noexcept {
  if (foreign_process()) return;
  const std::lock_guard lock(mutex_);
  flush_locked();
  if (fd_ >= 0 && still_our_file_locked()) sys::call(SYS_close, fd_);
  fd_ = -1;
}

void Capture::abandon_in_child() noexcept {
  if (!foreign_process()) return;
  if (fd_ >= 0 && still_our_file_locked()) sys::call(SYS_close, fd_);
  fd_ = -1;
}

/// Asked before the mutex is taken: a fork may have copied it locked.
bool Capture::foreign_process() const noexcept { return static_cast<std::int32_t>(sys::call(SYS_getpid)) != pid_; }

void Capture::write_cm_locked(const Connection& c, bool active) noexcept {
  capture::CmExchange x;
  x.active = active ? c.local : c.remote;
  x.passive = active ? c.remote : c.local;
  x.v4 = c.v4;
  ++exchanges_;
  x.transaction = static_cast<std::uint64_t>(pid_) << 32 | exchanges_;
  x.active_id = exchanges_ << 1;
  x.passive_id = exchanges_ << 1 | 1;
  for (const auto step : {capture::CmMessage::req, capture::CmMessage::rep, capture::CmMessage::rtu}) {
    const std::size_t bytes = capture::packet_bytes(c.v4, capture::kCmPayloadBytes);
    std::byte* const block = room_locked(bytes + capture::kPacketBlockOverhead);
    if (block == nullptr) return;
    std::byte* const packet = capture::begin_packet(block, clock_nanos(CLOCK_REALTIME), bytes);
    std::byte* const end = capture::put_cm_packet(packet, x, step);
    const bool outgoing = (step == capture::CmMessage::rep) != active;
    used_ += static_cast<std::size_t>(capture::end_packet(packet, end, outgoing) - block);
  }
}

void Capture::write_packet_locked(Connection& c, bool outgoing, std::uint8_t opcode, std::span<const std::byte> header,
                                  std::span<const std::byte> payload) noexcept {
  const std::size_t size = header.size() + payload.size();
  const std::size_t bytes = capture::packet_bytes(c.v4, size);
  std::byte* const block = room_locked(bytes + capture::kPacketBlockOverhead);
  if (block == nullptr) return;
  std::byte* const packet = capture::begin_packet(block, clock_nanos(CLOCK_REALTIME), bytes);
  std::uint32_t& psn = outgoing ? c.local_psn : c.remote_psn;
  std::byte* out =
      capture::put_rc_headers(packet, c.v4, outgoing ? c.local : c.remote, outgoing ? c.remote : c.local, opcode, psn, size);
  ++psn;
  if (!header.empty()) std::memcpy(out, header.data(), header.size());
  out += header.size();
  if (!payload.empty()) std::memcpy(out, payload.data(), payload.size());
  out += payload.size();
  const std::size_t tail = capture::pad_bytes(size) + capture::kIcrcBytes;
  std::memset(out, 0, tail);
  used_ += static_cast<std::size_t>(capture::end_packet(packet, out + tail, outgoing) - block);
}

/// Null: the capture has ended.
std::byte* Capture::room_locked(std::size_t bytes) noexcept {
  static_assert(kMaxFrameBytes >= kSegmentBytes);
  static_assert(kMaxFrameBytes + capture::kMaxOverhead + capture::kPacketBlockOverhead <= kBufferBytes);
  if (used_ + bytes > buffer_.size()) flush_locked();
  return fd_ < 0 ? nullptr : buffer_.data() + used_;
}

void Capture::flush_locked() noexcept {
  if (fd_ < 0 || used_ == 0) return;
  if (!still_our_file_locked()) return stop_locked("the program has closed the file", 0);
  // A write past the program's own limit would kill it with SIGXFSZ.
  rlimit limit{RLIM_INFINITY, RLIM_INFINITY};
  sys::call(SYS_prlimit64, 0, RLIMIT_FSIZE, 0, sys::arg(&limit));
  if (limit.rlim_cur != RLIM_INFINITY && file_bytes_ + used_ > limit.rlim_cur) return stop_locked("file size limit", EFBIG);

  for (std::size_t done = 0; done < used_;) {
    const long n = sys::call(SYS_write, fd_, sys::arg(buffer_.data() + done), static_cast<long>(used_ - done));
    if (n == -EINTR) continue;
    if (n <= 0) return stop_locked("cannot write", n == 0 ? EIO : static_cast<int>(-n));
    done += static_cast<std::size_t>(n);
  }
  file_bytes_ += used_;
  used_ = 0;
  last_flush_ = clock_nanos(CLOCK_MONOTONIC);
}

bool Capture::still_our_file_locked() const noexcept {
  struct stat st {};
  return fstat(fd_, &st) == 0 && st.st_dev == device_ && st.st_ino == inode_;
}

void Capture::stop_locked(const char* why, int code) noexcept {
  rdma::log::write(rdma::log::Level::error, "SDP_PCAP: the capture ends here: %s%s%s", why, code != 0 ? ": " : "",
                   code != 0 ? strerrordesc_np(code) : "");
  if (still_our_file_locked()) sys::call(SYS_close, fd_);
  fd_ = -1;
  used_ = 0;
}

}  // namespace sdp
