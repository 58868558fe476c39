// Standard normal noise, a thread for every eight consecutive elements of a sample. Nothing but the seeds is read.
// Byte floor at 4.3 TB/s: 64x3x32x32 float32 0.2 us (launch-bound), 8x4x128x128 float32 0.5 us, 64x3x512x512 float32
// 47 us; the arithmetic (two Philox blocks and four Box-Muller pairs a thread, about 60 instructions an element) stands
// near 2 TB/s of float32, so that this kernel is bound by instructions and not by bytes.
#include "launch.cuh"
#include "noise.cuh"

namespace fastdiff::cuda {
namespace {

constexpr int THREADS = 256;

template <bool kVector>
__global__ void __launch_bounds__(THREADS) philox_normal_kernel(NoiseArgs args, int64_t per_sample) {
  const int64_t chunk = static_cast<int64_t>(blockIdx.x) * THREADS + threadIdx.x;
  if (chunk >= args.samples * per_sample) return;
  const Chunk at = chunk_at(chunk, per_sample, args.count);
  float values[WIDTH];
  draw_eight(args.seeds[at.sample], at.element, args.step, args.stream, values);
  store_eight<kVector>(args.out, at.index, at.valid, values);
}

}  // namespace

int philox_normal(const NoiseArgs& args, void* stream) {
  const int64_t per_sample = chunks_per_sample(args.count);
  const int64_t blocks = (args.samples * per_sample + THREADS - 1) / THREADS;
  const bool vector = args.count % WIDTH == 0 && aligned(args.out.data);
  const auto kernel = vector ? philox_normal_kernel<true> : philox_normal_kernel<false>;
  return launch(kernel, blocks, THREADS, 0, 1, stream, args, per_sample);
}

}  // namespace fastdiff::cuda
