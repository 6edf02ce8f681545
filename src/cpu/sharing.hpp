// Threads that run out of items take over part of what others have begun. What can be taken leaves no trace in any bit.
#pragma once

#include <atomic>
#include <chrono>
#include <cstdint>
#include <thread>
#include <vector>

namespace flashdelta::cpu {

// Who works on how much, and who asks whom for part of it. Threads ask between items, and are answered between chunks.
template <class Part>
class Sharing {
 public:
  explicit Sharing(int threads) : workers_(static_cast<std::size_t>(threads)) {}

  // From now on thread `self` may be asked. `left` is how much there is to take, in any unit; 0: nothing.
  void open(int self, std::int64_t left) {
    set_left(self, left);
    workers_[at(self)].asking.store(kNobody, std::memory_order_release);
  }
  void set_left(int self, std::int64_t left) { workers_[at(self)].left.store(left, std::memory_order_relaxed); }

  // How long thread `self` lately took for a chunk, in any unit.
  void set_pace(int self, std::int64_t time) { workers_[at(self)].pace.store(time, std::memory_order_relaxed); }

  // The thread that asks `self`, or a negative number; then give() or refuse() must follow.
  [[nodiscard]] int asking(int self) const { return workers_[at(self)].asking.load(std::memory_order_acquire); }

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
    set_left(self, 0);
    const int thread = workers_[at(self)].asking.exchange(kClosed, std::memory_order_acq_rel);
    if (thread >= 0) answer(thread, kRefused);
  }

  // Part of what some other thread works on, that with the most left; false where none has anything. With `slower` only threads count that
  // take a quarter longer for a chunk than `self`.
  bool ask(int self, bool slower, Part* part) {
    Worker& me = workers_[at(self)];
    const std::int64_t pace = me.pace.load(std::memory_order_relaxed);
    for (;;) {
      Worker* most = nullptr;
      std::int64_t most_left = 0;
      bool any = false;
      for (Worker& worker : workers_) {
        const std::int64_t left = worker.left.load(std::memory_order_relaxed);
        if (left == 0 || (slower && worker.pace.load(std::memory_order_relaxed) * 4 < pace * 5)) continue;
        any = true;
        if (left <= most_left || worker.asking.load(std::memory_order_relaxed) != kNobody) continue;
        most = &worker;
        most_left = left;
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
  static constexpr int kNobody = -1, kClosed = -2;
  enum Answer : int { kWaiting, kGiven, kRefused };

  struct alignas(64) Worker {
    std::atomic<int> asking{kClosed};
    std::atomic<std::int64_t> left{0}, pace{0};
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

// With fewer chunks left than this the answer may come when there is nothing to gain any more.
constexpr std::int64_t kLeastShared = 4;

}  // namespace flashdelta::cpu
