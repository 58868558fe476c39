// The products inside attention: tiles of accumulators held in registers, queries along the lanes.
#pragma once

#include "attention_simd.h"

namespace fastdiff::cpu::CPU_CAPABILITY {
namespace {

// float32 operands, and float16 or bfloat16 widened to float32.
struct Float32 {
  using Element = float;
  static constexpr int PAIR = 1;  // values in an element
  static constexpr bool EXACT = true;

  static Floats multiply_add(float a, const float* b, Floats c) { return broadcast(a) * get(b) + c; }
};

#ifdef FASTDIFF_BF16_DOT
// Pairs of bfloat16, neighbours in the summed dimension: one instruction multiplies and adds 32 of them.
struct BFloat16 {
  using Element = uint32_t;
  static constexpr int PAIR = 2;
  static constexpr bool EXACT = false;

  static Floats multiply_add(uint32_t a, const uint32_t* b, Floats c) {
    return _mm512_dpbf16_ps(c, (__m512bh)_mm512_set1_epi32(static_cast<int>(a)), (__m512bh)_mm512_loadu_si512(b));
  }

  // Lane i of the target becomes the pair (p0[i], p1[i]), rounded to nearest even.
  static void store_pairs(uint32_t* target, Floats p0, Floats p1) {
    alignas(64) static constexpr uint16_t ORDER[32] = {0, 16, 1, 17, 2,  18, 3,  19, 4,  20, 5,  21, 6,  22, 7,  23,
                                                       8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
    const __m512i both = (__m512i)_mm512_cvtne2ps_pbh(p1, p0);
    _mm512_storeu_si512(target, _mm512_permutexvar_epi16(_mm512_load_si512(ORDER), both));
  }
};
#endif

// sum[r][c] += sum over t of a[r * row_stride + t * step_stride] * b[t][c], with b of shape (steps, COLUMNS, LANES).
template <class Math, int ROWS, int COLUMNS>
inline void multiply(const typename Math::Element* a, int64_t row_stride, int64_t step_stride,
                     const typename Math::Element* b, int64_t steps, Floats (&sum)[ROWS][COLUMNS]) {
  for (int64_t t = 0; t < steps; ++t, a += step_stride, b += COLUMNS * LANES) {
#pragma GCC unroll 16
    for (int r = 0; r < ROWS; ++r) {
#pragma GCC unroll 4
      for (int c = 0; c < COLUMNS; ++c) sum[r][c] = Math::multiply_add(a[r * row_stride], b + c * LANES, sum[r][c]);
    }
  }
}

// Rows of accumulators that fill the registers (32 with AVX-512, else 16) next to COLUMNS operands and a broadcast, or
// 12, which are enough to multiply without waiting for a sum.
template <int COLUMNS>
constexpr int TILE_ROWS = LANES == 16 && COLUMNS > 1 ? 24 / COLUMNS : 12 / COLUMNS;

constexpr int half_below(int rows) {
  int power = 1;
  while (2 * power < rows) power *= 2;
  return power;
}

// Calls tile<ROWS>(first row), then smaller tiles for what is left, so that all rows are covered once.
template <int ROWS, class Tile>
inline void for_tiles(int64_t row, int64_t rows, const Tile& tile) {
  for (; row + ROWS <= rows; row += ROWS) tile.template operator()<ROWS>(row);
  if constexpr (ROWS > 1) {
    if (row < rows) for_tiles<half_below(ROWS)>(row, rows, tile);
  }
}

}  // namespace
}  // namespace fastdiff::cpu::CPU_CAPABILITY
