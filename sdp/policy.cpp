#include "sdp/policy.hpp"

namespace sdp {

Family decide(const Options& options, Role, const sockaddr_storage&, const sockaddr_storage&) noexcept { return options.policy; }

}  // namespace sdp
