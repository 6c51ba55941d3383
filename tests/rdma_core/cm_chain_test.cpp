// The chain's own decisions, over managers that do what the test says. What every CM must do is in the conformance suite, which
// runs on a chain too.
#include "rdma_core/cm/cm_chain.hpp"

#include <poll.h>
#include <sys/eventfd.h>
#include <unistd.h>

#include <boost/test/unit_test.hpp>

#include "tests/support/sim_clock.hpp"

namespace rdma::cm {
namespace {

using Calls = std::vector<std::string>;

/// Notes what it is asked, and says what it is told to say.
class FakeCm final : public ConnectionManager {
 public:
  FakeCm(std::string name, Calls& calls, const Caps& caps = {100, 100, 100, false, true})
      : name_(std::move(name)), calls_(calls), caps_(caps), fd_(eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK)) {}
  ~FakeCm() override { close(fd_); }
  const char* name() const noexcept override { return name_.c_str(); }
  const Caps& caps() const noexcept override { return caps_; }
  void on_event(std::function<void(const Event&)> handler) override { handler_ = std::move(handler); }
  Result<Unit> offer(const Anchor& anchor, unsigned ttl_ms) override {
    note("offer " + std::to_string(anchor.cookie) + " for " + std::to_string(ttl_ms) + " fd " + std::to_string(anchor.fd));
    return answer(anchor.cookie);
  }
  void withdraw(std::uint64_t cookie) noexcept override { note("withdraw " + std::to_string(cookie)); }
  Result<Unit> dial(const Anchor& anchor, unsigned ms, MakeQp make) override {
    note("dial " + std::to_string(anchor.cookie) + " for " + std::to_string(ms));
    make_qp = std::move(make);
    return answer(anchor.cookie);
  }
  Result<Unit> accept(ConnId conn, Qp&, std::span<const std::byte>) override { return on("accept ", conn); }
  void reject(ConnId conn, Reason, std::span<const std::byte>) noexcept override { (void)on("reject ", conn); }
  Result<Unit> establish(ConnId conn) override { return on("establish ", conn); }
  void disconnect(ConnId conn) noexcept override { (void)on("disconnect ", conn); }
  int fd() const noexcept override { return fd_; }
  int next_timeout_ms() const noexcept override { return timeout; }
  void progress() override { note("progress"); }
  void abandon_in_child() noexcept override { note("abandon"); }

  void tell(EventKind kind, std::uint64_t cookie, std::uint64_t conn = 0, Reason reason = Reason::none) {
    Event e;
    e.kind = kind;
    e.conn = ConnId{conn};
    e.anchor_cookie = cookie;
    e.reason = reason;
    handler_(e);
  }
  void elsewhere(std::uint64_t cookie) { tell(EventKind::unreachable, cookie, 0, Reason::elsewhere); }
  void make_readable() const { BOOST_REQUIRE_EQUAL(eventfd_write(fd_, 1), 0); }

  bool says_elsewhere_at_once = false, fails = false;
  int timeout = -1;
  MakeQp make_qp;

 private:
  void note(const std::string& what) { calls_.push_back(name_ + ": " + what); }
  Result<Unit> on(const char* what, ConnId conn) {
    note(what + std::to_string(static_cast<std::uint64_t>(conn)));
    return Unit{};
  }
  Result<Unit> answer(std::uint64_t cookie) {
    if (fails) return fail(EMFILE, "no descriptor");
    if (says_elsewhere_at_once) elsewhere(cookie);
    return Unit{};
  }
  std::string name_;
  Calls& calls_;
  Caps caps_;
  int fd_;
  std::function<void(const Event&)> handler_;
};

struct Seen {
  EventKind kind;
  std::uint64_t conn, cookie;
  Reason reason;
  friend bool operator==(const Seen&, const Seen&) = default;
};
std::ostream& operator<<(std::ostream& out, const Seen& s) {
  return out << "event " << static_cast<int>(s.kind) << " of " << std::hex << s.conn << std::dec << ", cookie " << s.cookie << ": "
             << to_string(s.reason);
}
const Seen kNobody{EventKind::unreachable, 0, 1, Reason::elsewhere};

/// near is open from the beginning, far when it is wanted.
struct Fixture {
  Calls calls;
  sim::VirtualClock clock;
  FakeCm near{"near", calls}, far{"far", calls, {80, 120, 90, true, false}};
  bool far_opens = true;
  std::unique_ptr<CmChain> chain;
  std::vector<Seen> seen;

