#include "tests/support/sim_fabric.hpp"

#include <errno.h>
#include <fcntl.h>
#include <linux/futex.h>
#include <sys/eventfd.h>
#include <sys/mman.h>

#include <algorithm>
#include <array>
#include <bit>
#include <climits>
#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <map>
#include <queue>
#include <unordered_map>
#include <vector>

#include "rdma_core/base/sys.hpp"
#include "tests/support/no_alloc.hpp"

namespace rdma::sim {

namespace {

constexpr std::byte kPoison{0xA5};
constexpr std::uint32_t kPoisonedBytes = 192;  ///< at each end of a posted buffer; enough to catch a writer, cheap for large ones
/// RnicQpAttributes::peer of this fabric: the peer's Qpn, and this bit on the passive side.
constexpr std::uint32_t kPassive = 0x8000'0000u;
constexpr std::uint32_t kFirstQpn = 0x11;
constexpr std::uint32_t kRemoteKey = 0x4000'0000u;  ///< an rkey is the lkey with this bit: mixing them up fails

class SimDevice;
class SimCq;

struct MrCore {
  std::byte* addr;
  std::size_t length;
  Access access;
  std::uint64_t remote_base;
  unsigned pd;
  bool extent;
};

/// One posted send request, shared by the queue it was posted to and the wire.
struct Request {
  std::uint64_t wr_id = 0;
  WrOpcode opcode = WrOpcode::send;
  std::uint8_t flags = 0;
  std::vector<Sge> sges;
  std::uint32_t length = 0;
  std::uint64_t remote_addr = 0;
  Rkey rkey{};
  std::uint32_t from = 0;                       ///< Qpn
  std::uint64_t fingerprint = 0;                ///< of the bytes at the time of the post
  std::optional<std::vector<std::byte>> bytes;  ///< taken; else they still lie with the sender
  unsigned rnr_tries = 0;
  bool launched = false;
  bool executed = false;  ///< at the responder
  bool lost = false;      ///< never arrives
  bool done = false;
  bool orphaned = false;  ///< the sender does not wait for it any more
  WcStatus status = WcStatus::success;
};
using RequestPtr = std::shared_ptr<Request>;

struct ChannelCore {
  int fd = -1;
};

struct Cqe {
  Wc wc;
  bool own = false;  ///< of the send queue
  bool signalled = false;
  std::uint32_t frees = 0;  ///< slots of the send queue that polling gives back
};

struct CqCore {
  SimCq* cq = nullptr;
  Side side = Side::a;
  std::uint32_t depth = 0;
  std::uint32_t promised = 0;  ///< of them, to Qps
  ChannelCore* channel = nullptr;
  std::deque<Cqe> entries;
  std::uint8_t armed = 0;
  std::uint8_t armed_unfenced = 0;
  std::atomic<std::uint32_t> word{0};
};

struct QpCore {
  std::uint32_t qpn = 0;
  Side side = Side::a;
  unsigned pd = 0;
  QpState state = QpState::reset;
  CqCore* send_cq = nullptr;
  CqCore* recv_cq = nullptr;
  std::uint32_t send_depth = 0, recv_depth = 0, max_inline = 0;
  std::uint32_t dest = 0;
  bool passive = false;
  bool received_one = false;
  Access access = Access::local_read;
  std::uint32_t max_reads = 1;

  std::deque<RequestPtr> sends;  ///< oldest first, not completed yet
  std::deque<RecvWr> recvs;
  std::deque<RequestPtr> inbound;  ///< arrived, oldest first, not executed yet
  std::uint32_t slots_used = 0;    ///< of the send queue
  std::uint32_t slots_silent = 0;  ///< of unsignalled requests done: the next completion gives them back
  std::uint32_t signalled_unpolled = 0;
  std::uint32_t reads_outstanding = 0;
  Nanos last_arrival = 0, last_ack = 0;
  bool drain_scheduled = false;

  std::deque<std::vector<std::byte>> sent;  ///< remembers_sent_data
  std::uint64_t sent_count = 0;
};

std::uint64_t fingerprint_of(std::span<const Sge> sges) {
  std::uint64_t h = 0xcbf29ce484222325ull;
  for (const Sge& sge : sges)
    for (std::uint32_t i = 0; i < sge.length; ++i) h = (h ^ std::to_integer<std::uint64_t>(sge.addr[i])) * 0x100000001b3ull;
  return h;
}

}  // namespace

namespace detail {

struct Event {
  Nanos time;
  std::uint64_t number;
  std::function<void()> action;
};
struct Later {
  bool operator()(const Event& a, const Event& b) const noexcept {
    return a.time != b.time ? a.time > b.time : a.number > b.number;
  }
};

struct SideState {
  bool alive = true;
  bool removed = false;
  SimCounters counters;
  std::uint64_t returned_sends = 0, returned_recvs = 0;  ///< without a completion: destroyed Qp, reset, death
  std::map<std::uint32_t, MrCore> mrs;                   ///< by key
  std::map<const std::byte*, const std::byte*> posted;   ///< receive buffers with prefix: begin, end
  std::vector<CqCore*> cqs;
  std::unique_ptr<Device> device;
  std::function<void(AsyncEvent)> async;
  std::function<void(Cq&, std::uint8_t)> on_wake;
};

struct State {
  explicit State(const SimOptions& o) : options(o), random(o.seed) {}

  SimOptions options;
  VirtualClock clock;
  std::mt19937_64 random;
  std::priority_queue<Event, std::vector<Event>, Later> events;
  std::uint64_t next_number = 0, steps = 0;
  std::multimap<std::uint64_t, std::function<void()>> step_hooks;
  std::array<SideState, 2> sides;
  std::map<std::uint32_t, std::unique_ptr<QpCore>> qps;  ///< ordered: chance must meet them in the same order each time
  std::uint32_t next_qpn = kFirstQpn;
  std::uint32_t next_key = 0x1000;
  unsigned next_pd = 1;
  std::vector<std::function<void(Side)>> death_handlers;
  std::vector<std::string> violations;

  SideState& at(Side s) noexcept { return sides[static_cast<std::size_t>(s)]; }
  bool usable(Side s) noexcept { return at(s).alive && !at(s).removed; }
  bool rnr_retry() const noexcept { return options.rnr_retry.value_or(options.flavour != NodeType::rnic); }
  bool rnic() const noexcept { return options.flavour == NodeType::rnic; }

