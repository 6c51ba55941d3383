// StreamImpl: the state behind a Stream handle, and the switch between its two carriers.
//
// Phases:   unjudged ──the rules say both──> plain ──worth it──> pursued ──SDP established──> laned ──taken down──> final (TCP for
// good)
//                    ╰──the rules say sdp──────────────────────╯ ↑                              ╰──failed──> resting
//                                                                ╰──from time to time, as both ends agree───╯
//           strict, where the rules say sdp: no byte goes by TCP before the lane is up; without one the connection fails
//
// Directions, each on its own (architecture: PREPARE, READY, SWITCH(P), END):
//   tx   tcp ──PREPARE──> prepared ──READY seen, nobody in a kernel send──> lane ──END──> ended (TCP again)
//        on an unordered lane:                                                    lane ──END──> ending ──END_SEEN──> ended
//   rx   tcp ──PREPARE seen, nobody else inside──> ready ──SWITCH(P) seen──> draining ──P reached──> lane ──END reached──> ended
//        taken down in ready, draining or lane: ──ABANDON──> abandoned ──RESEND(Q) seen──> resent ──Q reached──> ended
//                                                                      ╰─END seen, or the peer is gone──> where it was, and reads
//                                                                      on
//        shut for both in draining or lane: ──ABANDON──> refused ──RESEND or END seen, the rest read──> ended
//
// Only one of END and RESEND is ever said: who has said END does not look at ABANDON. What lies in the lane stays there until the
// anchor has brought it again, so that a sender that dies in the middle of that costs no byte.
//
// Unordered lanes (real RDMA devices; stream_unordered.cpp): what TCP carries later may come earlier. So the sender stays off TCP
// until its END is acknowledged, and the receiver believes no end of the anchor before it has seen the lane's.
//
// Locking: `lock` guards everything that is not atomic. It is held over system calls only if they cannot block. Order: a stream's
// lock, then (in the shim) nothing of ours: listeners are called without it.
#pragma once

#include <sys/socket.h>

#include <atomic>
#include <cstdint>
#include <optional>

#include "rdma_core/base/shared_lock.hpp"
#include "rdma_core/cm/connection_manager.hpp"
#include "sdp/arrived.hpp"
#include "sdp/engine.hpp"
#include "sdp/kept_bytes.hpp"
#include "sdp/lane.hpp"
#include "sdp/options.hpp"
#include "sdp/stream.hpp"
#include "sdp/transcript.hpp"

namespace sdp {

enum class Phase : std::uint8_t { unjudged, plain, pursued, laned, resting, final };
enum class TxState : std::uint8_t { tcp, prepared, lane, ending, ended };
enum class Asked : std::uint8_t { no, now, under_way };
enum class RxState : std::uint8_t { tcp, ready, draining, lane, abandoned, resent, refused, ended };

/// Of a recvmsg(): control messages, which only the kernel has, and msg_flags.
struct MessageExtras {
  void* control = nullptr;
  std::size_t room = 0;  ///< bytes
  std::size_t used = 0;
  int flags = 0;
};

/// One that the caller has counted in; it is counted out on every way, also that of a cancelled thread.
class Counted {
 public:
  explicit Counted(std::atomic<std::int32_t>& count) noexcept : count_(count) {}
  ~Counted() { count_.fetch_sub(1, std::memory_order_release); }
  Counted(const Counted&) = delete;
  Counted& operator=(const Counted&) = delete;

