// An io_uring as the smallest program would make it, by whichever door: each is a way past libc's names for a socket, and only some
// of them can be seen at once.
#pragma once

#include <linux/io_uring.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cerrno>
#include <cstdint>
#include <cstring>
#include <stdexcept>

#ifdef HAVE_LIBURING
#include <liburing.h>
#endif

/// One request at a time, and its result.
class Ring {
 public:
  virtual ~Ring() = default;
  virtual int send(int fd, const void* bytes, unsigned count) = 0;
  /// Fills all of `count`, unless the end comes: the bytes so far.
  virtual int recv(int fd, void* bytes, unsigned count) = 0;
  virtual int write(int fd, const void* bytes, unsigned count) = 0;  ///< to a file, at its beginning
  virtual int read(int fd, void* bytes, unsigned count) = 0;
  /// No receive is under way any more.
  virtual void rest() {}
};

namespace doors {
inline long by_instruction(long number, long a, long b, long c, long d, long e, long f) {
  long result = 0;
  register long r10 asm("r10") = d;
  register long r8 asm("r8") = e;
  register long r9 asm("r9") = f;
  asm volatile("syscall" : "=a"(result) : "a"(number), "D"(a), "S"(b), "d"(c), "r"(r10), "r"(r8), "r"(r9) : "rcx", "r11", "memory");
  return result;
}
inline long by_libc(long number, long a, long b, long c, long d, long e, long f) {
  const long result = syscall(number, a, b, c, d, e, f);
  return result < 0 ? -errno : result;
}
}  // namespace doors

/// The kernel's interface alone, through `Call`.
template <auto Call>
class BareRing final : public Ring {
 public:
  BareRing() {
    fd_ = static_cast<int>(checked(Call(SYS_io_uring_setup, 8, arg(&params_), 0, 0, 0, 0)));
    sq_ = map(params_.sq_off.array + params_.sq_entries * sizeof(unsigned), IORING_OFF_SQ_RING);
    cq_ = map(params_.cq_off.cqes + params_.cq_entries * sizeof(io_uring_cqe), IORING_OFF_CQ_RING);
    sqes_ = static_cast<io_uring_sqe*>(map(params_.sq_entries * sizeof(io_uring_sqe), IORING_OFF_SQES));
  }
  BareRing(const BareRing&) = delete;
  BareRing& operator=(const BareRing&) = delete;
  ~BareRing() override { Call(SYS_close, fd_, 0, 0, 0, 0, 0); }

  int send(int fd, const void* bytes, unsigned count) override { return request(IORING_OP_SEND, fd, bytes, count); }
  int recv(int fd, void* bytes, unsigned count) override {
    unsigned got = 0;
    while (got < count) {
      const int n = request(IORING_OP_RECV, fd, static_cast<char*>(bytes) + got, count - got);
      if (n < 0) return n;
      if (n == 0) break;
      got += static_cast<unsigned>(n);
    }
    return static_cast<int>(got);
  }
  int write(int fd, const void* bytes, unsigned count) override { return request(IORING_OP_WRITE, fd, bytes, count); }
  int read(int fd, void* bytes, unsigned count) override { return request(IORING_OP_READ, fd, bytes, count); }

 private:
  static long arg(const void* pointer) { return reinterpret_cast<long>(pointer); }
  static long checked(long result) {
    if (result < 0) throw std::runtime_error(std::strerror(static_cast<int>(-result)));
    return result;
  }
  void* map(std::size_t bytes, long offset) {
    const long protection = PROT_READ | PROT_WRITE, flags = MAP_SHARED | MAP_POPULATE;
    return reinterpret_cast<void*>(checked(Call(SYS_mmap, 0, static_cast<long>(bytes), protection, flags, fd_, offset)));
  }
  template <class T>
  static T* at(void* base, unsigned offset) {
    return static_cast<T*>(static_cast<void*>(static_cast<char*>(base) + offset));
  }
  static std::atomic_ref<unsigned> word(void* base, unsigned offset) { return std::atomic_ref(*at<unsigned>(base, offset)); }

