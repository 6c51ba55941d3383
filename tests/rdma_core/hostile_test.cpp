// Hostile processes against LocalCm and the software device: another user's, and one who owns the other end of a connection and
// means harm. In each case the victim neither crashes nor hangs, writes outside of nothing, and others' lanes go on.
//
// Needs root, to be other users; without it the tests that need it say so and pass.
#include <fcntl.h>
#include <signal.h>
#include <stdio.h>
#include <sys/epoll.h>
#include <sys/eventfd.h>
#include <sys/mman.h>
#include <sys/un.h>
#include <sys/wait.h>

#include <boost/test/data/test_case.hpp>
#include <random>

#include "rdma_core/cm/local_wire.hpp"
#include "tests/rdma_core/local_pair.hpp"
#include "tests/rdma_core/shm_pair.hpp"

using namespace rdma;
using namespace rdma::cm;
using namespace rdma::cm::test;
using namespace rdma::shm;
namespace bdata = boost::unit_test::data;

namespace {

constexpr uid_t kStranger = 1234;

bool is_root() {
  if (geteuid() == 0) return true;
  BOOST_TEST_MESSAGE("skipped: needs root to be another user");
  return false;
}

sockaddr_un name_of(std::uint64_t cookie, socklen_t& length) {
  sockaddr_un name{};
  name.sun_family = AF_UNIX;
  const int n =
      snprintf(name.sun_path + 1, sizeof name.sun_path - 1, "sdpreload/1/%016llx", static_cast<unsigned long long>(cookie));
  length = static_cast<socklen_t>(offsetof(sockaddr_un, sun_path) + 1 + static_cast<std::size_t>(n));
  return name;
}

/// A raw rendezvous connection to whoever offers `cookie`; -1: refused.
int connect_to_offer(std::uint64_t cookie) {
  const int fd = socket(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0);
  const timeval patience{5, 0};
  setsockopt(fd, SOL_SOCKET, SO_RCVTIMEO, &patience, sizeof patience);
  socklen_t length;
  const sockaddr_un name = name_of(cookie, length);
  if (connect(fd, reinterpret_cast<const sockaddr*>(&name), length) == 0) return fd;
  close(fd);
  return -1;
}

bool send_with_fds(int fd, const void* bytes, std::size_t size, const std::vector<int>& fds = {}) {
  iovec iov{const_cast<void*>(bytes), size};
  alignas(cmsghdr) char control[CMSG_SPACE(8 * sizeof(int))] = {};
  msghdr msg{};
  msg.msg_iov = &iov;
  msg.msg_iovlen = 1;
  if (!fds.empty()) {
    msg.msg_control = control;
    msg.msg_controllen = CMSG_SPACE(fds.size() * sizeof(int));
    cmsghdr* c = CMSG_FIRSTHDR(&msg);
    c->cmsg_level = SOL_SOCKET;
    c->cmsg_type = SCM_RIGHTS;
    c->cmsg_len = CMSG_LEN(fds.size() * sizeof(int));
    std::memcpy(CMSG_DATA(c), fds.data(), fds.size() * sizeof(int));
  }
  return sendmsg(fd, &msg, MSG_NOSIGNAL) == static_cast<ssize_t>(size);
}

/// True: the victim hung up. (A frame in between is passed over.)
bool hung_up(int fd) {
  char sink[1024];
  for (;;) {
    const ssize_t n = recv(fd, sink, sizeof sink, 0);
    if (n == 0 || (n < 0 && errno == ECONNRESET)) return true;
    if (n < 0) return false;
  }
}

wire::Hello hello_of(std::uint64_t own, std::uint64_t peer, ProcessId process = {{1, 2}}) {
  wire::Hello hello{};
  hello.head = wire::make_head(wire::Type::hello, sizeof hello);
  hello.process = process;
  hello.own_cookie = own;
  hello.peer_cookie = peer;
  hello.layout_version = kLayoutVersion;
  hello.node_type = static_cast<std::uint32_t>(NodeType::ib_ca);
  return hello;
}

wire::Link link_of(wire::LinkKind kind, ProcessId nonce = {{7, 7}}) {
  wire::Link link{};
  link.head = wire::make_head(wire::Type::link, sizeof link);
  link.kind = static_cast<std::uint32_t>(kind);
  link.nonce = nonce;
  return link;
}

/// Runs `attack` in a child under `uid`, and the victim's CM meanwhile; the child's exit status.
template <class Attack>
int under_attack(Node& victim, uid_t uid, Attack attack) {
  const pid_t child = fork();
  BOOST_REQUIRE(child >= 0);
  if (child == 0) {
    alarm(60);
    if (uid != geteuid() && setresuid(uid, uid, uid) != 0) _exit(99);
    _exit(attack());
  }
  int status = -1;
  BOOST_REQUIRE(run({&victim}, [&] { return waitpid(child, &status, WNOHANG) == child; }));
  return WIFEXITED(status) ? WEXITSTATUS(status) : 1000 + WTERMSIG(status);
}

/// The victim offers; its own kind may still come and get a lane.
void offer_still_works(Node& victim, Tcp& tcp) {
  Node friendly;
  friendly.dial(anchor_of(tcp.server));
  BOOST_TEST(
      run({&victim, &friendly}, [&] { return friendly.find(EventKind::established, anchor_of(tcp.server).cookie) != nullptr; }));
  BOOST_TEST(friendly.send(friendly.seen.back().conn, "hello"));
  BOOST_TEST(victim.receive(victim.find(EventKind::request, anchor_of(tcp.client).cookie)->conn).value_or("nothing") == "hello");
  victim.cm->disconnect(victim.seen.back().conn);
}

int memfd(std::size_t bytes, unsigned seals, unsigned flags = MFD_ALLOW_SEALING) {
  const int fd = memfd_create("hostile", MFD_CLOEXEC | flags);
  if (fd < 0) return -1;
  (void)!ftruncate(fd, static_cast<off_t>(bytes));
  if (seals != 0) fcntl(fd, F_ADD_SEALS, seals);
  return fd;
}

int far_end() {
  int ends[2] = {-1, -1};
  (void)!socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, ends);
  return ends[1];
}

