// What we know of one of the program's epoll instances: its members that are streams of ours.
//
// The kernel's epoll stays the truth. A member without a lane stands in it with the program's own events and data. While a stream
// has a lane the kernel's entry watches only what the anchor still carries (always error and hang-up) and its data is a tag of
// ours, so that results can be told apart; readiness of the lane is added by wait(). The bell wakes a sleeper. A one-shot member
// has our tag from the beginning: whether it has fired must be known when a lane comes, or that would arm it again.
//
// The kernel's instance is one for a fork's parent and child, and so is what their tags mean, as long as both know the member: who
// closes a connection that another process may go on with gives the entry back to the program's own data before.
//
// Locks: one per set, held over epoll_ctl of a member and over collecting, never while sleeping. Order: set, then stream.
#pragma once

#include <sys/epoll.h>

#include <atomic>
#include <cstdint>
#include <mutex>
#include <unordered_map>
#include <vector>

#include "sdp/stream.hpp"

namespace preload {

class EpollSet {
 public:
  static EpollSet* find(int epfd) noexcept;
  static EpollSet* make(int epfd) noexcept;
  static void drop(int epfd) noexcept;
  static void duplicate(int from, int to) noexcept;
  /// Round a fork, with those of fd_table.hpp between: the child goes on with the sets, which hold its own streams then.
  static void before_fork() noexcept;
  static void after_fork_parent() noexcept;
  static void inherit() noexcept;
  static void on_lane_changed(sdp::Stream) noexcept;  ///< sdp::engine::LaneListener
  /// Before `fd` is closed. `last`: nothing else names the connection, and the kernel drops it from every set; else it stays in
  /// them under a number that means nothing any more.
  static void on_closing(int fd, sdp::Stream, bool last) noexcept;

  /// epoll_ctl for a stream of ours, `event` as the program gave it. 0, or -errno.
  int add(int fd, sdp::Stream stream, const epoll_event& event) noexcept;
  /// True: handled (a member whose kernel entry is not the program's); `result` as of epoll_ctl.
  bool modify(int fd, const epoll_event& event, int* result) noexcept;
  void removed(int fd) noexcept;

  bool names(int epfd) const noexcept { return epfd_.load(std::memory_order_relaxed) == epfd; }
  bool has_members() const noexcept { return members_in_use_.load(std::memory_order_acquire) != 0; }
  /// As epoll_pwait(), but -errno. Nobody may wait past it: what the kernel tells may have our tag, or be the bell.
  /// `timeout_ns`: -1: for ever.
  int wait(epoll_event* events, int max, std::int64_t timeout_ns, const sigset_t* mask);
  /// Somebody waits for this set itself (another epoll, poll, select): its lanes stay armed between its own waits, so that the bell
  /// makes it readable.
  void nest() noexcept;

 private:
  static constexpr int kFree = -1, kOrphan = -2;  ///< in place of a descriptor; an orphan's was closed, a duplicate keeps it in
  struct Member {
    sdp::Stream stream;
    int fd = kFree;
    std::uint32_t events = 0;  ///< as the program asked
    std::uint64_t data = 0;
    std::uint32_t kernel_mask = 0;  ///< what the kernel's entry watches
    bool lane = false;              ///< wait() has to look at the stream itself; counted by lanes_
    bool tagged = false;            ///< the kernel's entry has our tag
    bool disabled = false;          ///< EPOLLONESHOT has fired
    bool look = true;               ///< the last look found something, or nobody has looked since the member was added or changed
    /// The edges at that look: other calls of the program may have taken messages in since, or found that it can write.
    std::uint64_t looked_rx = ~0ULL, looked_tx = ~0ULL;
    std::uint64_t seen_rx = ~0ULL, seen_tx = ~0ULL;  ///< edges reported
  };

  explicit EpollSet(int epfd) noexcept : epfd_(epfd) {}
  void sync(Member& member, std::uint32_t index) noexcept;
  void is_entered(Member& member, std::uint32_t index, const epoll_event& entry, bool lane) noexcept;
  static void arm_for_others(const Member& member) noexcept;
  epoll_event kernel_entry(const Member& member, std::uint32_t index, bool lane) const noexcept;
  void count_lane(Member& member, bool lane) noexcept;
  void ensure_bell() noexcept;
  int collect(epoll_event* events, int max) noexcept;
  int merge(epoll_event* events, int lanes, int count) noexcept;
  static std::uint32_t ready_now(const Member& member) noexcept;
  static bool may_have_changed(const sdp::Grace::Look& look, const Member& member) noexcept;
  bool maybe_ready() noexcept;
  Member* of(int fd) noexcept;
  void orphan(Member& member) noexcept;
  void give_back(Member& member) noexcept;
  void release(Member& member) noexcept;
  std::uint32_t index_of(const Member& member) const noexcept;
  long ask_kernel(epoll_event* events, int max, const sigset_t* mask) const;
  int wait_once(epoll_event* events, int max, std::int64_t timeout_ns, const sigset_t* mask);
  void arm() noexcept;
  void leave_armed() noexcept;

  std::atomic<int> epfd_;  ///< one that names the instance
  std::atomic<int> bell_{-1};
  std::mutex mutex_;
  std::vector<Member> members_;
  std::vector<std::uint32_t> free_;  ///< indices of members that are nobody's
  std::unordered_map<int, std::uint32_t> by_fd_;
  std::uint32_t orphans_ = 0;
  std::atomic<std::uint32_t> members_in_use_{0};
  std::atomic<std::uint32_t> lanes_{0};
  std::atomic<std::uint32_t> sleepers_{0};
  std::atomic<bool> nested_{false};
  std::uint32_t next_ = 0;  ///< whose turn it is when `max` is small
  std::uint32_t since_kernel_ = 0;
};

}  // namespace preload
