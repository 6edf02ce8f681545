// Independent tasks over threads. Which thread runs a task never shows in its result.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <exception>
#include <mutex>
#include <system_error>
#include <thread>
#include <vector>

namespace flashdelta::reference {

// Calls task(i) for i in [0, count) on up to num_threads threads (0: all that the process may use); rethrows one task's exception.
template <class Task>
void parallel_for(std::int64_t count, int num_threads, const Task& task) {
  const std::int64_t wanted = num_threads > 0 ? num_threads : std::max(1U, std::thread::hardware_concurrency());
  std::atomic<std::int64_t> next{0};
  std::exception_ptr failure;
  std::mutex failure_mutex;
  const auto work = [&] {
    try {
      for (std::int64_t i = next++; i < count; i = next++) task(i);
    } catch (...) {
      const std::lock_guard lock(failure_mutex);
      failure = std::current_exception();
      next = count;
    }
  };
  std::vector<std::thread> others;
  try {
    for (std::int64_t i = 1; i < std::min(wanted, count); ++i) others.emplace_back(work);
  } catch (const std::system_error&) {
    // The system grants no further thread: those there are do all of the work.
  }
  work();
  for (std::thread& other : others) other.join();
  if (failure) std::rethrow_exception(failure);
}

}  // namespace flashdelta::reference
