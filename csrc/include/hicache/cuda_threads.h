// What one CUDA thread does, given its number and how many there are. Plain C++, so that it can be run anywhere.
// The legend is in kernels.h.
#pragma once

#include "hicache/arithmetic.h"
#include "hicache/cuda.h"

namespace hicache {

// LANES neighbouring elements in registers, in high precision, with the operators the arithmetic is written in.
template <class A, int LANES>
struct lanes {
  A at[LANES];
};

template <class A, int LANES>
HICACHE_INLINE lanes<A, LANES> operator+(const lanes<A, LANES>& a, const lanes<A, LANES>& b) {
  lanes<A, LANES> out;
  HICACHE_UNROLL
  for (int i = 0; i < LANES; ++i) out.at[i] = a.at[i] + b.at[i];
  return out;
}

template <class A, int LANES>
HICACHE_INLINE lanes<A, LANES> operator-(const lanes<A, LANES>& a, const lanes<A, LANES>& b) {
  lanes<A, LANES> out;
  HICACHE_UNROLL
  for (int i = 0; i < LANES; ++i) out.at[i] = a.at[i] - b.at[i];
  return out;
}

template <class A, int LANES>
HICACHE_INLINE lanes<A, LANES> operator*(const lanes<A, LANES>& a, const lanes<A, LANES>& b) {
  lanes<A, LANES> out;
  HICACHE_UNROLL
  for (int i = 0; i < LANES; ++i) out.at[i] = a.at[i] * b.at[i];
  return out;
}

template <class A, int LANES>
HICACHE_INLINE lanes<A, LANES> operator*(const lanes<A, LANES>& a, A b) {
  lanes<A, LANES> out;
  HICACHE_UNROLL
  for (int i = 0; i < LANES; ++i) out.at[i] = a.at[i] * b;
  return out;
}

// The same as they are stored: kept so until they are needed, for low precision fills fewer registers.
template <class T, int LANES>
struct alignas(LANES == 1 ? alignof(T) : 16) pack {
  T at[LANES];
};

struct alignas(16) chunk {
  uint32_t words[4];
};

HICACHE_INLINE void store(chunk* to, const chunk& part) {
#if defined(__CUDA_ARCH__)
  // Left to itself the compiler makes four stores of it in some kernels.
  asm volatile("st.global.v4.u32 [%0], {%1, %2, %3, %4};"
               :
               : "l"(__cvta_generic_to_global(to)), "r"(part.words[0]), "r"(part.words[1]), "r"(part.words[2]),
                 "r"(part.words[3])
               : "memory");
#else
  *to = part;
#endif
}

template <int LANES, class T>
HICACHE_INLINE pack<T, LANES> load(const T* from) {
  pack<T, LANES> out;
  if constexpr (LANES == 1) {
    out.at[0] = from[0];
  } else {
    HICACHE_UNROLL
    for (int i = 0; i < static_cast<int>(sizeof out / sizeof(chunk)); ++i) {
      const chunk part = reinterpret_cast<const chunk*>(from)[i];
      std::memcpy(reinterpret_cast<char*>(&out) + i * sizeof part, &part, sizeof part);
    }
  }
  return out;
}

template <int LANES, class T>
HICACHE_INLINE lanes<accumulate_t<T>, LANES> promote(const pack<T, LANES>& from) {
  lanes<accumulate_t<T>, LANES> out;
  HICACHE_UNROLL
  for (int i = 0; i < LANES; ++i) out.at[i] = promote(from.at[i]);
  return out;
}

template <int LANES, class T>
HICACHE_INLINE void store(T* to, const lanes<accumulate_t<T>, LANES>& value) {
  if constexpr (LANES == 1) {
    round_to(value.at[0], to[0]);
  } else {
    HICACHE_UNROLL
    for (int i = 0; i < static_cast<int>(LANES * sizeof(T) / sizeof(chunk)); ++i) {
      chunk part;
      HICACHE_UNROLL
      for (int word = 0; word < 4; ++word) {
        if constexpr (sizeof(T) == 2) {
          part.words[word] = round_pair<T>(value.at[8 * i + 2 * word], value.at[8 * i + 2 * word + 1]);
        } else if constexpr (sizeof(T) == 4) {
          part.words[word] = bits_of(value.at[4 * i + word]);
        }
      }
      if constexpr (sizeof(T) == 8) std::memcpy(&part, &value.at[2 * i], sizeof part);
      store(reinterpret_cast<chunk*>(to) + i, part);
    }
  }
}

// The feature last, after the old differences: every load, before any store goes to the row it sits in.
template <int LANES, int DIFFERENCES, class T>
HICACHE_INLINE void load_old(const T* orders, int64_t stride, int top, pack<T, LANES> (&old)[DIFFERENCES + 1]) {
  HICACHE_UNROLL
  for (int k = 0; k < DIFFERENCES; ++k) old[k] = load<LANES>(orders + k * stride);
  old[DIFFERENCES] = load<LANES>(orders + top * stride);
}

template <int LANES, int DIFFERENCES, class T, class A>
HICACHE_INLINE void store_new(T* orders, int64_t stride, const pack<T, LANES> (&old)[DIFFERENCES + 1], A inv_gap,
                              lanes<A, LANES> (&d)[DIFFERENCES + 1]) {
  HICACHE_UNROLL
  for (int k = 0; k < DIFFERENCES; ++k) d[k] = promote<LANES>(old[k]);
  cascade<DIFFERENCES>(promote<LANES>(old[DIFFERENCES]), d, inv_gap);
  HICACHE_UNROLL
  for (int k = 0; k <= DIFFERENCES; ++k) store<LANES>(orders + k * stride, d[k]);
}

template <class A, int N>
struct coefficients {
  A at[N];
};

template <class A, int N, bool BY_FEATURE>
HICACHE_INLINE coefficients<A, N> load_coeffs(const scalars& from, int64_t feature) {
  coefficients<A, N> out;
  HICACHE_UNROLL
  for (int k = 0; k < N; ++k) out.at[k] = coefficient<A, BY_FEATURE>(from, k, feature);
  return out;
}

// The coefficients of the elements a thread is at: loaded once, or, where every feature has its own, once a feature.
template <class A, int N, bool BY_FEATURE>
struct coefficients_at {
  coefficients<A, N> row;
  int64_t end;  // of the feature they are for
};

template <bool BY_FEATURE, class A, int N>
HICACHE_INLINE void begin(coefficients_at<A, N, BY_FEATURE>& coeffs, const cascade_args& a) {
  if constexpr (!BY_FEATURE) coeffs.row = load_coeffs<A, N, false>(a.coeffs, 0);
}

template <bool BY_FEATURE, class A, int N>
HICACHE_INLINE void go_to(coefficients_at<A, N, BY_FEATURE>& coeffs, const cascade_args& a, int64_t i) {
  if (!BY_FEATURE || i < coeffs.end) return;
  const int64_t feature = i / a.slot;
  coeffs.row = load_coeffs<A, N, true>(a.coeffs, feature);
  coeffs.end = (feature + 1) * a.slot;
}

template <class T, int LANES, int DIFFERENCES, bool FORECAST, bool BY_FEATURE>
HICACHE_INLINE void update_thread(const cascade_args& a, int64_t thread, int64_t threads) {
  using A = accumulate_t<T>;
  T* const orders = static_cast<T*>(a.past.orders);
  const A inv_gap = scalar<A>(a.inv_gap, 0);
  coefficients_at<A, DIFFERENCES + 1, BY_FEATURE> coeffs = {};
  if constexpr (FORECAST) begin<BY_FEATURE>(coeffs, a);
  for (int64_t i = thread * LANES; i < a.numel; i += threads * LANES) {
    if constexpr (FORECAST) go_to<BY_FEATURE>(coeffs, a, i);
    pack<T, LANES> old[DIFFERENCES + 1];
    lanes<A, LANES> d[DIFFERENCES + 1];
    load_old<LANES, DIFFERENCES>(orders + i, a.past.order_stride, a.past.top, old);
    store_new<LANES, DIFFERENCES>(orders + i, a.past.order_stride, old, inv_gap, d);
    if constexpr (FORECAST) store<LANES>(static_cast<T*>(a.out) + i, evaluate<DIFFERENCES + 1>(d, coeffs.row.at));
  }
}

template <class T, int LANES, int COEFFS, bool BY_FEATURE>
HICACHE_INLINE void forecast_thread(const cascade_args& a, int64_t thread, int64_t threads) {
  using A = accumulate_t<T>;
  const T* const orders = static_cast<const T*>(a.past.orders);
  coefficients_at<A, COEFFS, BY_FEATURE> coeffs = {};
  begin<BY_FEATURE>(coeffs, a);
  for (int64_t i = thread * LANES; i < a.numel; i += threads * LANES) {
    go_to<BY_FEATURE>(coeffs, a, i);
    lanes<A, LANES> d[COEFFS];
    HICACHE_UNROLL
    for (int k = 0; k < COEFFS; ++k) d[k] = promote<LANES>(load<LANES>(orders + i + k * a.past.order_stride));
    store<LANES>(static_cast<T*>(a.out) + i, evaluate<COEFFS>(d, coeffs.row.at));
  }
}

// One tile of gated_sum: ROWS rows from element `at` on, by LANES channels; `gate` is that of the first feature, or
// null.
template <class T, class B, int LANES, int ROWS, int COEFFS, bool UPDATE, bool BY_FEATURE, class A>
HICACHE_INLINE void sum_tile(const sum_args& a, A inv_gap, coefficients<A, COEFFS> coeffs, int64_t at, const B* gate) {
  constexpr int DIFFERENCES = COEFFS - 1;
  lanes<A, LANES> sums[ROWS];
  HICACHE_UNROLL
  for (int row = 0; row < ROWS; ++row) {
    sums[row] = promote<LANES>(load<LANES>(static_cast<const B*>(a.base) + at + row * a.channels));
  }
  T* slot = static_cast<T*>(a.past.orders) + at;
  for (int64_t feature = 0; feature < a.num_features; ++feature) {
    // The whole tile is asked for before any of it is used or stored: memory is far, and it is asked in parallel.
    pack<T, LANES> old[ROWS][COEFFS];
    HICACHE_UNROLL
    for (int row = 0; row < ROWS; ++row) {
      const int top = UPDATE ? a.past.top : DIFFERENCES;
      load_old<LANES, DIFFERENCES>(slot + row * a.channels, a.past.order_stride, top, old[row]);
    }
    pack<B, LANES> gates = {};
    if (gate) gates = load<LANES>(gate);
    if constexpr (BY_FEATURE) coeffs = load_coeffs<A, COEFFS, true>(a.coeffs, feature);
    HICACHE_UNROLL
    for (int row = 0; row < ROWS; ++row) {
      lanes<A, LANES> d[COEFFS];
      if constexpr (UPDATE) {
        store_new<LANES, DIFFERENCES>(slot + row * a.channels, a.past.order_stride, old[row], inv_gap, d);
      } else {
        HICACHE_UNROLL
        for (int k = 0; k < COEFFS; ++k) d[k] = promote<LANES>(old[row][k]);
      }
      lanes<A, LANES> value = evaluate<COEFFS>(d, coeffs.at);
      if (gate) value = value * promote<LANES>(gates);
      sums[row] = sums[row] + value;
    }
    slot += a.feature_stride;
    if (gate) gate += a.batch * a.channels;
  }
  HICACHE_UNROLL
  for (int row = 0; row < ROWS; ++row) {
    store<LANES>(static_cast<B*>(a.out) + at + row * a.channels, sums[row]);
  }
}

template <class T, class B, int LANES, int ROWS, int COEFFS, bool UPDATE, bool BY_FEATURE>
HICACHE_INLINE void sum_thread(const sum_tiles& s, int64_t thread, int64_t threads) {
  using A = accumulate_t<T>;
  const sum_args& a = s.args;
  const A inv_gap = UPDATE ? scalar<A>(a.inv_gap, 0) : A(0);
  coefficients<A, COEFFS> coeffs = {};
  if constexpr (!BY_FEATURE) coeffs = load_coeffs<A, COEFFS, false>(a.coeffs, 0);
  for (int64_t tile = thread; tile < s.count; tile += threads) {
    const int64_t channel = tile % s.packs * LANES;
    const int64_t group = tile / s.packs % s.groups;
    const int64_t sample = tile / s.packs / s.groups;
    const int64_t row = group * ROWS;
    const int64_t at = (sample * a.rows + row) * a.channels + channel;
    const B* const gate =
        a.gates ? static_cast<const B*>(a.gates) + sample * a.channels + channel : nullptr;
    if (row + ROWS <= a.rows && at + (ROWS - 1) * a.channels < s.numel) {
      sum_tile<T, B, LANES, ROWS, COEFFS, UPDATE, BY_FEATURE>(a, inv_gap, coeffs, at, gate);
    } else {
      for (int64_t i = at; i < s.numel && i < at + (a.rows - row) * a.channels; i += a.channels) {
        sum_tile<T, B, LANES, 1, COEFFS, UPDATE, BY_FEATURE>(a, inv_gap, coeffs, i, gate);
      }
    }
  }
}

}  // namespace hicache
