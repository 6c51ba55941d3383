#include "sdp/options.hpp"

#include <fcntl.h>
#include <unistd.h>
#include <boost/test/unit_test.hpp>

#include <algorithm>
#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <map>
#include <sstream>
#include <string>
#include <vector>

using namespace sdp;

namespace {

/// Parses a list of "NAME=value".
struct Parsed {
  OptionProblems problems;
  Options options;
  explicit Parsed(std::vector<const char*> environment) {
    environment.push_back(nullptr);
    options = parse_options(environment.data(), problems);
  }
  std::string message() const {
    std::string all;
    for (const OptionProblem& p : problems.all()) all += std::string(p.variable) + ": " + p.message.c_str() + "\n";
    return all;
  }
};

std::vector<Transport> list(const TransportOrder& order) { return {order.begin(), order.end()}; }

bool has(const std::string& text, const char* part) { return text.find(part) != std::string::npos; }

}  // namespace

BOOST_AUTO_TEST_CASE(an_empty_environment_gives_the_defaults) {
  for (const Parsed& p : {Parsed({}), Parsed({"PATH=/bin", "SDP_POLICYX=tcp", "XSDP_POLICY=tcp", "SDP_POLICY"}),
                          Parsed({"SDP_POLICY=", "SDP_SPIN_US="})}) {
    BOOST_TEST(p.message() == "");
    BOOST_TEST((p.options.policy == Family::both));
    BOOST_TEST((list(p.options.transports) == std::vector{Transport::local, Transport::ib, Transport::rnic}));
    BOOST_TEST(p.options.spin_us == 50);
    BOOST_TEST(p.options.recv_buffer_bytes == 2048);
    BOOST_TEST(p.options.recv_buffer_max == 65536);
    BOOST_TEST(p.options.recv_buffers == 64);
    BOOST_TEST(p.options.zero_copy_from == 0U);
    BOOST_TEST(p.options.upgrade_messages == 8);
    BOOST_TEST(p.options.upgrade_bytes == 65536);
    BOOST_TEST(p.options.stats_file.empty());
    BOOST_TEST((p.options.forced_to_tcp == nullptr));
  }
  OptionProblems none;
  BOOST_TEST((parse_options(nullptr, none).policy == Family::both));
}

BOOST_AUTO_TEST_CASE(every_right_value_is_taken) {
  const Parsed p({"SDP_POLICY=sdp", "SDP_TRANSPORT=rnic,local", "SDP_CONFIG=/etc/a.conf", "SDP_LOG=debug:/tmp/x:%p",
                  "SDP_STATS=s.%p.json", "SDP_PCAP=c.pcapng", "SDP_SPIN_US=0", "SDP_RECV_BUFFER=4K", "SDP_RECV_BUFFER_MAX=1M",
                  "SDP_RECV_BUFFERS_INITIAL=4", "SDP_RECV_BUFFERS=128", "SDP_UPGRADE_MESSAGES=0", "SDP_UPGRADE_BYTES=128k",
                  "SDP_LANE_TIMEOUT=1", "SDP_EXIT_TIMEOUT=0", "SDP_DEVICE_FLAVOUR=rnic", "SDP_SECRET_FILE=/etc/secret",
                  "SDP_BULK_COPY=direct", "SDP_ZCOPY_THRESHOLD=256K"});
  BOOST_TEST(p.message() == "");
  BOOST_TEST(p.options.zero_copy_from == 262144U);
  BOOST_TEST(Parsed({"SDP_ZCOPY_THRESHOLD=off"}).options.zero_copy_from == 0U);
  BOOST_TEST(Parsed({"SDP_ZCOPY_THRESHOLD=0"}).message() == "");
  BOOST_TEST(p.options.secret_file.view() == "/etc/secret");
  BOOST_TEST((p.options.policy == Family::sdp));
  BOOST_TEST((list(p.options.transports) == std::vector{Transport::rnic, Transport::local}));
  BOOST_TEST(p.options.config_file.view() == "/etc/a.conf");
  BOOST_TEST((p.options.log_level == rdma::log::Level::debug));
  BOOST_TEST(p.options.log_file.view() == "/tmp/x:%p");
  BOOST_TEST(p.options.log_is_set);
  BOOST_TEST(p.options.stats_file.view() == "s.%p.json");
  BOOST_TEST(p.options.pcap_file.view() == "c.pcapng");
  BOOST_TEST(p.options.spin_us == 0);
  BOOST_TEST(p.options.recv_buffer_bytes == 4096);
  BOOST_TEST(p.options.recv_buffer_max == 1048576);
  BOOST_TEST(p.options.recv_buffers_initial == 4);
  BOOST_TEST(p.options.recv_buffers == 128);
  BOOST_TEST((p.options.bulk_copy == BulkCopy::direct));
  BOOST_TEST(p.options.upgrade_messages == 0);
  BOOST_TEST(p.options.upgrade_bytes == 131072);
  BOOST_TEST(p.options.lane_timeout_s == 1);
  BOOST_TEST(p.options.exit_timeout_s == 0);
  BOOST_TEST((p.options.device_flavour == rdma::NodeType::rnic));
}

