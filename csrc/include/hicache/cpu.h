// What the launcher (cpu.cpp) and the kernels (cpu_kernels.cpp, one build an instruction set) agree on.
#pragma once

#include <cstddef>
#include <cstdint>

namespace hicache {

constexpr int kMaxOrders = 5;  // K = order + 1; kernels are compiled for 1..5

enum class dtype : int { f32 = 0, bf16 = 1, f16 = 2, f64 = 3 };

// One history seen as `orders` rows of `numel` numbers, `order_stride` numbers apart.
struct history {
  void* orders;
  int64_t order_stride;
  int top;  // the row that received the new feature: K - 1
  dtype type;
};

struct cascade_args {
  history past;
  int64_t numel;
  int read;       // old differences that exist
  double inv_gap;
  const double* coeffs;  // forecast only: read + 1 of them
  void* out;             // forecast only
};

struct sum_args {
  history past;
  int64_t term_stride;  // numbers between the slots of two terms
  int64_t terms;
  int64_t batch, rows, channels;  // base and out are [batch, rows, channels]
  dtype base_type;
  const void* base;
  const void* gates;  // [terms, batch, channels] in base_type, or null for gates of one
  void* out;
  int orders_used;  // coefficients there are
  const double* coeffs;
  bool update;  // an update is pending: do it too
  double inv_gap;
};

// Work on the numbers [begin, end) of one call.
using cascade_fn = void (*)(const cascade_args&, int64_t begin, int64_t end);
using sum_fn = void (*)(const sum_args&, int64_t begin, int64_t end);

struct kernel_table {
  const char* name;
  cascade_fn update[4][kMaxOrders];           // [dtype][read]
  cascade_fn update_forecast[4][kMaxOrders];  // [dtype][read]
  cascade_fn forecast[4][kMaxOrders];         // [dtype][coefficients - 1]
  sum_fn gated_sum[4][4][kMaxOrders];         // [history dtype][base dtype][coefficients - 1]; null: no such pair
};

}  // namespace hicache
