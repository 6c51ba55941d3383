#include <errno.h>
#include <limits.h>
#include <unistd.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>

#include "cli/commands.hpp"
#include "sdp/options.hpp"

namespace cli {
namespace {

/// Beside this executable (build/bin, build/lib; prefix/bin, prefix/lib…). Empty: not found.
std::string find_library() {
  char self[PATH_MAX];
  const ssize_t n = readlink("/proc/self/exe", self, sizeof self - 1);
  if (n <= 0) return {};
  std::string dir(self, static_cast<std::size_t>(n));
  dir.resize(dir.rfind('/'));
  for (const char* place : {"/../lib/libsdpreload.so", "/../" SDPRELOAD_LIBDIR "/libsdpreload.so", "/libsdpreload.so"}) {
    char resolved[PATH_MAX];
    if (realpath((dir + place).c_str(), resolved) != nullptr) return resolved;
  }
  return {};
}

bool lists(const std::string& preload, const std::string& library) {
  for (std::size_t at = 0; at <= preload.size();) {
    const std::size_t end = std::min(preload.find_first_of(": ", at), preload.size());
    if (preload.compare(at, end - at, library) == 0) return true;
    at = end + 1;
  }
  return false;
}

/// The library goes first, so that its calls are the ones the program finds; what was preloaded before stays.
bool preload(const std::string& library) {
  if (library.find_first_of(": ") != std::string::npos) {
    std::fprintf(stderr, "sdp run: the loader cannot preload a path with blanks or colons: %s; install elsewhere\n",
                 library.c_str());
    return false;
  }
  const char* before = getenv("LD_PRELOAD");
  if (before == nullptr || *before == '\0') return setenv("LD_PRELOAD", library.c_str(), 1) == 0;
  if (lists(before, library)) return true;
  return setenv("LD_PRELOAD", (library + ":" + before).c_str(), 1) == 0;
}

/// What was asked for on the command line must be right; the rest of the environment is the library's to complain about.
bool check(const std::vector<Setting>& settings) {
  sdp::OptionProblems problems;
  (void)sdp::parse_options(::environ, problems);
  bool good = true;
  for (const sdp::OptionProblem& p : problems.all()) {
    for (const Setting& s : settings) {
      if (s.variable != p.variable) continue;
      // Behind the semicolon stands what the library would do about it; here the program is not started at all.
      const std::string_view what = p.message.view().substr(0, p.message.view().rfind(';'));
      std::fprintf(stderr, "sdp run: %.*s\n", static_cast<int>(what.size()), what.data());
      good = false;
    }
  }
  return good;
}

}  // namespace

int run(const std::vector<Setting>& settings, char* const* program) {
  for (const Setting& s : settings) setenv(s.variable.c_str(), s.value.c_str(), 1);
  if (!check(settings)) return 2;
  const std::string library = find_library();
  if (library.empty()) {
    std::fprintf(stderr, "sdp run: libsdpreload.so is not beside this command (../lib); build or install it\n");
    return 2;
  }
  if (!preload(library)) return 2;
  execvp(program[0], program);
  const int error = errno;
  std::fprintf(stderr, "sdp run: %s: %s\n", program[0], strerror(error));
  return error == ENOENT ? 127 : 126;
}

}  // namespace cli
