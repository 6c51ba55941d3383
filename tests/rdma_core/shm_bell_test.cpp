// The bell that peers, also of other users, ring: it wakes every time, and what a stranger does with his end of it costs nobody a
// wait.
#include <fcntl.h>
#include <sys/epoll.h>
#include <sys/eventfd.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <sys/wait.h>
#include <unistd.h>

#include <boost/test/unit_test.hpp>
#include <cerrno>

#include "rdma_core/drivers/shm/shm_bell.hpp"

using namespace rdma::shm;

namespace {

/// Who polls a bell for edges, as threads and epoll sets do.
class Sleeper {
 public:
  explicit Sleeper(const OwnBell& bell) : fd_(epoll_create1(EPOLL_CLOEXEC)) {
    epoll_event event{EPOLLIN | EPOLLET, {}};
    BOOST_REQUIRE_EQUAL(epoll_ctl(fd_, EPOLL_CTL_ADD, bell.fd(), &event), 0);
    (void)woken();
  }
  ~Sleeper() { close(fd_); }
  bool woken() {
    epoll_event event{};
    return epoll_wait(fd_, &event, 1, 0) == 1;
  }

 private:
  int fd_;
};

struct Bells {
  Bells() {
    BOOST_REQUIRE_EQUAL(own.open(), 0);
    BOOST_REQUIRE(peers.adopt(dup(own.far_fd())));
  }
  OwnBell own;
  PeerBell peers;
};

}  // namespace

BOOST_AUTO_TEST_SUITE(shm_bell)

BOOST_AUTO_TEST_CASE(each_ring_wakes_all_sleepers_once) {
  Bells bells;
  Sleeper one(bells.own), other(bells.own);
  for (int i = 0; i < 5; ++i) {
    if (i % 2 == 0)
      bells.own.ring();
    else
      bells.peers.ring();
    for (Sleeper* sleeper : {&one, &other}) {
      BOOST_TEST(sleeper->woken());
      BOOST_TEST(!sleeper->woken());
    }
  }
}

BOOST_AUTO_TEST_CASE(nothing_but_a_unix_stream_socket_is_taken_for_a_bell) {
  int ends[2];
  BOOST_REQUIRE_EQUAL(pipe(ends), 0);
  close(ends[0]);
  for (const int fd :
       {-1, ends[1], eventfd(0, 0), epoll_create1(0), socket(AF_INET, SOCK_STREAM, 0), socket(AF_UNIX, SOCK_DGRAM, 0)}) {
    PeerBell bell;
    BOOST_TEST(!bell.adopt(fd));
    BOOST_TEST(fcntl(fd, F_GETFD) == -1);
  }
}

BOOST_AUTO_TEST_CASE(nobody_puts_anything_into_a_bell_or_takes_something_out) {
  Bells bells;
  char byte = 0;
  BOOST_TEST(send(bells.own.far_fd(), &byte, 1, MSG_NOSIGNAL | MSG_DONTWAIT) == -1);
  BOOST_TEST(errno == EPIPE);
  BOOST_TEST(recv(bells.own.far_fd(), &byte, 1, MSG_DONTWAIT) == -1);
  BOOST_TEST(errno == EAGAIN);
}

BOOST_AUTO_TEST_CASE(a_stranger_cannot_silence_a_bell_or_make_it_wait) {
  Bells bells;
  const int stranger = dup(bells.own.far_fd());
  BOOST_REQUIRE_EQUAL(fcntl(stranger, F_SETFL, 0), 0);  // blocking: for all who share it
  BOOST_REQUIRE_EQUAL(shutdown(stranger, SHUT_RDWR), 0);
  close(stranger);
  Sleeper sleeper(bells.own);
  for (int i = 0; i < 3; ++i) {
    bells.peers.ring();
    BOOST_TEST(sleeper.woken());
  }
}

BOOST_AUTO_TEST_CASE(a_bell_whose_process_is_gone_is_rung_in_vain) {
  PeerBell bell;
  {
    OwnBell gone;
    BOOST_REQUIRE_EQUAL(gone.open(), 0);
    BOOST_REQUIRE(bell.adopt(dup(gone.far_fd())));
  }
  bell.ring();
}

BOOST_AUTO_TEST_CASE(a_child_without_descriptors_has_no_bell_rather_than_its_parents) {
  OwnBell bell;
  BOOST_REQUIRE_EQUAL(bell.open(), 0);
  const pid_t child = fork();
  if (child == 0) {
    const rlimit none{0, 0};
    if (setrlimit(RLIMIT_NOFILE, &none) != 0) _exit(2);
    bell.renew_in_child();
    _exit(bell.fd() == -1 && bell.far_fd() == -1 ? 0 : 1);
  }
  int status = 0;
  BOOST_REQUIRE_EQUAL(waitpid(child, &status, 0), child);
  BOOST_TEST(status == 0);
}

BOOST_AUTO_TEST_CASE(a_socket_that_took_the_number_is_left_alone) {
  OwnBell bell;
  BOOST_REQUIRE_EQUAL(bell.open(), 0);
  int ends[2];
  BOOST_REQUIRE_EQUAL(socketpair(AF_UNIX, SOCK_STREAM, 0, ends), 0);
  BOOST_REQUIRE_EQUAL(dup2(ends[0], bell.far_fd()), bell.far_fd());
  bell.ring();
  BOOST_TEST(send(ends[0], "x", 1, MSG_NOSIGNAL) == 1);
  close(ends[0]);
  close(ends[1]);
}

BOOST_AUTO_TEST_SUITE_END()
