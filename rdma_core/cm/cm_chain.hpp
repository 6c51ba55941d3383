// A connection manager made of several, in the order of preference. A connection goes to the first; when that one finds that the
// other end is not where it reaches (Reason::elsewhere), to the next, with the time that is left and without a word to the user.
// Any other end is final and is told, for it was found out about the right peer.
//
// A transport is opened when the first connection gets as far as it, so that a process whose connections all end on its own host
// pays for nothing else. One that cannot be opened is passed over, and tried again after a minute, or when something has changed.
//
// Threads: one makes every call.
#pragma once

#include <memory>
#include <string>
#include <unordered_map>
#include <vector>

#include "rdma_core/base/clock.hpp"
#include "rdma_core/cm/connection_manager.hpp"

namespace rdma::cm {

class CmChain final : public ConnectionManager {
 public:
  /// The CM stays its maker's, and outlives the chain. The error says why there is none, in words for the operator.
  using Opened = Result<ConnectionManager*, std::string>;
  struct Transport {
    const char* name = "";
    std::function<Opened()> open;
    ConnectionManager* cm = nullptr;  ///< open from the beginning, if given
  };
  static constexpr std::size_t kMostTransports = 256;  ///< a ConnId has 8 bits for which

  /// `clock` outlives the chain.
  static Result<std::unique_ptr<CmChain>> create(std::vector<Transport> transports, const Clock& clock);
  ~CmChain() override;

  /// Asked before a transport is opened. False: not now; connections go past it, and it is asked again for the next.
  void ask_before_opening(std::function<bool()> may_open) { may_open_ = std::move(may_open); }
  /// Forgets every CM that was opened later than the chain was made: searches by them end, connections by them are known here no
  /// more. The next connection opens their transports anew.
  void forget_opened();

  /// `progress` is called at the end of each progress(), which a descriptor to watch() calls for.
  void accompany(std::function<void()> progress) { companion_ = std::move(progress); }
  void watch(int fd) noexcept;
  void try_again() noexcept;  ///< what could not be opened is tried at the next connection

  const char* name() const noexcept override { return "chain"; }
  /// What holds on every transport that is open so far.
  const Caps& caps() const noexcept override { return caps_; }
  void on_event(std::function<void(const Event&)> handler) override { handler_ = std::move(handler); }
  void on_transcript(const TranscriptOf& transcript_of) override { transcript_of_ = transcript_of; }
  Result<Unit> offer(const Anchor& anchor, unsigned ttl_ms) override;
  void withdraw(std::uint64_t anchor_cookie) noexcept override;
  Result<Unit> dial(const Anchor& anchor, unsigned timeout_ms, MakeQp make_qp) override;
  Result<Unit> accept(ConnId conn, Qp& qp, std::span<const std::byte> private_data) override;
  void reject(ConnId conn, Reason reason, std::span<const std::byte> private_data) noexcept override;
  Result<Unit> establish(ConnId conn) override;
  void disconnect(ConnId conn) noexcept override;
  int fd() const noexcept override { return epoll_fd_; }
  int next_timeout_ms() const noexcept override;
  void progress() override;
  void abandon_in_child() noexcept override;

 private:
  struct Link {
    Transport transport;
    Nanos not_before = 0;  ///< after a failure: when it is tried again
    std::string said;      ///< to the operator
  };
  /// A connection that has met nobody yet.
  struct Attempt {
    Anchor anchor;
    MakeQp make_qp;  ///< empty: it is offered
    Nanos deadline = 0;
    std::size_t at = 0;    ///< which transport has it
    std::size_t next = 0;  ///< which is asked next
  };

  CmChain(std::vector<Transport> transports, const Clock& clock);
  Result<Unit> begin(const Anchor& anchor, unsigned ms, MakeQp make_qp);
  Result<Unit> go_on(std::uint64_t cookie);
  ConnectionManager* open(Link& link);
  void join(std::size_t index);
  void on_inner_event(std::size_t index, const Event& event);
  void end(std::uint64_t cookie, Reason reason);
  static ConnId outer(std::size_t index, ConnId inner) noexcept;
  struct Routed {
    ConnectionManager* cm;
    ConnId conn;
  };
  Routed route(ConnId outer) const noexcept;

  std::vector<Link> links_;
  const Clock& clock_;
  Caps caps_;
  std::function<void(const Event&)> handler_;
  TranscriptOf transcript_of_;
  std::function<bool()> may_open_;
  std::function<void()> companion_;
  std::unordered_map<std::uint64_t, Attempt> attempts_;  ///< by anchor cookie
  int epoll_fd_ = -1;
};

}  // namespace rdma::cm
