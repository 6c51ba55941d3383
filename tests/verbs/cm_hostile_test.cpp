// What a user of either host can do to connections of others: take the rendezvous first and read the offers, dial with their
// tokens, and send garbage to whatever listens. It costs a lane at the worst.
#include <poll.h>

#include <deque>
#include <optional>

#include "rdma_core/cm/rdma_channel.hpp"
#include "tests/conformance/meeting.hpp"
#include "tests/verbs/cm_fixture.hpp"

namespace rdma::conformance {
namespace {

using cm::IpAddress;
using detail::EventKind;
using detail::Meeting;
using detail::Processes;
using detail::Reason;
using Pairs = std::tuple<IbCmPair, RnicCmPair>;

constexpr bool is_rnic(const IbCmPair&) { return false; }
constexpr bool is_rnic(const RnicCmPair&) { return true; }

IpAddress server_of(Meeting& m) { return IpAddress::from(m.anchor(Side::a).local); }

/// A process of another user on the server's host, with the means that the kernel gives to everybody. It answers every offer.
template <class F>
class Squatter {
 public:
  explicit Squatter(Processes<F>& processes) : processes_(processes) {
    auto opened = cm::RdmaChannel::open();
    BOOST_REQUIRE(opened.ok());
    channel_ = std::move(*opened);
  }
  ~Squatter() {
    if (fd_ >= 0) close(fd_);
  }

  /// False: somebody has it already.
  bool takes_rendezvous(const IpAddress& server, bool answers = true) {
    answers_ = answers;
    const std::uint16_t port = is_rnic(processes_.fixture) ? static_cast<std::uint16_t>(61000 + server.port % 4096) : server.port;
    const IpAddress here = server.with_port(port);
    if (is_rnic(processes_.fixture)) {
      const sockaddr_storage address = here.to_sockaddr();
      fd_ = socket(here.family, SOCK_DGRAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0);
      return bind(fd_, reinterpret_cast<const sockaddr*>(&address), here.sockaddr_size()) == 0;
    }
    auto id = channel_->bound_id(RDMA_PS_IB, channel_->new_key(), here);
    if (!id || rdma_listen(id->get(), 64) != 0) return false;
    ids_.push_back(*id);
    return true;
  }
  void leaves_rendezvous() {
    ids_.clear();
    if (fd_ >= 0) close(std::exchange(fd_, -1));
  }

  /// An offer that came to it.
  std::optional<cm::offer::Offer> read() {
    pump();
    if (offers_.empty()) return std::nullopt;
    const auto first = offers_.front();
    offers_.pop_front();
    return first;
  }

  /// Dials that port of the client's from the server's address, with these bytes as private data. What was answered: a reason,
  /// `none` for a reply, or `no_peer` for something else.
  Reason dials(const IpAddress& from, const IpAddress& client, std::uint16_t port, std::vector<std::byte> data) {
    const bool rnic = is_rnic(processes_.fixture);
    const auto space = rnic ? RDMA_PS_TCP : RDMA_PS_IB;
    sockaddr_storage near = from.with_port(0).to_sockaddr(), far = client.with_port(port).to_sockaddr();
    End end;
    if (rnic) {  // whose request wants a QP
      QpAttributes attr;
      attr.state = QpState::init;
      attr.access = Access::local_write;
      attr.transport = RnicQpAttributes{};
      BOOST_REQUIRE(Ends<F>::make(end, processes_.fixture.device(Side::a), Path{}, {.recvs = 1}).modify(attr).ok());
    }
    for (int tries = 0; tries < 16; ++tries) {  // an RNIC's local port may be a socket's
      auto id = channel_->create_id(space, channel_->new_key());
      BOOST_REQUIRE(id.ok());
      answer_ = std::nullopt;
      BOOST_REQUIRE_EQUAL(rdma_resolve_addr(id->get(), reinterpret_cast<sockaddr*>(&near), reinterpret_cast<sockaddr*>(&far), 5000),
                          0);
      BOOST_REQUIRE(until(RDMA_CM_EVENT_ADDR_RESOLVED));
      BOOST_REQUIRE_EQUAL(rdma_resolve_route(id->get(), 5000), 0);
      BOOST_REQUIRE(until(RDMA_CM_EVENT_ROUTE_RESOLVED));
      rdma_conn_param p{};
      p.private_data = data.data();
      p.private_data_len = static_cast<std::uint8_t>(data.size());
      p.qp_num = rnic ? static_cast<std::uint32_t>(end.qp->qpn()) : 1;
      if (rdma_connect(id->get(), &p) != 0) continue;
      BOOST_REQUIRE(processes_.wait_until([&] {
        pump();
        return answer_.has_value();
      }));
      return *answer_;
    }
    BOOST_FAIL("no request leaves");
    return Reason::none;
  }