  __attribute__((format(printf, 2, 3))) void violation(const char* format, ...) {
    if (violations.size() >= 20) return;
    char line[256];
    va_list args;
    va_start(args, format);
    std::vsnprintf(line, sizeof line, format, args);
    va_end(args);
    violations.emplace_back(line);
  }
  std::uint64_t pick(std::uint64_t low, std::uint64_t high) {
    // Not std::uniform_int_distribution: its results differ between libraries, and a seed must mean the same everywhere.
    return low + random() % (high - low + 1);
  }
  bool chance(unsigned percent) { return percent != 0 && random() % 100 < percent; }
  Nanos delay() {
    return static_cast<Nanos>(pick(static_cast<std::uint64_t>(options.delay_min),
                                   static_cast<std::uint64_t>(std::max(options.delay_min, options.delay_max))));
  }
  void at_time(Nanos time, std::function<void()> action) { events.push({time, next_number++, std::move(action)}); }
  void after(Nanos delay, std::function<void()> action) { at_time(clock.now() + delay, std::move(action)); }
  QpCore* find(std::uint32_t qpn) noexcept {
    auto it = qps.find(qpn);
    return it == qps.end() ? nullptr : it->second.get();
  }

  // --- memory
  const MrCore* local_region(const QpCore& qp, Lkey key, const std::byte* addr, std::size_t length, Access want) {
    auto it = at(qp.side).mrs.find(static_cast<std::uint32_t>(key));
    if (it == at(qp.side).mrs.end()) return nullptr;
    const MrCore& mr = it->second;
    const auto begin = reinterpret_cast<std::uintptr_t>(addr);
    const auto mr_begin = reinterpret_cast<std::uintptr_t>(mr.addr);
    if (mr.pd != qp.pd || !allows(mr.access, want) || begin < mr_begin || begin - mr_begin > mr.length ||
        length > mr.length - (begin - mr_begin))
      return nullptr;
    return &mr;
  }
  std::byte* remote_target(const QpCore& responder, const Request& r, Access want) {
    auto it = at(responder.side).mrs.find(static_cast<std::uint32_t>(r.rkey) ^ kRemoteKey);
    if (it == at(responder.side).mrs.end()) return nullptr;
    const MrCore& mr = it->second;
    if (mr.pd != responder.pd || !allows(mr.access, want) || !allows(responder.access, want)) return nullptr;
    if (options.recv_needs_extent && !mr.extent) return nullptr;
    if (r.remote_addr < mr.remote_base || r.remote_addr - mr.remote_base > mr.length ||
        r.length > mr.length - (r.remote_addr - mr.remote_base))
      return nullptr;
    return mr.addr + (r.remote_addr - mr.remote_base);
  }
  bool sges_allowed(const QpCore& qp, const Request& r) {
    if ((r.flags & kInline) != 0) return true;
    Access want = Access::local_read;
    if (r.opcode == WrOpcode::rdma_read) want = rnic() ? Access::local_write | Access::remote_write : Access::local_write;
    return std::all_of(r.sges.begin(), r.sges.end(),
                       [&](const Sge& s) { return s.length == 0 || local_region(qp, s.lkey, s.addr, s.length, want) != nullptr; });
  }
  /// The bytes leave the sender's memory now, at the latest.
  void take_bytes(Request& r) {
    if (r.bytes || r.opcode == WrOpcode::rdma_read) return;
    if (fingerprint_of(r.sges) != r.fingerprint)
      violation("qp %#x: the bytes of wr_id %#llx changed while it was posted", r.from, static_cast<unsigned long long>(r.wr_id));
    std::vector<std::byte> bytes;
    bytes.reserve(r.length);
    for (const Sge& s : r.sges) bytes.insert(bytes.end(), s.addr, s.addr + s.length);
    r.bytes = std::move(bytes);
  }

  // --- completions
  void announce(CqCore& cq);
  void push(CqCore& cq, const Cqe& e, bool wakes) {
    if (cq.entries.size() >= cq.depth) violation("a Cq of depth %u is overrun", cq.depth);
    cq.entries.push_back(e);
    if (wakes) announce(cq);
  }
  void complete_send(QpCore& qp, const Request& r, WcStatus status) {
    ++at(qp.side).counters.completed_sends;
    const bool signalled = (r.flags & kSignalled) != 0;
    if (status == WcStatus::success && !signalled) {
      ++qp.slots_silent;
      return;
    }
    Cqe e;
    e.wc.wr_id = r.wr_id;
    e.wc.status = status;
    e.wc.opcode = r.opcode == WrOpcode::send         ? WcOpcode::send
                  : r.opcode == WrOpcode::rdma_write ? WcOpcode::rdma_write
                                                     : WcOpcode::rdma_read;
    e.wc.byte_len = r.opcode == WrOpcode::rdma_read && status == WcStatus::success ? r.length : 0;
    e.wc.qpn = Qpn{qp.qpn};
    e.own = true;
    e.signalled = signalled;
    e.frees = qp.slots_silent + 1;
    qp.slots_silent = 0;
    push(*qp.send_cq, e, true);
  }
  void complete_recv(QpCore& qp, WcStatus status, std::uint32_t bytes, bool solicited) {
    const RecvWr wr = qp.recvs.front();
    qp.recvs.pop_front();
    unpost(qp, wr);
    ++at(qp.side).counters.completed_recvs;
    Cqe e;
    e.wc.wr_id = wr.wr_id;
    e.wc.status = status;
    e.wc.opcode = WcOpcode::recv;
    e.wc.byte_len = bytes;
    e.wc.qpn = Qpn{qp.qpn};
    push(*qp.recv_cq, e, status != WcStatus::success || solicited || chance(options.unsolicited_wake_percent));
  }
  void unpost(QpCore& qp, const RecvWr& wr) { at(qp.side).posted.erase(wr.addr - options.recv_prefix_bytes); }

  // --- the sender's side
  void pump(QpCore& qp);
  void retire(QpCore& qp);
  void acknowledge(const RequestPtr& r, WcStatus status, Nanos extra = 0, Nanos not_before = 0);
  void on_ack(const RequestPtr& r, WcStatus status);
  void cut_wire(QpCore& qp);
  void enter_error(QpCore& qp);
  void ignore_inbound(QpCore& qp);
  void drop_all(QpCore& qp);
  void tell_peer_of_end(const QpCore& qp);

