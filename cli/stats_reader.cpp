#include "cli/stats_reader.hpp"

#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <linux/magic.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/vfs.h>
#include <unistd.h>

#include <algorithm>
#include <cstdio>
#include <cstring>
#include <fstream>
#include <memory>

namespace cli {
namespace {

struct Fd {
  int fd = -1;
  explicit Fd(int n) : fd(n) {}
  ~Fd() {
    if (fd >= 0) close(fd);
  }
  Fd(const Fd&) = delete;
  Fd& operator=(const Fd&) = delete;
};

using Dir = std::unique_ptr<DIR, int (*)(DIR*)>;

bool is_number(const char* s) { return *s != '\0' && std::strspn(s, "0123456789") == std::strlen(s); }

/// The process's id as it sees itself, in the innermost pid namespace. 0: gone.
std::uint32_t own_view_of_pid(pid_t pid) {
  std::ifstream status("/proc/" + std::to_string(pid) + "/status");
  for (std::string line; std::getline(status, line);)
    if (line.starts_with("NSpid:"))
      return static_cast<std::uint32_t>(std::strtoul(line.c_str() + line.find_last_of(" \t"), nullptr, 10));
  return 0;
}

/// Opens what /proc says is a memfd of ours. The name is looked at, then the file itself before anything can happen on opening it:
/// the process may have put a FIFO or a device there meanwhile.
int open_table(const std::string& entry) {
  const Fd look(open(entry.c_str(), O_PATH | O_CLOEXEC));
  struct stat st {};
  struct statfs fs {};
  if (look.fd < 0 || fstat(look.fd, &st) != 0 || !S_ISREG(st.st_mode) || st.st_size != static_cast<off_t>(sdp::kStatsBytes))
    return -1;
  if (fstatfs(look.fd, &fs) != 0 || fs.f_type != TMPFS_MAGIC) return -1;
  return open(("/proc/self/fd/" + std::to_string(look.fd)).c_str(), O_RDONLY | O_CLOEXEC | O_NONBLOCK);
}

bool read_fully(int fd, void* to, std::size_t bytes, off_t at) {
  for (std::size_t done = 0; done < bytes;) {
    const ssize_t n = pread(fd, static_cast<char*>(to) + done, bytes - done, at + static_cast<off_t>(done));
    if (n < 0 && errno == EINTR) continue;
    if (n <= 0) return false;
    done += static_cast<std::size_t>(n);
  }
  return true;
}

std::string printable(const char* s, std::size_t most) {
  std::string out(s, strnlen(s, most));
  for (char& c : out)
    if (c < ' ' || c > '~') c = '?';
  return out;
}

/// One slot, read until it did not change meanwhile; a writer that never ends loses its place in the list.
bool read_slot(int fd, std::size_t slot, sdp::ConnStats& copy) {
  const off_t at = static_cast<off_t>(sdp::kStatsHeaderBytes + slot * sizeof(sdp::ConnStats));
  for (int tries = 0; tries < 100; ++tries) {
    std::uint32_t after = 0;
    if (!read_fully(fd, &copy, sizeof copy, at) || !read_fully(fd, &after, sizeof after, at)) return false;
    const std::uint32_t before = copy.change.load();
    if (before % 2 == 0 && before == after) return true;
  }
  return false;
}

/// Connections that have not been worth a lane are tracked without their addresses; the kernel's list has them, by the socket's
/// inode.
class KernelList {
 public:
  explicit KernelList(pid_t pid) : proc_("/proc/" + std::to_string(pid)) {}

  void complete(sdp::ConnView& c) {
    if (!c.local.empty() || c.fd < 0) return;
    char link[64];
    const ssize_t n = readlink((proc_ + "/fd/" + std::to_string(c.fd)).c_str(), link, sizeof link - 1);
    unsigned long inode = 0;
    if (n <= 0) return;
    link[n] = '\0';
    if (std::sscanf(link, "socket:[%lu]", &inode) != 1) return;
    if (!read_) read();
    for (const Entry& e : entries_) {
      if (e.inode != inode) continue;
      c.local = e.local;
      c.remote = e.remote;
    }
  }

 private:
  struct Entry {
    unsigned long inode;
    sdp::EndpointText local, remote;
  };

