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
// What is proved: the request carries the token of an offer that was sent to the server's host for this very connection, and comes
// from that host's address. Not: which process there has read the offer (any user may take a free port above 1023 of RDMA_PS_IB or
// UDP). Hence Caps::proves_owner is false: whoever holds the anchor must ask over it.
//
// rdma_connect() of an RNIC may block for minutes: a thread of its own makes the call.
#pragma once

#include <functional>
#include <memory>

#include "rdma_core/base/result.hpp"
#include "rdma_core/cm/connection_manager.hpp"

namespace rdma::cm {

/// The device that libibverbs knows by that name, opened by this process itself; nullptr: not one to be used. librdmacm's own
/// contexts are never used for a QP: a fork's child would have its parent's.
using FindDevice = std::function<Device*(const char* name)>;
/// The kernel says that the device is to go; see ConnectionManager::devices_changed().
using DeviceGoes = std::function<void(Device&)>;

/// Errors: ENODEV, EACCES: no connection manager in this kernel, or not for us; EMFILE.
Result<std::unique_ptr<ConnectionManager>> make_ib_cm(FindDevice find_device, DeviceGoes device_goes = {});
Result<std::unique_ptr<ConnectionManager>> make_rnic_cm(FindDevice find_device, DeviceGoes device_goes = {});

}  // namespace rdma::cm
