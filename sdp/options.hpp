// Options: the library's configuration, parsed once from the environment.
//
// The table in options.cpp is the only list of variables; `sdp env` prints it. A wrong value never stops the program: one line on
// the log names the variable, the value and what is accepted, and the default holds. Where the wrong value says how connections
// are to be carried (SDP_POLICY, SDP_TRANSPORT), guessing could put bytes where nobody wanted them, so everything stays on TCP.
//
// No allocation, no locale, no exception; may run before constructors. In a set-user-id program every variable is ignored.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <span>
#include <string_view>

#include "rdma_core/base/log.hpp"
#include "rdma_core/types.hpp"
#include "sdp/copy_trial.hpp"

namespace sdp {

/// How a connection may be carried.
enum class Family : std::uint8_t {
  tcp,   ///< never a lane
  sdp,   ///< by a lane only
  both,  ///< a lane if one can be had
};
const char* to_string(Family) noexcept;

/// Kinds of device, in the words of SDP_TRANSPORT.
enum class Transport : std::uint8_t { local, ib, rnic };
inline constexpr std::size_t kTransports = 3;
const char* to_string(Transport) noexcept;

/// The transports that may be used, the first that works first. By itself all of them.
struct TransportOrder {
  Transport item[kTransports] = {Transport::local, Transport::ib, Transport::rnic};
  std::uint8_t count = kTransports;

  const Transport* begin() const noexcept { return item; }
  const Transport* end() const noexcept { return item + count; }
  bool contains(Transport t) const noexcept {
    for (const Transport mine : *this)
      if (mine == t) return true;
    return false;
  }
  bool leaves_host() const noexcept { return contains(Transport::ib) || contains(Transport::rnic); }
};

/// A bounded string that needs no allocator: programs overwrite their environment (process titles), so values are copied.
template <std::size_t N>
class Text {
 public:
  /// False: too long; the text is then empty.
  bool assign(std::string_view s) noexcept {
    const bool fits = s.size() < N;
    size_ = fits ? s.size() : 0;
    if (size_ != 0) std::memcpy(data_, s.data(), size_);
    data_[size_] = '\0';
    return fits;
  }
  bool empty() const noexcept { return size_ == 0; }
  const char* c_str() const noexcept { return data_; }
  std::string_view view() const noexcept { return {data_, size_}; }

 private:
  std::size_t size_ = 0;
  char data_[N] = {};
};
using PathText = Text<1024>;

struct Options {
  Family policy = Family::both;  ///< SDP_POLICY. tcp: the library does nothing, whatever the rules say
  TransportOrder transports;     ///< SDP_TRANSPORT
  PathText config_file;          ///< SDP_CONFIG, else LIBSDP_CONFIG_FILE; empty: no rules
  rdma::log::Level log_level = rdma::log::Level::warn;
  bool log_is_set = false;                 ///< by SDP_LOG: log statements among the rules are then ignored
  PathText log_file;                       ///< empty: standard error
  PathText secret_file;                    ///< SDP_SECRET_FILE; empty: none
  PathText stats_file;                     ///< SDP_STATS; %p is the process id; empty: no report
  PathText pcap_file;                      ///< SDP_PCAP, likewise
  std::uint32_t spin_us = 50;              ///< microseconds before a waiting thread sleeps; 0: never spin
  std::uint32_t recv_buffer_bytes = 2048;  ///< of each receive buffer at first; a power of two
  std::uint32_t recv_buffer_max = 65536;   ///< bytes to which they may grow; a power of two
  std::uint32_t recv_buffers_initial = 8;  ///< receive buffers of a lane at first
  std::uint32_t recv_buffers = 64;         ///< to which their number may grow
  BulkCopy bulk_copy = BulkCopy::tried;    ///< between two processes of one host
  std::uint32_t zero_copy_from = 0;        ///< bytes of a send that the peer may read in place; 0: never
  std::uint32_t lane_timeout_s = 3;        ///< seconds after which a silent lane between hosts is looked into
  std::uint32_t exit_timeout_s = 5;        ///< seconds that exit, exec and a change of credentials wait for what is under way
  bool rings_mean_tcp = true;              ///< SDP_IO_URING: a process that has an io_uring stays on TCP
  std::uint32_t upgrade_messages = 8;      ///< messages that a connection has carried before it gets a lane; 0: at once
  std::uint32_t upgrade_bytes = 65536;     ///< or bytes; 0: at once
  rdma::NodeType device_flavour = rdma::NodeType::ib_ca;  ///< of the software device: ib_ca or rnic

  /// The variable whose wrong value put everything on TCP; nullptr if none did.
  const char* forced_to_tcp = nullptr;
};

/// What was wrong with one variable.
struct OptionProblem {
  const char* variable = "";
  Text<384> message;  ///< one line, with the value in printable form and what is accepted
};

inline constexpr std::size_t kMaxOptionProblems = 26;
struct OptionProblems {
  OptionProblem item[kMaxOptionProblems];
  std::size_t count = 0;
  std::span<const OptionProblem> all() const noexcept { return {item, count}; }
};

/// Pure: reads `environment` ("NAME=value" pointers, ended by nullptr; may itself be nullptr) and tells of no mistake but through
/// `problems`.
Options parse_options(const char* const* environment, OptionProblems& problems) noexcept;

/// The process's: parses the environment and sets log level and destination. Call it once, at load, for programs overwrite their
/// environment; keep the result. Paths become absolute, for daemons change their directory before they open a socket.
Options parse_options() noexcept;

/// Logs what parse_options() found wrong; once. Called when the program makes its first TCP connection: before, it is nobody's
/// business, and a shell script would say it from every process that it starts. Cheap when there is nothing to say.
void report_option_problems() noexcept;

/// Sets level and destination of the log. A file that cannot be opened is said on standard error.
void apply_log_options(const Options& options) noexcept;

/// The descriptor of the log file, kept for good; -1 when there is none. rdma::keep_fd() gave it, perhaps before there was a
/// keeper.
int log_file_fd() noexcept;
/// Makes `fd`, which rdma::keep_fd() gave, that descriptor.
void keep_log_file(int fd) noexcept;

/// One row of the table, as `sdp env` shows it.
struct OptionRow {
  const char* variable = "";
  const char* meaning = "";   ///< one line
  const char* unit = "";      ///< "" when it has none
  const char* accepted = "";  ///< what may be written
  const char* standard = "";  ///< the default, as it would be written
  Text<1100> in_force;        ///< the value that holds, as it would be written
  bool set = false;           ///< the environment names it
  Text<384> wrong;            ///< why its value was not taken; empty when it was
};
/// Calls `each` for every variable, in the order of the table, with the state that `environment` brings about.
void describe_options(const char* const* environment, void (*each)(const OptionRow&, void* context), void* context);

/// Copies `pattern` into `out` with %p replaced by `pid` and %% by %. False: it does not fit.
bool expand_path(std::string_view pattern, std::int64_t pid, PathText& out) noexcept;

}  // namespace sdp
