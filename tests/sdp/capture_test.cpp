// Captures are judged by the reader they are made for: stock tshark has to find SDP in them, field by field.
#include <arpa/inet.h>
#include <fcntl.h>
#include <netinet/in.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

#include <atomic>
#include <boost/test/unit_test.hpp>
#include <csignal>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <sstream>
#include <string>
#include <thread>
#include <vector>

#include "rdma_core/base/log.hpp"
#include "sdp/capture/capture.hpp"
#include "sdp/wire/avail.hpp"
#include "sdp/wire/bsdh.hpp"
#include "sdp/wire/hello.hpp"
#include "sdp/wire/recv_buf.hpp"

using namespace sdp;
using wire::Bsdh;
using wire::Mid;
using Row = std::vector<std::string>;

namespace {

class TempDir {
 public:
  TempDir() {
    char name[] = "/tmp/sdp_capture_XXXXXX";
    BOOST_REQUIRE(::mkdtemp(name) != nullptr);
    path_ = name;
  }
  ~TempDir() { std::filesystem::remove_all(path_); }
  std::string file(const std::string& name) const { return path_ + "/" + name; }

 private:
  std::string path_;
};

/// The rows that tshark prints for `fields` of the packets that `filter` lets through.
std::vector<Row> tshark(const std::string& file, const std::string& filter, const std::vector<std::string>& fields) {
  if (std::system("command -v tshark >/dev/null 2>&1") != 0)
    BOOST_FAIL("tshark is not installed, and only it can tell whether captures decode: run scripts/test, or apt install tshark");
  std::string command = "tshark -n -2 -r '" + file + "' -Y '" + filter + "' -T fields -E separator='|' -E occurrence=f";
  for (const std::string& field : fields) command += " -e " + field;
  command += " 2>/dev/null";
  std::FILE* out = ::popen(command.c_str(), "r");
  BOOST_REQUIRE(out != nullptr);
  std::string text;
  char chunk[4096];
  for (std::size_t n; (n = std::fread(chunk, 1, sizeof chunk, out)) > 0;) text.append(chunk, n);
  BOOST_REQUIRE_MESSAGE(::pclose(out) == 0, "failed: " << command);
  std::vector<Row> rows;
  std::istringstream lines(text);
  for (std::string line; std::getline(lines, line);) {
    Row row(1);
    for (char c : line) {
      if (c == '|')
        row.emplace_back();
      else
        row.back() += c;
    }
    rows.push_back(row);
  }
  return rows;
}

/// Packets at which an SDP message starts; the CM's datagrams have another opcode.
const std::string kMessages = "infiniband_sdp && infiniband.bth.opcode in {0,4}";
const std::vector<std::string> kBsdhFields = {"infiniband_sdp.bsdh.mid",  "infiniband_sdp.bsdh.flags",
                                              "infiniband_sdp.bsdh.bufs", "infiniband_sdp.bsdh.len",
                                              "infiniband_sdp.bsdh.mseq", "infiniband_sdp.bsdh.mseqack"};

/// Fields come as decimal or 0x numbers, depending on their display.
std::vector<unsigned long> numbers(const Row& row) {
  std::vector<unsigned long> out;
  for (const std::string& text : row) {
    BOOST_REQUIRE_MESSAGE(!text.empty(), "tshark shows no value");
    out.push_back(std::stoul(text, nullptr, 0));
  }
  return out;
}

sockaddr_storage address(const char* text, std::uint16_t port) {
  sockaddr_storage out{};
  if (std::strchr(text, ':') != nullptr) {
    auto* v6 = reinterpret_cast<sockaddr_in6*>(&out);
    v6->sin6_family = AF_INET6;
    v6->sin6_port = htons(port);
    BOOST_REQUIRE(inet_pton(AF_INET6, text, &v6->sin6_addr) == 1);
  } else {
    auto* v4 = reinterpret_cast<sockaddr_in*>(&out);
    v4->sin_family = AF_INET;
    v4->sin_port = htons(port);
    BOOST_REQUIRE(inet_pton(AF_INET, text, &v4->sin_addr) == 1);
  }
  return out;
}

/// Writes messages and remembers what tshark has to say of each.
class Script {
 public:
  Script(Capture& capture, const Capture::Endpoint& endpoint) : capture_(capture), conn_(capture.add_connection(endpoint)) {}

