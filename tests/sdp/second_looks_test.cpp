// When a connection looks again whose first search was in vain, and that both ends do it at the same time though nothing connects
// them: the service thread with a connection manager that fails as it is told.
#include "sdp/second_looks.hpp"

#include <arpa/inet.h>
#include <netinet/in.h>
#include <sys/socket.h>
#include <unistd.h>

#include <array>
#include <atomic>
#include <boost/test/unit_test.hpp>
#include <cstdlib>
#include <map>
#include <mutex>
#include <set>
#include <thread>
#include <vector>

#include "rdma_core/base/clock.hpp"
#include "rdma_core/cm/local_cm.hpp"
#include "rdma_core/drivers/shm/shm_device.hpp"
#include "sdp/engine.hpp"
#include "sdp/stream_impl.hpp"

namespace sdp {
namespace {

using rdma::cm::ConnectionManager;
using rdma::cm::Reason;

constexpr std::int64_t kSecond = ReturnPace::kSecond;

/// What becomes of the next first searches.
struct Fate {
  bool fails = false;
  Reason reason = Reason::no_peer;
  bool answered = false;
};
std::mutex fate_lock;
Fate fate;
void decree(const Fate& next) {
  const std::lock_guard guard(fate_lock);
  fate = next;
}

/// LocalCm, but for first searches.
class Unlucky final : public ConnectionManager {
 public:
  explicit Unlucky(std::unique_ptr<rdma::cm::LocalCm> local) : local_(std::move(local)) {}
  const char* name() const noexcept override { return "unlucky"; }
  const rdma::cm::Caps& caps() const noexcept override { return local_->caps(); }
  void on_event(std::function<void(const rdma::cm::Event&)> handler) override {
    handler_ = handler;
    local_->on_event(std::move(handler));
  }
  rdma::Result<rdma::Unit> offer(const rdma::cm::Anchor& anchor, unsigned ms) override {
    return fails(anchor.cookie) ? rdma::Unit{} : local_->offer(anchor, ms);
  }
  rdma::Result<rdma::Unit> dial(const rdma::cm::Anchor& anchor, unsigned ms, MakeQp make) override {
    return fails(anchor.cookie) ? rdma::Unit{} : local_->dial(anchor, ms, std::move(make));
  }
  void withdraw(std::uint64_t cookie) noexcept override { local_->withdraw(cookie); }
  rdma::Result<rdma::Unit> accept(rdma::cm::ConnId conn, rdma::Qp& qp, std::span<const std::byte> data) override {
    return local_->accept(conn, qp, data);
  }
  void reject(rdma::cm::ConnId conn, Reason reason, std::span<const std::byte> data) noexcept override {
    local_->reject(conn, reason, data);
  }
  rdma::Result<rdma::Unit> establish(rdma::cm::ConnId conn) override { return local_->establish(conn); }
  void disconnect(rdma::cm::ConnId conn) noexcept override { local_->disconnect(conn); }
  int fd() const noexcept override { return local_->fd(); }
  int next_timeout_ms() const noexcept override { return due_.empty() ? local_->next_timeout_ms() : 0; }
  void progress() override {
    for (const rdma::cm::Event& event : std::exchange(due_, {})) handler_(event);
    local_->progress();
  }

 private:
  bool fails(std::uint64_t cookie) {
    const std::lock_guard guard(fate_lock);
    if (!seen_.insert(cookie).second || !fate.fails) return false;
    rdma::cm::Event event;
    event.anchor_cookie = cookie;
    event.reason = fate.reason;
    event.answered = fate.answered;
    due_.push_back(event);
    return true;
  }

  std::unique_ptr<rdma::cm::LocalCm> local_;
  std::function<void(const rdma::cm::Event&)> handler_;
  std::set<std::uint64_t> seen_;
  std::vector<rdma::cm::Event> due_;
};

class Composed final : public engine::Composition {
 public:
  static std::unique_ptr<engine::Composition> make(const Options&) {
    auto mine = std::make_unique<Composed>();
    auto device = std::move(*rdma::shm::ShmDevice::create({rdma::NodeType::ib_ca, std::size_t{64} << 20}));
    mine->cm_ = std::make_unique<Unlucky>(std::move(*rdma::cm::LocalCm::create(*device)));
    mine->registry_.add_device(std::move(device));
    return mine;
  }
  rdma::DeviceRegistry& registry() noexcept override { return registry_; }
  ConnectionManager& cm() noexcept override { return *cm_; }
  void abandon_in_child() noexcept override {}