 private:
  std::atomic<std::int32_t>& count_;
};

/// In a fork's child, of its stream in the place of the parent's. Before the child's first use nothing happens to the parent's; by
/// that use its lane goes down, and the child gets none while the parent may use the connection as well.
struct Inheritance {
  std::atomic<Stream> from{Stream()};  ///< the parent's, or whose that stood for; empty: it is gone, or closed
  bool is_unused = false;              ///< since the fork
  Phase phase = Phase::final;          ///< of `from` at the fork
  const Lane* lane = nullptr;          ///< likewise; what the parent made later lies in memory of its own
  Stream heir_of;                      ///< whose `heirs` count it, until it closes
};

/// Whether a failed lane can be left without a loss: `none`: no, there is no way to ask the peer; `done`: it has been; `over`: it
/// could not.
enum class Recovery : std::uint8_t { none, possible, under_way, done, over };

class alignas(64) StreamImpl {
 public:
  static constexpr std::size_t kSmallSend = 4096;         ///< bytes: sends that are worth a copy rather than a wait
  static constexpr std::size_t kBufferAhead = 64 * 1024;  ///< bytes that a large non-blocking send may leave in the buffer
  // --- first line: what every call looks at
  std::atomic<Phase> phase{Phase::plain};
  std::atomic<bool> strict{false};  ///< policy sdp; until it has lost a lane, from when on it is like any other
  std::atomic<TxState> tx{TxState::tcp};
  std::atomic<RxState> rx{RxState::tcp};
  Role role = Role::unknown;
  std::atomic<Blocking> blocking{Blocking::unknown};
  std::atomic<std::uint16_t> generation{0};
  std::uint32_t owner = 0;  ///< process that may use the lane
  rdma::SharedLock lock;
  Lane* lane = nullptr;
  std::atomic<Lane*> published_lane{nullptr};  ///< the same, for those who look without the lock
  ConnStats* stats = nullptr;
  std::atomic<bool> anchor_event{false};      ///< the service thread saw something on the anchor
  std::atomic<bool> has_large_buffer{false};  ///< the lane has memory that the service thread takes back when it is empty
  std::atomic<bool> tx_blocked{false};        ///< the program was told that it cannot write
  std::atomic<std::uint32_t> full_at{0};      ///< bytes that the lane's buffer took at the most when it refused the last ones
  bool rx_shut = false;                       ///< SHUT_RD, maybe before it had a lane
  std::atomic<int> error_due{0};              ///< -errno, once, behind the bytes that the anchor still has; 0: none
  bool bytes_missing = false;                 ///< bytes before those on the anchor are lost: one ECONNRESET is due at once
  bool tx_switched = false;                   ///< SWITCH is said
  std::atomic<Recovery> recovery{Recovery::none};
  std::atomic<bool> peer_gone{false};  ///< the peer's process or its lane is gone; what has come is still to be read
  bool tx_shut = false;                ///< half-closed, likewise
  bool late_are_refused = false;       ///< the connection is reset for bytes that came by the lane behind SHUT_RDWR
  bool end_acknowledged = false;       ///< END_SEEN is said
  bool gone_is_said = false;           ///< at exit
  bool awaits_posts = false;           ///< see last_words_arrived()
  bool changes_lane = false;           ///< another is about to take the lane's place: nobody begins to wait for this one
  bool others_use_anchor = false;      ///< an io_uring or another process may read and write it past us
  bool watched = false;                ///< the anchor is in the service thread's epoll
  std::uint8_t doubts = 0;             ///< how often our counts differed from the kernel's

  // --- TCP side, counted on every connection
  alignas(64) std::atomic<std::uint64_t> tcp_sent{0};
  std::atomic<std::uint64_t> tcp_received{0};
  std::atomic<std::uint32_t> tcp_messages{0};
  std::atomic<std::int32_t> kernel_senders{0};
  std::atomic<std::int32_t> kernel_receivers{0};
  std::atomic<std::int32_t> plain_waiters{0};
  std::atomic<std::uint64_t> tx_edge_count{0};
  std::atomic<std::uint64_t> state_edges{0};  ///< changes of carrier and ends: edges of their own

