// States of an SDP connection and the legal moves between them, as a table. A test prints the whole matrix and compares it with the
// stored tests/sdp/conn_state_matrix.txt. If you add a state or an event, to_string (conn_state.cpp) and that file must learn it
// too.
#pragma once

#include <cstdint>
#include <iterator>
#include <optional>

namespace sdp {

enum class ConnState : std::uint8_t {
  idle,        ///< made, nothing sent
  hello_sent,  ///< active side: waits for HelloAck
  hello_wait,  ///< passive side: accepted by the CM, waits for Hello
  established,
  disconn_sent,  ///< our half is closed: DisConn is out, the peer may go on sending
  disconn_rcvd,  ///< the peer's half is closed
  closed,        ///< both halves closed
  aborted,       ///< abortive close, illegal message, transport failure
};
inline constexpr int kConnStates = 8;

enum class ConnEvent : std::uint8_t {
  send_hello,
  await_hello,
  rx_hello,      ///< legal Hello; we answer HelloAck
  rx_hello_ack,  ///< legal HelloAck
  send_disconn,
  rx_disconn,
  abort,  ///< AbortConn, DREQ before the end, illegal message, flush, device gone
};
inline constexpr int kConnEvents = 7;

struct ConnTransition {
  ConnState from;
  ConnEvent on;
  ConnState to;
};

inline constexpr ConnTransition kConnTransitions[] = {
    {ConnState::idle, ConnEvent::send_hello, ConnState::hello_sent},
    {ConnState::idle, ConnEvent::await_hello, ConnState::hello_wait},
    {ConnState::hello_sent, ConnEvent::rx_hello_ack, ConnState::established},
    {ConnState::hello_wait, ConnEvent::rx_hello, ConnState::established},
    {ConnState::established, ConnEvent::send_disconn, ConnState::disconn_sent},
    {ConnState::established, ConnEvent::rx_disconn, ConnState::disconn_rcvd},
    {ConnState::disconn_sent, ConnEvent::rx_disconn, ConnState::closed},
    {ConnState::disconn_rcvd, ConnEvent::send_disconn, ConnState::closed},
    {ConnState::hello_sent, ConnEvent::abort, ConnState::aborted},
    {ConnState::hello_wait, ConnEvent::abort, ConnState::aborted},
    {ConnState::established, ConnEvent::abort, ConnState::aborted},
    {ConnState::disconn_sent, ConnEvent::abort, ConnState::aborted},
    {ConnState::disconn_rcvd, ConnEvent::abort, ConnState::aborted},
    {ConnState::closed, ConnEvent::abort, ConnState::closed},
    {ConnState::aborted, ConnEvent::abort, ConnState::aborted},
};

/// nullopt: illegal; when the peer caused the event, the connection is aborted.
constexpr std::optional<ConnState> next_state(ConnState from, ConnEvent on) noexcept {
  for (const ConnTransition& t : kConnTransitions)
    if (t.from == from && t.on == on) return t.to;
  return std::nullopt;
}

constexpr bool deterministic() noexcept {
  for (std::size_t i = 0; i < std::size(kConnTransitions); ++i)
    for (std::size_t j = i + 1; j < std::size(kConnTransitions); ++j)
      if (kConnTransitions[i].from == kConnTransitions[j].from && kConnTransitions[i].on == kConnTransitions[j].on) return false;
  return true;
}
static_assert(deterministic());
static_assert(!next_state(ConnState::idle, ConnEvent::rx_disconn));
static_assert(!next_state(ConnState::hello_wait, ConnEvent::rx_hello_ack));
static_assert(!next_state(ConnState::disconn_rcvd, ConnEvent::rx_disconn), "one DisConn per direction");

const char* to_string(ConnState) noexcept;
const char* to_string(ConnEvent) noexcept;

}  // namespace sdp