  void send(bool outgoing, Bsdh h, std::size_t payload_bytes = 0) {
    std::vector<std::byte> header(wire::payload_offset(h.mid));
    const std::vector<std::byte> payload(payload_bytes, std::byte{0x5A});
    h.len = static_cast<std::uint32_t>(header.size() + payload.size());
    wire::emit_bsdh(h, header.data());
    add(outgoing, header, payload);
  }
  void add(bool outgoing, std::span<const std::byte> header, std::span<const std::byte> payload = {}) {
    const auto view = wire::BsdhView::checked(header);
    expected.push_back({view->mid(), view->flags(), view->bufs(), view->len(), view->mseq(), view->mseq_ack()});
    capture_.message(conn_, outgoing, header, payload);
  }
  std::uint32_t conn() const { return conn_; }
  std::vector<std::vector<unsigned long>> expected;

 private:
  Capture& capture_;
  std::uint32_t conn_;
};

void check_decoded(const std::string& file, const std::vector<std::vector<unsigned long>>& expected) {
  const auto rows = tshark(file, kMessages, kBsdhFields);
  BOOST_REQUIRE(rows.size() == expected.size());
  for (std::size_t i = 0; i < rows.size(); ++i) BOOST_TEST(numbers(rows[i]) == expected[i], boost::test_tools::per_element());
}

wire::HelloHeader hello() {
  wire::HelloHeader h;
  h.max_adverts = 9;
  h.desired_remote_rcv_size = 65552;
  h.local_rcv_size = 32784;
  h.local_port = 40001;
  h.src_ip = wire::hello_ip_from_v4(inet_addr("10.1.2.3"));
  h.dst_ip = wire::hello_ip_from_v4(inet_addr("10.1.2.4"));
  h.ext_max_adverts = 300;
  return h;
}

void greet(Script& script, bool active) {
  std::array<std::byte, wire::kHelloBytes> first;
  wire::emit_hello(hello(), 8, first);
  script.add(active, first);
  std::array<std::byte, wire::kHelloAckBytes> second;
  wire::emit_hello_ack({.max_adverts = 1, .actual_rcv_size = 32784}, 16, second);
  script.add(!active, second);
}

/// One short life of a lane, seen from either side.
void converse(Script& script, bool active) {
  greet(script, active);
  script.send(active, {.mid = Mid::data, .flags = wire::kOobPres | wire::kOobPend, .bufs = 8, .mseq = 1, .mseq_ack = 0}, 1);
  script.send(active, {.mid = Mid::data, .bufs = 8, .mseq = 2, .mseq_ack = 0}, 4096);
  script.send(!active, {.mid = Mid::data, .bufs = 64, .mseq = 1, .mseq_ack = 2});  // pure credit update
  script.send(!active, {.mid = Mid::data, .bufs = 63, .mseq = 2, .mseq_ack = 2}, 32768);
  script.send(active, {.mid = Mid::disconn, .bufs = 7, .mseq = 3, .mseq_ack = 2});
  script.send(!active, {.mid = Mid::disconn, .flags = wire::kReqPipe, .bufs = 63, .mseq = 3, .mseq_ack = 3});
}

Capture::Endpoint endpoint_v4(bool active) {
  const auto client = address("10.1.2.3", 40001), server = address("10.1.2.4", 80);
  return active ? Capture::Endpoint{client, server, 0x11, 0x22, true} : Capture::Endpoint{server, client, 0x22, 0x11, false};
}

/// Log lines of the scope, instead of on the terminal.
class LogLines {
 public:
  LogLines() {
    BOOST_REQUIRE(::pipe2(pipe_, O_NONBLOCK) == 0);
    rdma::log::set_fd(pipe_[1]);
  }
  ~LogLines() {
    rdma::log::set_fd(2);
    ::close(pipe_[0]);
    ::close(pipe_[1]);
  }
  std::string take() {
    char text[4096];
    const ssize_t n = ::read(pipe_[0], text, sizeof text);
    return n > 0 ? std::string(text, static_cast<std::size_t>(n)) : "";
  }

