#include <unistd.h>

#include <cstdio>
#include <nlohmann/json.hpp>

#include "cli/commands.hpp"
#include "cli/stats_reader.hpp"

namespace cli {
namespace {

const char* carrier_of(const sdp::ConnView& c) {
  return c.transport != 0 ? to_string(static_cast<sdp::Transport>(c.transport - 1)) : "tcp";
}

nlohmann::json traffic(const sdp::TrafficView& t) {
  return {{"bytes_sent", t.bytes_sent},
          {"bytes_received", t.bytes_received},
          {"messages_sent", t.messages_sent},
          {"messages_received", t.messages_received}};
}

nlohmann::json zero_copy(const sdp::ZeroCopyView& z) {
  return {{"adverts", z.adverts},
          {"bytes_sent", z.bytes_sent},
          {"bytes_received", z.bytes_received},
          {"cancelled", z.cancelled},
          {"refused", z.refused},
          {"unregistered", z.unregistered},
          {"bytes_written", z.bytes_written},
          {"bytes_placed", z.bytes_placed},
          {"sinks", z.sinks},
          {"sinks_cancelled", z.sinks_cancelled},
          {"sinks_unused", z.sinks_unused}};
}

nlohmann::json to_json(const ProcessStats& p) {
  nlohmann::json connections = nlohmann::json::array();
  for (const sdp::ConnView& c : p.connections) {
    connections.push_back({{"fd", c.fd},
                           {"local", c.local.c_str()},
                           {"remote", c.remote.c_str()},
                           {"transport", carrier_of(c)},
                           {"reason", to_string(c.reason)},
                           {"lane", traffic(c.lane)},
                           {"tcp", traffic(c.tcp)},
                           {"zero_copy", zero_copy(c.zero_copy)},
                           {"switches", {{"up", c.switches_up}, {"down", c.switches_down}}},
                           {"failures", {{"lanes", c.lanes_failed}, {"returned", c.lanes_returned}}},
                           {"looks", {{"again", c.looks_again}, {"to_come", c.will_look ? 1 : 0}}},
                           {"credits", {{"send", c.credits_send}, {"recv", c.credits_recv}}}});
  }
  return {{"pid", p.pid}, {"program", p.program}, {"tracked", p.tracked}, {"connections", std::move(connections)}};
}

/// 1536 as "1.5K"; three digits at the least, so that a change shows.
std::string size(std::uint64_t n) {
  static constexpr char kUnits[] = " KMGTPE";
  char text[32];
  auto value = static_cast<double>(n);
  std::size_t unit = 0;
  while (value >= 1000 && unit + 2 < sizeof kUnits) value /= 1024, ++unit;
  if (unit == 0)
    std::snprintf(text, sizeof text, "%llu", static_cast<unsigned long long>(n));
  else
    std::snprintf(text, sizeof text, "%.*f%c", value < 10 ? 2 : value < 100 ? 1 : 0, value, kUnits[unit]);
  return text;
}

std::string state_of(const sdp::ConnView& c) {
  std::string text;
  if (c.transport != 0) {
    text = "credits " + std::to_string(c.credits_send) + " to send, " + std::to_string(c.credits_recv) + " granted";
  } else {
    text = explain(c.reason);
    if (const std::string what = hint(c.reason); !what.empty()) text += " (" + what + ")";
  }
  if (c.lanes_failed != 0) {
    text += "; " + std::to_string(c.lanes_failed) + (c.lanes_failed == 1 ? " lane" : " lanes") + " failed, " +
            std::to_string(c.lanes_returned) + " came back";
  }
  if (const std::uint64_t bytes = c.zero_copy.bytes_sent + c.zero_copy.bytes_received; bytes != 0)
    text += "; " + size(bytes) + " without a copy";
  if (c.looks_again != 0) text += "; looked again " + std::to_string(c.looks_again) + (c.looks_again == 1 ? " time" : " times");
  if (c.will_look) text += "; looks for a lane again from time to time";
  return text;
}

void print(const std::vector<ProcessStats>& list) {
  std::printf("%-8s %-18s %5s  %-23s %-23s %-5s %9s %9s %9s %9s  %s\n", "PID", "PROGRAM", "FD", "LOCAL", "REMOTE", "BY", "LANE OUT",
              "LANE IN", "TCP OUT", "TCP IN", "CREDITS OR REASON");
  for (const ProcessStats& p : list) {
    if (p.connections.empty()) std::printf("%-8d %-18s %5s  %s\n", p.pid, p.program.c_str(), "-", "no open connection");
    for (const sdp::ConnView& c : p.connections) {
      std::printf("%-8d %-18s %5d  %-23s %-23s %-5s %9s %9s %9s %9s  %s\n", p.pid, p.program.c_str(), c.fd,
                  c.local.empty() ? "-" : c.local.c_str(), c.remote.empty() ? "-" : c.remote.c_str(), carrier_of(c),
                  size(c.lane.bytes_sent).c_str(), size(c.lane.bytes_received).c_str(), size(c.tcp.bytes_sent).c_str(),
                  size(c.tcp.bytes_received).c_str(), state_of(c).c_str());
    }
  }
}

const char* why_not(ReadResult r) {
  switch (r) {
    case ReadResult::found:
      break;
    case ReadResult::none:
      return "runs without the library, or has made no TCP connection yet; start it with `sdp run`";
    case ReadResult::gone:
      return "no such process";
    case ReadResult::forbidden:
      return "another user's process; look as that user or as root";
    case ReadResult::unknown:
      return "has a table that this version does not know; use the `sdp` of the library it runs with";
  }
  return "";
}

}  // namespace

int stat(bool as_json, const std::vector<pid_t>& pids) {
  std::vector<ProcessStats> found;
  unsigned forbidden = 0;
  int status = 0;
  for (const pid_t pid : pids.empty() ? all_processes() : pids) {
    ProcessStats process;
    const ReadResult result = read_process(pid, process);
    forbidden += result == ReadResult::forbidden ? 1 : 0;
    if (result == ReadResult::found) {
      found.push_back(std::move(process));
    } else if (!pids.empty() || result == ReadResult::unknown) {
      std::fprintf(stderr, "sdp stat: %d: %s\n", pid, why_not(result));
      status = 1;
    }
  }
  if (as_json) {
    nlohmann::json list = nlohmann::json::array();
    for (const ProcessStats& p : found) list.push_back(to_json(p));
    std::puts(nlohmann::json{{"processes", std::move(list)}}.dump(2, ' ', false, nlohmann::json::error_handler_t::replace).c_str());
  } else if (!found.empty()) {
    print(found);
  } else if (pids.empty()) {
    std::puts("No process that runs with the library has made a TCP connection. Start one with: sdp run PROGRAM ARGS");
    if (forbidden != 0) std::printf("(%u processes of other users could not be looked at; root can.)\n", forbidden);
  }
  return status;
}

}  // namespace cli
