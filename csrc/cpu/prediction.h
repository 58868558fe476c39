// D = ax*x + am*m of a row, without clipping: what the kernels reduce that run before a sampler step. Everything is
// static or of this instruction set's namespace: see convert.h.
#pragma once

#include <algorithm>
#include <cstdint>

#include "cpu/convert.h"
#include "step_row.h"

namespace fastdiff::cpu::CPU_CAPABILITY {

constexpr int64_t PREDICTED = 1024;  // elements at a time: every intermediate stays in the first-level cache

static inline void guide(const float* first, float center, float weight, const float* other, float other_weight,
                         float* __restrict out, int64_t count) {
  for (int64_t i = 0; i < count; ++i) out[i] = weight * (first[i] - center) + other_weight * (other[i] - first[i]);
}

static inline void guide_more(const float* first, const float* other, float weight, float* __restrict out,
                              int64_t count) {
  for (int64_t i = 0; i < count; ++i) out[i] += weight * (other[i] - first[i]);
}

// m = weights[0] * (first - center) + sum of weights[k] * (output(k) - first); a weight of zero reads nothing.
template <class Output>
static inline void combine_groups(const float* weights, int64_t groups, const float* first, float center,
                                  const Output& output, float* __restrict m, int64_t count) {
  int64_t k = 1;
  if (weights[0] != 0.0f && groups > 1 && weights[1] != 0.0f) {
    guide(first, center, weights[0], output(k++), weights[1], m, count);
  } else {
    for (int64_t i = 0; i < count; ++i) m[i] = weights[0] != 0.0f ? weights[0] * (first[i] - center) : 0.0f;
  }
  for (; k < groups; ++k) {
    if (weights[k] != 0.0f) guide_more(first, output(k), weights[k], m, count);
  }
}

// Elements [begin, begin + count) of a channels-last sample, in the logical order.
static inline void gather(const Array& array, int64_t offset, int64_t inner, int64_t spatial, int64_t begin,
                          int64_t count, float* target) {
  int64_t channel = begin / spatial, position = begin % spatial;
  for (int64_t done = 0; done < count; ++channel, position = 0) {
    const int64_t run = std::min(count - done, spatial - position), at = offset + position * inner + channel;
    float* out = target + done;
    if (array.type == Type::F32) {
      const float* source = static_cast<const float*>(array.data) + at;
      for (int64_t i = 0; i < run; ++i) out[i] = source[i * inner];
    } else if (array.type == Type::F16) {
      const uint16_t* source = static_cast<const uint16_t*>(array.data) + at;
      for (int64_t i = 0; i < run; ++i) out[i] = from_float16(source[i * inner]);
    } else {
      const uint16_t* source = static_cast<const uint16_t*>(array.data) + at;
      for (int64_t i = 0; i < run; ++i) out[i] = from_bfloat16(source[i * inner]);
    }
    done += run;
  }
}

class Prediction {
 public:
  explicit Prediction(const PredictionArgs& args) : args_(args) {}

  // Of elements [begin, begin + count) of a sample, at most PREDICTED.
  void block(int64_t sample, int64_t begin, int64_t count, float* __restrict out) const {
    alignas(64) float x_buffer[PREDICTED], m_buffer[PREDICTED];
    const float ax = args_.row[row::PREDICTION], am = args_.row[row::PREDICTION + 1];
    const float* x = ax != 0.0f ? view(args_.x, sample * args_.count + begin, x_buffer, count) : nullptr;
    const float* m = am != 0.0f ? guided(sample, begin, count, m_buffer) : nullptr;
    if (x && m) {
      for (int64_t i = 0; i < count; ++i) out[i] = ax * x[i] + am * m[i];
    } else if (x || m) {
      const float factor = x ? ax : am, *values = x ? x : m;
      for (int64_t i = 0; i < count; ++i) out[i] = factor * values[i];
    } else {
      std::fill(out, out + count, 0.0f);
    }
  }

 private:
  const float* output(int64_t group, int64_t sample, int64_t begin, int64_t count, float* buffer) const {
    const int64_t offset = (group * args_.samples + sample) * args_.output_count, inner = args_.output_inner;
    if (inner == 1) return view(args_.model_output, offset + begin, buffer, count);
    gather(args_.model_output, offset, inner, args_.output_count / inner, begin, count, buffer);
    return buffer;
  }

  // m, in the buffer unless it is the model output itself.
  const float* guided(int64_t sample, int64_t begin, int64_t count, float* __restrict m) const {
    alignas(64) float first_buffer[PREDICTED], buffer[PREDICTED];
    const auto group = [&](int64_t k) { return output(k, sample, begin, count, buffer); };
    if (!args_.weights && args_.groups == 1) return output(0, sample, begin, count, m);
    const float* first = output(0, sample, begin, count, first_buffer);
    if (args_.weights) {
      combine_groups(args_.weights + sample * args_.groups, args_.groups, first, 0.0f, group, m, count);
    } else {
      guide(first, 0.0f, 1.0f, group(1), args_.row[row::GUIDANCE], m, count);
    }
    return m;
  }

  const PredictionArgs& args_;
};

}  // namespace fastdiff::cpu::CPU_CAPABILITY
