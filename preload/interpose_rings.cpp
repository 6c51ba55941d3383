// liburing's ways to a ring. The library makes its system calls inline; these names are where it can be seen in time.
//
// A ring that it makes is followed (sdp/rings.hpp) from here: each call that hands requests to the kernel, or descriptors to the
// ring's table, is looked at first.
#include <dlfcn.h>
#include <signal.h>

#include <atomic>
#include <cerrno>
#include <type_traits>
#include <utility>

#include "preload/dispatch.hpp"
#include "preload/ring_requests.hpp"
#include "preload/runtime.hpp"
#include "rdma_core/base/user_memory.hpp"
#include "sdp/engine.hpp"

struct io_uring_cqe;
struct io_uring_probe;
struct __kernel_timespec;

namespace {

/// liburing may be out of our sight: loaded with a plugin, for that alone.
void* find(const char* name) noexcept {
  void* found = preload::next_symbol(name);
  if (found == nullptr)
    if (void* const liburing = dlopen("liburing.so.2", RTLD_LAZY | RTLD_NOLOAD)) found = dlsym(liburing, name);
  return found;
}

/// liburing's function of that name. It stays loaded.
template <class Function>
class Real;
template <class Result, class... Args>
class Real<Result(Args...) noexcept> {
 public:
  explicit constexpr Real(const char* name) noexcept : name_(name) {}
  Result operator()(Args... args) noexcept {
    void* found = found_.load(std::memory_order_acquire);
    if (found == nullptr) found_.store(found = find(name_), std::memory_order_release);
    if (found != nullptr) return reinterpret_cast<Result (*)(Args...)>(found)(args...);
    if constexpr (std::is_void_v<Result>)
      return;
    else if constexpr (std::is_pointer_v<Result>)
      return nullptr;
    else
      return static_cast<Result>(-ENOSYS);
  }

 private:
  const char* name_;
  std::atomic<void*> found_{nullptr};
};

/// A later liburing may have names that are not here, by which requests reach the kernel.
bool know_this_liburing() noexcept {
  constexpr int kMajor = 2, kMinor = 14;
  static const bool known = [] {
    const auto major = reinterpret_cast<int (*)()>(find("io_uring_major_version"));
    const auto minor = reinterpret_cast<int (*)()>(find("io_uring_minor_version"));
    return (major == nullptr && minor == nullptr) ||
           (major != nullptr && minor != nullptr && major() == kMajor && minor() <= kMinor);
  }();
  return known;
}

/// liburing makes a ring, or takes one apart. The names by which it does so within itself are these too.
class Inside {
 public:
  Inside() noexcept : change_(sdp::followed_rings()), outer_(std::exchange(is_inside, true)) {}
  ~Inside() { is_inside = outer_; }
  Inside(const Inside&) = delete;
  Inside& operator=(const Inside&) = delete;
  static bool already() noexcept { return is_inside; }

 private:
  static thread_local bool is_inside;
  sdp::FollowedRings::Change change_;
  const bool outer_;
};
constinit thread_local bool Inside::is_inside __attribute__((tls_model("initial-exec"))) = false;

template <class Make>
int make_ring(io_uring* ring, unsigned flags, Make make) noexcept {
  if (Inside::already() || !sdp::engine::rings_matter()) return make();
  if (!preload::can_follow_ring(flags) || !know_this_liburing()) {
    preload::before_ring();
    return make();
  }
  const Inside here;
  const int result = make();
  if (result == 0 && !sdp::followed_rings().add(preload::memory_of(*ring))) preload::before_ring();
  return result;
}

template <class Function, class... Args>
int make_strange_ring(Function& make, Args... args) noexcept {
  if (!Inside::already()) preload::before_ring();
  return make(args...);
}

/// Makes a ring and takes it apart.
template <class Function, class... Args>
auto make_for_a_moment(Function& make, Args... args) noexcept {
  const Inside here;
  return make(args...);
}

bool is_followed(const io_uring& ring) noexcept { return sdp::followed_rings().has(preload::memory_of(ring).requests); }

template <class Function, class... Args>
int submit(Function& real, io_uring* ring, Args... args) noexcept {
  if (sdp::engine::rings_matter() && !(is_followed(*ring) && preload::asks_for_files_only(*ring))) preload::before_ring();
  return real(ring, args...);
}

void before_files(const int* fds, unsigned count) noexcept {
  if (!sdp::engine::rings_matter() || !rdma::is_readable(fds, count * sizeof *fds)) return;
  if (!preload::are_files(fds, count)) preload::before_ring();
}

}  // namespace

