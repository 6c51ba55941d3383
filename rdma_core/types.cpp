#include "rdma_core/types.hpp"

namespace rdma {

const char* to_string(NodeType type) noexcept {
  switch (type) {
    case NodeType::ib_ca:
      return "ib_ca";
    case NodeType::ib_switch:
      return "ib_switch";
    case NodeType::ib_router:
      return "ib_router";
    case NodeType::rnic:
      return "rnic";
  }
  return "?";
}

const char* to_string(LinkLayer layer) noexcept {
  switch (layer) {
    case LinkLayer::infiniband:
      return "infiniband";
    case LinkLayer::ethernet:
      return "ethernet";
    case LinkLayer::memory:
      return "memory";
  }
  return "?";
}

}  // namespace rdma
