// Service: the one thread per process that steps in where the program's own calls cannot: meeting the peer and Hello, the anchors'
// ends, lanes that outlive their stream. It sleeps in the kernel otherwise and takes no part in the transfer of bytes.
//
// service.cpp has the thread and what it is told, service_meeting.cpp how a stream comes by a lane, service_lanes.cpp what becomes
// of it, service_devices.cpp the devices; service_recovery.cpp and service_evacuate.cpp how lanes are left.
//
// Threads: the public functions may be called by any thread; everything else runs in the service thread.
#pragma once

#include <atomic>
#include <cstdint>
#include <map>
#include <memory>
#include <mutex>
#include <set>
#include <unordered_map>
#include <utility>
#include <vector>

#include "rdma_core/base/shared_lock.hpp"
#include "sdp/engine.hpp"
#include "sdp/peer_link.hpp"
#include "sdp/return_pace.hpp"
#include "sdp/rings.hpp"
#include "sdp/second_looks.hpp"
#include "sdp/stream_impl.hpp"

namespace sdp {

/// Of every thread of ours: those that one of them makes inherit it.
inline constexpr char kServiceThreadName[] = "sdpreload";

class Service {
 public:
  /// Starts the thread. nullptr: no thread, no descriptors; the reason is logged.
  static Service* start(const Options& options, engine::Compose compose) noexcept;

  void pursue(StreamImpl* stream) noexcept;
  void closed(StreamImpl* stream, int fd) noexcept;  ///< the stream's cell comes back through engine::free_stream
  void nudge() noexcept;
  void buffer_is_large() noexcept;
  void bytes_are_held() noexcept {
    if (!holding_.load(std::memory_order_seq_cst)) look_for_held();
  }
  int wake_fd() const noexcept { return wake_fd_.load(std::memory_order_relaxed); }
  /// The bell is the primary device's channel, which peers ring; other devices' announcements are passed on to it.
  int bell_fd() const noexcept { return bell_fd_.load(std::memory_order_acquire); }
  rdma::CompletionChannel* channel() const noexcept { return channel_.get(); }
  rdma::Device* device() const noexcept { return device_; }
  bool stop_at_exit() noexcept;   ///< says END on every lane; the thread is left alone. False: some were in use, ask again
  bool ends_are_seen() noexcept;  ///< of lanes whose posts are lost with the process: may it end?

  // --- what no RDMA device outlives (service_evacuate.cpp)
  enum class Leaving : std::uint8_t { exec, credentials, ring };
  /// Takes the lanes on such devices down and waits, for a second at the most, until nothing of theirs is under way; before a
  /// change of credentials the devices are let go as well. There are no new ones until stay(), which is owed in any case.
  void leave(Leaving why) noexcept;
  void stay(Leaving why) noexcept;    ///< the exec failed; the credentials are changed
  void await_names() const noexcept;  ///< of threads of ours that are just being made
  void abandon_in_child() noexcept;   ///< closes the child's copies of our descriptors

 private:
  struct Handshake {
    StreamImpl* stream = nullptr;
    std::uint16_t generation = 0;
    std::uint64_t cookie = 0;
    rdma::cm::Anchor anchor{};
    Lane* lane = nullptr;
    rdma::cm::ConnId conn = rdma::cm::ConnId::none;
    LaneProposal proposal{};
    LaneReply reply{};
    PeerLinks::Key key{};
    bool may_recover = false;  ///< `key` is known to both
    std::int64_t begun_ns = 0;
    std::int64_t lane_since_ns = 0;  ///< the connection manager has found the peer; until then it keeps the time
    bool active = false;
    bool answered = false;  ///< the peer speaks SDP
  };
  /// A stream that has had no lane yet, and whose search was in vain for a reason that may pass.
  struct Seeker {
    rdma::cm::IpAddress service;
    SecondLooks looks;
    std::int64_t due_ns = 0;
  };
  /// A lane that its stream can leave without a loss when it fails.
  struct Watched {
    StreamImpl* stream = nullptr;  ///< nullptr: it has left the lane, or is closed; `last` says how far it came
    Lane* lane = nullptr;
    Arrived last;
    bool asked = false;   ///< the peer has been told how far this side came
    bool wanted = false;  ///< the peer has asked for another lane already
    std::int64_t up_ns = 0;
    std::uint32_t acked = 0;
    std::int64_t since_ns = 0;  ///< when `acked` changed, or the peer was probed
  };
  /// A stream that has left a failed lane, by the key of that.
  struct Resting {
    enum class Step : std::uint8_t { idle, asked, looking };
    StreamImpl* stream = nullptr;
    rdma::cm::IpAddress peer;  ///< its host
    Step step = Step::idle;
    bool wanted = false;  ///< accepting side: the peer has asked for another lane
    std::int64_t tried_ns = 0;
  };
  using RestingAt = std::map<PeerLinks::Key, Resting>::iterator;
  static constexpr std::uint8_t kPursue = 1, kClosed = 2;  ///< bits of StreamImpl::commands
  struct Client;

