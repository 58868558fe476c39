// One row of a StepTable applied to every element, block by block: each input is read once and each output written
// once. Floor: bytes over the bandwidth of the cache they lie in. DDIM at 1x4x64x64 float32 moves 256 KB (x and m in,
// x' and the model input out), 3.5 us on one core of a 2.6 GHz EPYC; at 2x4x128x128 2 MB, 19 us on two.
#include <algorithm>
#include <cmath>

#include "convert.h"
#include "normals.h"
#include "ops.h"
#include "parallel.h"
#include "step_plan.h"
#include "step_row.h"
#include "step_sums.h"

namespace fastdiff::cpu::CPU_CAPABILITY {

namespace {

constexpr int64_t BLOCK = 1024;           // elements at a time: every intermediate stays in the first-level cache
constexpr int64_t LONG_BLOCK = 16384;     // the same where there is none, so that fewer loops begin
constexpr int64_t PARALLEL = 32768;       // elements below which threads cost more than they give
constexpr int64_t PARALLEL_DRAWN = 8192;  // the same where noise is drawn

// Elements [begin, begin + count) of a sample of the model output, in the logical order.
const float* model_output(const StepArgs& args, int64_t sample, int64_t begin, int64_t count, float* buffer) {
  const int64_t inner = args.output_inner, offset = sample * args.output_count;
  if (inner == 1) return view(args.model_output, offset + begin, buffer, count);
  const int64_t spatial = args.output_count / inner;
  int64_t channel = begin / spatial, position = begin % spatial;
  for (int64_t done = 0; done < count; ++channel, position = 0) {
    const int64_t run = std::min(count - done, spatial - position);
    for (int64_t i = 0; i < run; ++i) {
      buffer[done + i] = load_one(args.model_output, offset + (position + i) * inner + channel);
    }
    done += run;
  }
  return buffer;
}

// m: the groups of the model output together, in `out` unless there is but one.
const float* guided(const StepArgs& args, const Plan& plan, int64_t sample, int64_t begin, int64_t count, float* buffer,
                    float* out) {
  alignas(64) float other[BLOCK];
  const float* base = model_output(args, sample, begin, count, buffer);
  const auto group = [&](int64_t k) { return model_output(args, k * args.samples + sample, begin, count, other); };
  if (!args.weights) {
    if (args.groups == 1) return base;
    guide(base, group(1), plan.row[row::GUIDANCE], out, count);
    return out;
  }
  const float* weights = args.weights + sample * args.groups;
  combine(sum_of(weights, 1), &base, out, count);
  for (int64_t k = 1; k < args.groups; ++k) {
    if (weights[k] != 0.0f) add_difference(base, group(k), weights[k], out, count);
  }
  return out;
}

// The noise with the factors of the sample and of the variance channels, in `out` if there are any.
const float* scaled_noise(const StepArgs& args, const Plan& plan, int64_t sample, int64_t begin, int64_t count,
                          float* buffer, float* out) {
  const float* z =
      args.noise ? view(args.noise, sample * args.count + begin, buffer, count)
                 : draw(static_cast<uint64_t>(args.seeds[sample]), begin, count, plan.index, row::STREAM_STEP, buffer);
  if (!args.scales && !plan.varied) return z;
  scale(z, args.scales ? args.scales[3 * sample + 2] : 1.0f, out, count);
  if (plan.varied) {
    alignas(64) float channels[BLOCK];
    const int64_t group = (args.groups - 1) * args.samples;
    const float* v = model_output(args, group + sample, args.count + begin, count, channels);
    multiply_exponential(v, plan.row[row::VARIANCE], out, count);
  }
  return out;
}

// Elements [begin, begin + count) of a sample's mask.
const float* mask_of(const StepArgs& args, int64_t sample, int64_t begin, int64_t count, float* buffer) {
  const float* mask = args.mask + sample * args.mask_stride;
  int64_t position = begin % args.mask_count;
  if (position + count <= args.mask_count) return mask + position;
  for (int64_t done = 0; done < count; position = 0) {
    const int64_t run = std::min(count - done, args.mask_count - position);
    std::copy_n(mask + position, run, buffer + done);
    done += run;
  }
  return buffer;
}

// Puts the kept image where the mask is not 1. Away from the function that calls it, whose buffers fill the cache.
__attribute__((noinline)) void blend_block(const StepArgs& args, const Plan& plan, int64_t sample, int64_t begin,
                                           int64_t count, float* next_x) {
  alignas(64) float copied[BLOCK], image[BLOCK], kept[BLOCK], noise[normals_room(BLOCK)];
  const float* mask = mask_of(args, sample, begin, count, copied);
  if (all_ones(mask, count)) return;
  const float* coefficients = plan.row + row::KNOWN;
  const int64_t offset = sample * args.count + begin;
  const float* inputs[2] = {};
  if (coefficients[0] != 0.0f) inputs[0] = view(args.known, offset, image, count);
  if (coefficients[1] != 0.0f) {
    inputs[1] = args.known_noise
                    ? view(args.known_noise, offset, noise, count)
                    : draw(static_cast<uint64_t>(args.seeds[sample]), begin, count, 0, row::STREAM_INITIAL, noise);
  }
  combine(sum_of(coefficients, 2), inputs, kept, count);
  blend(mask, kept, next_x, count);
}

// The next model input, made of x', wherever it is repeated.
void store_input(const StepArgs& args, float factor, const float* next_x, int64_t offset, int64_t count) {
  alignas(64) float scaled[BLOCK];
  const bool direct = args.model_input.type == Type::F32;
  if (!direct) scale(next_x, factor, scaled, count);
  for (int64_t copy = 0; copy < args.copies; ++copy, offset += args.samples * args.count) {
    if (direct) {
      scale(next_x, factor, static_cast<float*>(args.model_input.data) + offset, count);
    } else {
      store(scaled, args.model_input, offset, count);
    }
  }
}

void step_block(const StepArgs& args, const Plan& plan, int64_t sample, int64_t begin, int64_t count) {
  alignas(64) float x[BLOCK], m[BLOCK], together[BLOCK], prediction[BLOCK];
  alignas(64) float noise[normals_room(BLOCK)], factored[BLOCK], out[BLOCK];
  const int64_t offset = sample * args.count + begin;
  const float* inputs[row::INPUTS] = {};

  if (plan.needs[row::X]) inputs[row::X] = view(args.x, offset, x, count);
  if (plan.needs[row::M]) inputs[row::M] = guided(args, plan, sample, begin, count, m, together);
  const Array* outputs[] = {&args.new_x, &args.new_history, &args.new_anchor};
  const int kept = plan.data;
  if (plan.needs[row::D]) {
    float* data = kept ? static_cast<float*>(outputs[kept]->data) + offset : prediction;
    combine(plan.prediction, inputs, data, count);
    const float bound = args.scales ? args.scales[3 * sample] : plan.row[row::CLIP];
    if (bound < INFINITY) clamp(data, bound, count);
    if (args.scales) multiply(data, args.scales[3 * sample + 1], count);
    inputs[row::D] = data;
  }
  const Array* stored[] = {&args.anchor, &args.hist1, &args.hist2, &args.hist3};
  for (int i = 0; i < 4; ++i) {
    if (plan.needs[row::ANCHOR + i]) inputs[row::ANCHOR + i] = static_cast<const float*>(stored[i]->data) + offset;
  }
  if (plan.needs[row::NOISE]) inputs[row::NOISE] = scaled_noise(args, plan, sample, begin, count, noise, factored);

  for (int i = 2; i >= 0; --i) {  // x' last: the model input is made from it
    if (!*outputs[i] || (i > 0 && i == kept)) continue;
    const bool direct = outputs[i]->type == Type::F32;
    float* target = direct ? static_cast<float*>(outputs[i]->data) + offset : out;
    combine(plan.combinations[i], inputs, target, count);
    if (i == 0 && args.mask) blend_block(args, plan, sample, begin, count, target);
    if (!direct) store(out, *outputs[i], offset, count);
    if (i == 0 && args.model_input) store_input(args, plan.row[row::INPUT_SCALE], target, offset, count);
  }
}

// Whether a block of anything but inputs and outputs is needed.
bool has_intermediates(const StepArgs& args, const Plan& plan) {
  for (const Array* array : {&args.x, &args.model_output, &args.noise, &args.new_x, &args.model_input}) {
    if (array->type != Type::F32) return true;
  }
  return plan.needs[row::D] || args.groups > 1 || args.output_inner > 1 || args.weights || args.mask ||
         (plan.needs[row::NOISE] && (!args.noise || args.scales || plan.varied));
}

}  // namespace

const char* sampler_step(const StepArgs& args) {
  const Plan plan = make_plan(args);
  if (const char* missing = missing_input(args, plan)) return missing;
  const int64_t block = has_intermediates(args, plan) ? BLOCK : LONG_BLOCK;
  const int64_t blocks = (args.count + block - 1) / block, total = args.samples * args.count;
  const bool draws_kept = args.mask && plan.row[row::KNOWN + 1] != 0.0f && !args.known_noise;
  const bool draws = draws_kept || (plan.needs[row::NOISE] && !args.noise);
  const int threads = total < (draws ? PARALLEL_DRAWN : PARALLEL) ? 1 : args.threads;
  parallel_for(args.samples * blocks, threads, [&](int64_t task) {
    const int64_t sample = task / blocks, begin = task % blocks * block;
    step_block(args, plan, sample, begin, std::min(block, args.count - begin));
  });
  return nullptr;
}

}  // namespace fastdiff::cpu::CPU_CAPABILITY
