// One process reads another's memory: whatever kind of memory it is, and nothing once that process is gone, is another program, or
// says no. The reader is the parent, so that Yama's usual setting lets it.
#include <fcntl.h>
#include <linux/filter.h>
#include <linux/seccomp.h>
#include <signal.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/wait.h>

#include <array>
#include <boost/test/data/test_case.hpp>
#include <cerrno>
#include <thread>

#include "rdma_core/base/clock.hpp"
#include "tests/rdma_core/shm_pair.hpp"

using namespace rdma;
using namespace rdma::shm;
using namespace rdma::shm::test;

namespace {

constexpr std::size_t kBytes = std::size_t{3} << 20;
constexpr Proof kProof{{{1, 2}}, {{3, 4}}};

/// Shared by both processes: what a segment's first page is to them, and words of the test's own.
struct Shared {
  ProgramWindow window;
  std::atomic<std::uint64_t> memory;
  std::atomic<bool> is_ready, goes_on;
};
Shared& new_shared() {
  return *static_cast<Shared*>(mmap(nullptr, kPageBytes, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0));
}

/// A process that publishes its proof, shows what `make` gives and waits. Killed with this object.
class Source {
 public:
  template <class Make, class Then = void (*)()>
  explicit Source(
      Make make, Then then = [] {}) {
    pid_ = fork();
    BOOST_REQUIRE(pid_ >= 0);
    if (pid_ == 0) {
      alarm(60);
      OwnProof proof;
      proof.publish(kProof, shared.window);
      shared.memory.store(reinterpret_cast<std::uint64_t>(make()));
      shared.is_ready.store(true);
      while (!shared.goes_on.load()) usleep(1000);
      then();
      for (;;) pause();
    }
    while (!shared.is_ready.load()) usleep(1000);
  }
  ~Source() { kill_it(); }
  Source(const Source&) = delete;
  Source& operator=(const Source&) = delete;
  void kill_it() {
    if (pid_ <= 0) return;
    kill(pid_, SIGKILL);
    waitpid(std::exchange(pid_, 0), nullptr, 0);
  }
  pid_t pid() const { return pid_; }
  Shared& shared = new_shared();

 private:
  pid_t pid_ = 0;
};

std::byte pattern(std::size_t k) { return static_cast<std::byte>(k * 13 + (k >> 12)); }
std::byte* fill(void* memory, std::size_t bytes = kBytes) {
  auto* const to = static_cast<std::byte*>(memory);
  for (std::size_t k = 0; k < bytes; ++k) to[k] = pattern(k);
  return to;
}
void* map(std::size_t bytes, int flags = MAP_PRIVATE | MAP_ANONYMOUS, int fd = -1) {
  void* const memory = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, flags, fd, 0);
  return memory == MAP_FAILED ? nullptr : memory;
}

/// How many of `bytes` could be read; they are the right ones.
std::uint32_t read_from(ProgramReader& reader, std::uint64_t at, std::size_t bytes, std::size_t first = 0) {
  std::vector<std::byte> to(bytes);
  const Sge sge = sge_of(to.data(), bytes);
  const std::uint32_t got = reader.read({&sge, 1}, at + first, static_cast<std::uint32_t>(bytes));
  for (std::size_t k = 0; k < got; ++k) BOOST_REQUIRE((to[k] == pattern(first + k)));
  return got;
}

enum class Kind { heap, stack, file, file_read_only, shared, huge, read_only };
const Kind kKinds[] = {Kind::heap, Kind::stack, Kind::file, Kind::file_read_only, Kind::shared, Kind::huge, Kind::read_only};

