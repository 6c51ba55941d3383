#include <unistd.h>

#include <cstdio>
#include <nlohmann/json.hpp>

#include "cli/commands.hpp"
#include "sdp/options.hpp"
#include "sdp/policy.hpp"

namespace cli {
namespace {

struct Row {
  std::string variable, meaning, unit, accepted, standard, in_force, wrong;
  bool set;
};

std::vector<Row> rows() {
  std::vector<Row> out;
  sdp::describe_options(
      ::environ,
      [](const sdp::OptionRow& r, void* list) {
        static_cast<std::vector<Row>*>(list)->push_back(
            {r.variable, r.meaning, r.unit, r.accepted, r.standard, r.in_force.c_str(), r.wrong.c_str(), r.set});
      },
      &out);
  return out;
}

/// The rules are settings too: whoever asks what is in force wants to know that they are not.
void check_rules(std::vector<Row>& table) {
  sdp::OptionProblems problems;
  const sdp::Options options = sdp::parse_options(::environ, problems);
  if (options.config_file.empty()) return;
  const auto rules = sdp::load_policy(options.config_file.c_str());
  if (rules) return;
  for (Row& row : table)
    if (row.set && row.in_force == options.config_file.view() &&
        (row.variable == "SDP_CONFIG" || row.variable == "LIBSDP_CONFIG_FILE"))
      row.wrong = to_string(rules.error()) + "; everything stays on TCP";
}

const char* or_dash(const std::string& s) { return s.empty() ? "-" : s.c_str(); }

}  // namespace

int env(bool as_json) {
  std::vector<Row> table = rows();
  check_rules(table);
  bool good = true;
  for (const Row& r : table) good = good && r.wrong.empty();
  if (as_json) {
    nlohmann::json list = nlohmann::json::array();
    for (const Row& r : table) {
      nlohmann::json row = {{"variable", r.variable}, {"meaning", r.meaning},   {"unit", r.unit}, {"accepted", r.accepted},
                            {"default", r.standard},  {"in_force", r.in_force}, {"set", r.set}};
      if (!r.wrong.empty()) row["wrong"] = r.wrong;
      list.push_back(std::move(row));
    }
    std::puts(list.dump(2, ' ', false, nlohmann::json::error_handler_t::replace).c_str());
    return good ? 0 : 1;
  }
  std::printf("%-25s %-16s %-16s %s\n", "VARIABLE", "IN FORCE", "DEFAULT", "MEANING");
  for (const Row& r : table) {
    const std::string unit = r.unit.empty() ? "" : " (" + r.unit + ")";
    const std::string in_force = r.in_force + (r.set && r.wrong.empty() && !r.in_force.empty() ? " *" : "");
    std::printf("%-25s %-16s %-16s %s%s\n", r.variable.c_str(), or_dash(in_force), or_dash(r.standard), r.meaning.c_str(),
                unit.c_str());
    if (!r.wrong.empty()) std::printf("%25s wrong: %s\n", "", r.wrong.c_str());
  }
  std::printf("\n* set in this environment. `sdp env --json` also tells what each accepts.\n");
  return good ? 0 : 1;
}

}  // namespace cli
