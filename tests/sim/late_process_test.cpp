// Processes whose lanes arrive later than TCP, with the real service thread and CM: what send() took before an exit is read, or its
// loss is told.
#include <linux/tcp.h>
#include <netinet/in.h>
#include <poll.h>
#include <sys/wait.h>

#include <atomic>
#include <cstring>
#include <thread>

#include "rdma_core/cm/local_cm.hpp"
#include "sdp/peer_link.hpp"
#include "tests/sim/stream_pair.hpp"

namespace sdp::sim {
namespace {

std::atomic<rdma::wrap::LateDevice*> g_late{nullptr};

class LateComposition final : public engine::Composition {
 public:
  static std::unique_ptr<engine::Composition> make(const Options&) {
    auto mine = std::make_unique<LateComposition>();
    mine->device_ = std::move(*rdma::shm::ShmDevice::create({}));
    auto late = std::make_unique<rdma::wrap::LateDevice>(*mine->device_);
    mine->cm_ = std::move(*rdma::cm::LocalCm::create(*mine->device_, late.get()));
    g_late = late.get();
    mine->registry_.add_device(std::move(late));
    return mine;
  }
  rdma::DeviceRegistry& registry() noexcept override { return registry_; }
  rdma::cm::ConnectionManager& cm() noexcept override { return *cm_; }
  void abandon_in_child() noexcept override { cm_->abandon_in_child(); }

 private:
  std::unique_ptr<rdma::shm::ShmDevice> device_;
  rdma::DeviceRegistry registry_;
  std::unique_ptr<rdma::cm::LocalCm> cm_;
};

/// One process with one connection. What it posts leaves after a while, or not at all while `held`. `in_vain`: its end waits for
/// what does not come.
class Process {
 public:
  Process(int at, Role role, bool in_vain) : fd(at) {
    alarm(100);
    setenv("SDP_LANE_TIMEOUT", "60", 1);
    setenv("SDP_EXIT_TIMEOUT", in_vain ? "1" : "60", 1);
    fcntl(fd, F_SETFL, 0);
    setenv("SDP_UPGRADE_MESSAGES", "1", 1);
    setenv("SDP_RECV_BUFFERS_INITIAL", "64", 1);  // credits for all that is to be held
    engine::configure(&LateComposition::make, nullptr);
    stream = engine::track(fd, role);
    impl_ = reinterpret_cast<StreamImpl*>(stream.word() & 0xffffffffffffULL);
    std::thread([this] { pump(); }).detach();
  }
  Process(const Process&) = delete;
  Process& operator=(const Process&) = delete;

  StreamImpl& impl() { return *impl_; }
  /// Another thread is in a call on the stream from now on, for that long.
  void stay_inside(std::chrono::milliseconds time) {
    std::atomic<bool> inside{false};
    std::thread([this, &inside, time] {
      (void)impl_->lock.lock();
      inside = true;
      std::this_thread::sleep_for(time);
      impl_->lock.unlock();
    }).detach();
    while (!inside) std::this_thread::yield();
  }
  const int fd;
  Stream stream;
  std::atomic<bool> held{false};

