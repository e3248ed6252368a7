// The CUDA kernels of one history dtype, HICACHE_TYPE. Built once for each, so that they build side by side.
// The legend is in kernels.h.

#include "hicache/cuda_threads.h"

namespace hicache {
namespace {

__device__ int64_t thread() { return static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x; }
__device__ int64_t threads() { return static_cast<int64_t>(gridDim.x) * kThreads; }

template <class T, int LANES, int DIFFERENCES>
__global__ void __launch_bounds__(kThreads, kBlocks) update_kernel(const __grid_constant__ cascade_args a) {
  update_thread<T, LANES, DIFFERENCES, false>(a, thread(), threads());
}

template <class T, int LANES, int DIFFERENCES>
__global__ void __launch_bounds__(kThreads, kBlocks) update_forecast_kernel(const __grid_constant__ cascade_args a) {
  update_thread<T, LANES, DIFFERENCES, true>(a, thread(), threads());
}

template <class T, int LANES, int DIFFERENCES>
__global__ void __launch_bounds__(kThreads, kBlocks) forecast_kernel(const __grid_constant__ cascade_args a) {
  forecast_thread<T, LANES, DIFFERENCES + 1>(a, thread(), threads());
}

template <class T, class B, int LANES, int ROWS, int COEFFS, bool UPDATE>
__global__ void __launch_bounds__(kThreads, kBlocks) gated_sum_kernel(const __grid_constant__ sum_tiles s) {
  sum_thread<T, B, LANES, ROWS, COEFFS, UPDATE>(s, thread(), threads());
}

// One element at a time: the number of orders is a matter of run time, which costs little where memory is read so.

template <class T, bool FORECAST, int DIFFERENCES = 0>
__device__ void update_any(const cascade_args& a) {
  if (a.num_differences == DIFFERENCES) {
    update_thread<T, 1, DIFFERENCES, FORECAST>(a, thread(), threads());
  } else if constexpr (DIFFERENCES + 1 < kMaxOrders) {
    update_any<T, FORECAST, DIFFERENCES + 1>(a);
  }
}

template <class T, int DIFFERENCES = 0>
__device__ void forecast_any(const cascade_args& a) {
  if (a.num_differences == DIFFERENCES) {
    forecast_thread<T, 1, DIFFERENCES + 1>(a, thread(), threads());
  } else if constexpr (DIFFERENCES + 1 < kMaxOrders) {
    forecast_any<T, DIFFERENCES + 1>(a);
  }
}

template <class T, class B, int COEFFS = 1>
__device__ void gated_sum_any(const sum_tiles& s) {
  if (s.args.num_coeffs == COEFFS) {
    if (s.args.update) {
      sum_thread<T, B, 1, 1, COEFFS, true>(s, thread(), threads());
    } else {
      sum_thread<T, B, 1, 1, COEFFS, false>(s, thread(), threads());
    }
  } else if constexpr (COEFFS < kMaxOrders) {
    gated_sum_any<T, B, COEFFS + 1>(s);
  }
}

template <class T>
__global__ void __launch_bounds__(kThreads, kBlocks) update_any_kernel(const __grid_constant__ cascade_args a) {
  update_any<T, false>(a);
}

template <class T>
__global__ void __launch_bounds__(kThreads, kBlocks)
    update_forecast_any_kernel(const __grid_constant__ cascade_args a) {
  update_any<T, true>(a);
}

template <class T>
__global__ void __launch_bounds__(kThreads, kBlocks) forecast_any_kernel(const __grid_constant__ cascade_args a) {
  forecast_any<T>(a);
}

template <class T, class B>
__global__ void __launch_bounds__(kThreads, kBlocks) gated_sum_any_kernel(const __grid_constant__ sum_tiles s) {
  gated_sum_any<T, B>(s);
}

template <class T, int DIFFERENCES = 0>
void fill_wide(cuda_kernel_table& table) {
  constexpr int LANES = pack_size(sizeof(T), sizeof(T));
  table.update.wide[DIFFERENCES] = update_kernel<T, LANES, DIFFERENCES>;
  table.update_forecast.wide[DIFFERENCES] = update_forecast_kernel<T, LANES, DIFFERENCES>;
  table.forecast.wide[DIFFERENCES] = forecast_kernel<T, LANES, DIFFERENCES>;
  if constexpr (DIFFERENCES + 1 < kMaxOrders) fill_wide<T, DIFFERENCES + 1>(table);
}

template <class T, class B, int COEFFS = 1>
void fill_sums(sum_kernels& sums) {
  constexpr int LANES = pack_size(sizeof(T), sizeof(B));
  constexpr int ROWS = tile_rows(LANES * sizeof(T) * COEFFS);
  sums.any = gated_sum_any_kernel<T, B>;
  sums.wide[false][COEFFS - 1] = gated_sum_kernel<T, B, LANES, ROWS, COEFFS, false>;
  sums.wide[true][COEFFS - 1] = gated_sum_kernel<T, B, LANES, ROWS, COEFFS, true>;
  if constexpr (COEFFS < kMaxOrders) fill_sums<T, B, COEFFS + 1>(sums);
}

// A history of higher precision than the model is for its digits, one of lower for its memory.
template <class T, class B>
void fill_pair(cuda_kernel_table& table) {
  constexpr dtype kept = dtype_of<T>, base = dtype_of<B>;
  constexpr bool f32 = kept == dtype::f32 || base == dtype::f32;
  constexpr bool f64 = kept == dtype::f64 || base == dtype::f64;
  if constexpr (kept == base || (f32 && !f64)) fill_sums<T, B>(table.gated_sum[static_cast<int>(base)]);
}

}  // namespace

template <>
cuda_kernel_table cuda_kernels<HICACHE_TYPE>() {
  using T = HICACHE_TYPE;
  cuda_kernel_table table = {};
  table.update.any = update_any_kernel<T>;
  table.update_forecast.any = update_forecast_any_kernel<T>;
  table.forecast.any = forecast_any_kernel<T>;
  fill_wide<T>(table);
  fill_pair<T, float>(table);
  fill_pair<T, bf16>(table);
  fill_pair<T, fp16>(table);
  fill_pair<T, double>(table);
  return table;
}

}  // namespace hicache