  Fixture() {
    auto made = CmChain::create({{"near", {}, &near}, {"far", [this] { return open_far(); }}}, clock);
    BOOST_REQUIRE(made);
    chain = std::move(*made);
    chain->on_event([this](const Event& e) {
      seen.push_back({e.kind, static_cast<std::uint64_t>(e.conn), e.anchor_cookie, e.reason});
    });
  }
  CmChain::Opened open_far() {
    calls.emplace_back("open far");
    if (!far_opens) return Err{std::string("no card")};
    return &far;
  }
  static Anchor anchor(std::uint64_t cookie) {
    Anchor a;
    a.fd = 7;
    a.cookie = cookie;
    return a;
  }
  void wait_ms(Nanos ms) { clock.advance_to(clock.now() + ms * 1'000'000); }
  void expect_calls(const Calls& want) {
    BOOST_CHECK_EQUAL_COLLECTIONS(calls.begin(), calls.end(), want.begin(), want.end());
    calls.clear();
  }
  void expect_events(const std::vector<Seen>& want) {
    BOOST_CHECK_EQUAL_COLLECTIONS(seen.begin(), seen.end(), want.begin(), want.end());
    seen.clear();
  }
};

/// What is only handed on.
template <class T>
T& some() {
  alignas(T) static std::byte memory[sizeof(T)];
  return *static_cast<T*>(static_cast<void*>(memory));
}

constexpr std::uint64_t far_id(std::uint64_t inner) { return inner | std::uint64_t{1} << 56; }

}  // namespace

BOOST_FIXTURE_TEST_CASE(the_first_is_asked_and_its_end_is_final_but_for_elsewhere, Fixture) {
  for (const Reason reason : {Reason::no_peer, Reason::wrong_owner, Reason::refused, Reason::timed_out, Reason::bad_message}) {
    BOOST_REQUIRE(chain->offer(anchor(1), 3000));
    expect_calls({"near: offer 1 for 3000 fd 7"});
    near.tell(EventKind::unreachable, 1, 0, reason);
    expect_events({{EventKind::unreachable, 0, 1, reason}});
    expect_calls({});
  }
}

BOOST_FIXTURE_TEST_CASE(elsewhere_goes_on_with_the_time_that_is_left_and_tells_nobody, Fixture) {
  BOOST_REQUIRE(chain->offer(anchor(1), 3000));
  calls.clear();
  wait_ms(1000);
  near.elsewhere(1);
  expect_calls({"open far", "far: offer 1 for 2000 fd -1"});  // by now the program may have closed it
  expect_events({});
  far.tell(EventKind::request, 1, 5);
  expect_events({{EventKind::request, far_id(5), 1, Reason::none}});

  BOOST_REQUIRE(chain->dial(anchor(2), 3000, [](Device&, const Path&, ConnId) { return ConnectionManager::Proposal{}; }));
  near.elsewhere(2);
  expect_calls({"near: dial 2 for 3000", "far: dial 2 for 3000"});
}

BOOST_FIXTURE_TEST_CASE(who_says_elsewhere_within_the_call_is_left_within_it, Fixture) {
  near.says_elsewhere_at_once = true;
  BOOST_REQUIRE(chain->offer(anchor(1), 3000));
  expect_calls({"near: offer 1 for 3000 fd 7", "open far", "far: offer 1 for 3000 fd 7"});
  expect_events({});
}

BOOST_FIXTURE_TEST_CASE(after_the_last_elsewhere_is_told_once, Fixture) {
  BOOST_REQUIRE(chain->offer(anchor(1), 3000));
  near.elsewhere(1);
  far.elsewhere(1);
  expect_events({kNobody});
}

BOOST_FIXTURE_TEST_CASE(no_time_left_ends_it, Fixture) {
  BOOST_REQUIRE(chain->offer(anchor(1), 3000));
  calls.clear();
  wait_ms(3000);
  near.elsewhere(1);
  expect_calls({});
  expect_events({kNobody});
  // A whole attempt without time is the first one's to end.
  BOOST_REQUIRE(chain->offer(anchor(1), 0));
  expect_calls({"near: offer 1 for 0 fd 7"});
}

