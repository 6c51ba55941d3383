// Policy: which connections may have a lane. Rules come from a file in libsdp's grammar, in two ordered lists, one
// for connections that were accepted and one for those that were made here.
//
//   use <tcp|sdp|both> <server|client> <program> <address|*>[/prefix]:<port|low-high|*>
//   log [destination <stderr|syslog|file NAME>] [min-level N]
//
// The first rule that matches decides. No rules: SDP_POLICY. Rules, but none that matches: both.
//
// Differences from libsdp: IPv6 addresses are understood, as [addr]:port, [addr]/prefix:port or addr/prefix:port. After a mistake
// libsdp keeps the rules read so far, so that half a file decides; here the whole file is void and everything stays on TCP.
#pragma once

#include <sys/socket.h>

#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

#include "rdma_core/base/result.hpp"
#include "sdp/options.hpp"
#include "sdp/stats.hpp"
#include "sdp/stream.hpp"

namespace sdp {

/// What `log` statements said, the last word of each kind.
struct LogStatements {
  enum class Destination : std::uint8_t { unchanged, standard_error, syslog, file };
  Destination destination = Destination::unchanged;
  std::string file;  ///< with Destination::file; as written
  bool has_level = false;
  std::uint32_t min_level = 0;  ///< libsdp's scale: 9 errors … 1 debug
};
/// Our level that shows what libsdp shows from `min_level` up.
rdma::log::Level level_from_libsdp(std::uint32_t min_level) noexcept;

/// Addresses that a rule is for. IPv4 addresses inside IPv6 ones (::ffff:a.b.c.d) are IPv4.
struct Network {
  enum class Kind : std::uint8_t { any, v4, v6 };
  Kind kind = Kind::any;
  std::uint8_t prefix = 0;     ///< bits
  std::uint8_t address[16]{};  ///< network byte order; v4 in the first four
  bool contains(const sockaddr_storage& address) const noexcept;
  /// Bits beyond the prefix are set: as in libsdp, such a network contains no address.
  bool is_empty() const noexcept;
};

struct PolicyRule {
  Family family = Family::both;
  Network network;
  std::uint16_t first_port = 0, last_port = 65535;  ///< host byte order, both included
  std::uint32_t line = 0;                           ///< where it stands
  std::string program;                              ///< shell wildcards, against the short program name
  bool matches(const char* program_name, const sockaddr_storage& address) const noexcept;
};

class PolicyRules {
 public:
  std::vector<PolicyRule> server, client;
  LogStatements log;

  bool empty() const noexcept { return server.empty() && client.empty(); }
  /// `role` unknown counts as connector. `local` decides for accepted connections, `remote` for made ones.
  Family decide(Role role, const char* program_name, const sockaddr_storage& local, const sockaddr_storage& remote,
                Family without_rules) const noexcept;
};

struct PolicyError {
  const char* file = "";               ///< as given to parse_policy
  std::uint32_t line = 0, column = 0;  ///< from 1, in bytes; 0: the file as a whole
  std::string what;                    ///< "expected …, found …", and what to do; printable
  LogStatements log;                   ///< those before the mistake: they had taken effect
};
/// "FILE:LINE:COLUMN: what".
std::string to_string(const PolicyError& error);

/// Pure. `text` is untrusted and of any length; `filename` is only for messages and must outlive the error.
rdma::Result<PolicyRules, PolicyError> parse_policy(std::string_view text, const char* filename);

/// Reads and parses. What is no regular file, is larger than 1 MiB or cannot be read is an error; never blocks on a FIFO.
rdma::Result<PolicyRules, PolicyError> load_policy(const char* filename);

// --- the process's policy

/// How this connection may be carried. The first call reads the file that options.config_file names, logs what is wrong with it and
/// does what its log statements say. Threads: any.
Family decide(const Options& options, Role role, const sockaddr_storage& local, const sockaddr_storage& remote) noexcept;

/// Why decide() says tcp: policy_tcp, or bad_settings when a mistake put everything on TCP.
LaneReason tcp_reason(const Options& options) noexcept;

}  // namespace sdp
