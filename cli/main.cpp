// sdp: runs programs under the library and tells what its settings are.
#include <unistd.h>

#include <CLI/CLI.hpp>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <filesystem>
#include <string>
#include <vector>

#include "sdp/options.hpp"

namespace {

/// libsdpreload.so beside the command: ../lib of the build tree and of an installation alike.
std::string library_path() {
  std::error_code error;
  const auto self = std::filesystem::read_symlink("/proc/self/exe", error);
  const auto lib = self.parent_path().parent_path() / "lib" / "libsdpreload.so";
  return std::filesystem::exists(lib, error) ? lib.string() : std::string();
}

int run(const std::vector<std::string>& words) {
  const std::string lib = library_path();
  if (lib.empty()) {
    std::fprintf(stderr, "sdp: libsdpreload.so is not in ../lib beside this command; install or build it there\n");
    return 127;
  }
  const char* before = std::getenv("LD_PRELOAD");
  const std::string preload = before != nullptr && *before != '\0' ? lib + ":" + before : lib;
  setenv("LD_PRELOAD", preload.c_str(), 1);
  std::vector<char*> argv;
  for (const std::string& word : words) argv.push_back(const_cast<char*>(word.c_str()));
  argv.push_back(nullptr);
  execvp(argv[0], argv.data());
  std::fprintf(stderr, "sdp: %s: %s\n", argv[0], std::strerror(errno));
  return errno == ENOENT ? 127 : 126;
}

void show_settings() {
  std::size_t count = 0;
  const sdp::OptionText* texts = sdp::option_texts(&count);
  for (std::size_t i = 0; i < count; ++i) {
    const char* value = std::getenv(texts[i].variable);
    const bool set = value != nullptr && *value != '\0';
    std::printf("%-22s %s\n%22s default: %s%s%s, in force: %s%s\n", texts[i].variable, texts[i].meaning, "",
                *texts[i].fallback != '\0' ? texts[i].fallback : "none", *texts[i].unit != '\0' ? " " : "", texts[i].unit,
                set ? value : (*texts[i].fallback != '\0' ? texts[i].fallback : "none"), set ? "" : " (default)");
  }
  const sdp::Options options = sdp::parse_options();  // complains about what is wrong
  if (options.policy == sdp::Family::tcp) std::printf("With these settings every connection stays on TCP.\n");
}

}  // namespace

int main(int argc, char** argv) {
  CLI::App app{"sdp: unmodified TCP programs over the Sockets Direct Protocol"};
  app.require_subcommand(1);
  app.set_version_flag("--version", "sdp 0.1.0");

  std::string policy, stats, log;
  std::vector<std::string> words;
  CLI::App* run_command = app.add_subcommand("run", "run a program under the library");
  run_command->add_option("--policy", policy, "SDP_POLICY for this run");
  run_command->add_option("--stats", stats, "SDP_STATS for this run: a JSON report at exit");
  run_command->add_option("--log", log, "SDP_LOG for this run");
  run_command->add_option("program", words, "program and its arguments")->required();
  run_command->positionals_at_end();
  run_command->prefix_command(false);
  CLI::App* env_command = app.add_subcommand("env", "every setting: meaning, default, value in force");

  CLI11_PARSE(app, argc, argv);
  if (env_command->parsed()) {
    show_settings();
    return 0;
  }
  if (!policy.empty()) setenv("SDP_POLICY", policy.c_str(), 1);
  if (!stats.empty()) setenv("SDP_STATS", stats.c_str(), 1);
  if (!log.empty()) setenv("SDP_LOG", log.c_str(), 1);
  return run(words);
}