  void read() {
    read_ = true;
    for (const char* file : {"/net/tcp", "/net/tcp6"}) {
      std::ifstream in(proc_ + file);
      for (std::string line; std::getline(in, line);) {
        char local[64], remote[64];
        unsigned long inode = 0;
        if (std::sscanf(line.c_str(), " %*d: %63s %63s %*x %*s %*s %*x %*d %*d %lu", local, remote, &inode) != 3 || inode == 0)
          continue;
        entries_.push_back({inode, endpoint(local), endpoint(remote)});
      }
    }
  }

  /// "0100007F:0050": words of 32 bits in host byte order, as the kernel prints them, and the port.
  static sdp::EndpointText endpoint(const char* text) {
    std::uint32_t words[4] = {};
    unsigned port = 0;
    const bool v6 = std::strcspn(text, ":") == 32;
    const int n = v6 ? std::sscanf(text, "%8x%8x%8x%8x:%x", &words[0], &words[1], &words[2], &words[3], &port)
                     : std::sscanf(text, "%8x:%x", &words[0], &port);
    if (n != (v6 ? 5 : 2)) return {};
    std::uint64_t address[2];
    std::memcpy(address, words, sizeof address);
    return sdp::format_endpoint(static_cast<std::uint64_t>(v6 ? AF_INET6 : AF_INET) << 16 | (port & 0xffff), address);
  }

  std::string proc_;
  bool read_ = false;
  std::vector<Entry> entries_;
};

ReadResult read_table(int fd, std::uint32_t owner, ProcessStats& out) {
  sdp::StatsHeader h;
  if (!read_fully(fd, &h, sizeof h, 0)) return ReadResult::unknown;
  if (h.magic != sdp::kStatsMagic || h.version != sdp::kStatsVersion || h.slot_bytes != sizeof(sdp::ConnStats) ||
      h.slot_count != sdp::kStatsSlots)
    return ReadResult::unknown;
  if (h.pid != owner) return ReadResult::none;  // inherited by fork: it is shown with its maker
  out.program = printable(h.program, sizeof h.program);
  out.tracked = h.connections.load();
  KernelList kernel(out.pid);
  for (std::size_t slot = 0; slot < sdp::kStatsSlots; ++slot) {
    if ((h.used[slot / 64].load() >> (slot % 64) & 1) == 0) continue;
    sdp::ConnStats copy;
    if (!read_slot(fd, slot, copy)) continue;
    sdp::ConnView view = sdp::view_of(copy);
    if (view.transport > sdp::kTransports) view.transport = 0;
    kernel.complete(view);
    out.connections.push_back(view);
  }
  return ReadResult::found;
}

}  // namespace

ReadResult read_process(pid_t pid, ProcessStats& out) {
  out = {};
  out.pid = pid;
  const std::string dir = "/proc/" + std::to_string(pid) + "/fd";
  const Dir fds(opendir(dir.c_str()), closedir);
  if (fds == nullptr) return errno == EACCES || errno == EPERM ? ReadResult::forbidden : ReadResult::gone;
  const std::string ours = std::string("/memfd:") + sdp::kStatsName + " (deleted)";
  ReadResult result = ReadResult::none;
  while (const dirent* e = readdir(fds.get())) {
    char link[128];
    const std::string entry = dir + "/" + e->d_name;
    const ssize_t n = is_number(e->d_name) ? readlink(entry.c_str(), link, sizeof link) : -1;
    if (n < 0 || ours.compare(0, ours.npos, link, static_cast<std::size_t>(n)) != 0) continue;
    const Fd table(open_table(entry));
    const ReadResult here = table.fd < 0 ? ReadResult::unknown : read_table(table.fd, own_view_of_pid(pid), out);
    if (here != ReadResult::none) result = here;  // its parent's table may be open beside its own
    if (result == ReadResult::found) break;
  }
  return result;
}

std::vector<pid_t> all_processes() {
  std::vector<pid_t> pids;
  const Dir proc(opendir("/proc"), closedir);
  while (const dirent* e = proc != nullptr ? readdir(proc.get()) : nullptr)
    if (is_number(e->d_name)) pids.push_back(static_cast<pid_t>(std::strtol(e->d_name, nullptr, 10)));
  std::sort(pids.begin(), pids.end());
  return pids;
}

}  // namespace cli