 private:
  int pipe_[2];
};

bool contains(const std::string& text, const std::string& part) { return text.find(part) != std::string::npos; }

}  // namespace

BOOST_AUTO_TEST_CASE(tshark_decodes_a_lane_from_the_active_side) {
  const TempDir dir;
  const std::string file = dir.file("active.pcapng");
  auto capture = Capture::open(file.c_str());
  BOOST_REQUIRE(capture);
  Script script(*capture, endpoint_v4(true));
  converse(script, true);
  capture->close();
  check_decoded(file, script.expected);
  // Wireshark wants a byte behind the header of Data; nothing else of a lane may look malformed to it.
  BOOST_TEST(tshark(file, kMessages + " && _ws.malformed && !(infiniband_sdp.bsdh.mid == 0xff && infiniband_sdp.bsdh.len == 16)",
                    {"frame.number"})
                 .empty());

  const auto directions = tshark(file, kMessages, {"ip.src", "ip.dst", "infiniband.bth.destqp", "frame.packet_flags_direction"});
  BOOST_REQUIRE(directions.size() == script.expected.size());
  BOOST_TEST(directions[0] == (Row{"10.1.2.3", "10.1.2.4", "0x000022", "0x00000002"}), boost::test_tools::per_element());
  BOOST_TEST(directions[1] == (Row{"10.1.2.4", "10.1.2.3", "0x000011", "0x00000001"}), boost::test_tools::per_element());
}

BOOST_AUTO_TEST_CASE(tshark_decodes_a_lane_from_the_passive_side) {
  const TempDir dir;
  const std::string file = dir.file("passive.pcapng");
  auto capture = Capture::open(file.c_str());
  BOOST_REQUIRE(capture);
  Script script(*capture, endpoint_v4(false));
  converse(script, false);
  capture->close();
  check_decoded(file, script.expected);
  const auto directions = tshark(file, kMessages, {"ip.src", "infiniband.bth.destqp", "frame.packet_flags_direction"});
  BOOST_TEST(directions.at(0) == (Row{"10.1.2.3", "0x000022", "0x00000001"}), boost::test_tools::per_element());
}

BOOST_AUTO_TEST_CASE(tshark_shows_every_field_of_hello) {
  const TempDir dir;
  const std::string file = dir.file("hello.pcapng");
  auto capture = Capture::open(file.c_str());
  BOOST_REQUIRE(capture);
  Script script(*capture, endpoint_v4(true));
  greet(script, true);
  capture->close();
  const auto rows = tshark(file, kMessages + " && infiniband_sdp.bsdh.mid == 0",
                           {"infiniband_sdp.hh.majv", "infiniband_sdp.hh.minv", "infiniband_sdp.hh.ipv", "infiniband_sdp.hh.cap",
                            "infiniband_sdp.hh.maxadverts", "infiniband_sdp.hh.desremrcvsz", "infiniband_sdp.hh.localrcvsz",
                            "infiniband_sdp.hh.localport", "infiniband_sdp.hh.extmaxadverts"});
  BOOST_REQUIRE(rows.size() == 1u);
  const std::vector<unsigned long> golden = {2, 2, 4, 0, 9, 65552, 32784, 40001, 300};
  BOOST_TEST(numbers(rows[0]) == golden, boost::test_tools::per_element());
  const auto addresses =
      tshark(file, kMessages + " && infiniband_sdp.bsdh.mid == 0", {"infiniband_sdp.hh.src_ip", "infiniband_sdp.hh.dst_ip"});
  BOOST_TEST(addresses.at(0) == (Row{"::10.1.2.3", "::10.1.2.4"}), boost::test_tools::per_element());
  BOOST_TEST(tshark(file, kMessages + " && _ws.malformed", {"frame.number"}).empty());
}

