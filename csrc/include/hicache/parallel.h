// A small pool of sleeping threads. CPU only.
//
// Not OpenMP: torch bundles its own runtime, and a second one in the process would spin on the cores torch's next
// operator wants.
#pragma once

#include <pthread.h>

#include <algorithm>
#include <atomic>
#include <cfenv>
#include <condition_variable>
#include <cstdint>
#include <functional>
#include <memory>
#include <mutex>
#include <system_error>
#include <thread>
#include <vector>

namespace hicache {

class thread_pool {
 public:
  // Runs task() on this thread and, as they wake up, on up to count − 1 of the pool's; returns when it has ended on
  // all of them. A task shares out work of its own and ends when none is left, so a thread that wakes too late does
  // nothing, and nobody waits for it: waking takes tens of microseconds, as long as a small kernel. For the same reason
  // fewer threads, or none, do no harm: where the system gives no more, the caller does the work.
  void run(int count, const std::function<void()>& task) {
    std::lock_guard<std::mutex> one_caller(callers_);
    const int helpers = hire(count - 1);
    std::fenv_t mode;
    std::fegetenv(&mode);
    {
      std::lock_guard<std::mutex> lock(mutex_);
      task_ = &task;
      mode_ = &mode;
      for (int i = 0; i < helpers; ++i) workers_[i]->called = true;
    }
    for (int i = 0; i < helpers; ++i) workers_[i]->wake.notify_one();
    task();
    std::unique_lock<std::mutex> lock(mutex_);
    task_ = nullptr;
    done_.wait(lock, [this] { return active_ == 0; });
  }

  // The process's pool, never destroyed: threads may still sleep in it at exit.
  static thread_pool& shared() {
    thread_pool* pool = current.load();
    if (pool != nullptr) return *pool;
    auto fresh = std::make_unique<thread_pool>();
    if (current.compare_exchange_strong(pool, fresh.get())) return *fresh.release();
    return *pool;  // another thread was first
  }

  // Threads do not survive fork(), and a lock that another thread held would never be released in the child. So fork()
  // waits for the op that runs, and a child has a new pool, and leaves its parent's alone. Called once.
  static int survive_forks() {
    return pthread_atfork(
        [] {
          held = current.load();
          if (held != nullptr) held->callers_.lock();
        },
        [] {
          if (held != nullptr) held->callers_.unlock();
        },
        [] { current.store(nullptr); });
  }

 private:
  struct worker {
    std::condition_variable wake;
    bool called = false;
  };

  // Makes threads until there are `count`, or no more to be had; returns how many of the `count` there are.
  int hire(int count) {
    workers_.reserve(static_cast<size_t>(std::max(count, 0)));
    while (static_cast<int>(workers_.size()) < count) {
      auto fresh = std::make_unique<worker>();
      try {
        std::thread([this, self = fresh.get()] { work(*self); }).detach();
      } catch (const std::system_error&) {
        break;
      }
      workers_.push_back(std::move(fresh));
    }
    return std::min(count, static_cast<int>(workers_.size()));
  }

  void work(worker& self) {
    std::unique_lock<std::mutex> lock(mutex_);
    for (;;) {
      self.wake.wait(lock, [&] { return self.called; });
      self.called = false;
      if (task_ == nullptr) continue;  // too late
      const auto* const task = task_;
      std::fesetenv(mode_);  // the caller's, so that a result does not depend on who computed it
      ++active_;
      lock.unlock();
      (*task)();
      lock.lock();
      if (--active_ == 0) done_.notify_one();
    }
  }

  // Without a lock, and without a guard of its initialisation: either could be held when another thread forks.
  static inline std::atomic<thread_pool*> current{nullptr};
  static inline thread_local thread_pool* held = nullptr;  // the pool that a fork of this thread waited for

  std::mutex callers_, mutex_;
  std::condition_variable done_;
  std::vector<std::unique_ptr<worker>> workers_;
  const std::function<void()>* task_ = nullptr;
  const std::fenv_t* mode_ = nullptr;
  int active_ = 0;
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
