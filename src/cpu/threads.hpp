// Independent items over threads that live for one call. Which thread runs an item never shows in its result.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <system_error>
#include <thread>
#include <vector>

#if defined(__linux__)
#include <sched.h>
#endif
#if defined(__SSE__)
#include <xmmintrin.h>
#endif

#include "cpu/config.hpp"
#include "op/problem.hpp"

namespace flashdelta::cpu {

// Strong gates drive products into subnormal floats, which processors handle in microcode, a hundred times slower; what they hold is
// far below any tolerance. Sets the calling thread to flush them, and gives it back as it was.
class FlushSubnormals {
 public:
#if defined(__SSE__)
  FlushSubnormals() : saved_(_mm_getcsr()) { _mm_setcsr(saved_ | 0x8040U); }
  ~FlushSubnormals() { _mm_setcsr(saved_); }

 private:
  unsigned saved_;
#elif defined(__aarch64__)
  FlushSubnormals() {
    asm volatile("mrs %0, fpcr" : "=r"(saved_));
    asm volatile("msr fpcr, %0" : : "r"(saved_ | (std::uint64_t{1} << 24)));
  }
  ~FlushSubnormals() { asm volatile("msr fpcr, %0" : : "r"(saved_)); }

 private:
  std::uint64_t saved_;
#endif
 public:
  FlushSubnormals(const FlushSubnormals&) = delete;
  FlushSubnormals& operator=(const FlushSubnormals&) = delete;
};

// Threads that `p` may use: those asked for, or all that the process may run on.
inline int allowed_threads(const op::Problem& p) {
  if (p.num_threads > 0) return p.num_threads;
#if defined(__linux__)
  cpu_set_t set;
  if (sched_getaffinity(0, sizeof(set), &set) == 0) return std::max(1, CPU_COUNT(&set));
#endif
  return std::max(1, static_cast<int>(std::thread::hardware_concurrency()));
}

// Threads worth starting for that many multiply-adds.
inline int useful_threads(const op::Problem& p, double macs) {
  return static_cast<int>(std::clamp(macs / kMinMacsPerThread, 1.0, static_cast<double>(allowed_threads(p))));
}

// Calls task(item, thread) for every item of [0, count), with thread in [0, threads). Tasks do not throw.
template <class Task>
void parallel_for(std::int64_t count, int threads, const Task& task) {
  std::atomic<std::int64_t> next{0};
  const auto work = [&](int thread) {
    const FlushSubnormals flush;
    for (std::int64_t i = next++; i < count; i = next++) task(i, thread);
  };
  std::vector<std::thread> others;
  try {
    for (int i = 1; i < threads && i < count; ++i) others.emplace_back(work, i);
  } catch (const std::system_error&) {
    // The system grants no further thread: those there are do all of the work.
  }
  work(0);
  for (std::thread& other : others) other.join();
}

}  // namespace flashdelta::cpu
