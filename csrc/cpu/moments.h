// Sums over runs of elements: moments and inner products. Moments are sums of the distance to a value near the part's
// mean, and parts are merged by Chan, Golub and LeVeque's formula ("Updating formulae and a pairwise algorithm for
// computing sample variances", 1979), so that large means cancel nothing. Everything is static: see convert.h.
#pragma once

#include "cpu/group_norm_simd.h"

namespace fastdiff::cpu::CPU_CAPABILITY {

struct Moments {
  double count = 0.0, mean = 0.0, squares = 0.0;  // squares: the sum of squared distances to the mean

  void merge(const Moments& other) {
    const double both = count + other.count, distance = other.mean - mean;
    if (other.count == 0.0) return;
    mean += distance * (other.count / both);
    squares += other.squares + distance * distance * (count * other.count / both);
    count = both;
  }
};

// Of at most a few thousand values: the sums are float32. Equal values have squares of exactly 0.
static inline Moments moments_of(const float* values, int64_t count) {
  const float first = values[0], n = static_cast<float>(count);
  Block sum{}, squares{};
  for_blocks(count, false, [&](int64_t i, auto width) __attribute__((always_inline)) {
    const Block v = load(values + i, width);
    const Block d = kept<float>({v.first - first, v.second - first}, width);
    sum.first += d.first;
    sum.second += d.second;
  });
  const float near = total(sum.first + sum.second) / n;
  sum = Block{};
  for_blocks(count, false, [&](int64_t i, auto width) __attribute__((always_inline)) {
    const Block v = load(values + i, width);
    const Block d = kept<float>({v.first - first - near, v.second - first - near}, width);
    sum.first += d.first;
    sum.second += d.second;
    squares.first += d.first * d.first;
    squares.second += d.second * d.second;
  });
  const double s = total(sum.first + sum.second), q = total(squares.first + squares.second) - s * s / n;
  return {static_cast<double>(count), static_cast<double>(first) + near + s / n, q > 0.0 ? q : 0.0};
}

// The inner product of at most a few thousand values.
static inline double dot(const float* a, const float* b, int64_t count) {
  Block sum{};
  for_blocks(count, false, [&](int64_t i, auto width) __attribute__((always_inline)) {
    const Block x = load(a + i, width), y = load(b + i, width);
    sum.first += x.first * y.first;
    sum.second += x.second * y.second;
  });
  return total(sum.first + sum.second);
}

}  // namespace fastdiff::cpu::CPU_CAPABILITY