 private:
  void pump() {
    std::array<std::byte, 64> bytes;
    sockaddr_storage from{};
    socklen_t length = sizeof from;
    const ssize_t n =
        fd_ < 0 ? -1 : recvfrom(fd_, bytes.data(), bytes.size(), MSG_DONTWAIT, reinterpret_cast<sockaddr*>(&from), &length);
    if (n > 0) {
      if (const auto answer = takes(std::span(bytes).first(static_cast<std::size_t>(n))); answer && answers_)
        sendto(fd_, answer->data(), answer->size(), MSG_NOSIGNAL, reinterpret_cast<const sockaddr*>(&from), length);
    }
    pollfd p{channel_->fd(), POLLIN, 0};
    cm::CmEvent event;
    while (poll(&p, 1, 0) == 1 && channel_->next(event)) {
      last_ = event.type;
      if (event.type == RDMA_CM_EVENT_CONNECT_REQUEST) {
        const auto answer = takes(event.private_data());
        if (answer && answers_) rdma_reject(event.request.get(), answer->data(), static_cast<std::uint8_t>(answer->size()));
        if (!answers_) unanswered_.push_back(event.request);
      } else if (event.type == RDMA_CM_EVENT_REJECTED) {
        answer_ = cm::offer::parse_refusal(event.private_data()).value_or(Reason::no_peer);
      } else if (event.type == RDMA_CM_EVENT_CONNECT_RESPONSE || event.type == RDMA_CM_EVENT_ESTABLISHED) {
        answer_ = Reason::none;
      } else if (event.type == RDMA_CM_EVENT_CONNECT_ERROR || event.type == RDMA_CM_EVENT_UNREACHABLE) {
        answer_ = Reason::no_peer;
      }
    }
  }
  std::optional<std::array<std::byte, cm::offer::kAnswerBytes>> takes(std::span<const std::byte> bytes) {
    const auto o = cm::offer::Offer::parse(bytes);
    if (!o) return std::nullopt;
    offers_.push_back(*o);
    return cm::offer::Answer{cm::offer::Code::noted, o->token}.bytes();
  }
  bool until(rdma_cm_event_type type) {
    last_.reset();
    return processes_.wait_until([&] {
      pump();
      return last_ == type;
    });
  }