  // --- the responder's side
  void arrive(const RequestPtr& r, std::uint32_t dest);
  void drain(QpCore& qp);
  bool execute(QpCore& qp, const RequestPtr& r);
  bool execute_send(QpCore& qp, const RequestPtr& r);
  void execute_write(QpCore& qp, const RequestPtr& r);
  void execute_read(QpCore& qp, const RequestPtr& r);
  void refuse(QpCore& qp, const RequestPtr& r, WcStatus status);
  void schedule_drain(QpCore& qp, Nanos delay);
  void poison(const RecvWr& wr);
  bool still_poisoned(const RecvWr& wr) const;
};

}  // namespace detail

namespace {

using detail::State;

class SimChannel final : public CompletionChannel {
 public:
  explicit SimChannel(int fd) { core_.fd = fd; }
  ~SimChannel() override { sys::call(SYS_close, core_.fd); }
  int fd() const noexcept override { return core_.fd; }
  void ring() noexcept override {
    const std::uint64_t one = 1;
    sys::call(SYS_write, core_.fd, sys::arg(&one), sizeof one);
  }
  ChannelCore& core() noexcept { return core_; }

 private:
  ChannelCore core_;
};

class SimCq final : public Cq {
 public:
  SimCq(State& state, Side side, std::uint32_t depth, CompletionChannel* channel) : state_(state) {
    core_.cq = this;
    core_.side = side;
    core_.depth = depth;
    core_.channel = channel == nullptr ? nullptr : &static_cast<SimChannel*>(channel)->core();
    state_.at(side).cqs.push_back(&core_);
  }
  ~SimCq() override {
    for (auto& [qpn, qp] : state_.qps)
      if (qp->send_cq == &core_ || qp->recv_cq == &core_) state_.violation("a Cq was destroyed before qp %#x", qpn);
    std::erase(state_.at(core_.side).cqs, &core_);
  }
  unsigned poll(std::span<Wc> out) noexcept override {
    if (!state_.at(core_.side).alive) return 0;
    unsigned n = 0;
    for (; n < out.size() && !core_.entries.empty(); ++n) {
      const Cqe& e = core_.entries.front();
      out[n] = e.wc;
      if (e.own) {
        if (QpCore* qp = state_.find(static_cast<std::uint32_t>(e.wc.qpn))) {
          qp->slots_used -= e.frees;
          qp->signalled_unpolled -= e.signalled;
        }
      }
      core_.entries.pop_front();
    }
    return n;
  }
  bool maybe_ready() const noexcept override { return state_.at(core_.side).alive && !core_.entries.empty(); }
  void arm(std::uint8_t wake) noexcept override { core_.armed_unfenced |= static_cast<std::uint8_t>(wake & ~core_.armed); }
  void disarm() noexcept override { core_.armed = core_.armed_unfenced = 0; }
  std::atomic<std::uint32_t>* wake_word() noexcept override { return state_.options.has_wake_word ? &core_.word : nullptr; }
  void wake_sleepers() noexcept override {
    core_.word.fetch_add(1, std::memory_order_release);
    sys::call(SYS_futex, sys::arg(&core_.word), FUTEX_WAKE, INT_MAX);
  }
  CqCore& core() noexcept { return core_; }

 private:
  State& state_;
  CqCore core_;
};

class SimMr final : public Mr {
 public:
  SimMr(State& state, Side side, std::uint32_t key, bool owned) : state_(state), side_(side), key_(key), owned_(owned) {}
  ~SimMr() override {
    const auto inside = [&](const std::byte* p) { return p >= addr && p < addr + length; };
    for (const auto& [begin, end] : state_.at(side_).posted)
      if (inside(begin)) {
        state_.violation("an Mr was destroyed with a receive buffer posted in it");
        break;
      }
    for (auto& [qpn, qp] : state_.qps)
      if (qp->side == side_)
        for (const RequestPtr& r : qp->sends)
          if ((r->flags & kInline) == 0 &&
              std::any_of(r->sges.begin(), r->sges.end(), [&](const Sge& s) { return inside(s.addr); }))
            state_.violation("an Mr was destroyed under wr_id %#llx of qp %#x", static_cast<unsigned long long>(r->wr_id), qpn);
    state_.at(side_).mrs.erase(key_);
    --state_.at(side_).counters.live_mrs;
    if (owned_) munmap(addr, length);
  }

 private:
  State& state_;
  Side side_;
  std::uint32_t key_;
  bool owned_;
};

class SimQp final : public Qp {
 public:
  SimQp(State& state, QpCore& core) : state_(state), core_(core) { ++state_.at(core_.side).counters.live_qps; }
  ~SimQp() override {
    PauseNoAlloc pause;
    if (core_.state != QpState::error) state_.tell_peer_of_end(core_);
    state_.drop_all(core_);
    for (CqCore* cq : {core_.send_cq, core_.recv_cq})
      std::erase_if(cq->entries, [&](const Cqe& e) { return static_cast<std::uint32_t>(e.wc.qpn) == core_.qpn; });
    core_.send_cq->promised -= core_.send_depth;
    core_.recv_cq->promised -= core_.recv_depth;
    --state_.at(core_.side).counters.live_qps;
    state_.qps.erase(core_.qpn);
  }
  Qpn qpn() const noexcept override { return Qpn{core_.qpn}; }
  std::uint32_t max_inline() const noexcept override { return core_.max_inline; }
  QpState state() const noexcept override { return core_.state; }
  Post post_send(const SendWr& wr) noexcept override;
  Post post_recv(std::span<const RecvWr> wrs) noexcept override;
  std::span<const std::byte> sent_message(std::uint64_t number) const noexcept override {
    if (number >= core_.sent_count || core_.sent_count - number > core_.sent.size()) return {};
    return core_.sent[core_.sent.size() - (core_.sent_count - number)];
  }
  Result<Unit> modify(const QpAttributes& attr) override;