  // --- cold
  std::atomic<int> fd{-1};  ///< one that names the connection, as the shim said last; the cookie says whether it still does
  std::uint64_t cookie = 0;
  std::atomic<bool> lane_was_up{false};          ///< strict: from then on a lost lane is TCP's, as with both
  bool asks_no_proof = false;                    ///< a lane though nothing was exchanged that could show who is there
  bool taken_down = false;                       ///< for a reason that lasts: there will be no other lane
  std::atomic<bool> strict_failed{false};        ///< said once
  std::atomic<std::uint32_t> phase_word{0};      ///< changes when a strict stream's search is over; futex
  std::uint64_t switch_at = 0;                   ///< P of the receiving direction
  std::uint64_t tx_switched_at = 0;              ///< P of the sending one
  RxState before_abandon = RxState::tcp;         ///< where an abandoned direction was
  std::uint64_t rest_end = 0;                    ///< of a refused one: position of the lane up to which it is read
  std::uint64_t resent_from = 0, resent_to = 0;  ///< which bytes of the anchor's stream are the lane's once more
  std::atomic<std::int64_t> rcv_timeout_ns{0}, snd_timeout_ns{0};  ///< 0: none; negative: over at once
  /// Unordered: the anchor ended, or has bytes, before the peer's END came; when to give it up. 0: nothing of that.
  std::atomic<std::int64_t> end_due_ns{0};
  std::atomic<Asked> asked_down{Asked::no};  ///< unordered: a fork's child uses the connection and cannot take our lane down itself
  std::uint8_t words_seen = 0;               ///< the service thread's: Lane::words_said() at its last look
  KeptBytes resend;                          ///< bytes on their way by the anchor: abandoned by the peer, or sent before END_SEEN
  bool resend_guarded = false;
  linger linger_option{};                 ///< the program's SO_LINGER, while `resend_guarded`
  bool fin_due = false;                   ///< half-closed while resending: FIN follows the last of those bytes
  std::atomic<std::uint32_t> waiters{0};  ///< threads between unlock and lock inside a wait on the lane
  std::uint64_t conn = 0;                 ///< the CM's ConnId
  Transcript transcript;
  Inheritance inherited;
  std::atomic<std::uint32_t> heirs{0};    ///< children that may go on with the connection when we close it, or were killed
  std::atomic<std::uint8_t> commands{0};  ///< what the service thread is asked to do
  StreamImpl* next_command = nullptr;
  StreamImpl* next = nullptr;  ///< free list, or the service thread's list

  /// A thread that is in the kernel, or in a wait, for this stream; it will take itself out of the counts.
  bool somebody_inside() const noexcept {
    return kernel_senders.load() != 0 || kernel_receivers.load() != 0 || plain_waiters.load() != 0 || waiters.load() != 0;
  }

  /// Bytes that the kernel has moved for the program; enough of them, and the stream is worth a lane.
  void count_tcp(bool sent, std::int64_t bytes) noexcept;

  // --- transfer (stream_io.cpp); results as in Stream. A cancelled thread unwinds through what may block: not noexcept.
  std::int64_t send(int fd, IovCursor& from, int flags, std::uint16_t gen);
  std::int64_t recv(int fd, IovCursor& to, int flags, std::uint16_t gen, MessageExtras* extras = nullptr);

  // --- several messages in one call (stream_mmsg.cpp)
  std::optional<std::int64_t> recvmmsg_before_lane(int fd, mmsghdr* msgs, unsigned count, int flags, timespec* timeout);
  /// A call met `error` and has bytes to return. The kernel has told it, and will not again.
  void owe(std::int64_t error, std::uint16_t gen) noexcept;
  /// What the end, which a receive has met, is to be told as: an error that was owed, or 0.
  int end_of_stream() noexcept { return error_due.exchange(0, std::memory_order_relaxed); }

  // --- the same where nothing but a message is to be moved (stream_at_once.cpp); 0: it is more than that
  std::int64_t send_at_once(const void* bytes, std::size_t count, int flags, std::uint16_t gen) noexcept;
  std::int64_t recv_at_once(void* to, std::size_t room, int flags, std::uint16_t gen) noexcept;
  /// Of recv(), with the lock held.
  std::int64_t take_at_once(std::byte* to, std::size_t room, std::uint16_t gen) noexcept;

  // --- the switch (stream_switch.cpp); the lock is held
  void attach(Lane* new_lane) noexcept;
  Phase close(int fd) noexcept;          ///< the program's; returns the phase before it. The handle is stale afterwards
  void forget_lane() noexcept;           ///< what the failed one has left behind: the next finds the stream as the first did
  void try_ready(int fd) noexcept;       ///< rx tcp -> ready, if the moment allows
  void try_switch(int fd) noexcept;      ///< tx prepared -> lane, likewise
  void advance_rx(int fd) noexcept;      ///< follows the words: ready -> draining -> lane -> ended
  void look_at_anchor(int fd) noexcept;  ///< after anchor_event: FIN, RST or bytes beside the lane
  void handle_abandon(int fd) noexcept;  ///< the peer reads no further: the rest goes by the anchor
  void refuse_late(int fd) noexcept;     ///< shut for both: what comes from now on is the kernel's to refuse
  void follow_refusal(int fd) noexcept;
  bool holds_rest() const noexcept;           ///< of a refused direction: there are bytes that came before
  std::uint64_t lane_rest() const noexcept {  ///< of those, the lane's
    return rx.load(std::memory_order_relaxed) == RxState::refused && lane->rx_bytes() < rest_end ? rest_end - lane->rx_bytes() : 0;
  }
  bool flush_resend(int fd) noexcept;  ///< true: nothing left to resend, and FIN is out if it was due
  void guard_resend() noexcept;        ///< there are bytes to resend, which a kill must not drop without a sign
  void unguard_resend() noexcept;
  void tend() noexcept;              ///< what is due though the program makes no call
  Lane* take_spent_lane() noexcept;  ///< both directions are through with the lane: it is the caller's; nullptr: not yet

