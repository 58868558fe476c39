// Mean and squared deviations of x + residual, by parts that do not depend on the number of threads. Sums are taken of
// the distance to a value near the part's mean, and parts are merged by Chan, Golub and LeVeque's formula ("Updating
// formulae and a pairwise algorithm for computing sample variances", 1979), so that large means cancel nothing.
#pragma once

#include "cpu/group_norm_simd.h"
#include "cpu/scratch.h"

namespace fastdiff::cpu::CPU_CAPABILITY {

struct Moments {
  double count = 0.0, mean = 0.0, squares = 0.0;  // squares: the sum of squared distances to the mean

  void merge(const Moments& other) {
    const double both = count + other.count, distance = other.mean - mean;
    if (other.count == 0.0) return;
    mean += distance * (other.count / both);
    squares += other.squares + distance * distance * (count * other.count / both);
    count = both;
  }
};

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
};

// Of `count` consecutive elements from `offset` on.
template <class T, bool PLAIN>
static Moments run_moments(const Source<T, PLAIN>& source, int64_t offset, int64_t count) {
  const int64_t head = count < 4 * BLOCK ? count : 4 * BLOCK;
  Block sum{}, squares{};
  for_blocks(
      head, false, [&](int64_t i, auto width) __attribute__((always_inline)) {
        const Block h = source.at(offset + i, width);
        sum.first += h.first;
        sum.second += h.second;
      });
  const float near = total(sum.first + sum.second) / static_cast<float>(head);
  sum = Block{};
  for_blocks(
      count, false, [&](int64_t i, auto width) __attribute__((always_inline)) {
        const Block h = source.at(offset + i, width);
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
  float *near, *sum, *squares;  // sums of the distances to `near` and of their squares
  int64_t rows;
};

// Adds ROWS rows to the sums; with FIRST it sets `near` to their mean instead.
template <int ROWS, bool FIRST, class T, bool PLAIN>
static inline void add_rows(const Source<T, PLAIN>& source, int64_t offset, int64_t channels,
                            const ChannelMoments& into) {
  for_blocks(
      channels, false, [&](int64_t c, auto width) __attribute__((always_inline)) {
        Block near{}, sum{}, squares{};
        if (!FIRST) {
          near = load(into.near + c, Whole{});
          sum = load(into.sum + c, Whole{});
          squares = load(into.squares + c, Whole{});
        }
        for (int row = 0; row < ROWS; ++row) {
          const Block h = source.at(offset + row * channels + c, width);
          const Block d = {h.first - near.first, h.second - near.second};
          sum.first += d.first;
          sum.second += d.second;
          squares.first += d.first * d.first;
          squares.second += d.second * d.second;
        }
        if (FIRST) {
          constexpr float SHARE = 1.0f / ROWS;
          store({sum.first * SHARE, sum.second * SHARE}, into.near + c, Whole{});
          sum = squares = Block{};
        }
        store(sum, into.sum + c, Whole{});
        store(squares, into.squares + c, Whole{});
      });
}

// Of the rows from `offset` on. Afterwards `squares` is about the rows' own mean, near + sum / rows.
template <class T, bool PLAIN>
static void row_moments(const Source<T, PLAIN>& source, int64_t offset, int64_t channels, const ChannelMoments& into) {
  constexpr int TOGETHER = 8;
  int64_t row = 0;
  if (into.rows >= TOGETHER) {
    add_rows<TOGETHER, true>(source, offset, channels, into);
    for (; row + TOGETHER <= into.rows; row += TOGETHER) {
      add_rows<TOGETHER, false>(source, offset + row * channels, channels, into);
    }
  } else {
    add_rows<1, true>(source, offset, channels, into);
  }
  for (; row < into.rows; ++row) {
    add_rows<1, false>(source, offset + row * channels, channels, into);
  }
  const float n = static_cast<float>(into.rows);
  for (int64_t c = 0; c < ceil_divide(channels, BLOCK) * BLOCK; c += LANES) {
    const Floats sum = read(into.sum + c), squares = read(into.squares + c) - sum * sum / n;
    write(squares > 0.0f ? squares : Floats{}, into.squares + c);
  }
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
