// One row of a StepTable applied to every element, in one pass over memory: a thread for every eight consecutive
// elements of a sample. Every load that the row needs is in flight before the first is used; a coefficient of zero
// loads nothing. Byte floor at 4.3 TB/s, float32 state, float16 network, guidance: 1x4x64x64 DDIM 0.1 us, DPM++ 2M 0.1
// us (launch-bound: about 2 us); 8x4x128x128 DDIM (x, two halves, x', model input twice) 1.9 us, DPM++ 2M (history in
// and out) 2.9 us; 8x16x512x512 DDIM 125 us.
#include "launch.cuh"
#include "noise.cuh"
#include "step_row.h"

namespace fastdiff::cuda {
namespace {

constexpr int THREADS = 128;
constexpr float MISSING = __builtin_nanf("");

// The coefficients of one output, over row::Input.
struct Block {
  float values[row::INPUTS];
};

template <bool kVector>
__device__ __forceinline__ Block load_block(const float* from, bool wanted) {
  Block block{};
  if (!wanted) return block;
  if constexpr (kVector) {
    decode<float>(load_raw(from), block.values);
  } else {
#pragma unroll
    for (int i = 0; i < row::INPUTS; ++i) block.values[i] = __ldg(from + i);
  }
  return block;
}

// The logical elements of a channels-last array, one by one.
__device__ __forceinline__ Raw gather(const Array& array, const Chunk& at, int64_t base, int64_t count, int64_t inner) {
  const int64_t outer = count / inner;
  const int64_t channel = at.element / outer, first = at.element - channel * outer;
  float values[WIDTH];
  with_type(array.type, [&](auto t) {
    const auto* from = static_cast<const decltype(t)*>(array.data) + base;
    int64_t index = first * inner + channel, position = first;
#pragma unroll
    for (int j = 0; j < WIDTH; ++j) {
      values[j] = j < at.valid ? to_float(from[index]) : 0.0f;
      index += inner;
      if (++position == outer) position = 0, index += 1 - count;
    }
  });
  return encode<float>(values);
}

struct Step {
  Block x, history, anchor;

  __device__ __forceinline__ bool needs(row::Input input) const {
    return x.values[input] != 0.0f || history.values[input] != 0.0f || anchor.values[input] != 0.0f;
  }
};

struct Totals {
  float x[WIDTH], history[WIDTH], anchor[WIDTH];

  __device__ __forceinline__ void add(const Step& step, row::Input input, const float (&values)[WIDTH]) {
    add_to(x, step.x.values[input], values);
    add_to(history, step.history.values[input], values);
    add_to(anchor, step.anchor.values[input], values);
  }

