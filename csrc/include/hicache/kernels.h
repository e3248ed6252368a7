// What is asked of a kernel, on the CPU and on CUDA alike: sizes in elements, and raw addresses on its device.
//
// The legend of csrc/, for every file. What the ops compute is said in hicache_kernels/backends/reference.py.
//
//   K                 orders of a history, order + 1; `orders` is [K, numel], or [K, num_features, slot]
//   n, numel          elements of a row, or of the base
//   features          cached tensors of one shape in a history; `slot` elements apart (`feature_stride`)
//   differences       old differences D_0 ... that exist and enter the cascade: `num_differences`, DIFFERENCES
//   coefficients      the forecast's factors, one an order that exists: `num_coeffs`, COEFFS; a row of them for all
//                     features, or [num_coeffs, num_features]
//   gate              factor on a feature: one a sample and channel
//   inv_gap           1 / steps since the last full step
//   base              the hidden state a gated sum begins with, [batch, rows, channels]
//   top               the row of the inbox, K - 1: where a full step writes a new feature
//   element           a number in a tensor
//   lane              a number in a vector: of a SIMD register on the CPU, of a pack on CUDA; LANES of them
//   pack, chunk       LANES elements as they are stored; 16 bytes of them, which one load moves. Of two dtypes the pack
//                     of the lower precision is one chunk
//   tile              a CUDA thread's work at a time: ROWS rows by one pack of channels
//   T, B, A           dtype of the history, of base, gates and out, and of arithmetic
//   high, low         precision: of arithmetic (float64 for float64, else fp32), and of storage. promote() goes up
//                     and is exact, round_to() goes down and is the only rounding
//   wide, any         accesses of 16 bytes; of one element, at any address
#pragma once

#include <cstdint>

#include "hicache/types.h"

namespace hicache {

constexpr int kMaxOrders = 5;  // K = order + 1; kernels are compiled for 1..5

enum class dtype : int { f32 = 0, bf16 = 1, f16 = 2, f64 = 3 };

template <class T>
inline constexpr dtype dtype_of = dtype::f32;
template <>
inline constexpr dtype dtype_of<bf16> = dtype::bf16;
template <>
inline constexpr dtype dtype_of<fp16> = dtype::f16;
template <>
inline constexpr dtype dtype_of<double> = dtype::f64;

// One history seen as rows of elements, `order_stride` elements apart.
struct history {
  void* orders;  // [K, ...]
  int64_t order_stride;
  int top;  // the row that received the new feature: K - 1
  dtype type;
};

// Coefficients, or the inverse gap: where the kernel runs, so that a captured launch replays with new ones.
struct scalars {
  const void* values;
  dtype type;  // f32 or f64
  int64_t features;  // that have coefficients of their own: order k of feature i is at k * features + i; 0 for none
};

template <class A>
HICACHE_INLINE A scalar(const scalars& from, int64_t index) {
  if (from.type == dtype::f64) return static_cast<A>(static_cast<const double*>(from.values)[index]);
  return static_cast<A>(static_cast<const float*>(from.values)[index]);
}

// Order k's coefficient for a feature, where there is a row of them for each; else for all.
template <class A, bool BY_FEATURE>
HICACHE_INLINE A coefficient(const scalars& from, int k, int64_t feature) {
  return scalar<A>(from, BY_FEATURE ? k * from.features + feature : k);
}

struct cascade_args {
  history past;
  int64_t numel;
  int num_differences;  // for a forecast, num_coeffs - 1
  scalars inv_gap;  // not for a forecast
  scalars coeffs;   // forecast only: num_differences + 1 of them
  int64_t slot;     // forecast only: elements of a feature that has coefficients of its own, else numel
  void* out;        // forecast only
};

struct sum_args {
  history past;
  int64_t feature_stride;  // elements between the slots of two features
  int64_t num_features;
  int64_t batch, rows, channels;  // base and out are [batch, rows, channels]
  dtype base_type;
  const void* base;
  const void* gates;  // [num_features, batch, channels] in base_type, or null for gates of one
  void* out;
  int num_coeffs;
  scalars coeffs;
  bool update;  // an update is pending: do it too
  scalars inv_gap;
};

}  // namespace hicache
