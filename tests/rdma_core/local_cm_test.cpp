// LocalCm between willing processes. The unwilling ones are in hostile_test.cpp.
#include <fcntl.h>
#include <signal.h>
#include <sys/wait.h>

#include <boost/test/data/test_case.hpp>

#include "rdma_core/cm/local_socket.hpp"
#include "tests/rdma_core/local_pair.hpp"

using namespace rdma;
using namespace rdma::cm;
using namespace rdma::cm::test;
namespace bdata = boost::unit_test::data;

BOOST_TEST_DONT_PRINT_LOG_VALUE(rdma::NodeType)
BOOST_TEST_DONT_PRINT_LOG_VALUE(rdma::cm::Reason)

namespace {

const NodeType kFlavours[] = {NodeType::ib_ca, NodeType::rnic};

/// `active` and `passive` are established on `tcp`; their connections.
struct Met {
  ConnId active = ConnId::none, passive = ConnId::none;
};
Met meet(Node& passive, Node& active, Tcp& tcp) {
  const Anchor offered = anchor_of(tcp.client), dialled = anchor_of(tcp.server);
  BOOST_REQUIRE(passive.cm->offer(offered, 5000));
  active.dial(dialled);
  const bool done = &passive == &active ? run({&active},
                                              [&] {
                                                return active.find(EventKind::established, dialled.cookie) &&
                                                       passive.find(EventKind::established, offered.cookie);
                                              })
                                        : run({&passive, &active}, [&] {
                                            return active.find(EventKind::established, dialled.cookie) &&
                                                   passive.find(EventKind::established, offered.cookie);
                                          });
  BOOST_REQUIRE(done);
  return {active.find(EventKind::established, dialled.cookie)->conn, passive.find(EventKind::established, offered.cookie)->conn};
}

void talk(Node& a, ConnId at_a, Node& b, ConnId at_b) {
  BOOST_TEST(a.send(at_a, "from a"));
  BOOST_TEST(b.receive(at_b).value_or("nothing") == "from a");
  BOOST_TEST(b.send(at_b, "from b"));
  BOOST_TEST(a.receive(at_a).value_or("nothing") == "from b");
}

}  // namespace

BOOST_DATA_TEST_CASE(two_processes_meet_and_talk, bdata::make(kFlavours), flavour) {
  Node passive(flavour), active(flavour);
  Tcp tcp;
  const Met met = meet(passive, active, tcp);
  BOOST_TEST(passive.find(EventKind::request, anchor_of(tcp.client).cookie)->data == "please");
  BOOST_TEST(active.find(EventKind::reply, anchor_of(tcp.server).cookie)->data == "welcome");
  talk(active, met.active, passive, met.passive);
}

BOOST_AUTO_TEST_CASE(private_data_of_the_greatest_size_pass_and_longer_ones_do_not) {
  Node passive, active;
  active.request_data.assign(active.cm->caps().max_request_private, 'q');
  passive.reply_data.assign(passive.cm->caps().max_reply_private, 'p');
  Tcp tcp;
  meet(passive, active, tcp);
  BOOST_TEST(passive.seen[0].data == active.request_data);
  BOOST_TEST(active.seen[0].data == passive.reply_data);

  Tcp other;
  active.request_data += 'q';
  BOOST_REQUIRE(passive.cm->offer(anchor_of(other.client), 5000));
  active.dial(anchor_of(other.server));
  const std::uint64_t cookie = anchor_of(other.server).cookie;
  BOOST_TEST(run({&passive, &active}, [&] { return active.find(EventKind::unreachable, cookie) != nullptr; }));
}

BOOST_DATA_TEST_CASE(anchors_of_every_family_are_found, bdata::make({0, 1, 2}), kind) {
  Node passive, active;
  if (kind == 0) {
    Tcp tcp(AF_INET);
    meet(passive, active, tcp);
  } else if (const int probe = socket(AF_INET6, SOCK_STREAM, 0); probe >= 0) {
    close(probe);
    Tcp tcp(AF_INET6, kind == 1);  // the server's end is IPv4-mapped, or both are IPv6
    meet(passive, active, tcp);
  }
}

