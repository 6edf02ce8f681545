// Threads that run out of items take part of others' items: half of the value columns, whose blocks are independent of one another. No bit
// depends on who works on which. Only what all columns of a chunk need (T and P) is then made twice.
#pragma once

#include <atomic>
#include <chrono>
#include <cstdint>
#include <thread>
#include <vector>

#include "cpu/kernels.hpp"

namespace flashdelta::cpu {

// Value columns of an item from a chunk on.
struct Part {
  std::int64_t item = 0, chunk = 0;
  Columns columns;
};

// Who works on how much, and who asks whom for part of it. Threads ask between items and are answered between chunks.
class Sharing {
 public:
  explicit Sharing(int threads) : workers_(static_cast<std::size_t>(threads)) {}

  // From now on thread `self` may be asked. Its part has `chunks` left.
  void open(int self, const Columns& columns, std::int64_t chunks) {
    left(self, columns, chunks);
    workers_[at(self)].asking.store(kNobody, std::memory_order_release);
  }

  // The thread that asks `self`, or a negative number; then one of give() and refuse() must follow.
  [[nodiscard]] int asking(int self) const { return workers_[at(self)].asking.load(std::memory_order_acquire); }

  void left(int self, const Columns& columns, std::int64_t chunks) {
    const std::int64_t left = shares(columns, chunks) > 1 ? chunks * (columns.last - columns.first) : 0;
    workers_[at(self)].left.store(left, std::memory_order_relaxed);
  }

  // How many threads can work side by side on that many chunks of some columns.
  [[nodiscard]] static std::int64_t shares(const Columns& columns, std::int64_t chunks) {
    return chunks < kLeastChunks ? 1 : (columns.last - columns.first + kValueBlock - 1) / kValueBlock;
  }

  void give(int self, int thread, const Part& part) {
    workers_[at(thread)].given = part;
    answer(thread, kGiven);
    workers_[at(self)].asking.store(kNobody, std::memory_order_release);
  }
  void refuse(int self, int thread) {
    answer(thread, kRefused);
    workers_[at(self)].asking.store(kNobody, std::memory_order_release);
  }

  // The end of what open() began; who asks now comes too late.
  void close(int self) {
    workers_[at(self)].left.store(0, std::memory_order_relaxed);
    const int thread = workers_[at(self)].asking.exchange(kClosed, std::memory_order_acq_rel);
    if (thread >= 0) answer(thread, kRefused);
  }

  // Part of what some other thread works on, that with the most left; false where none has enough.
  bool ask(int self, Part* part) {
    Worker& me = workers_[at(self)];
    for (;;) {
      Worker* most = nullptr;
      bool any = false;
      for (Worker& worker : workers_) {
        const std::int64_t left = worker.left.load(std::memory_order_relaxed);
        any = any || left > 0;
        const bool free = worker.asking.load(std::memory_order_relaxed) == kNobody;
        if (free && left > (most == nullptr ? 0 : most->left.load(std::memory_order_relaxed))) most = &worker;
      }
      if (!any) return false;
      me.answer.store(kWaiting, std::memory_order_relaxed);
      int nobody = kNobody;
      if (most == nullptr || !most->asking.compare_exchange_strong(nobody, self, std::memory_order_acq_rel)) {
        std::this_thread::sleep_for(std::chrono::microseconds(20));  // others ask already, and are answered within a chunk's time
        continue;
      }
      me.answer.wait(kWaiting, std::memory_order_acquire);
      if (me.answer.load(std::memory_order_acquire) == kRefused) continue;
      *part = me.given;
      return true;
    }
  }

 private:
  // With fewer chunks left the answer may come when there is nothing to gain any more.
  static constexpr std::int64_t kLeastChunks = 4;
  static constexpr int kNobody = -1, kClosed = -2;
  enum Answer : int { kWaiting, kGiven, kRefused };

  struct alignas(64) Worker {
    std::atomic<int> asking{kClosed};
    std::atomic<std::int64_t> left{0};  // chunks times columns that are worth sharing
    std::atomic<int> answer{kWaiting};
    Part given;
  };

  static std::size_t at(int thread) { return static_cast<std::size_t>(thread); }
  void answer(int thread, Answer what) {
    workers_[at(thread)].answer.store(what, std::memory_order_release);
    workers_[at(thread)].answer.notify_one();
  }

  std::vector<Worker> workers_;
};

}  // namespace flashdelta::cpu
