// Sums of a step's inputs, and whatever else is done to a block of float32 values.
#pragma once

#include <algorithm>
#include <cstdint>

#include "exponential.h"
#include "step_row.h"

namespace fastdiff::cpu::CPU_CAPABILITY {

namespace {

#if defined(__AVX512F__)
constexpr int64_t LANES = 16;
#elif defined(__AVX2__)
constexpr int64_t LANES = 8;
#else
constexpr int64_t LANES = 4;
#endif
constexpr int UNROLLED = 4;  // vectors at a time

// A sum of the inputs whose coefficient is not zero; the others are not read.
struct Sum {
  int terms = 0;
  int inputs[row::INPUTS];
  float factors[row::INPUTS];
};

Sum sum_of(const float* coefficients, int size) {
  Sum sum;
  for (int input = 0; input < size; ++input) {
    if (coefficients[input] == 0.0f) continue;
    sum.inputs[sum.terms] = input;
    sum.factors[sum.terms++] = coefficients[input];
  }
  return sum;
}

typedef float Floats __attribute__((vector_size(4 * LANES), aligned(4), may_alias));

inline Floats& vector_at(float* values) { return *reinterpret_cast<Floats*>(values); }

inline const Floats& vector_at(const float* values) { return *reinterpret_cast<const Floats*>(values); }

// out = sum of coefficient * input over TERMS inputs, in their order.
template <int TERMS>
void sum_terms(const float* const* inputs, const float* coefficients, float* __restrict out, int64_t count) {
  const float* from[TERMS];
  std::copy_n(inputs, TERMS, from);
  int64_t i = 0;
  for (; i + UNROLLED * LANES <= count; i += UNROLLED * LANES) {
    Floats total[UNROLLED];
#pragma GCC unroll 8
    for (int v = 0; v < UNROLLED; ++v) total[v] = coefficients[0] * vector_at(from[0] + i + v * LANES);
#pragma GCC unroll 8
    for (int term = 1; term < TERMS; ++term) {
#pragma GCC unroll 8
      for (int v = 0; v < UNROLLED; ++v) total[v] += coefficients[term] * vector_at(from[term] + i + v * LANES);
    }
#pragma GCC unroll 8
    for (int v = 0; v < UNROLLED; ++v) vector_at(out + i + v * LANES) = total[v];
  }
  for (; i < count; ++i) {
    float total = coefficients[0] * from[0][i];
    for (int term = 1; term < TERMS; ++term) total += coefficients[term] * from[term][i];
    out[i] = total;
  }
}

void combine(const Sum& sum, const float* const* inputs, float* out, int64_t count) {
  const float* used[row::INPUTS];
  const float* factors = sum.factors;
  for (int term = 0; term < sum.terms; ++term) used[term] = inputs[sum.inputs[term]];
  switch (sum.terms) {
    case 0:
      return std::fill(out, out + count, 0.0f);
    case 1:
      return sum_terms<1>(used, factors, out, count);
    case 2:
      return sum_terms<2>(used, factors, out, count);
    case 3:
      return sum_terms<3>(used, factors, out, count);
    case 4:
      return sum_terms<4>(used, factors, out, count);
    case 5:
      return sum_terms<5>(used, factors, out, count);
    case 6:
      return sum_terms<6>(used, factors, out, count);
    case 7:
      return sum_terms<7>(used, factors, out, count);
    default:
      return sum_terms<8>(used, factors, out, count);
  }
}

void guide(const float* from, const float* to, float guidance, float* __restrict out, int64_t count) {
  for (int64_t i = 0; i < count; ++i) out[i] = from[i] + guidance * (to[i] - from[i]);
}

void add_difference(const float* from, const float* to, float weight, float* __restrict total, int64_t count) {
  for (int64_t i = 0; i < count; ++i) total[i] += weight * (to[i] - from[i]);
}

void scale(const float* from, float factor, float* __restrict out, int64_t count) {
  for (int64_t i = 0; i < count; ++i) out[i] = factor * from[i];
}

// NaN stays NaN, as in torch.clamp.
void clamp(float* values, float limit, int64_t count) {
  for (int64_t i = 0; i < count; ++i) {
    const float capped = values[i] > limit ? limit : values[i];
    values[i] = capped < -limit ? -limit : capped;
  }
}

void multiply(float* values, float factor, int64_t count) {
  for (int64_t i = 0; i < count; ++i) values[i] *= factor;
}

void multiply_exponential(const float* from, float factor, float* __restrict values, int64_t count) {
  for (int64_t i = 0; i < count; ++i) values[i] *= exponential(factor * from[i]);
}

bool all_ones(const float* mask, int64_t count) {
  int32_t others = 0;
  for (int64_t i = 0; i < count; ++i) others |= mask[i] != 1.0f;
  return others == 0;
}

// Where the mask is 1 or 0 the one that does not count may be NaN.
void blend(const float* mask, const float* kept, float* __restrict made, int64_t count) {
  for (int64_t i = 0; i < count; ++i) {
    const float mixed = mask[i] * made[i] + (1.0f - mask[i]) * kept[i];
    made[i] = mask[i] == 1.0f ? made[i] : mask[i] == 0.0f ? kept[i] : mixed;
  }
}

}  // namespace

}  // namespace fastdiff::cpu::CPU_CAPABILITY