  // --- sends and receives in place (stream_zcopy.cpp); the lock is held, but while they wait
  struct InPlace {
    bool was_offered = false;
    std::int64_t bytes = 0;  ///< that are sent
    int result = 0;          ///< why the call is to end: -EINTR, -EAGAIN; 0: it goes on
  };
  /// Offers what lies together at `from` to the peer's reader, and waits until that is over; `from` advances.
  InPlace send_in_place(int fd, IovCursor& from, std::uint16_t gen, std::int64_t& deadline) noexcept;
  /// Until nobody reads memory of the program's any more. InPlace::result.
  int await_lent(int fd, std::uint16_t gen, std::int64_t deadline, std::int64_t now_ns) noexcept;
  /// Reads what the peer offers into `to`, which advances, and waits for it. Returns the bytes. 0: it has been refused.
  std::int64_t read_in_place(int fd, IovCursor& to, bool may_read, std::uint16_t gen) noexcept;
  /// Before END: nobody reads the program's memory any more. False: the peer has not answered, and the lane is being recovered.
  bool settle_lent() noexcept;
  // --- the same where the peer's reader, or ours, waits first (stream_sink.cpp)
  InPlace write_in_place(int fd, IovCursor& from, std::uint16_t gen, std::int64_t deadline) noexcept;
  int await_target(std::uint16_t gen, std::int64_t deadline) noexcept;  ///< InPlace::result
  /// Lets the peer's sender write into `to`, which advances, and waits for that. `was_offered` false: it cannot be, now.
  InPlace receive_in_place(int fd, IovCursor& to, std::uint16_t gen, std::int64_t deadline) noexcept;
  int await_sunk(std::uint16_t gen, std::int64_t deadline, bool& came_in_time) noexcept;
  void settle_sink(int fd, std::uint16_t gen) noexcept;  ///< nobody writes to memory of the program's any more
  /// The peer's service thread should look at its lane: what we have said waits there for a call of its program.
  std::atomic<bool> wants_peers_look{false};

  // --- unordered lanes (stream_unordered.cpp); the lock is held
  static constexpr std::int64_t kEndPatienceNs = 5'000'000'000;  ///< for an END that the anchor's end has overtaken
  /// Has END been said, and does TCP carry what comes now? False: it is not acknowledged yet.
  bool end_is_settled() noexcept;
  void let_held_go() noexcept;
  /// Bytes that wait for that; returns how many were taken.
  std::size_t keep_behind_end(IovCursor& from) noexcept;
  void acknowledge_end() noexcept;
  void end_if_half_closed(int fd) noexcept;  ///< before the lane was up: FIN is out, END is still to be said
  /// The anchor ended or brought bytes: is the lane's end still on its way? Then the anchor has to wait, for a while.
  bool end_is_awaited() noexcept;
  void give_up_on_end(int fd) noexcept;  ///< if it is time to
  bool is_through() const noexcept {
    return phase.load() != Phase::laned || (tx.load() == TxState::ended && rx.load() == RxState::ended && resend.empty());
  }
  void leave_failed_lane(int fd) noexcept;  ///< nothing more comes or goes by it
  /// Taken down, and the device is not needed any more: what we sent is acknowledged, what the peer sent is in our memory.
  bool is_evacuated() const noexcept {
    return phase.load() != Phase::laned || (tx.load() == TxState::ended && (rx.load() == RxState::ended || end_acknowledged));
  }
  /// RST, not FIN: neither side may take the stream for complete.
  void break_off(int fd) noexcept;
  /// Bytes of the lane are lost, and no later ones may be taken for them.
  void leave_gap(int fd) noexcept;
  /// Of an evacuated stream: is END_SEEN through, too? Asked again and again; the first time asks the device.
  bool last_words_arrived() noexcept;
  /// Something is under way that no event is sure to tell of: the service thread has to look now and then.
  bool needs_looks() const noexcept {
    return !resend.empty() || asked_down.load(std::memory_order_relaxed) != Asked::no ||
           tx.load(std::memory_order_relaxed) == TxState::ending || is_recovering() ||
           end_due_ns.load(std::memory_order_relaxed) != 0;
  }

