// The distribution function of the standard normal distribution. Everything is static: see convert.h.
#pragma once

#include "cpu/group_norm_simd.h"

namespace fastdiff::cpu::CPU_CAPABILITY {

// coefficients[0] x^(N-1) + ... + coefficients[N-1]
template <int N>
static inline __attribute__((always_inline)) Floats polynomial(const float (&coefficients)[N], Floats x) {
  Floats sum = all(coefficients[0]);
  for (int i = 1; i < N; ++i) sum = sum * x + coefficients[i];
  return sum;
}

// 2^v for v <= 0, 0 or nearly so below -126. Minimax in relative error: 2e-9, or 3e-6 where the result is rounded to 16
// bits.
template <bool ROUNDED>
static inline __attribute__((always_inline)) Floats two_to(Floats v) {
#if defined(__AVX512F__)
  const Floats fraction = _mm512_maskz_reduce_ps(0xFFFF, v, 0);  // v less the nearest integer
#else
  constexpr float LIMIT = -126.0f;
  constexpr float INTEGERS = 12582912.0f;  // 1.5 * 2^23: adding it leaves the nearest integer in the low bits
  v = v < LIMIT ? all(LIMIT) : v;
  const Floats integer = v + INTEGERS, fraction = v - (integer - INTEGERS);
#endif
  Floats p;
  if constexpr (ROUNDED) {
    p = polynomial({9.570101276e-03f, 5.591785908e-02f, 2.402474433e-01f, 6.931217909e-01f, 9.999992847e-01f}, fraction);
  } else {
    p = polynomial({1.534581097e-04f, 1.339993090e-03f, 9.618489072e-03f, 5.550328642e-02f, 2.402264625e-01f,
                    6.931471825e-01f, 1.0f},
                   fraction);
  }
#if defined(__AVX512F__)
  return _mm512_maskz_scalef_ps(0xFFFF, p, v - fraction);
#else
  return p * reinterpret_cast<Floats>((reinterpret_cast<Ints>(integer) << 23) + 0x3F800000);
#endif
}

// Phi(x) = (1 + erf(x / sqrt(2))) / 2, with full relative accuracy in the lower tail too: for u = |x|,
// Phi(-u) exp(u^2 / 2) = t P(t) with t = 1 / (1 + c u), a form that holds for all u. P is minimax in relative error:
// 4e-8, or 5e-6 where the result is rounded to 16 bits.
template <bool ROUNDED>
static inline __attribute__((always_inline)) Floats normal_cdf(Floats x) {
  const Floats u = x < 0.0f ? -x : x;
  const Floats t = 1.0f / (1.0f + (ROUNDED ? 0.31f : 0.35f) * u);
  Floats p;
  if constexpr (ROUNDED) {
    p = polynomial({-7.392916828e-02f, 1.804504246e-01f, 1.574462093e-02f, 1.334298253e-01f, 1.204412654e-01f,
                    1.238607019e-01f},
                   t);
  } else {
    p = polynomial({-2.915788628e-02f, 1.440309137e-01f, -2.558389902e-01f, 1.593196988e-01f, -2.321235277e-02f,
                    1.055525020e-01f, 1.198212877e-01f, 1.398635209e-01f, 1.396213025e-01f},
                   t);
  }
  const Floats tail = p * t * two_to<ROUNDED>(u * u * (-0.5f * LOG2_E));
  return x > 0.0f ? 1.0f - tail : tail;
}

}  // namespace fastdiff::cpu::CPU_CAPABILITY