// --- rings come and go

SDP_EXPORT int io_uring_queue_init(unsigned entries, io_uring* ring, unsigned flags) noexcept {
  static constinit Real<decltype(io_uring_queue_init)> real("io_uring_queue_init");
  return make_ring(ring, flags, [=] { return real(entries, ring, flags); });
}
SDP_EXPORT int io_uring_queue_init_params(unsigned entries, io_uring* ring, io_uring_params* params) noexcept {
  static constinit Real<decltype(io_uring_queue_init_params)> real("io_uring_queue_init_params");
  return make_ring(ring, params->flags, [=] { return real(entries, ring, params); });
}
SDP_EXPORT int io_uring_queue_init_mem(unsigned entries, io_uring* ring, io_uring_params* params, void* memory,
                                       size_t size) noexcept {
  static constinit Real<decltype(io_uring_queue_init_mem)> real("io_uring_queue_init_mem");
  return make_strange_ring(real, entries, ring, params, memory, size);
}
SDP_EXPORT int io_uring_queue_mmap(int fd, io_uring_params* params, io_uring* ring) noexcept {
  static constinit Real<decltype(io_uring_queue_mmap)> real("io_uring_queue_mmap");
  return make_strange_ring(real, fd, params, ring);
}
SDP_EXPORT int io_uring_setup(unsigned entries, io_uring_params* params) noexcept {
  static constinit Real<decltype(io_uring_setup)> real("io_uring_setup");
  return make_strange_ring(real, entries, params);
}
SDP_EXPORT int io_uring_resize_rings(io_uring* ring, io_uring_params* params) noexcept {
  static constinit Real<decltype(io_uring_resize_rings)> real("io_uring_resize_rings");
  return make_strange_ring(real, ring, params);
}
SDP_EXPORT io_uring_probe* io_uring_get_probe() noexcept {
  static constinit Real<decltype(io_uring_get_probe)> real("io_uring_get_probe");
  return make_for_a_moment(real);
}
SDP_EXPORT ssize_t io_uring_mlock_size(unsigned entries, unsigned flags) noexcept {
  static constinit Real<decltype(io_uring_mlock_size)> real("io_uring_mlock_size");
  return make_for_a_moment(real, entries, flags);
}
SDP_EXPORT ssize_t io_uring_mlock_size_params(unsigned entries, io_uring_params* params) noexcept {
  static constinit Real<decltype(io_uring_mlock_size_params)> real("io_uring_mlock_size_params");
  return make_for_a_moment(real, entries, params);
}
SDP_EXPORT void io_uring_queue_exit(io_uring* ring) noexcept {
  static constinit Real<decltype(io_uring_queue_exit)> real("io_uring_queue_exit");
  const Inside here;
  const std::uintptr_t requests = preload::memory_of(*ring).requests;
  real(ring);
  sdp::followed_rings().remove(requests);
}

// --- requests, and what may hand them over on the way

