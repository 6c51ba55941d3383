// What lies in a segment: the shared memory that one process receives into from one peer process. This comment is the
// specification.
//
// A segment is a sealed memfd of fixed size, made by its owner, mapped whole by the owner and by exactly one peer, at different
// addresses: it holds offsets, never pointers. Everything that the other side can write is untrusted: copied once, checked, used.
//
//   0x000000  SegmentHeader   written once, before the memfd is handed over
//   0x000040  ProgramWindow   whether the peer can read the owner's memory outside of the segment
//   0x001000  MrEntry[1024]   what the peer may reach by RDMA Read and Write; written by the owner, but for `taken`
//   0x00C000  pages           QP pages and extents (Pd::map_extent), cut by the owner in whole pages; free pages read as zeros
//
// A QP of the owner has one QP page; its number (Qpn) is the page's offset / 4096. It starts with a ShmQpPage:
//
//   0x000 magic, depth                    owner, at creation
//   0x040 posted                          owner, release: receives posted since creation; grows for ever
//   0x080 armed, wake_word, closed        owner arms (bits of rdma::Wake), a sender that rings takes the bits with an exchange and
//                                         adds 1 to wake_word (a futex); closed is set once: no message may start from then on
//   0x0C0 sending                         owner, as a sender on this QP: 1 while it looks at or writes into the peer's segment
//   0x0C4 fences                          owner, as a sender: 1 while it passes a fence between a message and its look at `armed`
//   0x100 RqEntry[depth]                  owner: entry (n - 1) % depth is the buffer of message n; written before `posted` says so
//
// Message n (counted from 1) goes into the buffer of its entry. The 8 bytes in front of the buffer are its flag word:
//
//   63        62..32              31..0
//   | 1 | n & 0x7fffffff | bytes of the message |     stored last, with release; a zero never is a message
//
// The flag, a 16-byte message header and a small payload share a cache line when the flag's address is a multiple of 64. A message
// that is longer than its buffer has a flag but no bytes: both ends know the length, and both QPs go to error.
//
// Wake-ups: the receiver arms, then makes every core that runs a peer pass a barrier (membarrier), then looks at the flag once more
// and sleeps. The sender stores the flag, then looks at `armed`, with no fence of its own: many messages, few sleeps. Where it is
// the other way round a barrier for each sleep, which interrupts whatever runs on the other cores, costs far more than a fence for
// each message. So a sender that has rung, and each at first, says `fences` and does so for its next kFencedSends messages; a
// receiver that has armed, passed a fence and then finds `fences` set needs no barrier. A sender that leaves off clears `fences`,
// passes a last fence and looks at `armed`: it sees what was armed by a receiver that still found `fences` set.
//
// Taking a buffer back works the same way: the owner sets `closed`, passes the barrier and waits until the peer's `sending` is 0; a
// sender stores `sending`, then looks at `closed`. Where membarrier is not to be had, senders always fence, there too (Hello's
// flags say so).
//
// The owner's program memory is read by process_vm_readv(2), in the reader's context. A process id says nothing lasting about who
// is there: it is given anew, and exec changes what runs. The call takes hold of one address space for all of its pieces; so each
// call's first piece is the Proof, which no other address space holds: half of it is the reader's own choice, and it lies in a page
// that reads as zeros in a fork's child. The reader tries that when its first QP is connected, and leaves word in `answer`.
//
// Who withdraws a region waits for nobody: it exchanges `taken` for 0 and knows how far the peer had come. The reader adds to it
// behind each piece, with a compare-and-exchange, and drops the piece if another word is there.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>