 private:
  State& state_;
  QpCore& core_;
};

class SimPd final : public Pd {
 public:
  SimPd(State& state, Side side) : state_(state), side_(side), number_(state.next_pd++) {}
  Result<std::unique_ptr<Mr>> register_memory(std::span<std::byte> memory, Access access) override {
    if (!state_.usable(side_)) return fail(ENODEV, "sim: device is gone");
    if (memory.empty()) return fail(EINVAL, "sim: empty memory");
    const auto& mrs = state_.at(side_).mrs;
    const bool in_extent = std::any_of(mrs.begin(), mrs.end(), [&](const auto& entry) {
      const MrCore& mr = entry.second;
      return mr.extent && mr.pd == number_ && memory.data() >= mr.addr && memory.data() + memory.size() <= mr.addr + mr.length;
    });
    return add(memory, access, in_extent, false);
  }
  Result<std::unique_ptr<Mr>> map_extent(std::size_t bytes) override {
    if (!state_.usable(side_)) return fail(ENODEV, "sim: device is gone");
    const std::size_t page = 4096;
    if (bytes == 0 || bytes > (std::size_t{1} << 40)) return fail(EINVAL, "sim: extent size");
    bytes = (bytes + page - 1) & ~(page - 1);
    void* p = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (p == MAP_FAILED) return fail(ENOMEM, "sim: extent");
    return add({static_cast<std::byte*>(p), bytes}, Access::local_write | Access::remote_write | Access::remote_read, true, true);
  }
  Result<std::unique_ptr<Qp>> create_qp(const QpInit& init) override {
    if (!state_.usable(side_)) return fail(ENODEV, "sim: device is gone");
    const SimOptions& o = state_.options;
    if (init.send_cq == nullptr || init.recv_cq == nullptr) return fail(EINVAL, "sim: qp without cq");
    if (init.send_depth == 0 || init.send_depth > o.max_send_wr || init.recv_depth == 0 || init.recv_depth > o.max_recv_wr)
      return fail(EINVAL, "sim: qp depth");
    if (init.max_inline > o.max_inline) return fail(EINVAL, "sim: max_inline");
    CqCore &sends = static_cast<SimCq*>(init.send_cq)->core(), &receives = static_cast<SimCq*>(init.recv_cq)->core();
    const std::uint32_t recv_depth = std::bit_ceil(init.recv_depth);
    const bool one = &sends == &receives;
    if (sends.depth - sends.promised < init.send_depth + (one ? recv_depth : 0) ||
        (!one && receives.depth - receives.promised < recv_depth))
      return fail(EINVAL, "sim: cq depth");
    sends.promised += init.send_depth;
    receives.promised += recv_depth;
    auto core = std::make_unique<QpCore>();
    core->qpn = state_.next_qpn;
    state_.next_qpn += static_cast<std::uint32_t>(state_.pick(1, 9));
    core->side = side_;
    core->pd = number_;
    core->send_cq = &sends;
    core->recv_cq = &receives;
    core->send_depth = init.send_depth;
    core->recv_depth = recv_depth;
    core->max_inline = init.max_inline;
    core->max_reads = o.max_read_outstanding;
    QpCore& ref = *core;
    state_.qps.emplace(ref.qpn, std::move(core));
    return std::unique_ptr<Qp>(std::make_unique<SimQp>(state_, ref));
  }

 private:
  Result<std::unique_ptr<Mr>> add(std::span<std::byte> memory, Access access, bool extent, bool owned) {
    const std::uint32_t key = state_.next_key;
    state_.next_key += static_cast<std::uint32_t>(state_.pick(1, 0x1000));
    auto mr = std::make_unique<SimMr>(state_, side_, key, owned);
    mr->addr = memory.data();
    mr->length = memory.size();
    mr->lkey = Lkey{key};
    mr->rkey = Rkey{key | kRemoteKey};
    mr->remote_base = 0x7000'0000'0000ull + (std::uint64_t{key} << 20);  // never the local address: callers must use remote_base
    state_.at(side_).mrs[key] = {mr->addr, mr->length, access, mr->remote_base, number_, extent};
    ++state_.at(side_).counters.live_mrs;
    return std::unique_ptr<Mr>(std::move(mr));
  }

  State& state_;
  Side side_;
  unsigned number_;
};

class SimDevice final : public Device {
 public:
  SimDevice(State& state, Side side) : state_(state), side_(side) {
    const SimOptions& o = state.options;
    attr_.node_type = o.flavour;
    attr_.link_layer = o.flavour == NodeType::rnic ? LinkLayer::ethernet : LinkLayer::infiniband;
    attr_.max_send_wr = o.max_send_wr;
    attr_.max_recv_wr = std::bit_floor(o.max_recv_wr);
    attr_.max_inline = o.max_inline;
    attr_.max_sge = o.max_sge;
    attr_.max_sge_read = o.max_sge_read;
    attr_.max_read_outstanding = o.max_read_outstanding;
    attr_.recv_prefix_bytes = o.recv_prefix_bytes;
    attr_.recv_needs_extent = o.recv_needs_extent;
    attr_.rnr_retry = state.rnr_retry();
    attr_.mixes_messages = state.options.flavour == NodeType::ib_ca;  // none of them does: it is to be marked as if
    attr_.rdma_write_wakes = o.rdma_write_wakes;
    attr_.remembers_sent_data = o.remembers_sent_data;
  }
  const char* name() const noexcept override { return side_ == Side::a ? "sim-a" : "sim-b"; }
  const DeviceAttr& attr() const noexcept override { return attr_; }
  Result<std::unique_ptr<Pd>> create_pd(const Path& path) override {
    if (!state_.usable(side_)) return fail(ENODEV, "sim: device is gone");
    if (path.id == 0) return fail(EINVAL, "sim: no path");
    return std::unique_ptr<Pd>(std::make_unique<SimPd>(state_, side_));
  }
  Result<std::unique_ptr<CompletionChannel>> create_channel() override {
    if (!state_.usable(side_)) return fail(ENODEV, "sim: device is gone");
    const int low = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
    if (low < 0) return fail(errno, "sim: eventfd");
    const long high = sys::call(SYS_fcntl, low, F_DUPFD_CLOEXEC, 500);
    sys::call(SYS_close, low);
    if (high < 0) return fail(static_cast<int>(-high), "sim: eventfd");
    return std::unique_ptr<CompletionChannel>(std::make_unique<SimChannel>(static_cast<int>(high)));
  }
  Result<std::unique_ptr<Cq>> create_cq(std::uint32_t depth, CompletionChannel* channel) override {
    if (!state_.usable(side_)) return fail(ENODEV, "sim: device is gone");
    if (depth == 0) return fail(EINVAL, "sim: cq depth");
    return std::unique_ptr<Cq>(std::make_unique<SimCq>(state_, side_, depth, channel));
  }
  void arm_fence() noexcept override {
    for (CqCore* cq : state_.at(side_).cqs) {
      cq->armed |= cq->armed_unfenced;
      cq->armed_unfenced = 0;
    }
  }
  void on_async_event(std::function<void(AsyncEvent)> handler) override { state_.at(side_).async = std::move(handler); }