std::byte* make(Kind kind) {
  static std::vector<std::byte> heap;
  switch (kind) {
    case Kind::heap:
      heap.resize(kBytes);
      return fill(heap.data());
    case Kind::stack:
      break;
    case Kind::shared:
      return fill(map(kBytes, MAP_SHARED | MAP_ANONYMOUS));
    case Kind::huge: {
      void* const memory = map(std::size_t{4} << 20, MAP_PRIVATE | MAP_ANONYMOUS | MAP_HUGETLB);
      return fill(memory != nullptr ? memory : map(kBytes));
    }
    case Kind::read_only: {
      std::byte* const memory = fill(map(kBytes));
      mprotect(memory, kBytes, PROT_READ);
      return memory;
    }
    case Kind::file:
    case Kind::file_read_only: {
      char name[] = "/tmp/program_memory.XXXXXX";
      const int fd = mkstemp(name);
      unlink(name);
      if (ftruncate(fd, kBytes) != 0) return nullptr;
      std::byte* const memory = fill(map(kBytes, MAP_SHARED, fd));
      if (kind == Kind::file) return memory;
      return static_cast<std::byte*>(mmap(nullptr, kBytes, PROT_READ, MAP_PRIVATE, fd, 0));
    }
  }
  return nullptr;
}

}  // namespace

BOOST_TEST_DONT_PRINT_LOG_VALUE(Kind)

BOOST_DATA_TEST_CASE(any_kind_of_memory_is_read, boost::unit_test::data::make(kKinds), kind) {
  if (kind == Kind::stack) {
    Source source([]() -> std::byte* {
      static std::byte* here = nullptr;
      std::thread([] {
        std::byte memory[1 << 20];
        here = fill(memory, sizeof memory);
        std::atomic_ref<std::byte*>(here).notify_all();
        for (;;) pause();
      }).detach();
      std::atomic_ref<std::byte*>(here).wait(nullptr);
      return here;
    });
    ProgramReader reader;
    reader.try_peer(source.pid(), kProof, source.shared.window);
    BOOST_TEST(read_from(reader, source.shared.memory, 1 << 20) == 1u << 20);
    return;
  }
  Source source([kind] { return make(kind); });
  ProgramReader reader;
  reader.try_peer(source.pid(), kProof, source.shared.window);
  BOOST_REQUIRE(source.shared.window.answer == kCanRead);
  BOOST_TEST(read_from(reader, source.shared.memory, kBytes) == kBytes);
  BOOST_TEST(read_from(reader, source.shared.memory, 100000, 5) == 100000u);
}

BOOST_AUTO_TEST_CASE(a_hole_ends_a_read_there) {
  Source source([] {
    auto* const memory = fill(map(8 * kPageBytes), 8 * kPageBytes);
    munmap(memory + 5 * kPageBytes, kPageBytes);
    return memory;
  });
  ProgramReader reader;
  reader.try_peer(source.pid(), kProof, source.shared.window);
  BOOST_TEST(read_from(reader, source.shared.memory, 8 * kPageBytes) == 5 * kPageBytes);
  BOOST_TEST(read_from(reader, source.shared.memory, 100, 5 * kPageBytes) == 0u);
  BOOST_TEST(read_from(reader, source.shared.memory, kPageBytes, 6 * kPageBytes) == kPageBytes);
  BOOST_TEST(source.shared.window.answer == kCanRead);
}

BOOST_AUTO_TEST_CASE(of_a_killed_process_nothing_is_read_and_it_is_told) {
  Source source([] { return fill(map(kBytes)); });
  ProgramReader reader;
  reader.try_peer(source.pid(), kProof, source.shared.window);
  BOOST_TEST(read_from(reader, source.shared.memory, 100) == 100u);
  source.kill_it();
  BOOST_TEST(read_from(reader, source.shared.memory, 100) == 0u);
  BOOST_TEST(source.shared.window.answer == std::uint32_t{ESRCH});
  BOOST_TEST(read_from(reader, source.shared.memory, 100) == 0u);
}

