// A small pool of sleeping threads. CPU only.
//
// Not OpenMP: torch bundles its own runtime, and a second one in the process would spin on the cores torch's next
// operator wants.
#pragma once

#include <unistd.h>

#include <algorithm>
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
  // Runs task(0) … task(count − 1), each once, on this thread and count − 1 of the pool's; returns when all are done.
  void run(int count, const std::function<void(int)>& task) {
    std::lock_guard<std::mutex> one_caller(callers_);
    {
      std::lock_guard<std::mutex> lock(mutex_);
      while (static_cast<int>(threads_.size()) < count - 1) {
        const int index = static_cast<int>(threads_.size());
        threads_.emplace_back([this, index, seen = round_] { work(index, seen); });
      }
      task_ = &task;
      helpers_ = count - 1;
      pending_ = count - 1;
      ++round_;
    }
    wake_.notify_all();
    task(0);
    std::unique_lock<std::mutex> lock(mutex_);
    done_.wait(lock, [this] { return pending_ == 0; });
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
      if (index >= helpers_) continue;
      const auto* task = task_;
      lock.unlock();
      (*task)(index + 1);
      lock.lock();
      if (--pending_ == 0) done_.notify_one();
    }
  }

  std::mutex callers_, mutex_;
  std::condition_variable wake_, done_;
  std::vector<std::thread> threads_;
  const std::function<void(int)>* task_ = nullptr;
  uint64_t round_ = 0;
  int helpers_ = 0, pending_ = 0;
  bool stop_ = false;
};

// Splits [0, count) into one range a thread, at multiples of `grain`; few numbers stay on the calling thread.
template <class Body>
void parallel_for(int64_t count, int64_t grain, int threads, Body body) {
  const int64_t grains = (count + grain - 1) / grain;
  const int64_t parts = std::max<int64_t>(1, std::min<int64_t>(threads, grains));
  if (parts == 1) {
    if (count > 0) body(int64_t{0}, count);
    return;
  }
  thread_pool::shared().run(static_cast<int>(parts), [&](int part) {
    const int64_t begin = grains * part / parts * grain;
    const int64_t end = std::min(count, grains * (part + 1) / parts * grain);
    if (begin < end) body(begin, end);
  });
}

}  // namespace hicache
