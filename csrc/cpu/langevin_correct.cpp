// A Langevin step whose size comes from the norms' means over the batch. Floor: noise and score read twice, the state
// once, one result written; at 1x4x64x64 float32 all of it stays in the second-level cache.
#include <cmath>

#include "moments.h"
#include "ops.h"
#include "parallel.h"
#include "scratch.h"

namespace fastdiff::cpu::CPU_CAPABILITY {

namespace {

constexpr int64_t SIZE = 1024;       // elements of a task: what is converted stays in the first-level cache
constexpr int64_t PARALLEL = 65536;  // elements below which threads cost more than they give

double squares(const Array& array, int64_t offset, int64_t count) {
  alignas(64) float buffer[SIZE];
  const float* values = view(array, offset, buffer, count);
  return dot(values, values, count);
}

void correct(const CorrectArgs& args, float size, float added, int64_t begin, int64_t count) {
  alignas(64) float x_buffer[SIZE], score_buffer[SIZE], noise_buffer[SIZE];
  const float* x = view(args.x, begin, x_buffer, count);
  const float* score = view(args.score, begin, score_buffer, count);
  const float* noise = view(args.noise, begin, noise_buffer, count);
  float* __restrict out = args.out + begin;
  for (int64_t i = 0; i < count; ++i) out[i] = x[i] + size * score[i] + added * noise[i];
}

// The mean over the samples of the norms; their squares were added up block by block, whatever the number of threads.
double mean_norm(const double* squares, int64_t samples, int64_t blocks) {
  double sum = 0.0;
  for (int64_t sample = 0; sample < samples; ++sample) {
    double norm = 0.0;
    for (int64_t block = 0; block < blocks; ++block) norm += squares[sample * blocks + block];
    sum += std::sqrt(norm);
  }
  return sum / static_cast<double>(samples);
}

}  // namespace

void langevin_correct(const CorrectArgs& args) {
  const int64_t blocks = ceil_divide(args.count, SIZE), tasks = args.samples * blocks;
  const int threads = args.samples * args.count < PARALLEL ? 1 : args.threads;
  const Scratch<double> of_noise(tasks), of_score(tasks);
  const auto in_blocks = [&](const auto& body) {
    parallel_for(tasks, threads, [&](int64_t task) {
      const int64_t sample = task / blocks, begin = task % blocks * SIZE;
      body(task, sample * args.count + begin, smaller(SIZE, args.count - begin));
    });
  };
  in_blocks([&](int64_t task, int64_t begin, int64_t count) {
    of_noise[task] = squares(args.noise, begin, count);
    of_score[task] = squares(args.score, begin, count);
  });
  const double ratio = args.snr * mean_norm(of_noise.data(), args.samples, blocks) /
                       mean_norm(of_score.data(), args.samples, blocks);
  const double size = 2.0 * ratio * ratio;
  in_blocks([&](int64_t, int64_t begin, int64_t count) {
    correct(args, static_cast<float>(size), static_cast<float>(std::sqrt(2.0 * size)), begin, count);
  });
}

}  // namespace fastdiff::cpu::CPU_CAPABILITY
