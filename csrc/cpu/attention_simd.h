// Vectors of LANES floats for the attention kernel: 16 with AVX-512, 8 with AVX2, 4 otherwise.
#pragma once

#include <cstdint>
#include <cstring>
#include <utility>

#if defined(CPU_CAPABILITY_AVX512) || defined(CPU_CAPABILITY_AVX2)
#include <immintrin.h>
#endif

namespace fastdiff::cpu::CPU_CAPABILITY {
namespace {

#if defined(CPU_CAPABILITY_AVX512)
constexpr int LANES = 16;
#elif defined(CPU_CAPABILITY_AVX2)
constexpr int LANES = 8;
#else
constexpr int LANES = 4;
#endif

typedef float Floats __attribute__((vector_size(LANES * 4)));
typedef int32_t Ints __attribute__((vector_size(LANES * 4)));

inline Floats get(const float* source) {
  Floats x;
  std::memcpy(&x, source, sizeof(x));
  return x;
}

inline void put(float* target, Floats x) { std::memcpy(target, &x, sizeof(x)); }

// Written as a subtraction, which compilers drop; x + 0 would turn -0 into 0 and stays.
inline Floats broadcast(float x) { return x - Floats{}; }

// The larger of each pair of lanes; b where either is NaN.
inline Floats maximum(Floats a, Floats b) {
#if defined(CPU_CAPABILITY_AVX512)
  return _mm512_maskz_max_ps(0xFFFF, a, b);
#elif defined(CPU_CAPABILITY_AVX2)
  return _mm256_max_ps(a, b);
#else
  return a > b ? a : b;
#endif
}

// Minimax polynomials of 2^f on [0, 1), relative error 7.5e-5 and 7.5e-8.
template <bool EXACT>
inline Floats exp2_fraction(Floats f) {
  if constexpr (EXACT) {
    const Floats low = 0.24015361f + f * (0.055826318f + f * (0.0089893397f + f * 0.0018775767f));
    return 0.99999994f + f * (0.69315308f + f * low);
  } else {
    return 0.99992520f + f * (0.69583356f + f * (0.22606716f + f * 0.078024521f));
  }
}

// 2^x for x <= 0 (also -inf); accurate to float32, or to bfloat16 with EXACT = false.
template <bool EXACT>
inline Floats exp2_negative(Floats x) {
#if defined(CPU_CAPABILITY_AVX512)
  // Round-toward-minus-infinity gives x - floor(x); scalef multiplies by 2^floor(x) and gives 0 far below.
  const Floats fraction = _mm512_maskz_reduce_ps(0xFFFF, x, 1);
  return _mm512_maskz_scalef_ps(0xFFFF, exp2_fraction<EXACT>(fraction), x);
#else
  constexpr float round_to_integer = 12582912.0f;  // 1.5 * 2^23
  const Floats shifted = (x - 0.5f) + round_to_integer;
  const Floats fraction = x - (shifted - round_to_integer);
  const Ints power = reinterpret_cast<Ints>(exp2_fraction<EXACT>(fraction)) + (reinterpret_cast<Ints>(shifted) << 23);
  const Ints keep = ~reinterpret_cast<Ints>(x < -126.0f);
  return reinterpret_cast<Floats>(power & keep);
#endif
}

template <int HALF, std::size_t... I>
inline Floats interleave(Floats a, Floats b, std::index_sequence<I...>) {
#if defined(__clang__)
  return __builtin_shufflevector(a, b, ((I + HALF * LANES) / 2 + I % 2 * LANES)...);
#else
  return __builtin_shuffle(a, b, Ints{static_cast<int32_t>((I + HALF * LANES) / 2 + I % 2 * LANES)...});
#endif
}

// Transposes LANES x LANES words. Interleaving row i with row i + LANES / 2 rotates the bits of the index
// (row, column) by one; log2(LANES) rotations exchange row and column.
inline void transpose(Floats (&x)[LANES]) {
  constexpr auto lanes = std::make_index_sequence<LANES>();
#pragma GCC unroll 4
  for (int step = 1; step < LANES; step *= 2) {
    Floats y[LANES];
#pragma GCC unroll 8
    for (int i = 0; i < LANES / 2; ++i) {
      y[2 * i] = interleave<0>(x[i], x[i + LANES / 2], lanes);
      y[2 * i + 1] = interleave<1>(x[i], x[i + LANES / 2], lanes);
    }
#pragma GCC unroll 16
    for (int i = 0; i < LANES; ++i) x[i] = y[i];
  }
}

}  // namespace
}  // namespace fastdiff::cpu::CPU_CAPABILITY
