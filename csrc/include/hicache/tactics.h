// How a CPU kernel walks through memory that no cache holds. CPU only. The legend is in kernels.h.
//
// Processors differ in what keeps their memory busy: how far a prefetcher follows a stream, and what a block may take of
// which cache. Nothing here is tuned to one of them: sizes come from the system, and what is left is measured at the
// first calls that are worth it. Every tactic gives the same bits.
#pragma once

#include <unistd.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <cstdint>
#include <cstdlib>
#include <limits>

namespace hicache {

struct tactic {
  int64_t block;  // elements a gated sum adds up, feature by feature, before it goes on
  bool ahead;     // it asks for the next feature's block while it adds up this one's,
  bool near;      // into the first level; else into the second
  bool streamed;  // results go past the caches: nobody finds them there anyway
};

constexpr int64_t kLargestBlock = 1 << 14;  // its sums lie on the stack: 64 KiB of fp32

// Bytes, as the system tells them; where it does not, of a small processor. HICACHE_CPU_LAST_LEVEL says otherwise of the
// last level: with 0 every size is past it, and what is done there can be tested with little memory.
struct cache_sizes {
  int64_t first = told(_SC_LEVEL1_DCACHE_SIZE, 32 << 10), last = told(_SC_LEVEL3_CACHE_SIZE, 32 << 20);

  cache_sizes() {
    if (const char* const bytes = std::getenv("HICACHE_CPU_LAST_LEVEL")) last = std::atoll(bytes);
  }

 private:
  static int64_t told(int name, int64_t otherwise) {
    const long size = sysconf(name);
    return size > 0 ? size : otherwise;
  }
};

inline constexpr int kTactics = 6;

// Blocks of which half the first level holds a pass over one feature, bytes_each for an element; others are four times
// as long: longer streams, and sums in the second level. The first is taken unless another is measured to be faster.
inline std::array<tactic, kTactics> tactics(int64_t first_level, int64_t bytes_each) {
  int64_t small = 512;
  while (small < kLargestBlock / 4 && 2 * small * bytes_each <= first_level / 2) small *= 2;
  const int64_t large = 4 * small;
  return {{{small, true, false, false},
           {small, true, true, false},
           {small, false, false, false},
           {large, true, false, false},
           {large, true, true, false},
           {large, false, false, false}}};
}

// Which of a few ways is the fastest here: each is taken at some calls, then the best. Without locks: calls that overlap
// only measure less well.
template <int CHOICES>
class chooser {
 public:
  static constexpr int kTrials = 3;  // the best one counts: a machine is busy with something else at times
  static constexpr float kGain = 0.95f;  // of the time; below that, the first choice stays

  chooser() {
    for (auto& one : best_) one.store(std::numeric_limits<float>::infinity());
  }

  // What the next call should take.
  int next() {
    if (calls_.load(std::memory_order_relaxed) < kTrials * CHOICES) {
      const int call = calls_.fetch_add(1, std::memory_order_relaxed);
      if (call < kTrials * CHOICES) return call % CHOICES;
    }
    return chosen();
  }

  // What a call took, in any unit that does not depend on its size.
  void tell(int choice, float cost) {
    std::atomic<float>& best = best_[static_cast<size_t>(choice)];
    if (cost < best.load(std::memory_order_relaxed)) best.store(cost, std::memory_order_relaxed);
  }

  std::array<float, CHOICES> costs() const {  // the least of each; infinite where none was told
    std::array<float, CHOICES> found;
    for (int i = 0; i < CHOICES; ++i) found[static_cast<size_t>(i)] = cost(i);
    return found;
  }

  int chosen() const {
    int found = 0;
    for (int i = 1; i < CHOICES; ++i) {
      const float limit = found == 0 ? kGain * cost(0) : cost(found);
      if (cost(i) < limit) found = i;
    }
    return found;
  }

 private:
  float cost(int choice) const { return best_[static_cast<size_t>(choice)].load(std::memory_order_relaxed); }

  std::atomic<int> calls_{0};
  std::array<std::atomic<float>, CHOICES> best_;
};

// What sums must have in common for their times to be compared.
struct sum_kind {
  int type, num_coeffs, log_features, log_numel;  // of the history; sizes to a power of two
  bool update, gated;
  int threads;

  uint64_t key() const {  // never 0
    const uint64_t parts[] = {1, static_cast<uint64_t>(type), static_cast<uint64_t>(num_coeffs),
                              static_cast<uint64_t>(log_features), static_cast<uint64_t>(log_numel), update, gated,
                              static_cast<uint64_t>(threads)};
    uint64_t key = 0;
    for (const uint64_t part : parts) key = key << 8 | (part & 255);
    return key;
  }

  static sum_kind of(uint64_t key) {
    const auto part = [&](int place) { return static_cast<int>(key >> (8 * place) & 255); };
    return {part(6), part(5), part(4), part(3), part(2) != 0, part(1) != 0, part(0)};
  }
};

// A chooser for every kind of sum there is; kinds beyond kKinds share none and are not measured. Without locks.
class choosers {
 public:
  static constexpr size_t kKinds = 64;

  chooser<kTactics>* of(const sum_kind& kind) {
    const uint64_t key = kind.key();
    for (slot& one : slots_) {
      uint64_t held = one.key.load(std::memory_order_relaxed);
      if (held == 0 && one.key.compare_exchange_strong(held, key)) return &one.by_time;
      if (held == key) return &one.by_time;
    }
    return nullptr;
  }

  // body(kind, chooser) for every kind so far.
  template <class Body>
  void for_each(Body body) const {
    for (const slot& one : slots_) {
      if (const uint64_t key = one.key.load(std::memory_order_relaxed)) body(sum_kind::of(key), one.by_time);
    }
  }

 private:
  struct slot {
    std::atomic<uint64_t> key{0};
    chooser<kTactics> by_time;
  };
  std::array<slot, kKinds> slots_;
};

}  // namespace hicache
