// Any bytes as what two hosts say to each other before they have a connection: nothing is read past their end, and what parses is
// emitted and parsed again as the same value. Any counts in it are borne by what decides upon them, and two honest ends agree.
#include <fcntl.h>
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <vector>

#include "rdma_core/cm/rdma_evidence.hpp"
#include "tests/fuzz/require.hpp"

using namespace rdma::cm;
using Bytes = std::span<const std::byte>;

namespace {

bool same(const offer::Offer& a, const offer::Offer& b) { return a.bytes() == b.bytes(); }

void check_offer(Bytes in) {
  const auto o = offer::Offer::parse(in);
  if (!o) return;
  require(o->client.family == AF_INET || o->client.family == AF_INET6, "an offer names a family");
  require(o->client.port != 0 && o->server_port != 0 && o->dial_port != 0, "an offer names its ports");
  require(o->sent <= Transcript::kMost && o->received <= Transcript::kMost, "an offer tells of no more than is kept");
  const auto bytes = o->bytes();
  const auto again = offer::Offer::parse(bytes);
  require(again && same(*again, *o), "an offer makes the round trip");
}

void check_answer(Bytes in) {
  const auto a = offer::Answer::parse(in);
  if (!a) return;
  const auto again = offer::Answer::parse(a->bytes());
  require(again && again->code == a->code && again->token == a->token, "an answer makes the round trip");
}

void check_dial(Bytes in) {
  const auto d = offer::Dial::parse(in);
  require(d.has_value() == (in.size() >= offer::kDialBytes), "a dial is what is long enough");
  if (!d) return;
  std::array<std::byte, offer::kDialBytes> bytes;
  d->emit(bytes.data());
  require(std::equal(bytes.begin(), bytes.end(), in.begin()), "a dial makes the round trip");
}

void check_refusal(Bytes in) {
  const auto r = offer::parse_refusal(in);
  if (!r) return;
  require(*r > Reason::none && *r <= Reason::unproven, "a refusal has a reason that is one");
  std::array<std::byte, offer::kRefusalBytes> bytes;
  offer::emit_refusal(*r, bytes.data());
  require(offer::parse_refusal(bytes) == r, "a refusal makes the round trip");
}

Anchor anchor_of(const IpAddress& local, const IpAddress& remote) {
  return {.local = local.to_sockaddr(), .remote = remote.to_sockaddr()};
}

/// `in` as the stream of both directions, of which each end knows as much as four of its bytes say.
void check_evidence(Bytes in) {
  if (in.size() < 8) return;
  const auto upto = [&](std::size_t at, std::size_t most) {
    return most == 0 ? 0 : std::to_integer<std::size_t>(in[at]) * most / 255;
  };
  const std::size_t length = std::min(in.size() - 8, Transcript::kMost);
  const auto begin = [&](std::size_t count) {
    return std::vector<std::byte>(in.begin() + 8, in.begin() + 8 + static_cast<long>(count));
  };
  const bool may_be_empty = (in[4] & std::byte{1}) != std::byte{};
  const Transcript client{begin(upto(0, length)), begin(upto(1, length)), may_be_empty};
  const Transcript server{begin(upto(2, length)), begin(upto(3, length)), may_be_empty};
  IpAddress here, there;
  here.family = there.family = AF_INET;
  here.port = 1;
  there.port = 2;

  OfferedEvidence offered;
  offer::Offer o;
  o.client = here;
  offered.say(client, o);
  offer::Dial dial;
  dial.from_client = rdma::load_be16(in.data() + 4);
  dial.from_server = rdma::load_be16(in.data() + 6);
  (void)OfferedEvidence::is_behind(dial, client);
  const auto shown = offered.shown_by(dial, anchor_of(here, there), client);
  require(!shown || (shown->from_client.size() == dial.from_client && shown->from_server.size() == dial.from_server),
          "so much is shown as is said");

  if (!may_take_up(o, server)) return;
  const Evidence dialler = evidence_for(o, anchor_of(there, here), server);
  dial.from_client = static_cast<std::uint16_t>(dialler.from_client.size());
  dial.from_server = static_cast<std::uint16_t>(dialler.from_server.size());
  require(dialler.from_client.size() >= o.sent && dialler.from_server.size() >= o.received, "all that was said is shown");
  if (OfferedEvidence::is_behind(dial, client)) return;
  const auto listener = offered.shown_by(dial, anchor_of(here, there), client);
  require(listener.has_value(), "who has taken an offer up shows enough");
  const auto proof = prove({}, Says::request, dialler.claim(7, in));
  require(is_proved(proof, {}, Says::request, listener->claim(7, in)), "honest ends believe each other");
}

void check_secret(Bytes in) {
  const int file = memfd_create("secret", MFD_CLOEXEC);
  if (file < 0 || write(file, in.data(), in.size()) != static_cast<ssize_t>(in.size())) std::abort();
  const auto secret = secret_from(("/proc/self/fd/" + std::to_string(file)).c_str());
  close(file);
  require(secret.ok() == (in.size() >= 16 && in.size() <= 4096), "a secret is what has its size");
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  const Bytes in(reinterpret_cast<const std::byte*>(data), size);
  check_dial(in);
  check_evidence(in);
  check_secret(in);
  for (const auto check : {check_offer, check_answer, check_refusal}) check(in);
  // The magic is hardly ever there by chance.
  if (size < 4) return 0;
  std::vector<std::byte> mended(in.begin(), in.end());
  const auto with = [&](std::uint32_t magic, void (*check)(Bytes)) {
    rdma::store_be32(mended.data(), magic);
    check(mended);
  };
  with(offer::kOfferMagic, check_offer);
  with(offer::kAnswerMagic, check_answer);
  with(offer::kRefusalMagic, check_refusal);
  return 0;
}
