// PeerLinks: connections of two processes' own, by kernel TCP, one for each process that this one shares lanes with over RDMA. When
// a lane has failed both ends tell each other by it how much has arrived, and go on by the program's connection
// (stream_recovery.cpp).
//
// The client's side of a lane listens; its port and a key for the lane are in the reply of the CM, which only the peer reads. Who
// dials attaches the key and may then ask. A message with a key that is not known here is answered or ignored, and costs nothing
// more; a caller that attaches nothing is dropped after five seconds, and few of them are let in: each takes a descriptor of the
// program's. A peer that asks and does not read the answers loses the link.
//
// A frame, 64 bytes, big-endian:   0 magic 3, version 1 | 4 kind 1 | 5 flags 1 (1 switched, 2 closed) | 6 zero 2 | 8 key 16 |
//   24 switch_at 8 | 32 sent 8 | 40 received 8 | 48 zero 16
//
// Threads: the service thread's. No call blocks.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <map>
#include <vector>

#include "rdma_core/cm/ip_address.hpp"
#include "sdp/arrived.hpp"

namespace sdp {

class PeerLinks {
 public:
  using Key = std::array<std::byte, 16>;
  enum class Kind : std::uint8_t {
    attach = 1,  ///< this link is for that lane, too
    ask,         ///< the lane has failed here: so much has arrived; and there?
    tell,        ///< the answer
    unknown,     ///< the answer of who knows nothing of that lane
    probe,       ///< `sent` messages should have arrived by now: have they?
    seen,        ///< `received` of them have
    again,       ///< the failed lane is left: another? From the side that has accepted: it is looking for one now
  };
  struct Message {
    Kind kind = Kind::attach;
    Key key{};
    Arrived arrived;
  };
  static constexpr std::size_t kFrameBytes = 64;
  using Frame = std::array<std::byte, kFrameBytes>;
  static Frame emit(const Message& message) noexcept;
  static bool parse(const Frame& frame, Message& message) noexcept;  ///< false: of another kind, or no sense

  /// Called from progress(): a message for a lane that this process has announced; and that a lane's link is gone.
  std::function<void(const Message&)> on_message;
  std::function<void(const Key&)> on_lost;

  PeerLinks();
  ~PeerLinks();
  PeerLinks(const PeerLinks&) = delete;
  PeerLinks& operator=(const PeerLinks&) = delete;

  static Key new_key() noexcept;
  /// Where peers may reach us at that address of ours; 0: nowhere.
  std::uint16_t port_at(const rdma::cm::IpAddress& here);
  void announce(const Key& key);                                   ///< the peer will attach it
  void connect(const Key& key, const rdma::cm::IpAddress& there);  ///< attaches it, by the link that there is or a new one
  bool send(const Message& message);                               ///< false: the key has no link
  bool has_link(const Key& key) const noexcept {
    const auto it = link_of_.find(key);
    return it != link_of_.end() && it->second >= 0;
  }
  void forget(const Key& key);

  int fd() const noexcept { return epoll_fd_; }  ///< readable: progress() has something to do
  std::size_t strangers() const noexcept;        ///< while there are some, progress() is due now and then
  void progress();
  void abandon_in_child() noexcept;

 private:
  struct Link {
    int fd = -1;
    rdma::cm::IpAddress there;  ///< whom we have called; a caller's has no port
    bool connected = false;
    std::int64_t since = 0;  ///< ns
    std::vector<Key> keys;
    Frame in{};
    std::size_t filled = 0;
    std::vector<std::byte> out;
  };
  static constexpr std::size_t kStrangers = 16;  ///< callers that have attached nothing yet; more are turned away

  int open_socket(const rdma::cm::IpAddress& address) noexcept;
  void watch(int fd, std::uint32_t events, int operation) noexcept;
  void queue(Link& link, const Message& message);
  bool flush(Link& link) noexcept;
  bool receive(Link& link);
  void take(Link& link, const Message& message);
  void accept_from(int listener);
  void drop(int fd);

  int epoll_fd_;
  std::map<rdma::cm::IpAddress, int> listeners_;  ///< by own address
  std::map<int, Link> links_;                     ///< by descriptor
  std::map<Key, int> link_of_;                    ///< -1: announced, nobody has attached it
};

}  // namespace sdp
