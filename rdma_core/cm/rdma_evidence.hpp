// The evidence that two ends which meet by offer and dial-back have of their anchor: its first bytes, as far as each knows them.
// Here is when there is enough of it to offer, to take an offer up and to believe who dials; rdma_proof.hpp is how it is shown.
//
// For a moment each end may know more than the other: a byte is with the peer before the call that sent it has returned. So an
// offer waits, an offer that came waits, and a request waits (EarlyRequests), each for a bounded time. Private to rdma_core/cm.
#pragma once

#include <array>
#include <optional>
#include <vector>

#include "rdma_core/base/clock.hpp"
#include "rdma_core/cm/offer_wire.hpp"
#include "rdma_core/cm/rdma_channel.hpp"
#include "rdma_core/cm/rdma_proof.hpp"

namespace rdma::cm {

/// What is shown of one connection in the making; the same at both ends.
struct Evidence {
  offer::Token token{};
  IpAddress client, server;  ///< the anchor's ends
  std::vector<std::byte> from_client, from_server;
  std::uint32_t dialler_end = 0;  ///< as the request said

  /// Valid as long as the evidence and `data`, the private data beside the proof.
  Claim claim(std::uint32_t listener_end, std::span<const std::byte> data) const noexcept {
    return {token, client, server, dialler_end, listener_end, data, from_client, from_server};
  }
};

// --- the connecting side

/// With less an offer waits.
bool suffices_for_offer(const Transcript& known) noexcept;

/// What an offer has said of the anchor, and what its maker takes for an answer.
class OfferedEvidence {
 public:
  /// Once more; the first time counts.
  void say(const Transcript& known, offer::Offer& offer) noexcept;
  bool is_said() const noexcept { return is_said_; }

  /// Whoever dials shows all that went by the anchor before it was first offered, and perhaps more. nullopt: less, or more than has
  /// gone by it.
  std::optional<Evidence> shown_by(const offer::Dial& dial, const Anchor& anchor, const Transcript& known) const;
  /// The dialler may be honest and know more than this end does yet.
  static bool is_behind(const offer::Dial& dial, const Transcript& known) noexcept;

  /// A request came with a wrong proof. False: the offer bears no more of them.
  bool bear_guess() noexcept;
  bool is_guessed_at() const noexcept { return guesses_ != 0; }

 private:
  std::uint16_t least_sent_ = 0, least_received_ = 0;  ///< bytes, of the first time
  bool is_said_ = false;
  unsigned guesses_ = 0;
};

/// Requests that wait for the program's own thread to have told what it sent. Few: the others are judged at once.
class EarlyRequests {
 public:
  bool keep(const CmEvent& event, Nanos now);  ///< false: no room
  std::vector<CmEvent> take_due(Nanos now);
  std::optional<Nanos> next_due() const noexcept;
  void clear() noexcept { all_.clear(); }

 private:
  struct Early {
    CmEvent event;
    Nanos until = 0;
  };
  std::vector<Early> all_;
};

// --- the side that has accepted

/// An offer is taken up when the program here has read all that the client had sent by then, and when the client, of what was sent
/// from here, has read enough to be told from somebody who guesses. What the client has read may be known here only later.
bool may_take_up(const offer::Offer& offer, const Transcript& known) noexcept;

/// Of an offer that may be taken up.
Evidence evidence_for(const offer::Offer& offer, const Anchor& anchor, const Transcript& known);

}  // namespace rdma::cm