BOOST_AUTO_TEST_CASE(tshark_reads_the_cm_exchange) {
  const TempDir dir;
  const std::string file = dir.file("cm.pcapng");
  auto capture = Capture::open(file.c_str());
  BOOST_REQUIRE(capture);
  Script script(*capture, endpoint_v4(true));
  capture->close();
  const auto req = tshark(file, "infiniband.cm.req",
                          {"infiniband.cm.req.serviceid", "infiniband.cm.req.localqpn", "infiniband.cm.req.prim_localgid_ipv4",
                           "infiniband.cm.req.prim_remotegid_ipv4", "infiniband.cm.req.ip_cm.sport", "infiniband.cm.req.ip_cm.sip4",
                           "infiniband.cm.req.ip_cm.dip4", "infiniband.mad.transactionid"});
  BOOST_REQUIRE(req.size() == 1u);
  BOOST_TEST(req[0][0] == "0x00000000013f0050");
  BOOST_TEST(std::stoul(req[0][1], nullptr, 0) == 0x11u);
  BOOST_TEST(req[0][2] == "10.1.2.3");
  BOOST_TEST(req[0][3] == "10.1.2.4");
  BOOST_TEST(std::stoul(req[0][4], nullptr, 0) == 40001u);
  BOOST_TEST(req[0][5] == "10.1.2.3");
  BOOST_TEST(req[0][6] == "10.1.2.4");
  const auto rep = tshark(file, "infiniband.cm.rep", {"infiniband.cm.rep.localqpn", "infiniband.mad.transactionid", "ip.src"});
  BOOST_REQUIRE(rep.size() == 1u);
  BOOST_TEST(std::stoul(rep[0][0], nullptr, 0) == 0x22u);
  BOOST_TEST(rep[0][1] == req[0][7]);
  BOOST_TEST(rep[0][2] == "10.1.2.4");
  BOOST_TEST(tshark(file, "infiniband.mad.attributeid == 0x0014", {"frame.number"}).size() == 1u);
}

BOOST_AUTO_TEST_CASE(tshark_decodes_ipv6) {
  const TempDir dir;
  const std::string file = dir.file("six.pcapng");
  auto capture = Capture::open(file.c_str());
  BOOST_REQUIRE(capture);
  Script script(*capture, {address("fd00::1", 40001), address("fd00::2", 80), 0x33, 0x44, true});
  converse(script, true);
  capture->close();
  check_decoded(file, script.expected);
  BOOST_TEST(tshark(file, kMessages, {"ipv6.src"}).at(0).at(0) == "fd00::1");
}

BOOST_AUTO_TEST_CASE(tshark_decodes_many_lanes_between_two_sockets_of_one_address) {
  const TempDir dir;
  const std::string file = dir.file("loopback.pcapng");
  auto capture = Capture::open(file.c_str());
  BOOST_REQUIRE(capture);
  // The software device's case: both ends are 127.0.0.1. At worst its queue pairs have the numbers of the management ones, or one
  // number for both.
  Script first(*capture, {address("127.0.0.1", 40001), address("127.0.0.1", 6379), 1, 0, true});
  Script second(*capture, {address("::ffff:127.0.0.1", 6379), address("::ffff:127.0.0.1", 40002), 3, 3, false});
  converse(first, true);
  converse(second, false);
  capture->close();
  auto expected = first.expected;
  expected.insert(expected.end(), second.expected.begin(), second.expected.end());
  check_decoded(file, expected);
}

BOOST_AUTO_TEST_CASE(tshark_names_all_messages) {
  const TempDir dir;
  const std::string file = dir.file("all.pcapng");
  auto capture = Capture::open(file.c_str());
  BOOST_REQUIRE(capture);
  Script script(*capture, endpoint_v4(true));
  std::uint32_t mseq = 0;
  for (const Mid mid : wire::kAllMids)
    if (mid != Mid::hello && mid != Mid::hello_ack)
      script.send(true, {.mid = mid, .bufs = 5, .mseq = ++mseq, .mseq_ack = 7}, wire::may_carry_payload(mid) ? 3 : 0);
  capture->close();
  check_decoded(file, script.expected);
}

