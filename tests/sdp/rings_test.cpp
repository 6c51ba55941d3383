#include "sdp/rings.hpp"

#include <linux/io_uring.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <boost/test/unit_test.hpp>
#include <chrono>
#include <memory>
#include <thread>

namespace sdp {

using namespace std::chrono_literals;

namespace {

std::uintptr_t address(const void* at) { return reinterpret_cast<std::uintptr_t>(at); }

/// Of the kernel's making, mapped like a program's.
class Ring {
 public:
  Ring() : fd_(static_cast<int>(syscall(SYS_io_uring_setup, 8, &params_))) {
    queues_ = map(IORING_OFF_SQ_RING);
    requests_ = map(IORING_OFF_SQES);
  }
  ~Ring() {
    if (queues_ != MAP_FAILED) munmap(queues_, kBytes);
    if (requests_ != MAP_FAILED) munmap(requests_, kBytes);
    close(fd_);
  }
  Ring(const Ring&) = delete;
  Ring& operator=(const Ring&) = delete;
  bool is_there() const { return requests_ != MAP_FAILED; }
  FollowedRings::Memory memory() const { return {address(requests_), address(queues_) + 64, address(queues_) + 128}; }

 private:
  static constexpr std::size_t kBytes = 512;  // of a page
  void* map(off_t at) { return mmap(nullptr, kBytes, PROT_READ | PROT_WRITE, MAP_SHARED, fd_, at); }
  io_uring_params params_{};
  int fd_;
  void *queues_, *requests_;
};

bool finds_one_within(RingWatch& watch, std::chrono::milliseconds longest) {
  const auto until = std::chrono::steady_clock::now() + longest;
  while (std::chrono::steady_clock::now() < until)
    if (watch.finds_one(true)) return true;
  return false;
}
bool a_look_finds_one() { return RingWatch().finds_one(true); }

}  // namespace

BOOST_AUTO_TEST_CASE(followed_rings_know_their_memory) {
  FollowedRings rings;
  BOOST_TEST(rings.add({0x3010, 0x5000, 0x8fff}));
  BOOST_TEST(rings.has(0x3010));
  BOOST_TEST(!rings.has(0x5000));
  BOOST_TEST(rings.have_memory_in(0x3000, 0x4000));
  BOOST_TEST(rings.have_memory_in(0x5000, 0x6000));
  BOOST_TEST(rings.have_memory_in(0x8000, 0x9000));
  BOOST_TEST(!rings.have_memory_in(0x4000, 0x5000));
  BOOST_TEST(!rings.have_memory_in(0, 0x1000), "what is free has no memory");
  rings.remove(0x3010);
  BOOST_TEST(!rings.has(0x3010));
  BOOST_TEST(!rings.have_memory_in(0x5000, 0x6000));
}

BOOST_AUTO_TEST_CASE(only_so_many_rings_are_followed) {
  FollowedRings rings;
  std::uintptr_t each = 1;
  while (rings.add({each, each, each})) BOOST_REQUIRE(++each < 1000U);
  rings.remove(1);
  BOOST_TEST(rings.add({each, each, each}));
  BOOST_TEST(!rings.add({each, each, each}));
}

BOOST_AUTO_TEST_CASE(a_look_finds_a_ring_that_is_not_followed) {
  BOOST_TEST(!a_look_finds_one());
  auto ring = std::make_unique<Ring>();
  if (!ring->is_there()) return;  // none are to be had here
  BOOST_TEST(a_look_finds_one());
  BOOST_TEST(followed_rings().add(ring->memory()));
  BOOST_TEST(!a_look_finds_one());
  const Ring other;
  BOOST_TEST(a_look_finds_one(), "beside one that is followed");
  followed_rings().remove(ring->memory().requests);
}

BOOST_AUTO_TEST_CASE(a_look_believes_nothing_while_rings_come_and_go) {
  const Ring ring;
  if (!ring.is_there()) return;  // none are to be had here
  {
    const FollowedRings::Change here(followed_rings());
    BOOST_TEST(!a_look_finds_one());
  }
  BOOST_TEST(a_look_finds_one());
}

// A clock is read twice, and an interrupt may come in between: that costs a look.
BOOST_AUTO_TEST_CASE(a_look_is_spared_while_no_other_thread_runs) {
  if (!Ring().is_there()) return;  // none are to be had here
  bool was_spared = false;
  for (int attempt = 0; attempt < 10 && !was_spared; ++attempt) {
    RingWatch watch;
    BOOST_REQUIRE(!watch.finds_one(true));
    const Ring ring;  // by the thread that looks, whose own doings are none of the program's
    was_spared = !finds_one_within(watch, 50ms);
    std::thread([] { (void)Ring(); }).join();
    BOOST_TEST(finds_one_within(watch, 10s));
  }
  BOOST_TEST(was_spared);
}

}  // namespace sdp