  Service(const Options& options, engine::Compose compose) noexcept : options_(options), compose_(compose) {}
  struct ThreadStart {
    Service* service;
    std::uint32_t number;
  };
  static void* thread_main(void* start) noexcept;
  int start_thread(std::uint32_t number) noexcept;
  void renew_thread() noexcept;
  void take_turn() noexcept;
  bool may_leave_host() noexcept;
  bool may_have_lanes_on(const rdma::Device& device) const noexcept;
  LaneReason reason_of_end(LaneReason told) const noexcept;
  bool see_to_leaving() noexcept;
  void begin_leaving() noexcept;
  bool is_evacuated() noexcept;
  void let_devices_go() noexcept;
  void remove_retired_devices() noexcept;
  void run() noexcept;
  void await_work(int timeout_ms) noexcept;  ///< negative: for ever
  void listen_to_bell(bool listens) noexcept;
  bool open() noexcept;
  bool take_devices() noexcept;
  void submit(StreamImpl* stream, std::uint8_t what) noexcept;
  /// `closed`: those that close a stream; the others stay. While a device leaves no search may begin: it may open other devices,
  /// which the registry, in the middle of telling us, does not let in.
  enum class Take : std::uint8_t { all, closed };
  void take_commands(Take which = Take::all) noexcept;
  void refuse_all() noexcept;
  void forget(StreamImpl* stream) noexcept;
  void retire(StreamImpl* stream, Lane* lane, std::uint64_t conn, bool peer_gone) noexcept;
  void begin(StreamImpl* stream, std::uint16_t generation) noexcept;
  void give_up(Handshake& handshake, LaneReason reason) noexcept;
  LaneReason reason_if_short(LaneReason told) const noexcept;
  void search_is_over(StreamImpl* stream) noexcept;
  void on_cm_event(const rdma::cm::Event& event) noexcept;
  rdma::cm::Transcript transcript_of(std::uint64_t cookie);
  Lane* make_lane(rdma::Device& device, const rdma::Path& path) noexcept;
  rdma::CompletionChannel* channel_of(rdma::Device& device) noexcept;
  bool pass_on(std::uint64_t tag) noexcept;
  void leave_device(rdma::Device& device) noexcept;
  bool detach(StreamImpl* stream) noexcept;
  std::shared_ptr<PeerContext> context_for(rdma::Device& device, const rdma::Path& path) noexcept;
  bool accept_proposal(Handshake& handshake, std::span<const std::byte> data) noexcept;
  void poll_handshakes() noexcept;
  void finish(Handshake& handshake) noexcept;
  void on_anchor(StreamImpl* stream) noexcept;
  void tend(StreamImpl* stream) noexcept;
  void look_after_lanes() noexcept;
  void release_buffers() noexcept;
  void look_for_held() noexcept;
  int tend_held() noexcept;
  bool flush_held() noexcept;
  void wake_for_words(StreamImpl& stream) noexcept;

  // --- rings.cpp
  bool may_have_ring(bool before_a_lane) noexcept;
  void look_for_rings() noexcept;

  // --- service_recovery.cpp
  void open_links();
  LaneReply reply_for(Handshake& handshake);
  void take_reply(Handshake& handshake, const LaneReply& reply);
  void begin_watch(const Handshake& handshake);
  void end_watch(const Lane& lane, const Arrived& last);
  void forget_lane(const Lane& lane);
  bool waits_for_peer(const Lane& lane);
  void tend_watched();
  void ask_to_look(const PeerLinks::Key& key, const Lane& lane);
  void probe(const PeerLinks::Key& key, Watched& watched, std::int64_t now, std::int64_t patience);
  void on_link_message(const PeerLinks::Message& message);
  void on_message_when_left(Watched& watched, const PeerLinks::Message& message);
  void on_link_lost(const PeerLinks::Key& key);
  bool outlive(StreamImpl* stream);
  void outlive_closed(std::size_t dying);
  Lane* leave_behind(const Lane* lane);
  int next_words_ms() const noexcept;

