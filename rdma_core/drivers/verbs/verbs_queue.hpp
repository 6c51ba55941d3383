// SharedQueue: a completion queue of the device's, which several Cqs share. Lanes by the hundred then need one request for an
// announcement before a sleep, and few of what a device has few of (max_cq). Private to drivers/verbs.
//
// Who looks takes what is there, for all Cqs, and puts each completion where its Cq finds it: nobody waits for another Cq's user to
// look. It wakes nobody: the device announces what came after the request that every sleeper made, and progress() then wakes those
// whose completions have been taken meanwhile. A queue is never overrun: it has an entry for all that its Cqs may hold, and a Cq
// for all that its Qps may post.
//
// Threads: enter(), leave() and announced() by the one that makes and destroys Cqs; the rest by any.
#pragma once

#include <pthread.h>

#include <atomic>
#include <cstdint>
#include <memory>
#include <vector>

struct ibv_context;
struct ibv_cq;
struct ibv_comp_channel;

namespace rdma::verbs {

class VerbsCq;

/// What a request's number carries to its completion, which says little else of a request that failed.
constexpr std::uint64_t kReceive = std::uint64_t{1} << 63;   ///< it was in the receive queue
constexpr std::uint64_t kUnwanted = std::uint64_t{1} << 62;  ///< nobody is to hear of its success
constexpr std::uint64_t kNumber = kUnwanted - 1;

/// A completion as the device tells it.
struct Told {
  std::uint64_t wr_id = 0;
  std::uint32_t byte_len = 0;
  std::uint32_t qpn : 24 = 0;
  std::uint32_t status : 8 = 0;  ///< ibv_wc_status
};

class SharedQueue {
 public:
  /// nullptr: errno says why. `channel` may be nullptr.
  static std::shared_ptr<SharedQueue> make(ibv_context* context, std::uint32_t depth, ibv_comp_channel* channel);
  ~SharedQueue();
  SharedQueue(const SharedQueue&) = delete;
  SharedQueue& operator=(const SharedQueue&) = delete;

  ibv_cq* cq() const noexcept { return cq_; }
  std::uint32_t depth() const noexcept { return depth_; }
  std::uint32_t room() const noexcept { return depth_ - taken_; }
  bool is_unused() const noexcept { return users_.empty(); }
  void enter(VerbsCq& user, std::uint32_t depth);
  void leave(VerbsCq& user, std::uint32_t depth);

  /// Completions of the Qp go to these from here on; nullptr: that half of them comes to another queue.
  void attach(std::uint32_t qpn, VerbsCq* sends, VerbsCq* receives);
  void detach(std::uint32_t qpn);

  /// One thread at a time. Held for a poll of the device's queue, never over a system call: others need not wait long. False: this
  /// is a signal handler that has interrupted its own thread inside; it finds nothing until that goes on.
  class Guard {
   public:
    explicit Guard(const SharedQueue& queue) noexcept;
    ~Guard() {
      if (entered_) inside_.store(0, std::memory_order_release);
    }
    Guard(const Guard&) = delete;
    Guard& operator=(const Guard&) = delete;
    explicit operator bool() const noexcept { return entered_; }

   private:
    std::atomic<pthread_t>& inside_;
    bool entered_ = false;
  };
  void collect() const noexcept;  ///< takes all that is there; under the Guard

  /// After this every completion that comes is announced, or collected by an announced() that is due. The caller has armed its Cq.
  void request() noexcept;
  std::uint8_t announced() noexcept;  ///< by the channel; returns the Wake bits that its Cqs were armed for

 private:
  struct Owner {
    std::uint32_t qpn;
    VerbsCq* sends;
    VerbsCq* receives;
  };
  SharedQueue() = default;
  std::uint8_t wake_due() noexcept;

  ibv_cq* cq_ = nullptr;
  std::uint32_t depth_ = 0, taken_ = 0;  ///< entries
  std::vector<VerbsCq*> users_;
  mutable std::atomic<pthread_t> inside_{0};  ///< who has the Guard of the users' rings and of what follows; 0: nobody
  std::vector<Owner> owners_;                 ///< by qpn

  // A request may be left out if one was made, from its begin to its end, since the last announcement was taken: then either it is
  // still in force, or its announcement is still to be taken, after which announced() asks again for whoever sleeps.
  static constexpr std::uint64_t kAsking = 1, kAsked = 2, kAnnounced = 4;  ///< the first two are a state, the third counts
  std::atomic<std::uint64_t> request_{0};
};

}  // namespace rdma::verbs
