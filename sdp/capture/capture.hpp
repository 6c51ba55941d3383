// SDP_PCAP=FILE: what the lanes of a process say, as a pcapng file that stock tshark and Wireshark decode, whatever the device.
//
// Each SDP message becomes the RoCEv2 packet that a network adapter would have sent, behind the CM exchange from which Wireshark
// learns which queue pairs speak SDP. Invented are the MAC addresses, the PSNs, the ICRC (zero), that nothing is acknowledged, and
// that a message of up to kMaxFrameBytes is one packet, so that it decodes whole. A longer one is Send First, Middle…, Last, of
// which the first decodes and the others must be filtered out, for Wireshark does not reassemble SDP:
//
//   tshark -2 -r FILE -Y 'infiniband_sdp && infiniband.bth.opcode in {0,4}'
//
// Bytes that the reader fetches from the sender's buffer are RDMA READ Responses (opcode 16): the reader's side shows them as they
// are read, the sender's as they are put there.
//
// Bytes that are written into a waiting reader's memory are RDMA WRITE Only (opcode 10), at address 0: the writer's side shows them
// when they are posted, the reader's behind the RdmaWrCompl by which it learns of them.
//
// Two things look malformed to Wireshark and are not: the REQ, in whose few private bytes it looks for a Hello, and Data without
// payload, behind whose header it wants a byte. All fields of such Data are shown.
//
// The file holds the bytes of the program, so only its owner may read it.
//
// Threads: every call may come from any thread. There is one mutex, under which no other is taken, so callers may hold theirs.
// Processes: the file belongs to the process that opened it; in a fork's child every call does nothing.
// Errors after open() are logged once; the capture ends and the program goes on.
#pragma once

#include <sys/socket.h>

#include <array>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <mutex>
#include <span>
#include <vector>

#include "sdp/capture/roce_frame.hpp"

namespace sdp {

class Capture {
 public:
  /// Longest SDP message that is written as one packet; a little more does not fit into IPv4's length field.
  static constexpr std::size_t kMaxFrameBytes = 65'000;
  /// add_connection() had no memory; message() ignores it.
  static constexpr std::uint32_t kNoConnection = ~0u;

  /// One lane as this process sees it. The addresses are the program's; what is neither AF_INET nor AF_INET6 is shown as 127.0.0.1.
  struct Endpoint {
    sockaddr_storage local{};
    sockaddr_storage remote{};
    std::uint32_t local_qpn = 0;  ///< 24 bits; 0 and 1, which belong to management, are shown as 0xFFFFF0 and 0xFFFFF1
    std::uint32_t remote_qpn = 0;
    bool active = false;  ///< this side sends Hello
  };

  /// Moves our descriptor out of the program's way and returns the one to use. See open().
  using AdoptFd = int (*)(int fd) noexcept;

  /// Creates or empties the regular file `path`, in which "%p" stands for the process id and "%%" for a percent sign. Null, and a
  /// log line with the reason, when that cannot be done or another process is writing there. `adopt`: what the caller does with
  /// descriptors that the program must not meet; null leaves it where the kernel put it.
  static std::unique_ptr<Capture> open(const char* path, AdoptFd adopt = nullptr) noexcept;
  ~Capture();
  Capture(const Capture&) = delete;
  Capture& operator=(const Capture&) = delete;

  /// Writes the lane's CM exchange and names the lane for message(). May allocate.
  std::uint32_t add_connection(const Endpoint&) noexcept;
  /// The name may be given to another lane from now on.
  void remove_connection(std::uint32_t conn) noexcept;

  /// One SDP message, sent (`outgoing`) or received: base and extended header, then the payload. Call in the order of the lane.
  /// An unknown `conn` is ignored. Does not allocate. Reaches the file at once if it is anything but Data, so that a file left by a
  /// killed program tells its story; Data at the latest with the first message after kFlushNanos.
  void message(std::uint32_t conn, bool outgoing, std::span<const std::byte> header, std::span<const std::byte> payload) noexcept;

  /// Bytes that need no message: fetched from the peer's memory, or put (`outgoing`) where the peer will fetch them.
  void read_response(std::uint32_t conn, bool outgoing, std::span<const std::byte> bytes) noexcept;

  /// Bytes written into memory that the reader has advertised.
  void write(std::uint32_t conn, bool outgoing, std::span<const std::byte> bytes) noexcept;

  /// What is buffered goes to the file now.
  void flush() noexcept;
  /// Flushes and ends the capture, as the destructor does. Later calls do nothing.
  void close() noexcept;
  /// In a fork's child, while it has one thread: gives the inherited descriptor back, and with the parent's end the lock on the
  /// file, so that the child may open a capture of its own. Does nothing in the process that opened this one.
  void abandon_in_child() noexcept;

 private:
  static constexpr std::size_t kBufferBytes = 256 * 1024;
  static constexpr std::int64_t kFlushNanos = 50'000'000;
  /// What one packet of a longer message carries: whole pages, as a path's MTU would have it.
  static constexpr std::size_t kSegmentBytes = 15 * 4096;

  struct Connection {
    bool used = false;
    bool v4 = false;
    capture::End local, remote;
    std::uint32_t local_psn = 0, remote_psn = 0;  ///< of the next packet of each side
  };

  Capture(int fd, std::int32_t pid, std::uint64_t device, std::uint64_t inode) noexcept;
  bool foreign_process() const noexcept;
  Connection* find_locked(std::uint32_t conn) noexcept;
  void maybe_flush_locked() noexcept;
  template <class HeaderOf>
  void write_packets(std::uint32_t conn, bool outgoing, std::uint8_t opcode, std::span<const std::byte> bytes,
                     HeaderOf header_of) noexcept;
  void write_cm_locked(const Connection&, bool active) noexcept;
  void write_packet_locked(Connection&, bool outgoing, std::uint8_t opcode, std::span<const std::byte> header,
                           std::span<const std::byte> payload) noexcept;
  std::byte* room_locked(std::size_t bytes) noexcept;
  void flush_locked() noexcept;
  bool still_our_file_locked() const noexcept;
  void stop_locked(const char* why, int code) noexcept;

  const std::int32_t pid_;
  /// Of our file: should the program close our descriptor and get the number for a file of its own, nothing is written to that.
  const std::uint64_t device_, inode_;

  std::mutex mutex_;  ///< guards all that follows
  int fd_;            ///< -1: ended
  std::uint64_t file_bytes_ = 0;
  std::int64_t last_flush_ = 0;
  std::uint32_t exchanges_ = 0;  ///< CM exchanges written; makes their ids differ
  std::vector<Connection> connections_;
  std::size_t used_ = 0;
  std::array<std::byte, kBufferBytes> buffer_;
};

}  // namespace sdp
