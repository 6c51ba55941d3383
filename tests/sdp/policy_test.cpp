#include "sdp/policy.hpp"

#include <arpa/inet.h>
#include <netinet/in.h>
#include <sys/stat.h>
#include <unistd.h>
#include <boost/test/unit_test.hpp>

#include <cstring>
#include <fstream>
#include <string>

using namespace sdp;

namespace {

/// "1.2.3.4" or "::1".
sockaddr_storage address(const char* ip, std::uint16_t port) {
  sockaddr_storage s{};
  auto* in = reinterpret_cast<sockaddr_in*>(&s);
  auto* in6 = reinterpret_cast<sockaddr_in6*>(&s);
  if (inet_pton(AF_INET, ip, &in->sin_addr) == 1) {
    in->sin_family = AF_INET;
    in->sin_port = htons(port);
  } else {
    BOOST_REQUIRE(inet_pton(AF_INET6, ip, &in6->sin6_addr) == 1);
    in6->sin6_family = AF_INET6;
    in6->sin6_port = htons(port);
  }
  return s;
}

PolicyRules rules(const std::string& text) {
  auto result = parse_policy(text, "test.conf");
  BOOST_REQUIRE_MESSAGE(result.ok(), text + (result ? "" : to_string(result.error())));
  return std::move(*result);
}

std::string error_of(const std::string& text) {
  const auto result = parse_policy(text, "f");
  return result ? "" : to_string(result.error());
}

/// What the rules say of a client's connection to `ip`:`port`; without rules: tcp.
std::string client(const PolicyRules& r, const char* ip, std::uint16_t port, const char* program = "prog") {
  return to_string(r.decide(Role::connector, program, address("9.9.9.9", 1), address(ip, port), Family::tcp));
}
std::string server(const PolicyRules& r, const char* ip, std::uint16_t port, const char* program = "prog") {
  return to_string(r.decide(Role::acceptor, program, address(ip, port), address("9.9.9.9", 1), Family::tcp));
}

bool has(const std::string& text, const std::string& part) { return text.find(part) != std::string::npos; }

}  // namespace

// --- parsing

BOOST_AUTO_TEST_CASE(every_form_of_a_rule_is_read) {
  const PolicyRules r = rules(
      "# a comment\n"
      "\n"
      "  \t # another\n"
      "use both server * *:*\n"
      "use tcp listen sshd 10.0.0.0/8:22 # why\n"
      "\tuse\tsdp client ra?d* 192.0.2.7 : 7000 - 7010\n"
      "use both connect * *:0\n");
  BOOST_REQUIRE(r.server.size() == 2U);
  BOOST_REQUIRE(r.client.size() == 2U);
  BOOST_TEST((r.server[0].family == Family::both));
  BOOST_TEST(r.server[0].program == "*");
  BOOST_TEST((r.server[0].network.kind == Network::Kind::any));
  BOOST_TEST(r.server[0].first_port == 0);
  BOOST_TEST(r.server[0].last_port == 65535);
  BOOST_TEST(r.server[0].line == 4U);
  BOOST_TEST((r.server[1].family == Family::tcp));
  BOOST_TEST(r.server[1].network.prefix == 8);
  BOOST_TEST(r.server[1].network.address[0] == 10);
  BOOST_TEST(r.server[1].first_port == 22);
  BOOST_TEST(r.server[1].last_port == 22);
  BOOST_TEST(r.client[0].program == "ra?d*");
  BOOST_TEST(r.client[0].network.prefix == 32);
  BOOST_TEST(r.client[0].first_port == 7000);
  BOOST_TEST(r.client[0].last_port == 7010);
  BOOST_TEST(r.client[1].last_port == 0);
}

BOOST_AUTO_TEST_CASE(libsdps_shipped_file_is_read) {
  const PolicyRules r = rules("log min-level 9 destination file libsdp.log\nuse both server * *:*\nuse both client * *:*\n");
  BOOST_TEST(r.log.has_level);
  BOOST_TEST(r.log.min_level == 9U);
  BOOST_TEST((r.log.destination == LogStatements::Destination::file));
  BOOST_TEST(r.log.file == "libsdp.log");
}

