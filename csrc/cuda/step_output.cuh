// What a network gave for a sampler step: groups of the batch, in either layout, some with variance channels.
#pragma once

#include "vector.cuh"

namespace fastdiff::cuda {

// Eight logical elements of a channels-last sample of `count`, one by one.
__device__ __forceinline__ Raw gather(const Array& array, int64_t base, int64_t element, int valid, int64_t count,
                                      int64_t inner) {
  const int64_t outer = count / inner;
  const int64_t channel = element / outer, first = element - channel * outer;
  float values[WIDTH];
  with_type(array.type, [&](auto t) {
    const auto* from = static_cast<const decltype(t)*>(array.data) + base;
    int64_t index = first * inner + channel, position = first;
#pragma unroll
    for (int j = 0; j < WIDTH; ++j) {
      values[j] = j < valid ? to_float(from[index]) : 0.0f;
      index += inner;
      if (++position == outer) position = 0, index += 1 - count;
    }
  });
  return encode<float>(values);
}

// Eight elements of a group of the model output, from `element` of the sample on.
template <bool kVector>
__device__ __forceinline__ Raw load_output(const StepArgs& args, const Chunk& at, int64_t group, int64_t element) {
  const int64_t base = (group * args.samples + at.sample) * args.output_count;
  return args.output_inner == 1
             ? load_eight<kVector>(args.model_output, base + element, at.valid)
             : gather(args.model_output, base, element, at.valid, args.output_count, args.output_inner);
}

template <bool kVector>
__device__ __forceinline__ void decode_output(const StepArgs& args, const Raw& raw, float (&out)[WIDTH]) {
  decode_eight<kVector>(raw, args.output_inner == 1 ? args.model_output.type : Type::F32, out);
}

// `base` may be `total` itself.
__device__ __forceinline__ void add_difference(float (&total)[WIDTH], float factor, const float (&other)[WIDTH],
                                               const float (&base)[WIDTH]) {
#pragma unroll
  for (int j = 0; j < WIDTH; ++j) total[j] += factor * (other[j] - base[j]);
}

// From out_0 to w_0 * out_0 + sum over k of w_k * (out_k - out_0).
template <bool kVector>
__device__ __forceinline__ void weigh(const StepArgs& args, const Chunk& at, float (&output)[WIDTH]) {
  const float* weights = args.weights + at.sample * args.groups;
  const float first = __ldg(weights);
  float base[WIDTH], other[WIDTH];
#pragma unroll
  for (int j = 0; j < WIDTH; ++j) {
    base[j] = output[j];
    output[j] = first == 0.0f ? 0.0f : first * base[j];
  }
  for (int64_t group = 1; group < args.groups; ++group) {
    const float weight = __ldg(weights + group);
    if (weight == 0.0f) continue;
    decode_output<kVector>(args, load_output<kVector>(args, at, group, at.element), other);
    add_difference(output, weight, other, base);
  }
}

}  // namespace fastdiff::cuda
