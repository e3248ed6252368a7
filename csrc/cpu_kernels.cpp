// The CPU kernels. Built once for every instruction set with HICACHE_ISA naming it. The legend is in kernels.h.

#include "hicache/arithmetic.h"
#include "hicache/cpu.h"
#include "hicache/simd.h"

#include <type_traits>

namespace hicache {
namespace HICACHE_ISA {

namespace {

// Nothing from the standard library is called here: a shared instance of it could be one built for another
// instruction set.
inline int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

template <bool TAIL, class T>
inline vector_t<accumulate_t<T>> get(const T* from, int count) {
  if constexpr (TAIL) return load_tail(from, count);
  return load(from);
}

template <bool TAIL, class T>
inline void put(T* to, vector_t<accumulate_t<T>> value, int count) {
  if constexpr (TAIL) {
    store_tail(to, value, count);
  } else {
    store(to, value);
  }
}

// A result nobody reads here. Streamed, it does not pass through a cache; else its line is asked for early, because a
// store that misses holds up the loads behind it.
template <bool TAIL, class T>
inline void put_fresh(T* to, vector_t<accumulate_t<T>> value, int count, bool streamed) {
  constexpr int kAhead = 1024;
  if (!TAIL && streamed) {
    stream(to, value);
    return;
  }
  __builtin_prefetch(to + kAhead, 1);  // any address may be named
  put<TAIL>(to, value, count);
}

// body(tail, i, count) for every vector of [begin, end), the last one perhaps partial.
template <int LANES, class Body>
inline void for_each_vector(int64_t begin, int64_t end, Body body) {
  int64_t i = begin;
  for (; i + LANES <= end; i += LANES) body(std::false_type{}, i, LANES);
  if (i < end) body(std::true_type{}, i, static_cast<int>(end - i));
}

template <class A, int N>
struct coefficients {
  A values[N];
  coefficients(const scalars& from, int64_t feature) {
    for (int k = 0; k < N; ++k) {
      values[k] = from.features ? coefficient<A, true>(from, k, feature) : coefficient<A, false>(from, k, feature);
    }
  }
};

// body(coeffs, from, to) for every piece of [begin, end) that has coefficients of its own.
template <int COEFFS, class A, class Body>
inline void for_each_row(const cascade_args& a, int64_t begin, int64_t end, Body body) {
  for (int64_t i = begin; i < end;) {
    const int64_t feature = i / a.slot, stop = smaller(end, (feature + 1) * a.slot);
    body(coefficients<A, COEFFS>(a.coeffs, feature), i, stop);
    i = stop;
  }
}

// Reads the feature and the old differences, all before any store: the feature sits in the row the last one goes to.
template <bool TAIL, int DIFFERENCES, class T, class A>
inline void cascade_at(T* orders, int64_t stride, int top, int64_t i, int count, A inv_gap,
                       vector_t<A> (&d)[DIFFERENCES + 1]) {
  const vector_t<A> feature = get<TAIL>(orders + top * stride + i, count);
  for (int k = 0; k < DIFFERENCES; ++k) d[k] = get<TAIL>(orders + k * stride + i, count);
  cascade<DIFFERENCES>(feature, d, inv_gap);
  for (int k = 0; k <= DIFFERENCES; ++k) put<TAIL>(orders + k * stride + i, d[k], count);
}

template <class T, int DIFFERENCES>
void update(const cascade_args& a, const tactic&, int64_t begin, int64_t end) {
  using A = accumulate_t<T>;
  T* const orders = static_cast<T*>(a.past.orders);
  const A inv_gap = scalar<A>(a.inv_gap, 0);
  for_each_vector<simd<A>::lanes>(begin, end, [&](auto tail, int64_t i, int count) {
    vector_t<A> d[DIFFERENCES + 1];
    cascade_at<decltype(tail)::value, DIFFERENCES>(orders, a.past.order_stride, a.past.top, i, count, inv_gap, d);
  });
}

template <class T, int DIFFERENCES>
void update_forecast(const cascade_args& a, const tactic& how, int64_t begin, int64_t end) {
  using A = accumulate_t<T>;
  T* const orders = static_cast<T*>(a.past.orders);
  T* const out = static_cast<T*>(a.out);
  const A inv_gap = scalar<A>(a.inv_gap, 0);
  for_each_row<DIFFERENCES + 1, A>(a, begin, end, [&](const auto& coeffs, int64_t from, int64_t to) {
    for_each_vector<simd<A>::lanes>(from, to, [&](auto tail, int64_t i, int count) {
      constexpr bool TAIL = decltype(tail)::value;
      vector_t<A> d[DIFFERENCES + 1];
      cascade_at<TAIL, DIFFERENCES>(orders, a.past.order_stride, a.past.top, i, count, inv_gap, d);
      put_fresh<TAIL>(out + i, evaluate<DIFFERENCES + 1>(d, coeffs.values), count, how.streamed);
    });
  });
  if (how.streamed) stream_fence();
}

template <class T, int COEFFS>
void forecast(const cascade_args& a, const tactic& how, int64_t begin, int64_t end) {
  using A = accumulate_t<T>;
  const T* const orders = static_cast<const T*>(a.past.orders);
  T* const out = static_cast<T*>(a.out);
  for_each_row<COEFFS, A>(a, begin, end, [&](const auto& coeffs, int64_t from, int64_t to) {
    for_each_vector<simd<A>::lanes>(from, to, [&](auto tail, int64_t i, int count) {
      constexpr bool TAIL = decltype(tail)::value;
      vector_t<A> d[COEFFS];
      for (int k = 0; k < COEFFS; ++k) d[k] = get<TAIL>(orders + k * a.past.order_stride + i, count);
      put_fresh<TAIL>(out + i, evaluate<COEFFS>(d, coeffs.values), count, how.streamed);
    });
  });
  if (how.streamed) stream_fence();
}

// Sums feature by feature over blocks whose sums stay in a cache, so that a history is read as a few long streams.
template <class T, class B, int COEFFS, bool NEAR>
void sum_blocks(const sum_args& a, const tactic& how, int64_t begin, int64_t end) {
  using A = accumulate_t<T>;
  alignas(64) A sums[kLargestBlock];
  T* const orders = static_cast<T*>(a.past.orders);
  const B* const base = static_cast<const B*>(a.base);
  const B* const gates = static_cast<const B*>(a.gates);
  B* const out = static_cast<B*>(a.out);
  const A inv_gap = a.update ? scalar<A>(a.inv_gap, 0) : A(0);
  // Without gates a row has no meaning: one long row keeps the vectors whole.
  const int64_t channels = gates ? a.channels : end;
  const int64_t sample = gates ? a.rows * a.channels : end;

  for (int64_t block = begin; block < end; block += how.block) {
    const int64_t block_end = smaller(block + how.block, end);
    for (int64_t feature = 0; feature < a.num_features; ++feature) {
      T* const slot = orders + feature * a.feature_stride;
      const coefficients<A, COEFFS> coeffs(a.coeffs, feature);
      const bool first = feature == 0, last = feature == a.num_features - 1;
      // A processor's own prefetcher follows a stream, and loses it where a block ends: it may be told what comes next,
      // the block of the next feature or the next block. A prefetch may name any address; of what is read now it is none.
      const T* const next = !how.ahead ? slot : last ? orders + how.block : slot + a.feature_stride;
      for (int64_t row = block; row < block_end;) {
        const int64_t channel = row % channels;
        const int64_t row_end = smaller(block_end, row - channel + channels);
        const B* const gate =
            gates ? gates + (feature * a.batch + row / sample) * a.channels + channel - row : nullptr;
        for_each_vector<simd<A>::lanes>(row, row_end, [&](auto tail, int64_t i, int count) {
          constexpr bool TAIL = decltype(tail)::value;
          vector_t<A> d[COEFFS];
          if (a.update) {
            cascade_at<TAIL, COEFFS - 1>(slot, a.past.order_stride, a.past.top, i, count, inv_gap, d);
          } else {
            for (int k = 0; k < COEFFS; ++k) d[k] = get<TAIL>(slot + k * a.past.order_stride + i, count);
          }
          for (int k = 0; k < COEFFS; ++k) __builtin_prefetch(next + k * a.past.order_stride + i, 0, NEAR ? 3 : 2);
          vector_t<A> value = evaluate<COEFFS>(d, coeffs.values);
          if (gate) value = value * get<TAIL>(gate + i, count);
          value = value + (first ? get<TAIL>(base + i, count) : get<TAIL>(sums + (i - block), count));
          if (last) {
            put_fresh<TAIL>(out + i, value, count, how.streamed);
          } else {  // a whole vector would end in the next row's sums
            put<TAIL>(sums + (i - block), value, count);
          }
        });
        row = row_end;
      }
    }
  }
  if (how.streamed) stream_fence();
}

template <class T, class B, int COEFFS>
void gated_sum(const sum_args& a, const tactic& how, int64_t begin, int64_t end) {
  (how.near ? sum_blocks<T, B, COEFFS, true> : sum_blocks<T, B, COEFFS, false>)(a, how, begin, end);
}

template <class T, int N>
constexpr void fill_order(kernel_table& table, int type) {
  table.update[type][N] = update<T, N>;
  table.update_forecast[type][N] = update_forecast<T, N>;
  table.forecast[type][N] = forecast<T, N + 1>;
}

template <class T>
constexpr void fill_cascades(kernel_table& table, dtype type) {
  const int t = static_cast<int>(type);
  fill_order<T, 0>(table, t);
  fill_order<T, 1>(table, t);
  fill_order<T, 2>(table, t);
  fill_order<T, 3>(table, t);
  fill_order<T, 4>(table, t);
}

template <class T, class B>
constexpr void fill_sums(kernel_table& table, dtype type, dtype base) {
  sum_fn* const sums = table.gated_sum[static_cast<int>(type)][static_cast<int>(base)];
  sums[0] = gated_sum<T, B, 1>;
  sums[1] = gated_sum<T, B, 2>;
  sums[2] = gated_sum<T, B, 3>;
  sums[3] = gated_sum<T, B, 4>;
  sums[4] = gated_sum<T, B, 5>;
}

constexpr kernel_table make_table() {
  kernel_table table = {};
  table.name = HICACHE_ISA_NAME;
  fill_cascades<float>(table, dtype::f32);
  fill_cascades<bf16>(table, dtype::bf16);
  fill_cascades<fp16>(table, dtype::f16);
  fill_cascades<double>(table, dtype::f64);
  fill_sums<float, float>(table, dtype::f32, dtype::f32);
  fill_sums<bf16, bf16>(table, dtype::bf16, dtype::bf16);
  fill_sums<fp16, fp16>(table, dtype::f16, dtype::f16);
  fill_sums<double, double>(table, dtype::f64, dtype::f64);
  fill_sums<float, bf16>(table, dtype::f32, dtype::bf16);  // a history of higher precision than the model
  fill_sums<float, fp16>(table, dtype::f32, dtype::f16);
  fill_sums<bf16, float>(table, dtype::bf16, dtype::f32);  // or of lower, for its memory
  fill_sums<fp16, float>(table, dtype::f16, dtype::f32);
  return table;
}

}  // namespace

extern constexpr kernel_table kernels = make_table();  // made by the compiler

}  // namespace HICACHE_ISA
}  // namespace hicache
