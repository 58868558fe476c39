// Counter-based standard normals: Philox4x32-10 (Salmon et al., SC 2011) and Box-Muller, in float32.
//
// Key = the seed's low and high 32 bits; counter = (block low, step, stream, block high); block = element / 4. The four
// words give the elements 4 * block .. 4 * block + 3. For host and device; no torch, no library function but sqrt, no
// branches, so that a loop over blocks becomes vector code. Functions are static: each unit that is compiled for
// another instruction set keeps its own.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#ifdef __CUDACC__
#define FASTDIFF_HOST_DEVICE static __host__ __device__ __forceinline__
#else
#define FASTDIFF_HOST_DEVICE static inline __attribute__((always_inline))
#endif

namespace fastdiff::philox {

FASTDIFF_HOST_DEVICE uint32_t multiply_high(uint32_t a, uint32_t b) {
  return static_cast<uint32_t>((static_cast<uint64_t>(a) * b) >> 32);
}

// Ten rounds, in place: the counter c becomes the four random words.
FASTDIFF_HOST_DEVICE void words(uint32_t& c0, uint32_t& c1, uint32_t& c2, uint32_t& c3, uint32_t k0, uint32_t k1) {
  constexpr uint32_t M0 = 0xD2511F53u, M1 = 0xCD9E8D57u, W0 = 0x9E3779B9u, W1 = 0xBB67AE85u;
#ifdef __CUDACC__
#pragma unroll
#else
#pragma GCC unroll 10
#endif
  for (uint32_t round = 0; round < 10; ++round) {
    const uint32_t high0 = multiply_high(M0, c0), low0 = M0 * c0;
    const uint32_t high1 = multiply_high(M1, c2), low1 = M1 * c2;
    c0 = high1 ^ c1 ^ (k0 + round * W0);
    c1 = low1;
    c2 = high0 ^ c3 ^ (k1 + round * W1);
    c3 = low0;
  }
}

FASTDIFF_HOST_DEVICE uint32_t bits_of(float value) {
  uint32_t bits;
  memcpy(&bits, &value, sizeof(bits));
  return bits;
}

FASTDIFF_HOST_DEVICE float float_of(uint32_t bits) {
  float value;
  memcpy(&value, &bits, sizeof(value));
  return value;
}

// sqrt(-2 ln u) with u = word / 2^32 + 2^-33, to about one ulp. The upper half of the words is taken as ln(1 - f), f
// exact to one rounding, since u itself rounded to float32 would lose all of ln u near u = 1.
FASTDIFF_HOST_DEVICE float radius(uint32_t word) {
  const bool upper = word >> 31;
  const uint32_t folded = upper ? ~word : word;
  const float f = static_cast<float>(2u * folded + 1u) * 0x1p-33f;  // u, or 1 - u: at most 1/2

  // ln u = exponent * ln 2 + ln(1 + t), with 1 + t in [sqrt(1/2), sqrt(2)).
  const int32_t shifted = static_cast<int32_t>(bits_of(f) - 0x3F3504F3u) >> 23;
  const float mantissa = float_of(bits_of(f) - (static_cast<uint32_t>(shifted) << 23));
  const bool below = f > 0.29289322f;  // 1 - f < sqrt(1/2)
  const float upper_t = below ? 1.0f - 2.0f * f : -f;
  const float t = upper ? upper_t : mantissa - 1.0f;
  const float exponent = upper ? (below ? -1.0f : 0.0f) : static_cast<float>(shifted);

  float p = 0.06971612f;
  p = p * t - 0.11479734f;
  p = p * t + 0.1168542f;
  p = p * t - 0.12425687f;
  p = p * t + 0.14249058f;
  p = p * t - 0.16667803f;
  p = p * t + 0.20000716f;
  p = p * t - 0.24999997f;
  p = p * t + 0.3333333f;
  // ln 2 in two parts, the first with so few bits that its product is exact.
  const float square = t * t;
  const float low = p * square * t + (exponent * -2.12194440e-4f - 0.5f * square);
  return sqrtf(-2.0f * (exponent * 0.693359375f + (t + low)));
}

// cos and sin of 2 pi word / 2^32: the quarter turn and what is left of it are taken from the integer, exactly.
FASTDIFF_HOST_DEVICE void cos_sin(uint32_t word, float& cosine, float& sine) {
  const uint32_t quarter = (word + 0x20000000u) >> 30;
  const float x = static_cast<float>(static_cast<int32_t>(word - (quarter << 30))) * 0x1p-29f;  // of pi / 4
  const float z = x * x;
  float s = -3.595429e-05f;
  s = s * z + 0.0024900069f;
  s = s * z - 0.080745436f;
  s = (s * z + 0.7853982f) * x;
  float c = 3.5419528e-06f;
  c = c * z - 0.0003259614f;
  c = c * z + 0.015854338f;
  c = c * z - 0.30842513f;
  c = c * z + 1.0f;
  const bool swap = quarter & 1u;
  const uint32_t cosine_sign = ((quarter + 1u) & 2u) << 30, sine_sign = (quarter & 2u) << 30;
  cosine = float_of(bits_of(swap ? s : c) ^ cosine_sign);
  sine = float_of(bits_of(swap ? c : s) ^ sine_sign);
}

// The four normals of one block.
FASTDIFF_HOST_DEVICE void normals(uint64_t seed, uint64_t block, uint32_t step, uint32_t stream, float* out) {
  uint32_t c0 = static_cast<uint32_t>(block), c1 = step, c2 = stream, c3 = static_cast<uint32_t>(block >> 32);
  words(c0, c1, c2, c3, static_cast<uint32_t>(seed), static_cast<uint32_t>(seed >> 32));
  float cosine, sine;
  cos_sin(c1, cosine, sine);
  const float first = radius(c0);
  out[0] = first * cosine;
  out[1] = first * sine;
  cos_sin(c3, cosine, sine);
  const float second = radius(c2);
  out[2] = second * cosine;
  out[3] = second * sine;
}

}  // namespace fastdiff::philox