  Processes<F>& processes_;
  std::shared_ptr<cm::RdmaChannel> channel_;
  std::vector<cm::RdmaId> ids_, unanswered_;
  int fd_ = -1;
  bool answers_ = true;
  std::deque<cm::offer::Offer> offers_;
  std::optional<rdma_cm_event_type> last_;
  std::optional<Reason> answer_;
};

/// The squatter has the rendezvous, and so what is offered there.
template <class F>
cm::offer::Offer read_offer(Processes<F>& processes, Squatter<F>& squatter, Meeting& m, unsigned ttl_ms = 20'000) {
  BOOST_REQUIRE(squatter.takes_rendezvous(server_of(m)));
  processes.offer(m, ttl_ms);
  std::optional<cm::offer::Offer> read;
  BOOST_REQUIRE(processes.wait_until([&] { return (read = squatter.read()).has_value(); }));
  return *read;
}

std::vector<std::byte> request_with(const cm::offer::Offer& o, std::uint16_t from_client, std::uint16_t from_server) {
  std::vector<std::byte> data(cm::offer::kDialBytes + 20, std::byte{0x5A});
  cm::offer::Dial{o.token, 99, from_client, from_server, {}}.emit(data.data());
  return data;
}

}  // namespace

BOOST_AUTO_TEST_CASE_TEMPLATE(who_takes_the_rendezvous_first_costs_the_lane_and_no_more, F, Pairs) {
  for (const bool answers : {false, true}) {
    Processes<F> processes;
    Squatter<F> squatter(processes);
    Meeting& m = processes.meeting();
    BOOST_REQUIRE(squatter.takes_rendezvous(server_of(m), answers));
    processes.offer(m, 1500);
    processes.dial(m, 1500);
    BOOST_REQUIRE(processes.wait_until([&] {
      (void)squatter.read();
      return m.final_event(Side::a) != nullptr && m.final_event(Side::b) != nullptr;
    }));
    for (const Side side : {Side::a, Side::b}) {
      BOOST_TEST(m.final_event(side)->reason == Reason::no_peer);
      BOOST_TEST(m.count(side, EventKind::established) == 0u);
    }
    // When it is gone the next try takes its place.
    squatter.leaves_rendezvous();
    processes.meet(processes.meeting());
  }
}

BOOST_AUTO_TEST_CASE_TEMPLATE(who_reads_an_offer_cannot_take_it_up, F, Pairs) {
  Processes<F> processes;
  Squatter<F> squatter(processes);
  Meeting& m = processes.meeting();
  const IpAddress server = server_of(m), client = IpAddress::from(m.anchor(Side::b).local);
  const auto read = read_offer(processes, squatter, m);
  // It has the token and the server's address, and knows how much has been said, but not what.
  BOOST_TEST(squatter.dials(server, client, read.dial_port, request_with(read, read.sent, read.received)) == Reason::unproven);
  BOOST_TEST(squatter.dials(server, client, read.dial_port, request_with(read, 0, 0)) == Reason::unproven);
  BOOST_TEST(m.count(Side::b, EventKind::request) == 0u);
  BOOST_TEST((m.final_event(Side::b) == nullptr));
  BOOST_TEST(squatter.dials(server, client, read.dial_port, request_with(read, 1, 0)) == Reason::unproven);
  BOOST_REQUIRE(processes.wait_final(m, Side::b));  // it bears no more guesses, and the operator is told
  BOOST_TEST(m.final_event(Side::b)->reason == Reason::unproven);
  BOOST_TEST(squatter.dials(server, client, read.dial_port, request_with(read, read.sent, read.received)) == Reason::refused);
}

BOOST_AUTO_TEST_CASE_TEMPLATE(guesses_do_not_keep_the_right_one_from_coming_in, F, Pairs) {
  Processes<F> processes;
  Squatter<F> squatter(processes);
  Meeting& m = processes.meeting();
  const IpAddress server = server_of(m), client = IpAddress::from(m.anchor(Side::b).local);
  const auto read = read_offer(processes, squatter, m);
  for (int guesses = 0; guesses < 2; ++guesses)
    BOOST_TEST(squatter.dials(server, client, read.dial_port, request_with(read, read.sent, read.received)) == Reason::unproven);
  squatter.leaves_rendezvous();
  processes.dial(m);
  BOOST_REQUIRE(processes.wait(m, Side::a, EventKind::established));
  BOOST_REQUIRE(processes.wait(m, Side::b, EventKind::established));
  processes.talk(m, 5);
}

// From another host, or from this one: the address is the client's, the content is anything.
BOOST_AUTO_TEST_CASE_TEMPLATE(garbage_at_the_rendezvous_and_where_dials_come_in_changes_nothing, F, Pairs) {
  Processes<F> processes;
  Squatter<F> squatter(processes);
  // Where dials come in is told by an offer that is read.
  Meeting& first = processes.meeting();
  const IpAddress server = server_of(first), client = IpAddress::from(first.anchor(Side::b).local);
  constexpr unsigned kPatienceMs = 60'000;  // refusals take their time
  const auto read = read_offer(processes, squatter, first, kPatienceMs);
  squatter.leaves_rendezvous();
  for (const std::size_t size : {0, 1, 20, 36, 56})
    BOOST_TEST(squatter.dials(server, client, read.dial_port, std::vector<std::byte>(size, std::byte{0xEE})) != Reason::none);
  processes.dial(first, kPatienceMs);  // and so the rendezvous is there
  BOOST_REQUIRE(processes.wait(first, Side::a, EventKind::established));
  BOOST_REQUIRE(processes.wait(first, Side::b, EventKind::established));
  if constexpr (std::is_same_v<F, RnicCmPair>) {
    const int fd = socket(client.family, SOCK_DGRAM | SOCK_CLOEXEC, 0);
    const sockaddr_storage from = client.with_port(0).to_sockaddr();
    const sockaddr_storage to = server.with_port(static_cast<std::uint16_t>(61000 + server.port % 4096)).to_sockaddr();
    BOOST_REQUIRE_EQUAL(bind(fd, reinterpret_cast<const sockaddr*>(&from), client.sockaddr_size()), 0);
    auto wrong = read.bytes();
    wrong[40] ^= std::byte{1};  // another's address
    for (int i = 0; i < 500; ++i) {
      const auto bytes = i % 2 == 0 ? std::span<const std::byte>(wrong)
                                    : std::span<const std::byte>(wrong).first(static_cast<std::size_t>(i) % 56);
      sendto(fd, bytes.data(), bytes.size(), MSG_NOSIGNAL, reinterpret_cast<const sockaddr*>(&to), server.sockaddr_size());
    }
    close(fd);
  } else {
    for (const std::size_t size : {0, 1, 56})
      BOOST_TEST(squatter.dials(client, server, server.port, std::vector<std::byte>(size, std::byte{0xEE})) != Reason::none);
  }
  processes.talk(first, 6);
  processes.meet(processes.meeting());
}

}  // namespace rdma::conformance
