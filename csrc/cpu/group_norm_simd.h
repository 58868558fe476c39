// float32 vectors as wide as the instruction set has them, taken two at a time from and to any element type. Everything
// is static and inside the namespace of the instruction set: see convert.h.
#pragma once

#include <cstdint>
#include <cstring>

#include "cpu/convert.h"

#if defined(__AVX2__)
#include <immintrin.h>
#endif

namespace fastdiff::cpu::CPU_CAPABILITY {

#if defined(__AVX512F__)
constexpr int64_t LANES = 16;
#elif defined(__AVX2__)
constexpr int64_t LANES = 8;
#else
constexpr int64_t LANES = 4;
#endif
constexpr int64_t BLOCK = 2 * LANES;

typedef float Floats __attribute__((vector_size(4 * LANES)));
typedef int32_t Ints __attribute__((vector_size(4 * LANES)));
typedef uint32_t Words __attribute__((vector_size(4 * LANES)));

// Element types; float is itself.
struct Half {
  uint16_t bits;
};
struct Brain {
  uint16_t bits;
};

// BLOCK consecutive elements as float32. Of bfloat16, `first` has those with an even index and `second` the odd ones,
// so that converting takes a shift or a mask instead of a shuffle.
struct Block {
  Floats first, second;
};

// Where element i of an array stands if each of its blocks is written as `first`, then `second`.
template <class T>
static inline int64_t slot(int64_t i) {
  return i;
}
template <>
inline int64_t slot<Brain>(int64_t i) {
  return (i & -BLOCK) + (i & 1) * LANES + (i & (BLOCK - 1)) / 2;
}

// Asks for `count` elements, which need not exist; LOCALITY 3: into every cache, 2: from the second level on.
template <int LOCALITY, class T>
static inline __attribute__((always_inline)) void prefetch(const T* at, int64_t count) {
  constexpr int64_t LINE = 64 / sizeof(T);
  for (int64_t i = 0; i < count; i += LINE) __builtin_prefetch(at + i, 0, LOCALITY);
}

// As `prefetch`, of what will be written.
template <class T>
static inline __attribute__((always_inline)) void prefetch_written(T* at, int64_t count) {
  constexpr int64_t LINE = 64 / sizeof(T);
  for (int64_t i = 0; i < count; i += LINE) __builtin_prefetch(at + i, 1, 3);
}

// How much of a block: all of it, or its first `count` elements.
struct Whole {};
struct Part {
  int64_t count;
};

static inline Floats all(float value) { return value - Floats{}; }

static inline float total(Floats value) {
  float sum = 0.0f;
  for (int i = 0; i < LANES; ++i) sum += value[i];
  return sum;
}

static inline Floats read(const float* source) {
  Floats value;
  memcpy(&value, source, sizeof value);
  return value;
}

static inline void write(Floats value, float* target) { memcpy(target, &value, sizeof value); }

// GCC 12 warns about the undefined lanes inside unmasked AVX-512 intrinsics; with a full mask the code is the same.
static inline Floats read_half(const Half* source) {
#if defined(__AVX512F__)
  return _mm512_maskz_cvtph_ps(0xFFFF, _mm256_loadu_si256(reinterpret_cast<const __m256i*>(source)));
#elif defined(__F16C__)
  return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(source)));
#else
  Floats value;
  for (int i = 0; i < LANES; ++i) value[i] = from_float16(source[i].bits);
  return value;
#endif
}

static inline void write_half(Floats value, Half* target) {
#if defined(__AVX512F__)
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(target), _mm512_maskz_cvtps_ph(0xFFFF, value, 0));
#elif defined(__F16C__)
  _mm_storeu_si128(reinterpret_cast<__m128i*>(target), _mm256_cvtps_ph(value, 0));
#else
  for (int i = 0; i < LANES; ++i) target[i].bits = to_float16(value[i]);
#endif
}

static inline Block load(const float* source, Whole) { return {read(source), read(source + LANES)}; }

static inline Block load(const Half* source, Whole) { return {read_half(source), read_half(source + LANES)}; }

static inline Block unpacked(Words pairs) {
  return {reinterpret_cast<Floats>(pairs << 16), reinterpret_cast<Floats>(pairs & 0xFFFF0000u)};
}

static inline Block load(const Brain* source, Whole) {
  Words pairs;
  memcpy(&pairs, source, sizeof pairs);
  return unpacked(pairs);
}

static inline void store(Block value, float* target, Whole) {
  write(value.first, target);
  write(value.second, target + LANES);
}

static inline void store(Block value, Half* target, Whole) {
  write_half(value.first, target);
  write_half(value.second, target + LANES);
}

// Rounds to nearest even. A NaN stays one unless its low 16 bits are all set, which neither arithmetic nor bfloat16
// gives.
static inline Words rounded_up(Floats value) {
  const Words bits = reinterpret_cast<Words>(value);
  return bits + (0x7FFFu + ((bits >> 16) & 1u));
}

static inline Words packed(Block value) {
  return (rounded_up(value.first) >> 16) | (rounded_up(value.second) & 0xFFFF0000u);
}

static inline void store(Block value, Brain* target, Whole) {
  const Words pairs = packed(value);
  memcpy(target, &pairs, sizeof pairs);
}

// Elements outside a part are read as 0 and not written; their memory is not touched.
#if defined(__AVX512F__)
static inline __mmask32 mask_of(Part part) { return static_cast<__mmask32>((uint64_t{1} << part.count) - 1); }

