// The `sdp` command, as it was built, on programs that run with and without the library.
#include <arpa/inet.h>
#include <netinet/in.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>
#include <boost/test/unit_test.hpp>
#include <nlohmann/json.hpp>

#include <fstream>
#include <string>
#include <vector>

#include "sdp/stats.hpp"

using nlohmann::json;

namespace {

const std::string kSdp = BUILD_DIR "/bin/sdp";
const std::string kLibrary = BUILD_DIR "/lib/libsdpreload.so";

struct Outcome {
  int status = -1;
  std::string out;  ///< standard output and error
};

/// Runs a program without a shell, with `environment` set besides ours.
Outcome run(std::vector<std::string> command, const std::vector<std::string>& environment = {}) {
  int ends[2];
  BOOST_REQUIRE(pipe(ends) == 0);
  const pid_t pid = fork();
  if (pid == 0) {
    dup2(ends[1], 1);
    dup2(ends[1], 2);
    close(ends[0]);
    close(ends[1]);
    for (const char* name : {"LD_PRELOAD", "SDP_POLICY", "SDP_CONFIG", "SDP_STATS", "SDP_LOG"}) unsetenv(name);
    for (const std::string& e : environment) putenv(const_cast<char*>(e.c_str()));
    std::vector<char*> argv;
    for (std::string& word : command) argv.push_back(word.data());
    argv.push_back(nullptr);
    execvp(argv[0], argv.data());
    _exit(99);
  }
  close(ends[1]);
  Outcome o;
  char buffer[4096];
  for (ssize_t n; (n = read(ends[0], buffer, sizeof buffer)) > 0;) o.out.append(buffer, static_cast<std::size_t>(n));
  close(ends[0]);
  int status = 0;
  BOOST_REQUIRE(waitpid(pid, &status, 0) == pid);
  o.status = WIFEXITED(status) ? WEXITSTATUS(status) : 128 + WTERMSIG(status);
  return o;
}

bool has(const std::string& text, const std::string& part) { return text.find(part) != std::string::npos; }

const json* find(const json& list, const char* key, const json& value) {
  for (const json& item : list)
    if (item[key] == value) return &item;
  return nullptr;
}

}  // namespace

BOOST_AUTO_TEST_CASE(version_is_the_projects) {
  const Outcome o = run({kSdp, "--version"});
  BOOST_TEST(o.status == 0);
  std::ifstream cache(BUILD_DIR "/CMakeCache.txt");
  std::string version;
  for (std::string line; std::getline(cache, line);)
    if (line.starts_with("CMAKE_PROJECT_VERSION:")) version = line.substr(line.find('=') + 1);
  BOOST_TEST(o.out == "sdp " + version + "\n");
}

// --- run

BOOST_AUTO_TEST_CASE(run_hands_arguments_over_exactly) {
  BOOST_REQUIRE_MESSAGE(access(kLibrary.c_str(), R_OK) == 0, "build the library first: " + kLibrary);
  const std::string format = "%s|";
  const std::vector<std::string> odd = {"a b", "", "--policy", "tcp", "--", "-x", "\"'\\$`*\n", "--stats=x"};
  std::vector<std::string> command = {kSdp, "run", "--policy=sdp", "--log", "error", "printf", format};
  command.insert(command.end(), odd.begin(), odd.end());
  std::string expected;
  for (const std::string& word : odd) expected += word + "|";
  BOOST_TEST(run(command).out == expected);
  BOOST_TEST(run({kSdp, "run", "--", "printf", "%s|", "--", "x"}).out == "--|x|");
  BOOST_TEST(run({kSdp, "run", "--", "--no-such-program"}).status == 127);
}