 private:
  rdma::DeviceRegistry registry_;
  std::unique_ptr<Unlucky> cm_;
};

struct End {
  int fd = -1;
  Stream stream;
  StreamImpl& impl() const { return *reinterpret_cast<StreamImpl*>(stream.word() & 0xffffffffffffULL); }
  const ConnStats& stats() const { return *impl().stats; }
};
using Ends = std::array<End, 2>;

/// What listens at one port; all ends are closed with it.
class Server {
 public:
  Server() {
    address_.sin_family = AF_INET;
    address_.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
    socklen_t length = sizeof address_;
    BOOST_REQUIRE_EQUAL(bind(listener_, reinterpret_cast<sockaddr*>(&address_), length), 0);
    BOOST_REQUIRE_EQUAL(listen(listener_, 8), 0);
    BOOST_REQUIRE_EQUAL(getsockname(listener_, reinterpret_cast<sockaddr*>(&address_), &length), 0);
  }
  ~Server() {
    for (const End& end : ends_) {
      end.stream.close(end.fd);
      ::close(end.fd);
    }
    ::close(listener_);
  }
  Ends connect() {
    const int client = socket(AF_INET, SOCK_STREAM, 0);
    BOOST_REQUIRE_EQUAL(::connect(client, reinterpret_cast<sockaddr*>(&address_), sizeof address_), 0);
    const int server = accept(listener_, nullptr, nullptr);
    BOOST_REQUIRE(server >= 0);
    const Ends ends{End{client, engine::track(client, Role::connector)}, End{server, engine::track(server, Role::acceptor)}};
    ends_.insert(ends_.end(), ends.begin(), ends.end());
    return ends;
  }

