// Picks the instruction set at run time and splits a call over threads. The legend is in kernels.h.

#include <algorithm>
#include <atomic>
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

constexpr int64_t kGrain = 1 << 11;  // ranges start at whole blocks of gated_sum
constexpr int64_t kLeast = 1 << 17;  // elements a thread is woken for

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

[[maybe_unused]] const int watched = thread_pool::survive_forks();

// `reads`: elements that are read for one of the `numel`.
template <class Kernel, class Args>
void launch(Kernel kernel, const Args& args, int64_t numel, int64_t reads, int threads) {
  if (numel == 0) return;
  ++launch_count;
  const int64_t least = std::max(kGrain, kLeast / reads);
  parallel_for(numel, kGrain, least, threads, [&](int64_t begin, int64_t end) { kernel(args, begin, end); });
}

}  // namespace

const char* cpu_isa() { return table().name; }

void cpu_update(const cascade_args& args, int threads) {
  launch(table().update[static_cast<int>(args.past.type)][args.num_differences], args, args.numel, 1, threads);
}

void cpu_update_forecast(const cascade_args& args, int threads) {
  launch(table().update_forecast[static_cast<int>(args.past.type)][args.num_differences], args, args.numel, 1, threads);
}

void cpu_forecast(const cascade_args& args, int threads) {
  launch(table().forecast[static_cast<int>(args.past.type)][args.num_differences], args, args.numel, 1, threads);
}

void cpu_gated_sum(const sum_args& args, int threads) {
  const sum_fn kernel =
      table().gated_sum[static_cast<int>(args.past.type)][static_cast<int>(args.base_type)][args.num_coeffs - 1];
  if (kernel == nullptr) throw std::invalid_argument("gated_sum: no native kernel for this pair of dtypes");
  launch(kernel, args, args.batch * args.rows * args.channels, args.num_features, threads);
}

}  // namespace hicache
