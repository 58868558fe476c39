#include <algorithm>

#include "convert.h"
#include "normals.h"
#include "ops.h"
#include "parallel.h"
#include "philox.h"

namespace fastdiff::cpu::CPU_CAPABILITY {

namespace {

constexpr int64_t BLOCK = 2048;     // elements drawn at a time, within the first-level cache
constexpr int64_t PARALLEL = 8192;  // elements below which threads cost more than they give

// The normals of elements 4 * block .. 4 * (block + blocks) - 1; `out` has room for whole tiles. Every tile is computed
// whole, so an element's bits do not depend on where the run begins or ends.
void draw_blocks(uint64_t seed, uint64_t block, int64_t blocks, uint32_t step, uint32_t stream, float* __restrict out) {
  const uint32_t k0 = static_cast<uint32_t>(seed), k1 = static_cast<uint32_t>(seed >> 32);
  uint32_t w0[NORMALS_TILE], w1[NORMALS_TILE], w2[NORMALS_TILE], w3[NORMALS_TILE];
  float values[4][NORMALS_TILE];
  for (int64_t first = 0; first < blocks; first += NORMALS_TILE) {
    const uint32_t low = static_cast<uint32_t>(block + first), high = static_cast<uint32_t>((block + first) >> 32);
    for (uint32_t i = 0; i < NORMALS_TILE; ++i) {
      uint32_t c0 = low + i, c1 = step, c2 = stream, c3 = high + (c0 < low ? 1u : 0u);
      philox::words(c0, c1, c2, c3, k0, k1);
      w0[i] = c0;
      w1[i] = c1;
      w2[i] = c2;
      w3[i] = c3;
    }
    for (int64_t i = 0; i < NORMALS_TILE; ++i) {
      float cosine, sine;
      philox::cos_sin(w1[i], cosine, sine);
      const float radius = philox::radius(w0[i]);
      values[0][i] = radius * cosine;
      values[1][i] = radius * sine;
    }
    for (int64_t i = 0; i < NORMALS_TILE; ++i) {
      float cosine, sine;
      philox::cos_sin(w3[i], cosine, sine);
      const float radius = philox::radius(w2[i]);
      values[2][i] = radius * cosine;
      values[3][i] = radius * sine;
    }
    float* tile = out + 4 * first;
    for (int64_t i = 0; i < NORMALS_TILE; ++i) {
      tile[4 * i] = values[0][i];
      tile[4 * i + 1] = values[1][i];
      tile[4 * i + 2] = values[2][i];
      tile[4 * i + 3] = values[3][i];
    }
  }
}

}  // namespace

const float* draw(uint64_t seed, int64_t element, int64_t count, uint32_t step, uint32_t stream, float* buffer) {
  const int64_t block = element / 4, last = (element + count + 3) / 4;
  draw_blocks(seed, static_cast<uint64_t>(block), last - block, step, stream, buffer);
  return buffer + (element - 4 * block);
}

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
