// The arithmetic of HiCache on one column of differences: the cascade and the forecast. The legend is in kernels.h.
//
// V is float, double, or a vector of either; S is its scalar. Operations are written in the order in which the
// readable reference does them and are compiled without contraction, so results agree with it bit for bit.
#pragma once

#include "hicache/types.h"

namespace hicache {

// D_0 <- feature; D_{i+1} <- (D_i new - D_i old) * inv_gap. On entry d[0..DIFFERENCES-1] holds the old differences, on
// exit d[0..DIFFERENCES] the new ones.
template <int DIFFERENCES, class V, class S>
HICACHE_INLINE void cascade(V feature, V (&d)[DIFFERENCES + 1], S inv_gap) {
  V fresh = feature;
  HICACHE_UNROLL
  for (int i = 0; i < DIFFERENCES; ++i) {
    const V old = d[i];
    d[i] = fresh;
    fresh = (fresh - old) * inv_gap;
  }
  d[DIFFERENCES] = fresh;
}

// sum over k of coeffs[k] * d[k], lowest order first.
template <int COEFFS, class V, class S>
HICACHE_INLINE V evaluate(const V (&d)[COEFFS], const S (&coeffs)[COEFFS]) {
  V sum = d[0] * coeffs[0];
  HICACHE_UNROLL
  for (int k = 1; k < COEFFS; ++k) sum = sum + d[k] * coeffs[k];
  return sum;
}

}  // namespace hicache