BOOST_AUTO_TEST_CASE(a_wrong_value_is_named_with_what_is_accepted_and_the_default_holds) {
  const struct {
    const char* setting;
    const char* accepted;
  } wrong[] = {
      {"SDP_SPIN_US=fast", "a number from 0 to 1000000; 50 is used"},
      {"SDP_SPIN_US=-1", "a number from 0"},
      {"SDP_SPIN_US=1000001", "a number from 0"},
      {"SDP_SPIN_US=5 ", "a number from 0"},
      {"SDP_SPIN_US=0x10", "a number from 0"},
      {"SDP_RECV_BUFFER=3000", "a power of two from 512 to 1M; 2048 is used"},
      {"SDP_RECV_BUFFER=K", "a power of two"},
      {"SDP_RECV_BUFFER=99999999999999999999999", "a power of two"},
      {"SDP_RECV_BUFFER_MAX=2M", "a power of two"},
      {"SDP_RECV_BUFFERS=3", "a number from 4 to 128; 64 is used"},
      {"SDP_UPGRADE_BYTES=4096M", "a number from 0 to 4294967295"},
      {"SDP_LOG=loud", "off, error, warn, info or debug"},
      {"SDP_LOG=info:", "perhaps :FILE"},
      {"SDP_STATS=a\nb", "a path"},
      {"SDP_DEVICE_FLAVOUR=IB", "ib or rnic; ib is used"},
      {"SDP_ZCOPY_THRESHOLD=on", "off, or a number from 16K to 1024M; off is used"},
      {"SDP_ZCOPY_THRESHOLD=16383", "off, or a number from 16K"},
      {"SDP_ZCOPY_THRESHOLD=1025M", "off, or a number from 16K"},
      {"SDP_BULK_COPY=fast", "auto (what is faster), cached or direct; auto is used"},
  };
  for (const auto& w : wrong) {
    BOOST_TEST_CONTEXT(w.setting) {
      const Parsed p({w.setting});
      BOOST_TEST(p.problems.count == 1U);
      const std::string name(w.setting, std::strchr(w.setting, '='));
      BOOST_TEST(p.problems.item[0].variable == name);
      BOOST_TEST(has(p.message(), (name + "=").c_str()));
      BOOST_TEST(has(p.message(), w.accepted), p.message());
      BOOST_TEST((p.options.policy == Family::both));
      BOOST_TEST(p.options.spin_us == 50);
      BOOST_TEST(p.options.recv_buffer_bytes == 2048);
      BOOST_TEST(p.options.stats_file.empty());
    }
  }
}

BOOST_AUTO_TEST_CASE(a_wrong_value_that_says_how_to_carry_puts_everything_on_tcp) {
  const std::string long_path = "SDP_CONFIG=" + std::string(2000, 'x');
  for (const char* setting : {"SDP_POLICY=rdma", "SDP_POLICY=TCP", "SDP_TRANSPORT=ib;rnic", "SDP_TRANSPORT=ib,ib",
                              "SDP_TRANSPORT=local,", "SDP_TRANSPORT=,", "SDP_TRANSPORT=auto,ib", long_path.c_str()}) {
    BOOST_TEST_CONTEXT(setting) {
      const Parsed p({setting});
      BOOST_TEST((p.options.policy == Family::tcp));
      BOOST_REQUIRE((p.options.forced_to_tcp != nullptr));
      BOOST_TEST(std::string(setting).starts_with(std::string(p.options.forced_to_tcp) + "="));
      BOOST_TEST(has(p.message(), "everything stays on TCP"));
    }
  }
}