BOOST_AUTO_TEST_CASE(run_sets_what_it_is_told_and_keeps_what_is_preloaded) {
  const auto variable = [](const Outcome& o, const std::string& name) {
    const std::size_t at = ("\n" + o.out).find("\n" + name + "=");
    return at == std::string::npos ? "" : o.out.substr(at + name.size() + 1, o.out.find('\n', at) - at - name.size() - 1);
  };
  char real[PATH_MAX];
  BOOST_REQUIRE(realpath(kLibrary.c_str(), real) != nullptr);
  Outcome o = run({kSdp, "run", "--policy", "tcp", "--stats=s.%p", "--config", "/c", "/usr/bin/env"});
  BOOST_TEST(o.status == 0);
  BOOST_TEST(variable(o, "LD_PRELOAD") == real);
  BOOST_TEST(variable(o, "SDP_POLICY") == "tcp");
  BOOST_TEST(variable(o, "SDP_STATS") == "s.%p");
  BOOST_TEST(variable(o, "SDP_CONFIG") == "/c");
  BOOST_TEST(variable(o, "SDP_LOG") == "");
  o = run({kSdp, "run", "/usr/bin/env"}, {"LD_PRELOAD=libdl.so.2", "SDP_POLICY=tcp"});
  BOOST_TEST(variable(o, "LD_PRELOAD") == std::string(real) + ":libdl.so.2");
  o = run({kSdp, "run", kSdp, "run", "/usr/bin/env"}, {"SDP_POLICY=tcp"});
  BOOST_TEST(variable(o, "LD_PRELOAD") == real);
}

BOOST_AUTO_TEST_CASE(run_refuses_wrong_settings_and_says_what_cannot_be_run) {
  Outcome o = run({kSdp, "run", "--policy", "fast", "true"});
  BOOST_TEST(o.status == 2);
  BOOST_TEST(o.out == "sdp run: SDP_POLICY=fast: must be both, sdp or tcp\n");
  o = run({kSdp, "run", "no-such-program-here"});
  BOOST_TEST(o.status == 127);
  BOOST_TEST(o.out == "sdp run: no-such-program-here: No such file or directory\n");
  BOOST_TEST(run({kSdp, "run", "/"}).status == 126);
  BOOST_TEST(run({kSdp, "run"}).status == 2);
  BOOST_TEST(run({kSdp, "run", "--policy"}).status != 0);
  BOOST_TEST(run({kSdp, "run", "--nonsense", "true"}).status != 0);
  BOOST_TEST(run({kSdp, "run", "false"}).status == 1);
}

// --- env

BOOST_AUTO_TEST_CASE(env_shows_each_variable_and_what_is_wrong) {
  Outcome o = run({kSdp, "env"}, {"SDP_SPIN_US=9"});
  BOOST_TEST(o.status == 0);
  for (const char* name : {"SDP_POLICY", "SDP_TRANSPORT", "SDP_CONFIG", "LIBSDP_CONFIG_FILE", "SDP_LOG", "SDP_STATS", "SDP_PCAP",
                           "SDP_SPIN_US", "SDP_RECV_BUFFER", "SDP_UPGRADE_BYTES", "SDP_DEVICE_FLAVOUR"})
    BOOST_TEST(has(o.out, "\n" + std::string(name) + " "));
  BOOST_TEST(!has(o.out, "wrong:"));

  o = run({kSdp, "env", "--json"}, {"SDP_SPIN_US=soon", "SDP_UPGRADE_MESSAGES=1"});
  BOOST_TEST(o.status == 1);
  const json list = json::parse(o.out);
  const json* spin = find(list, "variable", "SDP_SPIN_US");
  BOOST_REQUIRE((spin != nullptr));
  BOOST_TEST((*spin)["in_force"] == "50");
  BOOST_TEST((*spin)["unit"] == "microseconds");
  BOOST_TEST(has((*spin)["wrong"], "must be a number"));
  BOOST_TEST((*find(list, "variable", "SDP_UPGRADE_MESSAGES"))["in_force"] == "1");
}

BOOST_AUTO_TEST_CASE(env_reads_the_rules_too) {
  const std::string path = "cli_test." + std::to_string(getpid()) + ".conf";
  std::ofstream(path) << "use both server * *:*\nuse maybe client * *:*\n";
  const Outcome o = run({kSdp, "env"}, {"SDP_CONFIG=" + path});
  BOOST_TEST(o.status == 1);
  BOOST_TEST(has(o.out, "wrong: " + path + ":2:5: expected \"tcp\", \"sdp\" or \"both\", found \"maybe\""), o.out);
  unlink(path.c_str());
}

