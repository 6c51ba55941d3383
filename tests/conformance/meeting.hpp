// Two processes that meet by a connection manager, as the tests of connection managers have them.
#pragma once

#include <array>
#include <deque>
#include <map>
#include <tuple>

#include "rdma_core/cm/connection_manager.hpp"
#include "tests/conformance/ends.hpp"

namespace rdma::cm {
inline std::ostream& operator<<(std::ostream& out, Reason r) { return out << to_string(r); }
inline std::ostream& operator<<(std::ostream& out, EventKind k) {
  constexpr const char* kNames[] = {"request", "reply", "rejected", "unreachable", "established", "disconnected"};
  return out << kNames[static_cast<std::size_t>(k)];
}
}  // namespace rdma::cm

namespace rdma::conformance {

namespace detail {

using cm::Anchor;
using cm::ConnId;
using cm::Event;
using cm::EventKind;
using cm::Reason;
using Bytes = std::vector<std::byte>;

inline Bytes some_bytes(std::size_t count, unsigned seed) {
  Bytes bytes(count);
  for (std::size_t i = 0; i < count; ++i) bytes[i] = static_cast<std::byte>(i * 13 + seed * 29 + 1);
  return bytes;
}

struct Seen {
  EventKind kind;
  ConnId conn;
  std::uint64_t cookie;
  Path path;
  Device* device;
  Bytes data;
  Reason reason;
};

inline bool is_final(EventKind kind) {
  return kind == EventKind::rejected || kind == EventKind::unreachable || kind == EventKind::disconnected;
}

/// One connection in the making, by default one that both sides want.
struct Meeting {
  std::array<Anchor, 2> anchors;  ///< by side
  std::array<End, 2> ends;
  std::array<ConnId, 2> conns{ConnId::none, ConnId::none};
  std::array<std::deque<Seen>, 2> seen;  ///< events of this connection, oldest first
  Bytes request_data = some_bytes(20, 1);
  Bytes reply_data = some_bytes(50, 2);
  // What the sides do; replace before the dial.
  std::function<void(const Seen&)> on_request, on_reply;
  bool propose = true;
  bool accept_ok = false;

  End& end(Side side) { return ends[static_cast<std::size_t>(side)]; }
  Anchor& anchor(Side side) { return anchors[static_cast<std::size_t>(side)]; }
  ConnId& conn(Side side) { return conns[static_cast<std::size_t>(side)]; }
  std::size_t count(Side side, EventKind kind) const {
    const auto& list = seen[static_cast<std::size_t>(side)];
    return static_cast<std::size_t>(std::count_if(list.begin(), list.end(), [kind](const Seen& s) { return s.kind == kind; }));
  }
  const Seen* find(Side side, EventKind kind) const {
    for (const Seen& s : seen[static_cast<std::size_t>(side)])
      if (s.kind == kind) return &s;
    return nullptr;
  }
  const Seen* final_event(Side side) const {
    for (const Seen& s : seen[static_cast<std::size_t>(side)])
      if (is_final(s.kind)) return &s;
    return nullptr;
  }
};

/// Both processes: their managers, and the connections between them.
template <class F>
class Processes {
 public:
  Processes() {
    for (Side side : {Side::a, Side::b}) fixture.cm(side).on_event([this, side](const Event& e) { take(side, e); });
  }
  ~Processes() {
    for (auto& m : meetings)
      for (Side side : {Side::a, Side::b})
        if (m->conn(side) != ConnId::none && !dead(side)) fixture.cm(side).disconnect(m->conn(side));
    settle();
    for (auto& m : meetings)
      for (End& end : m->ends) end.clear();
    fixture.finish();
  }

