// Contiguous tensors: a group is one run of memory, or two where it has channels of both inputs; a channel is a run
// inside it.
#pragma once

#include "cpu/group_norm_apply.h"
#include "cpu/parallel.h"
#include "cpu/scratch.h"

namespace fastdiff::cpu::CPU_CAPABILITY {

constexpr int64_t RUN = 8192;  // elements of a part of a group

template <class T, bool SILU, bool PLAIN>
class Contiguous {
 public:
  explicit Contiguous(const GroupNormArgs& args)
      : args_(args),
        inputs_(args),
        outputs_(args),
        groups_(args.samples * args.groups),
        in_group_(args.channels / args.groups),
        segments_(args.addend ? in_group_ : 1),
        segment_size_(in_group_ * args.spatial / segments_),
        pieces_(ceil_divide(segment_size_, RUN)),
        parts_(segments_ * pieces_) {}

  void run() const {
    if (args_.threads == 1 || groups_ >= 4 * args_.threads) {
      run_by_groups();
    } else {
      run_by_parts();
    }
  }

 private:
  // Each group by one thread, once from memory and then from the cache.
  void run_by_groups() const {
    parallel_for(groups_, args_.threads, [&](int64_t group) {
      Moments moments;
      for (int64_t part = 0; part < parts_; ++part) moments.merge(part_moments(group, part));
      const int64_t next = in_group_ * args_.spatial;
      for (int64_t c = in_group_ - 1; c >= 0; --c) apply(group, moments, c, 0, args_.spatial, next);
    });
  }

  // Too few groups to share out: the same sums in the same order, the parts on all threads.
  void run_by_parts() const {
    const Scratch<Moments> part(groups_ * parts_), whole(groups_);
    parallel_for(groups_ * parts_, args_.threads, [&](int64_t i) { part[i] = part_moments(i / parts_, i % parts_); });
    for (int64_t group = 0; group < groups_; ++group) {
      whole[group] = Moments{};
      for (int64_t i = 0; i < parts_; ++i) whole[group].merge(part[group * parts_ + i]);
    }
    const int64_t pieces = ceil_divide(args_.spatial, RUN);
    parallel_for(groups_ * in_group_ * pieces, args_.threads, [&](int64_t i) {
      const int64_t group = i / pieces / in_group_, begin = i % pieces * RUN;
      apply(group, whole[group], i / pieces % in_group_, begin, smaller(RUN, args_.spatial - begin));
    });
  }

  // A segment is a group, or one of its channels if each has an addend: no part has elements of two segments.
  Moments part_moments(int64_t group, int64_t part) const {
    const int64_t segment = group * segments_ + part / pieces_, begin = part % pieces_ * RUN;
    const int64_t count = smaller(RUN, segment_size_ - begin), element = segment * segment_size_ + begin;
    const int64_t sample_size = args_.channels * args_.spatial, sample = element / sample_size;
    const int64_t left = inputs_.x_channels * args_.spatial - element % sample_size;  // until the second input
    Moments moments;
    if (left > 0) moments = run_moments(source(sample, element % sample_size), smaller(left, count));
    if (left < count) {
      const int64_t of_x = left > 0 ? left : 0;
      moments.merge(run_moments(source(sample, element % sample_size + of_x), count - of_x));
    }
    if (args_.addend) moments.mean += load_one(args_.addend, segment);
    return moments;
  }

  // From an element of a sample on.
  Source<T, PLAIN> source(int64_t sample, int64_t element) const {
    const int64_t x_size = inputs_.x_channels * args_.spatial, second_size = inputs_.second_channels * args_.spatial;
    return element < x_size ? inputs_.x.moved(sample * x_size + element)
                            : inputs_.second.moved(sample * second_size + element - x_size);
  }

  void apply(int64_t group, const Moments& moments, int64_t channel, int64_t begin, int64_t count,
             int64_t ahead = 0) const {
    const int64_t run = group * in_group_ + channel;
    const double inverse = inverse_deviation(args_, moments);
    const int64_t sample = run / args_.channels, of_sample = run % args_.channels;
    const Affine a = affine(args_, moments.mean, inverse, sample, of_sample);
    const Source<T, PLAIN> from = source(sample, of_sample * args_.spatial + begin);
    outputs_.apply(from, run * args_.spatial + begin, count, Uniform(a), ahead);
  }

  const GroupNormArgs& args_;
  const Inputs<T, PLAIN> inputs_;
  const Outputs<T, SILU, PLAIN> outputs_;
  const int64_t groups_, in_group_, segments_, segment_size_, pieces_, parts_;
};

}  // namespace fastdiff::cpu::CPU_CAPABILITY