  int request(std::uint8_t what, int fd, const void* bytes, unsigned count) {
    const unsigned tail = word(sq_, params_.sq_off.tail).load(), mask = word(sq_, params_.sq_off.ring_mask).load();
    io_uring_sqe& sqe = sqes_[tail & mask];
    sqe = {};
    sqe.opcode = what;
    sqe.fd = fd;
    sqe.addr = static_cast<std::uint64_t>(arg(bytes));
    sqe.len = count;
    at<unsigned>(sq_, params_.sq_off.array)[tail & mask] = tail & mask;
    word(sq_, params_.sq_off.tail).store(tail + 1);
    const unsigned head = word(cq_, params_.cq_off.head).load();
    unsigned submitted = 0;
    while (word(cq_, params_.cq_off.tail).load() == head) {
      const long n = Call(SYS_io_uring_enter, fd_, 1 - submitted, 1, IORING_ENTER_GETEVENTS, 0, 0);
      if (n != -EINTR) submitted += static_cast<unsigned>(checked(n));
    }
    const int result = at<io_uring_cqe>(cq_, params_.cq_off.cqes)[head & word(cq_, params_.cq_off.ring_mask).load()].res;
    word(cq_, params_.cq_off.head).store(head + 1);
    return result;
  }

  io_uring_params params_{};
  int fd_ = -1;
  void *sq_ = nullptr, *cq_ = nullptr;
  io_uring_sqe* sqes_ = nullptr;
};

/// No ring at all, but a way past libc to send by.
class PastLibc final : public Ring {
 public:
  int send(int fd, const void* bytes, unsigned count) override {
    return static_cast<int>(doors::by_instruction(SYS_sendto, fd, reinterpret_cast<long>(bytes), count, 0, 0, 0));
  }
  int recv(int fd, void* bytes, unsigned count) override { return static_cast<int>(::recv(fd, bytes, count, MSG_WAITALL)); }
  int write(int fd, const void* bytes, unsigned count) override { return static_cast<int>(::pwrite(fd, bytes, count, 0)); }
  int read(int fd, void* bytes, unsigned count) override { return static_cast<int>(::pread(fd, bytes, count, 0)); }
};