BOOST_AUTO_TEST_CASE(the_scanners_oddities_are_kept) {
  // Keywords are unanchored: no blanks needed around them.
  BOOST_TEST(rules("usebothserver * *:*\n").server.size() == 1U);
  // What follows a role is a name, whatever it looks like.
  BOOST_TEST(rules("use sdp server #x 1.2.3.4:5\n").server[0].program == "#x");
  BOOST_TEST(rules("use sdp client use *:*\n").client[0].program == "use");
  BOOST_TEST(rules("log destination file #f\n").log.file == "#f");
  // A log statement may say nothing, or several things.
  BOOST_TEST(!rules("log\n").log.has_level);
  BOOST_TEST(rules("log min-level 3 min-level 4 destination syslog destination stderr\n").log.min_level == 4U);
  // Numbers have no leading zeros, keywords no capitals, statements a newline, also the last one.
  BOOST_TEST(has(error_of("use sdp server * 1.2.3.04:5\n"), "f:1:25: expected \":\" and a port"));
  BOOST_TEST(has(error_of("USE sdp server * *:*\n"), "f:1:1: expected \"use\", \"log\" or a comment, found \"USE\""));
  BOOST_TEST(has(error_of("use sdp server * *:*"), "f:1:21: expected a newline, found the end of the file"));
  // A comment or blanks need none.
  BOOST_TEST(error_of("# end") == "");
  BOOST_TEST(error_of("use sdp server * *:*\n  ") == "");
  BOOST_TEST(error_of("") == "");
  // A CRLF file is no file of rules, and is told so.
  BOOST_TEST(has(error_of("use sdp server * *:*\r\n"), "carriage return"));
}

BOOST_AUTO_TEST_CASE(ipv6_is_read_in_brackets_or_with_a_prefix) {
  for (const char* text :
       {"use tcp client * [2001:db8::]/32:80\n", "use tcp client * 2001:db8::/32:80\n", "use tcp client * 2001:db8::/32 : 80\n"}) {
    const PolicyRules r = rules(text);
    BOOST_TEST((r.client[0].network.kind == Network::Kind::v6));
    BOOST_TEST(r.client[0].network.prefix == 32);
    BOOST_TEST(client(r, "2001:db8:1::5", 80) == "tcp");
    BOOST_TEST(client(r, "2001:db9::5", 80) == "both");
    BOOST_TEST(client(r, "2001:db8:1::5", 81) == "both");
  }
  BOOST_TEST(client(rules("use tcp client * [::1]:*\n"), "::1", 1) == "tcp");
  BOOST_TEST(client(rules("use tcp client * [::1]:*\n"), "::2", 1) == "both");
  BOOST_TEST(client(rules("use tcp client * ::/0:*\n"), "::2", 1) == "tcp");
  BOOST_TEST(has(error_of("use tcp client * ::1:80\n"), "f:1:18: expected brackets or a prefix"));
  BOOST_TEST(has(error_of("use tcp client * [::1:80\n"), "\"]\""));
  BOOST_TEST(has(error_of("use tcp client * [x]:80\n"), "f:1:18: expected an IPv6 address"));
  BOOST_TEST(has(error_of("use tcp client * [::1]/129:80\n"), "f:1:24: expected a prefix length from 0 to 128"));
  BOOST_TEST(has(error_of("use tcp client * [" + std::string(500, ':') + "]:80\n"), "an IPv6 address"));
}