namespace rdma::shm {

inline constexpr std::size_t kPageBytes = 4096;
inline constexpr std::uint32_t kSegmentMagic = 0x53'44'50'31;  // "SDP1"
inline constexpr std::uint32_t kQpMagic = 0x51'50'53'48;
inline constexpr std::uint32_t kLayoutVersion = 3;
inline constexpr std::size_t kMrCapacity = 1024;  ///< a power of two; entry 0 stays empty, so that key 0 never works
inline constexpr std::uint32_t kMaxDepth = 1024;  ///< receives of a QP; a power of two
inline constexpr std::size_t kMinSegmentBytes = 1u << 20;
inline constexpr std::size_t kMaxSegmentBytes = 1u << 30;  ///< a larger one from a peer is refused

struct ProcessId {
  std::uint64_t word[2] = {};
  friend bool operator==(const ProcessId&, const ProcessId&) = default;
};

struct SegmentHeader {
  std::uint32_t magic;
  std::uint32_t version;
  std::uint64_t bytes;  ///< of the whole segment
  ProcessId owner;
  std::uint32_t mr_capacity;
  std::uint32_t mr_offset;
  std::uint32_t page_bytes;
  std::uint32_t first_page;  ///< offset of the first page that the owner cuts
};
static_assert(sizeof(SegmentHeader) == 48);

/// What the owner puts into memory of its own for the peer to find.
struct Proof {
  ProcessId link;    ///< ShmLink::nonce
  ProcessId reader;  ///< the peer's, as its Hello says
  friend bool operator==(const Proof&, const Proof&) = default;
};

struct ProgramWindow {
  std::atomic<std::uint64_t> proof;   ///< address of the owner's Proof in its address space; 0: nothing may be read
  std::atomic<std::uint32_t> answer;  ///< by the peer: 0 not tried yet, kCanRead, else an errno
};
inline constexpr std::uint32_t kCanRead = ~0U;
inline constexpr std::size_t kWindowOffset = 64;
static_assert(sizeof(SegmentHeader) <= kWindowOffset);

struct MrEntry {
  std::atomic<std::uint64_t> base;    ///< what remote_addr is for the first byte
  std::atomic<std::uint64_t> offset;  ///< of the first byte in the segment; kProgramMemory: `base` is its address in the owner
  std::atomic<std::uint64_t> bytes;
  std::atomic<std::uint32_t> access;  ///< bits of rdma::Access
  std::atomic<std::uint32_t> key;     ///< 0: empty. Its low bits are the entry's index
  std::atomic<std::uint64_t> taken;   ///< of the program's memory: its key, then 32 bits of how many bytes the peer has read
};
static_assert(sizeof(MrEntry) == 40);
inline constexpr std::uint64_t kProgramMemory = ~std::uint64_t{0};
inline constexpr std::uint32_t kKeyKind = 3u << 30;     ///< these bits of a key are kProgramKey's if it is of the program's memory,
inline constexpr std::uint32_t kProgramKey = 2u << 30;  ///< and zero in all others
constexpr bool is_program_key(std::uint32_t key) noexcept { return (key & kKeyKind) == kProgramKey; }
constexpr std::uint64_t taken_word(std::uint32_t key, std::uint32_t bytes) noexcept {
  return static_cast<std::uint64_t>(key) << 32 | bytes;
}

struct RqEntry {
  std::atomic<std::uint64_t> offset;  ///< of the buffer in the segment, a multiple of 8, at least 8
  std::atomic<std::uint32_t> bytes;
  std::uint32_t pad;
};
static_assert(sizeof(RqEntry) == 16);

struct ShmQpPage {
  std::uint32_t magic;
  std::uint32_t depth;  ///< a power of two, at most kMaxDepth
  alignas(64) std::atomic<std::uint64_t> posted;
  alignas(64) std::atomic<std::uint32_t> armed;
  std::atomic<std::uint32_t> wake_word;
  std::atomic<std::uint32_t> closed;
  alignas(64) std::atomic<std::uint32_t> sending;
  std::atomic<std::uint32_t> fences;
  alignas(64) RqEntry rq[1];  ///< depth of them
};
static_assert(offsetof(ShmQpPage, posted) == 0x40 && offsetof(ShmQpPage, armed) == 0x80);
static_assert(offsetof(ShmQpPage, sending) == 0xC0 && offsetof(ShmQpPage, fences) == 0xC4 && offsetof(ShmQpPage, rq) == 0x100);
static_assert(std::atomic<std::uint64_t>::is_always_lock_free && std::atomic<std::uint32_t>::is_always_lock_free,
              "shared between processes");

inline constexpr std::size_t kMrOffset = kPageBytes;
inline constexpr std::size_t kFirstPage = 0xC000;
static_assert(kMrOffset + kMrCapacity * sizeof(MrEntry) <= kFirstPage && kFirstPage % kPageBytes == 0);

constexpr std::size_t qp_page_bytes(std::uint32_t depth) noexcept {
  return (offsetof(ShmQpPage, rq) + depth * sizeof(RqEntry) + kPageBytes - 1) & ~(kPageBytes - 1);
}

/// A T at `p`, which the layout says is there and aligned.
template <class T>
T* at(std::byte* p) noexcept {
  return static_cast<T*>(static_cast<void*>(p));
}

/// Upper half of the flag word of message `number`.
constexpr std::uint32_t flag_sequence(std::uint64_t number) noexcept {
  return 0x8000'0000u | static_cast<std::uint32_t>(number & 0x7fff'ffffu);
}
constexpr std::uint64_t flag_word(std::uint64_t number, std::uint32_t bytes) noexcept {
  return (static_cast<std::uint64_t>(flag_sequence(number)) << 32) | bytes;
}

}  // namespace rdma::shm
