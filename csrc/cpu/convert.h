// float16 and bfloat16 to float32 and back (round to nearest even), in vectors. Everything is static and inside the
// namespace of the instruction set, so that code for a newer processor never serves an older one.
#pragma once

#include <cstdint>
#include <cstring>

#include "ops.h"

#ifdef __F16C__
#include <immintrin.h>
#endif

namespace fastdiff::cpu::CPU_CAPABILITY {

static inline int64_t size_of(Type type) { return type == Type::F32 ? 4 : 2; }

static inline float from_bfloat16(uint16_t value) {
  const uint32_t bits = static_cast<uint32_t>(value) << 16;
  float result;
  memcpy(&result, &bits, 4);
  return result;
}

static inline uint16_t to_bfloat16(float value) {
  uint32_t bits;
  memcpy(&bits, &value, 4);
  const uint32_t rounded = (bits + 0x7FFFu + ((bits >> 16) & 1u)) >> 16;
  return static_cast<uint16_t>(value != value ? 0x7FC0u : rounded);
}

static inline float from_float16(uint16_t value) {
  const uint32_t sign = static_cast<uint32_t>(value & 0x8000u) << 16, magnitude = value & 0x7FFFu;
  // The exponent is rebiased by a multiplication, which makes normal numbers of subnormal ones.
  uint32_t bits = magnitude << 13;
  float scaled;
  memcpy(&scaled, &bits, 4);
  scaled *= 0x1p112f;
  memcpy(&bits, &scaled, 4);
  bits = sign | (magnitude >= 0x7C00u ? 0x7F800000u | magnitude << 13 : bits);
  float result;
  memcpy(&result, &bits, 4);
  return result;
}

static inline uint16_t to_float16(float value) {
  uint32_t bits;
  memcpy(&bits, &value, 4);
  const uint32_t sign = bits >> 16 & 0x8000u, magnitude = bits & 0x7FFFFFFFu;
  const uint32_t normal = (magnitude + 0xC8000FFFu + (magnitude >> 13 & 1u)) >> 13;
  // Adding 1/2 leaves a subnormal half's bits, rounded, at the end of the sum's.
  float sum;
  memcpy(&sum, &magnitude, 4);
  sum += 0.5f;
  uint32_t subnormal;
  memcpy(&subnormal, &sum, 4);
  subnormal -= 0x3F000000u;
  const uint32_t special = magnitude > 0x7F800000u ? 0x7E00u : 0x7C00u;
  const uint32_t finite = magnitude < 0x38800000u ? subnormal : normal;
  return static_cast<uint16_t>(sign | (magnitude >= 0x47800000u ? special : finite));
}

// The masked intrinsics: GCC 12 warns about undefined lanes inside the plain ones.
static inline void load_float16(const uint16_t* source, float* target, int64_t count) {
  int64_t i = 0;
#if defined(__AVX512F__)
  for (; i + 16 <= count; i += 16) {
    _mm512_storeu_ps(target + i,
                     _mm512_maskz_cvtph_ps(0xFFFF, _mm256_loadu_si256(reinterpret_cast<const __m256i*>(source + i))));
  }
#elif defined(__F16C__)
  for (; i + 8 <= count; i += 8) {
    _mm256_storeu_ps(target + i, _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(source + i))));
  }
#endif
  for (; i < count; ++i) target[i] = from_float16(source[i]);
}

static inline void store_float16(const float* source, uint16_t* target, int64_t count) {
  int64_t i = 0;
#if defined(__AVX512F__)
  for (; i + 16 <= count; i += 16) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(target + i),
                        _mm512_maskz_cvtps_ph(0xFFFF, _mm512_loadu_ps(source + i), 0));
  }
#elif defined(__F16C__)
  for (; i + 8 <= count; i += 8) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(target + i), _mm256_cvtps_ph(_mm256_loadu_ps(source + i), 0));
  }
#endif
  for (; i < count; ++i) target[i] = to_float16(source[i]);
}

// `count` elements from element `offset` of the array on, as float32 in target.
static inline void load(const Array& array, int64_t offset, float* target, int64_t count) {
  if (array.type == Type::F32) {
    memcpy(target, static_cast<const float*>(array.data) + offset, count * sizeof(float));
    return;
  }
  const uint16_t* source = static_cast<const uint16_t*>(array.data) + offset;
  if (array.type == Type::F16) return load_float16(source, target, count);
  for (int64_t i = 0; i < count; ++i) target[i] = from_bfloat16(source[i]);
}

// The same elements where they lie if they are float32, else converted into the buffer.
static inline const float* view(const Array& array, int64_t offset, float* buffer, int64_t count) {
  if (array.type == Type::F32) return static_cast<const float*>(array.data) + offset;
  load(array, offset, buffer, count);
  return buffer;
}

static inline void store(const float* source, const Array& array, int64_t offset, int64_t count) {
  if (array.type == Type::F32) {
    memcpy(static_cast<float*>(array.data) + offset, source, count * sizeof(float));
    return;
  }
  uint16_t* target = static_cast<uint16_t*>(array.data) + offset;
  if (array.type == Type::F16) return store_float16(source, target, count);
  for (int64_t i = 0; i < count; ++i) target[i] = to_bfloat16(source[i]);
}

static inline float load_one(const Array& array, int64_t offset) {
  if (array.type == Type::F32) return static_cast<const float*>(array.data)[offset];
  const uint16_t value = static_cast<const uint16_t*>(array.data)[offset];
  return array.type == Type::F16 ? from_float16(value) : from_bfloat16(value);
}

static inline void store_one(float value, const Array& array, int64_t offset) {
  if (array.type == Type::F32) {
    static_cast<float*>(array.data)[offset] = value;
  } else {
    static_cast<uint16_t*>(array.data)[offset] = array.type == Type::F16 ? to_float16(value) : to_bfloat16(value);
  }
}

}  // namespace fastdiff::cpu::CPU_CAPABILITY
