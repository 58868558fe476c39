// One row of a StepTable applied to every element, block by block: each input is read once and each output written
// once. Floor: bytes over the bandwidth of the cache they lie in. DDIM at 1x4x64x64 float32 moves 256 KB (x and m in,
// x' and the model input out), 3.5 us on one core of a 2.6 GHz EPYC; at 2x4x128x128 2 MB, 19 us on two.
#include <algorithm>
#include <cmath>

#include "convert.h"
#include "normals.h"
#include "ops.h"
#include "parallel.h"
#include "step_row.h"

namespace fastdiff::cpu::CPU_CAPABILITY {

namespace {

constexpr int64_t BLOCK = 1024;           // elements at a time: every intermediate stays in the first-level cache
constexpr int64_t PARALLEL = 32768;       // elements below which threads cost more than they give
constexpr int64_t PARALLEL_DRAWN = 8192;  // the same where noise is drawn

// What a row asks for, found once a call.
struct Plan {
  const float* row;
  uint32_t index;                // of the row, which is the noise's step
  const float* combinations[3];  // the coefficients of x', history', anchor'; nullptr where not asked for
  bool needs[row::INPUTS];
};

Plan make_plan(const StepArgs& args) {
  Plan plan{};
  plan.index = static_cast<uint32_t>(args.row + (args.counter ? *args.counter : 0));
  plan.row = args.table + plan.index * row::SIZE;
  plan.combinations[0] = plan.row + row::NEW_X;
  if (args.new_history) plan.combinations[1] = plan.row + row::NEW_HISTORY;
  if (args.new_anchor) plan.combinations[2] = plan.row + row::NEW_ANCHOR;
  for (const float* coefficients : plan.combinations) {
    for (int input = 0; coefficients && input < row::INPUTS; ++input) plan.needs[input] |= coefficients[input] != 0.0f;
  }
  if (plan.needs[row::D]) {
    plan.needs[row::X] |= plan.row[row::PREDICTION] != 0.0f;
    plan.needs[row::M] |= plan.row[row::PREDICTION + 1] != 0.0f;
  }
  return plan;
}

const char* missing_input(const StepArgs& args, const Plan& plan) {
  if (plan.needs[row::ANCHOR] && !args.anchor) return "anchor";
  if (plan.needs[row::HIST1] && !args.hist1) return "hist1";
  if (plan.needs[row::HIST2] && !args.hist2) return "hist2";
  if (plan.needs[row::HIST3] && !args.hist3) return "hist3";
  if (plan.needs[row::NOISE] && !args.noise && !args.seeds) return "noise";
  return nullptr;
}

// out = sum of coefficient * input over TERMS inputs, in their order.
template <int TERMS>
void sum_terms(const float* const* inputs, const float* coefficients, float* __restrict out, int64_t count) {
  for (int64_t i = 0; i < count; ++i) {
    float total = coefficients[0] * inputs[0][i];
    for (int term = 1; term < TERMS; ++term) total += coefficients[term] * inputs[term][i];
    out[i] = total;
  }
}

// The same over the inputs whose coefficient is not zero; the others are not read.
void combine(const float* const* inputs, const float* coefficients, int size, float* out, int64_t count) {
  const float *terms[row::INPUTS], *const *used = terms;
  float factors[row::INPUTS];
  int number = 0;
  for (int input = 0; input < size; ++input) {
    if (coefficients[input] != 0.0f) {
      terms[number] = inputs[input];
      factors[number++] = coefficients[input];
    }
  }
  switch (number) {
    case 0:
      return std::fill(out, out + count, 0.0f);
    case 1:
      return sum_terms<1>(used, factors, out, count);
    case 2:
      return sum_terms<2>(used, factors, out, count);
    case 3:
      return sum_terms<3>(used, factors, out, count);
    case 4:
      return sum_terms<4>(used, factors, out, count);
    case 5:
      return sum_terms<5>(used, factors, out, count);
    case 6:
      return sum_terms<6>(used, factors, out, count);
    case 7:
      return sum_terms<7>(used, factors, out, count);
    default:
      return sum_terms<8>(used, factors, out, count);
  }
}

void guide(const float* from, const float* to, float guidance, float* __restrict out, int64_t count) {
  for (int64_t i = 0; i < count; ++i) out[i] = from[i] + guidance * (to[i] - from[i]);
}

void scale(const float* from, float factor, float* __restrict out, int64_t count) {
  for (int64_t i = 0; i < count; ++i) out[i] = factor * from[i];
}

// NaN stays NaN, as in torch.clamp.
void clamp(float* values, float limit, int64_t count) {
  for (int64_t i = 0; i < count; ++i) {
    const float capped = values[i] > limit ? limit : values[i];
    values[i] = capped < -limit ? -limit : capped;
  }
}

// Elements [begin, begin + count) of a sample of the model output, in the logical order.
const float* model_output(const StepArgs& args, int64_t sample, int64_t begin, int64_t count, float* buffer) {
  const int64_t inner = args.model_output_inner, offset = sample * args.count;
  if (inner == 1) return view(args.model_output, offset + begin, buffer, count);
  const int64_t spatial = args.count / inner;
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

void step_block(const StepArgs& args, const Plan& plan, int64_t sample, int64_t begin, int64_t count) {
  alignas(64) float x[BLOCK], m[BLOCK], conditional[BLOCK], guided[BLOCK], prediction[BLOCK];
  alignas(64) float noise[normals_room(BLOCK)], out[BLOCK], scaled[BLOCK];
  const int64_t offset = sample * args.count + begin;
  const float* inputs[row::INPUTS] = {};

  if (plan.needs[row::X]) inputs[row::X] = view(args.x, offset, x, count);
  if (plan.needs[row::M]) {
    inputs[row::M] = model_output(args, sample, begin, count, m);
    if (args.guided) {
      const float* to = model_output(args, args.samples + sample, begin, count, conditional);
      guide(inputs[row::M], to, plan.row[row::GUIDANCE], guided, count);
      inputs[row::M] = guided;
    }
  }
  if (plan.needs[row::D]) {
    combine(inputs, plan.row + row::PREDICTION, 2, prediction, count);
    if (plan.row[row::CLIP] < INFINITY) clamp(prediction, plan.row[row::CLIP], count);
    inputs[row::D] = prediction;
  }
  const Array* stored[] = {&args.anchor, &args.hist1, &args.hist2, &args.hist3};
  for (int i = 0; i < 4; ++i) {
    if (plan.needs[row::ANCHOR + i]) inputs[row::ANCHOR + i] = static_cast<const float*>(stored[i]->data) + offset;
  }
  if (plan.needs[row::NOISE]) {
    inputs[row::NOISE] =
        args.noise ? view(args.noise, offset, noise, count)
                   : draw(static_cast<uint64_t>(args.seeds[sample]), begin, count, plan.index, row::STREAM_STEP, noise);
  }

  const Array* outputs[] = {&args.new_x, &args.new_history, &args.new_anchor};
  for (int i = 2; i >= 0; --i) {  // x' last: the model input is made from it
    if (!plan.combinations[i]) continue;
    const bool direct = outputs[i]->type == Type::F32;
    float* target = direct ? static_cast<float*>(outputs[i]->data) + offset : out;
    combine(inputs, plan.combinations[i], row::INPUTS, target, count);
    if (!direct) store(out, *outputs[i], offset, count);
    if (i == 0 && args.model_input) {
      scale(target, plan.row[row::INPUT_SCALE], scaled, count);
      store(scaled, args.model_input, offset, count);
      if (args.guided) store(scaled, args.model_input, args.samples * args.count + offset, count);
    }
  }
}

}  // namespace

const char* sampler_step(const StepArgs& args) {
  const Plan plan = make_plan(args);
  if (const char* missing = missing_input(args, plan)) return missing;
  const int64_t blocks = (args.count + BLOCK - 1) / BLOCK, total = args.samples * args.count;
  const bool draws = plan.needs[row::NOISE] && !args.noise;
  const int threads = total < (draws ? PARALLEL_DRAWN : PARALLEL) ? 1 : args.threads;
  parallel_for(args.samples * blocks, threads, [&](int64_t task) {
    const int64_t sample = task / blocks, begin = task % blocks * BLOCK;
    step_block(args, plan, sample, begin, std::min(BLOCK, args.count - begin));
  });
  return nullptr;
}

}  // namespace fastdiff::cpu::CPU_CAPABILITY
