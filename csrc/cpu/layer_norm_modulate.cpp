// y = ((h - mean) / sqrt(var + eps) * weight + bias) * (1 + scale) + shift with h = x + gate * residual, a row at a
// time: h stays in the first-level cache between the passes that take its moments and apply them.
#include <cmath>
#include <cstring>

#include "cpu/group_norm_simd.h"
#include "cpu/parallel.h"
#include "cpu/scratch.h"
#include "ops.h"

namespace fastdiff::cpu::CPU_CAPABILITY {

constexpr int64_t SERIAL = 16384;  // a tensor of so few elements is not worth waking a thread

// A sample's (C) factors and offsets of the normalised values, and its gates; in the order of slot<T>.
struct Modulation {
  float *factor, *offset, *gate;
};

// In a tree: `total` would wait for each of its additions, three times in a row of few channels.
static inline float sum_of(const Block& block) {
  typedef float Quad __attribute__((vector_size(16)));
  const Floats both = block.first + block.second;
  Quad parts[LANES / 4];
  memcpy(parts, &both, sizeof parts);
  for (int64_t width = LANES / 8; width > 0; width /= 2) {
    for (int64_t i = 0; i < width; ++i) parts[i] += parts[i + width];
  }
  return (parts[0][0] + parts[0][1]) + (parts[0][2] + parts[0][3]);
}

template <class T>
class Rows {
 public:
  explicit Rows(const LayerNormArgs& args)
      : args_(args),
        stride_(ceil_divide(args.channels, BLOCK) * BLOCK),
        own_tables_(args.scale || args.shift || args.gate ? args.samples : 1),
        tables_(own_tables_ * 3 * stride_),
        buffers_(args.threads * stride_) {}

  void run() const {
    const int64_t rows = args_.samples * args_.positions;
    parallel_stages(args_.threads, [&](int64_t thread, int64_t team, auto wait) {
      for (int64_t i = own_tables_ * thread / team; i < own_tables_ * (thread + 1) / team; ++i) fill(i);
      wait();
      float* buffer = buffers_.data() + thread * stride_;
      for (int64_t row = rows * thread / team; row < rows * (thread + 1) / team; ++row) normalise(row, buffer);
    });
  }

 private:
  Modulation table(int64_t sample) const {
    float* at = tables_.data() + (own_tables_ > 1 ? sample : 0) * 3 * stride_;
    return {at, at + stride_, at + 2 * stride_};
  }

  void fill(int64_t sample) const {
    const Modulation to = table(sample);
    // The padding is read with its block.
    for (int64_t i = 0; i < 3 * stride_; ++i) to.factor[i] = 0.0f;
    for (int64_t c = 0; c < args_.channels; ++c) {
      const float modulation = args_.scale ? 1.0f + load_one(args_.scale, sample * args_.scale_stride + c) : 1.0f;
      const float shift = args_.shift ? load_one(args_.shift, sample * args_.shift_stride + c) : 0.0f;
      const float weight = args_.weight ? load_one(args_.weight, c) : 1.0f;
      const float bias = args_.bias ? load_one(args_.bias, c) : 0.0f;
      to.factor[slot<T>(c)] = weight * modulation;
      to.offset[slot<T>(c)] = bias * modulation + shift;
      if (args_.gate) to.gate[slot<T>(c)] = load_one(args_.gate, sample * args_.gate_stride + c);
    }
  }

  // h of a row, in the order of slot<T> with zeros behind it, and the sum of its elements.
  float take(int64_t row, const float* gate, float* h) const {
    const T* x = static_cast<const T*>(args_.x.data) + row * args_.channels;
    const T* residual = static_cast<const T*>(args_.residual.data);
    if (residual) residual += row * args_.channels;
    T* sum = static_cast<T*>(args_.sum.data);
    if (sum) sum += row * args_.channels;
    Block sums{};
    for_blocks(
        args_.channels, false, [&](int64_t i, auto width) __attribute__((always_inline)) {
          Block v = load(x + i, width);
          if (residual) {
            const Block r = load(residual + i, width);
            if (gate) {
              v.first += read(gate + i) * r.first;
              v.second += read(gate + i + LANES) * r.second;
            } else {
              v.first += r.first;
              v.second += r.second;
            }
          }
          store(v, h + i, Whole{});
          if (sum) store(v, sum + i, width);
          sums.first += v.first;
          sums.second += v.second;
        });
    return sum_of(sums);
  }

  void normalise(int64_t row, float* h) const {
    const Modulation m = table(row / args_.positions);
    const float n = static_cast<float>(args_.channels), near = take(row, args_.gate ? m.gate : nullptr, h) / n;
    Block sum{}, squares{};
    for_blocks(
        args_.channels, false, [&](int64_t i, auto width) __attribute__((always_inline)) {
          const Block v = load(h + i, Whole{});
          const Block d = kept<T>({v.first - near, v.second - near}, width);
          sum.first += d.first;
          sum.second += d.second;
          squares.first += d.first * d.first;
          squares.second += d.second * d.second;
        });
    // `near` is the mean up to rounding, which `rest` makes up for.
    const float rest = sum_of(sum) / n;
    const double variance = static_cast<double>(sum_of(squares)) / n - static_cast<double>(rest) * rest;
    const float inverse = static_cast<float>(1.0 / std::sqrt((variance > 0.0 ? variance : 0.0) + args_.eps));
    T* y = static_cast<T*>(args_.y.data) + row * args_.channels;
    for_blocks(
        args_.channels, false, [&](int64_t i, auto width) __attribute__((always_inline)) {
          const Block v = load(h + i, Whole{});
          const Floats first = (v.first - near - rest) * inverse, second = (v.second - near - rest) * inverse;
          store({first * read(m.factor + i) + read(m.offset + i),
                 second * read(m.factor + i + LANES) + read(m.offset + i + LANES)},
                y + i, width);
        });
  }

  const LayerNormArgs& args_;
  const int64_t stride_, own_tables_;
  const Scratch<float> tables_, buffers_;
};

void layer_norm_modulate(const LayerNormArgs& given) {
  LayerNormArgs args = given;
  if (args.samples * args.positions * args.channels <= SERIAL) args.threads = 1;
  if (args.x.type == Type::F32) {
    Rows<float>(args).run();
  } else if (args.x.type == Type::F16) {
    Rows<Half>(args).run();
  } else {
    Rows<Brain>(args).run();
  }
}

}  // namespace fastdiff::cpu::CPU_CAPABILITY