BOOST_FIXTURE_TEST_CASE(what_cannot_be_opened_is_passed_over_and_tried_again_after_a_minute, Fixture) {
  far_opens = false;
  near.says_elsewhere_at_once = true;
  const auto opens = [&] {
    calls.clear();
    BOOST_REQUIRE(chain->offer(anchor(1), 3000));
    return std::ranges::count(calls, "open far");
  };
  BOOST_TEST(opens() == 1);
  expect_events({kNobody});
  far_opens = true;
  wait_ms(59'999);
  BOOST_TEST(opens() == 0);
  expect_events({kNobody});
  wait_ms(1);
  BOOST_TEST(opens() == 1);
  expect_events({});
  BOOST_TEST(opens() == 0);  // it is open
}

BOOST_FIXTURE_TEST_CASE(what_could_not_be_opened_is_tried_at_once_when_the_companion_says_so, Fixture) {
  far_opens = false;
  near.says_elsewhere_at_once = true;
  const int news = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
  chain->watch(news);
  chain->accompany([&] {
    eventfd_t count = 0;
    calls.emplace_back("companion");
    if (eventfd_read(news, &count) == 0) chain->try_again();
  });
  BOOST_REQUIRE(chain->offer(anchor(1), 3000));
  far_opens = true;
  chain->progress();  // without news
  expect_calls({"near: offer 1 for 3000 fd 7", "open far", "near: progress", "companion"});
  BOOST_REQUIRE(chain->offer(anchor(1), 3000));
  expect_calls({"near: offer 1 for 3000 fd 7"});
  expect_events({kNobody, kNobody});

  BOOST_REQUIRE_EQUAL(eventfd_write(news, 1), 0);
  pollfd wanted{chain->fd(), POLLIN, 0};
  BOOST_TEST(poll(&wanted, 1, 0) == 1);
  chain->progress();
  BOOST_TEST(poll(&wanted, 1, 0) == 0);
  expect_calls({"near: progress", "companion"});
  BOOST_REQUIRE(chain->offer(anchor(1), 3000));
  expect_calls({"near: offer 1 for 3000 fd 7", "open far", "far: offer 1 for 3000 fd 7"});
  expect_events({});
  close(news);
}

BOOST_FIXTURE_TEST_CASE(an_error_of_the_first_is_the_callers_and_one_of_a_later_one_an_end, Fixture) {
  near.fails = true;
  BOOST_TEST(!chain->offer(anchor(1), 3000));
  near.elsewhere(1);  // nothing is there any more that it could be about
  expect_calls({"near: offer 1 for 3000 fd 7"});
  seen.clear();
  near.fails = false;
  far.fails = true;
  BOOST_REQUIRE(chain->offer(anchor(1), 3000));
  near.elsewhere(1);
  expect_events({{EventKind::unreachable, 0, 1, Reason::no_resources}});
}

BOOST_FIXTURE_TEST_CASE(connections_are_routed_by_their_number, Fixture) {
  BOOST_REQUIRE(chain->offer(anchor(1), 3000));
  BOOST_REQUIRE(chain->offer(anchor(2), 3000));
  near.elsewhere(2);
  near.tell(EventKind::request, 1, 5);
  far.tell(EventKind::request, 2, 5);
  expect_events({{EventKind::request, 5, 1, Reason::none}, {EventKind::request, far_id(5), 2, Reason::none}});
  calls.clear();
  BOOST_TEST(chain->accept(ConnId{5}, some<Qp>(), {}).ok());
  BOOST_TEST(chain->accept(ConnId{far_id(5)}, some<Qp>(), {}).ok());
  chain->reject(ConnId{far_id(6)}, Reason::refused, {});
  BOOST_TEST(chain->establish(ConnId{far_id(7)}).ok());
  chain->disconnect(ConnId{8});
  expect_calls({"near: accept 5", "far: accept 5", "far: reject 6", "far: establish 7", "near: disconnect 8"});
  BOOST_TEST(!chain->establish(ConnId{std::uint64_t{9} << 56 | 1}));
  chain->disconnect(ConnId{~std::uint64_t{0}});
  far.tell(EventKind::disconnected, 2, 5, Reason::peer_died);
  expect_events({{EventKind::disconnected, far_id(5), 2, Reason::peer_died}});
}

BOOST_FIXTURE_TEST_CASE(a_number_without_room_for_the_transport_is_refused, Fixture) {
  const std::uint64_t large = std::uint64_t{1} << 56;
  BOOST_REQUIRE(chain->offer(anchor(1), 3000));
  near.tell(EventKind::request, 1, large);
  expect_events({{EventKind::unreachable, 0, 1, Reason::no_resources}});
  expect_calls({"near: offer 1 for 3000 fd 7", "near: reject " + std::to_string(large)});
  bool asked = false;
  BOOST_REQUIRE(chain->dial(anchor(1), 3000, [&](Device&, const Path&, ConnId) {
    asked = true;
    return ConnectionManager::Proposal{};
  }));
  BOOST_TEST(near.make_qp(some<Device>(), {}, ConnId{large}).qp == nullptr);
  BOOST_TEST(!asked);
}

BOOST_FIXTURE_TEST_CASE(once_a_qp_is_made_elsewhere_is_an_end_like_any_other, Fixture) {
  ConnId given = ConnId::none;
  BOOST_REQUIRE(chain->dial(anchor(1), 3000, [&](Device&, const Path&, ConnId conn) {
    given = conn;
    return ConnectionManager::Proposal{};
  }));
  near.elsewhere(1);
  (void)far.make_qp(some<Device>(), {}, ConnId{9});
  BOOST_TEST((given == ConnId{far_id(9)}));
  calls.clear();
  far.elsewhere(1);
  expect_events({kNobody});
  expect_calls({});
}

BOOST_FIXTURE_TEST_CASE(a_withdrawn_attempt_goes_nowhere_whoever_has_it, Fixture) {
  BOOST_REQUIRE(chain->offer(anchor(1), 3000));
  chain->withdraw(1);
  expect_calls({"near: offer 1 for 3000 fd 7", "near: withdraw 1"});
  BOOST_REQUIRE(chain->offer(anchor(2), 3000));
  near.elsewhere(2);
  calls.clear();
  chain->withdraw(2);
  expect_calls({"near: withdraw 2", "far: withdraw 2"});
  chain->withdraw(99);
  expect_events({});
}

BOOST_FIXTURE_TEST_CASE(a_new_offer_takes_the_place_of_the_one_before, Fixture) {
  BOOST_REQUIRE(chain->offer(anchor(1), 3000));
  near.elsewhere(1);
  calls.clear();
  BOOST_REQUIRE(chain->offer(anchor(1), 500));
  expect_calls({"near: withdraw 1", "far: withdraw 1", "near: offer 1 for 500 fd 7"});
}

BOOST_FIXTURE_TEST_CASE(what_was_opened_is_forgotten_and_opened_anew, Fixture) {
  near.says_elsewhere_at_once = true;
  BOOST_REQUIRE(chain->offer(anchor(1), 3000));
  BOOST_REQUIRE(chain->offer(anchor(2), 3000));
  far.tell(EventKind::request, 2, 5);
  seen.clear();
  calls.clear();
  chain->forget_opened();
  expect_events({kNobody});  // who has met somebody hears nothing
  chain->disconnect(ConnId{far_id(5)});
  far.make_readable();
  pollfd wanted{chain->fd(), POLLIN, 0};
  BOOST_TEST(poll(&wanted, 1, 0) == 0);
  chain->progress();
  expect_calls({"near: progress"});
  BOOST_REQUIRE(chain->offer(anchor(3), 3000));
  expect_calls({"near: offer 3 for 3000 fd 7", "open far", "far: offer 3 for 3000 fd 7"});
}

BOOST_FIXTURE_TEST_CASE(one_that_may_not_be_opened_is_asked_for_each_time, Fixture) {
  near.says_elsewhere_at_once = true;
  bool may_open = false;
  chain->ask_before_opening([&] { return may_open; });
  BOOST_REQUIRE(chain->offer(anchor(1), 3000));
  expect_events({kNobody});
  calls.clear();
  may_open = true;
  BOOST_REQUIRE(chain->offer(anchor(1), 3000));
  expect_calls({"near: offer 1 for 3000 fd 7", "open far", "far: offer 1 for 3000 fd 7"});
}

BOOST_FIXTURE_TEST_CASE(limits_descriptor_and_time_are_those_of_the_open_ones, Fixture) {
  BOOST_TEST(chain->caps().max_request_private == 100u);
  BOOST_TEST(chain->caps().proves_owner);
  BOOST_TEST(chain->next_timeout_ms() == -1);
  far.timeout = 5;
  BOOST_TEST(chain->next_timeout_ms() == -1);
  near.says_elsewhere_at_once = true;
  BOOST_REQUIRE(chain->offer(anchor(1), 3000));
  BOOST_TEST(chain->next_timeout_ms() == 5);
  near.timeout = 3;
  BOOST_TEST(chain->next_timeout_ms() == 3);
  BOOST_TEST(chain->caps().max_request_private == 80u);
  BOOST_TEST(chain->caps().max_reply_private == 100u);
  BOOST_TEST(chain->caps().max_reject_private == 90u);
  BOOST_TEST(chain->caps().active_must_send_first);
  BOOST_TEST(!chain->caps().proves_owner);

  pollfd wanted{chain->fd(), POLLIN, 0};
  BOOST_TEST(chain->fd() > 256);
  BOOST_TEST(poll(&wanted, 1, 0) == 0);
  far.make_readable();
  BOOST_TEST(poll(&wanted, 1, 0) == 1);
  calls.clear();
  chain->progress();
  chain->abandon_in_child();
  expect_calls({"near: progress", "far: progress", "near: abandon", "far: abandon"});
}

}  // namespace rdma::cm