// The address that held the proof may be mapped in the new program, too; what lies there is something else.
BOOST_AUTO_TEST_CASE(of_another_program_under_the_same_process_id_nothing_is_read) {
  int pipe_ends[2];
  BOOST_REQUIRE(pipe2(pipe_ends, O_CLOEXEC) == 0);
  {
    Source source([] { return fill(map(kBytes)); }, [] { execlp("sleep", "sleep", "60", nullptr); });
    ProgramReader reader;
    reader.try_peer(source.pid(), kProof, source.shared.window);
    BOOST_TEST(read_from(reader, source.shared.memory, 100) == 100u);
    close(pipe_ends[1]);
    source.shared.goes_on = true;
    char none;
    BOOST_TEST(::read(pipe_ends[0], &none, 1) == 0);  // exec has closed the child's end
    BOOST_TEST(read_from(reader, source.shared.memory, 100) == 0u);
    BOOST_TEST(source.shared.window.answer != kCanRead);
  }
  close(pipe_ends[0]);
}

// It has its parent's memory at its parent's addresses, and may come to its process id.
BOOST_AUTO_TEST_CASE(a_forks_child_does_not_pass_for_its_parent) {
  Shared& shared = new_shared();
  std::vector<std::byte> memory(kPageBytes);
  fill(memory.data(), memory.size());
  OwnProof proof;
  proof.publish(kProof, shared.window);
  ProgramReader own;
  own.try_peer(getpid(), kProof, shared.window);
  BOOST_TEST(read_from(own, reinterpret_cast<std::uint64_t>(memory.data()), 100) == 100u);
  const pid_t child = fork();
  if (child == 0)
    for (;;) pause();
  ProgramReader reader;
  reader.try_peer(child, kProof, shared.window);
  BOOST_TEST(read_from(reader, reinterpret_cast<std::uint64_t>(memory.data()), 100) == 0u);
  BOOST_TEST(shared.window.answer == std::uint32_t{ESRCH});
  kill(child, SIGKILL);
  waitpid(child, nullptr, 0);
}

BOOST_AUTO_TEST_CASE(who_has_no_process_id_here_or_another_proof_is_not_read) {
  Source source([] { return fill(map(kBytes)); });
  for (const bool has_pid : {false, true}) {
    source.shared.window.answer = 0;
    ProgramReader reader;
    reader.try_peer(has_pid ? source.pid() : 0, {{{1, 2}}, {{3, 5}}}, source.shared.window);
    BOOST_TEST(source.shared.window.answer == std::uint32_t{ESRCH});
    BOOST_TEST(read_from(reader, source.shared.memory, 100) == 0u);
  }
  // An address that its owner has not announced.
  source.shared.window.answer = 0;
  source.shared.window.proof = 0;
  ProgramReader reader;
  reader.try_peer(source.pid(), kProof, source.shared.window);
  BOOST_TEST(source.shared.window.answer == std::uint32_t{EOPNOTSUPP});
}

namespace {
/// What a reader without root's rights is told; as exit status, with 0 for kCanRead.
template <class Prepare>
int answer_to(bool dumpable, Prepare prepare) {
  Shared& shared = new_shared();
  const pid_t user = fork();
  if (user != 0) {
    int status = 0;
    waitpid(user, &status, 0);
    return WIFEXITED(status) ? WEXITSTATUS(status) : 1000;
  }
  alarm(60);
  if (geteuid() == 0 && setuid(12345) != 0) _exit(250);
  prctl(PR_SET_DUMPABLE, 1);
  const pid_t source = fork();
  if (source == 0) {
    prctl(PR_SET_DUMPABLE, dumpable ? 1 : 0);
    OwnProof proof;
    proof.publish(kProof, shared.window);
    shared.is_ready = true;
    for (;;) pause();
  }
  while (!shared.is_ready) usleep(1000);
  prepare();
  ProgramReader reader;
  reader.try_peer(source, kProof, shared.window);
  kill(source, SIGKILL);
  _exit(shared.window.answer == kCanRead ? 0 : static_cast<int>(shared.window.answer.load()));
}
}  // namespace

