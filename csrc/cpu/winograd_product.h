// The products of a Winograd convolution, one for each frequency of the transforms, in float32.
#pragma once

#include "attention_tile.h"
#include "elements.h"
#include "scratch.h"

namespace fastdiff::cpu::CPU_CAPABILITY {
namespace {

// What winograd.h asks of maps and weights, float or uint16_t for bfloat16: how elements are read and written, how
// transformed weights lie, and the product.
template <class MapElement>
struct WinogradWide {
  using Element = MapElement;                      // of maps and weights
  using Value = float;                             // of what they are transformed to
  static constexpr int COLUMNS = 32;               // outputs of a block of transformed weights
  static constexpr int ROWS = 6;                   // tiles that are multiplied at once
  static constexpr int64_t DEPTH = 128;            // channels of a block at most, a multiple of 16
  static constexpr int64_t SUM = 16;               // products summed before they are added to the others
  static constexpr int64_t STRIP = 96;             // tiles of a strip at most
  static constexpr int64_t STRIP_BYTES = 8 << 20;  // of transformed input, where that leaves 32 tiles

  // LANES values.
  template <class T>
  static Floats load(const T* from) {
    return read(from);
  }
  template <class T>
  static void store(T* to, Floats x) {
    write(to, x);
  }

  // m[r][column] (first ? = : +=) sum over t of v[r * stride + t] * u[t][column], r < rows, t < depth, column <
  // COLUMNS; m is dense, depth a multiple of 16. Sums of SUM products keep the rounding error low.
  static void multiply(const float* v, int64_t stride, int64_t rows, const float* u, int64_t depth, float* m,
                       bool first) {
    for (int column = 0; column < COLUMNS; column += 2 * LANES) {
      for_tiles<ROWS>(0, rows, [&]<int COUNT>(int64_t row) {
        multiply_tile<COUNT>(v + row * stride, stride, u + column, depth, m + row * COLUMNS + column, first);
      });
    }
  }

 private:
  // A function of its own, so that what is around it takes no registers from the loop.
  template <int COUNT>
  [[gnu::noinline]] static void multiply_tile(const float* v, int64_t stride, const float* u, int64_t depth, float* m, bool first) {
    Floats total[COUNT][2] = {};
    for (int64_t begin = 0; begin < depth; begin += SUM, v += SUM) {
      Floats sum[COUNT][2] = {};
      for (int64_t t = 0; t < SUM; ++t, u += COLUMNS) {
        const Floats u0 = get(u), u1 = get(u + LANES);
#pragma GCC unroll 6
        for (int r = 0; r < COUNT; ++r) {
          const Floats value = broadcast(v[r * stride + t]);
          sum[r][0] += value * u0;
          sum[r][1] += value * u1;
        }
      }
#pragma GCC unroll 6
      for (int r = 0; r < COUNT; ++r) total[r][0] += sum[r][0], total[r][1] += sum[r][1];
    }
#pragma GCC unroll 6
    for (int r = 0; r < COUNT; ++r, m += COLUMNS) {
      put(m, first ? total[r][0] : get(m) + total[r][0]);
      put(m + LANES, first ? total[r][1] : get(m + LANES) + total[r][1]);
    }
  }
};

}  // namespace
}  // namespace fastdiff::cpu::CPU_CAPABILITY
