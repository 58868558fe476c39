// The transforms of Winograd's minimal filtering F(OUT, 3): OUT results of a filter g with three taps from OUT + 2
// values d by OUT + 2 products, A^T [(G g) * (B^T d)]. Lavin & Gray, arXiv:1509.09308, section 4.
#pragma once

#include "attention_simd.h"

namespace fastdiff::cpu::CPU_CAPABILITY {
namespace {

// result(i, j, T d T^T) of FROM x FROM values d = value(i, j), by a filter that computes TO values T x of FROM values x.
template <auto filter, int FROM, int TO, class Value, class Result>
inline void transform(const Value& value, const Result& result) {
  Floats half[TO][FROM];
#pragma GCC unroll 6
  for (int j = 0; j < FROM; ++j) {
    Floats column[FROM], filtered[TO];
#pragma GCC unroll 6
    for (int i = 0; i < FROM; ++i) column[i] = value(i, j);
    filter(column, filtered);
#pragma GCC unroll 6
    for (int i = 0; i < TO; ++i) half[i][j] = filtered[i];
  }
#pragma GCC unroll 6
  for (int i = 0; i < TO; ++i) {
    Floats row[TO];
    filter(half[i], row);
#pragma GCC unroll 6
    for (int j = 0; j < TO; ++j) result(i, j, row[j]);
  }
}

template <int OUT>
struct Transform;

// Points 0, 1, -1, infinity. The two rows of G that are halves are doubled, and what is made of them halved.
template <>
struct Transform<2> {
  static constexpr int SIZE = 4;

  static void input(const Floats (&d)[4], Floats (&v)[4]) {
    v[0] = d[0] - d[2];
    v[1] = d[1] + d[2];
    v[2] = d[2] - d[1];
    v[3] = d[3] - d[1];
  }

  static void weight(const Floats (&g)[3], Floats (&u)[4]) {
    const Floats even = g[0] + g[2];
    u[0] = g[0];
    u[1] = even + g[1];
    u[2] = even - g[1];
    u[3] = g[2];
  }

  static void output(const Floats (&m)[4], Floats (&y)[2]) {
    y[0] = m[0] + 0.5f * (m[1] + m[2]);
    y[1] = m[3] + 0.5f * (m[1] - m[2]);
  }
};

// Points 0, 2/3, -2/3, 3/2, -3/2, infinity: a third of the rounding error that 0, +-1, +-2 make. The rows are scaled so
// that B and A hold few numbers that float32 rounds.
template <>
struct Transform<4> {
  static constexpr int SIZE = 6;

  static void input(const Floats (&d)[6], Floats (&v)[6]) {
    constexpr float squares = 97.0f / 36.0f;  // (2/3)^2 + (3/2)^2
    const Floats even_small = 1.5f * d[4] - 3.375f * d[2], odd_small = d[3] - 2.25f * d[1];
    const Floats even_large = 2.25f * d[4] - d[2], odd_large = 3.375f * d[3] - 1.5f * d[1];
    v[0] = (d[0] + d[4]) - squares * d[2];
    v[1] = even_small + odd_small;
    v[2] = even_small - odd_small;
    v[3] = even_large + odd_large;
    v[4] = even_large - odd_large;
    v[5] = (d[1] + d[5]) - squares * d[3];
  }

  static void weight(const Floats (&g)[3], Floats (&u)[6]) {
    const Floats small = (-8.0f / 65.0f) * g[0] - (32.0f / 585.0f) * g[2];
    const Floats large = (32.0f / 585.0f) * g[0] + (8.0f / 65.0f) * g[2];
    u[0] = g[0];
    u[1] = small - (16.0f / 195.0f) * g[1];
    u[2] = small + (16.0f / 195.0f) * g[1];
    u[3] = large + (16.0f / 195.0f) * g[1];
    u[4] = large - (16.0f / 195.0f) * g[1];
    u[5] = g[2];
  }

  static void output(const Floats (&m)[6], Floats (&y)[4]) {
    const Floats even_small = m[1] + m[2], odd_small = m[1] - m[2];
    const Floats even_large = m[3] + m[4], odd_large = m[3] - m[4];
    y[0] = (m[0] + even_large) + 3.375f * even_small;
    y[1] = 2.25f * odd_small + 1.5f * odd_large;
    y[2] = 1.5f * even_small + 2.25f * even_large;
    y[3] = (m[5] + odd_small) + 3.375f * odd_large;
  }
};

}  // namespace
}  // namespace fastdiff::cpu::CPU_CAPABILITY
