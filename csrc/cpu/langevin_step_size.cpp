// The norms of the noise and of the score D. Floor: x, the model output and the noise read once, 2 MB at 2x4x128x128
// float32 with guidance, 19 us on two cores of a 2.6 GHz EPYC; drawn noise costs its arithmetic.
#include <cmath>

#include "moments.h"
#include "normals.h"
#include "ops.h"
#include "parallel.h"
#include "prediction.h"
#include "scratch.h"

namespace fastdiff::cpu::CPU_CAPABILITY {

namespace {

constexpr int64_t PARALLEL = 32768;       // elements below which threads cost more than they give
constexpr int64_t PARALLEL_DRAWN = 8192;  // the same where noise is drawn

struct Squares {
  double noise, score;
};

Squares squares_of_block(const StepSizeArgs& args, int64_t sample, int64_t begin, int64_t count) {
  alignas(64) float score[PREDICTED], noise[normals_room(PREDICTED)];
  Prediction(args).block(sample, begin, count, score);
  const float* z =
      args.noise ? view(args.noise, sample * args.count + begin, noise, count)
                 : draw(static_cast<uint64_t>(args.seeds[sample]), begin, count, args.index, row::STREAM_STEP, noise);
  return {dot(z, z, count), dot(score, score, count)};
}

}  // namespace

void langevin_step_size(const StepSizeArgs& args) {
  const int64_t blocks = ceil_divide(args.count, PREDICTED);
  const int threads = args.samples * args.count < (args.noise ? PARALLEL : PARALLEL_DRAWN) ? 1 : args.threads;
  // Added in the order of the blocks, so that the number of threads does not change the bits.
  const Scratch<Squares> squares(args.samples * blocks);
  parallel_for(args.samples * blocks, threads, [&](int64_t task) {
    const int64_t sample = task / blocks, begin = task % blocks * PREDICTED;
    squares[task] = squares_of_block(args, sample, begin, smaller(PREDICTED, args.count - begin));
  });
  for (int64_t sample = 0; sample < args.samples; ++sample) {
    Squares sum{};
    for (int64_t block = 0; block < blocks; ++block) {
      sum.noise += squares[sample * blocks + block].noise;
      sum.score += squares[sample * blocks + block].score;
    }
    const double e = sum.score == 0.0 ? 0.0 : 2.0 * args.snr * args.snr * sum.noise / sum.score;
    float* scales = args.scales + 3 * sample;
    scales[0] = INFINITY;
    scales[1] = static_cast<float>(e);
    scales[2] = static_cast<float>(std::sqrt(2.0 * e));
  }
}

}  // namespace fastdiff::cpu::CPU_CAPABILITY