SDP_EXPORT int io_uring_submit(io_uring* ring) noexcept {
  static constinit Real<decltype(io_uring_submit)> real("io_uring_submit");
  return submit(real, ring);
}
SDP_EXPORT int io_uring_submit_and_wait(io_uring* ring, unsigned count) noexcept {
  static constinit Real<decltype(io_uring_submit_and_wait)> real("io_uring_submit_and_wait");
  return submit(real, ring, count);
}
SDP_EXPORT int io_uring_submit_and_get_events(io_uring* ring) noexcept {
  static constinit Real<decltype(io_uring_submit_and_get_events)> real("io_uring_submit_and_get_events");
  return submit(real, ring);
}
SDP_EXPORT int io_uring_submit_and_wait_timeout(io_uring* ring, io_uring_cqe** cqe, unsigned count, __kernel_timespec* timeout,
                                                sigset_t* mask) noexcept {
  static constinit Real<decltype(io_uring_submit_and_wait_timeout)> real("io_uring_submit_and_wait_timeout");
  return submit(real, ring, cqe, count, timeout, mask);
}
SDP_EXPORT int io_uring_submit_and_wait_min_timeout(io_uring* ring, io_uring_cqe** cqe, unsigned count, __kernel_timespec* timeout,
                                                    unsigned least, sigset_t* mask) noexcept {
  static constinit Real<decltype(io_uring_submit_and_wait_min_timeout)> real("io_uring_submit_and_wait_min_timeout");
  return submit(real, ring, cqe, count, timeout, least, mask);
}
SDP_EXPORT int io_uring_submit_and_wait_reg(io_uring* ring, io_uring_cqe** cqe, unsigned count, int index) noexcept {
  static constinit Real<decltype(io_uring_submit_and_wait_reg)> real("io_uring_submit_and_wait_reg");
  return submit(real, ring, cqe, count, index);
}
SDP_EXPORT int io_uring_wait_cqes(io_uring* ring, io_uring_cqe** cqe, unsigned count, __kernel_timespec* timeout,
                                  sigset_t* mask) noexcept {
  static constinit Real<decltype(io_uring_wait_cqes)> real("io_uring_wait_cqes");
  return submit(real, ring, cqe, count, timeout, mask);
}
SDP_EXPORT int io_uring_wait_cqes_min_timeout(io_uring* ring, io_uring_cqe** cqe, unsigned count, __kernel_timespec* timeout,
                                              unsigned least, sigset_t* mask) noexcept {
  static constinit Real<decltype(io_uring_wait_cqes_min_timeout)> real("io_uring_wait_cqes_min_timeout");
  return submit(real, ring, cqe, count, timeout, least, mask);
}
SDP_EXPORT int io_uring_wait_cqe_timeout(io_uring* ring, io_uring_cqe** cqe, __kernel_timespec* timeout) noexcept {
  static constinit Real<decltype(io_uring_wait_cqe_timeout)> real("io_uring_wait_cqe_timeout");
  return submit(real, ring, cqe, timeout);
}
SDP_EXPORT int __io_uring_get_cqe(io_uring* ring, io_uring_cqe** cqe, unsigned requests, unsigned count, sigset_t* mask) noexcept {
  static constinit Real<decltype(__io_uring_get_cqe)> real("__io_uring_get_cqe");
  return requests != 0 ? submit(real, ring, cqe, requests, count, mask) : real(ring, cqe, requests, count, mask);
}
SDP_EXPORT int io_uring_enter(unsigned fd, unsigned requests, unsigned wanted, unsigned flags, sigset_t* mask) noexcept {
  static constinit Real<decltype(io_uring_enter)> real("io_uring_enter");
  if (requests != 0) preload::before_ring();
  return real(fd, requests, wanted, flags, mask);
}
SDP_EXPORT int io_uring_enter2(unsigned fd, unsigned requests, unsigned wanted, unsigned flags, sigset_t* mask,
                               size_t size) noexcept {
  static constinit Real<decltype(io_uring_enter2)> real("io_uring_enter2");
  if (requests != 0) preload::before_ring();
  return real(fd, requests, wanted, flags, mask, size);
}
SDP_EXPORT int io_uring_register_sync_msg(io_uring_sqe* request) noexcept {
  static constinit Real<decltype(io_uring_register_sync_msg)> real("io_uring_register_sync_msg");
  preload::before_ring();
  return real(request);
}

// --- a ring's own table of descriptors

SDP_EXPORT int io_uring_register_files(io_uring* ring, const int* fds, unsigned count) noexcept {
  static constinit Real<decltype(io_uring_register_files)> real("io_uring_register_files");
  before_files(fds, count);
  return real(ring, fds, count);
}
SDP_EXPORT int io_uring_register_files_tags(io_uring* ring, const int* fds, const __u64* tags, unsigned count) noexcept {
  static constinit Real<decltype(io_uring_register_files_tags)> real("io_uring_register_files_tags");
  before_files(fds, count);
  return real(ring, fds, tags, count);
}
SDP_EXPORT int io_uring_register_files_update(io_uring* ring, unsigned at, const int* fds, unsigned count) noexcept {
  static constinit Real<decltype(io_uring_register_files_update)> real("io_uring_register_files_update");
  before_files(fds, count);
  return real(ring, at, fds, count);
}
SDP_EXPORT int io_uring_register_files_update_tag(io_uring* ring, unsigned at, const int* fds, const __u64* tags,
                                                  unsigned count) noexcept {
  static constinit Real<decltype(io_uring_register_files_update_tag)> real("io_uring_register_files_update_tag");
  before_files(fds, count);
  return real(ring, at, fds, tags, count);
}
SDP_EXPORT int io_uring_register(unsigned fd, unsigned what, const void* argument, unsigned count) noexcept {
  static constinit Real<decltype(io_uring_register)> real("io_uring_register");
  preload::before_ring();
  return real(fd, what, argument, count);
}