BOOST_AUTO_TEST_CASE(who_may_not_be_traced_or_may_not_ask_is_told_why) {
  BOOST_TEST(answer_to(true, [] {}) == 0);
  BOOST_TEST(answer_to(false, [] {}) == EPERM);
  BOOST_TEST(answer_to(true, [] {
               sock_filter code[] = {
                   BPF_STMT(BPF_LD | BPF_W | BPF_ABS, 0), BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, SYS_process_vm_readv, 0, 1),
                   BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ERRNO | ENOSYS), BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ALLOW)};
               const sock_fprog filter{static_cast<unsigned short>(std::size(code)), code};
               prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0);
               prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, &filter);
             }) == ENOSYS);
}

// A peer whose reader cannot is no reason to fail: memory is not offered to it.
BOOST_AUTO_TEST_CASE(memory_is_registered_only_for_a_peer_that_can_read_it) {
  Pair p(4, 64, NodeType::ib_ca, true);
  std::vector<std::byte> memory(kBytes);
  ProgramWindow& window = p.b.device->links().find(p.b.path.id)->own->window();
  BOOST_REQUIRE(window.answer == kCanRead);
  BOOST_TEST(static_cast<bool>(p.b.pd->register_memory(memory, Access::remote_read)));
  for (const auto& [answer, error] : {std::pair(0U, EAGAIN), std::pair(std::uint32_t{EPERM}, EPERM), std::pair(77777U, 4095)}) {
    window.answer = answer;
    auto mr = p.b.pd->register_memory(memory, Access::remote_read);
    BOOST_REQUIRE(!mr);
    BOOST_TEST(mr.error().code == error);
  }
  BOOST_TEST(static_cast<bool>(p.b.pd->register_memory(memory, Access::local_write)));
}

// Each piece counts or does not, never half: what its owner is told when it withdraws is what the reader has.
BOOST_AUTO_TEST_CASE(a_region_may_be_withdrawn_at_any_moment) {
  Pair p(4, 64, NodeType::ib_ca, true);
  std::vector<std::byte> memory(256 * 1024), to(memory.size());
  auto local = std::move(*p.a.pd->register_memory(to, Access::local_write));
  unsigned some = 0;
  for (unsigned round = 0; round < 3000; ++round) {
    std::memset(memory.data(), 1, memory.size());
    auto mr = std::move(*p.b.pd->register_memory(memory, Access::remote_read));
    std::uint32_t withdrawn = 0;
    std::atomic<bool> begun{false};
    std::thread owner([&] {
      begun = true;
      for (unsigned i = 0; i < (round % 64) * 200; ++i) cpu_relax();
      withdrawn = p.b.qp->withdraw(mr->rkey).value_or(~0U);
      std::memset(memory.data(), 2, memory.size());
    });
    while (!begun) cpu_relax();
    std::uint32_t read = 0;
    for (;;) {
      const Sge sge = sge_of(to.data() + read, 32768, local->lkey);
      BOOST_REQUIRE(p.a.qp->post_send({.opcode = WrOpcode::rdma_read,
                                       .flags = kSignalled,
                                       .sge_count = 1,
                                       .sges = &sge,
                                       .remote_addr = mr->remote_base + read,
                                       .rkey = mr->rkey}) == Post::ok);
      const Wc wc = wait_wc(*p.a.cq);
      BOOST_REQUIRE(wc.status == WcStatus::success);
      read += wc.byte_len;
      if (wc.byte_len == 0 || read == memory.size()) break;
    }
    owner.join();
    BOOST_REQUIRE(withdrawn == read);
    for (std::uint32_t k = 0; k < read; k += 512) BOOST_REQUIRE((to[k] == std::byte{1}));
    some += read != 0 && read != memory.size() ? 1 : 0;
  }
  BOOST_TEST(some > 10u);
}