  Meeting& meeting() {
    auto& m = *meetings.emplace_back(std::make_unique<Meeting>());
    m.anchors = fixture.anchors();
    m.on_request = [this, &m](const Seen& request) { accept(m, request); };
    m.on_reply = [this, &m](const Seen& reply) { BOOST_TEST(fixture.cm(Side::a).establish(reply.conn).ok()); };
    return m;
  }
  void accept(Meeting& m, const Seen& request) {
    End& end = m.end(Side::b);
    Qp& qp = Ends<F>::make(end, *request.device, request.path, {.recvs = 4});
    m.accept_ok = fixture.cm(Side::b).accept(request.conn, qp, m.reply_data).ok();
  }
  void offer(Meeting& m, unsigned ttl_ms = 20'000) { BOOST_REQUIRE(fixture.cm(Side::b).offer(m.anchor(Side::b), ttl_ms)); }
  void dial(Meeting& m, unsigned timeout_ms = 20'000) {
    auto make = [this, &m](Device& device, const Path& path, ConnId conn) {
      cm::ConnectionManager::Proposal proposal;
      if (!m.propose) return proposal;
      m.conn(Side::a) = conn;
      proposal.qp = &Ends<F>::make(m.end(Side::a), device, path, {.recvs = 4});
      proposal.private_data = m.request_data;
      return proposal;
    };
    BOOST_REQUIRE(fixture.cm(Side::a).dial(m.anchor(Side::a), timeout_ms, make));
  }
  void meet(Meeting& m) {
    offer(m);
    dial(m);
    BOOST_REQUIRE(wait(m, Side::a, EventKind::established));
    BOOST_REQUIRE(wait(m, Side::b, EventKind::established));
    BOOST_TEST(m.accept_ok);
  }

  template <class Done>
  bool wait_until(Done done) {
    return pump_until(fixture, done);
  }
  bool wait(Meeting& m, Side side, EventKind kind) {
    const bool came = wait_until([&] { return m.find(side, kind) != nullptr || m.final_event(side) != nullptr; }) &&
                      m.find(side, kind) != nullptr;
    if (const Seen* other = came ? nullptr : m.final_event(side)) BOOST_TEST_MESSAGE(other->kind << " instead, " << other->reason);
    return came;
  }
  bool wait_final(Meeting& m, Side side) {
    return wait_until([&] { return m.final_event(side) != nullptr; });
  }
  void settle() { pump_for_a_while(fixture); }
  Wc wait_one(Cq& cq) {
    Wc wc;
    const bool came = wait_until([&] { return cq.poll({&wc, 1}) == 1; });
    BOOST_REQUIRE_MESSAGE(came, "a completion never came");
    return wc;
  }
  /// One message each way, the active side first.
  void talk(Meeting& m, unsigned seed) {
    for (Side from : {Side::a, Side::b}) {
      End& sender = m.end(from);
      End& receiver = m.end(from == Side::a ? Side::b : Side::a);
      sender.fill(40, 100, seed);
      BOOST_REQUIRE_EQUAL(sender.send(40, 100), Post::ok);
      const Wc got = wait_one(*receiver.recv_cq);
      BOOST_TEST(got.status == WcStatus::success);
      BOOST_TEST(got.byte_len == 100u);
      BOOST_TEST(receiver.holds(static_cast<std::uint32_t>(got.wr_id), 100, seed));
      BOOST_TEST(wait_one(*sender.send_cq).status == WcStatus::success);
    }
  }
  void kill(Side side) requires requires(F& f) { f.kill(side); }
  {
    for (auto& m : meetings) m->end(side).clear();
    dead_[static_cast<std::size_t>(side)] = true;
    fixture.kill(side);
  }
  bool dead(Side side) const { return dead_[static_cast<std::size_t>(side)]; }

  F fixture;
  std::vector<std::unique_ptr<Meeting>> meetings;

 private:
  void take(Side side, const Event& e) {
    Seen seen{e.kind, e.conn, e.anchor_cookie, e.path, e.device, {e.private_data.begin(), e.private_data.end()}, e.reason};
    for (auto& m : meetings) {
      if (m->anchor(side).cookie != e.anchor_cookie) continue;
      m->seen[static_cast<std::size_t>(side)].push_back(seen);
      if (e.kind == EventKind::request) {
        m->conn(Side::b) = e.conn;
        if (m->on_request) m->on_request(seen);
      } else if (e.kind == EventKind::reply && m->on_reply) {
        m->on_reply(seen);
      }
      return;
    }
    BOOST_ERROR("an event of an unknown anchor: " << e.kind);
  }
  std::array<bool, 2> dead_{};
};

/// Private data arrive with what was given in front; a transport may pad them with zeros, which nobody can tell from data.
inline bool begins_with(const Bytes& got, const Bytes& given) {
  return got.size() >= given.size() && std::equal(given.begin(), given.end(), got.begin()) &&
         std::all_of(got.begin() + static_cast<std::ptrdiff_t>(given.size()), got.end(),
                     [](std::byte b) { return b == std::byte{0}; });
}

}  // namespace detail

}  // namespace rdma::conformance
