// The software device between two processes: integrity, wake-ups, death, fork.
#include <linux/futex.h>
#include <signal.h>
#include <sys/epoll.h>
#include <sys/mman.h>
#include <sys/wait.h>

#include <random>

#include "rdma_core/base/clock.hpp"
#include "tests/rdma_core/shm_pair.hpp"

using namespace rdma;
using namespace rdma::shm;
using namespace rdma::shm::test;

BOOST_TEST_DONT_PRINT_LOG_VALUE(rdma::Post)
BOOST_TEST_DONT_PRINT_LOG_VALUE(rdma::WcStatus)

namespace {

/// Runs `body` in a child; its result is the exit status. A child must not run the test runner's own exit.
template <class Body>
pid_t spawn(Body body) {
  const pid_t pid = fork();
  BOOST_REQUIRE(pid >= 0);
  if (pid == 0) {
    alarm(120);
    _exit(body());
  }
  return pid;
}
int exit_of(pid_t pid) {
  int status = 0;
  BOOST_REQUIRE(waitpid(pid, &status, 0) == pid);
  return WIFEXITED(status) ? WEXITSTATUS(status) : 1000 + WTERMSIG(status);
}

std::uint64_t mix(std::uint64_t x) {
  x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9u;
  x = (x ^ (x >> 27)) * 0x94d049bb133111ebu;
  return x ^ (x >> 31);
}

/// Spins, but lets the other side run where there is one core.
struct Spin {
  unsigned n = 0;
  void operator()() {
    if (++n % 64 == 0) sched_yield();
    cpu_relax();
  }
};

}  // namespace

BOOST_AUTO_TEST_CASE(a_million_messages_of_random_sizes_arrive_whole_and_in_order) {
  constexpr std::uint64_t kMessages = 1'000'000;
  constexpr unsigned kDepth = 64, kBuf = 512;
  Pair p(kDepth, kBuf);
  for (unsigned i = 0; i < kDepth; ++i) {
    p.a.post(i);
    p.b.post(i);
  }
  const auto size_of = [](std::uint64_t n) { return 8 + mix(n) % (mix(n + 7) % 16 == 0 ? kBuf - 8 + 1 : 100); };
  const pid_t child = spawn([&] {
    unsigned unacknowledged = 0;
    Spin spin;
    for (std::uint64_t n = 0; n < kMessages;) {
      Wc wcs[16];
      const unsigned got = p.b.cq->poll(wcs);
      if (got == 0) spin();
      for (unsigned i = 0; i < got; ++i, ++n) {
        if (wcs[i].status != WcStatus::success || wcs[i].byte_len != size_of(n)) return 1;
        const std::byte* buf = p.b.buffer(static_cast<unsigned>(wcs[i].wr_id));
        std::uint64_t first;
        std::memcpy(&first, buf, 8);
        if (first != n) return 2;
        for (std::size_t k = 8; k < wcs[i].byte_len; ++k)
          if (buf[k] != static_cast<std::byte>(n * 31 + k)) return 3;
        const RecvWr wr{.wr_id = wcs[i].wr_id, .addr = p.b.buffer(static_cast<unsigned>(wcs[i].wr_id)), .length = kBuf};
        if (p.b.qp->post_recv({&wr, 1}) != Post::ok) return 4;
        if (++unacknowledged == kDepth / 4) {
          unacknowledged = 0;
          const Sge none = sge_of(nullptr, 0);
          if (p.b.qp->post_send(send_wr(&none, 1, kInline)) != Post::ok) return 5;
        }
      }
    }
    return 0;
  });
  std::vector<std::byte> message(kBuf);
  unsigned credit = kDepth;
  Spin spin;
  for (std::uint64_t n = 0; n < kMessages; ++n) {
    Wc wc;
    for (;;) {
      while (p.a.cq->poll({&wc, 1}) == 1) {
        credit += kDepth / 4;
        p.a.post(static_cast<unsigned>(wc.wr_id));
      }
      if (credit != 0) break;
      spin();
      if (waitpid(child, nullptr, WNOHANG) != 0) BOOST_FAIL("the receiver gave up");
    }
    std::memcpy(message.data(), &n, 8);
    const std::size_t size = size_of(n);
    for (std::size_t k = 8; k < size; ++k) message[k] = static_cast<std::byte>(n * 31 + k);
    const std::size_t cut = mix(n + 3) % (size + 1);
    const Sge sges[2] = {sge_of(message.data(), cut), sge_of(message.data() + cut, size - cut)};
    BOOST_REQUIRE(p.a.qp->post_send(send_wr(sges, 2, kInline)) == Post::ok);
    --credit;
  }
  BOOST_TEST(exit_of(child) == 0);
}

