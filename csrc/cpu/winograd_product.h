// The products of a Winograd convolution, one for each frequency of the transforms: for float32.
#pragma once

#include "attention_tile.h"
#include "scratch.h"

namespace fastdiff::cpu::CPU_CAPABILITY {
namespace {

// What winograd.h asks of an element: how it is read and written, how transformed weights lie, and the product.
struct WinogradFloat {
  using Element = float;                           // of maps, transformed maps and weights
  static constexpr int PAIR = 1;                   // channels whose weights lie side by side for each output
  static constexpr int COLUMNS = 32;               // outputs of a block of transformed weights
  static constexpr int64_t DEPTH = 128;            // channels of a block at most, a multiple of 16
  static constexpr int64_t SUM = 32;               // products summed before they are added to the others
  static constexpr int64_t STRIP = 128;            // tiles of a strip at most
  static constexpr int64_t STRIP_BYTES = 8 << 20;  // of transformed input, where that leaves 32 tiles

  // LANES values.
  static Floats load(const float* from) { return get(from); }
  static void store(float* to, Floats x) { put(to, x); }

  // to[lane][p] = u[p][lane]: LANES outputs of PAIR channels.
  static void store_weight(float* to, const Floats (&u)[PAIR]) { put(to, u[0]); }

  // m[r][column] (first ? = : +=) sum over t of v[r * stride + t] * u[t / PAIR][column][t % PAIR], r < rows,
  // t < depth, column < COLUMNS; m is dense, depth a multiple of 16. Sums of SUM products keep the rounding error low.
  static void multiply(const float* v, int64_t stride, int64_t rows, const float* u, int64_t depth, float* m,
                       bool first) {
    for (int column = 0; column < COLUMNS; column += 2 * LANES) {
      for_tiles<LANES == 16 ? 6 : 3>(0, rows, [&]<int ROWS>(int64_t row) {
        multiply_tile<ROWS>(v + row * stride, stride, u + column, depth, m + row * COLUMNS + column, first);
      });
    }
  }

 private:
  template <int ROWS>
  static void multiply_tile(const float* v, int64_t stride, const float* u, int64_t depth, float* m, bool first) {
    Floats total[ROWS][2] = {};
    if (!first) {
#pragma GCC unroll 6
      for (int r = 0; r < ROWS; ++r) total[r][0] = get(m + r * COLUMNS), total[r][1] = get(m + r * COLUMNS + LANES);
    }
    for (int64_t begin = 0; begin < depth; begin += SUM) {
      Floats sum[ROWS][2] = {};
      const int64_t end = smaller(begin + SUM, depth);
      for (int64_t t = begin; t < end; ++t, u += COLUMNS) {
        const Floats u0 = get(u), u1 = get(u + LANES);
#pragma GCC unroll 6
        for (int r = 0; r < ROWS; ++r) {
          const Floats value = broadcast(v[r * stride + t]);
          sum[r][0] += value * u0;
          sum[r][1] += value * u1;
        }
      }
#pragma GCC unroll 6
      for (int r = 0; r < ROWS; ++r) total[r][0] += sum[r][0], total[r][1] += sum[r][1];
    }
#pragma GCC unroll 6
    for (int r = 0; r < ROWS; ++r) put(m + r * COLUMNS, total[r][0]), put(m + r * COLUMNS + LANES, total[r][1]);
  }
};

}  // namespace
}  // namespace fastdiff::cpu::CPU_CAPABILITY
