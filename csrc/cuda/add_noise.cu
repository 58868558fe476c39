// alpha[n] * x + sigma[n] * noise, one pass: x and the noise (or nothing) read, the result written.
// Byte floor at 4.3 TB/s: 8x4x64x64 float32 with given noise 0.4 us, drawn 0.2 us (launch-bound); 64x3x512x512 bfloat16
// with given noise 70 us, drawn 47 us.
#include "launch.cuh"
#include "noise.cuh"

namespace fastdiff::cuda {
namespace {

constexpr int THREADS = 256;

// A thread for every eight elements in the order of memory, which is the logical order where noise is drawn.
template <bool kVector>
__global__ void __launch_bounds__(THREADS) add_noise_kernel(NoiseArgs args, int64_t per_sample) {
  const int64_t chunk = static_cast<int64_t>(blockIdx.x) * THREADS + threadIdx.x;
  if (chunk >= args.samples * per_sample) return;
  const Chunk at = chunk_at(chunk, per_sample, args.count);
  const Raw x = load_eight<kVector>(args.x, at.index, at.valid);
  const float alpha = args.alpha[at.sample], sigma = args.sigma[at.sample];
  float noise[WIDTH];
  if (args.noise.data) {
    decode_eight<kVector>(load_eight<kVector>(args.noise, at.index, at.valid), args.noise.type, noise);
  } else {
    draw_eight(args.seeds[at.sample], at.element, args.step, args.stream, noise);
  }
  float values[WIDTH];
  decode_eight<kVector>(x, args.x.type, values);
#pragma unroll
  for (int j = 0; j < WIDTH; ++j) values[j] = alpha * values[j] + sigma * noise[j];
  store_eight<kVector>(args.out, at.index, at.valid, values);
}

// Channels-last and drawn: a thread for every Philox block, four elements that are consecutive in the logical order.
// Where no block straddles two channels, neighbouring threads take neighbouring channels, so that their accesses
// coalesce.
__global__ void __launch_bounds__(THREADS) add_drawn_noise_kernel(NoiseArgs args, int64_t per_sample) {
  const int64_t thread = static_cast<int64_t>(blockIdx.x) * THREADS + threadIdx.x;
  if (thread >= args.samples * per_sample) return;
  const int64_t sample = thread / per_sample, channels = args.inner, spatial = args.count / channels;
  int64_t block = thread - sample * per_sample;
  if (spatial % 4 == 0) block = block % channels * (spatial / 4) + block / channels;
  float noise[4];
  philox::normals(static_cast<uint64_t>(args.seeds[sample]), block, args.step, args.stream, noise);
  const float alpha = args.alpha[sample], sigma = args.sigma[sample];
#pragma unroll
  for (int j = 0; j < 4; ++j) {
    const int64_t element = 4 * block + j;
    if (element >= args.count) break;
    const int64_t channel = element / spatial;
    const int64_t index = sample * args.count + (element - channel * spatial) * channels + channel;
    store_one(args.out, index, alpha * load_one(args.x, index) + sigma * noise[j]);
  }
}

}  // namespace

int add_noise(const NoiseArgs& args, void* stream) {
  if (!args.noise && args.inner != 1) {
    const int64_t per_sample = (args.count + 3) / 4;
    const int64_t blocks = (args.samples * per_sample + THREADS - 1) / THREADS;
    return launch(add_drawn_noise_kernel, blocks, THREADS, 0, 1, stream, args, per_sample);
  }
  const int64_t per_sample = chunks_per_sample(args.count);
  const int64_t blocks = (args.samples * per_sample + THREADS - 1) / THREADS;
  const bool vector =
      args.count % WIDTH == 0 && aligned(args.x.data) && aligned(args.noise.data) && aligned(args.out.data);
  const auto kernel = vector ? add_noise_kernel<true> : add_noise_kernel<false>;
  return launch(kernel, blocks, THREADS, 0, 1, stream, args, per_sample);
}

}  // namespace fastdiff::cuda