namespace {

/// Waits for a completion by sleeping. False: it slept although one was there, for five seconds.
bool sleep_for(End& end, bool by_word, int epoll_fd, Wc& wc) {
  for (;;) {
    if (end.cq->poll({&wc, 1}) == 1) return true;
    std::atomic<std::uint32_t>* word = end.cq->wake_word();
    const std::uint32_t seen = word->load(std::memory_order_acquire);
    end.cq->arm(by_word ? kWakeWord : kWakeChannel);
    end.device->arm_fence();
    if (end.cq->maybe_ready()) continue;
    if (by_word) {
      const timespec patience{5, 0};
      if (syscall(SYS_futex, word, FUTEX_WAIT, seen, &patience) != 0 && errno == ETIMEDOUT) return false;
    } else {
      epoll_event ev;
      if (epoll_wait(epoll_fd, &ev, 1, 5000) == 0) return false;
    }
  }
}

bool play(End& end, bool serves, int rounds) {
  const int ep = epoll_create1(EPOLL_CLOEXEC);
  epoll_event ev{EPOLLIN | EPOLLET, {}};
  if (epoll_ctl(ep, EPOLL_CTL_ADD, end.channel->fd(), &ev) != 0) return false;
  std::mt19937 random(serves ? 1 : 2);
  for (int i = 0; i < rounds; ++i) {
    const Sge sge = sge_of(&i, sizeof i);
    if (serves && end.qp->post_send(send_wr(&sge, 1, kInline)) != Post::ok) return false;
    Wc wc;
    if (!sleep_for(end, random() % 4 != 0, ep, wc)) return false;
    const RecvWr wr{.wr_id = wc.wr_id, .addr = end.buffer(static_cast<unsigned>(wc.wr_id)), .length = end.buf_bytes};
    if (end.qp->post_recv({&wr, 1}) != Post::ok) return false;
    for (unsigned k = random() % 200; k > 0; --k) cpu_relax();  // meet the peer at every point of its way to sleep
    if (!serves && end.qp->post_send(send_wr(&sge, 1, kInline)) != Post::ok) return false;
  }
  return true;
}

}  // namespace

BOOST_AUTO_TEST_CASE(no_wake_up_is_lost) {
  constexpr int kRounds = 100'000;
  Pair p(8, 64);
  for (unsigned i = 0; i < 4; ++i) {
    p.a.post(i);
    p.b.post(i);
  }
  const pid_t child = spawn([&] { return play(p.b, false, kRounds) ? 0 : 1; });
  BOOST_TEST(play(p.a, true, kRounds));
  BOOST_TEST(exit_of(child) == 0);
}

BOOST_AUTO_TEST_CASE(what_a_killed_sender_had_sent_is_there) {
  Pair p(64, 64);
  for (unsigned i = 0; i < 32; ++i) p.a.post(i);
  const pid_t child = spawn([&] {
    for (std::uint64_t n = 0; n < 20; ++n) {
      const Sge sge = sge_of(&n, sizeof n);
      if (p.b.qp->post_send(send_wr(&sge, 1, kInline)) != Post::ok) return 1;
    }
    raise(SIGKILL);
    return 2;
  });
  BOOST_TEST(exit_of(child) == 1000 + SIGKILL);
  for (std::uint64_t n = 0; n < 20; ++n) {
    const Wc wc = wait_wc(*p.a.cq);
    std::uint64_t value;
    std::memcpy(&value, p.a.buffer(static_cast<unsigned>(wc.wr_id)), 8);
    BOOST_TEST(value == n);
  }
  BOOST_TEST(!p.a.cq->maybe_ready());
}

BOOST_AUTO_TEST_CASE(a_buffer_taken_back_is_not_written_any_more) {
  Pair p(64, 4096);
  const pid_t child = spawn([&] {
    std::vector<std::byte> ones(4096, std::byte{1});
    const Sge sge = sge_of(ones.data(), ones.size());
    // The receiver's own counter is the credit: the sender is never without a buffer until it is shut out.
    const auto page = static_cast<std::size_t>(static_cast<std::uint32_t>(p.a.qp->qpn())) * kPageBytes;
    const auto& posted = at<ShmQpPage>(p.a.device->links().all()[0]->own->base() + page)->posted;
    std::uint64_t sent = 0;
    Spin spin;
    for (;;) {
      if (sent == posted.load(std::memory_order_acquire) && p.b.qp->state() == QpState::rts) {
        if (at<ShmQpPage>(p.a.device->links().all()[0]->own->base() + page)->closed.load() == 0) {
          spin();
          continue;
        }
      }
      if (p.b.qp->post_send(send_wr(&sge, 1, kInline)) != Post::ok || p.b.qp->state() != QpState::rts) break;
      ++sent;
    }
    Wc wc;
    return p.b.cq->poll({&wc, 1}) == 1 && wc.status == WcStatus::retry_exceeded ? 0 : 1;
  });
  for (unsigned i = 0; i < 64; ++i) p.a.post(i);
  std::uint64_t received = 0;
  const Nanos end = SteadyClock().now() + 200'000'000;
  while (SteadyClock().now() < end) {
    Wc wcs[64];
    const unsigned n = p.a.cq->poll(wcs);
    for (unsigned i = 0; i < n; ++i) p.a.post(static_cast<unsigned>(wcs[i].wr_id));
    received += n;
  }
  BOOST_REQUIRE(p.a.qp->modify({.state = QpState::error}));
  std::memset(p.a.extent->addr, 2, p.a.extent->length);
  BOOST_TEST(received > 0);
  BOOST_TEST(exit_of(child) == 0);
  for (std::size_t i = 0; i < p.a.extent->length; ++i) BOOST_REQUIRE(p.a.extent->addr[i] == std::byte{2});
}

