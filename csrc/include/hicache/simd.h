// One SIMD register of fp32 or float64, loaded from and stored to any storage type. CPU only.
//
// Compiled once for every instruction set (see cpu.cpp): HICACHE_ISA names the namespace, so that no inline function
// of one build can be linked into another.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>

#if defined(__AVX2__) || defined(__AVX512F__)
#include <immintrin.h>
#endif

#include "hicache/types.h"

namespace hicache {
namespace HICACHE_ISA {

#if defined(__AVX512F__) && defined(__AVX512BW__)
constexpr int kVectorBytes = 64;
#elif defined(__AVX2__)
constexpr int kVectorBytes = 32;
#else
constexpr int kVectorBytes = 16;
#endif

template <class A>
struct simd;
template <>
struct simd<float> {
  static constexpr int lanes = kVectorBytes / 4;
  typedef float vector __attribute__((vector_size(kVectorBytes)));
};
template <>
struct simd<double> {
  static constexpr int lanes = kVectorBytes / 8;
  typedef double vector __attribute__((vector_size(kVectorBytes)));
};
template <class A>
using vector_t = typename simd<A>::vector;

typedef uint32_t words __attribute__((vector_size(kVectorBytes)));
typedef uint16_t halves __attribute__((vector_size(kVectorBytes / 2)));

template <class A>
inline vector_t<A> load(const A* from) {
  vector_t<A> out;
  std::memcpy(&out, from, sizeof out);
  return out;
}

template <class A>
inline void store(A* to, vector_t<A> value) {
  std::memcpy(to, &value, sizeof value);
}

inline vector_t<float> load(const bf16* from) {
  halves raw;
  std::memcpy(&raw, from, sizeof raw);
  return reinterpret_cast<vector_t<float>>(__builtin_convertvector(raw, words) << 16);
}

inline void store(bf16* to, vector_t<float> value) {
  const words bits = reinterpret_cast<words>(value);
  const words rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  const words nan = (bits >> 16) | 0x40u;
  const words is_nan = reinterpret_cast<words>((bits & 0x7fffffffu) > 0x7f800000u);
  const halves out = __builtin_convertvector((is_nan & nan) | (~is_nan & rounded), halves);
  std::memcpy(to, &out, sizeof out);
}

#if defined(__AVX512F__) && defined(__AVX512BW__)
inline vector_t<float> load(const fp16* from) {
  return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)));
}
inline void store(fp16* to, vector_t<float> value) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(to),
                      _mm512_cvtps_ph(value, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}
#elif defined(__AVX2__) && defined(__F16C__)
inline vector_t<float> load(const fp16* from) {
  return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
}
inline void store(fp16* to, vector_t<float> value) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(to),
                   _mm256_cvtps_ph(value, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}
#else
inline vector_t<float> load(const fp16* from) {
  vector_t<float> out;
  for (int i = 0; i < simd<float>::lanes; ++i) out[i] = widen(from[i]);
  return out;
}
inline void store(fp16* to, vector_t<float> value) {
  for (int i = 0; i < simd<float>::lanes; ++i) narrow(value[i], to[i]);
}
#endif

// The first `count` lanes only; the rest is zero, and no byte past them is touched.
template <class T>
inline vector_t<accumulate_t<T>> load_tail(const T* from, int count) {
  T buffer[simd<accumulate_t<T>>::lanes] = {};
  std::memcpy(buffer, from, sizeof(T) * static_cast<size_t>(count));
  return load(buffer);
}

template <class T>
inline void store_tail(T* to, vector_t<accumulate_t<T>> value, int count) {
  T buffer[simd<accumulate_t<T>>::lanes];
  store(buffer, value);
  std::memcpy(to, buffer, sizeof(T) * static_cast<size_t>(count));
}

}  // namespace HICACHE_ISA
}  // namespace hicache
