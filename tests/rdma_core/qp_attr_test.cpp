#include "rdma_core/qp_attr.hpp"

#include <errno.h>

#include <boost/test/unit_test.hpp>
#include <cstring>
#include <fstream>
#include <sstream>
#include <string>
#include <vector>

namespace rdma {
namespace {

constexpr NodeType kNodes[] = {NodeType::ib_ca, NodeType::ib_switch, NodeType::ib_router, NodeType::rnic};
constexpr QpState kStates[] = {QpState::reset, QpState::init, QpState::rtr, QpState::rts, QpState::sqd, QpState::error};

/// Everything that any move may need.
QpAttributes full(NodeType node, QpState to) {
  QpAttributes attr{
      .state = to, .access = Access::remote_write, .max_read_outstanding = 4, .max_read_incoming = 4, .transport = {}};
  if (node == NodeType::rnic)
    attr.transport = RnicQpAttributes{.mpa_markers = {}, .mpa_crc = true, .stream_mode = false, .terminate = {}, .peer = 1};
  else
    attr.transport = IbQpAttributes{.pkey_index = 0,
                                    .port = 1,
                                    .dgid = Gid{},
                                    .dest_qpn = 0xFFFFFF,
                                    .rq_psn = 0xFFFFFF,
                                    .sq_psn = 0,
                                    .path_mtu = 5,
                                    .min_rnr_timer = 31,
                                    .ack_timeout = 31,
                                    .retry_count = 7,
                                    .rnr_retry = 7};
  return attr;
}

/// What a move needs, found out from outside: give nothing, and each time what was said to be missing.
std::vector<std::string> needs_of(NodeType node, QpState from, QpState to) {
  const QpAttributes all = full(node, to);
  QpAttributes attr{.state = to};
  IbQpAttributes ib;
  RnicQpAttributes rnic;
  const auto* all_ib = std::get_if<IbQpAttributes>(&all.transport);
  const auto* all_rnic = std::get_if<RnicQpAttributes>(&all.transport);
  std::vector<std::string> needs;
  for (;;) {
    const auto result = check_move(node, from, attr);
    if (result) return needs;
    const std::string what = result.error().what;
    BOOST_REQUIRE(result.error().code == EINVAL);
    const std::string tail = " missing";
    BOOST_REQUIRE(what.size() > 4 + tail.size());
    BOOST_REQUIRE(what.substr(what.size() - tail.size()) == tail);
    const std::string name = what.substr(4, what.size() - 4 - tail.size());
    for (const auto& seen : needs) BOOST_REQUIRE(seen != name);
    needs.push_back(name);
    if (name == "access") attr.access = all.access;
    if (name == "max_read_outstanding") attr.max_read_outstanding = all.max_read_outstanding;
    if (name == "max_read_incoming") attr.max_read_incoming = all.max_read_incoming;
    if (all_ib != nullptr) {
      if (name == "pkey_index") ib.pkey_index = all_ib->pkey_index;
      if (name == "port") ib.port = all_ib->port;
      if (name == "dgid") ib.dgid = all_ib->dgid;
      if (name == "dest_qpn") ib.dest_qpn = all_ib->dest_qpn;
      if (name == "rq_psn") ib.rq_psn = all_ib->rq_psn;
      if (name == "sq_psn") ib.sq_psn = all_ib->sq_psn;
      if (name == "path_mtu") ib.path_mtu = all_ib->path_mtu;
      if (name == "min_rnr_timer") ib.min_rnr_timer = all_ib->min_rnr_timer;
      if (name == "ack_timeout") ib.ack_timeout = all_ib->ack_timeout;
      if (name == "retry_count") ib.retry_count = all_ib->retry_count;
      if (name == "rnr_retry") ib.rnr_retry = all_ib->rnr_retry;
      attr.transport = ib;
    } else {
      if (name == "peer") rnic.peer = all_rnic->peer;
      if (name == "stream_mode") rnic.stream_mode = all_rnic->stream_mode;
      attr.transport = rnic;
    }
  }
}

std::string matrix() {
  std::ostringstream out;
  for (const NodeType node : kNodes)
    for (const QpState from : kStates)
      for (const QpState to : kStates) {
        out << to_string(node) << ' ' << to_string(from) << " -> " << to_string(to) << ':';
        if (!legal_move(node, from, to)) {
          BOOST_TEST(!check_move(node, from, full(node, to)).ok());
          out << " illegal\n";
          continue;
        }
        BOOST_TEST(check_move(node, from, full(node, to)).ok());
        const auto needs = needs_of(node, from, to);
        for (const auto& need : needs) out << ' ' << need;
        out << (needs.empty() ? " nothing\n" : "\n");
      }
  return out.str();
}

}  // namespace

// Goal: a changed rule shows as a diff of the stored file. The new text is left in the build directory.
BOOST_AUTO_TEST_CASE(the_whole_matrix_is_the_stored_one) {
  const std::string now = matrix();
  std::ifstream file(TEST_DATA_DIR "/rdma_core/qp_moves.txt");
  std::stringstream stored;
  stored << file.rdbuf();
  if (now != stored.str()) std::ofstream(BUILD_DIR "/qp_moves.txt") << now;
  BOOST_TEST(now == stored.str());
}

BOOST_AUTO_TEST_CASE(the_part_of_the_other_transport_is_refused) {
  QpAttributes attr = full(NodeType::ib_ca, QpState::init);
  BOOST_TEST(check_move(NodeType::rnic, QpState::reset, attr).error().what == std::string("qp: IB attributes for an RNIC"));
  attr = full(NodeType::rnic, QpState::init);
  BOOST_TEST(check_move(NodeType::ib_ca, QpState::reset, attr).error().what == std::string("qp: RNIC attributes for an IB device"));
  // Also on a move that needs nothing of it.
  attr = full(NodeType::ib_ca, QpState::error);
  BOOST_TEST(check_move(NodeType::rnic, QpState::rts, attr).error().code == EINVAL);
  attr = full(NodeType::rnic, QpState::error);
  BOOST_TEST(check_move(NodeType::ib_ca, QpState::rts, attr).error().code == EINVAL);
}

BOOST_AUTO_TEST_CASE(an_rnic_in_stream_mode_cannot_go_to_rts) {
  QpAttributes attr = full(NodeType::rnic, QpState::rts);
  std::get<RnicQpAttributes>(attr.transport).stream_mode = true;
  BOOST_TEST(check_move(NodeType::rnic, QpState::init, attr).error().code == EINVAL);
}

BOOST_AUTO_TEST_CASE(an_rnic_may_say_terminate_or_not) {
  QpAttributes attr = full(NodeType::rnic, QpState::error);
  for (const auto terminate : {std::optional<bool>(), std::optional<bool>(true), std::optional<bool>(false)}) {
    std::get<RnicQpAttributes>(attr.transport).terminate = terminate;
    BOOST_TEST(check_move(NodeType::rnic, QpState::rts, attr).ok());
  }
}

BOOST_AUTO_TEST_CASE(values_outside_their_fields_are_refused) {
  const auto refused = [](QpState from, QpState to, auto spoil) {
    QpAttributes attr = full(NodeType::ib_ca, to);
    BOOST_REQUIRE(check_move(NodeType::ib_ca, from, attr).ok());
    spoil(std::get<IbQpAttributes>(attr.transport));
    const auto result = check_move(NodeType::ib_ca, from, attr);
    return !result && result.error().code == EINVAL;
  };
  using enum QpState;
  BOOST_TEST(refused(reset, init, [](auto& ib) { ib.port = 0; }));
  BOOST_TEST(refused(init, rtr, [](auto& ib) { ib.dest_qpn = 0x1000000; }));
  BOOST_TEST(refused(init, rtr, [](auto& ib) { ib.rq_psn = 0x1000000; }));
  BOOST_TEST(refused(init, rtr, [](auto& ib) { ib.path_mtu = 0; }));
  BOOST_TEST(refused(init, rtr, [](auto& ib) { ib.path_mtu = 6; }));
  BOOST_TEST(refused(init, rtr, [](auto& ib) { ib.min_rnr_timer = 32; }));
  BOOST_TEST(refused(rtr, rts, [](auto& ib) { ib.sq_psn = 0x1000000; }));
  BOOST_TEST(refused(rtr, rts, [](auto& ib) { ib.ack_timeout = 32; }));
  BOOST_TEST(refused(rtr, rts, [](auto& ib) { ib.retry_count = 8; }));
  BOOST_TEST(refused(rtr, rts, [](auto& ib) { ib.rnr_retry = 8; }));
}

}  // namespace rdma
