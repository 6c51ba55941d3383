// Any bytes as a file of rules: nothing is read past their end, every mistake has a place in the text, and what was read can be
// asked.
#include <netinet/in.h>

#include <cstdint>
#include <memory>

#include "sdp/policy.hpp"
#include "tests/fuzz/require.hpp"

namespace {

std::size_t lines_of(std::string_view text) {
  std::size_t lines = 1;
  for (const char c : text) lines += c == '\n' ? 1U : 0U;
  return lines;
}

void check(const sdp::PolicyError& e, std::string_view text) {
  require(e.line >= 1 && e.line <= lines_of(text), "the line of a mistake is in the text");
  require(e.column >= 1 && e.column <= text.size() + 1, "so is its column");
  const std::string message = to_string(e);
  require(message.size() < 400, "a message stays short");
  for (const char c : message) require(c < 0 || (c >= ' ' && c <= '~'), "a message is printable");
}

void check(const sdp::PolicyRules& rules, std::string_view text) {
  require(rules.server.size() + rules.client.size() <= lines_of(text), "one rule a line at the most");
  sockaddr_storage v4{}, v6{};
  v4.ss_family = AF_INET;
  v6.ss_family = AF_INET6;
  for (const auto role : {sdp::Role::acceptor, sdp::Role::connector}) {
    const auto says = rules.decide(role, "program", v4, v6, sdp::Family::tcp);
    require(!rules.empty() || says == sdp::Family::tcp, "without rules the default holds");
  }
  for (const auto* list : {&rules.server, &rules.client}) {
    for (const sdp::PolicyRule& rule : *list) {
      require(rule.first_port <= rule.last_port, "a range of ports is in order");
      require(rule.network.prefix <= (rule.network.kind == sdp::Network::Kind::v4 ? 32 : 128), "a prefix fits its address");
      require(!rule.program.empty(), "a rule names a program");
      require(!rule.network.is_empty() || !rule.network.contains(v4), "an empty network contains nothing");
    }
  }
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  // A copy of its own, so that the sanitizer sees a read past the end.
  const std::unique_ptr<char[]> copy(new char[size]);
  std::copy(data, data + size, copy.get());
  const std::string_view text(copy.get(), size);
  const auto result = sdp::parse_policy(text, "file");
  if (result)
    check(result.value(), text);
  else
    check(result.error(), text);
  return 0;
}
