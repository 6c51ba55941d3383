#include "sdp/options.hpp"

#include <fcntl.h>
#include <sys/syscall.h>

#include <cstdlib>
#include <cstring>
#include <optional>

#include "rdma_core/base/log.hpp"
#include "rdma_core/base/sys.hpp"

namespace sdp {

namespace {

constexpr OptionText kTexts[] = {
    {"SDP_POLICY", "who may have a lane: both (a lane if possible), sdp, tcp (never)", "", "both"},
    {"SDP_TRANSPORT", "transports in order of preference: auto, or a list of local", "", "auto"},
    {"SDP_CONFIG", "rules in the libsdp grammar: not read yet, setting it (or LIBSDP_CONFIG_FILE) means TCP", "file", ""},
    {"SDP_LOG", "off, error, warn, info or debug; LEVEL:FILE writes to a file", "", "warn"},
    {"SDP_STATS", "JSON report at exit; %p is the process id", "file", ""},
    {"SDP_SPIN_US", "longest spin before a waiting thread sleeps; 0: never spin", "us", "50"},
    {"SDP_RECV_BUFFER", "private receive buffer at first", "bytes", "2048"},
    {"SDP_RECV_BUFFER_MAX", "private receive buffer that bulk traffic grows to", "bytes", "65536"},
    {"SDP_RECV_BUFFERS", "receive buffers that a busy lane grows to", "buffers", "64"},
    {"SDP_UPGRADE_MESSAGES", "messages a connection carries by TCP before it gets a lane", "messages", "8"},
    {"SDP_UPGRADE_BYTES", "bytes after which it gets one sooner", "bytes", "65536"},
    {"SDP_DEVICE_FLAVOUR", "what the software device plays: ib or rnic", "", "ib"},
};

const char* text_of(const char* name) noexcept {
  const char* value = std::getenv(name);
  return value != nullptr && *value != '\0' ? value : nullptr;
}

/// A copy that outlives the environment: programs such as nginx write over theirs. Parsed once, so the room is bounded.
std::string_view keep(const char* text) noexcept {
  static char room[3][4096];
  static std::size_t used = 0;
  const std::size_t length = std::strlen(text);
  if (used == std::size(room) || length >= sizeof room[0]) return {};
  std::memcpy(room[used], text, length + 1);
  return {room[used++], length};
}

std::optional<std::uint32_t> number(std::string_view text) noexcept {
  if (text.empty() || text.size() > 9) return std::nullopt;
  std::uint32_t n = 0;
  for (const char c : text) {
    if (c < '0' || c > '9') return std::nullopt;
    n = n * 10 + static_cast<std::uint32_t>(c - '0');
  }
  return n;
}

struct Parser {
  bool wrong = false;

  void complain(const char* name, const char* value, const char* accepted) noexcept {
    RDMA_LOG(error, "%s=%s is not understood: give %s. This program runs on TCP.", name, value, accepted);
    wrong = true;
  }
  void take(const char* name, std::uint32_t low, std::uint32_t high, const char* accepted, std::uint32_t& out) noexcept {
    const char* value = text_of(name);
    if (value == nullptr) return;
    const auto n = number(value);
    if (!n || *n < low || *n > high) return complain(name, value, accepted);
    out = *n;
  }
};

void set_log(Parser& parser, const char* value) noexcept {
  using rdma::log::Level;
  const std::string_view text(value);
  const std::size_t colon = text.find(':');
  const std::string_view level = text.substr(0, colon);
  constexpr std::string_view kNames[] = {"off", "error", "warn", "info", "debug"};
  for (std::size_t i = 0; i < 5; ++i) {
    if (level != kNames[i]) continue;
    rdma::log::threshold.store(static_cast<Level>(i));
    if (colon != std::string_view::npos) {
      const long fd = rdma::sys::call(SYS_openat, AT_FDCWD, rdma::sys::arg(value + colon + 1),
                                      O_WRONLY | O_CREAT | O_APPEND | O_CLOEXEC | O_NOCTTY, 0600);
      if (fd < 0) return parser.complain("SDP_LOG", value, "a level and a file that can be written");
      rdma::log::set_fd(static_cast<int>(fd));
    }
    return;
  }
  parser.complain("SDP_LOG", value, "off, error, warn, info or debug, and after a colon a file");
}

}  // namespace

const OptionText* option_texts(std::size_t* count) noexcept {
  *count = std::size(kTexts);
  return kTexts;
}

Options parse_options() noexcept {
  Options o;
  Parser parser;
  if (const char* value = text_of("SDP_LOG")) set_log(parser, value);
  if (const char* value = text_of("SDP_POLICY")) {
    const std::string_view text(value);
    if (text == "both")
      o.policy = Family::both;
    else if (text == "sdp")
      o.policy = Family::sdp;
    else if (text == "tcp")
      o.policy = Family::tcp;
    else
      parser.complain("SDP_POLICY", value, "both, sdp or tcp");
  }
  if (const char* value = text_of("SDP_TRANSPORT")) {
    const std::string_view text(value);
    if (text != "auto" && text != "local") parser.complain("SDP_TRANSPORT", value, "auto or local");
  }
  if (const char* value = text_of("SDP_DEVICE_FLAVOUR")) {
    const std::string_view text(value);
    if (text != "ib" && text != "rnic") parser.complain("SDP_DEVICE_FLAVOUR", value, "ib or rnic");
    o.rnic_flavour = text == "rnic";
  }
  parser.take("SDP_SPIN_US", 0, 1000000, "microseconds, 0 to 1000000", o.spin_us);
  parser.take("SDP_RECV_BUFFER", 256, 65536, "bytes, 256 to 65536", o.recv_buffer_bytes);
  parser.take("SDP_RECV_BUFFER_MAX", 2048, 1048576, "bytes, 2048 to 1048576", o.recv_buffer_max);
  parser.take("SDP_RECV_BUFFERS", 16, 128, "buffers, 16 to 128", o.recv_buffers);
  parser.take("SDP_UPGRADE_MESSAGES", 1, 1000000000, "messages, from 1", o.upgrade_messages);
  parser.take("SDP_UPGRADE_BYTES", 1, 999999999, "bytes, from 1", o.upgrade_bytes);
  if (o.recv_buffer_max < o.recv_buffer_bytes) o.recv_buffer_max = o.recv_buffer_bytes;
  if (const char* value = text_of("SDP_STATS")) o.stats_file = keep(value);
  if (const char* value = text_of("SDP_PCAP")) o.pcap_file = keep(value);
  if (const char* value = text_of("SDP_CONFIG"))
    o.config_file = keep(value);
  else if (const char* libsdp = text_of("LIBSDP_CONFIG_FILE"))
    o.config_file = keep(libsdp);
  if (!o.config_file.empty())
    parser.complain("SDP_CONFIG or LIBSDP_CONFIG_FILE", o.config_file.data(), "SDP_POLICY: rule files are not read yet");
  if (!o.pcap_file.empty()) RDMA_LOG(warn, "SDP_PCAP: captures are not written yet; the setting does nothing");
  if (parser.wrong) o.policy = Family::tcp;
  return o;
}

}  // namespace sdp