BOOST_AUTO_TEST_CASE(a_mistake_is_told_with_its_place_what_was_expected_and_what_to_do) {
  const struct {
    const char* text;
    const char* message;
  } wrong[] = {
      {"\n\nuse udp server * *:*\n", "f:3:5: expected \"tcp\", \"sdp\" or \"both\", found \"udp\"; write: use <tcp|sdp|both>"},
      {"use sdp peer * *:*\n", "f:1:9: expected \"server\" or \"client\", found \"peer\""},
      {"use sdp server\n", "f:1:15: expected the name of a program, or *, found the end of the line"},
      {"use sdp server *\n", "f:1:17: expected an address or *, found the end of the line"},
      {"use sdp server * *\n", "f:1:19: expected \":\" and a port after the address, found the end of the line"},
      {"use sdp server * *:\n", "f:1:20: expected a port from 0 to 65535, or *"},
      {"use sdp server * *:65536\n",
       "f:1:20: expected a port from 0 to 65535, or *, found \"65536\"; write *, a port, or a range such as 8000-8080"},
      {"use sdp server * *:10-9\n", "f:1:23: expected a last port that is not below the first"},
      {"use sdp server * *:10-\n", "f:1:23: expected the last port"},
      {"use sdp server * 1.2.3:4\n", "f:1:23: expected \".\""},
      {"use sdp server * 256.2.3.4:4\n", "f:1:18: expected an address or *, found \"256.2.3.4:4\""},
      {"use sdp server * 1.2.3.4/33:4\n", "f:1:26: expected a prefix length from 0 to 32"},
      {"use sdp server * localhost:4\n", "f:1:18: expected an address or *, found \"localhost:4\""},
      {"use sdp server * *:* use tcp\n", "f:1:22: expected the end of the line, found \"use\"; one statement a line"},
      {"log destination printer\n", "f:1:17: expected \"stderr\", \"syslog\" or \"file\", found \"printer\""},
      {"log destination file\n", "f:1:21: expected the name of a file"},
      {"log min-level high\n", "f:1:15: expected a number after \"min-level\", found \"high\""},
      {"\x1b[2J\n", "f:1:1: expected \"use\", \"log\" or a comment, found \"?[2J\""},
  };
  for (const auto& w : wrong) {
    BOOST_TEST_CONTEXT(w.text) { BOOST_TEST(error_of(w.text).starts_with(w.message), error_of(w.text)); }
  }
  BOOST_TEST(has(error_of(std::string("use\0sdp\n", 8)), "f:1:4: expected \"tcp\", \"sdp\" or \"both\", found a NUL byte"));
  const std::string huge = "use sdp server " + std::string(1 << 19, 'x') + " *:*\n";
  BOOST_TEST(has(error_of(huge), "f:1:16: expected the name of a program"));
  BOOST_TEST(error_of(huge).size() < 300U);
  BOOST_TEST(error_of(std::string(1 << 20, 'u')).size() < 300U);
}

BOOST_AUTO_TEST_CASE(log_statements_before_a_mistake_have_taken_effect) {
  const auto result = parse_policy("log min-level 7\nnonsense\nlog min-level 1\n", "f");
  BOOST_REQUIRE(!result.ok());
  BOOST_TEST(result.error().log.min_level == 7U);
}

// Goal: no input makes the parser read out of bounds or loop. Under the sanitizers this is a check of its own.
BOOST_AUTO_TEST_CASE(every_cut_and_every_changed_byte_of_a_good_file_is_rules_or_an_error) {
  const std::string good =
      "log min-level 9 destination file x\nuse both server * 10.0.0.0/8:1-2\nuse tcp client a*b [2001:db8::]/32:*\nuse sdp client "
      "* ::/0:5 # c\n";
  std::size_t accepted = 0;
  for (std::size_t n = 0; n <= good.size(); ++n) accepted += parse_policy(std::string_view(good).substr(0, n), "f").ok() ? 1U : 0U;
  BOOST_TEST(accepted > 4U);
  BOOST_TEST(accepted < good.size());
  for (std::size_t n = 0; n < good.size(); ++n) {
    for (const char c : {'\0', '\n', ' ', '*', ':', '[', '9', '#', '\xff'}) {
      std::string changed = good;
      changed[n] = c;
      const auto result = parse_policy(changed, "f");
      if (!result) BOOST_TEST((result.error().line >= 1 && result.error().line <= 5 && result.error().column >= 1));
    }
  }
}

// --- matching

BOOST_AUTO_TEST_CASE(no_rules_mean_the_default_and_no_match_means_both) {
  const PolicyRules none = rules("# nothing\nlog min-level 9\n");
  BOOST_TEST(client(none, "1.2.3.4", 80) == "tcp");
  BOOST_TEST(server(none, "1.2.3.4", 80) == "tcp");
  const PolicyRules one = rules("use sdp server * *:1\n");
  BOOST_TEST(server(one, "1.2.3.4", 1) == "sdp");
  BOOST_TEST(server(one, "1.2.3.4", 2) == "both");
  BOOST_TEST(client(one, "1.2.3.4", 1) == "both");
}