  // --- a connection of several processes (stream_inherited.cpp); the lock is held
  StreamSnapshot snapshot() noexcept;
  void inherit(const StreamSnapshot&) noexcept;  ///< a new one
  void leave_heirs() noexcept;                   ///< this process has no more to do with it
  bool is_parents_too() noexcept;                ///< a parent may use it as well
  /// The first use by a child.
  void take_down_inherited(LaneReason reason) noexcept;
  /// Bytes of the lane are unread that come before what TCP brings, which only this process can read.
  bool has_gap_for_others(int fd) const noexcept;
  void keep_gap_from_others(int fd) noexcept;  ///< by a reset
  /// Another program goes on with the connection. What lies here unread does not follow it: rather no connection than a gap.
  void reset_if_bytes_stay(int fd) noexcept;

  // --- after a failure (stream_recovery.cpp); the lock is held
  bool may_recover() const noexcept { return recovery.load(std::memory_order_relaxed) == Recovery::possible; }
  /// Stops the lane; the service thread exchanges arrived() with the peer. False: there is nothing to recover, or no way.
  bool begin_recovery() noexcept;
  /// The CM says so. It may be the path's end, the device's, or the peer's.
  void lane_is_disconnected() noexcept;
  Arrived arrived() const noexcept;
  void recover(const Arrived& peer) noexcept;
  void give_up_recovery() noexcept;  ///< the peer cannot be asked: its process is gone, or it talks nonsense
  /// After FIN nothing can be sent again: it goes when the peer has acknowledged END.
  bool fin_has_to_wait() noexcept { return is_recovering() || (may_recover() && !end_is_settled()); }
  bool is_recovered() const noexcept { return recovery.load(std::memory_order_acquire) == Recovery::done; }
  bool is_recovering() const noexcept { return recovery.load(std::memory_order_acquire) == Recovery::under_way; }

