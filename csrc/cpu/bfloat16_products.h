// Products of bfloat16 with sums in float32, by the instruction that multiplies and adds 32 of them: for files that
// include bfloat16_dot.h first, on machines that have it.
#pragma once

#include "attention_tile.h"
#include "scratch.h"

namespace fastdiff::cpu::CPU_CAPABILITY {
namespace {

// Memory that is brought near while something else is multiplied; nothing where both are the same.
struct Ahead {
  const char *at = nullptr, *end = nullptr;
};

#ifdef FASTDIFF_BF16_DOT

// Sixteen values, exactly.
inline Floats get_bfloat16(const uint16_t* from) {
  const __m512i words = _mm512_maskz_cvtepu16_epi32(0xFFFF, _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)));
  return (Floats)_mm512_maskz_slli_epi32(0xFFFF, words, 16);
}

// Rounded to nearest even.
inline void put_bfloat16(uint16_t* to, Floats x) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), (__m256i)_mm512_cvtneps_pbh(x));
}

template <int ROWS, int VECTORS>
inline void multiply_bfloat16_tile(const uint32_t* a, int64_t stride, const uint32_t* b, int64_t b_stride,
                                   int64_t pairs, float* out, int64_t out_stride, bool first, Ahead& ahead) {
  constexpr int64_t LINE = 64;
  const int64_t step = ahead.at < ahead.end ? 2 * LINE : 0;  // about what memory gives a core in that time
  const char* next = step > 0 ? ahead.at : reinterpret_cast<const char*>(b);
  ahead.at += step * pairs;
  Floats sum[ROWS][VECTORS] = {};
  for (int64_t t = 0; t < pairs; ++t, b += b_stride, next += step) {
    __builtin_prefetch(next, 0, 2);
    __builtin_prefetch(next + LINE, 0, 2);
#pragma GCC unroll 16
    for (int r = 0; r < ROWS; ++r) {
#pragma GCC unroll 4
      for (int v = 0; v < VECTORS; ++v) sum[r][v] = BFloat16::multiply_add(a[r * stride + t], b + v * LANES, sum[r][v]);
    }
  }
#pragma GCC unroll 16
  for (int r = 0; r < ROWS; ++r) {
#pragma GCC unroll 4
    for (int v = 0; v < VECTORS; ++v) {
      float* to = out + r * out_stride + v * LANES;
      put(to, first ? sum[r][v] : sum[r][v] + get(to));
    }
  }
}

// out[r][o] = sum over t of a[r][2t] b[t][o][0] + a[r][2t + 1] b[t][o][1], added to what is there unless first, for
// r < rows, t < pairs and o < VECTORS * LANES. Rows of a lie `stride` pairs apart, those of b and out as given.
template <int VECTORS>
inline void multiply_bfloat16(const uint32_t* a, int64_t stride, int64_t rows, const uint32_t* b, int64_t b_stride,
                              int64_t pairs, float* out, int64_t out_stride, bool first, Ahead& ahead) {
  for_tiles<TILE_ROWS<VECTORS>>(0, rows, [&]<int ROWS>(int64_t row) {
    multiply_bfloat16_tile<ROWS, VECTORS>(a + row * stride, stride, b, b_stride, pairs, out + row * out_stride,
                                          out_stride, first, ahead);
  });
}

#endif

}  // namespace
}  // namespace fastdiff::cpu::CPU_CAPABILITY
