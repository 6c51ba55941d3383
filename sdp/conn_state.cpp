#include "sdp/conn_state.hpp"

namespace sdp {

const char* to_string(ConnState s) noexcept {
  switch (s) {
    case ConnState::idle:
      return "idle";
    case ConnState::hello_sent:
      return "hello_sent";
    case ConnState::hello_wait:
      return "hello_wait";
    case ConnState::established:
      return "established";
    case ConnState::disconn_sent:
      return "disconn_sent";
    case ConnState::disconn_rcvd:
      return "disconn_rcvd";
    case ConnState::closed:
      return "closed";
    case ConnState::aborted:
      return "aborted";
  }
  return "?";
}

const char* to_string(ConnEvent e) noexcept {
  switch (e) {
    case ConnEvent::send_hello:
      return "send_hello";
    case ConnEvent::await_hello:
      return "await_hello";
    case ConnEvent::rx_hello:
      return "rx_hello";
    case ConnEvent::rx_hello_ack:
      return "rx_hello_ack";
    case ConnEvent::send_disconn:
      return "send_disconn";
    case ConnEvent::rx_disconn:
      return "rx_disconn";
    case ConnEvent::abort:
      return "abort";
  }
  return "?";
}

}  // namespace sdp