  /// SO_RCVTIMEO and SO_SNDTIMEO that were set before this was a stream, or on the listener that it comes from. A lock keeps
  /// Stream::set_timeout() out, or it is the first call.
  void read_timeouts(int fd) noexcept;
  void judge(int fd) noexcept;  ///< unjudged -> what the rules say, once the connection is made
  /// Strict: waits for the end of the search. 0: there is a lane; -EAGAIN, -EINTR; -ECONNREFUSED: there is none, the connection is
  /// over.
  int await_lane(int fd, int flags, bool for_send);
  bool may_have_to_await_lane() const noexcept {
    return strict.load(std::memory_order_relaxed) || phase.load(std::memory_order_acquire) == Phase::unjudged;
  }
  bool strictly_waiting() const noexcept {
    const Phase now = phase.load(std::memory_order_acquire);
    return now == Phase::unjudged || (now == Phase::pursued && strict.load(std::memory_order_relaxed));
  }
  void take_down_locked(LaneReason reason) noexcept;
  void end_tx_locked() noexcept;
  void abandon_rx() noexcept;
  /// The anchor ended before it had brought everything again: the rest is read where it lies. False: there was nothing to bring.
  bool resume_after_resend() noexcept;
  /// The program closes, or ends: with bytes unread, and then it is a reset? Not before the peer has acknowledged END on the lane
  /// `behind`, if there is one.
  bool reset_if_unread(int fd, const Lane* behind) noexcept;
  /// A lane that died while both processes live: broken protocol, or a failed device.
  void leave_dead_lane(int fd) noexcept;
  /// Rule 11: does `fd` still name this connection? The program may have closed it in a way that we did not see.
  bool names_us(int fd) const noexcept;
  bool has_said_end() const noexcept { return tx.load(std::memory_order_relaxed) >= TxState::ending; }
  bool abandoned() const noexcept { return tx.load(std::memory_order_relaxed) == TxState::lane && lane->said(kAbandon); }
  /// Keeps what credits do not let out now, within what a TCP socket would take. Returns the bytes taken.
  std::size_t keep_unsent(IovCursor& from, std::size_t limit) noexcept;
  /// The lane, for a look without the lock; nullptr: none.
  Lane* seen_lane(const Grace::Look&) const noexcept {
    return phase.load(std::memory_order_seq_cst) == Phase::laned ? published_lane.load(std::memory_order_acquire) : nullptr;
  }
  bool end_reached() const noexcept { return lane->end_reached(); }
  /// See Stream::poll(). With the lock.
  bool anchor_has_part() const noexcept {
    return rx.load(std::memory_order_relaxed) != RxState::lane || tx.load(std::memory_order_relaxed) != TxState::lane || rx_shut ||
           lane->said(kEnd) || lane_is_left() || anchor_event.load(std::memory_order_relaxed);
  }
  /// The peer writes no more and reads no more: what is left to do is the kernel's to say.
  bool lane_is_left() const noexcept { return peer_gone.load(std::memory_order_relaxed) || lane->said(kGone); }
  /// It failed, and what was on it is not, or no longer, to be had by recovery.
  bool lane_is_dead() const noexcept { return lane->dead() && !is_recovering() && !may_recover(); }
  /// leave_dead_lane() has something to do.
  bool failed_unseen() const noexcept { return lane->dead() && !is_recovering(); }
  bool lane_is_over() const noexcept { return lane_is_left() || lane_is_dead(); }
  /// No further word will come. An unordered lane that failed brings none either.
  bool no_word_comes() const noexcept { return lane_is_left() || (lane->unordered() && lane_is_dead() && !lane->violated()); }
  /// Something that a thread waiting for that can act on. With the lock.
  enum class For : std::uint8_t { bytes, room, target };  ///< target: memory of the peer's reader to write to
  bool changed(For what) const noexcept;

  static constexpr int kNothingYet = 1;
  static constexpr std::int64_t kEndsHere = -1, kLookAgain = -2;
  /// Taken down: until TCP alone carries what is sent. As Stream::await_tcp(), which takes down first.
  int await_end_of_lane(int fd, bool nowait, std::uint16_t gen);
  /// Until TCP takes bytes again; without the lock. 0, -EINTR, or -EAGAIN after SO_SNDTIMEO.
  int await_anchor(int fd, std::int64_t& deadline);
  int wait_for_room(bool nowait, std::int64_t& deadline);  ///< as wait()
  /// spin_and_sleep and sleep: a cancellation point; spin_and_sleep_uncancelled: none.
  enum class Patience : std::uint8_t { spin, sleep, spin_and_sleep, spin_and_sleep_uncancelled };
  /// Waits for changed(what); the lock is held on entry and exit. 0, -EINTR, or -EAGAIN when `deadline_ns` (0: none) has
  /// passed.
  int wait(For what, std::int64_t deadline_ns, bool has_timeout, Patience patience = Patience::spin_and_sleep);
  /// O_NONBLOCK of the program's descriptor. The kernel is asked once, by the first call that must know.
  bool is_nonblocking(int at) noexcept {
    const Blocking known = blocking.load(std::memory_order_relaxed);
    return (known == Blocking::unknown ? ask_blocking(at) : known) == Blocking::no;
  }
  bool usable_here() noexcept;  ///< false: this is not the owner's process; the lane has been taken down