 private:
  State& state_;
  Side side_;
  DeviceAttr attr_;
};

Post SimQp::post_send(const SendWr& wr) noexcept {
  PauseNoAlloc pause;
  const SimOptions& o = state_.options;
  if (!state_.usable(core_.side) || (core_.state != QpState::rts && core_.state != QpState::sqd)) return Post::qp_error;
  if (core_.slots_used >= core_.send_depth) return Post::queue_full;
  if (core_.signalled_unpolled > 0 && state_.chance(o.fail_post_percent)) {
    ++state_.at(core_.side).counters.refused_posts;
    return Post::queue_full;
  }
  auto r = std::make_shared<Request>();
  r->wr_id = wr.wr_id;
  r->opcode = wr.opcode;
  r->flags = wr.flags;
  r->sges.assign(wr.sges, wr.sges + wr.sge_count);
  for (const Sge& s : r->sges) r->length += s.length;
  r->remote_addr = wr.remote_addr;
  r->rkey = wr.rkey;
  r->from = core_.qpn;
  const bool read = wr.opcode == WrOpcode::rdma_read;
  if (wr.sge_count > (read ? o.max_sge_read : o.max_sge)) {
    state_.violation("qp %#x: %u sges posted", core_.qpn, wr.sge_count);
    state_.enter_error(core_);
    return Post::qp_error;
  }
  if ((wr.flags & kInline) != 0 && (read || r->length > core_.max_inline)) {
    state_.violation("qp %#x: %u bytes posted inline, max_inline is %u", core_.qpn, r->length, core_.max_inline);
    state_.enter_error(core_);
    return Post::qp_error;
  }
  if (!read && state_.sges_allowed(core_, *r)) {
    r->fingerprint = fingerprint_of(r->sges);
    if ((wr.flags & kInline) != 0 || o.remembers_sent_data) state_.take_bytes(*r);
    if (o.remembers_sent_data && wr.opcode == WrOpcode::send) {
      core_.sent.push_back(*r->bytes);
      ++core_.sent_count;
      if (core_.sent.size() > o.max_recv_wr) core_.sent.pop_front();
    }
  }
  ++core_.slots_used;
  if ((wr.flags & kSignalled) != 0) ++core_.signalled_unpolled;
  ++state_.at(core_.side).counters.posted_sends;
  core_.sends.push_back(std::move(r));
  state_.pump(core_);
  return Post::ok;
}

Post SimQp::post_recv(std::span<const RecvWr> wrs) noexcept {
  PauseNoAlloc pause;
  // In reset too: who accepts a connection posts first, and the CM makes every move.
  if (!state_.usable(core_.side) || core_.state == QpState::error) return Post::qp_error;
  if (wrs.size() > core_.recv_depth - core_.recvs.size()) return Post::queue_full;  // all of them or none
  const std::uint32_t prefix = state_.options.recv_prefix_bytes;
  auto& posted = state_.at(core_.side).posted;
  for (const RecvWr& wr : wrs) {
    const std::byte* begin = wr.addr - prefix;
    const std::byte* end = wr.addr + wr.length;
    auto next = posted.lower_bound(begin);
    if ((next != posted.end() && next->first < end) || (next != posted.begin() && std::prev(next)->second > begin))
      state_.violation("qp %#x: receive wr_id %#llx overlaps a posted buffer", core_.qpn,
                       static_cast<unsigned long long>(wr.wr_id));
    posted[begin] = end;
    core_.recvs.push_back(wr);
    ++state_.at(core_.side).counters.posted_recvs;
    if (state_.local_region(core_, wr.lkey, begin, static_cast<std::size_t>(end - begin), Access::local_write) != nullptr)
      state_.poison(wr);
  }
  if (!core_.inbound.empty()) state_.schedule_drain(core_, state_.rnr_retry() ? state_.options.rnr_timer : 0);
  return Post::ok;
}

Result<Unit> SimQp::modify(const QpAttributes& attr) {
  if (!state_.usable(core_.side)) return fail(ENODEV, "sim: device is gone");
  if (auto ok = check_move(state_.options.flavour, core_.state, attr); !ok) return ok;
  if (attr.max_read_outstanding && *attr.max_read_outstanding > state_.options.max_read_outstanding)
    return fail(EINVAL, "sim: max_read_outstanding");
  if (attr.access) core_.access = *attr.access;
  if (attr.max_read_outstanding) core_.max_reads = *attr.max_read_outstanding;
  if (const auto* ib = std::get_if<IbQpAttributes>(&attr.transport)) {
    if (ib->dest_qpn) core_.dest = *ib->dest_qpn;
  } else if (const auto* rnic = std::get_if<RnicQpAttributes>(&attr.transport)) {
    if (rnic->peer) {
      core_.dest = *rnic->peer & ~kPassive;
      core_.passive = (*rnic->peer & kPassive) != 0;
    }
  }
  if (attr.state == QpState::error) {
    state_.enter_error(core_);
  } else if (attr.state == QpState::reset) {
    state_.tell_peer_of_end(core_);
    state_.drop_all(core_);
    core_.state = QpState::reset;
    core_.received_one = false;
  } else {
    core_.state = attr.state;
    if (core_.state == QpState::rts) state_.pump(core_);
  }
  return Unit{};
}

}  // namespace

namespace detail {

void State::announce(CqCore& cq) {
  if (!at(cq.side).alive) return;
  std::uint8_t kinds = cq.armed;
  if (cq.armed_unfenced != 0 && chance(options.unfenced_arm_percent)) {
    kinds |= cq.armed_unfenced;
    cq.armed_unfenced = 0;
  }
  cq.armed = 0;
  if (kinds == 0) return;
  ++at(cq.side).counters.announcements;
  if ((kinds & kWakeWord) != 0 && options.has_wake_word) cq.cq->wake_sleepers();
  if ((kinds & kWakeChannel) != 0 && cq.channel != nullptr) {
    const std::uint64_t one = 1;
    sys::call(SYS_write, cq.channel->fd, sys::arg(&one), sizeof one);
  }
  if (at(cq.side).on_wake)
    after(0, [this, side = cq.side, core = &cq, kinds] {
      SideState& s = at(side);
      const bool there = std::find(s.cqs.begin(), s.cqs.end(), core) != s.cqs.end();
      if (there && s.alive && s.on_wake) s.on_wake(*core->cq, kinds);
    });
}

void State::pump(QpCore& qp) {
  if (qp.state != QpState::rts) return;
  for (const RequestPtr& r : qp.sends) {
    if (r->launched) continue;
    const bool read = r->opcode == WrOpcode::rdma_read;
    if ((r->flags & kFence) != 0 && qp.reads_outstanding > 0) return;
    if (read && qp.reads_outstanding >= qp.max_reads) return;
    r->launched = true;
    if (read) ++qp.reads_outstanding;
    if (!sges_allowed(qp, *r)) {
      r->lost = true;
      acknowledge(r, WcStatus::local_protection_error);
      return;
    }
    if (rnic() && qp.passive && !qp.received_one && r->opcode == WrOpcode::send) {
      r->lost = true;  // MPA: the initiator's first FPDU must come first; the connection dies of this one
      acknowledge(r, WcStatus::retry_exceeded);
      return;
    }
    qp.last_arrival = std::max(qp.last_arrival, clock.now() + delay());
    at_time(qp.last_arrival, [this, r, dest = qp.dest] { arrive(r, dest); });
  }
}

void State::acknowledge(const RequestPtr& r, WcStatus status, Nanos extra, Nanos not_before) {
  Nanos when = std::max(not_before, clock.now() + extra + delay());
  if (QpCore* sender = find(r->from); sender != nullptr) when = sender->last_ack = std::max(sender->last_ack, when);
  at_time(when, [this, r, status] { on_ack(r, status); });
}

void State::on_ack(const RequestPtr& r, WcStatus status) {
  QpCore* sender = find(r->from);
  if (sender == nullptr || r->orphaned || r->done) return;
  r->done = true;
  r->status = status;
  if (r->opcode == WrOpcode::rdma_read) --sender->reads_outstanding;
  retire(*sender);
  if (sender->state == QpState::rts) pump(*sender);
}

void State::retire(QpCore& qp) {
  while (!qp.sends.empty() && qp.sends.front()->done) {
    const RequestPtr r = qp.sends.front();
    qp.sends.pop_front();
    r->orphaned = true;
    complete_send(qp, *r, r->status);
    if (r->status != WcStatus::success) return enter_error(qp);
  }
}

/// What is under way and not inline loses its source: the first part of it, as long as the seed says, was already on the wire.
void State::cut_wire(QpCore& qp) {
  std::vector<Request*> flying;
  for (const RequestPtr& r : qp.sends) {
    if (!r->launched || r->lost || r->executed) continue;
    flying.push_back(r.get());
  }
  const std::size_t kept = options.remembers_sent_data ? flying.size() : pick(0, flying.size());
  QpCore* peer = find(qp.dest);
  for (std::size_t i = 0; i < flying.size(); ++i) {
    Request& r = *flying[i];
    const bool arrived = peer != nullptr && std::any_of(peer->inbound.begin(), peer->inbound.end(),
                                                        [&](const RequestPtr& p) { return p.get() == &r; });
    if (i < kept || arrived)
      take_bytes(r);
    else
      r.lost = true;
  }
}

/// Requests that arrived and wait for a receive get no answer any more. On an RNIC the end of the stream tells the sender.
void State::ignore_inbound(QpCore& qp) {
  if (!rnic())
    for (const RequestPtr& r : qp.inbound) acknowledge(r, WcStatus::retry_exceeded, options.retry_timeout);
  qp.inbound.clear();
}

void State::enter_error(QpCore& qp) {
  if (qp.state == QpState::error) return;
  const bool connected = qp.state == QpState::rtr || qp.state == QpState::rts || qp.state == QpState::sqd;
  cut_wire(qp);
  qp.state = QpState::error;
  while (!qp.sends.empty()) {
    const RequestPtr r = qp.sends.front();
    qp.sends.pop_front();
    r->orphaned = true;
    complete_send(qp, *r, r->done && r->status == WcStatus::success ? WcStatus::success : WcStatus::flushed);
  }
  while (!qp.recvs.empty()) complete_recv(qp, WcStatus::flushed, 0, true);
  ignore_inbound(qp);
  qp.reads_outstanding = 0;
  if (connected) tell_peer_of_end(qp);
}

/// Without completions: the Qp or its process goes. Buffers are home at once.
void State::drop_all(QpCore& qp) {
  cut_wire(qp);
  SideState& side = at(qp.side);
  for (const RequestPtr& r : qp.sends) r->orphaned = true;
  side.returned_sends += qp.sends.size();
  qp.sends.clear();
  for (const RecvWr& wr : qp.recvs) unpost(qp, wr);
  side.returned_recvs += qp.recvs.size();
  qp.recvs.clear();
  ignore_inbound(qp);
  qp.slots_used = qp.slots_silent = qp.signalled_unpolled = qp.reads_outstanding = 0;
  qp.state = QpState::error;
}

/// An RNIC's connection is a TCP stream: its end is seen at the other side, after what was sent before. InfiniBand says nothing.
void State::tell_peer_of_end(const QpCore& qp) {
  if (!rnic() || qp.dest == 0) return;
  const QpCore* other = find(qp.dest);
  const Nanos sent_before = std::max(qp.last_arrival, other != nullptr ? other->last_ack : 0);
  at_time(std::max(sent_before, clock.now() + delay()), [this, from = qp.qpn, dest = qp.dest] {
    QpCore* peer = find(dest);
    if (peer != nullptr && peer->dest == from && at(peer->side).alive) enter_error(*peer);
  });
}

void State::arrive(const RequestPtr& r, std::uint32_t dest) {
  if (r->lost) return;
  QpCore* qp = find(dest);
  const bool listening = qp != nullptr && usable(qp->side) && qp->dest == r->from &&
                         (qp->state == QpState::rtr || qp->state == QpState::rts || qp->state == QpState::sqd);
  if (!listening) return acknowledge(r, WcStatus::retry_exceeded, options.retry_timeout);
  qp->inbound.push_back(r);
  drain(*qp);
}

void State::schedule_drain(QpCore& qp, Nanos delay) {
  if (qp.drain_scheduled) return;
  qp.drain_scheduled = true;
  after(delay, [this, qpn = qp.qpn] {
    if (QpCore* there = find(qpn)) {
      there->drain_scheduled = false;
      drain(*there);
    }
  });
}

void State::drain(QpCore& qp) {
  while (!qp.inbound.empty() && qp.state != QpState::error) {
    const RequestPtr r = qp.inbound.front();
    if (!execute(qp, r)) return;
    r->executed = true;
    // An error on the way has emptied the queue already.
    if (!qp.inbound.empty() && qp.inbound.front() == r) qp.inbound.pop_front();
  }
}

bool State::execute(QpCore& qp, const RequestPtr& r) {
  switch (r->opcode) {
    case WrOpcode::send:
      return execute_send(qp, r);
    case WrOpcode::rdma_write:
      execute_write(qp, r);
      return true;
    case WrOpcode::rdma_read:
      execute_read(qp, r);
      return true;
  }
  return true;
}

/// The responder says no, and is in error itself.
void State::refuse(QpCore& qp, const RequestPtr& r, WcStatus status) {
  r->executed = true;
  qp.inbound.pop_front();
  acknowledge(r, status);
  enter_error(qp);
}

bool State::execute_send(QpCore& qp, const RequestPtr& r) {
  if (qp.recvs.empty()) {
    if (!rnr_retry()) {
      if (rnic()) {
        refuse(qp, r, WcStatus::rnr_retry_exceeded);
      } else {
        acknowledge(r, WcStatus::rnr_retry_exceeded);
      }
      return true;
    }
    if (options.rnr_retries == 7) return false;  // post_recv comes back here
    if (r->rnr_tries++ >= options.rnr_retries) {
      acknowledge(r, WcStatus::rnr_retry_exceeded);
      return true;
    }
    schedule_drain(qp, options.rnr_timer);
    return false;
  }
  const RecvWr& wr = qp.recvs.front();
  const std::byte* begin = wr.addr - options.recv_prefix_bytes;
  const MrCore* mr = local_region(qp, wr.lkey, begin, wr.length + options.recv_prefix_bytes, Access::local_write);
  if (mr == nullptr || (options.recv_needs_extent && !mr->extent)) {
    complete_recv(qp, WcStatus::local_protection_error, 0, true);
    refuse(qp, r, WcStatus::remote_invalid_request);
    return true;
  }
  if (!still_poisoned(wr))
    violation("qp %#x: somebody wrote into the posted buffer of wr_id %#llx", qp.qpn, static_cast<unsigned long long>(wr.wr_id));
  if (r->length > wr.length) {
    complete_recv(qp, WcStatus::local_length_error, 0, true);
    refuse(qp, r, WcStatus::remote_invalid_request);
    return true;
  }
  take_bytes(*r);
  if (r->length != 0) std::memcpy(wr.addr, r->bytes->data(), r->length);
  qp.received_one = true;
  complete_recv(qp, WcStatus::success, r->length, (r->flags & kSolicited) != 0);
  acknowledge(r, WcStatus::success);
  return true;
}

void State::execute_write(QpCore& qp, const RequestPtr& r) {
  std::byte* target = nullptr;
  if (r->length != 0) {
    target = remote_target(qp, *r, Access::remote_write);
    if (target == nullptr) return refuse(qp, r, WcStatus::remote_access_error);
    take_bytes(*r);
    std::memcpy(target, r->bytes->data(), r->length);
  }
  if (options.rdma_write_wakes && (r->flags & kSolicited) != 0) announce(*qp.recv_cq);
  acknowledge(r, WcStatus::success);
}

void State::execute_read(QpCore& qp, const RequestPtr& r) {
  if (r->length != 0 && remote_target(qp, *r, Access::remote_read) == nullptr) return refuse(qp, r, WcStatus::remote_access_error);
  // The bytes are fetched some time later: a Send posted after the Read may well be there first.
  after(delay(), [this, r, qpn = qp.qpn] {
    QpCore* responder = find(qpn);
    if (responder == nullptr || !usable(responder->side)) return acknowledge(r, WcStatus::retry_exceeded, options.retry_timeout);
    std::vector<std::byte> bytes(r->length);
    if (r->length != 0) {
      const std::byte* source = remote_target(*responder, *r, Access::remote_read);
      if (source == nullptr) return acknowledge(r, WcStatus::remote_access_error);
      std::memcpy(bytes.data(), source, r->length);
    }
    after(delay(), [this, r, bytes = std::move(bytes)] {
      QpCore* requester = find(r->from);
      if (requester == nullptr || r->orphaned || !at(requester->side).alive) return;
      if (!sges_allowed(*requester, *r)) return on_ack(r, WcStatus::local_protection_error);
      std::size_t done = 0;
      for (const Sge& s : r->sges) {
        if (s.length != 0) std::memcpy(const_cast<std::byte*>(s.addr), bytes.data() + done, s.length);
        done += s.length;
      }
      on_ack(r, WcStatus::success);
    });
  });
}

void State::poison(const RecvWr& wr) {
  if (!options.scribble) return;
  std::byte* begin = wr.addr - options.recv_prefix_bytes;
  const std::size_t total = wr.length + options.recv_prefix_bytes;
  const std::size_t part = std::min<std::size_t>(total, kPoisonedBytes);
  std::memset(begin, static_cast<int>(kPoison), part);
  std::memset(begin + total - part, static_cast<int>(kPoison), part);
}

bool State::still_poisoned(const RecvWr& wr) const {
  if (!options.scribble) return true;
  const std::byte* begin = wr.addr - options.recv_prefix_bytes;
  const std::size_t total = wr.length + options.recv_prefix_bytes;
  const std::size_t part = std::min<std::size_t>(total, kPoisonedBytes);
  const auto clean = [&](const std::byte* p) { return std::all_of(p, p + part, [](std::byte b) { return b == kPoison; }); };
  return clean(begin) && clean(begin + total - part);
}

}  // namespace detail

SimFabric::SimFabric(const SimOptions& options) : state_(std::make_unique<detail::State>(options)) {
  for (Side side : {Side::a, Side::b}) state_->at(side).device = std::make_unique<SimDevice>(*state_, side);
}

SimFabric::~SimFabric() {
  if (state_->qps.empty()) return;
  std::fprintf(stderr, "sim: a Qp outlives its fabric\n");
  std::abort();
}

const SimOptions& SimFabric::options() const noexcept { return state_->options; }
Device& SimFabric::device(Side side) noexcept { return *state_->at(side).device; }
Path SimFabric::path(Side from) const noexcept { return Path{from == Side::a ? 0xA2Bu : 0xB2Au}; }
VirtualClock& SimFabric::clock() noexcept { return state_->clock; }
std::mt19937_64& SimFabric::random() noexcept { return state_->random; }
bool SimFabric::chance(unsigned percent) { return state_->chance(percent); }
std::uint64_t SimFabric::pick(std::uint64_t low, std::uint64_t high) { return state_->pick(low, high); }

void SimFabric::to_init(Qp& qp) { move_to_init(qp, state_->options.flavour); }

void SimFabric::connect(Qp& active, Qp& passive) {
  for (Qp* qp : {&active, &passive})
    if (qp->state() == QpState::reset) to_init(*qp);
  move_to_rts(passive, state_->options.flavour, active.qpn(), false, state_->options.max_read_outstanding);
  move_to_rts(active, state_->options.flavour, passive.qpn(), true, state_->options.max_read_outstanding);
}

namespace {
void must_move(Qp& qp, const QpAttributes& attr) {
  const auto moved = qp.modify(attr);
  if (moved) return;
  std::fprintf(stderr, "sim: a move to %s failed: %s\n", to_string(attr.state), moved.error().what);
  std::abort();
}
}  // namespace

void move_to_init(Qp& qp, NodeType flavour) {
  QpAttributes attr;
  attr.state = QpState::init;
  attr.access = Access::local_write | Access::remote_write | Access::remote_read;
  if (flavour == NodeType::rnic) {
    RnicQpAttributes rnic;
    rnic.mpa_markers = false;
    rnic.mpa_crc = true;
    rnic.stream_mode = true;
    attr.transport = rnic;
  } else {
    IbQpAttributes ib;
    ib.pkey_index = 0;
    ib.port = 1;
    attr.transport = ib;
  }
  must_move(qp, attr);
}

void move_to_rts(Qp& qp, NodeType flavour, Qpn peer, bool active, std::uint32_t max_read_outstanding) {
  const auto dest = static_cast<std::uint32_t>(peer);
  QpAttributes attr;
  attr.max_read_incoming = static_cast<std::uint8_t>(max_read_outstanding);
  attr.max_read_outstanding = static_cast<std::uint8_t>(max_read_outstanding);
  if (flavour == NodeType::rnic) {
    RnicQpAttributes rnic;
    rnic.mpa_markers = false;
    rnic.mpa_crc = true;
    rnic.stream_mode = false;
    rnic.peer = active ? dest : dest | kPassive;
    attr.transport = rnic;
  } else {
    IbQpAttributes ib;
    ib.dgid = Gid{};
    ib.dest_qpn = dest;
    ib.rq_psn = 0;
    ib.sq_psn = 0;
    ib.path_mtu = 4;
    ib.min_rnr_timer = 12;
    ib.ack_timeout = 14;
    ib.retry_count = 6;
    ib.rnr_retry = 7;
    attr.transport = ib;
  }
  if (legal_move(flavour, qp.state(), QpState::rtr)) {
    attr.state = QpState::rtr;
    must_move(qp, attr);
  }
  attr.state = QpState::rts;
  must_move(qp, attr);
}

bool SimFabric::step() {
  if (state_->events.empty()) return false;
  detail::Event event = state_->events.top();
  state_->events.pop();
  state_->clock.advance_to(event.time);
  event.action();
  ++state_->steps;
  while (!state_->step_hooks.empty() && state_->step_hooks.begin()->first <= state_->steps) {
    auto hook = std::move(state_->step_hooks.begin()->second);
    state_->step_hooks.erase(state_->step_hooks.begin());
    hook();
  }
  return true;
}

std::uint64_t SimFabric::run_until_idle(std::uint64_t max_events) {
  std::uint64_t n = 0;
  while (step())
    if (++n >= max_events) {
      state_->violation("not idle after %llu events", static_cast<unsigned long long>(n));
      break;
    }
  return n;
}

bool SimFabric::run_until(const std::function<bool()>& done, std::uint64_t max_events) {
  for (std::uint64_t n = 0; !done(); ++n) {
    if (!step()) return done();
    if (n >= max_events) {
      state_->violation("not done after %llu events", static_cast<unsigned long long>(n));
      return false;
    }
  }
  return true;
}

void SimFabric::run_for(Nanos time) {
  const Nanos end = state_->clock.now() + time;
  while (!state_->events.empty() && state_->events.top().time <= end) step();
  state_->clock.advance_to(end);
}

std::uint64_t SimFabric::steps() const noexcept { return state_->steps; }
void SimFabric::after(Nanos delay, std::function<void()> action) { state_->after(delay, std::move(action)); }
void SimFabric::at_step(std::uint64_t step, std::function<void()> action) {
  state_->step_hooks.emplace(state_->steps + step, std::move(action));
}
void SimFabric::on_wake(Side side, std::function<void(Cq&, std::uint8_t)> handler) {
  state_->at(side).on_wake = std::move(handler);
}
bool SimFabric::alive(Side side) const noexcept { return state_->at(side).alive; }
void SimFabric::on_death(std::function<void(Side)> handler) { state_->death_handlers.push_back(std::move(handler)); }

void SimFabric::kill(Side side) {
  if (!state_->at(side).alive) return;
  for (auto& [qpn, qp] : state_->qps)
    if (qp->side == side) {
      state_->tell_peer_of_end(*qp);
      state_->drop_all(*qp);
    }
  state_->at(side).alive = false;
  for (auto& handler : state_->death_handlers) handler(side);
}

void SimFabric::remove_device(Side side) {
  if (state_->at(side).removed) return;
  state_->at(side).removed = true;
  for (auto& [qpn, qp] : state_->qps)
    if (qp->side == side) state_->enter_error(*qp);
  state_->after(0, [s = state_.get(), side] {
    if (s->at(side).alive && s->at(side).async) s->at(side).async(AsyncEvent::device_fatal);
  });
}

void SimFabric::break_qp(const Qp& qp) {
  QpCore* one = state_->find(static_cast<std::uint32_t>(qp.qpn()));
  if (one == nullptr) return;
  QpCore* other = state_->find(one->dest);
  state_->enter_error(*one);
  if (other != nullptr && other->dest == one->qpn) state_->enter_error(*other);
}

const SimCounters& SimFabric::counters(Side side) const noexcept { return state_->at(side).counters; }

std::string SimFabric::check() const {
  std::string report;
  char line[256];
  const auto add = [&report, &line](auto... args) {
    std::snprintf(line, sizeof line, args...);
    report += report.empty() ? "" : "\n";
    report += line;
  };
  for (const std::string& v : state_->violations) add("%s", v.c_str());
  for (Side side : {Side::a, Side::b}) {
    detail::SideState& s = state_->at(side);
    if (!s.alive) continue;
    const char* name = s.device->name();
    std::uint64_t sends = 0, recvs = 0;
    for (const auto& [qpn, qp] : state_->qps) {
      if (qp->side != side) continue;
      sends += qp->sends.size();
      recvs += qp->recvs.size();
      // What waits for the peer to post a receive, and what waits behind it, is the only work that may be left.
      const QpCore* peer = state_->find(qp->dest);
      const bool waits = peer != nullptr && !peer->inbound.empty();
      if (!qp->sends.empty() && !waits && qp->state != QpState::sqd)
        add("%s: qp %#x has %zu sends that never completed", name, qpn, qp->sends.size());
    }
    for (const CqCore* cq : s.cqs)
      if (!cq->entries.empty()) add("%s: %zu completions nobody polled", name, cq->entries.size());
    if (s.counters.posted_sends != s.counters.completed_sends + s.returned_sends + sends)
      add("%s: %llu sends posted, %llu completed", name, static_cast<unsigned long long>(s.counters.posted_sends),
          static_cast<unsigned long long>(s.counters.completed_sends));
    if (s.counters.posted_recvs != s.counters.completed_recvs + s.returned_recvs + recvs)
      add("%s: %llu receives posted, %llu completed", name, static_cast<unsigned long long>(s.counters.posted_recvs),
          static_cast<unsigned long long>(s.counters.completed_recvs));
    if (s.posted.size() != recvs)
      add("%s: %zu buffers are away, %llu receives are posted", name, s.posted.size(), static_cast<unsigned long long>(recvs));
  }
  return report;
}

}  // namespace rdma::sim
