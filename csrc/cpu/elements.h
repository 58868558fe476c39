// Elements of maps and weights as vectors of float32: float32 itself, and bfloat16 in a uint16_t, which is widened
// exactly and rounded to nearest even.
#pragma once

#include "attention_simd.h"
#include "convert.h"

namespace fastdiff::cpu::CPU_CAPABILITY {
namespace {

typedef uint32_t Words __attribute__((vector_size(LANES * 4)));
typedef uint16_t Halves __attribute__((vector_size(LANES * 2)));

inline Floats read(const float* from) { return get(from); }

inline Floats read(const uint16_t* from) {
  Halves halves;
  std::memcpy(&halves, from, sizeof(halves));
  return reinterpret_cast<Floats>(__builtin_convertvector(halves, Words) << 16);
}

inline void write(float* to, Floats x) { put(to, x); }

inline void write(uint16_t* to, Floats x) {
  const Words bits = reinterpret_cast<Words>(x), not_a_number = reinterpret_cast<Words>(x != x);
  const Words rounded = (bits + (0x7FFFu + ((bits >> 16) & 1u))) >> 16;
  const auto halves = __builtin_convertvector((rounded & ~not_a_number) | (0x7FC0u & not_a_number), Halves);
  std::memcpy(to, &halves, sizeof(halves));
}

// `count` elements.
inline void widen(const float* from, int64_t count, float* to) { std::memcpy(to, from, count * sizeof(float)); }

inline void widen(const uint16_t* from, int64_t count, float* to) {
  for (int64_t i = 0; i < count; ++i) to[i] = from_bfloat16(from[i]);
}

// The first `count` of LANES elements, and zeros.
template <class Element>
inline Floats read_some(const Element* from, int64_t count) {
  if (count >= LANES) return read(from);
  Element lanes[LANES] = {};
  std::memcpy(lanes, from, count * sizeof(Element));
  return read(lanes);
}

template <class Element>
inline void write_some(Element* to, Floats x, int64_t count) {
  if (count >= LANES) return write(to, x);
  Element lanes[LANES];
  write(lanes, x);
  std::memcpy(to, lanes, count * sizeof(Element));
}

}  // namespace
}  // namespace fastdiff::cpu::CPU_CAPABILITY