 private:
  Blocking ask_blocking(int fd) noexcept;
  bool fin_is_out() const noexcept { return tx_shut && !fin_due; }
  bool is_sound(const Arrived& peer) const noexcept;
  /// Asks the parent's service thread, for a while. False: the lane is not over on both sides.
  static bool ask_parent_down(Stream parents) noexcept;
  bool give_back_to_tcp(std::uint64_t from) noexcept;
  long send_kept(int fd) noexcept;
  std::int64_t kernel_send(int fd, IovCursor& from, int flags);  ///< the caller has counted itself in
  std::int64_t kernel_recv(int fd, IovCursor& to, int flags, MessageExtras* extras);
  std::int64_t anchor_recv_nowait(int fd, IovCursor& to, std::size_t cap, int flags, MessageExtras* extras) noexcept;
  std::int64_t anchor_bytes_before_switch(int fd) noexcept;
  struct Receiving;
  class Waiting;
  std::int64_t take_from_lane(Receiving& r) noexcept;
  std::int64_t take_rest(Receiving& r) noexcept;
  std::int64_t take_from_anchor(Receiving& r, RxState state) noexcept;
  std::int64_t send_by_messages(IovCursor& from) noexcept;
  std::int64_t lane_send(int fd, IovCursor& from, int flags, std::uint16_t gen);
  /// lane_send() of what can be sent where only the first `bytes` of it can be read.
  std::int64_t send_readable(int fd, IovCursor& from, std::size_t bytes, int flags, std::uint16_t gen);
  std::int64_t lane_recv(int fd, IovCursor& to, int flags, std::uint16_t gen, MessageExtras* extras);
};

/// The kernel's own byte counts of a connection; see architecture 2.3 for how far each can be trusted.
struct AnchorCounts {
  bool ok = false;
  std::uint64_t sent = 0;
  std::uint64_t received = 0;  ///< by the kernel; consumed = received - SIOCINQ
  std::uint64_t queued = 0;    ///< SIOCINQ
  bool may_send = false;       ///< our half is open
  bool has_end = false;        ///< the peer's FIN or RST has come; FIN counts as a byte received
};
AnchorCounts anchor_counts(int fd) noexcept;
/// The peer's FIN or RST has come. After our own SHUT_RD a receive says 0 either way.
bool has_fin(int fd) noexcept;

namespace engine {
StreamImpl* new_stream() noexcept;
void free_stream(StreamImpl*) noexcept;
bool free_at_once(StreamImpl*) noexcept;    ///< false: not now, for this is a signal handler's thread and it is inside already
std::uint32_t process_id() noexcept;        ///< cached, right in a fork's child too
void closed(StreamImpl*, int fd) noexcept;  ///< the program closed it: its lane is retired, the cell reused
void pursue(StreamImpl*) noexcept;          ///< ask the service thread to make a lane
Stream handle_of(const StreamImpl*) noexcept;
void* lane_cell() noexcept;
void free_lane_cell(void*) noexcept;
Capture* capture() noexcept;  ///< SDP_PCAP; nullptr: none. Opened at the first call
Family policy_for(Role, const sockaddr_storage& local, const sockaddr_storage& remote) noexcept;
LaneReason policy_reason() noexcept;  ///< why policy_for() says tcp
int high_fd(int fd) noexcept;         ///< moves a helper descriptor out of the program's way and remembers it; closes the low one
void remember_helper_fd(int fd) noexcept;
void forget_helper_fd(int fd) noexcept;
void buffer_is_large() noexcept;  ///< some stream's has_large_buffer went up
void bytes_are_held() noexcept;   ///< some stream's lane holds bytes: Lane::held()
void nudge_parent() noexcept;     ///< in a fork's child: the parent's service thread should look at its streams
bool parent_lives() noexcept;     ///< in a fork's child: whose fork it is
void nudge() noexcept;            ///< the service thread should look at its streams
/// The connection `fd` is closed with bytes to resend, which become ours: they go out, and then FIN, by a descriptor of ours.
/// Not before the peer has acknowledged the end of the lane `behind`, if there is one; release_lingering() says that this lane
/// goes.
enum class Farewell : std::uint8_t { fin, reset };  ///< fin: or what the program's SO_LINGER says
void linger(int fd, KeptBytes bytes, const Lane* behind = nullptr, Farewell = Farewell::fin) noexcept;
void release_lingering(const Lane* lane) noexcept;
/// That lane has failed, and the peer has said how much arrived: what did not goes out before the rest.
void recover_lingering(const Lane* lane, const Arrived& peer) noexcept;
bool lingers_behind(const Lane* lane) noexcept;
void move_lingering(const Lane* lane, const Lane* left) noexcept;  ///< `left` takes the place of `lane`
bool flush_lingering() noexcept;                                   ///< false: some cannot go out yet
void notify(Stream) noexcept;                                      ///< tell the shim (no lock held)
}  // namespace engine

}  // namespace sdp