 private:
  void pump() {
    for (;;) {
      std::this_thread::sleep_for(std::chrono::milliseconds(1));
      rdma::wrap::LateDevice* const late = g_late.load();
      if (held || late == nullptr) continue;
      (void)impl_->lock.lock();  // the Qp's users stay off
      late->release(4);
      impl_->lock.unlock();
    }
  }
  StreamImpl* impl_ = nullptr;
};

/// How the writer ends. `left`: the lane is taken down, and more is sent, first; `held`: nothing leaves any more; `unheard`: no
/// acknowledgement comes. `close_asked`: the reader's lane has failed, and its question is there before the service thread has
/// heard of the close. `exit_busy`: a thread is inside the stream just then. `exec`: by becoming another program. `credentials`:
/// changed, and more is sent, first.
enum class End : std::uint8_t {
  exit,
  exit_busy,
  exit_held,
  killed,
  exec,
  exec_held,
  close,
  close_asked,
  left,
  left_held,
  left_unheard,
  credentials
};
constexpr bool is_held(End end) {
  return end == End::exit_held || end == End::killed || end == End::exec_held || end == End::left_held;
}
constexpr bool is_in_vain(End end) { return is_held(end) || end == End::left_unheard; }
/// Said by the writer to the reader; inherited by both.
int g_go[2] = {-1, -1};

/// Bytes that have come to this process by TCP connections other than the program's.
std::uint64_t come_by_links(int program) {
  std::uint64_t sum = 0;
  for (int fd = 3; fd < 2048; ++fd) {
    tcp_info info{};
    socklen_t len = sizeof info;
    if (fd != program && getsockopt(fd, IPPROTO_TCP, TCP_INFO, &info, &len) == 0) sum += info.tcpi_bytes_received;
  }
  return sum;
}
/// The service thread has slept on this lock ever since; it has looked for commands before.
bool is_waited_for(const rdma::SharedLock& lock) {
  static_assert(sizeof lock == sizeof(std::uint64_t));
  const std::uint64_t word = __atomic_load_n(reinterpret_cast<const std::uint64_t*>(&lock), __ATOMIC_RELAXED);
  return (word & rdma::SharedLock::kWaiters) != 0;
}

constexpr std::size_t kMessages = 20, kBytes = 1000, kKept = 500;

/// Byte for byte to and fro until the lane carries them; then what no reader must lose without being told.
int write_and_end(int fd, End end) {
  Process p(fd, Role::connector, is_in_vain(end));
  std::byte data[kBytes] = {};
  while (p.impl().tx.load() != TxState::lane)
    if (p.stream.send(fd, data, 1, MSG_NOSIGNAL) != 1 || p.stream.recv(fd, data, 1, 0) != 1) return 1;
  data[0] = std::byte{1};  // from here on nothing is answered
  if (p.stream.send(fd, data, 1, MSG_NOSIGNAL) != 1) return 2;
  if (p.stream.recv(fd, data, 1, 0) != 1) return 3;
  p.held = true;
  for (std::size_t i = 0; i < kMessages; ++i)
    if (p.stream.send(fd, data, kBytes, MSG_NOSIGNAL) != kBytes) return 4;
  if (end == End::exec || end == End::exec_held) {
    p.held = is_held(end);
    fcntl(fd, F_SETFD, 0);
    const engine::ExecAttempt attempt;
    p.stream.leave_to_program();
    p.stream.reset_if_bytes_stay(fd);
    execl("/bin/true", "true", nullptr);
    return 6;
  }
  if (end == End::credentials) {
    p.held = false;
    const engine::CredentialsChange change;
    if (p.impl().tx.load() != TxState::ended || !p.impl().is_evacuated()) return 7;
  }
  if (end == End::close_asked) {
    const std::uint64_t before = come_by_links(fd);
    (void)p.impl().lock.lock();
    if (write(g_go[1], "", 1) != 1) return 8;
    while (come_by_links(fd) < before + PeerLinks::kFrameBytes) std::this_thread::yield();
    while (!is_waited_for(p.impl().lock)) {
      engine::nudge();
      std::this_thread::yield();
    }
    (void)p.impl().close(fd);
    p.impl().lock.unlock();
    engine::closed(&p.impl(), fd);
    ::close(fd);
    engine::at_exit();
    return 0;
  }
  if (end >= End::left) {
    p.stream.take_down(LaneReason::mode);
    if (p.stream.send(fd, data, kKept, MSG_NOSIGNAL) != kKept) return 5;
  }
  if (end >= End::close) {
    p.stream.close(fd);
    ::close(fd);
  }
  if (!is_held(end)) p.held = false;
  if (end == End::exit_busy) p.stay_inside(std::chrono::milliseconds(50));
  if (end != End::killed) engine::at_exit();
  return 0;
}

/// The result: 0: everything and the end; 100: less, and ECONNRESET.
int read_to_the_end(int fd, End end, std::size_t expected) {
  Process p(fd, Role::acceptor, is_in_vain(end));
  std::byte data[kBytes] = {};
  while (data[0] == std::byte{0})
    if (p.stream.recv(fd, data, 1, 0) != 1 || p.stream.send(fd, data, 1, MSG_NOSIGNAL) != 1) return 1;
  if (p.impl().rx.load() != RxState::lane) return 2;
  while (g_late.load()->held() != 0) std::this_thread::yield();  // the last answer is to leave
  if (end == End::close_asked) {
    char go = 0;
    if (read(g_go[0], &go, 1) != 1) return 8;
    rdma::QpAttributes over;
    over.state = rdma::QpState::error;
    (void)p.impl().lock.lock();
    (void)p.impl().lane->qp().modify(over);
    p.impl().lock.unlock();
  }
  if (end == End::left_unheard) {
    p.held = true;
    pollfd over{fd, POLLRDHUP, 0};
    if (::poll(&over, 1, 30'000) != 1) return 7;  // reads nothing while the writer is there, for that would end the lane
  }
  std::size_t total = 0;
  std::int64_t n = 0;
  while ((n = p.stream.recv(fd, data, sizeof data, 0)) > 0) total += static_cast<std::size_t>(n);
  if (n == 0) return total == expected ? 0 : 3;
  if (n != -ECONNRESET) return 4;
  if (p.stream.recv(fd, data, sizeof data, 0) != 0) return 5;
  return total < expected ? 100 : 6;
}

int result_of(End end) {
  const std::size_t expected = kMessages * kBytes + (end >= End::left ? kKept : 0);
  std::array<int, 2> fds{};
  connected_pair(fds);
  std::array<pid_t, 2> pids{};
  for (unsigned side : {0U, 1U}) {
    pids[side] = fork();
    BOOST_REQUIRE(pids[side] >= 0);
    if (pids[side] != 0) continue;
    close(fds[1 - side]);
    _exit(side == 0 ? write_and_end(fds[0], end) : read_to_the_end(fds[1], end, expected));
  }
  for (const int fd : fds) close(fd);
  std::array<int, 2> status{};
  for (unsigned side : {0U, 1U}) BOOST_REQUIRE(waitpid(pids[side], &status[side], 0) == pids[side]);
  BOOST_TEST(status[0] == 0);
  return WIFEXITED(status[1]) ? WEXITSTATUS(status[1]) : -1;
}

}  // namespace

BOOST_AUTO_TEST_CASE(exit_waits_until_the_reader_has_everything) {
  for (const End end : {End::exit, End::exit_busy, End::close, End::left}) BOOST_TEST(result_of(end) == 0);
}

BOOST_AUTO_TEST_CASE(a_peer_that_asks_about_a_lane_is_answered_though_its_stream_is_just_being_closed) {
  BOOST_REQUIRE(pipe(g_go) == 0);
  BOOST_TEST(result_of(End::close_asked) == 0);
  for (const int fd : g_go) close(fd);
}

BOOST_AUTO_TEST_CASE(exec_waits_until_the_reader_has_everything) { BOOST_TEST(result_of(End::exec) == 0); }

BOOST_AUTO_TEST_CASE(exec_does_not_wait_for_ever_and_the_loss_is_told) { BOOST_TEST(result_of(End::exec_held) == 100); }

BOOST_AUTO_TEST_CASE(nothing_is_under_way_when_credentials_change) { BOOST_TEST(result_of(End::credentials) == 0); }

BOOST_AUTO_TEST_CASE(exit_does_not_wait_for_ever_and_the_loss_is_told) {
  for (const End end : {End::exit_held, End::left_held, End::left_unheard}) BOOST_TEST(result_of(end) == 100);
}

BOOST_AUTO_TEST_CASE(what_dies_with_its_process_is_missed) { BOOST_TEST(result_of(End::killed) == 100); }

}  // namespace sdp::sim
