// Eight elements at a time between memory and float32 registers: 16-byte accesses for every dtype.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

#include "ops.h"

namespace fastdiff::cuda {

constexpr int WIDTH = 8;

inline bool aligned(const void* pointer) { return reinterpret_cast<uintptr_t>(pointer) % 16 == 0; }

__device__ __forceinline__ float to_float(float value) { return value; }
__device__ __forceinline__ float to_float(__half value) { return __half2float(value); }
__device__ __forceinline__ float to_float(__nv_bfloat16 value) { return __bfloat162float(value); }

template <class T>
__device__ __forceinline__ T from_float(float value);
template <>
__device__ __forceinline__ float from_float<float>(float value) {
  return value;
}
template <>
__device__ __forceinline__ __half from_float<__half>(float value) {
  return __float2half_rn(value);
}
template <>
__device__ __forceinline__ __nv_bfloat16 from_float<__nv_bfloat16>(float value) {
  return __float2bfloat16_rn(value);
}

// Calls f with a value of the element type that `type` names.
template <class F>
__device__ __forceinline__ void with_type(Type type, F&& f) {
  if (type == Type::F32) {
    f(float{});
  } else if (type == Type::F16) {
    f(__half{});
  } else {
    f(__nv_bfloat16{});
  }
}

__device__ __forceinline__ float load_one(const Array& array, int64_t index) {
  float value = 0.0f;
  with_type(array.type, [&](auto t) { value = to_float(static_cast<const decltype(t)*>(array.data)[index]); });
  return value;
}

__device__ __forceinline__ void store_one(const Array& array, int64_t index, float value) {
  with_type(array.type, [&](auto t) { static_cast<decltype(t)*>(array.data)[index] = from_float<decltype(t)>(value); });
}

// Eight elements as they lie in memory: one 16-byte word for two-byte types, two for float32.
struct Raw {
  uint4 words[2];
};

__device__ __forceinline__ Raw load_raw(const float* from) {
  const uint4* words = reinterpret_cast<const uint4*>(from);
  return {{__ldg(words), __ldg(words + 1)}};
}

template <class T>
__device__ __forceinline__ Raw load_raw(const T* from) {
  return {{__ldg(reinterpret_cast<const uint4*>(from)), uint4{}}};
}

// Two elements in the 32 bits that hold them, the first in the low half. Written out in whole words, since stores of
// single halves are not merged into wide ones.
template <class T>
__device__ __forceinline__ float2 unpack(uint32_t word);
template <>
__device__ __forceinline__ float2 unpack<__half>(uint32_t word) {
  return __half22float2(*reinterpret_cast<const __half2*>(&word));
}
template <>
__device__ __forceinline__ float2 unpack<__nv_bfloat16>(uint32_t word) {
  return {__uint_as_float(word << 16), __uint_as_float(word & 0xFFFF0000u)};
}

template <class T>
__device__ __forceinline__ uint32_t pack(float low, float high);
template <>
__device__ __forceinline__ uint32_t pack<__half>(float low, float high) {
  const __half2 pair = __floats2half2_rn(low, high);
  return *reinterpret_cast<const uint32_t*>(&pair);
}
template <>
__device__ __forceinline__ uint32_t pack<__nv_bfloat16>(float low, float high) {
  const __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
  return *reinterpret_cast<const uint32_t*>(&pair);
}

__device__ __forceinline__ uint4 as_words(float x, float y, float z, float w) {
  return {__float_as_uint(x), __float_as_uint(y), __float_as_uint(z), __float_as_uint(w)};
}

template <class T>
__device__ __forceinline__ void decode(const Raw& raw, float (&out)[WIDTH]) {
  const uint4 words[2] = {raw.words[0], raw.words[1]};
  if constexpr (sizeof(T) == 4) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      out[4 * i] = __uint_as_float(words[i].x);
      out[4 * i + 1] = __uint_as_float(words[i].y);
      out[4 * i + 2] = __uint_as_float(words[i].z);
      out[4 * i + 3] = __uint_as_float(words[i].w);
    }
  } else {
    const float2 pairs[4] = {unpack<T>(words[0].x), unpack<T>(words[0].y), unpack<T>(words[0].z),
                             unpack<T>(words[0].w)};
#pragma unroll
    for (int i = 0; i < 4; ++i) out[2 * i] = pairs[i].x, out[2 * i + 1] = pairs[i].y;
  }
}