BOOST_AUTO_TEST_CASE(a_message_longer_than_a_packet_decodes_at_its_start) {
  const TempDir dir;
  const std::string file = dir.file("long.pcapng");
  auto capture = Capture::open(file.c_str());
  BOOST_REQUIRE(capture);
  Script script(*capture, endpoint_v4(true));
  greet(script, true);
  script.send(true, {.mid = Mid::data, .bufs = 8, .mseq = 1}, Capture::kMaxFrameBytes - 16);
  script.send(true, {.mid = Mid::data, .bufs = 8, .mseq = 2}, Capture::kMaxFrameBytes - 15);
  script.send(true, {.mid = Mid::data, .bufs = 8, .mseq = 3}, 1 << 20);
  script.send(true, {.mid = Mid::disconn, .bufs = 8, .mseq = 4});
  capture->close();
  check_decoded(file, script.expected);

  // All bytes are there: payload of every RC packet, less headers, ICRC and pad.
  unsigned long bytes = 0;
  std::vector<unsigned long> psns, opcodes;
  for (const Row& row : tshark(file, "infiniband.bth.opcode < 100 && ip.src == 10.1.2.3",
                               {"udp.length", "infiniband.bth.padcnt", "infiniband.bth.psn", "infiniband.bth.opcode"})) {
    const auto n = numbers(row);
    bytes += n[0] - 8 - 12 - 4 - n[1];
    psns.push_back(n[2]);
    opcodes.push_back(n[3]);
  }
  unsigned long expected = 0;
  for (const auto& e : script.expected)
    if (e[0] != 1) expected += e[3];
  BOOST_TEST(bytes == expected);
  for (std::size_t i = 1; i < psns.size(); ++i) BOOST_TEST(psns[i] == (psns[i - 1] + 1) % (1 << 24));
  BOOST_TEST(opcodes.size() == 1 + 1 + 2 + 18 + 1);
  BOOST_TEST(opcodes[2] == 0u);
  BOOST_TEST(opcodes[3] == 2u);
  BOOST_TEST(opcodes[5] == 1u);
}

BOOST_AUTO_TEST_CASE(threads_write_whole_packets) {
  const TempDir dir;
  const std::string file = dir.file("threads.pcapng");
  auto capture = Capture::open(file.c_str());
  BOOST_REQUIRE(capture);
  constexpr std::uint32_t kThreads = 4, kMessagesEach = 500;
  const auto client = address("127.0.0.1", 1000), server = address("127.0.0.1", 2000);  // Boost's checks are for one thread
  std::vector<std::thread> threads;
  for (std::uint32_t t = 0; t < kThreads; ++t) {
    threads.emplace_back([&, t] {
      const std::uint32_t conn = capture->add_connection({client, server, 100 + t, 200 + t, true});
      std::array<std::byte, 16> header;
      const std::vector<std::byte> payload(t * 1000 + 1);
      for (std::uint32_t i = 1; i <= kMessagesEach; ++i) {
        wire::emit_bsdh(Bsdh{Mid::data, 0, 1, static_cast<std::uint32_t>(16 + payload.size()), i, t}, header.data());
        capture->message(conn, true, header, payload);
      }
    });
  }
  for (auto& thread : threads) thread.join();
  capture->close();
  std::vector<unsigned long> next(kThreads, 1);
  for (const Row& row :
       tshark(file, kMessages, {"infiniband_sdp.bsdh.mseqack", "infiniband_sdp.bsdh.mseq", "infiniband_sdp.bsdh.len"})) {
    const auto n = numbers(row);
    BOOST_REQUIRE(n[0] < kThreads);
    BOOST_TEST(n[1] == next[n[0]]++);
    BOOST_TEST(n[2] == 16 + n[0] * 1000 + 1);
  }
  for (const auto n : next) BOOST_TEST(n == kMessagesEach + 1);
}

