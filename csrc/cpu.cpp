// Picks the instruction set at run time and splits a call over threads. The legend is in kernels.h.

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdlib>
#include <cstring>
#include <stdexcept>
#include <string>

#if defined(HICACHE_X86)
#include <cpuid.h>
#endif

#include "hicache/cpu.h"
#include "hicache/launch.h"
#include "hicache/parallel.h"

namespace hicache {

namespace baseline {
extern const kernel_table kernels;
}
#if defined(HICACHE_X86)
namespace avx2 {
extern const kernel_table kernels;
}
namespace avx512 {
extern const kernel_table kernels;
}
#endif

namespace {

constexpr int64_t kGrain = 1 << 11;  // ranges of a row start at multiples of it
#if defined(HICACHE_LEAST)  // a test's: threads for little work
constexpr int64_t kLeast = HICACHE_LEAST;
#else
constexpr int64_t kLeast = 1 << 17;  // elements a thread is woken for
#endif

#if defined(HICACHE_X86)
bool has_f16c() {  // __builtin_cpu_supports knows the name only in recent compilers
  unsigned eax, ebx, ecx, edx;
  return __get_cpuid(1, &eax, &ebx, &ecx, &edx) && (ecx >> 29 & 1);
}
#endif

const kernel_table& pick() {
#if defined(HICACHE_X86)
  // HICACHE_CPU_ISA caps the choice, so that every build can be tested on one machine.
  const char* cap = std::getenv("HICACHE_CPU_ISA");
  const std::string limit = cap ? cap : "avx512";
  if (limit != "baseline" && limit != "avx2" && limit != "avx512") {
    throw std::invalid_argument("HICACHE_CPU_ISA: expected baseline, avx2 or avx512, got '" + limit + "'");
  }
  __builtin_cpu_init();
  if (limit == "avx512" && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw")) {
    return avx512::kernels;
  }
  if (limit != "baseline" && __builtin_cpu_supports("avx2") && has_f16c()) {
    return avx2::kernels;
  }
#endif
  return baseline::kernels;
}

// Threads that pick at once pick the same; a static variable would have a lock, which a fork may leave held.
const kernel_table& table() {
  static std::atomic<const kernel_table*> chosen{nullptr};
  const kernel_table* found = chosen.load(std::memory_order_relaxed);
  if (found == nullptr) chosen.store(found = &pick(), std::memory_order_relaxed);
  return *found;
}

// Made when the extension is loaded: nothing below waits for a lock that a fork may leave held.
[[maybe_unused]] const int watched = thread_pool::survive_forks();
const cache_sizes caches;
choosers measured;

constexpr int64_t kItemsize[] = {4, 2, 2, 8};  // by dtype

// Vectors of a result begin at addresses that they divide, and the last level could not keep half of it.
bool worth_streaming(const void* out, int64_t row, int64_t numel, dtype type) {
  const int64_t itemsize = kItemsize[static_cast<int>(type)];
  const bool aligned = reinterpret_cast<uintptr_t>(out) % 64 == 0 && row * itemsize % 64 == 0;
  return aligned && numel * itemsize > caches.last / 2;
}

void launch_cascade(cascade_fn kernel, const cascade_args& args, int threads) {
  if (args.numel == 0) return;
  ++launch_count;
  const int64_t row = args.coeffs.features ? args.slot : kGrain;
  const tactic how = {0, false, false, args.out && worth_streaming(args.out, row, args.numel, args.past.type)};
  parallel_for(args.numel, kGrain, kLeast, threads, [&](int64_t begin, int64_t end) { kernel(args, how, begin, end); });
}

int log2_of(int64_t count) {
  int log = 0;
  while (count >>= 1) ++log;
  return log;
}

void launch_sum(sum_fn kernel, const sum_args& args, int threads) {
  const int64_t numel = args.batch * args.rows * args.channels, elements = numel * args.num_features;
  if (numel == 0) return;
  ++launch_count;
  const int64_t itemsize = kItemsize[static_cast<int>(args.past.type)], moved = elements * args.num_coeffs * itemsize;
  const sum_kind kind = {static_cast<int>(args.past.type), args.num_coeffs, log2_of(args.num_features),
                         log2_of(numel), args.update, args.gates != nullptr, threads};
  chooser<kTactics>* const by_time = moved > caches.last ? measured.of(kind) : nullptr;
  const int choice = by_time ? by_time->next() : 0;
  tactic how = tactics(caches.first, args.num_coeffs * itemsize + 4)[static_cast<size_t>(choice)];
  how.streamed = args.out != args.base &&
                 worth_streaming(args.out, args.gates ? args.channels : kGrain, numel, args.base_type);
  const int64_t least = std::max(how.block, kLeast / args.num_features);
  const auto begun = std::chrono::steady_clock::now();
  parallel_for(numel, how.block, least, threads, [&](int64_t begin, int64_t end) { kernel(args, how, begin, end); });
  const std::chrono::duration<float> taken = std::chrono::steady_clock::now() - begun;
  if (by_time) by_time->tell(choice, taken.count() / static_cast<float>(moved));
}

}  // namespace

const char* cpu_isa() { return table().name; }

std::vector<measured_tactics> cpu_tactics() {
  std::vector<measured_tactics> found;
  measured.for_each([&](const sum_kind& kind, const chooser<kTactics>& one) {
    found.push_back({kind, one.chosen(), one.costs()});
  });
  return found;
}

void cpu_update(const cascade_args& args, int threads) {
  launch_cascade(table().update[static_cast<int>(args.past.type)][args.num_differences], args, threads);
}

void cpu_update_forecast(const cascade_args& args, int threads) {
  launch_cascade(table().update_forecast[static_cast<int>(args.past.type)][args.num_differences], args, threads);
}

void cpu_forecast(const cascade_args& args, int threads) {
  launch_cascade(table().forecast[static_cast<int>(args.past.type)][args.num_differences], args, threads);
}

void cpu_gated_sum(const sum_args& args, int threads) {
  const sum_fn kernel =
      table().gated_sum[static_cast<int>(args.past.type)][static_cast<int>(args.base_type)][args.num_coeffs - 1];
  if (kernel == nullptr) throw std::invalid_argument("gated_sum: no native kernel for this pair of dtypes");
  launch_sum(kernel, args, threads);
}

}  // namespace hicache