BOOST_AUTO_TEST_CASE(the_first_match_wins_and_all_fields_must_match) {
  const PolicyRules r = rules(
      "use tcp client redis* 10.1.0.0/16:6379\n"
      "use sdp client * 10.0.0.0/8:*\n"
      "use tcp client * *:*\n");
  BOOST_TEST(client(r, "10.1.2.3", 6379, "redis-cli") == "tcp");
  BOOST_TEST(client(r, "10.1.2.3", 6379, "nginx") == "sdp");
  BOOST_TEST(client(r, "10.1.2.3", 6380, "redis-cli") == "sdp");
  BOOST_TEST(client(r, "10.2.2.3", 6379, "redis-cli") == "sdp");
  BOOST_TEST(client(r, "11.1.2.3", 6379, "redis-cli") == "tcp");
  BOOST_TEST(server(r, "10.1.2.3", 6379, "redis-cli") == "both");
}

BOOST_AUTO_TEST_CASE(a_server_is_matched_by_its_own_address_a_client_by_the_destination) {
  const PolicyRules r = rules("use tcp server * 1.1.1.1:1\nuse tcp client * 1.1.1.1:1\n");
  const auto here = address("1.1.1.1", 1);
  const auto there = address("2.2.2.2", 2);
  BOOST_TEST((r.decide(Role::acceptor, "p", here, there, Family::sdp) == Family::tcp));
  BOOST_TEST((r.decide(Role::acceptor, "p", there, here, Family::sdp) == Family::both));
  BOOST_TEST((r.decide(Role::connector, "p", there, here, Family::sdp) == Family::tcp));
  BOOST_TEST((r.decide(Role::connector, "p", here, there, Family::sdp) == Family::both));
}

BOOST_AUTO_TEST_CASE(ports_are_inclusive_ranges) {
  const PolicyRules r = rules("use tcp client * *:100-200\n");
  for (const auto& [port, says] : {std::pair(99, "both"), {100, "tcp"}, {200, "tcp"}, {201, "both"}})
    BOOST_TEST(client(r, "1.2.3.4", static_cast<std::uint16_t>(port)) == says);
}

BOOST_AUTO_TEST_CASE(networks_are_matched_by_prefix_and_bits_beyond_it_match_nothing) {
  const PolicyRules r = rules("use tcp client * 192.168.130.0/23:*\n");
  BOOST_TEST(client(r, "192.168.131.255", 1) == "tcp");
  BOOST_TEST(client(r, "192.168.132.0", 1) == "both");
  BOOST_TEST(client(r, "192.168.129.255", 1) == "both");
  BOOST_TEST(client(rules("use tcp client * 0.0.0.0/0:*\n"), "8.8.8.8", 1) == "tcp");
  BOOST_TEST(client(rules("use tcp client * 0.0.0.0/0:*\n"), "::1", 1) == "both");
  const PolicyRules odd = rules("use tcp client * 192.168.1.5/24:*\n");
  BOOST_TEST(client(odd, "192.168.1.5", 1) == "both");
  BOOST_TEST(odd.client[0].network.is_empty());
  BOOST_TEST(!r.client[0].network.is_empty());
  BOOST_TEST(!rules("use tcp client * *:*\n").client[0].network.is_empty());
}

BOOST_AUTO_TEST_CASE(ipv4_inside_ipv6_is_ipv4) {
  const PolicyRules v4 = rules("use tcp client * 10.0.0.0/8:*\n");
  BOOST_TEST(client(v4, "::ffff:10.1.2.3", 1) == "tcp");
  BOOST_TEST(client(v4, "::ffff:11.1.2.3", 1) == "both");
  BOOST_TEST(client(v4, "::10.1.2.3", 1) == "both");
  const PolicyRules mapped = rules("use tcp client * [::ffff:10.0.0.0]/104:*\n");
  BOOST_TEST(client(mapped, "10.1.2.3", 1) == "tcp");
  BOOST_TEST(client(mapped, "::ffff:10.1.2.3", 1) == "tcp");
  BOOST_TEST(client(mapped, "::1", 1) == "both");
  BOOST_TEST(client(rules("use tcp client * ::/0:*\n"), "::ffff:10.1.2.3", 1) == "both");
}

BOOST_AUTO_TEST_CASE(programs_are_matched_by_shell_wildcards) {
  const PolicyRules r = rules("use tcp client n[a-g]?serv* *:*\n");
  BOOST_TEST(client(r, "1.1.1.1", 1, "netserver") == "tcp");
  BOOST_TEST(client(r, "1.1.1.1", 1, "nzxserver") == "both");
  BOOST_TEST(client(r, "1.1.1.1", 1, "") == "both");
  BOOST_TEST(client(rules("use tcp client * *:*\n"), "1.1.1.1", 1, "") == "tcp");
}