template <class T>
__device__ __forceinline__ Raw encode(const float (&v)[WIDTH]) {
  if constexpr (sizeof(T) == 4) {
    return {{as_words(v[0], v[1], v[2], v[3]), as_words(v[4], v[5], v[6], v[7])}};
  } else {
    return {{{pack<T>(v[0], v[1]), pack<T>(v[2], v[3]), pack<T>(v[4], v[5]), pack<T>(v[6], v[7])}, uint4{}}};
  }
}

// To global memory. The plain assignment sometimes comes out as four stores.
__device__ __forceinline__ void store_raw(uint4* to, const Raw& raw, bool both) {
  __stwb(to, raw.words[0]);
  if (both) __stwb(to + 1, raw.words[1]);
}

template <class T>
__device__ __forceinline__ void store_raw(T* to, const Raw& raw) {
  store_raw(reinterpret_cast<uint4*>(to), raw, sizeof(T) == 4);
}

// Arrays whose dtype is known at run time only. kVector: eight whole, aligned elements. Otherwise `valid` of them, one
// at a time, already turned to float32, which fills both words just as eight float32 elements do.
template <bool kVector>
__device__ __forceinline__ Raw load_eight(const Array& array, int64_t index, int valid) {
  Raw raw{};
  if constexpr (kVector) {
    with_type(array.type, [&](auto t) { raw = load_raw(static_cast<const decltype(t)*>(array.data) + index); });
  } else {
    float values[WIDTH];
    with_type(array.type, [&](auto t) {
      const auto* from = static_cast<const decltype(t)*>(array.data) + index;
#pragma unroll
      for (int j = 0; j < WIDTH; ++j) values[j] = j < valid ? to_float(from[j]) : 0.0f;
    });
    raw = encode<float>(values);
  }
  return raw;
}

template <bool kVector>
__device__ __forceinline__ void decode_eight(const Raw& raw, Type type, float (&out)[WIDTH]) {
  with_type(kVector ? type : Type::F32, [&](auto t) { decode<decltype(t)>(raw, out); });
}

template <bool kVector>
__device__ __forceinline__ void store_eight(const Array& array, int64_t index, int valid,
                                            const float (&values)[WIDTH]) {
  if constexpr (kVector) {
    Raw raw{};
    int64_t bytes = 0;
    with_type(array.type, [&](auto t) {
      raw = encode<decltype(t)>(values);
      bytes = sizeof(t);
    });
    store_raw(reinterpret_cast<uint4*>(static_cast<char*>(array.data) + index * bytes), raw, bytes == 4);
  } else {
    with_type(array.type, [&](auto t) {
      auto* to = static_cast<decltype(t)*>(array.data) + index;
#pragma unroll
      for (int j = 0; j < WIDTH; ++j) {
        if (j < valid) to[j] = from_float<decltype(t)>(values[j]);
      }
    });
  }
}

// Where a thread's eight elements lie: `index` in the array, `element` in the sample.
struct Chunk {
  int64_t sample, element, index;
  int valid;
};

inline int64_t chunks_per_sample(int64_t count) { return (count + WIDTH - 1) / WIDTH; }

// A 32-bit division is many times faster.
__device__ __forceinline__ int64_t quotient(int64_t a, int64_t b) {
  return (a | b) >> 32 == 0 ? static_cast<uint32_t>(a) / static_cast<uint32_t>(b) : a / b;
}

__device__ __forceinline__ Chunk chunk_at(int64_t chunk, int64_t per_sample, int64_t count) {
  Chunk at;
  at.sample = quotient(chunk, per_sample);
  at.element = (chunk - at.sample * per_sample) * WIDTH;
  at.index = at.sample * count + at.element;
  at.valid = count - at.element < WIDTH ? static_cast<int>(count - at.element) : WIDTH;
  return at;
}

}  // namespace fastdiff::cuda