BOOST_AUTO_TEST_CASE(reject_is_final_and_brings_its_reason_and_data) {
  Node passive, active;
  passive.rejects = true;
  Tcp tcp;
  BOOST_REQUIRE(passive.cm->offer(anchor_of(tcp.client), 5000));
  active.dial(anchor_of(tcp.server));
  const std::uint64_t cookie = anchor_of(tcp.server).cookie;
  BOOST_REQUIRE(run({&passive, &active}, [&] { return active.find(EventKind::rejected, cookie) != nullptr; }));
  BOOST_TEST(active.find(EventKind::rejected, cookie)->data == "no");
  BOOST_TEST((active.find(EventKind::rejected, cookie)->reason == Reason::refused));
  BOOST_TEST(active.seen.size() == 1u);
  // The link they made is good for the next.
  passive.rejects = false;
  Tcp next;
  meet(passive, active, next);
  BOOST_TEST(active.links() == 1u);
}

BOOST_AUTO_TEST_CASE(a_dial_waits_for_the_offer) {
  Node passive, active;
  Tcp tcp;
  active.dial(anchor_of(tcp.server));
  const SteadyClock clock;
  const Nanos later = clock.now() + 60'000'000;
  BOOST_REQUIRE(run({&active}, [&] { return clock.now() > later; }));
  BOOST_TEST(active.seen.empty());
  BOOST_REQUIRE(passive.cm->offer(anchor_of(tcp.client), 5000));
  const std::uint64_t cookie = anchor_of(tcp.server).cookie;
  BOOST_TEST(run({&passive, &active}, [&] { return active.find(EventKind::established, cookie) != nullptr; }));
}

BOOST_AUTO_TEST_CASE(nobody_there_is_told_after_the_time_by_either_side) {
  Node passive, active;
  Tcp tcp, other;
  BOOST_REQUIRE(passive.cm->offer(anchor_of(tcp.client), 30));
  active.dial(anchor_of(other.server), 30);
  BOOST_REQUIRE(run({&passive, &active}, [&] { return !passive.seen.empty() && !active.seen.empty(); }));
  BOOST_TEST((passive.seen[0].kind == EventKind::unreachable && passive.seen[0].reason == Reason::no_peer));
  BOOST_TEST((active.seen[0].kind == EventKind::unreachable && active.seen[0].reason == Reason::no_peer));
}

