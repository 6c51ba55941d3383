// Settings, read once from the environment. A wrong value is one clear line on the log; the program then runs on TCP.
//
// Threads: parse_options() may be called any time, also before constructors ran; it allocates nothing and never throws.
#pragma once

#include <cstdint>
#include <string_view>

namespace sdp {

enum class Family : std::uint8_t { both, sdp, tcp };

struct Options {
  Family policy = Family::both;
  std::uint32_t spin_us = 50;               ///< longest spin before sleeping, microseconds; 0: never spin
  std::uint32_t recv_buffer_bytes = 2048;   ///< private receive buffer at first, SDP header included
  std::uint32_t recv_buffer_max = 65536;    ///< grown to for bulk
  std::uint32_t recv_buffers_initial = 16;  ///< receive buffers at first
  std::uint32_t recv_buffers = 64;          ///< grown to under load
  std::uint32_t upgrade_messages = 8;       ///< a connection gets a lane after so many messages
  std::uint32_t upgrade_bytes = 65536;      ///< or so many bytes
  bool rnic_flavour = false;                ///< the software device plays an RNIC
  std::string_view stats_file{};            ///< "%p" is the pid; empty: no report
  std::string_view config_file{};
  std::string_view pcap_file{};
};

Options parse_options() noexcept;

/// One row per variable, for `sdp env` and the README.
struct OptionText {
  const char* variable;
  const char* meaning;
  const char* unit;
  const char* fallback;  ///< the default, as one would write it
};
const OptionText* option_texts(std::size_t* count) noexcept;

}  // namespace sdp