BOOST_AUTO_TEST_CASE(a_message_holds_nothing_that_a_terminal_obeys_and_is_short) {
  const std::string setting = "SDP_POLICY=\x1b[2J\n" + std::string(5000, 'y');
  const Parsed p({setting.c_str()});
  const std::string message = p.problems.item[0].message.c_str();
  BOOST_TEST(message.size() < 384U);
  BOOST_TEST(has(message, "SDP_POLICY=?[2J?yyy"));
  BOOST_TEST(has(message, "must be both, sdp or tcp"));
  for (const char c : message) BOOST_TEST((c >= ' ' && c <= '~'));
}

BOOST_AUTO_TEST_CASE(all_variables_wrong_at_once_are_all_told) {
  const Parsed p({"SDP_POLICY=x", "SDP_TRANSPORT=x", "SDP_CONFIG=\t", "LIBSDP_CONFIG_FILE=\t", "SDP_LOG=x", "SDP_STATS=\t",
                  "SDP_PCAP=\t", "SDP_SPIN_US=x", "SDP_RECV_BUFFER=x", "SDP_RECV_BUFFER_MAX=x", "SDP_RECV_BUFFERS_INITIAL=x",
                  "SDP_RECV_BUFFERS=x", "SDP_UPGRADE_MESSAGES=x", "SDP_UPGRADE_BYTES=x", "SDP_LANE_TIMEOUT=0", "SDP_EXIT_TIMEOUT=x",
                  "SDP_DEVICE_FLAVOUR=x", "SDP_BULK_COPY=x", "SDP_ZCOPY_THRESHOLD=x"});
  BOOST_TEST(p.problems.count == 19U);
}

BOOST_AUTO_TEST_CASE(libsdps_variables_are_accepted) {
  BOOST_TEST(Parsed({"LIBSDP_CONFIG_FILE=/a"}).options.config_file.view() == "/a");
  BOOST_TEST(Parsed({"LIBSDP_CONFIG_FILE=/a", "SDP_CONFIG=/b"}).options.config_file.view() == "/b");
  for (const char* simple : {"SIMPLE_LIBSDP=", "SIMPLE_LIBSDP=0", "ALWAYS_USE_SDP=1"}) {
    const Parsed p({"LIBSDP_CONFIG_FILE=/a", simple});
    BOOST_TEST(p.options.config_file.empty());
    BOOST_TEST((p.options.policy == Family::both));
    BOOST_TEST(Parsed({"SDP_CONFIG=/b", simple}).options.config_file.view() == "/b");
  }
}

BOOST_AUTO_TEST_CASE(a_first_value_and_its_limit_stay_in_order) {
  const Parsed one({"SDP_RECV_BUFFER=128K"});
  BOOST_TEST(one.message() == "");
  BOOST_TEST(one.options.recv_buffer_max == 131072);
  const Parsed other({"SDP_RECV_BUFFERS=4"});
  BOOST_TEST(other.message() == "");
  BOOST_TEST(other.options.recv_buffers_initial == 4);
  const Parsed both({"SDP_RECV_BUFFER=64K", "SDP_RECV_BUFFER_MAX=4K"});
  BOOST_TEST(both.problems.count == 1U);
  BOOST_TEST(has(both.message(), "SDP_RECV_BUFFER=65536: must not be above SDP_RECV_BUFFER_MAX=4096"));
  BOOST_TEST(both.options.recv_buffer_bytes == 2048);
  BOOST_TEST(both.options.recv_buffer_max == 65536);
}

BOOST_AUTO_TEST_CASE(a_process_logs_what_is_wrong_into_the_file_that_it_names) {
  const std::string pattern = "options_test.%p.log";
  const std::string path = "options_test." + std::to_string(getpid()) + ".log";
  unlink(path.c_str());
  setenv("SDP_LOG", ("warn:" + pattern).c_str(), 1);
  setenv("SDP_UPGRADE_MESSAGES", "forever", 1);
  const Options o = parse_options();
  BOOST_TEST(o.upgrade_messages == 8);
  BOOST_TEST(o.log_file.view().starts_with("/"));
  BOOST_TEST(std::filesystem::file_size(path) == 0U);  // nothing is said before there is a connection
  report_option_problems();
  report_option_problems();
  std::stringstream text;
  text << std::ifstream(path).rdbuf();
  BOOST_TEST(has(text.str(), "SDP_UPGRADE_MESSAGES=forever: must be a number from 0 to 4294967295; 8 is used\n"), text.str());
  const std::string lines = text.str();
  BOOST_TEST(std::count(lines.begin(), lines.end(), '\n') == 1);
  BOOST_REQUIRE(log_file_fd() > 100);
  BOOST_TEST((fcntl(log_file_fd(), F_GETFD) & FD_CLOEXEC) != 0);
  unlink(path.c_str());
  unsetenv("SDP_LOG");
  unsetenv("SDP_UPGRADE_MESSAGES");
}