BOOST_AUTO_TEST_CASE(an_anchor_whose_other_end_is_not_on_this_host_is_told_at_once) {
  Node node;
  Tcp tcp;
  Anchor far = anchor_of(tcp.client);
  reinterpret_cast<sockaddr_in&>(far.remote).sin_addr.s_addr = inet_addr("192.0.2.1");
  BOOST_REQUIRE(node.cm->offer(far, 60'000));
  node.dial(far, 60'000);
  BOOST_REQUIRE(run({&node}, [&] { return node.seen.size() == 2; }));
  for (const Seen& seen : node.seen) BOOST_TEST((seen.kind == EventKind::unreachable && seen.reason == Reason::elsewhere));
}

BOOST_AUTO_TEST_CASE(a_listener_on_the_port_is_not_the_other_end) {
  Node node;
  sockaddr_storage address;
  const int listener = tcp_listener(address);
  Tcp tcp;
  Anchor wrong = anchor_of(tcp.client);
  wrong.remote = address;  // as after the accepted socket went and only the listener is left
  BOOST_REQUIRE(node.cm->offer(wrong, 60'000));
  BOOST_REQUIRE(run({&node}, [&] { return node.seen.size() == 1; }));
  BOOST_TEST((node.seen[0].reason == Reason::elsewhere));
  close(listener);
}

BOOST_AUTO_TEST_CASE(a_withdrawn_offer_gives_no_event) {
  Node passive, active;
  Tcp tcp;
  BOOST_REQUIRE(passive.cm->offer(anchor_of(tcp.client), 5000));
  passive.cm->withdraw(anchor_of(tcp.client).cookie);
  active.dial(anchor_of(tcp.server), 50);
  BOOST_REQUIRE(run({&passive, &active}, [&] { return !active.seen.empty(); }));
  BOOST_TEST((active.seen[0].reason == Reason::no_peer));
  BOOST_TEST(passive.seen.empty());
}

BOOST_AUTO_TEST_CASE(devices_of_two_flavours_do_not_meet) {
  Node passive(NodeType::ib_ca), active(NodeType::rnic);
  Tcp tcp;
  BOOST_REQUIRE(passive.cm->offer(anchor_of(tcp.client), 300));
  active.dial(anchor_of(tcp.server), 300);
  BOOST_REQUIRE(run({&passive, &active}, [&] { return !active.seen.empty() && !passive.seen.empty(); }));
  BOOST_TEST((active.seen[0].kind == EventKind::unreachable && passive.seen[0].kind == EventKind::unreachable));
}

BOOST_AUTO_TEST_CASE(further_connections_reuse_the_link_in_both_directions) {
  Node a, b;
  Tcp one, two, three;
  const Met first = meet(a, b, one);
  const Met second = meet(a, b, two);
  const Met third = meet(b, a, three);
  BOOST_TEST(a.links() == 1u);
  BOOST_TEST(b.links() == 1u);
  talk(b, first.active, a, first.passive);
  talk(b, second.active, a, second.passive);
  talk(a, third.active, b, third.passive);
}

BOOST_AUTO_TEST_CASE(many_first_contacts_at_once_make_one_link) {
  constexpr int kMany = 40;
  Node passive, active;
  std::vector<std::unique_ptr<Tcp>> tcps;
  for (int i = 0; i < kMany; ++i) {
    tcps.push_back(std::make_unique<Tcp>());
    BOOST_REQUIRE(passive.cm->offer(anchor_of(tcps.back()->client), 5000));
    active.dial(anchor_of(tcps.back()->server));
  }
  const auto established = [](const Node& node) {
    return std::count_if(node.seen.begin(), node.seen.end(), [](const Seen& s) { return s.kind == EventKind::established; });
  };
  BOOST_TEST(run({&passive, &active}, [&] { return established(active) == kMany && established(passive) == kMany; }));
  BOOST_TEST(active.links() == 1u);
  BOOST_TEST(passive.links() == 1u);
}

BOOST_AUTO_TEST_CASE(first_contacts_from_both_sides_at_once_work) {
  Node a, b;
  Tcp one, two;
  BOOST_REQUIRE(a.cm->offer(anchor_of(one.client), 5000));
  BOOST_REQUIRE(b.cm->offer(anchor_of(two.client), 5000));
  b.dial(anchor_of(one.server));
  a.dial(anchor_of(two.server));
  BOOST_TEST(run({&a, &b}, [&] {
    return a.find(EventKind::established, anchor_of(one.client).cookie) &&
           a.find(EventKind::established, anchor_of(two.server).cookie) &&
           b.find(EventKind::established, anchor_of(one.server).cookie) &&
           b.find(EventKind::established, anchor_of(two.client).cookie);
  }));
}

BOOST_AUTO_TEST_CASE(a_process_meets_itself) {
  Node node;
  Tcp tcp;
  const Met met = meet(node, node, tcp);
  BOOST_TEST(node.links() == 0u);
  BOOST_TEST(node.send(met.active, "to myself"));
  BOOST_TEST(node.receive(met.passive).value_or("nothing") == "to myself");
  node.seen.clear();
  node.cm->disconnect(met.active);
  BOOST_REQUIRE(run({&node}, [&] { return !node.seen.empty(); }));
  BOOST_TEST((node.seen[0].kind == EventKind::disconnected && node.seen[0].conn == met.passive));
}

BOOST_AUTO_TEST_CASE(disconnect_is_told_to_the_peer_only_and_the_other_lanes_go_on) {
  Node passive, active;
  Tcp one, two;
  const Met first = meet(passive, active, one);
  const Met second = meet(passive, active, two);
  passive.seen.clear();
  active.seen.clear();
  active.cm->disconnect(first.active);
  active.cm->disconnect(first.active);
  BOOST_REQUIRE(run({&passive, &active}, [&] { return !passive.seen.empty(); }));
  BOOST_TEST((passive.seen[0].kind == EventKind::disconnected && passive.seen[0].conn == first.passive));
  BOOST_TEST(passive.seen.size() == 1u);
  BOOST_TEST(active.seen.empty());
  passive.lanes.erase(first.passive);
  active.lanes.erase(first.active);
  talk(active, second.active, passive, second.passive);
}

BOOST_AUTO_TEST_CASE(a_flood_of_disconnects_at_a_peer_that_sleeps_is_told_in_the_end) {
  constexpr int kMany = 400;
  Node passive, active;
  std::vector<std::unique_ptr<Tcp>> tcps;
  std::vector<Met> mets;
  passive.answers = active.answers = true;
  for (int i = 0; i < kMany; ++i) {
    tcps.push_back(std::make_unique<Tcp>());
    mets.push_back(meet(passive, active, *tcps.back()));
  }
  passive.seen.clear();
  for (const Met& met : mets) active.cm->disconnect(met.active);  // more than a socket's buffer holds
  BOOST_TEST(run({&passive, &active}, [&] { return passive.seen.size() == kMany; }));
}

BOOST_AUTO_TEST_CASE(an_idle_link_is_closed_and_made_anew) {
  Node passive, active;
  active.cm->close_idle_links_after(20);
  Tcp one, two;
  const Met met = meet(passive, active, one);
  const SteadyClock clock;
  const Nanos later = clock.now() + 100'000'000;
  BOOST_REQUIRE(run({&passive, &active}, [&] { return clock.now() > later; }));
  BOOST_TEST(active.links() == 1u);  // it is used
  active.cm->disconnect(met.active);
  BOOST_TEST(run({&passive, &active}, [&] { return active.links() == 0 && passive.links() == 0; }));
  meet(passive, active, two);
  BOOST_TEST(active.links() == 1u);
}

BOOST_AUTO_TEST_CASE(a_killed_peers_bytes_are_there_and_then_it_is_told) {
  sockaddr_storage address;
  const int listener = tcp_listener(address);
  int ready[2];
  BOOST_REQUIRE(pipe2(ready, O_CLOEXEC) == 0);
  const pid_t child = fork();
  if (child == 0) {
    alarm(60);
    Node peer;
    const int fd = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
    if (connect(fd, reinterpret_cast<sockaddr*>(&address), sizeof address) != 0) _exit(1);
    if (!peer.cm->offer(anchor_of(fd), 5000)) _exit(2);
    if (!run({&peer}, [&] { return peer.find(EventKind::established, anchor_of(fd).cookie) != nullptr; })) _exit(3);
    const ConnId conn = peer.seen.back().conn;
    if (!peer.send(conn, "one") || !peer.send(conn, "two")) _exit(4);
    if (write(ready[1], "x", 1) != 1) _exit(5);
    raise(SIGKILL);
  }
  Node node;
  const int fd = accept4(listener, nullptr, nullptr, SOCK_CLOEXEC);
  const std::uint64_t cookie = anchor_of(fd).cookie;
  node.dial(anchor_of(fd));
  BOOST_REQUIRE(run({&node}, [&] { return node.find(EventKind::established, cookie) != nullptr; }));
  const ConnId conn = node.find(EventKind::established, cookie)->conn;
  BOOST_REQUIRE(run({&node}, [&] { return node.find(EventKind::disconnected, cookie) != nullptr; }));
  BOOST_TEST((node.find(EventKind::disconnected, cookie)->reason == Reason::peer_died));
  BOOST_TEST(node.receive(conn).value_or("nothing") == "one");
  BOOST_TEST(node.receive(conn).value_or("nothing") == "two");
  BOOST_TEST(node.links() == 0u);
  int status = 0;
  waitpid(child, &status, 0);
  BOOST_TEST((WIFSIGNALED(status) && WTERMSIG(status) == SIGKILL));
  close(fd);
  close(listener);
  close(ready[0]);
  close(ready[1]);
}

BOOST_AUTO_TEST_CASE(a_parents_death_shows_although_its_child_lives) {
  sockaddr_storage address;
  const int listener = tcp_listener(address);
  int hold[2];
  BOOST_REQUIRE(pipe2(hold, O_CLOEXEC) == 0);
  const pid_t child = fork();
  if (child == 0) {
    alarm(60);
    close(hold[1]);
    Node peer;
    const int fd = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
    if (connect(fd, reinterpret_cast<sockaddr*>(&address), sizeof address) != 0) _exit(1);
    if (!peer.cm->offer(anchor_of(fd), 5000)) _exit(2);
    if (!run({&peer}, [&] { return peer.find(EventKind::established, anchor_of(fd).cookie) != nullptr; })) _exit(3);
    if (fork() == 0) {
      alarm(60);
      peer.cm->abandon_in_child();
      char c;
      (void)!read(hold[0], &c, 1);  // lives until the test ends
      _exit(0);
    }
    _exit(0);
  }
  close(hold[0]);
  Node node;
  const int fd = accept4(listener, nullptr, nullptr, SOCK_CLOEXEC);
  const std::uint64_t cookie = anchor_of(fd).cookie;
  node.dial(anchor_of(fd));
  BOOST_TEST(run({&node}, [&] { return node.find(EventKind::disconnected, cookie) != nullptr; }));
  close(hold[1]);
  waitpid(child, nullptr, 0);
  close(fd);
  close(listener);
}