 private:
  const int listener_ = socket(AF_INET, SOCK_STREAM, 0);
  sockaddr_in address_{};
  std::vector<End> ends_;
};

template <class Done>
bool wait_until(Done done) {
  const rdma::SteadyClock clock;
  const rdma::Nanos deadline = clock.now() + 100 * kSecond;
  while (!done()) {
    if (clock.now() > deadline) return false;
    std::this_thread::sleep_for(std::chrono::milliseconds(1));
  }
  return true;
}

/// One message each way.
void talk(const Ends& ends) {
  for (const unsigned from : {0U, 1U}) {
    char out[100] = {}, in[100];
    BOOST_REQUIRE_EQUAL(ends[from].stream.send(ends[from].fd, out, sizeof out, 0), 100);
    BOOST_REQUIRE_EQUAL(ends[1 - from].stream.recv(ends[1 - from].fd, in, sizeof in, MSG_WAITALL), 100);
  }
}

/// Both ends have had their first search.
void let_both_fail(const Ends& ends) {
  for (int i = 0; i < 3; ++i) talk(ends);
  BOOST_REQUIRE(wait_until([&] {
    return std::ranges::all_of(ends, [](const End& end) {
      const Phase phase = end.impl().phase.load();
      return phase == Phase::resting || phase == Phase::final;
    });
  }));
}

void get_a_lane_later(const Ends& ends) {
  BOOST_REQUIRE(wait_until([&] {
    talk(ends);
    return std::ranges::all_of(ends, [](const End& end) { return end.stats().lane.bytes_received.get() > 1000; });
  }));
  for (const End& end : ends) {
    BOOST_TEST(end.stats().looks_again.get() == 1U);
    BOOST_TEST(!end.stats().will_look.load());
    BOOST_TEST((end.stats().reason.load() == LaneReason::none));
    BOOST_TEST(end.stats().lanes_returned.get() == 0U, "it is the first, and none has failed");
  }
}

struct Process {
  Process() {
    setenv("SDP_UPGRADE_MESSAGES", "2", 1);
    engine::configure(&Composed::make, nullptr);
  }
};

}  // namespace

BOOST_AUTO_TEST_CASE(the_times_are_those_of_the_first_look_whenever_one_asks) {
  const std::int64_t begun = 1000 * kSecond;
  const SecondLooks looks(begun);
  std::vector<std::int64_t> times;
  for (std::int64_t time = begun; times.size() < 12;) times.push_back(time = looks.after(time));
  BOOST_TEST(times[0] == begun + SecondLooks::kLook + ReturnPace::kFirst);
  for (std::size_t i = 1; i < times.size(); ++i) {
    const std::int64_t wait = times[i] - times[i - 1] - SecondLooks::kLook;
    BOOST_TEST(wait == std::min(ReturnPace::kFirst << i, ReturnPace::kLongest));
    BOOST_TEST(looks.after(times[i] - 1) == times[i]);
    BOOST_TEST(looks.after(times[i - 1] + 1) == times[i]);
  }
  const std::int64_t late = looks.after(begun + 1'000'000 * kSecond);
  BOOST_TEST(late > begun + 1'000'000 * kSecond);
  BOOST_TEST((late - times.back()) % (SecondLooks::kLook + ReturnPace::kLongest) == 0);
}

BOOST_AUTO_TEST_CASE(who_is_never_answered_gives_up_and_who_was_answered_does_not) {
  SecondLooks alone(0), met(0);
  BOOST_TEST(met.failed(true));
  for (unsigned i = 0; i < SecondLooks::kUnanswered; ++i) {
    BOOST_TEST(alone.failed(false));
    BOOST_TEST(met.failed(false));
  }
  BOOST_TEST(!alone.failed(false));
  BOOST_TEST(met.failed(false));
}

BOOST_FIXTURE_TEST_SUITE(by_the_service_thread, Process)

BOOST_AUTO_TEST_CASE(a_search_that_a_peer_has_answered_is_made_again) {
  for (const Reason reason : {Reason::timed_out, Reason::no_peer, Reason::refused, Reason::no_resources, Reason::peer_died}) {
    Server server;
    decree({true, reason, true});
    const Ends ends = server.connect();
    let_both_fail(ends);
    for (const End& end : ends) BOOST_TEST(end.stats().will_look.load());
    get_a_lane_later(ends);
  }
}

BOOST_AUTO_TEST_CASE(so_is_one_that_nobody_has_answered_on_one_host) {
  Server server;
  decree({true, Reason::no_peer, false});
  const Ends ends = server.connect();
  let_both_fail(ends);
  for (const End& end : ends) BOOST_TEST(end.stats().will_look.load());
  get_a_lane_later(ends);
}

BOOST_AUTO_TEST_CASE(so_is_one_for_a_service_that_others_have_lanes_with) {
  Server server;
  decree({});
  const Ends others = server.connect();
  BOOST_REQUIRE(wait_until([&] {
    talk(others);
    return others[0].stats().lane.bytes_received.get() != 0 && others[1].stats().lane.bytes_received.get() != 0;
  }));
  decree({true, Reason::no_peer, false});
  const Ends ends = server.connect();
  let_both_fail(ends);
  get_a_lane_later(ends);
}

BOOST_AUTO_TEST_CASE(what_does_not_pass_is_final) {
  for (const Reason reason : {Reason::version_mismatch, Reason::wrong_owner, Reason::unproven, Reason::bad_message}) {
    Server server;
    decree({true, reason, true});
    const Ends ends = server.connect();
    let_both_fail(ends);
    for (const End& end : ends) BOOST_TEST((end.impl().phase.load() == Phase::final));
  }
}

BOOST_AUTO_TEST_CASE(a_connection_that_is_used_elsewhere_or_closed_looks_no_more) {
  Server server;
  decree({true, Reason::timed_out, true});
  const Ends ends = server.connect();
  let_both_fail(ends);
  ends[0].stream.take_down(LaneReason::mode);
  BOOST_TEST((ends[0].impl().phase.load() == Phase::final));
  BOOST_TEST(!ends[0].stats().will_look.load());
  BOOST_TEST((ends[0].stats().reason.load() == LaneReason::mode));
}

BOOST_AUTO_TEST_SUITE_END()

}  // namespace sdp
