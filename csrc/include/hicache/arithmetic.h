// The arithmetic of HiCache on one column of differences: the cascade and the forecast.
//
// V is float, double, or a vector of either; S is its scalar. Operations are written in the order in which the
// readable reference does them and are compiled without contraction, so results agree with it bit for bit.
#pragma once

#include "hicache/types.h"

namespace hicache {

// D_0 <- feature; D_{i+1} <- (D_i new - D_i old) * inv_gap. On entry d[0..READ-1] holds the old differences; on exit
// d[0..READ] the new ones. READ is the number of old differences that exist, at most the order.
template <int READ, class V, class S>
HICACHE_INLINE void cascade(V feature, V (&d)[READ + 1], S inv_gap) {
  V fresh = feature;
  HICACHE_UNROLL
  for (int i = 0; i < READ; ++i) {
    const V old = d[i];
    d[i] = fresh;
    fresh = (fresh - old) * inv_gap;
  }
  d[READ] = fresh;
}

// sum over k of coeffs[k] * d[k], lowest order first.
template <int TERMS, class V, class S>
HICACHE_INLINE V evaluate(const V (&d)[TERMS], const S (&coeffs)[TERMS]) {
  V sum = d[0] * coeffs[0];
  HICACHE_UNROLL
  for (int k = 1; k < TERMS; ++k) sum = sum + d[k] * coeffs[k];
  return sum;
}

}  // namespace hicache