BOOST_AUTO_TEST_CASE(control_messages_are_in_the_file_without_a_flush_and_data_after_one) {
  const TempDir dir;
  const std::string file = dir.file("flush.pcapng");
  auto capture = Capture::open(file.c_str());
  BOOST_REQUIRE(capture);
  Script script(*capture, endpoint_v4(true));
  greet(script, true);
  check_decoded(file, script.expected);
  script.send(true, {.mid = Mid::data, .bufs = 8, .mseq = 1}, 100);
  capture->flush();
  check_decoded(file, script.expected);
}

BOOST_AUTO_TEST_CASE(names_are_reused_and_unknown_ones_ignored) {
  const TempDir dir;
  const std::string file = dir.file("names.pcapng");
  auto capture = Capture::open(file.c_str());
  BOOST_REQUIRE(capture);
  Script first(*capture, endpoint_v4(true));
  first.send(true, {.mid = Mid::disconn, .mseq = 1});
  const std::array<std::byte, 16> stray{};
  capture->message(first.conn() + 1, true, stray, {});
  capture->message(Capture::kNoConnection, true, stray, {});
  capture->remove_connection(first.conn());
  capture->message(first.conn(), true, stray, {});
  Script second(*capture, {address("10.1.2.3", 40002), address("10.1.2.4", 80), 0x55, 0x66, true});
  BOOST_TEST(second.conn() == first.conn());
  second.send(true, {.mid = Mid::disconn, .mseq = 9});
  capture->close();
  check_decoded(file, {first.expected[0], second.expected[0]});
}

BOOST_AUTO_TEST_CASE(open_puts_the_process_id_into_the_name) {
  const TempDir dir;
  BOOST_REQUIRE(Capture::open(dir.file("a%p-%%-%x.pcapng").c_str()));
  const std::string file = dir.file("a" + std::to_string(::getpid()) + "-%-%x.pcapng");
  struct stat st {};
  BOOST_REQUIRE(::stat(file.c_str(), &st) == 0);
  BOOST_TEST((st.st_mode & 0777) == 0600u);
}

BOOST_AUTO_TEST_CASE(open_refuses_with_a_reason) {
  const TempDir dir;
  LogLines log;
  BOOST_TEST(!Capture::open(dir.file("no/such/dir").c_str()));
  std::string line = log.take();
  BOOST_TEST(contains(line, "SDP_PCAP: no capture: "));
  BOOST_TEST(contains(line, dir.file("no/such/dir")));
  BOOST_TEST(contains(line, "No such file or directory"));

  BOOST_TEST(!Capture::open("/dev/null"));
  BOOST_TEST(contains(log.take(), "not a regular file"));
  BOOST_REQUIRE(::mkfifo(dir.file("fifo").c_str(), 0600) == 0);
  BOOST_TEST(!Capture::open(dir.file("fifo").c_str()));  // and does not wait for a reader
  BOOST_TEST(contains(log.take(), "cannot open"));
  BOOST_TEST(!Capture::open(std::string(5000, 'x').c_str()));
  BOOST_TEST(contains(log.take(), "too long"));

  const auto holder = Capture::open(dir.file("twice").c_str());
  BOOST_REQUIRE(holder);
  BOOST_TEST(!Capture::open(dir.file("twice").c_str()));
  BOOST_TEST(contains(log.take(), "%p in the name"));
}

