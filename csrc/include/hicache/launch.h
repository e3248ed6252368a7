// The launchers, called by the Python bindings. Arguments are validated by the caller. The legend is in kernels.h.
#pragma once

#include <array>
#include <atomic>
#include <cstdint>
#include <vector>

#include "hicache/kernels.h"
#include "hicache/tactics.h"

namespace hicache {

inline std::atomic<int64_t> launch_count{0};  // calls of a CPU kernel and launches of a CUDA one, in this process

const char* cpu_isa();  // "avx512", "avx2" or "baseline": what this process runs

// Of gated sums past the caches: the tactic taken, and the seconds a byte that each took at best, infinite if not tried.
struct measured_tactics {
  sum_kind kind;
  int chosen;
  std::array<float, kTactics> costs;
};
std::vector<measured_tactics> cpu_tactics();

void cpu_update(const cascade_args& args, int threads);
void cpu_update_forecast(const cascade_args& args, int threads);
void cpu_forecast(const cascade_args& args, int threads);
void cpu_gated_sum(const sum_args& args, int threads);

// One launch each on the stream's device, nothing allocated and nothing waited for: they can be captured. They throw
// std::runtime_error when CUDA reports an error.
std::vector<int> cuda_archs();  // compute capabilities compiled for, ascending
void cuda_update(const cascade_args& args, int device, uintptr_t stream);
void cuda_update_forecast(const cascade_args& args, int device, uintptr_t stream);
void cuda_forecast(const cascade_args& args, int device, uintptr_t stream);
void cuda_gated_sum(const sum_args& args, int device, uintptr_t stream);

}  // namespace hicache