// --- devices

BOOST_AUTO_TEST_CASE(devices_shows_the_software_device_in_either_flavour) {
  Outcome o = run({kSdp, "devices"});
  BOOST_TEST(o.status == 0, o.out);
  BOOST_TEST(has(o.out, "node type               ib_ca"));
  // What there is of hardware differs; that it has been looked for does not.
  BOOST_TEST((has(o.out, "this host has no RDMA device") == (access("/sys/class/infiniband", F_OK) != 0)), o.out);
  BOOST_TEST(has(run({kSdp, "devices"}, {"SDP_DEVICE_FLAVOUR=rnic"}).out, "node type               rnic"));
}

// --- stat. This process makes a table of its own, as the library would.

BOOST_AUTO_TEST_CASE(stat_shows_this_process) {
  const std::string self = std::to_string(getpid());
  const int listener = socket(AF_INET, SOCK_STREAM, 0);
  sockaddr_in address{};
  address.sin_family = AF_INET;
  address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
  BOOST_REQUIRE(bind(listener, reinterpret_cast<sockaddr*>(&address), sizeof address) == 0);
  socklen_t size = sizeof address;
  getsockname(listener, reinterpret_cast<sockaddr*>(&address), &size);
  BOOST_REQUIRE(listen(listener, 1) == 0);
  const int client = socket(AF_INET, SOCK_STREAM, 0);
  BOOST_REQUIRE(connect(client, reinterpret_cast<sockaddr*>(&address), sizeof address) == 0);

  sockaddr_storage other{};
  other.ss_family = AF_INET6;
  sdp::ConnStats* lane = sdp::acquire_stats(77);
  lane->set_addresses(other, other);
  lane->set_transport(sdp::Transport::local);
  lane->lane.bytes_sent.add(123456);
  lane->credits_send.store(5);
  sdp::ConnStats* plain = sdp::acquire_stats(client);
  plain->set_reason(sdp::LaneReason::no_peer);
  plain->tcp.bytes_received.add(9);

  Outcome o = run({kSdp, "stat", "--json", self});
  BOOST_TEST(o.status == 0, o.out);
  const json process = json::parse(o.out)["processes"][0];
  BOOST_TEST(process["pid"] == getpid());
  BOOST_TEST(process["program"] == program_invocation_short_name);
  const json* one = find(process["connections"], "fd", 77);
  const json* two = find(process["connections"], "fd", client);
  BOOST_REQUIRE((one != nullptr && two != nullptr));
  BOOST_TEST((*one)["transport"] == "local");
  BOOST_TEST((*one)["remote"] == "[::]:0");
  BOOST_TEST((*one)["lane"]["bytes_sent"] == 123456);
  BOOST_TEST((*one)["credits"]["send"] == 5);
  BOOST_TEST((*two)["transport"] == "tcp");
  BOOST_TEST((*two)["reason"] == "no_peer");
  // Its addresses come from the kernel.
  BOOST_TEST((*two)["remote"] == "127.0.0.1:" + std::to_string(ntohs(address.sin_port)));

  o = run({kSdp, "stat"});
  BOOST_TEST(has(o.out, "credits 5 to send"), o.out);
  BOOST_TEST(has(o.out, "start the peer with `sdp run` too"), o.out);
  BOOST_TEST(has(o.out, "121K"), o.out);

  sdp::release_stats(lane);
  sdp::release_stats(plain);
  BOOST_TEST(json::parse(run({kSdp, "stat", "--json", self}).out)["processes"][0]["connections"].empty());
  close(client);
  close(listener);
}