BOOST_AUTO_TEST_CASE(open_empties_an_old_file_and_hands_the_descriptor_over) {
  const TempDir dir;
  const std::string file = dir.file("old.pcapng");
  std::ofstream(file) << std::string(100'000, 'x');
  static std::atomic<int> adopted;
  adopted = -1;
  auto capture = Capture::open(file.c_str(), [](int fd) noexcept {
    const int high = ::fcntl(fd, F_DUPFD_CLOEXEC, 200);
    ::close(fd);
    adopted = high;
    return high;
  });
  BOOST_REQUIRE(capture);
  BOOST_TEST(adopted >= 200);
  BOOST_TEST((::fcntl(adopted, F_GETFD) & FD_CLOEXEC) != 0);
  Script script(*capture, endpoint_v4(true));
  greet(script, true);
  capture->close();
  BOOST_TEST(::fcntl(adopted, F_GETFD) == -1);
  check_decoded(file, script.expected);
}

BOOST_AUTO_TEST_CASE(nothing_is_written_to_a_file_of_the_program_that_got_our_number) {
  const TempDir dir;
  LogLines log;
  static std::atomic<int> number;
  auto capture = Capture::open(dir.file("ours.pcapng").c_str(), [](int fd) noexcept {
    number = fd;
    return fd;
  });
  BOOST_REQUIRE(capture);
  const std::string theirs = dir.file("theirs");
  const int other = ::open(theirs.c_str(), O_RDWR | O_CREAT | O_CLOEXEC, 0600);
  BOOST_REQUIRE(::dup2(other, number) == number);
  Script script(*capture, endpoint_v4(true));
  greet(script, true);
  capture->close();
  BOOST_TEST(std::filesystem::file_size(theirs) == 0u);
  BOOST_TEST(::fcntl(number, F_GETFD) != -1);
  BOOST_TEST(contains(log.take(), "the program has closed the file"));
  ::close(number);
  ::close(other);
}

BOOST_AUTO_TEST_CASE(a_file_size_limit_ends_the_capture_and_not_the_program) {
  const TempDir dir;
  LogLines log;
  auto capture = Capture::open(dir.file("limited.pcapng").c_str());
  BOOST_REQUIRE(capture);
  rlimit old{};
  BOOST_REQUIRE(::getrlimit(RLIMIT_FSIZE, &old) == 0);
  rlimit small = old;
  small.rlim_cur = 4096;
  BOOST_REQUIRE(::setrlimit(RLIMIT_FSIZE, &small) == 0);
  Script script(*capture, endpoint_v4(true));
  for (std::uint32_t i = 1; i < 10; ++i) {
    script.send(true, {.mid = Mid::data, .mseq = i}, 1000);
    capture->flush();
  }
  BOOST_TEST(::setrlimit(RLIMIT_FSIZE, &old) == 0);
  const std::string line = log.take();
  BOOST_TEST(contains(line, "file size limit"));
  BOOST_TEST(line.find("SDP_PCAP") == line.rfind("SDP_PCAP"));  // said once
  BOOST_TEST(std::filesystem::file_size(dir.file("limited.pcapng")) <= 4096u);
}

BOOST_AUTO_TEST_CASE(a_forked_child_writes_nothing_and_may_open_its_own) {
  const TempDir dir;
  const std::string file = dir.file("fork-%p.pcapng");
  auto capture = Capture::open(file.c_str());
  BOOST_REQUIRE(capture);
  Script script(*capture, endpoint_v4(true));
  greet(script, true);
  script.send(true, {.mid = Mid::data, .mseq = 1}, 10);  // still in the buffer that the child inherits
  const pid_t child = ::fork();
  BOOST_REQUIRE(child >= 0);
  if (child == 0) {
    Script inherited(*capture, endpoint_v4(true));
    inherited.send(true, {.mid = Mid::disconn, .mseq = 99});
    capture->flush();
    capture->abandon_in_child();
    auto own = Capture::open(file.c_str());
    if (!own) ::_exit(1);
    Script mine(*own, endpoint_v4(true));
    mine.send(true, {.mid = Mid::disconn, .mseq = 5});
    own->close();
    ::_exit(0);
  }
  int status = -1;
  BOOST_REQUIRE(::waitpid(child, &status, 0) == child);
  BOOST_TEST(status == 0);
  capture->abandon_in_child();  // not a child: nothing happens
  script.send(true, {.mid = Mid::disconn, .mseq = 2});
  capture->close();
  check_decoded(dir.file("fork-" + std::to_string(::getpid()) + ".pcapng"), script.expected);
  check_decoded(dir.file("fork-" + std::to_string(child) + ".pcapng"), {{2, 0, 0, 16, 5, 0}});
}
