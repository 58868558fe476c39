// The weights of the guided output, each sample's own: inner products of the groups' distances to the first one in a
// first pass, the deviations of out_1 and m in a second, which finds the data in the cache where they fit. Floor: the
// model output read once, 1 MB at 2x4x128x128 float32 with two groups, 10 us on two cores of a 2.6 GHz EPYC. Parts do
// not depend on the number of threads, and nor do the bits.
#include <cmath>

#include "moments.h"
#include "ops.h"
#include "parallel.h"
#include "prediction.h"
#include "scratch.h"

namespace fastdiff::cpu::CPU_CAPABILITY {

namespace {

constexpr int64_t BLOCK_SIZE = 1024;      // elements at a time: they stay in the first-level cache
constexpr int64_t PART = 8 * BLOCK_SIZE;  // elements of a task
constexpr int64_t PARALLEL = 32768;       // elements below which threads cost more than they give

class GuidanceWeights {
 public:
  explicit GuidanceWeights(const WeightsArgs& args)
      : args_(args),
        parts_(ceil_divide(args.count, PART)),
        projects_(args.perpendicular && args.groups > 2),
        rescales_(args.rescale != 0.0),
        weights_(args.samples * args.groups),
        products_(projects_ ? args.samples * parts_ * args.groups : 1),
        moments_(rescales_ ? 2 * args.samples * parts_ : 1) {}

  void run() {
    const bool reads = projects_ || rescales_;
    const int threads = reads && args_.samples * args_.count >= PARALLEL ? args_.threads : 1;
    const int64_t tasks = args_.samples * parts_;
    parallel_stages(threads, [&](int64_t thread, int64_t team, auto wait) {
      if (projects_) {
        for (int64_t task = thread; task < tasks; task += team) project(task);
        wait();
      }
      for (int64_t sample = thread; sample < args_.samples; sample += team) adjust(sample);
      wait();
      if (rescales_) {
        for (int64_t task = thread; task < tasks; task += team) measure(task);
        wait();
      }
      for (int64_t sample = thread; sample < args_.samples; sample += team) finish(sample);
    });
  }

 private:
  // Those of a group's elements that count, [begin, begin + count), in the order in which they lie.
  const float* output(int64_t group, int64_t sample, int64_t begin, int64_t count, float* buffer) const {
    const int64_t offset = (group * args_.samples + sample) * args_.output_count;
    if (args_.channels == args_.inner) return view(args_.model_output, offset + begin, buffer, count);
    int64_t position = begin / args_.channels, channel = begin % args_.channels;
    for (int64_t done = 0; done < count; ++position, channel = 0) {
      const int64_t run = smaller(count - done, args_.channels - channel);
      load(args_.model_output, offset + position * args_.inner + channel, buffer + done, run);
      done += run;
    }
    return buffer;
  }

  // body(begin, count) for each block of a part.
  template <class Body>
  void for_part(int64_t task, const Body& body) const {
    const int64_t part = task % parts_ * PART, end = smaller(part + PART, args_.count);
    for (int64_t begin = part; begin < end; begin += BLOCK_SIZE) body(begin, smaller(BLOCK_SIZE, end - begin));
  }

  // <d_k, d_1> for each k.
  void project(int64_t task) {
    const int64_t sample = task / parts_;
    double* products = products_.data() + task * args_.groups;
    for (int64_t k = 1; k < args_.groups; ++k) products[k] = 0.0;
    alignas(64) float first_buffer[BLOCK_SIZE], buffer[BLOCK_SIZE], along[BLOCK_SIZE], apart[BLOCK_SIZE];
    for_part(task, [&](int64_t begin, int64_t count) {
      const float* first = output(0, sample, begin, count, first_buffer);
      for (int64_t k = 1; k < args_.groups; ++k) {
        const float* group = output(k, sample, begin, count, buffer);
        float* __restrict distance = k == 1 ? along : apart;
        for (int64_t i = 0; i < count; ++i) distance[i] = group[i] - first[i];
        products[k] += dot(distance, along, count);
      }
    });
  }

  // The weights, w_1 less what the other groups have of d_1.
  void adjust(int64_t sample) {
    const float* weights = args_.weights + sample * args_.groups;
    float* adjusted = weights_.data() + sample * args_.groups;
    memcpy(adjusted, weights, args_.groups * sizeof(float));
    if (!projects_) return;
    double lost = 0.0, square = 0.0;
    for (int64_t part = 0; part < parts_; ++part) {
      const double* products = products_.data() + (sample * parts_ + part) * args_.groups;
      square += products[1];
      for (int64_t k = 2; k < args_.groups; ++k) lost += weights[k] != 0.0f ? weights[k] * products[k] : 0.0;
    }
    if (square != 0.0) adjusted[1] = static_cast<float>(weights[1] - lost / square);
  }

  // The moments of out_1 and of m, from which a multiple of an element of out_0 is taken, so that a large mean does not
  // cost m its last digits.
  void measure(int64_t task) {
    const int64_t sample = task / parts_;
    const float* weights = weights_.data() + sample * args_.groups;
    const float center = load_one(args_.model_output, sample * args_.output_count);
    Moments of_conditional, of_m;
    alignas(64) float first_buffer[BLOCK_SIZE], buffer[BLOCK_SIZE], other_buffer[BLOCK_SIZE], m[BLOCK_SIZE];
    for_part(task, [&](int64_t begin, int64_t count) {
      const float* first = output(0, sample, begin, count, first_buffer);
      const float* conditional = output(1, sample, begin, count, buffer);
      const auto group = [&](int64_t k) {
        return k == 1 ? conditional : output(k, sample, begin, count, other_buffer);
      };
      combine_groups(weights, args_.groups, first, center, group, m, count);
      of_conditional.merge(moments_of(conditional, count));
      of_m.merge(moments_of(m, count));
    });
    moments_[2 * task] = of_conditional;
    moments_[2 * task + 1] = of_m;
  }

  void finish(int64_t sample) const {
    const float* weights = weights_.data() + sample * args_.groups;
    const double f = rescales_ ? factor(sample) : 1.0;
    for (int64_t k = 0; k < args_.groups; ++k) {
      args_.out[sample * args_.groups + k] = static_cast<float>(f * weights[k]);
    }
  }

  double factor(int64_t sample) const {
    Moments of_conditional, of_m;
    for (int64_t task = sample * parts_; task < (sample + 1) * parts_; ++task) {
      of_conditional.merge(moments_[2 * task]);
      of_m.merge(moments_[2 * task + 1]);
    }
    const double ratio = of_m.squares == 0.0 ? 1.0 : std::sqrt(of_conditional.squares / of_m.squares);
    return args_.rescale * ratio + (1.0 - args_.rescale);
  }

  const WeightsArgs& args_;
  const int64_t parts_;
  const bool projects_, rescales_;
  const Scratch<float> weights_;    // (samples, groups), after the perpendicular step
  const Scratch<double> products_;  // (samples, parts, groups)
  const Scratch<Moments> moments_;  // (samples, parts, 2): of out_1 and m
};

}  // namespace

void guidance_weights(const WeightsArgs& args) { GuidanceWeights(args).run(); }

}  // namespace fastdiff::cpu::CPU_CAPABILITY
