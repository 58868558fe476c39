// The second pass: y = act((h - center) * scale + shift) with h the input less its addend, and the sum of both where it
// is asked for.
#pragma once

#include <cmath>

#include "cpu/group_norm_moments.h"

namespace fastdiff::cpu::CPU_CAPABILITY {

// Of one channel. For SiLU, scale and shift give the exponent: -log2(e) times the normalised value. center is the mean
// less the addend as float32; what that rounding leaves is in shift, so that a large mean costs no digits.
struct Affine {
  float center, scale, shift, addend;
};

static inline double parameter(const Array& array, int64_t i, double missing) {
  return array ? load_one(array, i) : missing;
}

// A NaN among the parameters may have any bits; this one survives rounding to bfloat16.
static inline float to_float(double value) { return value != value ? NAN : static_cast<float>(value); }

static inline double inverse_deviation(const GroupNormArgs& args, const Moments& group) {
  return 1.0 / std::sqrt(group.squares / group.count + args.eps);
}

static inline Affine affine(const GroupNormArgs& args, double mean, double inverse, int64_t sample, int64_t channel) {
  const double addend = parameter(args.addend, sample * args.channels + channel, 0.0);
  const double center = static_cast<float>(mean - addend);
  const double factor = args.silu ? -static_cast<double>(LOG2_E) : 1.0;
  const double scale = inverse * parameter(args.weight, channel, 1.0);
  const double shift = parameter(args.bias, channel, 0.0) - (mean - addend - center) * scale;
  return {to_float(center), to_float(scale * factor), to_float(shift * factor), to_float(addend)};
}

// The same coefficients for every element of a run.
struct Uniform {
  Floats centers, scales, shifts, addends;

  explicit Uniform(const Affine& a)
      : centers(all(a.center)), scales(all(a.scale)), shifts(all(a.shift)), addends(all(a.addend)) {}
  Floats center(int64_t) const { return centers; }
  Floats scale(int64_t) const { return scales; }
  Floats shift(int64_t) const { return shifts; }
  Floats addend(int64_t) const { return addends; }
};

// Coefficients for each channel of a row, in the order of slot<T>.
struct PerChannel {
  float* table;
  int64_t stride;

  Floats center(int64_t i) const { return read(table + i); }
  Floats scale(int64_t i) const { return read(table + stride + i); }
  Floats shift(int64_t i) const { return read(table + 2 * stride + i); }
  Floats addend(int64_t i) const { return read(table + 3 * stride + i); }
  void set(int64_t i, const Affine& a) const {
    table[i] = a.center;
    table[stride + i] = a.scale;
    table[2 * stride + i] = a.shift;
    table[3 * stride + i] = a.addend;
  }
  PerChannel moved(int64_t offset) const { return {table + offset, stride}; }
};

template <bool SILU, bool ROUNDED, class Coefficients>
static inline __attribute__((always_inline)) Floats activated(Floats h, const Coefficients& k, int64_t i) {
  const Floats u = (h - k.center(i)) * k.scale(i) + k.shift(i);
  if constexpr (SILU) return silu_of_exponent<ROUNDED>(u);
  return u;
}

// PLAIN: there is neither a residual nor a sum to write.
template <class T, bool SILU, bool PLAIN>
struct Outputs {
  T* y;
  T* sum;

  explicit Outputs(const GroupNormArgs& args) : y(static_cast<T*>(args.y.data)), sum(static_cast<T*>(args.sum.data)) {}

  // A load waits for any earlier store to an address that is equal in its low 12 bits. With y a little ahead of x in
  // that sense, as consecutive allocations of whole pages lie, every load would (2.6 times slower, measured), but for
  // going through memory downwards.
  inline bool downwards(const Source<T, PLAIN>& source, int64_t offset) const {
    return (reinterpret_cast<uintptr_t>(y + offset) - reinterpret_cast<uintptr_t>(source.x)) % 4096 - 1 < 2047;
  }

  // From the first `count` elements of the source to those at `offset`. `ahead` elements further lies what will be read
  // later and is fetched meanwhile. STRAY: the distance of y to the source changes from call to call, so that no
  // direction is free of such waits. They end with the store, which is sooner when its line of y is in the cache (3
  // times faster at 640 + 320 channels of float32, measured).
  template <bool STRAY = false, class Coefficients>
  inline void apply(const Source<T, PLAIN>& source, int64_t offset, int64_t count, const Coefficients& coefficients,
                    int64_t ahead = 0) const {
    constexpr bool ROUNDED = sizeof(T) == 2;
    const Coefficients k = coefficients;  // copies, since what is stored below could alias the originals
    const Source<T, PLAIN> from = source;
    T* const to = y + offset;
    T* const total = sum ? sum + offset : nullptr;
    for_blocks(
        count, !STRAY && downwards(from, offset), [&](int64_t i, auto width) __attribute__((always_inline)) {
          if (ahead) prefetch<2>(from.x + i + ahead, BLOCK);
          if (STRAY) prefetch_written(to + i + 2048 / sizeof(T), BLOCK);
          const Block h = from.at(i, width);
          store({activated<SILU, ROUNDED>(h.first, k, i), activated<SILU, ROUNDED>(h.second, k, i + LANES)}, to + i,
                width);
          if (!PLAIN && total) store({h.first + k.addend(i), h.second + k.addend(i + LANES)}, total + i, width);
        });
  }
};

}  // namespace fastdiff::cpu::CPU_CAPABILITY
