// PyTorch's own normals, faster: its Mersenne twister in vectors, and its Box-Muller on all threads.
//
// Matsumoto and Nishimura 1998, "Mersenne Twister". The order of words and the arithmetic are those of torch.randn on a
// processor with AVX2, so that bits are equal; only there is anything compiled.
#include "ops.h"

#include <algorithm>

#include "box_muller.h"
#include "convert.h"
#include "parallel.h"

#if defined(CPU_CAPABILITY_AVX512) || defined(CPU_CAPABILITY_AVX2)

namespace fastdiff::cpu::CPU_CAPABILITY {

namespace {

constexpr int N = 624, M = 397;
constexpr int64_t BLOCK = 2048;      // elements of a task
constexpr int64_t PARALLEL = 65536;  // elements below which threads cost more than they give

inline uint32_t twist(uint32_t u, uint32_t v) {
  return (((u & 0x80000000u) | (v & 0x7fffffffu)) >> 1) ^ (-(v & 1u) & 0x9908b0dfu);
}

void next_state(uint32_t* state) {
  for (int j = 0; j < N - M; ++j) state[j] = state[j + M] ^ twist(state[j], state[j + 1]);
  // Each reads what the one 227 words before it wrote, which is further away than a vector is long.
#pragma GCC ivdep
  for (int j = N - M; j < N - 1; ++j) state[j] = state[j + M - N] ^ twist(state[j], state[j + 1]);
  state[N - 1] = state[M - 1] ^ twist(state[N - 1], state[0]);
}

void uniforms(MersenneTwister& twister, float* out, int64_t count) {
  while (count > 0) {
    if (twister.next == N) {
      next_state(twister.state);
      twister.next = 0;
    }
    const int taken = static_cast<int>(std::min<int64_t>(count, N - twister.next));
    const uint32_t* words = twister.state + twister.next;
    for (int i = 0; i < taken; ++i) {
      uint32_t y = words[i];
      y ^= y >> 11;
      y ^= (y << 7) & 0x9d2c5680u;
      y ^= (y << 15) & 0xefc60000u;
      y ^= y >> 18;
      out[i] = static_cast<float>(static_cast<int32_t>(y & 0xffffffu)) * 0x1p-24f;
    }
    twister.next += taken;
    out += taken;
    count -= taken;
  }
}

// Of `count` elements, a multiple of GROUP.
void normals(float* values, int64_t count) {
  int64_t i = 0;
  for (; i + GROUPS * GROUP <= count; i += GROUPS * GROUP) box_muller(values + i);
  if (i == count) return;
  float padded[GROUPS * GROUP] = {};
  std::copy(values + i, values + count, padded);
  box_muller(padded);
  std::copy_n(padded, count - i, values + i);
}

}  // namespace

// Where the count is no multiple of 16, PyTorch draws the last 16 anew: in float32 after those that they take the place
// of, in half precision without them.
void torch_normal(const TorchNormalArgs& args) {
  const int64_t whole = args.count / GROUP * GROUP, last = args.count - GROUP;
  float* values = args.values;
  uniforms(*args.twister, values, args.out.type == Type::F32 ? args.count : whole);
  const int64_t tasks = (whole + BLOCK - 1) / BLOCK;
  parallel_for(tasks, args.count < PARALLEL ? 1 : args.threads, [&](int64_t task) {
    normals(values + task * BLOCK, std::min(BLOCK, whole - task * BLOCK));
  });
  if (whole != args.count) {
    uniforms(*args.twister, values + last, GROUP);
    normals(values + last, GROUP);
  }
  if (args.out.type != Type::F32) store(values, args.out, 0, args.count);
}

}  // namespace fastdiff::cpu::CPU_CAPABILITY

#else

namespace fastdiff::cpu::CPU_CAPABILITY {

void torch_normal(const TorchNormalArgs&) {}

}  // namespace fastdiff::cpu::CPU_CAPABILITY

#endif