BOOST_AUTO_TEST_CASE(stat_says_why_it_shows_nothing) {
  Outcome o = run({kSdp, "stat", "4194399"});
  BOOST_TEST(o.status == 1);
  BOOST_TEST(o.out == "sdp stat: 4194399: no such process\n");
  BOOST_TEST(run({kSdp, "stat", "abc"}).status != 0);
  // A child of ours that tracks nothing holds our table open, but it is not the child's.
  (void)sdp::acquire_stats(1);
  int ends[2];
  BOOST_REQUIRE(pipe(ends) == 0);
  const pid_t child = fork();
  if (child == 0) {
    char c = 0;
    close(ends[1]);
    (void)!read(ends[0], &c, 1);
    _exit(0);
  }
  o = run({kSdp, "stat", std::to_string(child)});
  BOOST_TEST(o.status == 1);
  BOOST_TEST(has(o.out, "runs without the library"), o.out);
  close(ends[0]);
  close(ends[1]);
  BOOST_TEST(waitpid(child, nullptr, 0) == child);
}

namespace {
/// A child that holds `fd` under the table's name while the command looks; what the command printed.
Outcome stat_of_a_child_with(void (*make)(int ready)) {
  int ready[2], hold[2];
  BOOST_REQUIRE(pipe(ready) == 0);
  BOOST_REQUIRE(pipe(hold) == 0);
  const pid_t child = fork();
  if (child == 0) {
    close(hold[1]);
    close(sdp::stats_fd());
    make(ready[1]);
    char c = 0;
    (void)!read(hold[0], &c, 1);
    _exit(0);
  }
  char c = 0;
  BOOST_REQUIRE(read(ready[0], &c, 1) == 1);
  Outcome o = run({kSdp, "stat", "--json", std::to_string(child)});
  for (const int fd : {ready[0], ready[1], hold[0], hold[1]}) close(fd);
  BOOST_TEST(waitpid(child, nullptr, 0) == child);
  return o;
}
}  // namespace

BOOST_AUTO_TEST_CASE(stat_trusts_no_table) {
  const auto empty = [](int ready) {
    (void)memfd_create(sdp::kStatsName, 0);
    (void)!write(ready, "x", 1);
  };
  Outcome o = stat_of_a_child_with(empty);
  BOOST_TEST(o.status == 1);
  BOOST_TEST(has(o.out, "does not know"), o.out);

  const auto noise = [](int ready) {
    const int fd = memfd_create(sdp::kStatsName, 0);
    std::vector<char> bytes(sdp::kStatsBytes, '\xa5');
    (void)!write(fd, bytes.data(), bytes.size());
    (void)!write(ready, "x", 1);
  };
  o = stat_of_a_child_with(noise);
  BOOST_TEST(o.status == 1);
  BOOST_TEST(has(o.out, "does not know"), o.out);

  // A right header over wild slots, some of them never at rest.
  const auto wild = [](int ready) {
    const int fd = memfd_create(sdp::kStatsName, 0);
    std::vector<char> bytes(sdp::kStatsBytes, '\xfe');
    auto* h = new (bytes.data()) sdp::StatsHeader{};
    h->magic = sdp::kStatsMagic;
    h->version = sdp::kStatsVersion;
    h->slot_bytes = sizeof(sdp::ConnStats);
    h->slot_count = sdp::kStatsSlots;
    h->pid = static_cast<std::uint32_t>(getpid());
    std::memset(h->program, '\x1b', sizeof h->program);
    for (auto& word : h->used) word.store(~0ULL);
    for (std::size_t slot = 0; slot < sdp::kStatsSlots; slot += 2)
      bytes[sdp::kStatsHeaderBytes + slot * sizeof(sdp::ConnStats)] = 1;
    (void)!write(fd, bytes.data(), bytes.size());
    (void)!write(ready, "x", 1);
  };
  o = stat_of_a_child_with(wild);
  BOOST_TEST(o.status == 0, o.out);
  const json process = json::parse(o.out)["processes"][0];
  BOOST_TEST(process["program"] == std::string(64, '?'));
  BOOST_TEST(process["connections"].size() == 512U);
  BOOST_TEST(process["connections"][0]["transport"] == "tcp");
  BOOST_TEST(process["connections"][0]["reason"] == "unknown");
  BOOST_TEST(process["connections"][0]["local"] == "");
}
