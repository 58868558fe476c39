#include <algorithm>

#include "convert.h"
#include "normals.h"
#include "ops.h"
#include "parallel.h"

namespace fastdiff::cpu::CPU_CAPABILITY {

namespace {

constexpr int64_t BLOCK = 2048;     // elements drawn at a time, within the first-level cache
constexpr int64_t PARALLEL = 8192;  // elements below which threads cost more than they give

}  // namespace

void philox_normal(const NoiseArgs& args) {
  const int64_t blocks = (args.count + BLOCK - 1) / BLOCK;
  const int threads = args.samples * args.count < PARALLEL ? 1 : args.threads;
  parallel_for(args.samples * blocks, threads, [&](int64_t task) {
    alignas(64) float buffer[normals_room(BLOCK)];
    const int64_t sample = task / blocks, begin = task % blocks * BLOCK, count = std::min(BLOCK, args.count - begin);
    const float* values = draw(static_cast<uint64_t>(args.seeds[sample]), begin, count, args.step, args.stream, buffer);
    store(values, args.out, sample * args.count + begin, count);
  });
}

}  // namespace fastdiff::cpu::CPU_CAPABILITY
