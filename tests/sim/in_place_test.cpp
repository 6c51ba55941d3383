// Programs with threads that send and receive in place, by streams with lanes that promise no more than those of real RDMA devices,
// and by those of the software device: what arrives is what was sent, in order and once, though each sender writes to its memory
// the moment send() returns; signals, time-outs, take-downs and failures of the path come at any moment, and no call waits for
// ever.
#include <poll.h>
#include <pthread.h>

#include <atomic>
#include <csignal>
#include <mutex>
#include <thread>
#include <vector>

#include "rdma_core/base/program_call.hpp"
#include "tests/sim/served_pair.hpp"

namespace sdp::sim {
namespace {

constexpr std::size_t kLargest = std::size_t{1} << 20;

template <Hosts::Order order>
Hosts& hosts_of(std::uint64_t seed) {
  static std::array<Hosts, 2> hosts{Hosts(rdma::NodeType::ib_ca, order), Hosts(rdma::NodeType::rnic, order)};
  return hosts[seed % 2];
}

struct Case {
  LaneLimits limits;
  bool both_ways = false;
  std::uint64_t bytes = 0;
  unsigned small_reads = 0, polled_reads = 0, odd_reads = 0;  ///< per cent
  bool signals = false, restarts = false, takes_down = false, fails = false, has_timeout = false, lazy = false;
  bool signals_readers = false, has_read_timeout = false;
  unsigned all_reads = 0;  ///< per cent that wait for all
};

Case case_of(std::uint64_t seed) {
  Chance chance(seed * 57 + 3);
  Case c;
  c.limits.conn.recv_size = 2048;
  c.limits.conn.recv_buffers = 8;
  c.limits.zero_copy_from = 16384;
  c.both_ways = chance.percent(40);
  c.bytes = chance.pick(1, 6'000'000);
  c.small_reads = static_cast<unsigned>(chance.percent(50) ? 0 : chance.pick(0, 100));
  c.polled_reads = static_cast<unsigned>(chance.percent(70) ? 0 : chance.pick(0, 100));
  c.odd_reads = static_cast<unsigned>(chance.percent(50) ? 0 : chance.pick(0, 30));
  c.signals = chance.percent(30);
  c.takes_down = chance.percent(25);
  c.fails = !c.takes_down && chance.percent(25);
  c.has_timeout = chance.percent(20);
  c.lazy = chance.percent(20);
  c.restarts = chance.percent(50);
  c.signals_readers = chance.percent(30);
  c.has_read_timeout = chance.percent(20);
  c.all_reads = static_cast<unsigned>(chance.percent(50) ? 0 : chance.pick(0, 100));
  return c;
}

struct Totals {
  std::uint64_t sent_in_place = 0, received_in_place = 0, adverts = 0, cancelled = 0, refused = 0, by_tcp = 0;
  std::uint64_t written = 0, placed = 0, sinks = 0, sinks_cancelled = 0, sinks_unused = 0;
};

/// Both ends and their programs: a sender and a reader on each side, as far as there is something for them.
class Programs {
 public:
  Programs(std::uint64_t seed, const Case& c, Hosts& hosts) : seed_(seed), case_(c), hosts_(hosts), ends_(hosts, c.limits, 0) {
    for (unsigned i : {0U, 1U}) {
      StreamImpl& s = *ends_.end(i).stream;
      s.blocking = Blocking::yes;
      fcntl(ends_.end(i).fd, F_SETFL, 0);
      if (c.has_timeout) s.snd_timeout_ns = 3'000'000;
      if (c.has_read_timeout) s.rcv_timeout_ns = 3'000'000;
      room_[i] = std::move(*hosts.host[i].context->pd->map_extent(kLargest));
      memory_[i] = std::move(*hosts.host[i].context->pd->map_extent(kLargest));
      ends_.attach(i);
    }
  }
  void run(Totals& totals) {
    const unsigned ways = case_.both_ways ? 2 : 1;
    std::atomic<unsigned> busy{2 * ways};
    std::vector<std::thread> threads;
    std::vector<pthread_t> senders, readers;
    for (unsigned i = 0; i < ways; ++i) {
      threads.emplace_back([&, i] { guarded(busy, [&] { send_all(i); }); });
      senders.push_back(threads.back().native_handle());
      threads.emplace_back([&, i] { guarded(busy, [&] { read_all(1 - i); }); });
      readers.push_back(threads.back().native_handle());
    }
    Chance chance(seed_ ^ 0xD15);
    const std::int64_t begun = now();
    const std::int64_t strikes_at = begun + static_cast<std::int64_t>(chance.pick(0, 20'000'000));
    bool struck = false;
    while (busy.load() != 0) {
      if (now() - begun > 30'000'000'000) stuck();
      if (case_.signals && chance.percent(20))
        pthread_kill(senders[chance.pick(0, senders.size() - 1)], case_.restarts ? SIGUSR2 : SIGUSR1);
      if (case_.signals_readers && chance.percent(20))
        pthread_kill(readers[chance.pick(0, readers.size() - 1)], case_.restarts ? SIGUSR2 : SIGUSR1);
      for (unsigned i : {0U, 1U}) ends_.serve(i);
      if (!struck && now() >= strikes_at && (case_.takes_down || case_.fails)) {
        struck = true;
        const auto i = static_cast<unsigned>(chance.pick(0, 1));
        if (case_.takes_down)
          ends_.end(i).handle().take_down(LaneReason::mode);
        else
          fail(i);
      }
      timespec moment{0, 300'000};
      nanosleep(&moment, nullptr);
    }
    for (std::thread& t : threads) t.join();
    if (!problem_.empty()) throw Broken{problem_};
    for (unsigned i : {0U, 1U}) count(totals, i);
    for (unsigned i : {0U, 1U}) ends_.close(i);
    for (int round = 0; round < 6; ++round)
      for (unsigned i : {0U, 1U}) ends_.serve(i);
    ends_.come_home();
  }

 private:
  static std::int64_t now() { return rdma::SteadyClock{}.now(); }
  template <class Body>
  void guarded(std::atomic<unsigned>& busy, Body body) {
    try {
      body();
    } catch (const Broken& b) {
      const std::lock_guard guard(mutex_);
      if (problem_.empty()) problem_ = b.what;
      for (unsigned i : {0U, 1U}) ::shutdown(ends_.end(i).fd, SHUT_RDWR);
    }
    busy.fetch_sub(1);
  }
  [[noreturn]] void stuck() {
    std::fprintf(stderr, "in_place: seed %llu: stuck: %llu of %llu, %llu of %llu\n", static_cast<unsigned long long>(seed_),
                 static_cast<unsigned long long>(got_[1].load()), static_cast<unsigned long long>(sent_[0].load()),
                 static_cast<unsigned long long>(got_[0].load()), static_cast<unsigned long long>(sent_[1].load()));
    std::abort();
  }
  void fail(unsigned i) {
    StreamImpl& s = *ends_.end(i).stream;
    (void)s.lock.lock();
    if (ends_.fail(i)) s.lane->wake_sleepers();
    s.lock.unlock();
  }

  void send_all(unsigned i) {
    Chance chance(seed_ * 5 + i);
    StreamEnd& e = ends_.end(i);
    std::byte* const memory = memory_[i]->addr;
    for (std::uint64_t sent = 0; sent < case_.bytes;) {
      const std::size_t bytes =
          std::min<std::uint64_t>(chance.percent(60) ? chance.pick(16384, kLargest) : chance.size(kLargest), case_.bytes - sent);
      const std::size_t at = chance.pick(0, std::min<std::size_t>(kLargest - bytes, 9000));
      fill(memory + at, bytes, stream(i), sent);
      rdma::sys::forget_handlers();
      const std::int64_t n = e.handle().send(e.fd, memory + at, bytes, MSG_NOSIGNAL);
      std::memset(memory, 0x5A, kLargest);  // it is ours again
      if (n > 0)
        sent += static_cast<std::uint64_t>(n);
      else if (!(n == -EINTR && (!case_.restarts || case_.has_timeout)) && !(n == -EAGAIN && case_.has_timeout))
        broken("send of ", bytes, " at ", sent, ": ", n);
      if (n > static_cast<std::int64_t>(bytes)) broken("send of ", bytes, " took ", n);
      sent_[i] = sent;
    }
    if (const int r = e.handle().shutdown(e.fd, SHUT_WR); r != 0) broken("shutdown: ", r);
  }

  void read_all(unsigned i) {
    Chance chance(seed_ * 7 + i);
    StreamEnd& e = ends_.end(i);
    std::byte* const memory = room_[i]->addr;
    for (std::uint64_t got = 0;;) {
      const std::size_t room = chance.percent(case_.small_reads) ? chance.pick(1, 9000) : chance.pick(1, kLargest);
      if (case_.lazy && chance.percent(10)) {
        timespec moment{0, static_cast<long>(chance.pick(1, 20'000'000))};
        nanosleep(&moment, nullptr);
      }
      int flags = 0;
      if (chance.percent(case_.polled_reads)) {
        (void)e.handle().poll(POLLIN);
        flags = MSG_DONTWAIT;
      } else if (chance.percent(case_.odd_reads)) {
        flags = chance.percent(50) ? MSG_PEEK : chance.percent(50) ? MSG_TRUNC : 0;
        if (flags == 0) (void)e.handle().inq(e.fd);
      } else if (chance.percent(case_.all_reads)) {
        flags = MSG_WAITALL;
      }
      std::memset(memory, 0x5A, kLargest);
      rdma::sys::forget_handlers();
      const std::int64_t n = e.handle().recv(e.fd, memory, room, flags);
      if ((n == -EAGAIN && (flags == MSG_DONTWAIT || case_.has_read_timeout)) || (n == -EINTR && case_.signals_readers)) {
        if (std::any_of(memory, memory + kLargest, [](std::byte b) { return b != std::byte{0x5A}; }))
          broken("recv said ", n, " and has written at ", got);
        sched_yield();
        continue;
      }
      if (n == 0) {
        if (got != case_.bytes) broken("the end came at ", got, " of ", case_.bytes);
        return;
      }
      if (n < 0) broken("recv at ", got, " of ", case_.bytes, ": ", n);
      if (flags != MSG_TRUNC) verify(memory, static_cast<std::size_t>(n), stream(1 - i), got, "recv");
      if (flags != MSG_PEEK) got += static_cast<std::uint64_t>(n);
      got_[i] = got;
    }
  }

  void count(Totals& totals, unsigned i) {
    const ConnStats& s = *ends_.end(i).stream->stats;
    totals.sent_in_place += s.zero_copy.bytes_sent.get();
    totals.received_in_place += s.zero_copy.bytes_received.get();
    totals.adverts += s.zero_copy.adverts.get();
    totals.cancelled += s.zero_copy.cancelled.get();
    totals.refused += s.zero_copy.refused.get();
    totals.by_tcp += s.tcp.bytes_received.get();
    totals.written += s.zero_copy.bytes_written.get();
    totals.placed += s.zero_copy.bytes_placed.get();
    totals.sinks += s.zero_copy.sinks.get();
    totals.sinks_cancelled += s.zero_copy.sinks_cancelled.get();
    totals.sinks_unused += s.zero_copy.sinks_unused.get();
  }
  std::uint64_t stream(unsigned i) const { return seed_ * 2 + i; }

  std::uint64_t seed_;
  Case case_;
  Hosts& hosts_;
  ServedPair ends_;
  std::array<std::unique_ptr<rdma::Mr>, 2> memory_, room_;
  std::array<std::atomic<std::uint64_t>, 2> sent_{}, got_{};
  std::mutex mutex_;
  std::string problem_;
};

template <Hosts::Order order>
Totals run_all(const char* name) {
  struct sigaction handler {};
  handler.sa_sigaction = [](int number, siginfo_t*, void* context) { rdma::sys::handler_has_run(context, number == SIGUSR2); };
  handler.sa_flags = SA_SIGINFO;
  sigaction(SIGUSR1, &handler, nullptr);
  handler.sa_flags |= SA_RESTART;
  sigaction(SIGUSR2, &handler, nullptr);
  Totals totals;
  for_each_seed(name, 600, [&](std::uint64_t seed) {
    Case c = case_of(seed);
    if (order == Hosts::Order::at_once_in_place) c.fails = false;  // not with bytes under way: that resets the connection
    Programs(seed, c, hosts_of<order>(seed)).run(totals);
  });
  BOOST_TEST_MESSAGE(totals.adverts << " offers, " << totals.cancelled << " cancelled, " << totals.refused << " refused; "
                                    << totals.sent_in_place << " bytes in place (" << totals.received_in_place
                                    << " as the readers say), " << totals.by_tcp << " by TCP; " << totals.sinks << " sinks, "
                                    << totals.sinks_cancelled << " cancelled, " << totals.sinks_unused << " unused; "
                                    << totals.placed << " bytes of " << totals.written << " written");
  return totals;
}

}  // namespace

BOOST_AUTO_TEST_CASE(threads_send_and_receive_in_place_through_everything) {
  const Totals totals = run_all<Hosts::Order::unpromised>("in_place");
  if (Seeds(600).count < 100) return;  // a replay
  BOOST_TEST(totals.sent_in_place > 50'000'000U);
  BOOST_TEST(totals.cancelled > 50U);
  BOOST_TEST(totals.refused > 50U);
  BOOST_TEST(totals.placed > 50'000'000U);
  BOOST_TEST(totals.sinks_cancelled > 50U);
  BOOST_TEST(totals.sinks_unused > 50U);
}

BOOST_AUTO_TEST_CASE(threads_read_program_memory_of_the_software_device_through_everything) {
  const Totals totals = run_all<Hosts::Order::at_once_in_place>("in_place_here");
  if (Seeds(600).count < 100) return;  // a replay
  BOOST_TEST(totals.sent_in_place == totals.received_in_place);
  BOOST_TEST(totals.sent_in_place > 50'000'000U);
  BOOST_TEST(totals.cancelled > 50U);
  BOOST_TEST(totals.refused > 20U);
}

}  // namespace sdp::sim
