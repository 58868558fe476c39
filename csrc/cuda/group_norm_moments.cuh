// Chunks in registers, and sums and moments of their elements.
#pragma once

#include "vector.cuh"

namespace fastdiff::cuda {

constexpr unsigned FULL_WARP = 0xFFFFFFFFu;

// A chunk of kWidth elements in registers, as it lies in memory.
template <class T, int kWidth>
struct Cell {
  Raw raw;
  static __device__ __forceinline__ Cell load(const T* from) { return {load_raw(from)}; }
  static __device__ __forceinline__ Cell from(const float (&values)[kWidth]) { return {encode<T>(values)}; }
  __device__ __forceinline__ void store_tile(T* to) const {
    uint4* words = reinterpret_cast<uint4*>(to);
    words[0] = raw.words[0];
    if (sizeof(T) == 4) words[1] = raw.words[1];
  }
  static __device__ __forceinline__ Cell load_tile(const T* from) {
    const uint4* words = reinterpret_cast<const uint4*>(from);
    return {{words[0], sizeof(T) == 4 ? words[1] : uint4{}}};
  }
  __device__ __forceinline__ void store(T* to) const { store_raw(to, raw); }
  __device__ __forceinline__ void get(float (&out)[kWidth]) const { decode<T>(raw, out); }
};

template <class T>
struct Cell<T, 1> {
  T value;
  static __device__ __forceinline__ Cell load(const T* from) { return {__ldg(from)}; }
  static __device__ __forceinline__ Cell from(const float (&values)[1]) { return {from_float<T>(values[0])}; }
  __device__ __forceinline__ void store_tile(T* to) const { *to = value; }
  static __device__ __forceinline__ Cell load_tile(const T* from) { return {*from}; }
  __device__ __forceinline__ void store(T* to) const { *to = value; }
  __device__ __forceinline__ void get(float (&out)[1]) const { out[0] = to_float(value); }
};

__device__ __forceinline__ float2 warp_sum(float2 value) {
#pragma unroll
  for (int offset = 16; offset > 0; offset /= 2) {
    value.x += __shfl_xor_sync(FULL_WARP, value.x, offset);
    value.y += __shfl_xor_sync(FULL_WARP, value.y, offset);
  }
  return value;
}

// Count, mean and sum of squared deviations of some elements. The mean is `mean + offset`: one float32 would round a
// mean of 100 standard deviations by more than everything else here does.
struct Moments {
  float count, mean, offset, m2;
};

// Chan, Golub and LeVeque, "Updating formulae and a pairwise algorithm for computing sample variances", 1979.
__device__ __forceinline__ Moments merge(const Moments& a, const Moments& b) {
  if (b.count == 0.0f) return a;
  if (a.count == 0.0f) return b;
  const float count = a.count + b.count, share = b.count / count;
  const float delta = (b.mean - a.mean) + (b.offset - a.offset);
  return {count, a.mean, a.offset + delta * share, a.m2 + b.m2 + delta * delta * a.count * share};
}

// As it is kept in memory, where the count is known; and what normalises: mean, offset, 1 / std.
__device__ __forceinline__ Moments unpacked(float count, const float4& kept) { return {count, kept.x, kept.y, kept.z}; }
__device__ __forceinline__ float4 packed(const Moments& moments) {
  return {moments.mean, moments.offset, moments.m2, 0.0f};
}
__device__ __forceinline__ float4 finished(const Moments& moments, float eps) {
  return {moments.mean, moments.offset, 1.0f / sqrtf(moments.m2 / moments.count + eps), 0.0f};
}

}  // namespace fastdiff::cuda
