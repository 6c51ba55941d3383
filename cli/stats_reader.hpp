// Reads the statistics tables of running processes. What is in them was written by those processes: it is copied, checked and never
// trusted.
#pragma once

#include <sys/types.h>

#include <string>
#include <vector>

#include "sdp/stats_process.hpp"

namespace cli {

struct ProcessStats {
  pid_t pid = 0;
  std::string program;  ///< printable
  std::uint64_t tracked = 0;
  std::vector<sdp::ConnView> connections;
};

enum class ReadResult {
  found,
  none,       ///< the process has no table: not preloaded, or it has made no TCP connection yet
  gone,       ///< no such process
  forbidden,  ///< another user's
  unknown,    ///< a table of another version of the library, or no table at all under its name
};

ReadResult read_process(pid_t pid, ProcessStats& out);
/// Every process of this machine (of this pid namespace), in ascending order.
std::vector<pid_t> all_processes();

}  // namespace cli
