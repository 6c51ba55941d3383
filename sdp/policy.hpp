// Which connections may have a lane: SDP_POLICY, and the rules of SDP_CONFIG in the libsdp grammar.
#pragma once

#include <sys/socket.h>

#include "sdp/options.hpp"
#include "sdp/stream.hpp"

namespace sdp {

Family decide(const Options& options, Role role, const sockaddr_storage& local, const sockaddr_storage& remote) noexcept;

}  // namespace sdp
