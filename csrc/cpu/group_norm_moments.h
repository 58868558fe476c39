// Mean and squared deviations of the inputs, by parts that do not depend on the number of threads.
#pragma once

#include "cpu/moments.h"
#include "cpu/scratch.h"
#include "ops.h"

namespace fastdiff::cpu::CPU_CAPABILITY {

// x + residual, where there is one.
template <class T, bool PLAIN>
struct Source {
  const T* x;
  const T* residual;

  template <class Width>
  inline __attribute__((always_inline)) Block at(int64_t offset, Width width) const {
    Block h = load(x + offset, width);
    if (!PLAIN && residual) {
      const Block r = load(residual + offset, width);
      h.first += r.first;
      h.second += r.second;
    }
    return h;
  }

  inline __attribute__((always_inline)) Source moved(int64_t offset) const {
    return {x + offset, residual ? residual + offset : nullptr};
  }
};

// A sample's channels: those of x, then those of the second input, of which there may be none.
template <class T, bool PLAIN>
struct Inputs {
  Source<T, PLAIN> x, second;
  int64_t x_channels, second_channels;

  explicit Inputs(const GroupNormArgs& args)
      : x{static_cast<const T*>(args.x.data), static_cast<const T*>(args.residual.data)},
        second{static_cast<const T*>(args.second.data), nullptr},
        x_channels(args.x_channels),
        second_channels(args.channels - args.x_channels) {}
};

// Of the first `count` elements.
template <class T, bool PLAIN>
static Moments run_moments(const Source<T, PLAIN>& source, int64_t count) {
  const int64_t head = count < 4 * BLOCK ? count : 4 * BLOCK;
  Block sum{}, squares{};
  for_blocks(
      head, false, [&](int64_t i, auto width) __attribute__((always_inline)) {
        const Block h = source.at(i, width);
        sum.first += h.first;
        sum.second += h.second;
      });
  const float near = total(sum.first + sum.second) / static_cast<float>(head);
  sum = Block{};
  for_blocks(
      count, false, [&](int64_t i, auto width) __attribute__((always_inline)) {
        const Block h = source.at(i, width);
        const Block d = kept<T>({h.first - near, h.second - near}, width);
        sum.first += d.first;
        sum.second += d.second;
        squares.first += d.first * d.first;
        squares.second += d.second * d.second;
      });
  const double n = static_cast<double>(count), s = total(sum.first + sum.second);
  const double q = total(squares.first + squares.second) - s * s / n;
  return {n, near + s / n, q > 0.0 ? q : 0.0};
}

// Of each channel over some rows of a channels-last sample, in the order of slot<T>.
struct ChannelMoments {
  float *near, *sum, *squares;  // the sum of the distances to `near`, and squared distances to the rows' own mean
  int64_t rows;
};

// BLOCKS blocks of channels side by side, whose sums stay in registers over all rows.
template <int BLOCKS, class T, bool PLAIN, class Width>
static inline void strip_moments(const Source<T, PLAIN>& source, int64_t channels, const ChannelMoments& into,
                                 int64_t first, Width width) {
  constexpr int64_t HEAD = 8, AHEAD = 8;  // rows that give `near`; rows between a prefetch and its use
  const int64_t head = smaller(into.rows, HEAD);
  Block near[BLOCKS] = {}, sum[BLOCKS] = {}, squares[BLOCKS] = {};
  for (int64_t row = 0; row < head; ++row) {
    for (int b = 0; b < BLOCKS; ++b) {
      const Block h = source.at(row * channels + first + b * BLOCK, width);
      near[b].first += h.first;
      near[b].second += h.second;
    }
  }
  for (int b = 0; b < BLOCKS; ++b) {
    near[b].first /= static_cast<float>(head);
    near[b].second /= static_cast<float>(head);
  }
  for (int64_t row = 0; row < into.rows; ++row) {
    const int64_t at = row * channels + first;
    // The hardware follows no rows as short as a strip. Past the last row lies the next strip.
    const int64_t ahead = row + AHEAD < into.rows ? AHEAD * channels : (AHEAD - into.rows) * channels + BLOCKS * BLOCK;
    prefetch<3>(source.x + at + ahead, BLOCKS * BLOCK);
    for (int b = 0; b < BLOCKS; ++b) {
      const Block h = source.at(at + b * BLOCK, width);
      const Block d = {h.first - near[b].first, h.second - near[b].second};
      sum[b].first += d.first;
      sum[b].second += d.second;
      squares[b].first += d.first * d.first;
      squares[b].second += d.second * d.second;
    }
  }
  const float n = static_cast<float>(into.rows);
  for (int b = 0; b < BLOCKS; ++b) {
    const Block q = {squares[b].first - sum[b].first * sum[b].first / n,
                     squares[b].second - sum[b].second * sum[b].second / n};
    const int64_t c = first + b * BLOCK;
    store(near[b], into.near + c, Whole{});
    store(sum[b], into.sum + c, Whole{});
    store({q.first > 0.0f ? q.first : Floats{}, q.second > 0.0f ? q.second : Floats{}}, into.squares + c, Whole{});
  }
}

// Of the first rows, of `channels` elements each.
template <class T, bool PLAIN>
static void row_moments(const Source<T, PLAIN>& source, int64_t channels, const ChannelMoments& into) {
  constexpr int WIDE = LANES == 16 ? 4 : 2;  // 6 registers a block
  const int64_t whole = channels / BLOCK * BLOCK;
  int64_t c = 0;
  for (; c + WIDE * BLOCK <= whole; c += WIDE * BLOCK) {
    strip_moments<WIDE>(source, channels, into, c, Whole{});
  }
  for (; c < whole; c += BLOCK) strip_moments<1>(source, channels, into, c, Whole{});
  if (c < channels) strip_moments<1>(source, channels, into, c, Part{channels - c});
}

// The parts of one sample merged, for LANES channels: mean = near[0] + distance.
struct MergedChannels {
  Floats distance, squares;
};

static inline MergedChannels merge_rows(const ChannelMoments* parts, int64_t count, int64_t channel) {
  const Floats near = read(parts[0].near + channel);
  Floats distance{}, squares{};
  float rows = 0.0f;
  for (int64_t part = 0; part < count; ++part) {
    const float n = static_cast<float>(parts[part].rows);
    const Floats d = read(parts[part].near + channel) - near + read(parts[part].sum + channel) / n - distance;
    const float weight = n / (rows + n);
    distance += d * weight;
    squares += read(parts[part].squares + channel) + d * d * (rows * weight);
    rows += n;
  }
  return {distance, squares};
}

}  // namespace fastdiff::cpu::CPU_CAPABILITY
