// A small pool of sleeping threads. CPU only.
//
// Not OpenMP: torch bundles its own runtime, and a second one in the process would spin on the cores torch's next
// operator wants.
#pragma once

#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <functional>
#include <memory>
#include <mutex>
#include <thread>
#include <vector>

namespace hicache {

class thread_pool {
 public:
  // Runs task() on this thread and, as they wake up, on up to count − 1 of the pool's; returns when it has ended on
  // all of them. A task shares out work of its own and ends when none is left, so a thread that wakes too late does
  // nothing, and nobody waits for it: waking takes tens of microseconds, as long as a small kernel.
  void run(int count, const std::function<void()>& task) {
    std::lock_guard<std::mutex> one_caller(callers_);
    {
      std::lock_guard<std::mutex> lock(mutex_);
      while (static_cast<int>(threads_.size()) < count - 1) {
        const int index = static_cast<int>(threads_.size());
        threads_.emplace_back([this, index, seen = round_] { work(index, seen); });
      }
      task_ = &task;
      helpers_ = count - 1;
      ++round_;
    }
    wake_.notify_all();
    task();
    std::unique_lock<std::mutex> lock(mutex_);
    task_ = nullptr;
    done_.wait(lock, [this] { return active_ == 0; });
  }

  ~thread_pool() {
    {
      std::lock_guard<std::mutex> lock(mutex_);
      stop_ = true;
    }
    wake_.notify_all();
    for (auto& thread : threads_) thread.join();
  }

  // The process's pool. Threads do not survive fork(), so a child makes its own and leaves the parent's alone.
  static thread_pool& shared() {
    static std::mutex mutex;
    static thread_pool* pool = nullptr;
    static pid_t owner = 0;
    std::lock_guard<std::mutex> lock(mutex);
    if (pool == nullptr || owner != getpid()) {
      pool = new thread_pool;  // never destroyed: threads may still sleep in it at exit
      owner = getpid();
    }
    return *pool;
  }

 private:
  void work(int index, uint64_t seen) {
    std::unique_lock<std::mutex> lock(mutex_);
    for (;;) {
      wake_.wait(lock, [&] { return stop_ || round_ != seen; });
      if (stop_) return;
      seen = round_;
      if (task_ == nullptr || index >= helpers_) continue;
      const auto* task = task_;
      ++active_;
      lock.unlock();
      (*task)();
      lock.lock();
      if (--active_ == 0) done_.notify_one();
    }
  }

  std::mutex callers_, mutex_;
  std::condition_variable wake_, done_;
  std::vector<std::thread> threads_;
  const std::function<void()>* task_ = nullptr;
  uint64_t round_ = 0;
  int helpers_ = 0, active_ = 0;
  bool stop_ = false;
};

// Shares [0, count) out in pieces, multiples of `grain`, to as many threads as have `least` elements each.
template <class Body>
void parallel_for(int64_t count, int64_t grain, int64_t least, int threads, Body body) {
  const int64_t parts = std::max<int64_t>(1, std::min<int64_t>(threads, count / least));
  if (parts == 1) {
    if (count > 0) body(int64_t{0}, count);
    return;
  }
  constexpr int64_t kPieces = 8;  // a thread: a late or slow one leaves its share to the others
  const int64_t piece = std::max<int64_t>(1, count / (parts * kPieces * grain)) * grain;
  std::atomic<int64_t> next{0};
  thread_pool::shared().run(static_cast<int>(parts), [&] {
    for (;;) {
      const int64_t begin = next.fetch_add(piece);
      if (begin >= count) return;
      body(begin, std::min(count, begin + piece));
    }
  });
}

}  // namespace hicache
