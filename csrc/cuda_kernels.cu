// The CUDA kernels of one history dtype, HICACHE_TYPE. Built once for each, so that they build side by side.
// The legend is in kernels.h.

#include "hicache/cuda_threads.h"

namespace hicache {
namespace {

__device__ int64_t thread() { return static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x; }
__device__ int64_t threads() { return static_cast<int64_t>(gridDim.x) * kThreads; }

template <class T, int LANES, int DIFFERENCES>
__global__ void __launch_bounds__(kThreads, kBlocks) update_kernel(const __grid_constant__ cascade_args a) {
  update_thread<T, LANES, DIFFERENCES, false, false>(a, thread(), threads());
}

template <class T, int LANES, int DIFFERENCES, bool BY_FEATURE>
__global__ void __launch_bounds__(kThreads, kBlocks) update_forecast_kernel(const __grid_constant__ cascade_args a) {
  update_thread<T, LANES, DIFFERENCES, true, BY_FEATURE>(a, thread(), threads());
}

template <class T, int LANES, int DIFFERENCES, bool BY_FEATURE>
__global__ void __launch_bounds__(kThreads, kBlocks) forecast_kernel(const __grid_constant__ cascade_args a) {
  forecast_thread<T, LANES, DIFFERENCES + 1, BY_FEATURE>(a, thread(), threads());
}

template <class T, class B, int LANES, int ROWS, int COEFFS, bool UPDATE, bool BY_FEATURE>
__global__ void __launch_bounds__(kThreads, kBlocks) gated_sum_kernel(const __grid_constant__ sum_tiles s) {
  sum_thread<T, B, LANES, ROWS, COEFFS, UPDATE, BY_FEATURE>(s, thread(), threads());
}

// One element at a time: the number of orders is a matter of run time, which costs little where memory is read so.

template <class T, bool FORECAST, bool BY_FEATURE, int DIFFERENCES = 0>
__device__ void update_any(const cascade_args& a) {
  if (a.num_differences == DIFFERENCES) {
    update_thread<T, 1, DIFFERENCES, FORECAST, BY_FEATURE>(a, thread(), threads());
  } else if constexpr (DIFFERENCES + 1 < kMaxOrders) {
    update_any<T, FORECAST, BY_FEATURE, DIFFERENCES + 1>(a);
  }
}

template <class T, bool BY_FEATURE, int DIFFERENCES = 0>
__device__ void forecast_any(const cascade_args& a) {
  if (a.num_differences == DIFFERENCES) {
    forecast_thread<T, 1, DIFFERENCES + 1, BY_FEATURE>(a, thread(), threads());
  } else if constexpr (DIFFERENCES + 1 < kMaxOrders) {
    forecast_any<T, BY_FEATURE, DIFFERENCES + 1>(a);
  }
}

template <class T, class B, bool BY_FEATURE, int COEFFS = 1>
__device__ void gated_sum_any(const sum_tiles& s) {
  if (s.args.num_coeffs == COEFFS) {
    if (s.args.update) {
      sum_thread<T, B, 1, 1, COEFFS, true, BY_FEATURE>(s, thread(), threads());
    } else {
      sum_thread<T, B, 1, 1, COEFFS, false, BY_FEATURE>(s, thread(), threads());
    }
  } else if constexpr (COEFFS < kMaxOrders) {
    gated_sum_any<T, B, BY_FEATURE, COEFFS + 1>(s);
  }
}

template <class T>
__global__ void __launch_bounds__(kThreads, kBlocks) update_any_kernel(const __grid_constant__ cascade_args a) {
  update_any<T, false, false>(a);
}

template <class T, bool BY_FEATURE>
__global__ void __launch_bounds__(kThreads, kBlocks)
    update_forecast_any_kernel(const __grid_constant__ cascade_args a) {
  update_any<T, true, BY_FEATURE>(a);
}

template <class T, bool BY_FEATURE>
__global__ void __launch_bounds__(kThreads, kBlocks) forecast_any_kernel(const __grid_constant__ cascade_args a) {
  forecast_any<T, BY_FEATURE>(a);
}

template <class T, class B, bool BY_FEATURE>
__global__ void __launch_bounds__(kThreads, kBlocks) gated_sum_any_kernel(const __grid_constant__ sum_tiles s) {
  gated_sum_any<T, B, BY_FEATURE>(s);
}

template <class T, int DIFFERENCES = 0>
void fill_updates(cascade_kernels& updates) {
  updates.any = update_any_kernel<T>;
  updates.wide[DIFFERENCES] = update_kernel<T, pack_size(sizeof(T), sizeof(T)), DIFFERENCES>;
  if constexpr (DIFFERENCES + 1 < kMaxOrders) fill_updates<T, DIFFERENCES + 1>(updates);
}

template <class T, bool BY_FEATURE, int DIFFERENCES = 0>
void fill_forecasts(cuda_kernel_table& table) {
  constexpr int LANES = pack_size(sizeof(T), sizeof(T));
  cascade_kernels& after_update = table.update_forecast[BY_FEATURE];
  cascade_kernels& alone = table.forecast[BY_FEATURE];
  after_update.any = update_forecast_any_kernel<T, BY_FEATURE>;
  alone.any = forecast_any_kernel<T, BY_FEATURE>;
  after_update.wide[DIFFERENCES] = update_forecast_kernel<T, LANES, DIFFERENCES, BY_FEATURE>;
  alone.wide[DIFFERENCES] = forecast_kernel<T, LANES, DIFFERENCES, BY_FEATURE>;
  if constexpr (DIFFERENCES + 1 < kMaxOrders) fill_forecasts<T, BY_FEATURE, DIFFERENCES + 1>(table);
}

template <class T, class B, bool BY_FEATURE, int COEFFS = 1>
void fill_sums(sum_kernels& sums) {
  constexpr int LANES = pack_size(sizeof(T), sizeof(B));
  constexpr int ROWS = tile_rows(LANES * sizeof(T) * COEFFS);
  sums.any = gated_sum_any_kernel<T, B, BY_FEATURE>;
  sums.wide[false][COEFFS - 1] = gated_sum_kernel<T, B, LANES, ROWS, COEFFS, false, BY_FEATURE>;
  sums.wide[true][COEFFS - 1] = gated_sum_kernel<T, B, LANES, ROWS, COEFFS, true, BY_FEATURE>;
  if constexpr (COEFFS < kMaxOrders) fill_sums<T, B, BY_FEATURE, COEFFS + 1>(sums);
}

// A history of higher precision than the model is for its digits, one of lower for its memory.
template <class T, class B>
void fill_pair(cuda_kernel_table& table) {
  constexpr dtype kept = dtype_of<T>, base = dtype_of<B>;
  constexpr bool f32 = kept == dtype::f32 || base == dtype::f32;
  constexpr bool f64 = kept == dtype::f64 || base == dtype::f64;
  if constexpr (kept == base || (f32 && !f64)) {
    fill_sums<T, B, false>(table.gated_sum[false][static_cast<int>(base)]);
    fill_sums<T, B, true>(table.gated_sum[true][static_cast<int>(base)]);
  }
}

}  // namespace

template <>
cuda_kernel_table cuda_kernels<HICACHE_TYPE>() {
  using T = HICACHE_TYPE;
  cuda_kernel_table table = {};
  fill_updates<T>(table.update);
  fill_forecasts<T, false>(table);
  fill_forecasts<T, true>(table);
  fill_pair<T, float>(table);
  fill_pair<T, bf16>(table);
  fill_pair<T, fp16>(table);
  fill_pair<T, double>(table);
  return table;
}

}  // namespace hicache