#ifdef HAVE_LIBURING
/// By liburing, with a receive that stays in the kernel and buffers that the kernel chooses; the socket by its descriptor, or by
/// its place in the ring's own table.
class LibRing final : public Ring {
 public:
  explicit LibRing(bool by_table) : by_table_(by_table) {
    if (const int failed = io_uring_queue_init(8, &ring_, 0); failed != 0) throw std::runtime_error(std::strerror(-failed));
    void* memory = mmap(nullptr, 4096, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (memory == MAP_FAILED) throw std::runtime_error("mmap");
    buffers_ = static_cast<io_uring_buf_ring*>(memory);
    io_uring_buf_reg reg{};
    reg.ring_addr = reinterpret_cast<std::uint64_t>(memory);
    reg.ring_entries = kBuffers;
    if (const int failed = io_uring_register_buf_ring(&ring_, &reg, 0); failed != 0)
      throw std::runtime_error(std::strerror(-failed));
    for (unsigned i = 0; i < kBuffers; ++i) give_back(i);
  }
  LibRing(const LibRing&) = delete;
  LibRing& operator=(const LibRing&) = delete;
  ~LibRing() override { io_uring_queue_exit(&ring_); }

  int send(int fd, const void* bytes, unsigned count) override {
    io_uring_sqe* sqe = io_uring_get_sqe(&ring_);
    io_uring_prep_send(sqe, fd, bytes, count, 0);
    name(sqe, fd);
    return result_of(sqe);
  }
  int write(int fd, const void* bytes, unsigned count) override {
    io_uring_sqe* sqe = io_uring_get_sqe(&ring_);
    io_uring_prep_write(sqe, fd, bytes, count, 0);
    return result_of(sqe);
  }
  int read(int fd, void* bytes, unsigned count) override {
    io_uring_sqe* sqe = io_uring_get_sqe(&ring_);
    io_uring_prep_read(sqe, fd, bytes, count, 0);
    return result_of(sqe);
  }
  int recv(int fd, void* bytes, unsigned count) override {
    unsigned got = 0;
    while (got < count && !ended_) {
      if (kept_ == 0 && !take(fd)) return error_ != 0 ? error_ : static_cast<int>(got);
      const unsigned n = std::min(count - got, kept_);
      std::memcpy(static_cast<char*>(bytes) + got, pool_[buffer_] + at_, n);
      got += n;
      at_ += n;
      kept_ -= n;
      if (kept_ == 0) give_back(buffer_);
    }
    return static_cast<int>(got);
  }
  void rest() override {
    if (!armed_) return;
    io_uring_sqe* sqe = io_uring_get_sqe(&ring_);
    io_uring_prep_cancel64(sqe, kReceive, 0);
    io_uring_sqe_set_data64(sqe, kCancel);
    await([](const Done& d) { return d.tag == kCancel; });
    while (armed_) armed_ = (await([](const Done& d) { return d.tag == kReceive; }).flags & IORING_CQE_F_MORE) != 0;
  }

 private:
  static constexpr unsigned kBuffers = 8, kBytes = 4096, kQueue = 64;
  static constexpr std::uint64_t kShort = 1, kReceive = 2, kCancel = 3;
  struct Done {
    std::uint64_t tag;
    int result;
    unsigned flags;
  };

  int result_of(io_uring_sqe* sqe) {
    io_uring_sqe_set_data64(sqe, kShort);
    return await([](const Done& done) { return done.tag == kShort; }).result;
  }
  void name(io_uring_sqe* sqe, int fd) {
    if (!by_table_) return;
    if (!has_table_ && io_uring_register_files(&ring_, &fd, 1) != 0) throw std::runtime_error("io_uring_register_files");
    has_table_ = true;
    sqe->fd = 0;
    sqe->flags |= IOSQE_FIXED_FILE;
  }
  void give_back(unsigned buffer) {
    // Not by liburing's function: the header's `bufs` begins eight bytes too late in C++.
    std::atomic_ref<__u16> tail(buffers_->tail);
    io_uring_buf& entry = reinterpret_cast<io_uring_buf*>(buffers_)[tail.load() % kBuffers];
    entry.addr = reinterpret_cast<std::uint64_t>(pool_[buffer]);
    entry.len = kBytes;
    entry.bid = static_cast<__u16>(buffer);
    tail.store(static_cast<__u16>(tail.load() + 1));
  }
  /// The next of that kind; others wait for their turn.
  template <class Wanted>
  Done await(Wanted wanted) {
    for (;;) {
      for (unsigned i = 0; i < waiting_; ++i) {
        if (!wanted(queue_[i])) continue;
        const Done done = queue_[i];
        std::memmove(queue_ + i, queue_ + i + 1, (--waiting_ - i) * sizeof *queue_);
        return done;
      }
      io_uring_submit_and_wait(&ring_, 1);
      io_uring_cqe* cqe = nullptr;
      while (waiting_ < kQueue && io_uring_peek_cqe(&ring_, &cqe) == 0) {
        queue_[waiting_++] = {io_uring_cqe_get_data64(cqe), cqe->res, cqe->flags};
        io_uring_cqe_seen(&ring_, cqe);
      }
    }
  }
  bool take(int fd) {
    for (;;) {
      if (!armed_) {
        io_uring_sqe* sqe = io_uring_get_sqe(&ring_);
        io_uring_prep_recv_multishot(sqe, fd, nullptr, 0, 0);
        name(sqe, fd);
        sqe->flags |= IOSQE_BUFFER_SELECT;
        io_uring_sqe_set_data64(sqe, kReceive);
        armed_ = true;
      }
      const Done done = await([](const Done& d) { return d.tag == kReceive; });
      armed_ = (done.flags & IORING_CQE_F_MORE) != 0;
      if (done.result == -ENOBUFS) continue;
      if (done.result < 0) error_ = done.result;
      if (done.result <= 0) return !(ended_ = true);
      buffer_ = done.flags >> IORING_CQE_BUFFER_SHIFT;
      at_ = 0;
      kept_ = static_cast<unsigned>(done.result);
      return true;
    }
  }

  io_uring ring_{};
  io_uring_buf_ring* buffers_ = nullptr;
  char pool_[kBuffers][kBytes];
  Done queue_[kQueue];
  unsigned waiting_ = 0, buffer_ = 0, at_ = 0, kept_ = 0;
  int error_ = 0;
  bool armed_ = false, ended_ = false, has_table_ = false;
  const bool by_table_;
};
#endif
