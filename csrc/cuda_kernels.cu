// The CUDA kernels of one history dtype, HICACHE_TYPE. Built once for each, so that they build side by side.

#include "hicache/cuda_threads.h"

namespace hicache {
namespace {

__device__ int64_t thread() { return static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x; }
__device__ int64_t threads() { return static_cast<int64_t>(gridDim.x) * kThreads; }

template <class T, int LANES, int READ>
__global__ void __launch_bounds__(kThreads, kBlocks) update_kernel(const __grid_constant__ cascade_args a) {
  update_thread<T, LANES, READ, false>(a, thread(), threads());
}

template <class T, int LANES, int READ>
__global__ void __launch_bounds__(kThreads, kBlocks) update_forecast_kernel(const __grid_constant__ cascade_args a) {
  update_thread<T, LANES, READ, true>(a, thread(), threads());
}

template <class T, int LANES, int READ>
__global__ void __launch_bounds__(kThreads, kBlocks) forecast_kernel(const __grid_constant__ cascade_args a) {
  forecast_thread<T, LANES, READ + 1>(a, thread(), threads());
}

template <class T, class B, int LANES, int ROWS, int ORDERS, bool UPDATE>
__global__ void __launch_bounds__(kThreads, kBlocks) gated_sum_kernel(const __grid_constant__ sum_tiles s) {
  sum_thread<T, B, LANES, ROWS, ORDERS, UPDATE>(s, thread(), threads());
}

// One number at a time: the number of orders is a matter of run time, which costs little where memory is read so.

template <class T, bool FORECAST, int READ = 0>
__device__ void update_any(const cascade_args& a) {
  if (a.read == READ) {
    update_thread<T, 1, READ, FORECAST>(a, thread(), threads());
  } else if constexpr (READ + 1 < kMaxOrders) {
    update_any<T, FORECAST, READ + 1>(a);
  }
}

template <class T, int READ = 0>
__device__ void forecast_any(const cascade_args& a) {
  if (a.read == READ) {
    forecast_thread<T, 1, READ + 1>(a, thread(), threads());
  } else if constexpr (READ + 1 < kMaxOrders) {
    forecast_any<T, READ + 1>(a);
  }
}

template <class T, class B, int ORDERS = 1>
__device__ void gated_sum_any(const sum_tiles& s) {
  if (s.args.orders_used == ORDERS) {
    if (s.args.update) {
      sum_thread<T, B, 1, 1, ORDERS, true>(s, thread(), threads());
    } else {
      sum_thread<T, B, 1, 1, ORDERS, false>(s, thread(), threads());
    }
  } else if constexpr (ORDERS < kMaxOrders) {
    gated_sum_any<T, B, ORDERS + 1>(s);
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

template <class T, int READ = 0>
void fill_wide(cuda_kernel_table& table) {
  constexpr int LANES = pack_size(sizeof(T), sizeof(T));
  table.update.wide[READ] = update_kernel<T, LANES, READ>;
  table.update_forecast.wide[READ] = update_forecast_kernel<T, LANES, READ>;
  table.forecast.wide[READ] = forecast_kernel<T, LANES, READ>;
  if constexpr (READ + 1 < kMaxOrders) fill_wide<T, READ + 1>(table);
}

template <class T, class B, int ORDERS = 1>
void fill_sums(sum_kernels& sums) {
  constexpr int LANES = pack_size(sizeof(T), sizeof(B));
  constexpr int ROWS = tile_rows(LANES * sizeof(T) * ORDERS);
  sums.any = gated_sum_any_kernel<T, B>;
  sums.wide[false][ORDERS - 1] = gated_sum_kernel<T, B, LANES, ROWS, ORDERS, false>;
  sums.wide[true][ORDERS - 1] = gated_sum_kernel<T, B, LANES, ROWS, ORDERS, true>;
  if constexpr (ORDERS < kMaxOrders) fill_sums<T, B, ORDERS + 1>(sums);
}

// A history wider than the model is for its digits, a narrower one for its memory.
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
