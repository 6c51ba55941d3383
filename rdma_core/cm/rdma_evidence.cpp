#include "rdma_core/cm/rdma_evidence.hpp"

#include <algorithm>
#include <utility>

namespace rdma::cm {
namespace {

constexpr std::size_t kOfferBytes = 16;
constexpr std::size_t kProofBytes = 64;  ///< as many are proof enough, where the server has received fewer
constexpr unsigned kGuesses = 3;
constexpr std::size_t kEarly = 16;
constexpr Nanos kEarlyPatience = 50'000'000;

std::vector<std::byte> first(const std::vector<std::byte>& bytes, std::size_t count) {
  return {bytes.begin(), bytes.begin() + static_cast<std::ptrdiff_t>(count)};
}

}  // namespace

bool suffices_for_offer(const Transcript& known) noexcept {
  return known.may_be_empty || known.sent.size() + known.received.size() >= kOfferBytes;
}

void OfferedEvidence::say(const Transcript& known, offer::Offer& offer) noexcept {
  offer.sent = static_cast<std::uint16_t>(known.sent.size());
  offer.received = static_cast<std::uint16_t>(known.received.size());
  if (std::exchange(is_said_, true)) return;
  least_sent_ = offer.sent;
  least_received_ = offer.received;
}

std::optional<Evidence> OfferedEvidence::shown_by(const offer::Dial& dial, const Anchor& anchor, const Transcript& known) const {
  const std::size_t sent = dial.from_client, received = dial.from_server;
  const bool enough = sent >= least_sent_ && received >= least_received_ && (sent + received > 0 || known.may_be_empty);
  if (!enough || sent > known.sent.size() || received > known.received.size()) return std::nullopt;
  Evidence e;
  e.token = dial.token;
  e.client = IpAddress::from(anchor.local);
  e.server = IpAddress::from(anchor.remote);
  e.from_client = first(known.sent, sent);
  e.from_server = first(known.received, received);
  return e;
}

bool OfferedEvidence::is_behind(const offer::Dial& dial, const Transcript& known) noexcept {
  const auto more_is_said = [](std::size_t said, std::size_t here) { return said > here && said <= Transcript::kMost; };
  return more_is_said(dial.from_client, known.sent.size()) || more_is_said(dial.from_server, known.received.size());
}

bool OfferedEvidence::bear_guess() noexcept { return ++guesses_ < kGuesses; }

bool EarlyRequests::keep(const CmEvent& event, Nanos now) {
  if (all_.size() >= kEarly) return false;
  all_.push_back({event, now + kEarlyPatience});
  return true;
}

std::vector<CmEvent> EarlyRequests::take_due(Nanos now) {
  std::vector<CmEvent> due;
  std::erase_if(all_, [&](Early& each) {
    if (now < each.until) return false;
    due.push_back(std::move(each.event));
    return true;
  });
  return due;
}

std::optional<Nanos> EarlyRequests::next_due() const noexcept {
  const auto it = std::min_element(all_.begin(), all_.end(), [](const Early& a, const Early& b) { return a.until < b.until; });
  return it != all_.end() ? std::optional(it->until) : std::nullopt;
}

bool may_take_up(const offer::Offer& o, const Transcript& known) noexcept {
  if (o.received > known.sent.size() || o.sent > known.received.size()) return false;
  const std::size_t proved = known.received.size() + o.received, all = known.received.size() + known.sent.size();
  return proved == 0 ? known.may_be_empty : proved >= std::min(kProofBytes, all / 2);
}

Evidence evidence_for(const offer::Offer& o, const Anchor& anchor, const Transcript& known) {
  Evidence e;
  e.token = o.token;
  e.client = IpAddress::from(anchor.remote);
  e.server = IpAddress::from(anchor.local);
  e.from_client = known.received;
  e.from_server = first(known.sent, o.received);
  return e;
}

}  // namespace rdma::cm
