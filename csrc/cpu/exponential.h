// e^x in loops that compilers turn into vector code. Everything is static: see convert.h.
#pragma once

#include <cstdint>
#include <cstring>

namespace fastdiff::cpu::CPU_CAPABILITY {

// 2^power for powers from -126 to 127.
static inline float power_of_two(int32_t power) {
  const uint32_t bits = static_cast<uint32_t>(power + 127) << 23;
  float result;
  memcpy(&result, &bits, 4);
  return result;
}

// With x = n ln 2 + r and |r| <= ln 2 / 2: 2^n times the Taylor polynomial of e^r. Relative error below 2e-7; NaN
// stays.
static inline float exponential(float x) {
  constexpr float INTEGERS = 12582912.0f;  // 1.5 * 2^23: adding it leaves the nearest integer in the low bits
  const float capped = x > 89.0f ? 89.0f : x < -104.0f ? -104.0f : x;
  const float shifted = capped * 1.44269504f + INTEGERS, n = shifted - INTEGERS;
  // ln 2 in two parts, the first with so few bits that its product is exact.
  const float r = (capped - n * 0.693359375f) + n * 2.12194440e-4f;
  float p = 1.0f / 5040.0f;
  p = p * r + 1.0f / 720.0f;
  p = p * r + 1.0f / 120.0f;
  p = p * r + 1.0f / 24.0f;
  p = p * r + 1.0f / 6.0f;
  p = p * r + 0.5f;
  p = p * r + 1.0f;
  p = p * r + 1.0f;
  int32_t power;
  memcpy(&power, &shifted, 4);
  power -= 0x4B400000;              // the bits of INTEGERS
  const int32_t half = power >> 1;  // 2^n itself can be out of range
  return p * power_of_two(half) * power_of_two(power - half);
}

}  // namespace fastdiff::cpu::CPU_CAPABILITY
