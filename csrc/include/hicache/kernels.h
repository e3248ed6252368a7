// What is asked of a kernel, on the CPU and on CUDA alike: sizes in numbers, and raw addresses on its device.
#pragma once

#include <cstdint>

#include "hicache/types.h"

namespace hicache {

constexpr int kMaxOrders = 5;  // K = order + 1; kernels are compiled for 1..5

enum class dtype : int { f32 = 0, bf16 = 1, f16 = 2, f64 = 3 };

template <class T>
constexpr dtype dtype_of = dtype::f32;
template <>
constexpr dtype dtype_of<bf16> = dtype::bf16;
template <>
constexpr dtype dtype_of<fp16> = dtype::f16;
template <>
constexpr dtype dtype_of<double> = dtype::f64;

// One history seen as rows of numbers, `order_stride` numbers apart.
struct history {
  void* orders;
  int64_t order_stride;
  int top;  // the row that received the new feature: K - 1
  dtype type;
};

// Coefficients, or the inverse gap: where the kernel runs, so that a captured launch replays with new ones.
struct scalars {
  const void* values;
  dtype type;  // f32 or f64
};

template <class A>
HICACHE_INLINE A scalar(const scalars& from, int index) {
  if (from.type == dtype::f64) return static_cast<A>(static_cast<const double*>(from.values)[index]);
  return static_cast<A>(static_cast<const float*>(from.values)[index]);
}

struct cascade_args {
  history past;
  int64_t numel;
  int read;         // old differences that exist; for a forecast, coefficients - 1
  scalars inv_gap;  // not for a forecast
  scalars coeffs;   // forecast only: read + 1 of them
  void* out;        // forecast only
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
  scalars coeffs;
  bool update;  // an update is pending: do it too
  scalars inv_gap;
};

}  // namespace hicache