BOOST_AUTO_TEST_CASE(an_address_of_another_family_matches_only_stars) {
  sockaddr_storage unix_address{};
  unix_address.ss_family = AF_UNIX;
  BOOST_TEST(
      (rules("use tcp client * *:*\n").decide(Role::connector, "p", unix_address, unix_address, Family::sdp) == Family::tcp));
  BOOST_TEST((rules("use tcp client * 0.0.0.0/0:*\n").decide(Role::connector, "p", unix_address, unix_address, Family::sdp) ==
              Family::both));
}

BOOST_AUTO_TEST_CASE(libsdps_levels_are_mapped) {
  using rdma::log::Level;
  BOOST_TEST((level_from_libsdp(10) == Level::off));
  BOOST_TEST((level_from_libsdp(9) == Level::error));
  BOOST_TEST((level_from_libsdp(8) == Level::warn));
  BOOST_TEST((level_from_libsdp(7) == Level::info));
  BOOST_TEST((level_from_libsdp(3) == Level::info));
  BOOST_TEST((level_from_libsdp(1) == Level::debug));
  BOOST_TEST((level_from_libsdp(0) == Level::debug));
}

// --- reading files

namespace {
struct TempDir {
  char path[32] = "policy_test.XXXXXX";
  TempDir() { BOOST_REQUIRE(mkdtemp(path) != nullptr); }
  ~TempDir() { BOOST_TEST(system((std::string("rm -rf ") + path).c_str()) == 0); }
  std::string operator/(const char* name) const { return std::string(path) + "/" + name; }
};
std::string load_error(const std::string& path) {
  const auto result = load_policy(path.c_str());
  return result ? "" : to_string(result.error());
}
}  // namespace

BOOST_AUTO_TEST_CASE(a_file_is_read) {
  const TempDir dir;
  const std::string path = dir / "rules";
  std::ofstream(path) << "use tcp client * *:80\n";
  auto result = load_policy(path.c_str());
  BOOST_REQUIRE(result.ok());
  BOOST_TEST(result->client.size() == 1U);
  std::ofstream(path) << "use tcp\n";
  BOOST_TEST(load_error(path).starts_with(path + ":1:8: expected"));
  std::ofstream(path, std::ios::trunc).close();
  BOOST_TEST(load_error(path) == "");
}

BOOST_AUTO_TEST_CASE(what_is_no_file_of_rules_is_a_message_and_never_a_hang) {
  const TempDir dir;
  BOOST_TEST(has(load_error(dir / "absent"), "cannot be opened: No such file"));
  BOOST_TEST(has(load_error(dir.path), "is no regular file"));
  BOOST_REQUIRE(mkfifo((dir / "fifo").c_str(), 0600) == 0);
  BOOST_TEST(has(load_error(dir / "fifo"), "is no regular file"));
  BOOST_TEST(has(load_error("/dev/zero"), "is no regular file"));
  std::ofstream(dir / "big") << std::string((1 << 20) + 1, '#');
  BOOST_TEST(has(load_error(dir / "big"), "larger than 1 MiB"));
  std::ofstream(dir / "just") << std::string(1 << 20, '#');
  BOOST_TEST(load_error(dir / "just") == "");
  std::ofstream(dir / "binary") << std::string(100, '\0');
  BOOST_TEST(has(load_error(dir / "binary"), ":1:1: expected \"use\", \"log\" or a comment, found a NUL byte"));
}

// --- the process

BOOST_AUTO_TEST_CASE(a_policy_of_tcp_is_final_and_says_so) {
  Options o;
  o.policy = Family::tcp;
  BOOST_TEST((decide(o, Role::connector, address("1.1.1.1", 1), address("1.1.1.1", 1)) == Family::tcp));
  BOOST_TEST((tcp_reason(o) == LaneReason::policy_tcp));
  o.forced_to_tcp = "SDP_POLICY";
  BOOST_TEST((tcp_reason(o) == LaneReason::bad_settings));
}

BOOST_AUTO_TEST_CASE(rules_that_cannot_be_read_put_everything_on_tcp) {
  Options o;
  o.config_file.assign("policy_test.absent");
  BOOST_TEST((decide(o, Role::connector, address("1.1.1.1", 1), address("1.1.1.1", 1)) == Family::tcp));
  BOOST_TEST((tcp_reason(o) == LaneReason::bad_settings));
}
