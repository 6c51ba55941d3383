#include "rdma_core/cm/connection_manager.hpp"

namespace rdma::cm {

const char* to_string(Reason reason) noexcept {
  switch (reason) {
    case Reason::none:
      return "none";
    case Reason::no_peer:
      return "nobody offers";
    case Reason::wrong_owner:
      return "not the owner of the other end";
    case Reason::version_mismatch:
      return "version mismatch";
    case Reason::refused:
      return "refused";
    case Reason::no_resources:
      return "no resources";
    case Reason::bad_message:
      return "bad message";
    case Reason::timed_out:
      return "timed out";
    case Reason::peer_died:
      return "peer died";
    case Reason::unproven:
      return "the two ends could not show that they hold the same connection";
    case Reason::elsewhere:
      return "the other end is not on this host";
  }
  return "?";
}

}  // namespace rdma::cm
