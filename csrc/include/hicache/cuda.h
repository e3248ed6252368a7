// What the CUDA launcher (cuda.cpp) and its kernels (cuda_kernels.cu, one build a history dtype) agree on.
// The legend is in kernels.h.
#pragma once

#include "hicache/kernels.h"

namespace hicache {

constexpr int kThreads = 256;  // of a block
constexpr int kBlocks = 2;     // of a multiprocessor, at least: 128 registers a thread

// gated_sum cut into tiles, one a thread at a time: ROWS rows, `args.channels` elements apart, by one pack of channels.
struct sum_tiles {
  sum_args args;
  int64_t numel;          // of the base
  int64_t packs, groups;  // of channels in a row, and of ROWS rows in a sample
  int64_t count;
};

// Elements a thread moves at once: 16 bytes of the type of lower precision.
constexpr int pack_size(int bytes, int other_bytes) { return 16 / (bytes < other_bytes ? bytes : other_bytes); }

// ROWS of a tile, by the bytes a thread loads for one of them at a feature. 48 to 96 bytes on their way a thread keep
// the memory busy; more would not fit 128 registers beside the sums, and spill.
constexpr int tile_rows(int bytes) { return bytes <= 16 ? 4 : bytes <= 48 ? 2 : 1; }

using cascade_kernel = void (*)(cascade_args);
using sum_kernel = void (*)(sum_tiles);

// "wide" kernels move 16 bytes at a time and are chosen by the number of orders; "any" kernels move one element at
// a time, at any address.
struct cascade_kernels {
  cascade_kernel wide[kMaxOrders];  // [num_differences]
  cascade_kernel any;
};

struct sum_kernels {
  sum_kernel wide[2][kMaxOrders];  // [update][num_coeffs - 1]
  sum_kernel any;                  // null: no such pair of dtypes
};

struct cuda_kernel_table {
  cascade_kernels update;
  cascade_kernels update_forecast[2], forecast[2];  // [a row of coefficients for each feature]
  sum_kernels gated_sum[2][4];                      // [a row for each feature][base dtype]
};

template <class T>
cuda_kernel_table cuda_kernels();  // of a history of T
template <>
cuda_kernel_table cuda_kernels<float>();
template <>
cuda_kernel_table cuda_kernels<bf16>();
template <>
cuda_kernel_table cuda_kernels<fp16>();
template <>
cuda_kernel_table cuda_kernels<double>();

}  // namespace hicache