void write_header(int fd, std::size_t bytes, ProcessId owner, std::uint32_t magic = kSegmentMagic) {
  const SegmentHeader header{.magic = magic,
                             .version = kLayoutVersion,
                             .bytes = bytes,
                             .owner = owner,
                             .mr_capacity = kMrCapacity,
                             .mr_offset = kMrOffset,
                             .page_bytes = kPageBytes,
                             .first_page = kFirstPage};
  (void)!pwrite(fd, &header, sizeof header, 0);
}

constexpr unsigned kAllSeals = F_SEAL_SHRINK | F_SEAL_GROW | F_SEAL_SEAL;

}  // namespace

BOOST_AUTO_TEST_CASE(squatter__his_name_is_not_dialled) {
  if (!is_root()) return;
  Node victim;
  Tcp tcp;
  const std::uint64_t cookie = anchor_of(tcp.client).cookie;
  int up[2];
  BOOST_REQUIRE(pipe2(up, O_CLOEXEC) == 0);
  const pid_t squatter = fork();
  if (squatter == 0) {
    alarm(60);
    if (setresuid(kStranger, kStranger, kStranger) != 0) _exit(99);
    const int fd = socket(AF_UNIX, SOCK_SEQPACKET, 0);
    socklen_t length;
    const sockaddr_un name = name_of(cookie, length);
    if (bind(fd, reinterpret_cast<const sockaddr*>(&name), length) != 0 || listen(fd, 8) != 0) _exit(1);
    (void)!write(up[1], "x", 1);
    pause();
  }
  char c;
  BOOST_REQUIRE(read(up[0], &c, 1) == 1);
  victim.dial(anchor_of(tcp.server));
  BOOST_REQUIRE(run({&victim}, [&] { return !victim.seen.empty(); }));
  BOOST_TEST((victim.seen[0].kind == EventKind::unreachable && victim.seen[0].reason == Reason::wrong_owner));
  // Who cannot offer says so at once; TCP carries on.
  BOOST_TEST(!victim.cm->offer(anchor_of(tcp.client), 1000));
  BOOST_TEST(write(tcp.client, "tcp", 3) == 3);
  char buf[4];
  BOOST_TEST(read(tcp.server, buf, sizeof buf) == 3);
  kill(squatter, SIGKILL);
  waitpid(squatter, nullptr, 0);
  close(up[0]);
  close(up[1]);
}