  static __device__ __forceinline__ void add_to(float (&total)[WIDTH], float c, const float (&values)[WIDTH]) {
    if (c == 0.0f) return;
#pragma unroll
    for (int j = 0; j < WIDTH; ++j) total[j] += c * values[j];
  }
};

__device__ __forceinline__ void fill(float (&values)[WIDTH], float value) {
#pragma unroll
  for (int j = 0; j < WIDTH; ++j) values[j] = value;
}

// fminf and fmaxf would turn NaN into the bound.
__device__ __forceinline__ float clamp(float value, float bound) {
  return value < -bound ? -bound : value > bound ? bound : value;
}

template <bool kVector>
__global__ void __launch_bounds__(THREADS) sampler_step_kernel(StepArgs args, int64_t per_sample) {
  const int64_t chunk = static_cast<int64_t>(blockIdx.x) * THREADS + threadIdx.x;
  if (chunk >= args.samples * per_sample) return;
  const Chunk at = chunk_at(chunk, per_sample, args.count);

  const int64_t index = args.row + (args.counter ? *args.counter : 0);
  const bool inside = index >= 0 && index < args.rows;
  const float* c = args.table + (inside ? index : 0) * row::SIZE;
  Step step;
  step.x = load_block<kVector>(c + row::NEW_X, true);
  step.history = load_block<kVector>(c + row::NEW_HISTORY, args.new_history.data != nullptr);
  step.anchor = load_block<kVector>(c + row::NEW_ANCHOR, args.new_anchor.data != nullptr);
  const float guidance = __ldg(c + row::GUIDANCE), ax = __ldg(c + row::PREDICTION), am = __ldg(c + row::PREDICTION + 1);
  const float bound = __ldg(c + row::CLIP), input_scale = __ldg(c + row::INPUT_SCALE);

  const bool needs_d = step.needs(row::D);
  const bool needs_x = step.needs(row::X) || (needs_d && ax != 0.0f);
  const bool needs_m = step.needs(row::M) || (needs_d && am != 0.0f);
  const bool planar = args.output_inner == 1;
  Raw x{}, m{}, conditional{}, anchor{}, hist1{}, hist2{}, hist3{}, noise{};
  if (needs_x) x = load_eight<kVector>(args.x, at.index, at.valid);
  const auto load_m = [&](int64_t sample) {
    const int64_t base = sample * args.count;
    return planar ? load_eight<kVector>(args.model_output, base + at.element, at.valid)
                  : gather(args.model_output, at, base, args.count, args.output_inner);
  };
  if (needs_m) {
    m = load_m(at.sample);
    if (args.groups > 1) conditional = load_m(args.samples + at.sample);
  }
  const auto load = [&](Raw& raw, row::Input input, const Array& array) {
    if (step.needs(input) && array.data) raw = load_eight<kVector>(array, at.index, at.valid);
  };
  load(anchor, row::ANCHOR, args.anchor);
  load(hist1, row::HIST1, args.hist1);
  load(hist2, row::HIST2, args.hist2);
  load(hist3, row::HIST3, args.hist3);
  load(noise, row::NOISE, args.noise);

  Totals totals;
  fill(totals.x, inside ? 0.0f : MISSING);
  fill(totals.history, inside ? 0.0f : MISSING);
  fill(totals.anchor, inside ? 0.0f : MISSING);
  float state[WIDTH], output[WIDTH], values[WIDTH];
  decode_eight<kVector>(x, args.x.type, state);
  totals.add(step, row::X, state);
  const Type m_type = planar ? args.model_output.type : Type::F32;
  with_type(kVector ? m_type : Type::F32, [&](auto t) {
    using T = decltype(t);
    decode<T>(m, output);
    if (args.groups > 1) {
      decode<T>(conditional, values);
#pragma unroll
      for (int j = 0; j < WIDTH; ++j) output[j] += guidance * (values[j] - output[j]);
    }
  });
  totals.add(step, row::M, output);
  if (needs_d) {
#pragma unroll
    for (int j = 0; j < WIDTH; ++j) {
      values[j] = 0.0f;
      if (ax != 0.0f) values[j] += ax * state[j];
      if (am != 0.0f) values[j] += am * output[j];
      values[j] = clamp(values[j], bound);
    }
    totals.add(step, row::D, values);
  }
  const auto add = [&](const Raw& raw, row::Input input, const Array& array) {
    if (!step.needs(input)) return;
    fill(values, MISSING);
    if (array.data) {
      decode_eight<kVector>(raw, array.type, values);
    } else if (input == row::NOISE && args.seeds) {
      draw_eight(args.seeds[at.sample], at.element, static_cast<uint32_t>(index), row::STREAM_STEP, values);
    }
    totals.add(step, input, values);
  };
  add(anchor, row::ANCHOR, args.anchor);
  add(hist1, row::HIST1, args.hist1);
  add(hist2, row::HIST2, args.hist2);
  add(hist3, row::HIST3, args.hist3);
  add(noise, row::NOISE, args.noise);

  store_eight<kVector>(args.new_x, at.index, at.valid, totals.x);
  if (args.new_history.data) store_eight<kVector>(args.new_history, at.index, at.valid, totals.history);
  if (args.new_anchor.data) store_eight<kVector>(args.new_anchor, at.index, at.valid, totals.anchor);
  if (args.model_input.data) {
#pragma unroll
    for (int j = 0; j < WIDTH; ++j) values[j] = input_scale * totals.x[j];
    for (int64_t copy = 0; copy < args.copies; ++copy) {
      store_eight<kVector>(args.model_input, at.index + copy * args.samples * args.count, at.valid, values);
    }
  }
}

}  // namespace

int sampler_step(const StepArgs& args, void* stream) {
  const int64_t per_sample = chunks_per_sample(args.count);
  const int64_t blocks = (args.samples * per_sample + THREADS - 1) / THREADS;
  bool vector = args.count % WIDTH == 0 && aligned(args.table);
  for (const Array& array : {args.x, args.model_output, args.noise, args.anchor, args.hist1, args.hist2, args.hist3,
                             args.new_x, args.new_history, args.new_anchor, args.model_input}) {
    vector = vector && aligned(array.data);
  }
  const auto kernel = vector ? sampler_step_kernel<true> : sampler_step_kernel<false>;
  return launch(kernel, blocks, THREADS, 0, 1, stream, args, per_sample);
}

}  // namespace fastdiff::cuda
