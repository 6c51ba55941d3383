// `sdp`: runs programs over SDP and shows what the library does.
#include <CLI/CLI.hpp>
#include <cstdio>
#include <cstring>
#include <exception>
#include <string_view>

#include "cli/commands.hpp"
#include "sdp/stats.hpp"

namespace {

struct RunOption {
  const char* flag;
  const char* variable;
  const char* help;
};
constexpr RunOption kRunOptions[] = {
    {"--policy", "SDP_POLICY", "both (a lane if one can be had), sdp or tcp"},
    {"--transport", "SDP_TRANSPORT", "auto, or a list of local, ib and rnic"},
    {"--config", "SDP_CONFIG", "file of rules in libsdp's grammar"},
    {"--stats", "SDP_STATS", "write a JSON report to this file at exit; %p is the process id"},
    {"--log", "SDP_LOG", "off, error, warn, info or debug, then perhaps :FILE"},
    {"--pcap", "SDP_PCAP", "write a capture for tshark to this file; %p is the process id"},
};

/// Where the program begins among the arguments of `sdp run`: behind our options. Everything from there on belongs to the program,
/// so the parser of our own options never sees it, however much it looks like them.
int program_index(int argc, char** argv) {
  int i = 2;
  while (i < argc) {
    const std::string_view arg = argv[i];
    if (arg == "--") return i + 1;
    if (arg.size() < 2 || arg[0] != '-') return i;
    bool takes_next = false;
    for (const RunOption& o : kRunOptions) takes_next = takes_next || arg == o.flag;
    i += takes_next ? 2 : 1;
  }
  return argc;
}

int command(int argc, char** argv) {
  CLI::App app{"Carries the TCP connections of unmodified programs over SDP.", "sdp"};
  app.set_version_flag("--version", std::string("sdp ") + sdp::library_version());
  app.require_subcommand(1);
  app.footer("Try: sdp run --stats report.json PROGRAM ARGS\n     sdp stat");

  CLI::App* run = app.add_subcommand("run", "Run a program with the library: sdp run [OPTIONS] [--] PROGRAM ARGS");
  std::string values[std::size(kRunOptions)];
  for (std::size_t i = 0; i < std::size(kRunOptions); ++i)
    run->add_option(kRunOptions[i].flag, values[i], std::string(kRunOptions[i].help) + " (" + kRunOptions[i].variable + ")");
  run->footer("Every other setting is an environment variable: see sdp env.");

  bool as_json = false;
  CLI::App* env = app.add_subcommand("env", "Show every variable: meaning, default, value in force, and what is wrong with it");
  env->add_flag("--json", as_json, "as JSON");

  std::vector<pid_t> pids;
  CLI::App* stat = app.add_subcommand("stat", "Show the TCP connections of running programs, and what carries them");
  stat->add_flag("--json", as_json, "as JSON");
  stat->add_option("PID", pids, "processes to look at; all when none is named")->check(CLI::PositiveNumber);

  CLI::App* devices = app.add_subcommand("devices", "Show the devices that can carry lanes");

  const bool is_run = argc > 1 && std::strcmp(argv[1], "run") == 0;
  const int program = is_run ? program_index(argc, argv) : argc;
  const int ours =
      is_run && program <= argc && program > 2 && std::strcmp(argv[program - 1], "--") == 0 ? program - 1 : std::min(program, argc);
  CLI11_PARSE(app, ours, argv);

  if (run->parsed()) {
    if (program >= argc) {
      std::fprintf(stderr, "sdp run: name a program: sdp run [OPTIONS] [--] PROGRAM ARGS\n");
      return 2;
    }
    std::vector<cli::Setting> settings;
    for (std::size_t i = 0; i < std::size(kRunOptions); ++i)
      if (run->count(kRunOptions[i].flag) != 0) settings.push_back({kRunOptions[i].variable, values[i]});
    return cli::run(settings, argv + program);
  }
  if (env->parsed()) return cli::env(as_json);
  if (stat->parsed()) return cli::stat(as_json, pids);
  return devices->parsed() ? cli::devices() : 2;
}

}  // namespace

int main(int argc, char** argv) {
  try {
    return command(argc, argv);
  } catch (const std::exception& e) {
    std::fprintf(stderr, "sdp: %s\n", e.what());
    return 1;
  }
}