BOOST_AUTO_TEST_CASE(a_peer_that_stopped_in_the_middle_delays_us_once_and_briefly) {
  Pair p(4, 64);
  // What a stopped sender leaves: its mark in its own page. a's peer is b.
  const auto page = static_cast<std::uint32_t>(p.b.qp->qpn()) * kPageBytes;
  at<ShmQpPage>(p.b.device->links().all()[0]->own->base() + page)->sending.store(1);
  const Nanos start = SteadyClock().now();
  BOOST_REQUIRE(p.a.qp->modify({.state = QpState::error}));
  BOOST_TEST(SteadyClock().now() - start >= 50'000'000);
  BOOST_REQUIRE(p.a.qp->modify({.state = QpState::reset}));
  move_to_rts(p.a, p.b.qp->qpn(), NodeType::ib_ca);
  BOOST_REQUIRE(p.a.qp->modify({.state = QpState::error}));  // does not hang, does not wait again
}

BOOST_AUTO_TEST_CASE(a_forks_child_can_say_a_last_word_and_leaves_the_parents_qp_alone) {
  Pair p(8, 64);
  p.b.post(0);
  p.b.post(1);
  auto words = std::move(*p.b.pd->map_extent(4096));
  const pid_t child = spawn([&] {
    p.a.device->abandon_in_child();
    const std::uint64_t end = 99;
    const Sge sge = sge_of(&end, sizeof end);
    if (p.a.qp->post_send({.opcode = WrOpcode::rdma_write,
                           .flags = kInline | kSolicited,
                           .sge_count = 1,
                           .sges = &sge,
                           .remote_addr = words->remote_base,
                           .rkey = words->rkey}) != Post::ok)
      return 1;
    if (p.a.pd->map_extent(4096).ok() || p.a.device->create_pd(p.a.path).ok()) return 2;
    if (p.a.qp->modify({.state = QpState::error}).ok()) return 3;
    p.a.qp.reset();
    p.a.extent.reset();
    p.a.pd.reset();
    return 0;
  });
  BOOST_TEST(exit_of(child) == 0);
  std::uint64_t word;
  std::memcpy(&word, words->addr, 8);
  BOOST_TEST(word == 99u);
  // The parent's QP works in both directions.
  p.a.post(0);
  const Sge sge = sge_of("hello", 5);
  BOOST_TEST(p.a.qp->post_send(send_wr(&sge, 1, kInline)) == Post::ok);
  BOOST_TEST(wait_wc(*p.b.cq).byte_len == 5u);
  BOOST_TEST(p.b.qp->post_send(send_wr(&sge, 1, kInline)) == Post::ok);
  BOOST_TEST(wait_wc(*p.a.cq).byte_len == 5u);
}

BOOST_AUTO_TEST_CASE(a_forks_child_has_a_new_identity_and_bell_under_the_old_number) {
  auto device = std::move(*ShmDevice::create({.segment_bytes = kTestSegment}));
  BOOST_REQUIRE(device->self_path().ok());
  const int parents = device->bell().fd();
  const int poller = epoll_create1(EPOLL_CLOEXEC);
  epoll_event event{EPOLLIN | EPOLLET, {}};
  BOOST_REQUIRE_EQUAL(epoll_ctl(poller, EPOLL_CTL_ADD, parents, &event), 0);
  (void)epoll_wait(poller, &event, 1, 0);
  const pid_t child = spawn([&] {
    const ProcessId before = device->process_id();
    device->abandon_in_child();
    if (device->process_id() == before || device->bell().fd() != parents || !device->links().all().empty()) return 1;
    device->bell().ring();
    return device->self_path().ok() ? 0 : 2;
  });
  BOOST_TEST(exit_of(child) == 0);
  BOOST_TEST(epoll_wait(poller, &event, 1, 0) == 0);  // the child's ring was not ours
  close(poller);
}
