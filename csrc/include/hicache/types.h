// Storage types and their exact conversions to and from the type arithmetic is done in. No torch, no Python.
#pragma once

#include <cstdint>
#include <cstring>

// Always inlined: a copy kept out of line could be one built for another instruction set.
#if defined(__CUDACC__)
#define HICACHE_INLINE static __host__ __device__ __forceinline__
#define HICACHE_UNROLL _Pragma("unroll")
#else
#define HICACHE_INLINE static inline __attribute__((always_inline))
#define HICACHE_UNROLL
#endif

namespace hicache {

struct bf16 {
  uint16_t bits;
};
struct fp16 {
  uint16_t bits;
};

// High precision, which differences and forecasts are computed in: float64 for itself, fp32 for all others.
template <class T>
struct accumulate {
  using type = float;
};
template <>
struct accumulate<double> {
  using type = double;
};
template <class T>
using accumulate_t = typename accumulate<T>::type;

HICACHE_INLINE uint32_t bits_of(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return bits;
}

HICACHE_INLINE float float_of(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

// Low precision to high, exactly.
HICACHE_INLINE float promote(float value) { return value; }
HICACHE_INLINE double promote(double value) { return value; }
HICACHE_INLINE float promote(bf16 value) { return float_of(static_cast<uint32_t>(value.bits) << 16); }

HICACHE_INLINE float promote(fp16 value) {
#if defined(__CUDA_ARCH__)
  float promoted;
  asm("cvt.f32.f16 %0, %1;" : "=f"(promoted) : "h"(value.bits));
  return promoted;
#else
  const uint32_t sign = static_cast<uint32_t>(value.bits & 0x8000u) << 16;
  const uint32_t magnitude = value.bits & 0x7fffu;
  if (magnitude >= 0x7c00u) return float_of(sign | 0x7f800000u | (magnitude & 0x3ffu) << 13);  // inf, nan
  // A subnormal is so many times 2^-24: exact, and of normal numbers, which no mode of the processor flushes to zero.
  if (magnitude < 0x400u) return float_of(sign | bits_of(static_cast<float>(magnitude) * float_of(103u << 23)));
  return float_of(sign | ((magnitude << 13) + (112u << 23)));  // the exponent's bias goes from 15 to 127
#endif
}

// High precision to low, rounded once; not at all where `out` has the same.
HICACHE_INLINE void round_to(float value, float& out) { out = value; }
HICACHE_INLINE void round_to(double value, double& out) { out = value; }

HICACHE_INLINE void round_to(float value, bf16& out) {  // round to nearest, ties to even
#if defined(__CUDA_ARCH__)
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(out.bits) : "f"(value));
#else
  const uint32_t bits = bits_of(value);
  if ((bits & 0x7fffffffu) > 0x7f800000u) {
    out.bits = static_cast<uint16_t>(bits >> 16 | 0x40u);  // keep a nan a nan
  } else {
    out.bits = static_cast<uint16_t>((bits + 0x7fffu + (bits >> 16 & 1u)) >> 16);
  }
#endif
}

HICACHE_INLINE void round_to(float value, fp16& out) {  // round to nearest, ties to even
#if defined(__CUDA_ARCH__)
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(out.bits) : "f"(value));
#else
  const uint32_t bits = bits_of(value);
  const uint32_t sign = bits >> 16 & 0x8000u;
  const uint32_t magnitude = bits & 0x7fffffffu;
  uint32_t half;
  if (magnitude > 0x7f800000u) {
    half = 0x7e00u;  // nan
  } else if (magnitude >= 0x47800000u) {
    half = 0x7c00u;  // 2^16 and above: inf
  } else if (magnitude < 0x38800000u) {
    // Below 2^-14: adding 0.5 leaves the subnormal half in the low bits, rounded by the addition itself.
    half = bits_of(float_of(magnitude) + 0.5f) - 0x3f000000u;
  } else {
    half = (magnitude - 0x38000000u + 0xfffu + (magnitude >> 13 & 1u)) >> 13;
  }
  out.bits = static_cast<uint16_t>(sign | half);
#endif
}

// Two neighbours in memory as one word, the first in its low half.
template <class T>
HICACHE_INLINE uint32_t round_pair(float first, float second) {
  T low, high;
  round_to(first, low);
  round_to(second, high);
  return low.bits | static_cast<uint32_t>(high.bits) << 16;
}

}  // namespace hicache