  // --- service_return.cpp
  void rest(StreamImpl& stream, const Lane& spent);
  RestingAt resting_of(const StreamImpl* stream);
  void end_rest(RestingAt at);
  void on_return(StreamImpl* stream);
  bool rest_again(StreamImpl& stream, LaneReason why);
  void look_for_lane(const PeerLinks::Key& key, Resting& resting);
  void on_again(RestingAt at);
  void on_rest_lost(RestingAt at);
  void hurry_returns();
  int tend_returns();
  void tend_resting();
  static rdma::cm::IpAddress service_of(const Handshake& handshake) noexcept;
  static bool is_on_this_host(const Handshake& h) noexcept;
  void remember_speaker(const Handshake& handshake);
  bool seek_again(const Handshake& handshake, LaneReason why);
  bool pursue_again(StreamImpl& stream);
  int tend_seekers();

  Options options_;
  engine::Compose compose_;
  std::unique_ptr<engine::Composition> composition_;
  rdma::cm::ConnectionManager* cm_ = nullptr;
  rdma::Device* device_ = nullptr;  ///< the primary one: the first of the composition
  std::unique_ptr<rdma::CompletionChannel> channel_;
  std::map<rdma::Device*, std::unique_ptr<rdma::CompletionChannel>> channels_;  ///< of the other devices that have had a lane
  std::atomic<int> bell_fd_{-1};
  std::atomic<int> wake_fd_{-1};
  int epoll_fd_ = -1;
  std::int64_t last_lane_up_ns_ = 0;
  RingWatch ring_watch_;

  bool needs_looks_ = false;  ///< some stream's StreamImpl::needs_looks()
  std::unique_ptr<PeerLinks> links_;
  std::map<PeerLinks::Key, Watched> watched_;
  std::unordered_map<const Lane*, PeerLinks::Key> key_of_;
  std::map<PeerLinks::Key, Resting> resting_;
  std::map<rdma::cm::IpAddress, ReturnPace> paces_;  ///< by the peer's host
  std::int64_t returns_due_ns_ = 0;
  std::unordered_map<StreamImpl*, Seeker> seekers_;
  std::set<rdma::cm::IpAddress> speakers_;  ///< services whose processes, or clients, have answered as ours do
  // The thread, and its successors. One that is told to leave is waited for by the next.
  enum class Thread : std::uint8_t { fresh, stale, renewing };
  std::atomic<Thread> thread_{Thread::fresh};  ///< stale: its credentials are not the program's threads' any more
  std::atomic<std::uint32_t> last_number_{1};
  std::atomic<std::uint32_t> newest_{1};    ///< number of the thread whose turn it is
  std::atomic<std::uint32_t> starting_{0};  ///< threads that have no name yet
  std::uint32_t number_ = 1;                ///< of the one that has the turn
  std::mutex turn_;

  enum class Leave : std::uint32_t { no, asked, under_way, done };
  std::atomic<bool> left_host_{false};     ///< devices are open, or being opened, that serve their opener only
  std::atomic<std::uint32_t> leavers_{0};  ///< calls between leave() and stay()
  std::atomic<std::uint32_t> leave_{0};    ///< a Leave; futex
  std::atomic<Leaving> leaves_for_{Leaving::exec};
  std::int64_t leave_by_ns_ = 0;
  std::vector<const rdma::Device*> retired_;
  std::int64_t retired_until_ns_ = 0;

  std::atomic<bool> had_unordered_lane_{false};
  std::atomic<bool> releasing_{false};  ///< some stream has a large send buffer
  std::atomic<bool> holding_{false};    ///< some stream's lane may hold bytes: tend_held() looks
  std::int64_t held_due_ns_ = 0;
  bool held_back_ = false;  ///< some does, and has to wait for its peer
  bool listens_to_bell_ = false;
  std::atomic<StreamImpl*> inbox_{nullptr};                  ///< streams with commands, newest first
  std::atomic<bool> is_idle_{false};                         ///< nothing works here: there is no thread any more
  std::unordered_map<std::uint64_t, Handshake> handshakes_;  ///< by anchor cookie
  std::unordered_map<std::uint64_t, StreamImpl*> streams_by_conn_;
  std::vector<StreamImpl*> laned_;  ///< streams with a lane
  rdma::SharedLock laned_lock_;     ///< this thread takes it to change laned_ and dying_, others to look at them
  struct Dying {
    StreamImpl* stream;
    Lane* lane;
    std::uint64_t conn;
    bool peer_gone;
    std::uint64_t epoch;  ///< of engine::grace() when nobody could find the lane any more
  };
  std::vector<Dying> dying_;  ///< closed streams whose lane the peer may still write to
  std::map<std::pair<rdma::Device*, std::uint64_t>, std::weak_ptr<PeerContext>> peers_;  ///< by device and path
};

namespace engine {
Service* running_service() noexcept;  ///< nullptr: none has been started in this process
}  // namespace engine

}  // namespace sdp
