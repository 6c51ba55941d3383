// A deterministic RDMA fabric: two devices, a virtual clock and one seed. Everything that the contract leaves open (delays, who is
// first, which posts are refused, whether an unsolicited Send wakes) is decided by the seed, so a seed replays a run exactly.
//
//   SimFabric fabric{{.seed = seed, .fail_post_percent = 20}};
//   auto pd = *fabric.device(Side::a).create_pd(fabric.path(Side::a));     ... Cqs, Qps as on every device
//   fabric.connect(*active, *passive);                                    or through SimCm (sim_cm.hpp)
//   while (fabric.step()) poll_both();                                    one event, then whatever the test does
//   BOOST_TEST(fabric.check() == "");
//
// It is harsher than real devices where the contract allows it: bytes of a Send that is not inline are read as late as possible, a
// posted receive buffer and its prefix are scribbled over, arm() without arm_fence() may or may not take effect, a slot of the send
// queue comes back only when a completion is polled. What a caller must not do (touch a posted buffer, post one twice, post more
// than fits inline, overrun a Cq) is recorded and reported by check().
//
// A refused post (queue_full by fail_post_percent) happens only while a signalled request of that QP has not been polled: a caller
// that resumes on its next completion always gets one.
//
// Threads: one. Lifetime: the fabric outlives everything made on its devices.
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <optional>
#include <random>
#include <string>

#include "rdma_core/device.hpp"
#include "tests/support/sim_clock.hpp"

namespace rdma::sim {

enum class Side : std::uint8_t { a, b };
constexpr Side peer_of(Side side) noexcept { return side == Side::a ? Side::b : Side::a; }

struct SimOptions {
  std::uint64_t seed = 1;
  NodeType flavour = NodeType::ib_ca;  ///< ib_ca or rnic
  Nanos delay_min = 200;               ///< of each message, one way
  Nanos delay_max = 4'000;
  unsigned fail_post_percent = 0;          ///< post_send says queue_full
  unsigned unsolicited_wake_percent = 50;  ///< a receive completion without kSolicited announces; errors and own requests always do
  unsigned unfenced_arm_percent = 50;      ///< arm() without arm_fence() has taken effect already
  std::uint32_t max_inline = 64;           ///< bytes
  std::uint32_t recv_prefix_bytes = 0;
  bool recv_needs_extent = false;
  bool rdma_write_wakes = false;
  bool remembers_sent_data = false;
  bool has_wake_word = true;
  std::optional<bool> rnr_retry;  ///< default: on ib_ca yes, on rnic no
  unsigned rnr_retries = 7;       ///< with rnr_retry: tries before rnr_retry_exceeded; 7 means for ever
  Nanos rnr_timer = 10'000;
  Nanos retry_timeout = 1'000'000;  ///< until a request to a dead peer completes with retry_exceeded
  std::uint32_t max_send_wr = 128;
  std::uint32_t max_recv_wr = 256;
  std::uint32_t max_sge = 4;
  std::uint32_t max_sge_read = 1;
  std::uint32_t max_read_outstanding = 4;
  bool scribble = true;  ///< poison posted receive buffers, and check that nobody wrote there
};

/// What happened on one side so far; for assertions.
struct SimCounters {
  std::uint64_t posted_sends = 0;     ///< accepted by post_send, all opcodes
  std::uint64_t completed_sends = 0;  ///< done, signalled or not
  std::uint64_t posted_recvs = 0;
  std::uint64_t completed_recvs = 0;
  std::uint64_t refused_posts = 0;  ///< queue_full out of the seed, not out of depth
  std::uint64_t announcements = 0;  ///< wakes of armed Cqs
  std::uint64_t live_mrs = 0;
  std::uint64_t live_qps = 0;
};

namespace detail {
struct State;
}  // namespace detail

/// The moves a CM makes on this fabric. The Qp may be wrapped. What fails is a mistake of the test and aborts.
void move_to_init(Qp& qp, NodeType flavour);
void move_to_rts(Qp& qp, NodeType flavour, Qpn peer, bool active, std::uint32_t max_read_outstanding = 1);

class SimFabric {
 public:
  explicit SimFabric(const SimOptions& options = {});
  ~SimFabric();
  SimFabric(const SimFabric&) = delete;
  SimFabric& operator=(const SimFabric&) = delete;

  const SimOptions& options() const noexcept;
  Device& device(Side side) noexcept;
  Path path(Side from) const noexcept;  ///< what a CM would report: the way from this side to the other
  VirtualClock& clock() noexcept;
  std::mt19937_64& random() noexcept;  ///< the one source of chance, for the test's own choices too
  bool chance(unsigned percent);
  std::uint64_t pick(std::uint64_t low, std::uint64_t high);  ///< both included

  /// Ties two Qps in state reset or init, one on each side, and moves both to RTS, as a CM would. `active` is the side that may
  /// send first. Receives of the passive side may be posted before (move it to init first: to_init) or after.
  void connect(Qp& active, Qp& passive);
  void to_init(Qp& qp);

  /// Runs one event. False: none is left.
  bool step();
  /// Until no event is left, or until `done` says so (asked before each event). Returns the number of events. More than
  /// `max_events` is a violation (a livelock) that check() reports.
  std::uint64_t run_until_idle(std::uint64_t max_events = 1'000'000);
  bool run_until(const std::function<bool()>& done, std::uint64_t max_events = 1'000'000);
  void run_for(Nanos time);              ///< and leaves the clock exactly there
  std::uint64_t steps() const noexcept;  ///< events run so far

  /// An event of the test's own, in virtual time.
  void after(Nanos delay, std::function<void()> action);
  /// Runs `action` right after the `step`th event from now (1 is the next).
  void at_step(std::uint64_t step, std::function<void()> action);
  /// Called as an event of its own for each announcement of an armed Cq on that side; the handler may call anything.
  void on_wake(Side side, std::function<void(Cq&, std::uint8_t kinds)> handler);

  // --- bad days
  /// The process of that side dies (kill -9): nothing of it happens any more. Its objects stay destroyable; they do nothing. What
  /// lay in its send queues is delivered up to a point that the seed chooses; all of it if remembers_sent_data.
  void kill(Side side);
  bool alive(Side side) const noexcept;
  void on_death(std::function<void(Side)> handler);  ///< added to those there; SimCm uses it
  /// The device goes: device_fatal is reported, every Qp flushes, every later call fails. The process lives.
  void remove_device(Side side);
  /// The QP of that number goes to error, as after a broken link; both flush.
  void break_qp(const Qp& qp);

  const SimCounters& counters(Side side) const noexcept;
  /// Empty: every rule held. Otherwise one line for each: a broken rule, a request that never completed, a completion nobody
  /// polled. Call it when run_until_idle() has returned. Receives posted on a Qp in RTS may stay; a destroyed Qp's buffers are
  /// home.
  std::string check() const;

 private:
  std::unique_ptr<detail::State> state_;
};

}  // namespace rdma::sim
