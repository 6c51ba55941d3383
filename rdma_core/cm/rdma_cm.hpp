// The connection managers for RDMA devices between hosts: IbCm (InfiniBand, RoCE) and RnicCm (iWARP), by offer and dial-back.
//
//   offers: who made the TCP connection                   dials: who does the I/O on the accepted socket
//   listens on a port of the kernel's choosing            waits at the rendezvous of its local address and port
//   offer(token, that port) ---- to the rendezvous ---->
//                           <---- noted, or nobody ------
//                           <---- request(token, private data) at that port
//   reply ---------------------------------------------->
//
// The rendezvous of IbCm is a service id in RDMA_PS_IB, that of RnicCm a UDP port: an MPA request to a number that a TCP program
// may have would put bytes into a stranger's stream. The first process that waits for a port's offers has its rendezvous and passes
// on what is another's (offer_relay.hpp). No permanent listener, nothing at listen() or accept(): a daemon that drops its rights,
// or forks for each connection, needs no care.
//
// What is proved (Caps::proves_owner): the request carries the token of an offer that was sent to the server's host for this very
// connection, and comes from that host's address. As any user there may take a free port above 1023 of RDMA_PS_IB or UDP and read
// the offer, both ends also show that they know the first bytes that the connection has carried (rdma_proof.hpp, which says how far
// that goes). The server's end shows all that it has read, which must be no less than the client had sent when it offered, and what
// the client says it has read; the client's end the same bytes (rdma_evidence.hpp says when there are enough, and who waits for
// whom). Until then nobody has a key to anybody's memory.
//
// rdma_connect() of an RNIC may block for minutes: a thread of its own makes the call.
#pragma once

#include <functional>
#include <memory>

#include "rdma_core/base/result.hpp"
#include "rdma_core/cm/connection_manager.hpp"
#include "rdma_core/cm/rdma_proof.hpp"

namespace rdma::cm {

/// The device that libibverbs knows by that name, opened by this process itself; nullptr: not one to be used. librdmacm's own
/// contexts are never used for a QP: a fork's child would have its parent's.
using FindDevice = std::function<Device*(const char* name)>;
/// The kernel says that the device is to go; see ConnectionManager::devices_changed().
using DeviceGoes = std::function<void(Device&)>;

/// Errors: ENODEV, EACCES: no connection manager in this kernel, or not for us; EMFILE.
/// `secret`: ends with different ones do not come together.
Result<std::unique_ptr<ConnectionManager>> make_ib_cm(FindDevice find_device, const Secret& secret = {},
                                                      DeviceGoes device_goes = {});
Result<std::unique_ptr<ConnectionManager>> make_rnic_cm(FindDevice find_device, const Secret& secret = {},
                                                        DeviceGoes device_goes = {});

}  // namespace rdma::cm
