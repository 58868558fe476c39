// The Box-Muller transform of torch.randn, bit for bit, in vectors of 8 or 16.
//
// Logarithm, sine and cosine are those of Cephes (Moshier 1989, logf.c and sinf.c), whose coefficients stand here, on
// the numbers that occur: 1 - u in (0, 1] and angles in [0, 2 pi). Where a product is rounded before it is added to
// something and where it is not follows PyTorch's own code for AVX2, as its compiler joined multiplications and
// additions; here it is written out, and this file's users are compiled without joining any more.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(CPU_CAPABILITY_AVX512) || defined(CPU_CAPABILITY_AVX2)

#include <immintrin.h>

namespace fastdiff::cpu::CPU_CAPABILITY {

namespace {

#if defined(CPU_CAPABILITY_AVX512)
constexpr int LANES = 16;
#else
constexpr int LANES = 8;
#endif
constexpr int HALF_GROUP = 8;
constexpr int GROUP = 2 * HALF_GROUP;        // normals made together: 8 with the cosine, 8 with the sine
constexpr int GROUPS = LANES / HALF_GROUP;   // in a vector of radii

typedef float Floats __attribute__((vector_size(LANES * 4)));
typedef int32_t Ints __attribute__((vector_size(LANES * 4)));

// a * b + c, rounded once.
inline Floats fused(Floats a, Floats b, Floats c) {
#if defined(CPU_CAPABILITY_AVX512)
  return _mm512_fmadd_ps(a, b, c);
#else
  return _mm256_fmadd_ps(a, b, c);
#endif
}

inline Floats root(Floats x) {
#if defined(CPU_CAPABILITY_AVX512)
  return _mm512_maskz_sqrt_ps(0xFFFF, x);
#else
  return _mm256_sqrt_ps(x);
#endif
}

// Of each of two vectors the first eight elements, and the last: as many u or v as a vector holds of its groups. With
// eight lanes a vector has nothing else.
inline Floats lower_halves(Floats a, Floats b) {
#if defined(CPU_CAPABILITY_AVX512)
  return __builtin_shufflevector(a, b, 0, 1, 2, 3, 4, 5, 6, 7, 16, 17, 18, 19, 20, 21, 22, 23);
#else
  return a;
#endif
}

inline Floats upper_halves(Floats a, Floats b) {
#if defined(CPU_CAPABILITY_AVX512)
  return __builtin_shufflevector(a, b, 8, 9, 10, 11, 12, 13, 14, 15, 24, 25, 26, 27, 28, 29, 30, 31);
#else
  return b;
#endif
}

inline Floats all(float x) { return x - Floats{}; }

// c[0] x^n + ... + c[n].
template <int SIZE>
inline Floats polynomial(const float (&c)[SIZE], Floats x) {
  Floats y = all(c[0]);
#pragma GCC unroll 16
  for (int i = 1; i < SIZE; ++i) y = fused(y, x, all(c[i]));
  return y;
}

inline Floats logarithm(Floats x) {
  constexpr float series[] = {7.0376836292e-2f,  -1.1514610310e-1f, 1.1676998740e-1f, -1.2420140846e-1f, 1.4249322787e-1f,
                              -1.6668057665e-1f, 2.0000714765e-1f,  -2.4999993993e-1f, 3.3333331174e-1f};
  const Ints bits = reinterpret_cast<Ints>(x);
  const Floats mantissa = reinterpret_cast<Floats>((bits & 0x007fffff) | 0x3f000000);  // in [1/2, 1)
  const Ints small = mantissa < 0.707106781186547524f;
  // Both differences are exact.
  const Floats t = mantissa - 1.0f + (small ? mantissa : Floats{});
  const Floats exponent = __builtin_convertvector((bits >> 23) - 126 + small, Floats);
  const Floats square = t * t;
  Floats y = fused(polynomial(series, t) * t, square, exponent * -2.12194440e-4f);
  y = y - square * 0.5f;
  return fused(exponent, all(0.693359375f), t + y);
}

inline void sine_and_cosine(Floats x, Floats& sine, Floats& cosine) {
  constexpr float of_sine[] = {-1.9515295891e-4f, 8.3321608736e-3f, -1.6666654611e-1f};
  constexpr float of_cosine[] = {2.443315711809948e-5f, -1.388731625493765e-3f, 4.166664568298827e-2f};
  // The even octant next to x, and how far x is from it.
  const Ints octant = (__builtin_convertvector(x * 1.27323954473516f, Ints) + 1) & ~1;
  const Floats j = __builtin_convertvector(octant, Floats);
  x = fused(j, all(-0.78515625f), x);
  x = fused(j, all(-2.4187564849853515625e-4f), x);
  x = fused(j, all(-3.77489497744594108e-8f), x);
  const Floats z = x * x;
  const Floats c = fused(polynomial(of_cosine, z) * z, z, z * -0.5f) + 1.0f;
  const Floats s = fused(polynomial(of_sine, z) * z, x, x);
  const Ints even = (octant & 2) == 0;
  const Ints sign_of_sine = (octant & 4) << 29, sign_of_cosine = (~(octant - 2) & 4) << 29;
  sine = reinterpret_cast<Floats>(reinterpret_cast<Ints>(even ? s : c) ^ sign_of_sine);
  cosine = reinterpret_cast<Floats>(reinterpret_cast<Ints>(even ? c : s) ^ sign_of_cosine);
}

// GROUPS groups of uniform numbers, u the first eight of each and v the last, become sqrt(-2 log(1 - u)) cos(2 pi v),
// then the same with sin.
inline void box_muller(float* groups) {
  Floats first, second;
  memcpy(&first, groups, sizeof(first));
  memcpy(&second, groups + LANES, sizeof(second));
  const Floats u = lower_halves(first, second), v = upper_halves(first, second);
  const Floats radius = root(-2.0f * logarithm(1.0f - u));
  Floats sine, cosine;
  sine_and_cosine(6.283185307179586f * v, sine, cosine);
  // PyTorch ends with an addition of its mean, 0, which makes -0 a 0.
  cosine = radius * cosine + 0.0f;
  sine = radius * sine + 0.0f;
  first = lower_halves(cosine, sine);
  second = upper_halves(cosine, sine);
  memcpy(groups, &first, sizeof(first));
  memcpy(groups + LANES, &second, sizeof(second));
}

}  // namespace

}  // namespace fastdiff::cpu::CPU_CAPABILITY

#endif
