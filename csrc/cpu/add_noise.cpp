#include <algorithm>

#include "convert.h"
#include "normals.h"
#include "ops.h"
#include "parallel.h"

namespace fastdiff::cpu::CPU_CAPABILITY {

namespace {

constexpr int64_t BLOCK = 1024;
constexpr int64_t PARALLEL = 32768;       // elements below which threads cost more than they give
constexpr int64_t PARALLEL_DRAWN = 8192;  // the same where noise is drawn

// out = alpha * x + sigma * noise for elements that lie as the noise does.
void combine_block(const NoiseArgs& args, int64_t sample, int64_t begin, int64_t count) {
  alignas(64) float x_buffer[BLOCK], noise_buffer[normals_room(BLOCK)], out_buffer[BLOCK];
  const int64_t offset = sample * args.count + begin;
  const float* x = view(args.x, offset, x_buffer, count);
  const float* noise =
      args.seeds ? draw(static_cast<uint64_t>(args.seeds[sample]), begin, count, args.step, args.stream, noise_buffer)
                 : view(args.noise, offset, noise_buffer, count);
  const float alpha = args.alpha[sample], sigma = args.sigma[sample];
  for (int64_t i = 0; i < count; ++i) out_buffer[i] = alpha * x[i] + sigma * noise[i];
  store(out_buffer, args.out, offset, count);
}

// The same for channels-last x and drawn noise, which is numbered in the logical order.
void combine_strided(const NoiseArgs& args, int64_t sample, int64_t begin, int64_t count) {
  alignas(64) float noise_buffer[normals_room(BLOCK)];
  const float* noise =
      draw(static_cast<uint64_t>(args.seeds[sample]), begin, count, args.step, args.stream, noise_buffer);
  const float alpha = args.alpha[sample], sigma = args.sigma[sample];
  const int64_t spatial = args.count / args.inner;
  int64_t channel = begin / spatial, position = begin % spatial;
  for (int64_t i = 0; i < count; ++i) {
    const int64_t offset = sample * args.count + position * args.inner + channel;
    store_one(alpha * load_one(args.x, offset) + sigma * noise[i], args.out, offset);
    if (++position == spatial) {
      position = 0;
      ++channel;
    }
  }
}

}  // namespace

void add_noise(const NoiseArgs& args) {
  const int64_t blocks = (args.count + BLOCK - 1) / BLOCK, total = args.samples * args.count;
  const bool strided = args.seeds && args.inner > 1;
  const int threads = total < (args.seeds ? PARALLEL_DRAWN : PARALLEL) ? 1 : args.threads;
  parallel_for(args.samples * blocks, threads, [&](int64_t task) {
    const int64_t sample = task / blocks, begin = task % blocks * BLOCK, count = std::min(BLOCK, args.count - begin);
    strided ? combine_strided(args, sample, begin, count) : combine_block(args, sample, begin, count);
  });
}

}  // namespace fastdiff::cpu::CPU_CAPABILITY