BOOST_AUTO_TEST_CASE(the_table_tells_default_value_in_force_and_what_is_wrong) {
  std::map<std::string, OptionRow> rows;
  std::map<std::string, std::string> defaults;
  const char* environment[] = {"SDP_SPIN_US=7", "SDP_UPGRADE_MESSAGES=x", "SDP_POLICY=y", nullptr};
  const auto collect = [&](const OptionRow& row) {
    rows[row.variable] = row;
    defaults[row.variable] = row.standard;
    BOOST_TEST(std::string(row.meaning) != "");
    BOOST_TEST(std::string(row.accepted) != "");
  };
  describe_options(
      environment, [](const OptionRow& row, void* f) { (*static_cast<decltype(collect)*>(f))(row); },
      const_cast<void*>(static_cast<const void*>(&collect)));
  for (const char* variable : {"SDP_POLICY", "SDP_SECRET_FILE", "SDP_LANE_TIMEOUT", "SDP_EXIT_TIMEOUT", "SDP_DEVICE_FLAVOUR"})
    BOOST_TEST(rows.contains(variable), variable);
  BOOST_TEST(rows.at("SDP_SPIN_US").in_force.view() == "7");
  BOOST_TEST(defaults.at("SDP_SPIN_US") == "50");
  BOOST_TEST(rows.at("SDP_SPIN_US").set);
  BOOST_TEST(!rows.at("SDP_LOG").set);
  BOOST_TEST(rows.at("SDP_UPGRADE_MESSAGES").in_force.view() == "8");
  BOOST_TEST(!rows.at("SDP_UPGRADE_MESSAGES").wrong.empty());
  BOOST_TEST(rows.at("SDP_POLICY").in_force.view() == "tcp");
  BOOST_TEST(defaults.at("SDP_POLICY") == "both");
  BOOST_TEST(defaults.at("SDP_TRANSPORT") == "local,ib,rnic");
  BOOST_TEST(defaults.at("SDP_LOG") == "warn");
}

// Goal: what describe says is in force can be written back and brings about the same.
BOOST_AUTO_TEST_CASE(a_value_in_force_can_be_set_again) {
  std::vector<std::string> settings;
  const char* environment[] = {"SDP_TRANSPORT=rnic,ib", "SDP_LOG=info:/x",         "SDP_POLICY=sdp",
                               "SDP_RECV_BUFFER=8K",    "SDP_DEVICE_FLAVOUR=rnic", nullptr};
  describe_options(
      environment,
      [](const OptionRow& row, void* list) {
        if (!row.in_force.empty())
          static_cast<std::vector<std::string>*>(list)->push_back(std::string(row.variable) + "=" + row.in_force.c_str());
      },
      &settings);
  std::vector<const char*> again;
  for (const std::string& s : settings) again.push_back(s.c_str());
  const Parsed p(again);
  BOOST_TEST(p.message() == "");
  BOOST_TEST((list(p.options.transports) == std::vector{Transport::rnic, Transport::ib}));
  BOOST_TEST(p.options.log_file.view() == "/x");
  BOOST_TEST((p.options.policy == Family::sdp));
  BOOST_TEST(p.options.recv_buffer_bytes == 8192);
  BOOST_TEST((p.options.device_flavour == rdma::NodeType::rnic));
}

BOOST_AUTO_TEST_CASE(paths_are_expanded) {
  PathText out;
  BOOST_TEST(expand_path("a.%p.json", 42, out));
  BOOST_TEST(out.view() == "a.42.json");
  BOOST_TEST(expand_path("%p%p%%p%x%", 7, out));
  BOOST_TEST(out.view() == "77%p%x%");
  BOOST_TEST(!expand_path(std::string(1022, 'a') + "%p", 1234567, out));
  BOOST_TEST(out.empty());
}
