// The commands of `sdp`. Each returns the exit status.
#pragma once

#include <sys/types.h>

#include <string>
#include <vector>

namespace cli {

/// One variable that `sdp run` sets for the program.
struct Setting {
  std::string variable, value;
};

/// Becomes `program` with our library preloaded. Returns only when that fails: 127 not found, 126 not executable, 2 wrong settings.
int run(const std::vector<Setting>& settings, char* const* program);
int env(bool as_json);
int stat(bool as_json, const std::vector<pid_t>& pids);
int devices();

}  // namespace cli