BOOST_AUTO_TEST_CASE(stranger__claiming_anothers_connection_is_hung_up_on) {
  if (!is_root()) return;
  Node victim;
  Tcp tcp;
  const std::uint64_t own = anchor_of(tcp.client).cookie, peer = anchor_of(tcp.server).cookie;
  BOOST_REQUIRE(victim.cm->offer(anchor_of(tcp.client), 20'000));
  const int outcome = under_attack(victim, kStranger, [&] {
    for (int i = 0; i < 300; ++i) {  // more than there may be handshakes at once
      const int fd = connect_to_offer(own);
      if (fd < 0) return 1;
      const wire::Hello hello = hello_of(peer, own);
      (void)send_with_fds(fd, &hello, sizeof hello);
      if (!hung_up(fd)) return 2;
      close(fd);
    }
    return 0;
  });
  BOOST_TEST(outcome == 0);
  BOOST_TEST(victim.seen.empty());
  offer_still_works(victim, tcp);
}

BOOST_AUTO_TEST_CASE(owner__who_names_another_socket_is_hung_up_on) {
  Node victim;
  Tcp tcp, other;
  const std::uint64_t own = anchor_of(tcp.client).cookie;
  BOOST_REQUIRE(victim.cm->offer(anchor_of(tcp.client), 20'000));
  const int outcome = under_attack(victim, geteuid(), [&] {
    const int fd = connect_to_offer(own);
    const wire::Hello hello = hello_of(anchor_of(other.server).cookie, own);
    (void)send_with_fds(fd, &hello, sizeof hello);
    return hung_up(fd) ? 0 : 1;
  });
  BOOST_TEST(outcome == 0);
  offer_still_works(victim, tcp);
}

BOOST_DATA_TEST_CASE(owner__sending_garbage_is_hung_up_on, bdata::xrange(1u, 33u), seed) {
  Node victim;
  Tcp tcp;
  const std::uint64_t own = anchor_of(tcp.client).cookie, peer = anchor_of(tcp.server).cookie;
  BOOST_REQUIRE(victim.cm->offer(anchor_of(tcp.client), 20'000));
  BOOST_TEST(
      under_attack(victim, geteuid(), [&] {
        std::mt19937 random(seed);
        const int fd = connect_to_offer(own);
        // A right beginning, of a random length, then something wrong.
        if (random() % 2 != 0) {
          const wire::Hello hello = hello_of(peer, own);
          if (!send_with_fds(fd, &hello, sizeof hello)) return 1;
        }
        std::vector<char> bytes(seed % 4 == 0 ? 1 : seed % 4 == 1 ? sizeof(wire::Link) : seed % 4 == 2 ? 4096 : random() % 600 + 1);
        for (char& b : bytes) b = static_cast<char>(random());
        if (seed % 3 != 0 && bytes.size() >= sizeof(wire::Head)) {
          const wire::Head head = wire::make_head(static_cast<wire::Type>(random() % 12), bytes.size() - random() % 2);
          std::memcpy(bytes.data(), &head, sizeof head);
        }
        if (!send_with_fds(fd, bytes.data(), bytes.size())) return 2;
        return hung_up(fd) ? 0 : 3;
      }) == 0);
  BOOST_TEST(victim.links() == 0u);
  offer_still_works(victim, tcp);
}

BOOST_AUTO_TEST_CASE(owner__who_falls_silent_is_hung_up_on_in_every_state) {
  Node victim;
  Tcp tcp;
  const std::uint64_t own = anchor_of(tcp.client).cookie, peer = anchor_of(tcp.server).cookie;
  BOOST_REQUIRE(victim.cm->offer(anchor_of(tcp.client), 20'000));
  const int outcome = under_attack(victim, geteuid(), [&] {
    int fds[2];
    for (int& fd : fds) fd = connect_to_offer(own);
    const wire::Hello hello = hello_of(peer, own);
    (void)send_with_fds(fds[1], &hello, sizeof hello);
    return hung_up(fds[0]) && hung_up(fds[1]) ? 0 : 1;
  });
  BOOST_TEST(outcome == 0);
  offer_still_works(victim, tcp);
}

namespace {
enum class Hand {
  nothing,
  pipe,
  regular_file,
  tmpfs_file,
  unsealed,
  without_seals,
  too_small,
  odd_size,
  empty_header,
  wrong_owner,
  wrong_magic,
  write_sealed,
  hugetlb,
  bell_is_a_pipe,
  bell_is_a_file,
  bell_is_an_epoll,
  bell_is_an_eventfd,
  bell_is_a_tcp_socket,
  eight_descriptors
};
const Hand kHands[] = {Hand::nothing,
                       Hand::pipe,
                       Hand::regular_file,
                       Hand::tmpfs_file,
                       Hand::unsealed,
                       Hand::without_seals,
                       Hand::too_small,
                       Hand::odd_size,
                       Hand::empty_header,
                       Hand::wrong_owner,
                       Hand::wrong_magic,
                       Hand::write_sealed,
                       Hand::hugetlb,
                       Hand::bell_is_a_pipe,
                       Hand::bell_is_a_file,
                       Hand::bell_is_an_epoll,
                       Hand::bell_is_an_eventfd,
                       Hand::bell_is_a_tcp_socket,
                       Hand::eight_descriptors};

constexpr std::size_t kBytes = 4u << 20;

std::vector<int> descriptors(Hand hand, ProcessId me) {
  int ends[2];
  (void)!pipe2(ends, O_CLOEXEC);
  const auto good = [&](std::size_t bytes = kBytes, std::uint32_t magic = kSegmentMagic, ProcessId owner = {}) {
    const int fd = memfd(bytes, 0);
    write_header(fd, bytes, owner == ProcessId{} ? me : owner, magic);
    fcntl(fd, F_ADD_SEALS, kAllSeals);
    return fd;
  };
  const int bell = far_end();
  switch (hand) {
    case Hand::nothing:
      return {};
    case Hand::pipe:
      return {ends[0], bell};
    case Hand::regular_file:
      return {fileno(tmpfile()), bell};
    case Hand::tmpfs_file:
      return {open("/dev/shm", O_TMPFILE | O_RDWR | O_CLOEXEC, 0600), bell};
    case Hand::unsealed:
      return {memfd(kBytes, 0, 0), bell};
    case Hand::without_seals: {
      const int fd = memfd(kBytes, 0);
      write_header(fd, kBytes, me);
      return {fd, bell};
    }
    case Hand::too_small:
      return {good(4096), bell};
    case Hand::odd_size:
      return {good(kBytes + 1), bell};
    case Hand::empty_header:
      return {memfd(kBytes, kAllSeals), bell};
    case Hand::wrong_owner:
      return {good(kBytes, kSegmentMagic, {{9, 9}}), bell};
    case Hand::wrong_magic:
      return {good(kBytes, 1), bell};
    case Hand::write_sealed: {
      const int fd = memfd(kBytes, 0);
      write_header(fd, kBytes, me);
      fcntl(fd, F_ADD_SEALS, kAllSeals | F_SEAL_WRITE);
      return {fd, bell};
    }
    case Hand::hugetlb:
      return {memfd(kBytes, kAllSeals, MFD_ALLOW_SEALING | MFD_HUGETLB), bell};
    case Hand::bell_is_a_pipe:
      return {good(), ends[1]};
    case Hand::bell_is_a_file:
      return {good(), fileno(tmpfile())};
    case Hand::bell_is_an_epoll:
      return {good(), epoll_create1(EPOLL_CLOEXEC)};
    case Hand::bell_is_an_eventfd:
      return {good(), eventfd(0, EFD_CLOEXEC)};
    case Hand::bell_is_a_tcp_socket:
      return {good(), socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0)};
    case Hand::eight_descriptors:
      return {ends[0], ends[0], ends[0], ends[0], ends[0], ends[0], ends[0], ends[0]};
  }
  return {};
}
int open_descriptors() {
  int n = 0;
  for (int fd = 0; fd < 4096; ++fd) n += fcntl(fd, F_GETFD) >= 0;
  return n;
}
}  // namespace
BOOST_TEST_DONT_PRINT_LOG_VALUE(Hand)

BOOST_DATA_TEST_CASE(owner__handing_over_what_is_no_segment_or_bell_is_hung_up_on, bdata::make(kHands), hand) {
  Node victim;
  Tcp tcp;
  const std::uint64_t own = anchor_of(tcp.client).cookie, peer = anchor_of(tcp.server).cookie;
  BOOST_REQUIRE(victim.cm->offer(anchor_of(tcp.client), 20'000));
  const int before = open_descriptors();
  const int outcome = under_attack(victim, geteuid(), [&] {
    const ProcessId me{{1, 2}};
    const int fd = connect_to_offer(own);
    const wire::Hello hello = hello_of(peer, own, me);
    const wire::Link link = link_of(wire::LinkKind::fresh);
    std::vector<int> fds = descriptors(hand, me);
    if (!fds.empty() && fds[0] < 0) return 0;  // this kernel has no such thing
    if (!send_with_fds(fd, &hello, sizeof hello) || !send_with_fds(fd, &link, sizeof link, fds)) return 1;
    wire::Hello theirs;
    if (recv(fd, &theirs, sizeof theirs, 0) != sizeof theirs) return 2;
    const ssize_t n = recv(fd, &theirs, sizeof theirs, 0);  // at once: it is not answered by a segment of the victim's
    return n == 0 || (n < 0 && errno == ECONNRESET) ? 0 : 3;
  });
  BOOST_TEST(outcome == 0);
  BOOST_TEST(victim.links() == 0u);
  BOOST_TEST(open_descriptors() == before);
  offer_still_works(victim, tcp);
}

BOOST_AUTO_TEST_CASE(owner__claiming_to_be_the_victim_itself_gets_no_way_into_its_own_memory) {
  Node victim;
  BOOST_REQUIRE(victim.device->self_path().ok());
  Tcp tcp;
  const std::uint64_t own = anchor_of(tcp.client).cookie, peer = anchor_of(tcp.server).cookie;
  BOOST_REQUIRE(victim.cm->offer(anchor_of(tcp.client), 20'000));
  const ProcessId victims = victim.device->process_id();
  const int outcome = under_attack(victim, geteuid(), [&] {
    const int fd = connect_to_offer(own);
    const wire::Hello hello = hello_of(peer, own, victims);
    const wire::Link link = link_of(wire::LinkKind::reuse);
    if (!send_with_fds(fd, &hello, sizeof hello) || !send_with_fds(fd, &link, sizeof link)) return 1;
    wire::Hello theirs;
    wire::Link answer;
    if (recv(fd, &theirs, sizeof theirs, 0) != sizeof theirs) return 2;
    const ssize_t n = recv(fd, &answer, sizeof answer, 0);
    if (n == 0) return 0;
    return n == sizeof answer && answer.kind == static_cast<std::uint32_t>(wire::LinkKind::unknown) ? 0 : 3;
  });
  BOOST_TEST(outcome == 0);
  offer_still_works(victim, tcp);
}

BOOST_DATA_TEST_CASE(owner__asking_for_a_qp_that_is_none_gets_no_connection,
                     bdata::make({0u, 1u, 11u, 12u, 500u, 1023u, 1024u, 0xffffffu, 0x80000000u, 0xffffffffu}), qpn) {
  Node victim;
  Tcp tcp;
  const std::uint64_t own = anchor_of(tcp.client).cookie, peer = anchor_of(tcp.server).cookie;
  BOOST_REQUIRE(victim.cm->offer(anchor_of(tcp.client), 20'000));
  victim.answers = false;
  Result<Unit> accepted = Unit{};
  bool asked = false;
  victim.cm->on_event([&](const Event& event) {
    if (event.kind != EventKind::request) return;
    asked = true;
    Qp* qp = victim.make_lane(*event.device, event.path, event.conn);
    accepted = victim.cm->accept(event.conn, *qp, {});
    victim.cm->disconnect(event.conn);
  });
  const int outcome = under_attack(victim, geteuid(), [&] {
    const ProcessId me{{1, 2}};
    const int fd = connect_to_offer(own);
    const wire::Hello hello = hello_of(peer, own, me);
    const wire::Link link = link_of(wire::LinkKind::fresh);
    const int segment = memfd(4u << 20, 0);
    write_header(segment, 4u << 20, me);
    fcntl(segment, F_ADD_SEALS, kAllSeals);
    wire::Request request{};
    request.head = wire::make_head(wire::Type::request, sizeof request);
    request.qpn = qpn;
    request.private_bytes = 10;
    return send_with_fds(fd, &hello, sizeof hello) && send_with_fds(fd, &link, sizeof link, {segment, far_end()}) &&
                   send_with_fds(fd, &request, sizeof request) && hung_up(fd)
               ? 0
               : 1;
  });
  BOOST_TEST(outcome == 0);
  BOOST_TEST(asked);
  BOOST_TEST(!accepted.ok());
}

BOOST_AUTO_TEST_CASE(another_users_honest_process_gets_a_lane_and_rings_without_a_service_thread_of_the_sleepers) {
  if (!is_root()) return;
  sockaddr_storage address;
  const int listener = tcp_listener(address);
  const pid_t child = fork();
  if (child == 0) {
    alarm(60);
    if (setresuid(kStranger, kStranger, kStranger) != 0) _exit(99);
    Node peer;
    const int fd = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
    if (connect(fd, reinterpret_cast<sockaddr*>(&address), sizeof address) != 0) _exit(1);
    if (!peer.cm->offer(anchor_of(fd), 5000)) _exit(2);
    if (!run({&peer}, [&] { return peer.find(EventKind::established, anchor_of(fd).cookie) != nullptr; })) _exit(3);
    const ConnId conn = peer.seen.back().conn;
    char go;
    if (read(fd, &go, 1) != 1) _exit(4);
    if (!peer.send(conn, "ring")) _exit(5);
    (void)!read(fd, &go, 1);
    _exit(0);
  }
  Node node;
  const int fd = accept4(listener, nullptr, nullptr, SOCK_CLOEXEC);
  const std::uint64_t cookie = anchor_of(fd).cookie;
  node.dial(anchor_of(fd));
  BOOST_REQUIRE(run({&node}, [&] { return node.find(EventKind::established, cookie) != nullptr; }));
  const int bell = epoll_create1(EPOLL_CLOEXEC);
  epoll_event edge{EPOLLIN | EPOLLET, {}};
  BOOST_REQUIRE(epoll_ctl(bell, EPOLL_CTL_ADD, node.channel->fd(), &edge) == 0);
  (void)epoll_wait(bell, &edge, 1, 0);
  node.cq->arm(kWakeChannel);
  node.device->arm_fence();
  BOOST_TEST(!node.cq->maybe_ready());
  BOOST_REQUIRE(write(fd, "g", 1) == 1);
  BOOST_TEST(epoll_wait(bell, &edge, 1, 20'000) == 1);
  close(bell);
  BOOST_TEST(node.receive(node.find(EventKind::established, cookie)->conn).value_or("nothing") == "ring");
  close(fd);
  int status = 0;
  waitpid(child, &status, 0);
  BOOST_TEST(status == 0);
  close(listener);
}

// ---- memory: the peer writes what it likes into what we read ----

namespace {

using shm::test::End;
using shm::test::Pair;

std::byte* segment_of(End& end) { return end.device->links().all()[0]->own->base(); }
std::size_t segment_bytes(End& end) { return end.device->links().all()[0]->own->bytes(); }
ShmQpPage& page_of(End& end) {
  return *at<ShmQpPage>(segment_of(end) + static_cast<std::size_t>(static_cast<std::uint32_t>(end.qp->qpn())) * kPageBytes);
}

Post send_some(End& end, std::size_t bytes = 64) {
  static const std::vector<std::byte> data(1u << 20);
  const Sge sge = shm::test::sge_of(data.data(), bytes);
  return end.qp->post_send(shm::test::send_wr(&sge, 1, kInline));
}

}  // namespace

BOOST_DATA_TEST_CASE(spoilt_receive_entries_cost_the_senders_qp_only, bdata::xrange(1u, 201u), seed) {
  Pair p(8, 256);
  for (unsigned i = 0; i < 8; ++i) p.b.post(i);
  std::mt19937_64 random(seed);
  const std::uint64_t bytes = segment_bytes(p.b);
  const std::uint64_t wild[] = {
      0,          1,          7,     bytes - 8, bytes,      bytes + 8, bytes - 64,       bytes * 2,
      1ull << 40, 1ull << 63, ~0ull, ~0ull - 7, ~0ull - 63, random(),  random() % bytes, random() & ~7ull};
  const std::uint32_t lengths[] = {0, 1, 63, 64, 256, 1u << 20, 0x7fffffff, 0xffffffff, static_cast<std::uint32_t>(random())};
  for (unsigned i = 0; i < 8; ++i) {
    page_of(p.b).rq[i].offset.store(wild[random() % std::size(wild)]);
    page_of(p.b).rq[i].bytes.store(lengths[random() % std::size(lengths)]);
  }
  for (unsigned i = 0; i < 8; ++i)
    if (send_some(p.a, random() % 300) != Post::ok) break;
  // Whatever it did, it did inside the mapping: we are still here, and its own memory is whole.
  Wc wc;
  if (p.a.cq->poll({&wc, 1}) == 1) BOOST_TEST((wc.status != WcStatus::success));
}

BOOST_DATA_TEST_CASE(spoilt_posted_counters_cost_the_senders_qp, bdata::make({9ull, 1000ull, 1ull << 32, 1ull << 63, ~0ull}),
                     posted) {
  Pair p(8, 256);
  for (unsigned i = 0; i < 8; ++i) p.b.post(i);  // every entry is a good one
  for (unsigned i = 0; i < 8; ++i) BOOST_TEST((send_some(p.a) == Post::ok));
  page_of(p.b).posted.store(posted + 8);
  BOOST_TEST((send_some(p.a) == Post::ok));
  BOOST_TEST((shm::test::wait_wc(*p.a.cq).status == WcStatus::remote_invalid_request));
  BOOST_TEST((p.a.qp->state() == QpState::error));
}

BOOST_AUTO_TEST_CASE(a_posted_counter_that_goes_back_costs_the_senders_qp) {
  Pair p(8, 256);
  for (unsigned i = 0; i < 8; ++i) p.b.post(i);
  for (unsigned i = 0; i < 8; ++i) BOOST_TEST((send_some(p.a) == Post::ok));
  page_of(p.b).posted.store(3);
  BOOST_TEST((send_some(p.a) == Post::ok));
  BOOST_TEST((shm::test::wait_wc(*p.a.cq).status == WcStatus::remote_invalid_request));
}

BOOST_DATA_TEST_CASE(spoilt_memory_regions_are_refused, bdata::xrange(1u, 101u), seed) {
  Pair p(8, 256);
  auto target = std::move(*p.b.pd->map_extent(8192));
  std::mt19937_64 random(seed);
  MrEntry& entry = at<MrEntry>(segment_of(p.b) + kMrOffset)[static_cast<std::uint32_t>(target->rkey) % kMrCapacity];
  const std::uint64_t bytes = segment_bytes(p.b);
  const std::uint64_t wild[] = {bytes - 4096, bytes - 8, bytes,        bytes + 4096, 1ull << 40,
                                1ull << 63,   ~0ull,     ~0ull - 4095, random()};
  entry.offset.store(wild[random() % std::size(wild)]);
  if (random() % 2) entry.bytes.store(wild[random() % std::size(wild)]);
  if (random() % 2) entry.base.store(wild[random() % std::size(wild)]);
  const std::uint64_t remote = random() % 2 ? target->remote_base : entry.base.load();
  std::vector<std::byte> data(8192);
  const Sge sge = shm::test::sge_of(data.data(), data.size());
  BOOST_TEST((p.a.qp->post_send({.opcode = WrOpcode::rdma_write,
                                 .flags = kInline,
                                 .sge_count = 1,
                                 .sges = &sge,
                                 .remote_addr = remote,
                                 .rkey = target->rkey}) == Post::ok));
  BOOST_TEST((shm::test::wait_wc(*p.a.cq).status == WcStatus::remote_access_error));
}

BOOST_DATA_TEST_CASE(forged_flags_never_give_more_than_was_posted, bdata::make({0u, 64u, 65u, 0x7fffffffu, 0xffffffffu}), length) {
  Pair p(8, 64);
  p.b.post(0);
  p.b.post(1);
  const std::uint64_t flag = flag_word(1, length);
  std::memcpy(p.b.buffer(0) - 8, &flag, sizeof flag);
  const Wc wc = shm::test::wait_wc(*p.b.cq);
  BOOST_TEST((wc.status == (length <= 64 ? WcStatus::success : WcStatus::local_length_error)));
  BOOST_TEST(wc.byte_len <= 64u);
}

BOOST_AUTO_TEST_CASE(holes_read_as_zeros_and_cost_no_more_than_the_qp) {
  Pair p(8, 256);
  for (unsigned i = 0; i < 4; ++i) {
    p.a.post(i);
    p.b.post(i);
  }
  BOOST_TEST((send_some(p.a) == Post::ok));
  // b's whole segment, header, keys, QP page and buffers: b does it to its own, and a could do it to b's.
  BOOST_REQUIRE(madvise(segment_of(p.b), segment_bytes(p.b), MADV_REMOVE) == 0);
  for (int i = 0; i < 8; ++i)
    if (send_some(p.a) != Post::ok) break;
  Wc wc;
  BOOST_TEST(p.a.cq->poll({&wc, 1}) == 1u);
  BOOST_TEST((wc.status != WcStatus::success));
  (void)p.b.cq->poll({&wc, 1});
  (void)send_some(p.b);
  auto extent = p.b.pd->map_extent(4096);
  BOOST_TEST(extent.ok());
}

BOOST_AUTO_TEST_CASE(a_peer_that_scribbles_all_the_time_harms_only_its_own_lane) {
  Pair hostile(64, 256), quiet(64, 256);
  for (unsigned i = 0; i < 64; ++i) {
    hostile.a.post(i);
    hostile.b.post(i);
    quiet.b.post(i);
  }
  const pid_t child = fork();
  BOOST_REQUIRE(child >= 0);
  if (child == 0) {
    alarm(60);
    std::mt19937_64 random(1);
    std::byte* const theirs = segment_of(hostile.a);
    std::byte* const own = segment_of(hostile.b);
    for (;;) {
      const std::size_t spot = (random() % 0x40000) & ~std::size_t{7};
      const std::uint64_t value = random() % 3 == 0 ? 0 : random() % 3 == 0 ? random() % 0x100000 : random();
      std::memcpy((random() % 2 ? theirs : own) + spot, &value, sizeof value);
    }
  }
  const SteadyClock clock;
  const Nanos end = clock.now() + 500'000'000;
  Wc wcs[8];
  while (clock.now() < end) {
    (void)send_some(hostile.a, 100);
    const unsigned n = hostile.a.cq->poll(wcs);
    for (unsigned i = 0; i < n; ++i)
      if (wcs[i].opcode == WcOpcode::recv) BOOST_REQUIRE(wcs[i].byte_len <= 256u);
    hostile.a.cq->arm(kWakeChannel);
    if (hostile.a.qp->state() == QpState::error) {
      // The lane is made anew, as often as it takes.
      (void)hostile.a.qp->modify({.state = QpState::reset});
      page_of(hostile.b).magic = kQpMagic;
      page_of(hostile.b).depth = 64;
      page_of(hostile.b).closed.store(0);
      IbQpAttributes ib{.pkey_index = 0, .port = 1};
      (void)hostile.a.qp->modify({.state = QpState::init, .access = Access::remote_write, .transport = ib});
      ib = {.dgid = Gid{},
            .dest_qpn = static_cast<std::uint32_t>(hostile.b.qp->qpn()),
            .rq_psn = 0,
            .path_mtu = 5,
            .min_rnr_timer = 0};
      (void)hostile.a.qp->modify({.state = QpState::rtr, .max_read_incoming = 1, .transport = ib});
      ib = {.sq_psn = 0, .ack_timeout = 14, .retry_count = 6, .rnr_retry = 0};
      (void)hostile.a.qp->modify({.state = QpState::rts, .max_read_outstanding = 1, .transport = ib});
    }
    BOOST_REQUIRE((send_some(quiet.a, 100) == Post::ok));
    const Wc wc = shm::test::wait_wc(*quiet.b.cq);
    BOOST_REQUIRE(wc.byte_len == 100u);
    quiet.b.post(static_cast<unsigned>(wc.wr_id));
  }
  kill(child, SIGKILL);
  waitpid(child, nullptr, 0);
}
