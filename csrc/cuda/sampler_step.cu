// One row of a StepTable applied to every element, in one pass over memory: a thread for every eight consecutive
// elements of a sample. Every load that the row needs is in flight before the first is used; a coefficient of zero
// loads nothing. Byte floor at 4.3 TB/s, float32 state, float16 network, guidance: 1x4x64x64 DDIM 0.1 us, DPM++ 2M 0.1
// us (launch-bound: about 2 us); 8x4x128x128 DDIM (x, two halves, x', model input twice) 1.9 us, DPM++ 2M (history in
// and out) 2.9 us; 8x16x512x512 DDIM 125 us.
#include "launch.cuh"
#include "noise.cuh"
#include "step_output.cuh"
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

__device__ __forceinline__ void multiply(float (&values)[WIDTH], float factor) {
#pragma unroll
  for (int j = 0; j < WIDTH; ++j) values[j] *= factor;
}

// The mask of eight elements. kVector: its period is a multiple of eight.
template <bool kVector>
__device__ __forceinline__ void load_mask(const StepArgs& args, const Chunk& at, float (&share)[WIDTH]) {
  const float* mask = args.mask + at.sample * args.mask_stride;
  int64_t position = at.element - quotient(at.element, args.mask_count) * args.mask_count;
  if constexpr (kVector) {
    decode<float>(load_raw(mask + position), share);
  } else {
#pragma unroll
    for (int j = 0; j < WIDTH; ++j) {
      share[j] = __ldg(mask + position);
      if (++position == args.mask_count) position = 0;
    }
  }
}

// x' = mask * x' + (1 - mask) * kept; where the mask is 1 or 0 the one that does not count may be NaN.
template <bool kVector>
__device__ __forceinline__ void blend(const StepArgs& args, const Chunk& at, const float* c, float (&next_x)[WIDTH]) {
  float share[WIDTH], kept[WIDTH], values[WIDTH];
  load_mask<kVector>(args, at, share);
  bool made = true;
#pragma unroll
  for (int j = 0; j < WIDTH; ++j) made = made && share[j] == 1.0f;
  if (made) return;

  const float signal = __ldg(c + row::KNOWN), spread = __ldg(c + row::KNOWN + 1);
  fill(kept, 0.0f);
  if (signal != 0.0f) {
    decode_eight<kVector>(load_eight<kVector>(args.known, at.index, at.valid), args.known.type, values);
    Totals::add_to(kept, signal, values);
  }
  if (spread != 0.0f) {
    fill(values, MISSING);
    if (args.known_noise.data) {
      decode_eight<kVector>(load_eight<kVector>(args.known_noise, at.index, at.valid), args.known_noise.type, values);
    } else if (args.seeds) {
      draw_eight(args.seeds[at.sample], at.element, 0, row::STREAM_INITIAL, values);
    }
    Totals::add_to(kept, spread, values);
  }
#pragma unroll
  for (int j = 0; j < WIDTH; ++j) {
    const float mixed = share[j] * next_x[j] + (1.0f - share[j]) * kept[j];
    next_x[j] = share[j] == 1.0f ? next_x[j] : share[j] == 0.0f ? kept[j] : mixed;
  }
}

// kMore: with weights, scales, variance channels or a mask.
template <bool kVector, bool kMore>
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
  const float spread = __ldg(c + row::VARIANCE), input_scale = __ldg(c + row::INPUT_SCALE);
  const float* scales = kMore && args.scales ? args.scales + 3 * at.sample : nullptr;
  const float bound = __ldg(scales ? scales : c + row::CLIP);

  const bool needs_d = step.needs(row::D);
  const bool needs_x = step.needs(row::X) || (needs_d && ax != 0.0f);
  const bool needs_m = step.needs(row::M) || (needs_d && am != 0.0f);
  const bool varied = kMore && args.output_count != args.count && step.needs(row::NOISE) && spread != 0.0f;
  Raw x{}, m{}, conditional{}, variance{}, anchor{}, hist1{}, hist2{}, hist3{}, noise{};
  if (needs_x) x = load_eight<kVector>(args.x, at.index, at.valid);
  const bool guided = args.groups > 1 && !(kMore && args.weights);
  if (needs_m) {
    m = load_output<kVector>(args, at, 0, at.element);
    if (guided) conditional = load_output<kVector>(args, at, 1, at.element);
  }
  if (varied) variance = load_output<kVector>(args, at, args.groups - 1, args.count + at.element);
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
  decode_output<kVector>(args, m, output);
  if (guided) {
    decode_output<kVector>(args, conditional, values);
    add_difference(output, guidance, values, output);
  } else if (kMore && needs_m && args.weights) {
    weigh<kVector>(args, at, output);
  }
  totals.add(step, row::M, output);
  if (needs_d) {
#pragma unroll
    for (int j = 0; j < WIDTH; ++j) {
      values[j] = 0.0f;
      if (ax != 0.0f) values[j] += ax * state[j];
      if (am != 0.0f) values[j] += am * output[j];
      values[j] = clamp(values[j], bound);
    }
    if (scales) multiply(values, __ldg(scales + 1));
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
    if (input == row::NOISE && scales) multiply(values, __ldg(scales + 2));
    if (input == row::NOISE && spread != 0.0f) {
      float v[WIDTH];
      fill(v, MISSING);
      if (varied) decode_output<kVector>(args, variance, v);
#pragma unroll
      for (int j = 0; j < WIDTH; ++j) values[j] *= expf(spread * v[j]);
    }
    totals.add(step, input, values);
  };
  add(anchor, row::ANCHOR, args.anchor);
  add(hist1, row::HIST1, args.hist1);
  add(hist2, row::HIST2, args.hist2);
  add(hist3, row::HIST3, args.hist3);
  add(noise, row::NOISE, args.noise);

  if constexpr (kMore) {
    if (args.mask) blend<kVector>(args, at, c, totals.x);
  }
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
  for (const Array& array :
       {args.x, args.model_output, args.noise, args.anchor, args.hist1, args.hist2, args.hist3, args.new_x,
        args.new_history, args.new_anchor, args.model_input, args.known, args.known_noise}) {
    vector = vector && aligned(array.data);
  }
  if (args.mask) vector = vector && args.mask_count % WIDTH == 0 && aligned(args.mask);
  const bool more = args.weights || args.scales || args.mask || args.output_count != args.count;
  const auto kernel = vector ? more ? sampler_step_kernel<true, true> : sampler_step_kernel<true, false>
                      : more ? sampler_step_kernel<false, true>
                             : sampler_step_kernel<false, false>;
  return launch(kernel, blocks, THREADS, 0, 1, stream, args, per_sample);
}

}  // namespace fastdiff::cuda
