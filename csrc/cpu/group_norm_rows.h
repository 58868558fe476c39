// Channels-last tensors: rows of channels. The moments of each channel over parts of the rows are merged over the parts
// and then over the group.
#pragma once

#include "cpu/group_norm_apply.h"
#include "cpu/parallel.h"
#include "cpu/scratch.h"

namespace fastdiff::cpu::CPU_CAPABILITY {

constexpr int64_t PART_SIZE = 65536;  // elements of a part of a sample at most, about
constexpr int64_t MIN_PART = 8192;    // and at least, where the sample has more; it is in eight parts then
constexpr int64_t MAX_PARTS = 64;     // of a sample

template <class T, bool SILU, bool PLAIN>
class Rows {
 public:
  explicit Rows(const GroupNormArgs& args)
      : args_(args),
        inputs_(args),
        outputs_(args),
        second_place_(ceil_divide(inputs_.x_channels, BLOCK) * BLOCK),
        stride_(second_place_ + ceil_divide(inputs_.second_channels, BLOCK) * BLOCK),
        part_rows_(larger(ceil_divide(part_size(args.channels * args.spatial), args.channels),
                          ceil_divide(args.spatial, MAX_PARTS))),
        parts_(ceil_divide(args.spatial, part_rows_)),
        tables_(args.samples * (3 * parts_ + 4) * stride_),
        moments_(args.samples * parts_),
        means_(args.samples * args.channels) {}

  // The second pass goes backwards through a thread's parts: the last ones are still in its cache. Slabs of a few
  // channels, which would stay there whole, were 1.7 times slower at 2x640x32x32.
  void run() const {
    const int64_t all_parts = args_.samples * parts_, vectors = stride_ / LANES;
    parallel_stages(args_.threads, [&](int64_t thread, int64_t team, auto wait) {
      const auto begin = [&](int64_t tasks) { return tasks * thread / team; };
      const auto end = [&](int64_t tasks) { return tasks * (thread + 1) / team; };
      for (int64_t i = begin(all_parts); i < end(all_parts); ++i) take_moments(i);
      wait();
      const int64_t merges = args_.samples * vectors, groups = args_.samples * args_.groups;
      for (int64_t i = begin(merges); i < end(merges); ++i) merge_parts(i / vectors, i % vectors);
      wait();
      for (int64_t i = begin(groups); i < end(groups); ++i) finish_group(i / args_.groups, i % args_.groups);
      wait();
      for (int64_t i = end(all_parts) - 1; i >= begin(all_parts); --i) apply(i);
    });
  }

 private:
  static int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }

  static int64_t part_size(int64_t sample) { return smaller(larger(sample / 8, MIN_PART), PART_SIZE); }

  // Parts and rows are counted over all samples.
  int64_t first_row(int64_t part) const { return part / parts_ * args_.spatial + part % parts_ * part_rows_; }

  int64_t rows_of(int64_t part) const { return smaller(part_rows_, args_.spatial - part % parts_ * part_rows_); }

  // Where a channel stands in the tables; each input's begin a block.
  int64_t place(int64_t channel) const {
    const int64_t of_second = channel - inputs_.x_channels;
    return of_second < 0 ? slot<T>(channel) : second_place_ + slot<T>(of_second);
  }

  float* moments_table(int64_t part) const { return tables_.data() + 3 * part * stride_; }

  PerChannel coefficients(int64_t sample) const {
    return {tables_.data() + (3 * args_.samples * parts_ + 4 * sample) * stride_, stride_};
  }

  void take_moments(int64_t part) const {
    float* table = moments_table(part);
    moments_[part] = {table, table + stride_, table + 2 * stride_, rows_of(part)};
    const int64_t row = first_row(part), of_x = inputs_.x_channels, of_second = inputs_.second_channels;
    row_moments(inputs_.x.moved(row * of_x), of_x, moments_[part]);
    if (of_second == 0) return;
    table += second_place_;
    const ChannelMoments into = {table, table + stride_, table + 2 * stride_, rows_of(part)};
    row_moments(inputs_.second.moved(row * of_second), of_second, into);
  }

  // Leaves a channel's sums in those of the sample's first part.
  void merge_parts(int64_t sample, int64_t vector) const {
    const ChannelMoments* parts = moments_.data() + sample * parts_;
    const int64_t c = vector * LANES;
    const MergedChannels merged = merge_rows(parts, parts_, c);
    write(merged.distance, parts->sum + c);
    write(merged.squares, parts->squares + c);
    // For the padding: what lies there by chance may be subnormal, which is slow to compute with.
    for (int64_t i = 0; i < 4; ++i) write(Floats{}, coefficients(sample).table + i * stride_ + c);
  }

  void finish_group(int64_t sample, int64_t group) const {
    const int64_t size = args_.channels / args_.groups, begin = group * size;
    const ChannelMoments& merged = moments_[sample * parts_];
    const double rows = static_cast<double>(args_.spatial);
    double* const means = means_.data() + sample * args_.channels;
    const double share = 1.0 / static_cast<double>(size);
    Moments whole{rows * static_cast<double>(size), 0.0, 0.0};
    for (int64_t c = begin; c < begin + size; ++c) {
      const int64_t at = place(c);
      const double addend = parameter(args_.addend, sample * args_.channels + c, 0.0);
      means[c] = static_cast<double>(merged.near[at]) + merged.sum[at] + addend;
      whole.mean += means[c] * share;
    }
    for (int64_t c = begin; c < begin + size; ++c) {
      const double distance = means[c] - whole.mean;
      whole.squares += merged.squares[place(c)] + rows * distance * distance;
    }
    const double inverse = inverse_deviation(args_, whole);
    for (int64_t c = begin; c < begin + size; ++c) {
      coefficients(sample).set(place(c), affine(args_, whole.mean, inverse, sample, c));
    }
  }

  void apply(int64_t part) const {
    const PerChannel k = coefficients(part / parts_), of_second_k = k.moved(second_place_);
    const int64_t of_x = inputs_.x_channels, of_second = inputs_.second_channels;
    const int64_t first = first_row(part), count = rows_of(part);
    if (of_second == 0) {
      const bool downwards = outputs_.downwards(inputs_.x, 0);
      for (int64_t i = 0; i < count; ++i) {
        const int64_t row = first + (downwards ? count - 1 - i : i);
        outputs_.apply(inputs_.x.moved(row * of_x), row * of_x, of_x, k);
      }
      return;
    }
    for (int64_t row = first; row < first + count; ++row) {
      const int64_t to = row * args_.channels;
      // Two inputs in turn are no stream that the hardware follows: each asks for its next row.
      outputs_.template apply<true>(inputs_.x.moved(row * of_x), to, of_x, k, of_x);
      outputs_.template apply<true>(inputs_.second.moved(row * of_second), to + of_x, of_second, of_second_k, of_second);
    }
  }

  const GroupNormArgs& args_;
  const Inputs<T, PLAIN> inputs_;
  const Outputs<T, SILU, PLAIN> outputs_;
  const int64_t second_place_, stride_, part_rows_, parts_;
  const Scratch<float> tables_;
  const Scratch<ChannelMoments> moments_;
  const Scratch<double> means_;
};

}  // namespace fastdiff::cpu::CPU_CAPABILITY
