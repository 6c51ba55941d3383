// The two processes' own connection: who has a lane's key is heard, nobody else, and garbage costs the link it came by.
#include "sdp/peer_link.hpp"

#include <arpa/inet.h>
#include <poll.h>
#include <sys/socket.h>
#include <unistd.h>

#include <boost/test/unit_test.hpp>
#include <deque>
#include <set>

namespace sdp {
namespace {

using rdma::cm::IpAddress;
using Kind = PeerLinks::Kind;
using Key = PeerLinks::Key;

IpAddress loopback(std::uint16_t port = 0) {
  sockaddr_storage address{};
  sockaddr_in in{};
  in.sin_family = AF_INET;
  in.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
  std::memcpy(&address, &in, sizeof in);
  return IpAddress::from(address).with_port(port);
}

struct Side {
  PeerLinks links;
  std::deque<PeerLinks::Message> heard;
  std::set<Key> lost;
  Side() {
    links.on_message = [this](const PeerLinks::Message& m) { heard.push_back(m); };
    links.on_lost = [this](const Key& key) { lost.insert(key); };
  }
  bool heard_of(Kind kind) const {
    for (const auto& m : heard)
      if (m.kind == kind) return true;
    return false;
  }
};

struct Two {
  Side listens, dials;
  template <class Done>
  bool until(Done done, int rounds = 2000) {
    for (int round = 0; round < rounds && !done(); ++round) {
      std::array<pollfd, 2> fds{{{listens.links.fd(), POLLIN, 0}, {dials.links.fd(), POLLIN, 0}}};
      poll(fds.data(), fds.size(), 5);
      listens.links.progress();
      dials.links.progress();
    }
    return done();
  }
  Key attach() {
    const Key key = PeerLinks::new_key();
    const std::uint16_t port = listens.links.port_at(loopback());
    BOOST_REQUIRE(port != 0);
    listens.links.announce(key);
    dials.links.connect(key, loopback(port));
    BOOST_REQUIRE(until([&] { return listens.links.has_link(key); }));
    return key;
  }
};

/// A TCP connection to the listener of somebody who is no peer.
int stranger(std::uint16_t port) {
  const int fd = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
  const sockaddr_storage to = loopback(port).to_sockaddr();
  BOOST_REQUIRE_EQUAL(connect(fd, reinterpret_cast<const sockaddr*>(&to), sizeof(sockaddr_in)), 0);
  return fd;
}
bool is_over(int fd) {
  pollfd p{fd, POLLIN, 0};
  char byte;
  return poll(&p, 1, 0) == 1 && recv(fd, &byte, 1, MSG_DONTWAIT) <= 0;
}

}  // namespace

BOOST_AUTO_TEST_CASE(a_frame_says_what_was_meant_and_nothing_else_is_one) {
  PeerLinks::Message m{Kind::ask, PeerLinks::new_key(), {true, 1, ~0ULL, 1ULL << 40, true}}, got;
  PeerLinks::Frame frame = PeerLinks::emit(m);
  BOOST_REQUIRE(PeerLinks::parse(frame, got));
  BOOST_TEST((got.kind == m.kind && got.key == m.key && got.arrived.switched && got.arrived.closed));
  BOOST_TEST(got.arrived.switch_at == 1u);
  BOOST_TEST(got.arrived.sent == ~0ULL);
  BOOST_TEST(got.arrived.received == 1ULL << 40);
  for (const std::size_t at : {0, 3, 4}) {
    frame = PeerLinks::emit(m);
    frame[at] = std::byte{0xEE};
    BOOST_TEST(!PeerLinks::parse(frame, got));
  }
}

BOOST_AUTO_TEST_CASE(both_hear_each_other_of_each_lane_by_one_link) {
  Two two;
  const Key first = two.attach(), second = two.attach();
  BOOST_TEST(two.listens.links.send({Kind::ask, first, {true, 5, 6, 7, false}}));
  BOOST_TEST(two.dials.links.send({Kind::tell, second, {false, 0, 8, 9, false}}));
  BOOST_REQUIRE(two.until([&] { return two.dials.heard_of(Kind::ask) && two.listens.heard_of(Kind::tell); }));
  BOOST_TEST((two.dials.heard.back().key == first && two.dials.heard.back().arrived.received == 7));
  BOOST_TEST((two.listens.heard.back().key == second && two.listens.heard.back().arrived.received == 9));
}

BOOST_AUTO_TEST_CASE(a_key_that_is_not_known_is_answered_so) {
  Two two;
  const Key key = two.attach();
  two.listens.links.forget(key);
  BOOST_TEST(two.dials.links.send({Kind::ask, key, {}}));
  BOOST_TEST(two.until([&] { return two.dials.heard_of(Kind::unknown); }));
  BOOST_TEST(!two.listens.heard_of(Kind::ask));
}

BOOST_AUTO_TEST_CASE(the_end_of_the_peer_is_told_for_each_lane) {
  Side listens;
  Key first, second;
  {
    Two two;
    first = two.attach();
    second = two.attach();
    two.listens.links.abandon_in_child();  // its process is gone
    BOOST_TEST(two.until([&] { return two.dials.lost.size() == 2; }));
    BOOST_TEST(!two.dials.links.send({Kind::ask, first, {}}));
    BOOST_TEST((two.dials.lost == std::set<Key>{first, second}));
  }
}

BOOST_AUTO_TEST_CASE(strangers_are_dropped_and_few_are_let_in) {
  Two two;
  const Key key = two.attach();
  const std::uint16_t port = two.listens.links.port_at(loopback());
  const int garbage = stranger(port);
  const std::array<char, 200> noise{"GET / HTTP/1.1\r\n\r\n"};
  BOOST_TEST(send(garbage, noise.data(), noise.size(), MSG_NOSIGNAL) == static_cast<ssize_t>(noise.size()));
  BOOST_TEST(two.until([&] { return is_over(garbage); }));
  close(garbage);
  // Somebody who attaches another's key is not heard by it: the key has its link.
  const int thief = stranger(port);
  for (const Kind kind : {Kind::attach, Kind::ask}) {
    const auto frame = PeerLinks::emit({kind, key, {}});
    BOOST_TEST(send(thief, frame.data(), frame.size(), MSG_NOSIGNAL) == static_cast<ssize_t>(frame.size()));
  }
  pollfd p{thief, POLLIN, 0};
  BOOST_TEST(two.until([&] { return poll(&p, 1, 0) == 1; }));  // `unknown`
  BOOST_TEST(!two.listens.heard_of(Kind::ask));
  std::vector<int> many;
  for (int i = 0; i < 40; ++i) many.push_back(stranger(port));
  const auto turned_away = [&] { return std::count_if(many.begin(), many.end(), is_over); };
  BOOST_TEST(two.until([&] { return turned_away() >= 20; }));
  BOOST_TEST(two.dials.links.send({Kind::ask, key, {}}));
  BOOST_TEST(two.until([&] { return two.listens.heard_of(Kind::ask); }));
  for (const int fd : many) close(fd);
  close(thief);
}

BOOST_AUTO_TEST_CASE(a_peer_that_asks_and_never_reads_loses_the_link) {
  Two two;
  const Key key = PeerLinks::new_key();
  const std::uint16_t port = two.listens.links.port_at(loopback());
  two.listens.links.announce(key);
  const int mad = stranger(port);
  std::vector<std::byte> asked;
  for (int i = 0; i < 1024; ++i) {
    const auto frame = PeerLinks::emit({i == 0 ? Kind::attach : Kind::ask, i == 0 ? key : PeerLinks::new_key(), {}});
    asked.insert(asked.end(), frame.begin(), frame.end());
  }
  constexpr std::size_t kMost = std::size_t{64} << 20;
  std::size_t sent = 0;
  BOOST_TEST(two.until(
      [&] {
        ssize_t n = 0;
        while (sent < kMost && n >= 0) {
          const std::size_t at = sent % asked.size();
          n = send(mad, asked.data() + at, asked.size() - at, MSG_NOSIGNAL | MSG_DONTWAIT);
          if (n > 0) sent += static_cast<std::size_t>(n);
        }
        return sent >= kMost || errno != EAGAIN;
      },
      50'000));
  BOOST_TEST(sent < kMost);
  BOOST_TEST(two.until([&] { return two.listens.lost.contains(key); }));
  close(mad);
}

}  // namespace sdp
