#include "sdp/stats.hpp"

#include <arpa/inet.h>
#include <fcntl.h>
#include <netinet/in.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>
#include <boost/test/unit_test.hpp>
#include <nlohmann/json.hpp>

#include <atomic>
#include <cstring>
#include <fstream>
#include <set>
#include <string>
#include <thread>
#include <vector>

#include "sdp/stats_process.hpp"

using namespace sdp;
using nlohmann::json;

namespace {

sockaddr_storage v4(const char* ip, std::uint16_t port) {
  sockaddr_storage s{};
  auto* in = reinterpret_cast<sockaddr_in*>(&s);
  in->sin_family = AF_INET;
  in->sin_port = htons(port);
  inet_pton(AF_INET, ip, &in->sin_addr);
  return s;
}
sockaddr_storage v6(const char* ip, std::uint16_t port) {
  sockaddr_storage s{};
  auto* in = reinterpret_cast<sockaddr_in6*>(&s);
  in->sin6_family = AF_INET6;
  in->sin6_port = htons(port);
  inet_pton(AF_INET6, ip, &in->sin6_addr);
  return s;
}

/// Runs `body` in a child that has its own, empty table; the child's checks count through its exit status.
template <class F>
void in_child(F body) {
  const pid_t pid = fork();
  if (pid == 0) {
    bool good = false;
    try {
      good = body();
    } catch (...) {
    }
    _exit(good ? 0 : 1);
  }
  int status = 0;
  BOOST_REQUIRE(waitpid(pid, &status, 0) == pid);
  BOOST_TEST(status == 0);
}
#define EXPECT(x)                                                 \
  do {                                                            \
    if (!(x)) {                                                   \
      dprintf(2, "%s:%d: expected %s\n", __FILE__, __LINE__, #x); \
      return false;                                               \
    }                                                             \
  } while (0)

json report(const char* path = "stats_test.%p.json") {
  Options o;
  o.stats_file.assign(path);
  PathText name;
  if (!write_stats_report(o) || !expand_path(path, getpid(), name)) return {};
  std::ifstream in(name.c_str());
  json j = json::parse(in, nullptr, false);
  unlink(name.c_str());
  return j;
}

}  // namespace

BOOST_AUTO_TEST_CASE(every_reason_has_a_name_of_its_own_and_a_text) {
  std::set<std::string> names;
  for (std::size_t i = 0; i < kLaneReasons; ++i) {
    names.insert(to_string(static_cast<LaneReason>(i)));
    BOOST_TEST(std::string(explain(static_cast<LaneReason>(i))) != "");
    BOOST_TEST((hint(static_cast<LaneReason>(i)) != nullptr));
  }
  BOOST_TEST(names.size() == kLaneReasons);
  BOOST_TEST(to_string(static_cast<LaneReason>(200)) == std::string("unknown"));
}

BOOST_AUTO_TEST_CASE(the_hot_parts_stay_small) {
  BOOST_TEST(sizeof(ConnStats) == 320U);
  BOOST_TEST(alignof(ConnStats) == 64U);
  BOOST_TEST(sizeof(Traffic) == 32U);
}

BOOST_AUTO_TEST_CASE(endpoints_are_written_as_people_write_them) {
  const auto text = [](const sockaddr_storage& s) {
    ConnStats c;
    c.set_addresses(s, s);
    const std::uint64_t address[2] = {c.local.address[0].load(), c.local.address[1].load()};
    return std::string(format_endpoint(c.local.family_port.load(), address).c_str());
  };
  BOOST_TEST(text(v4("192.0.2.1", 80)) == "192.0.2.1:80");
  BOOST_TEST(text(v6("2001:db8::1", 65535)) == "[2001:db8::1]:65535");
  BOOST_TEST(text(sockaddr_storage{}) == "");
}

BOOST_AUTO_TEST_CASE(a_report_without_connections_is_complete) {
  in_child([] {
    const json j = report();
    EXPECT(j["pid"] == getpid());
    EXPECT(j["program"] == program_invocation_short_name);
    EXPECT(j["version"] == library_version());
    EXPECT(j["policy"] == "both" && !j.contains("forced_to_tcp"));
    EXPECT(j["sockets"] == 0);
    EXPECT(j["lanes"] == json({{"local", 0}, {"ib", 0}, {"rnic", 0}}));
    EXPECT(j["bytes"]["tcp"] == json({{"sent", 0}, {"received", 0}}));
    EXPECT(j["reasons"].is_object() && j["reasons"].empty());
    EXPECT(j["connections"].is_array() && j["connections"].empty());
    return true;
  });
}

BOOST_AUTO_TEST_CASE(open_and_closed_connections_are_counted_once) {
  in_child([] {
    keep_closed_connections(true);
    ConnStats* a = acquire_stats(5);
    a->set_addresses(v4("127.0.0.1", 1000), v6("::1", 2000));
    a->tcp.bytes_sent.add(100);
    a->tcp.messages_sent.add(1);
    a->set_transport(Transport::local);
    a->lane.bytes_sent.add(5000000000);
    a->lane.messages_sent.add(7);
    a->lane.bytes_received.add(3);
    a->lane.messages_received.add(2);
    a->zero_copy.adverts.add(6);
    a->zero_copy.bytes_sent.add(4000000000);
    a->zero_copy.bytes_received.add(8);
    a->zero_copy.cancelled.add(1);
    a->zero_copy.refused.add(3);
    a->zero_copy.unregistered.add(5);
    a->zero_copy.bytes_written.add(21);
    a->zero_copy.bytes_placed.add(22);
    a->zero_copy.sinks.add(23);
    a->zero_copy.sinks_cancelled.add(24);
    a->zero_copy.sinks_unused.add(25);
    a->switches_up.add(2);
    a->lanes_failed.add(3);
    a->lanes_returned.add(1);
    a->looks_again.add(4);
    a->credits_send.store(9);
    ConnStats* b = acquire_stats(6);
    b->set_reason(LaneReason::no_peer, true);
    b->tcp.bytes_received.add(11);

    json j = report();
    EXPECT(j["sockets"] == 2);
    EXPECT(j["lanes"]["local"] == 1);
    EXPECT(j["bytes"]["lane"] == json({{"sent", 5000000000}, {"received", 3}}));
    EXPECT(j["bytes"]["tcp"] == json({{"sent", 100}, {"received", 11}}));
    EXPECT(j["messages"]["lane"] == json({{"sent", 7}, {"received", 2}}));
    EXPECT(j["zero_copy"] == json({{"adverts", 6},
                                   {"bytes_sent", 4000000000},
                                   {"bytes_received", 8},
                                   {"cancelled", 1},
                                   {"refused", 3},
                                   {"unregistered", 5},
                                   {"bytes_written", 21},
                                   {"bytes_placed", 22},
                                   {"sinks", 23},
                                   {"sinks_cancelled", 24},
                                   {"sinks_unused", 25}}));
    EXPECT(j["connections"][0]["zero_copy"] == j["zero_copy"]);
    EXPECT(j["switches"] == json({{"up", 2}, {"down", 0}}));
    EXPECT(j["failures"] == json({{"lanes", 3}, {"returned", 1}}));
    EXPECT(j["reasons"] == json({{"no_peer", 1}}));
    EXPECT(j["connections"].size() == 2);
    EXPECT(j["connections"][0]["fd"] == 5);
    EXPECT(j["connections"][0]["state"] == "open");
    EXPECT(j["connections"][0]["local"] == "127.0.0.1:1000");
    EXPECT(j["connections"][0]["remote"] == "[::1]:2000");
    EXPECT(j["connections"][0]["transport"] == "local");
    EXPECT(j["connections"][0]["reason"] == "none");
    EXPECT(j["connections"][0]["lane"]["bytes_sent"] == 5000000000);
    EXPECT(j["connections"][0]["credits"]["send"] == 9);
    EXPECT(j["connections"][0]["looks"] == json({{"again", 4}, {"to_come", 0}}));
    EXPECT(j["connections"][1]["looks"] == json({{"again", 0}, {"to_come", 1}}));
    EXPECT(j["connections"][1]["transport"] == "tcp");
    EXPECT(j["connections"][1]["reason"] == "no_peer");

    // The same sums after they are gone; a lane that was lost is still counted.
    a->set_reason(LaneReason::peer_gone);
    release_stats(a);
    release_stats(b);
    const json later = report();
    for (const char* key : {"sockets", "lanes", "bytes", "messages", "zero_copy", "switches", "failures"})
      EXPECT(later[key] == j[key]);
    EXPECT(later["reasons"] == json({{"no_peer", 1}, {"peer_gone", 1}}));
    EXPECT(later["connections"].size() == 2);
    EXPECT(later["connections"][0]["fd"] == 6);  // the newest first
    EXPECT(later["connections"][1]["state"] == "closed");

    // A slot is used again, from zero.
    ConnStats* c = acquire_stats(7);
    EXPECT(c == a);
    EXPECT(c->lane.bytes_sent.get() == 0 && c->transport == 0 && c->had_lanes == 0 && c->reason == LaneReason::below_threshold);
    return true;
  });
}

BOOST_AUTO_TEST_CASE(the_report_lists_the_last_256_connections) {
  in_child([] {
    keep_closed_connections(true);
    for (int i = 0; i < 1000; ++i) release_stats(acquire_stats(i));
    const json j = report();
    EXPECT(j["sockets"] == 1000);
    EXPECT(j["connections"].size() == 256);
    EXPECT(j["connections"][0]["fd"] == 999);
    EXPECT(j["connections"][255]["fd"] == 744);
    return true;
  });
}

BOOST_AUTO_TEST_CASE(more_connections_than_the_table_holds_are_counted_right) {
  in_child([] {
    std::set<ConnStats*> all;
    for (int i = 0; i < 3000; ++i) {
      ConnStats* s = acquire_stats(i);
      s->tcp.bytes_sent.add(1);
      all.insert(s);
    }
    EXPECT(all.size() == 3000);
    const json j = report();
    EXPECT(j["sockets"] == 3000);
    EXPECT(j["bytes"]["tcp"]["sent"] == 3000);
    EXPECT(j["reasons"]["below_threshold"] == 3000);
    EXPECT(j["connections"].size() == 256);
    for (ConnStats* s : all) release_stats(s);
    EXPECT(report()["bytes"]["tcp"]["sent"] == 3000);
    return true;
  });
}

BOOST_AUTO_TEST_CASE(threads_never_share_a_slot) {
  in_child([] {
    std::vector<std::thread> threads;
    for (int t = 0; t < 4; ++t)
      threads.emplace_back([] {
        for (int i = 0; i < 2000; ++i) {
          ConnStats* one = acquire_stats(i);
          ConnStats* two = acquire_stats(i);
          one->lane.bytes_sent.add(1);
          two->lane.bytes_sent.add(1);
          release_stats(one);
          release_stats(two);
        }
      });
    for (std::thread& t : threads) t.join();
    const json j = report();
    EXPECT(j["sockets"] == 16000);
    EXPECT(j["bytes"]["lane"]["sent"] == 16000);
    return true;
  });
}

BOOST_AUTO_TEST_CASE(a_connection_that_closes_meanwhile_is_counted_once) {
  in_child([] {
    constexpr int kConnections = 20'000;
    std::vector<ConnStats*> all;
    for (int i = 0; i < kConnections; ++i) all.push_back(acquire_stats(i));
    for (ConnStats* s : all) s->tcp.bytes_sent.add(1);
    std::atomic<bool> over{false};
    std::thread closing([&] {
      for (ConnStats* s : all) release_stats(s);
      over = true;
    });
    bool right = true;
    while (!over) {
      ProcessTotals sum;
      sum_up(sum);
      right = right && sum.tcp[0] == kConnections && sum.sockets == kConnections;
    }
    closing.join();
    EXPECT(right);
    return true;
  });
}

BOOST_AUTO_TEST_CASE(the_table_can_be_found_among_the_descriptors_and_cannot_be_cut) {
  in_child([] {
    EXPECT(stats_fd() == -1);
    ConnStats* s = acquire_stats(42);
    s->lane.bytes_sent.add(77);
    const int fd = stats_fd();
    EXPECT(fd > 100);
    EXPECT((fcntl(fd, F_GETFD) & FD_CLOEXEC) != 0);
    char link[64] = {};
    EXPECT(readlink(("/proc/self/fd/" + std::to_string(fd)).c_str(), link, sizeof link - 1) > 0);
    EXPECT(std::string(link) == std::string("/memfd:") + kStatsName + " (deleted)");
    EXPECT(ftruncate(fd, 0) == -1);
    struct stat st {};
    EXPECT(fstat(fd, &st) == 0 && st.st_size == static_cast<off_t>(kStatsBytes) && (st.st_mode & 0777) == 0600);

    std::vector<std::byte> bytes(kStatsBytes);
    EXPECT(pread(fd, bytes.data(), bytes.size(), 0) == static_cast<ssize_t>(bytes.size()));
    const auto* header = static_cast<const StatsHeader*>(static_cast<const void*>(bytes.data()));
    EXPECT(header->magic == kStatsMagic && header->version == kStatsVersion && header->pid == static_cast<std::uint32_t>(getpid()));
    EXPECT(std::memcmp(&header->magic, "SDPSTATS", 8) == 0);
    EXPECT(header->used[0].load() == 1);
    const auto* slot = static_cast<const ConnStats*>(static_cast<const void*>(bytes.data() + kStatsHeaderBytes));
    EXPECT(slot->fd.load() == 42 && slot->lane.bytes_sent.get() == 77 && slot->change.load() % 2 == 0);
    return true;
  });
}

BOOST_AUTO_TEST_CASE(a_forks_child_starts_with_an_empty_table_of_its_own) {
  in_child([] {
    ConnStats* parents = acquire_stats(1);
    parents->tcp.bytes_sent.add(10);
    const int parents_fd = stats_fd();
    const pid_t child = fork();
    if (child == 0) {
      const bool good = [&] {
        EXPECT(stats_fd() == -1);
        EXPECT(report()["sockets"] == 0);
        release_stats(parents);  // ignored: it is the parent's
        ConnStats* own = acquire_stats(2);
        own->tcp.bytes_sent.add(5);
        EXPECT(own != parents);
        EXPECT(stats_fd() >= 0);
        EXPECT(stats_fd() == parents_fd || fcntl(parents_fd, F_GETFD) == -1);  // the parent's table is let go of
        const json j = report();
        EXPECT(j["sockets"] == 1 && j["bytes"]["tcp"]["sent"] == 5 && j["pid"] == getpid());
        return true;
      }();
      _exit(good ? 0 : 1);
    }
    int status = 0;
    EXPECT(waitpid(child, &status, 0) == child && status == 0);
    const json j = report();
    EXPECT(j["sockets"] == 1 && j["bytes"]["tcp"]["sent"] == 10 && j["connections"].size() == 1);
    return true;
  });
}

// Goal: when the program closed our descriptor and the number is a file of its own, a child does not close that file.
BOOST_AUTO_TEST_CASE(a_child_closes_nothing_that_is_not_the_table) {
  in_child([] {
    (void)acquire_stats(1);
    const int fd = stats_fd();
    close(fd);
    int ends[2];
    EXPECT(pipe(ends) == 0 && dup2(ends[0], fd) == fd);
    const pid_t child = fork();
    if (child == 0) {
      (void)acquire_stats(2);
      _exit(fcntl(fd, F_GETFD) >= 0 ? 0 : 1);
    }
    int status = 0;
    EXPECT(waitpid(child, &status, 0) == child && status == 0);
    return true;
  });
}

BOOST_AUTO_TEST_CASE(a_report_is_whole_or_not_there_and_a_failure_is_harmless) {
  in_child([] {
    Options o;
    o.stats_file.assign("stats_test.absent/x.json");
    const auto level = rdma::log::threshold.exchange(rdma::log::Level::off);
    EXPECT(!write_stats_report(o));
    o.stats_file.assign("/dev/full");
    EXPECT(!write_stats_report(o));
    rdma::log::threshold.store(level);
    o.stats_file.assign("/dev/null");
    EXPECT(write_stats_report(o));
    EXPECT(report("stats_test.%p.again.json")["sockets"] == 0);
    return true;
  });
}

BOOST_AUTO_TEST_CASE(names_that_are_no_utf8_still_make_json) {
  in_child([] {
    char name[] = "a\"b\\\x01\xe9";
    program_invocation_short_name = name;
    EXPECT(report()["program"] == "a\"b\\\x01\xc3\xa9");
    return true;
  });
}
