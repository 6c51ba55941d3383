// The machine's floors, which nothing between two processes can beat: one cache line's round trip between two cores, memcpy (also
// to a place 24 bytes further in its page), and what two cores can hand on that copy into a ring, through the cache or past it, and
// out of it, as any socket does. Prints one line of JSON: nanoseconds and GB/s (10^9 bytes copied a second).
#include <pthread.h>
#include <sched.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <thread>
#include <vector>

#include "rdma_core/base/copy.hpp"

namespace {

using SteadyClock = std::chrono::steady_clock;

double seconds_since(SteadyClock::time_point start) { return std::chrono::duration<double>(SteadyClock::now() - start).count(); }

/// The CPUs that this process may run on.
std::vector<int> allowed_cpus() {
  cpu_set_t set;
  std::vector<int> cpus;
  if (sched_getaffinity(0, sizeof set, &set) == 0) {
    for (int cpu = 0; cpu < CPU_SETSIZE; ++cpu)
      if (CPU_ISSET(cpu, &set)) cpus.push_back(cpu);
  }
  return cpus;
}

void pin_to(int cpu) {
  cpu_set_t set;
  CPU_ZERO(&set);
  CPU_SET(cpu, &set);
  pthread_setaffinity_np(pthread_self(), sizeof set, &set);
}

double median(std::vector<double> values) {
  std::nth_element(values.begin(), values.begin() + static_cast<std::ptrdiff_t>(values.size() / 2), values.end());
  return values[values.size() / 2];
}

/// Two threads hand one line to and fro. The median of batches: a batch that the scheduler interrupted does not count.
double line_round_trip_ns(int cpu_a, int cpu_b) {
  constexpr unsigned kTrips = 20000;
  constexpr unsigned kBatches = 25;
  alignas(64) std::atomic<unsigned> line{0};
  std::thread other([&] {
    pin_to(cpu_b);
    for (unsigned i = 0; i < kTrips * kBatches; ++i) {
      while (line.load(std::memory_order_acquire) != 2 * i + 1) {
      }
      line.store(2 * i + 2, std::memory_order_release);
    }
  });
  pin_to(cpu_a);
  std::vector<double> batches;
  for (unsigned batch = 0; batch < kBatches; ++batch) {
    const auto start = SteadyClock::now();
    for (unsigned i = batch * kTrips; i < (batch + 1) * kTrips; ++i) {
      line.store(2 * i + 1, std::memory_order_release);
      while (line.load(std::memory_order_acquire) != 2 * i + 2) {
      }
    }
    batches.push_back(seconds_since(start) / kTrips * 1e9);
  }
  other.join();
  return median(batches);
}

/// One thread copies into a ring of 16 slots of 64 KiB, another out of it; both from and to memory that fits their caches.
template <class Copy>
double two_copies_gb_per_s(int cpu_a, int cpu_b, Copy copy) {
  constexpr std::size_t kSlot = 64U << 10, kSlots = 16, kOwn = 128U << 10;
  constexpr std::uint64_t kMessages = (std::uint64_t{2} << 30) / kSlot;
  struct alignas(128) Count {
    std::atomic<std::uint64_t> value{0};
  };
  Count written, read;
  std::vector<std::byte> ring(kSlot * kSlots, std::byte{1});
  std::thread reader([&] {
    pin_to(cpu_b);
    std::vector<std::byte> own(kOwn, std::byte{1});
    for (std::uint64_t i = 0; i < kMessages; ++i) {
      while (written.value.load(std::memory_order_acquire) <= i) {
      }
      std::memcpy(own.data() + i * kSlot % kOwn, ring.data() + i % kSlots * kSlot, kSlot);
      asm volatile("" : : "r"(own.data()) : "memory");
      read.value.store(i + 1, std::memory_order_release);
    }
  });
  pin_to(cpu_a);
  const std::vector<std::byte> own(kOwn, std::byte{2});
  const auto start = SteadyClock::now();
  for (std::uint64_t i = 0; i < kMessages; ++i) {
    while (i - read.value.load(std::memory_order_acquire) >= kSlots) {
    }
    copy(ring.data() + i % kSlots * kSlot, own.data() + i * kSlot % kOwn, kSlot);
    written.value.store(i + 1, std::memory_order_release);
  }
  reader.join();
  return static_cast<double>(kMessages * kSlot) / seconds_since(start) / 1e9;
}

double memcpy_gb_per_s(std::size_t bytes, std::size_t further = 0) {
  // On pages of their own: with operands a few bytes off each other's page offset some CPUs copy ten times slower.
  const std::unique_ptr<char, decltype(&std::free)> from(static_cast<char*>(std::aligned_alloc(4096, bytes)), &std::free);
  const std::unique_ptr<char, decltype(&std::free)> to(static_cast<char*>(std::aligned_alloc(4096, bytes + 4096)), &std::free);
  if (!from || !to) return 0;
  std::memset(from.get(), 1, bytes);
  std::memset(to.get(), 2, bytes + 4096);
  const std::size_t copies = std::max<std::size_t>(1, (256U << 20) / bytes);
  std::vector<double> rates;
  for (int batch = 0; batch < 7; ++batch) {
    const auto start = SteadyClock::now();
    for (std::size_t i = 0; i < copies; ++i) {
      std::memcpy(to.get() + further, from.get(), bytes);
      asm volatile("" : : "r"(to.get()) : "memory");  // keeps each copy
    }
    rates.push_back(static_cast<double>(bytes) * static_cast<double>(copies) / seconds_since(start) / 1e9);
  }
  return median(rates);
}

}  // namespace

int main() {
  const std::vector<int> cpus = allowed_cpus();
  if (cpus.size() >= 2) {
    std::vector<double> cached(5), direct(5);
    for (std::size_t i = 0; i < cached.size(); ++i) {
      cached[i] = two_copies_gb_per_s(cpus[0], cpus[1], rdma::copy_bytes);
      direct[i] = two_copies_gb_per_s(cpus[0], cpus[1], rdma::copy_past_caches);
    }
    std::printf(
        "{\"cpus\": [%d, %d], \"line_round_trip_ns\": %.1f, \"two_copies_gb_per_s\": %.1f, \"two_copies_past_caches_gb_per_s\": "
        "%.1f, ",
        cpus[0], cpus[1], line_round_trip_ns(cpus[0], cpus[1]), median(cached), median(direct));
  } else {
    std::printf("{\"line_round_trip_ns\": null, \"two_copies_gb_per_s\": null, \"two_copies_past_caches_gb_per_s\": null, ");
  }
  std::printf("\"memcpy_gb_per_s\": {\"16 KiB\": %.1f, \"1 MiB\": %.1f, \"16 MiB\": %.1f}, \"memcpy_24_further_gb_per_s\": %.1f}\n",
              memcpy_gb_per_s(16U << 10), memcpy_gb_per_s(1U << 20), memcpy_gb_per_s(16U << 20), memcpy_gb_per_s(16U << 10, 24));
  return 0;
}
