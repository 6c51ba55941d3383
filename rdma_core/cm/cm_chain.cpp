#include "rdma_core/cm/cm_chain.hpp"

#include <sys/epoll.h>

#include <algorithm>
#include <cerrno>
#include <utility>

#include "rdma_core/base/high_fd.hpp"
#include "rdma_core/base/log.hpp"
#include "rdma_core/base/sys.hpp"

namespace rdma::cm {
namespace {

constexpr Nanos kMillisecond = 1'000'000;
constexpr Nanos kRetryAfter = 60'000 * kMillisecond;
constexpr unsigned kIndexShift = 56;

Err<Error> no_such_connection() noexcept { return fail(ENOENT, "cm chain: no such connection"); }

}  // namespace

Result<std::unique_ptr<CmChain>> CmChain::create(std::vector<Transport> transports, const Clock& clock) {
  if (transports.empty() || transports.size() > kMostTransports) return fail(EINVAL, "cm chain: no transport, or too many");
  std::unique_ptr<CmChain> chain(new CmChain(std::move(transports), clock));
  if (chain->epoll_fd_ < 0) return fail(-chain->epoll_fd_, "cm chain: no epoll descriptor");
  for (std::size_t i = 0; i < chain->links_.size(); ++i)
    if (chain->links_[i].transport.cm != nullptr) chain->join(i);
  return chain;
}

CmChain::CmChain(std::vector<Transport> transports, const Clock& clock)
    : clock_(clock), epoll_fd_(keep_fd(static_cast<int>(sys::call(SYS_epoll_create1, EPOLL_CLOEXEC)))) {
  for (Transport& each : transports) links_.push_back(Link{std::move(each), 0, {}});
}

CmChain::~CmChain() {
  if (epoll_fd_ < 0) return;
  forget_fd(epoll_fd_);
  sys::call(SYS_close, epoll_fd_);
}

ConnectionManager* CmChain::open(Link& link) {
  if (link.transport.cm != nullptr) return link.transport.cm;
  const Nanos now = clock_.now();
  if (now < link.not_before || (may_open_ && !may_open_())) return nullptr;
  Opened opened = link.transport.open();
  if (!opened) {
    link.not_before = now + kRetryAfter;
    if (link.said != opened.error()) RDMA_LOG(info, "no connections by %s: %s", link.transport.name, opened.error().c_str());
    link.said = opened.error();
    return nullptr;
  }
  link.transport.cm = *opened;
  join(static_cast<std::size_t>(&link - links_.data()));
  return *opened;
}

void CmChain::forget_opened() {
  std::vector<std::uint64_t> over;
  for (std::size_t i = 0; i < links_.size(); ++i) {
    Link& link = links_[i];
    if (!link.transport.open) continue;
    link.not_before = 0;
    if (link.transport.cm == nullptr) continue;
    for (const auto& [cookie, attempt] : attempts_)
      if (attempt.at == i) over.push_back(cookie);
    sys::call(SYS_epoll_ctl, epoll_fd_, EPOLL_CTL_DEL, link.transport.cm->fd(), 0);
    link.transport.cm = nullptr;
  }
  for (const std::uint64_t cookie : over) end(cookie, Reason::elsewhere);
}

void CmChain::join(std::size_t index) {
  ConnectionManager& cm = *links_[index].transport.cm;
  cm.on_event([this, index](const Event& event) { on_inner_event(index, event); });
  cm.on_transcript([this](std::uint64_t cookie) { return transcript_of_ ? transcript_of_(cookie) : Transcript{}; });
  watch(cm.fd());
  const bool first = std::ranges::count_if(links_, [](const Link& l) { return l.transport.cm != nullptr; }) == 1;
  const Caps& its = cm.caps();
  if (first) {
    caps_ = its;
    return;
  }
  caps_.max_request_private = std::min(caps_.max_request_private, its.max_request_private);
  caps_.max_reply_private = std::min(caps_.max_reply_private, its.max_reply_private);
  caps_.max_reject_private = std::min(caps_.max_reject_private, its.max_reject_private);
  caps_.active_must_send_first |= its.active_must_send_first;
  caps_.proves_owner &= its.proves_owner;
}

void CmChain::watch(int fd) noexcept {
  epoll_event ev{EPOLLIN, {.fd = fd}};
  sys::call(SYS_epoll_ctl, epoll_fd_, EPOLL_CTL_ADD, fd, sys::arg(&ev));
}

void CmChain::try_again() noexcept {
  for (Link& link : links_) link.not_before = 0;
}

ConnId CmChain::outer(std::size_t index, ConnId inner) noexcept {
  const auto raw = static_cast<std::uint64_t>(inner);
  return raw >> kIndexShift != 0 ? ConnId::none : static_cast<ConnId>(raw | static_cast<std::uint64_t>(index) << kIndexShift);
}

CmChain::Routed CmChain::route(ConnId outer) const noexcept {
  const auto raw = static_cast<std::uint64_t>(outer);
  const std::size_t index = raw >> kIndexShift;
  ConnectionManager* cm = index < links_.size() ? links_[index].transport.cm : nullptr;
  return {cm, static_cast<ConnId>(raw & ((std::uint64_t{1} << kIndexShift) - 1))};
}

Result<Unit> CmChain::offer(const Anchor& anchor, unsigned ttl_ms) { return begin(anchor, ttl_ms, nullptr); }

Result<Unit> CmChain::dial(const Anchor& anchor, unsigned timeout_ms, MakeQp make_qp) {
  return begin(anchor, timeout_ms, std::move(make_qp));
}

Result<Unit> CmChain::begin(const Anchor& anchor, unsigned ms, MakeQp make_qp) {
  if (attempts_.contains(anchor.cookie)) withdraw(anchor.cookie);
  attempts_[anchor.cookie] = Attempt{anchor, std::move(make_qp), clock_.now() + static_cast<Nanos>(ms) * kMillisecond};
  auto begun = go_on(anchor.cookie);
  if (!begun) {
    attempts_.erase(anchor.cookie);
    return begun;
  }
  if (const auto it = attempts_.find(anchor.cookie); it != attempts_.end()) it->second.anchor.fd = -1;  // the program may close it
  return begun;
}

/// To the next transport that is there.
Result<Unit> CmChain::go_on(std::uint64_t cookie) {
  for (;;) {
    Attempt& attempt = attempts_.at(cookie);
    const Nanos left = attempt.deadline - clock_.now();
    const bool too_late = attempt.next != 0 && left <= 0;
    if (attempt.next == links_.size() || too_late) {
      end(cookie, Reason::elsewhere);
      return Unit{};
    }
    const std::size_t index = attempt.next++;
    ConnectionManager* cm = open(links_[index]);
    if (cm == nullptr) continue;
    attempt.at = index;
    const auto ms = static_cast<unsigned>((std::max<Nanos>(left, 0) + kMillisecond - 1) / kMillisecond);
    const Anchor anchor = attempt.anchor;  // of our own: the attempt may be over before the call returns
    if (!attempt.make_qp) return cm->offer(anchor, ms);
    return cm->dial(anchor, ms, [this, index, cookie, make_qp = attempt.make_qp](Device& device, const Path& path, ConnId conn) {
      attempts_.erase(cookie);  // the peer is found: whatever comes of it is final
      const ConnId mine = outer(index, conn);
      return mine != ConnId::none ? make_qp(device, path, mine) : Proposal{};
    });
  }
}

void CmChain::end(std::uint64_t cookie, Reason reason) {
  attempts_.erase(cookie);
  Event e;
  e.kind = EventKind::unreachable;
  e.anchor_cookie = cookie;
  e.reason = reason;
  if (handler_) handler_(e);
}

void CmChain::on_inner_event(std::size_t index, const Event& event) {
  const std::uint64_t cookie = event.anchor_cookie;
  const auto it = attempts_.find(cookie);
  const bool searching = it != attempts_.end() && it->second.at == index;
  if (searching && event.kind == EventKind::unreachable && event.reason == Reason::elsewhere) {
    if (!go_on(cookie)) end(cookie, Reason::no_resources);
    return;
  }
  Event told = event;
  if (event.conn != ConnId::none && (told.conn = outer(index, event.conn)) == ConnId::none) {
    RDMA_LOG(error, "%s: a connection's number is too large", links_[index].transport.name);
    ConnectionManager& cm = *links_[index].transport.cm;
    if (event.kind == EventKind::request)
      cm.reject(event.conn, Reason::no_resources, {});
    else
      cm.disconnect(event.conn);
    if (searching) end(cookie, Reason::no_resources);
    return;
  }
  if (searching) attempts_.erase(it);
  if (handler_) handler_(told);
}

void CmChain::withdraw(std::uint64_t anchor_cookie) noexcept {
  attempts_.erase(anchor_cookie);
  for (const Link& link : links_)
    if (link.transport.cm != nullptr) link.transport.cm->withdraw(anchor_cookie);
}

Result<Unit> CmChain::accept(ConnId conn, Qp& qp, std::span<const std::byte> private_data) {
  const Routed to = route(conn);
  return to.cm != nullptr ? to.cm->accept(to.conn, qp, private_data) : no_such_connection();
}

void CmChain::reject(ConnId conn, Reason reason, std::span<const std::byte> private_data) noexcept {
  if (const Routed to = route(conn); to.cm != nullptr) to.cm->reject(to.conn, reason, private_data);
}

Result<Unit> CmChain::establish(ConnId conn) {
  const Routed to = route(conn);
  return to.cm != nullptr ? to.cm->establish(to.conn) : no_such_connection();
}

void CmChain::disconnect(ConnId conn) noexcept {
  if (const Routed to = route(conn); to.cm != nullptr) to.cm->disconnect(to.conn);
}

int CmChain::next_timeout_ms() const noexcept {
  int least = -1;
  for (const Link& link : links_) {
    const int its = link.transport.cm != nullptr ? link.transport.cm->next_timeout_ms() : -1;
    if (its >= 0 && (least < 0 || its < least)) least = its;
  }
  return least;
}

void CmChain::progress() {
  for (const Link& link : links_)
    if (link.transport.cm != nullptr) link.transport.cm->progress();
  if (companion_) companion_();
}

void CmChain::abandon_in_child() noexcept {
  for (const Link& link : links_)
    if (link.transport.cm != nullptr) link.transport.cm->abandon_in_child();
  forget_fd(epoll_fd_);
  sys::call(SYS_close, epoll_fd_);
  epoll_fd_ = -1;
}

}  // namespace rdma::cm