static inline __mmask16 low(__mmask32 mask) { return static_cast<__mmask16>(mask); }

static inline __mmask16 high(__mmask32 mask) { return static_cast<__mmask16>(mask >> LANES); }

static inline Block load(const float* source, Part part) {
  const __mmask32 mask = mask_of(part);
  return {_mm512_maskz_loadu_ps(low(mask), source), _mm512_maskz_loadu_ps(high(mask), source + LANES)};
}

static inline Block load(const Half* source, Part part) {
  const __mmask32 mask = mask_of(part);
  return {_mm512_maskz_cvtph_ps(0xFFFF, _mm256_maskz_loadu_epi16(low(mask), source)),
          _mm512_maskz_cvtph_ps(0xFFFF, _mm256_maskz_loadu_epi16(high(mask), source + LANES))};
}

static inline Block load(const Brain* source, Part part) {
  return unpacked(reinterpret_cast<Words>(_mm512_maskz_loadu_epi16(mask_of(part), source)));
}

static inline void store(Block value, float* target, Part part) {
  const __mmask32 mask = mask_of(part);
  _mm512_mask_storeu_ps(target, low(mask), value.first);
  _mm512_mask_storeu_ps(target + LANES, high(mask), value.second);
}

static inline void store(Block value, Half* target, Part part) {
  const __mmask32 mask = mask_of(part);
  _mm256_mask_storeu_epi16(target, low(mask), _mm512_maskz_cvtps_ph(0xFFFF, value.first, 0));
  _mm256_mask_storeu_epi16(target + LANES, high(mask), _mm512_maskz_cvtps_ph(0xFFFF, value.second, 0));
}

static inline void store(Block value, Brain* target, Part part) {
  _mm512_mask_storeu_epi16(target, mask_of(part), reinterpret_cast<__m512i>(packed(value)));
}
#else
template <class T>
static inline Block load(const T* source, Part part) {
  T copy[BLOCK] = {};
  memcpy(copy, source, part.count * sizeof(T));
  return load(copy, Whole{});
}

template <class T>
static inline void store(Block value, T* target, Part part) {
  T copy[BLOCK];
  store(value, copy, Whole{});
  memcpy(target, copy, part.count * sizeof(T));
}
#endif

template <class T>
static inline Block kept(Block value, Whole) {
  return value;
}

// The elements outside the part become 0.
template <class T>
static inline Block kept(Block value, Part part) {
  float mask[BLOCK] = {};
  for (int64_t i = 0; i < part.count; ++i) mask[slot<T>(i)] = 1.0f;
  const Block ones = load(mask, Whole{});
  return {ones.first != 0.0f ? value.first : Floats{}, ones.second != 0.0f ? value.second : Floats{}};
}

// body(i, width) for each block of an array of `count` elements, the whole ones from the end down if `downwards`; then
// for the part that is left.
template <class Body>
static inline __attribute__((always_inline)) void for_blocks(int64_t count, bool downwards, const Body& body) {
  const int64_t whole = count / BLOCK, step = downwards ? -BLOCK : BLOCK;
  int64_t i = downwards ? (whole - 1) * BLOCK : 0;
  for (int64_t left = whole; left > 0; --left, i += step) body(i, Whole{});
  if (whole * BLOCK < count) body(whole * BLOCK, Part{count - whole * BLOCK});
}

constexpr float LOG2_E = 1.44269504f;

// x / (1 + exp(-x)), given u = -x log2(e), as u / (p - log2(e)) with p = -log2(e) 2^u. The factor is folded into the
// polynomial of 2^(u - floor(u)), minimax in relative error: 8e-8, or 3e-6 where the result is rounded to 16 bits.
template <bool ROUNDED>
static inline __attribute__((always_inline)) Floats silu_of_exponent(Floats u) {
  constexpr float LIMIT = 126.0f;  // from there on 2^u would overflow, and the result is 0 or x to all digits
#if defined(__AVX512F__)
  const Floats capped = _mm512_maskz_min_ps(0xFFFF, all(LIMIT), u);
  const Floats fraction = _mm512_maskz_reduce_ps(0xFFFF, capped, 1);  // capped - floor(capped)
#else
  const Floats floored = u < -LIMIT ? all(-LIMIT) : u;
  const Floats capped = floored > LIMIT ? all(LIMIT) : floored;
  constexpr float INTEGERS = 12582912.0f;  // 1.5 * 2^23: adding it leaves the nearest integer in the low bits
  const Floats integer = capped - 0.5f + INTEGERS;
  const Floats fraction = capped - (integer - INTEGERS);
#endif
  Floats p;
  if constexpr (ROUNDED) {
    p = -1.952567697e-02f * fraction - 7.503667474e-02f;
    p = p * fraction - 3.483282626e-01f;
    p = p * fraction - 9.997931719e-01f;
    p = p * fraction - 1.442698836e+00f;
  } else {
    p = -2.708770568e-03f * fraction - 1.296887640e-02f;
    p = p * fraction - 8.054035157e-02f;
    p = p * fraction - 3.464684188e-01f;
    p = p * fraction - 1.000008464e+00f;
    p = p * fraction - 1.442694902e+00f;
  }
#if defined(__AVX512F__)
  p = _mm512_maskz_scalef_ps(0xFFFF, p, capped);
#else
  p *= reinterpret_cast<Floats>((reinterpret_cast<Ints>(integer) << 23) + 0x3F800000);
#endif
  return u / (p - LOG2_E);
}

}  // namespace fastdiff::cpu::CPU_CAPABILITY
