// One SIMD register of fp32 or float64, loaded from and stored to any storage type. CPU only. The legend is in
// kernels.h.
//
// Compiled once for every instruction set (see cpu.cpp): HICACHE_ISA names the namespace, so that no inline function
// of one build can be linked into another.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>

#if defined(__SSE2__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
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

// Stores round to nearest, ties to even, and keep a nan a nan. Left to itself the compiler converts between vectors of
// halves and of words by quarters, which makes these kernels slower than memory.
#if defined(__AVX512F__) && defined(__AVX512BW__)
inline vector_t<float> load(const bf16* from) {
  const __m256i raw = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from));
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(raw), 16));
}
inline void store(bf16* to, vector_t<float> value) {
  const __m512i bits = _mm512_castps_si512(value), upper = _mm512_srli_epi32(bits, 16);
  const __m512i odd = _mm512_and_si512(upper, _mm512_set1_epi32(1));
  const __m512i sum = _mm512_add_epi32(_mm512_add_epi32(bits, _mm512_set1_epi32(0x7fff)), odd);
  const __mmask16 nan = _mm512_cmp_ps_mask(value, value, _CMP_UNORD_Q);
  const __m512i out = _mm512_mask_or_epi32(_mm512_srli_epi32(sum, 16), nan, upper, _mm512_set1_epi32(0x40));
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), _mm512_cvtepi32_epi16(out));
}
#elif defined(__AVX2__)
inline vector_t<float> load(const bf16* from) {
  const __m128i raw = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from));
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(raw), 16));
}
inline void store(bf16* to, vector_t<float> value) {
  const __m256i bits = _mm256_castps_si256(value), upper = _mm256_srli_epi32(bits, 16);
  const __m256i odd = _mm256_and_si256(upper, _mm256_set1_epi32(1));
  const __m256i sum = _mm256_add_epi32(_mm256_add_epi32(bits, _mm256_set1_epi32(0x7fff)), odd);
  const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(value, value, _CMP_UNORD_Q));
  const __m256i quiet = _mm256_or_si256(upper, _mm256_set1_epi32(0x40));
  const __m256i out = _mm256_blendv_epi8(_mm256_srli_epi32(sum, 16), quiet, nan);
  // packing works within 128 bits: the elements end up in quarters 0 and 2
  const __m256i packed = _mm256_permute4x64_epi64(_mm256_packus_epi32(out, out), 0b1000);
  _mm_storeu_si128(reinterpret_cast<__m128i*>(to), _mm256_castsi256_si128(packed));
}
#elif defined(__aarch64__)
inline vector_t<float> load(const bf16* from) {
  uint16x4_t raw;
  std::memcpy(&raw, from, sizeof raw);
  return reinterpret_cast<vector_t<float>>(vshlq_n_u32(vmovl_u16(raw), 16));
}
inline void store(bf16* to, vector_t<float> value) {
  const uint32x4_t bits = reinterpret_cast<uint32x4_t>(value), number = reinterpret_cast<uint32x4_t>(value == value);
  const uint32x4_t odd = vandq_u32(vshrq_n_u32(bits, 16), vdupq_n_u32(1));
  const uint32x4_t sum = vaddq_u32(vaddq_u32(bits, vdupq_n_u32(0x7fff)), odd);
  const uint32x4_t quiet = vorrq_u32(bits, vdupq_n_u32(0x400000));
  const uint16x4_t out = vshrn_n_u32(vbslq_u32(number, sum, quiet), 16);
  std::memcpy(to, &out, sizeof out);
}
#else
inline vector_t<float> load(const bf16* from) {
  halves raw;
  std::memcpy(&raw, from, sizeof raw);
  return reinterpret_cast<vector_t<float>>(__builtin_convertvector(raw, words) << 16);
}
inline void store(bf16* to, vector_t<float> value) {
  const words bits = reinterpret_cast<words>(value), upper = bits >> 16;
  const words rounded = (bits + 0x7fffu + (upper & 1u)) >> 16;
  const words nan = reinterpret_cast<words>(value != value);
  const halves out = __builtin_convertvector((nan & (upper | 0x40u)) | (~nan & rounded), halves);
  std::memcpy(to, &out, sizeof out);
}
#endif

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
#elif defined(__aarch64__)
inline vector_t<float> load(const fp16* from) {
  uint16x4_t raw;
  std::memcpy(&raw, from, sizeof raw);
  return reinterpret_cast<vector_t<float>>(vcvt_f32_f16(vreinterpret_f16_u16(raw)));
}
inline void store(fp16* to, vector_t<float> value) {
  const float16x4_t out = vcvt_f16_f32(reinterpret_cast<float32x4_t>(value));
  std::memcpy(to, &out, sizeof out);
}
#else
inline vector_t<float> load(const fp16* from) {
  vector_t<float> out;
  for (int i = 0; i < simd<float>::lanes; ++i) out[i] = promote(from[i]);
  return out;
}
inline void store(fp16* to, vector_t<float> value) {
  for (int i = 0; i < simd<float>::lanes; ++i) round_to(value[i], to[i]);
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

// A store past the caches, to an address that a vector of T divides; an ordinary one where the instruction set has none.
template <class T>
inline void stream(T* to, vector_t<accumulate_t<T>> value) {
  alignas(64) T packed[simd<accumulate_t<T>>::lanes];  // in a register, once compiled
  store(packed, value);
#if defined(__AVX512F__)
  if constexpr (sizeof packed == 64) return _mm512_stream_si512(reinterpret_cast<__m512i*>(to), _mm512_load_si512(packed));
#endif
#if defined(__AVX2__)
  if constexpr (sizeof packed == 32) {
    return _mm256_stream_si256(reinterpret_cast<__m256i*>(to),
                               _mm256_load_si256(reinterpret_cast<const __m256i*>(packed)));
  }
#endif
#if defined(__SSE2__)
  if constexpr (sizeof packed == 16) {
    return _mm_stream_si128(reinterpret_cast<__m128i*>(to), _mm_load_si128(reinterpret_cast<const __m128i*>(packed)));
  }
#endif
  std::memcpy(to, packed, sizeof packed);
}

// Ends a row of streamed stores: whoever is told that a kernel has ended may read them.
inline void stream_fence() {
#if defined(__SSE2__)
  _mm_sfence();
#endif
}

}  // namespace HICACHE_ISA
}  // namespace hicache
