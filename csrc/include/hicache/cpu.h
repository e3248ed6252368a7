// What the CPU launcher (cpu.cpp) and its kernels (cpu_kernels.cpp, one build an instruction set) agree on.
#pragma once

#include "hicache/kernels.h"
#include "hicache/tactics.h"

namespace hicache {

// Work on the elements [begin, end) of one call; the legend is in kernels.h.
using cascade_fn = void (*)(const cascade_args&, const tactic&, int64_t begin, int64_t end);
using sum_fn = void (*)(const sum_args&, const tactic&, int64_t begin, int64_t end);

struct kernel_table {
  const char* name;
  cascade_fn update[4][kMaxOrders];           // [dtype][num_differences]
  cascade_fn update_forecast[4][kMaxOrders];  // [dtype][num_differences]
  cascade_fn forecast[4][kMaxOrders];         // [dtype][num_coeffs - 1]
  sum_fn gated_sum[4][4][kMaxOrders];         // [history dtype][base dtype][num_coeffs - 1]; null: no such pair
};

}  // namespace hicache
