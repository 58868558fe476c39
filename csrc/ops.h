// Arguments of the kernels: raw pointers, sizes and strides. No torch here; csrc/register_*.cpp make these of tensors.
#pragma once

#include <cstdint>

namespace fastdiff {

enum class Type : int { F32, F16, BF16 };

// An array of some element type; data == nullptr where an optional tensor was not given.
struct Array {
  void* data = nullptr;
  Type type = Type::F32;
  explicit operator bool() const { return data != nullptr; }
};

// Dense samples (N, count). A channels-last array has inner == C, and element c * (count / C) + s of the logical order
// lies at s * C + c; inner == 1 means the logical order itself.
struct StepArgs {
  int64_t samples, count;
  int64_t groups;        // model_output holds so many batches
  int64_t output_count;  // elements of a sample of it: count, or 2 * count, of which the second half is the variance
  int64_t output_inner;
  int64_t copies;  // of the model input
  Array x, model_output, noise, anchor, hist1, hist2, hist3;  // anchor and history float32
  Array known, known_noise;
  const float* mask;  // of a kept image; a sample's element e has mask[sample * mask_stride + e % mask_count]
  int64_t mask_stride, mask_count;
  const float* weights;  // (samples, groups), or nullptr
  const float* scales;   // (samples, 3): bound, data factor, noise factor; or nullptr
  const int64_t* seeds;
  const float* table;  // on the device of x
  int64_t row, rows;
  const int64_t* counter;  // on the device of x, or nullptr
  Array new_x, new_history, new_anchor, model_input;
  int threads;
};

struct NoiseArgs {  // philox_normal, and add_noise where x is given
  int64_t samples, count;
  int64_t inner;  // layout of x, noise and out, as in StepArgs
  Array x, noise;
  const float *alpha, *sigma;
  const int64_t* seeds;
  uint32_t step, stream;
  Array out;
  int threads;
};

struct MersenneTwister {
  uint32_t* state;  // 624 words
  int next;         // the word to be taken next; 624: the state has to move on first
};

struct TorchNormalArgs {
  MersenneTwister* twister;
  int64_t count;  // at least 16
  float* values;  // out's own memory where that is float32
  Array out;
  int threads;
};

struct GroupNormArgs {
  int64_t samples, channels, spatial, groups;
  int64_t x_channels;  // the rest, if any, are those of `second`
  bool channels_last, silu;
  float eps;
  Array x, weight, bias, addend, residual;  // weight, bias (C); addend (N, C); residual as x
  Array second;                             // without a residual only
  Array y, sum;
  int threads;
};

struct AttentionArgs {
  int64_t batch, heads, queries, keys, dim;
  float scale;
  Array q, k, v, out;                                         // one type; last dimension has stride 1
  int64_t q_strides[3], k_strides[3], v_strides[3];           // batch, head, position
  Array mask;                                                 // any type, added; bool masks are mask_bool
  const bool* mask_bool;
  int64_t mask_strides[4];                                    // batch, head, query, key; 0 where broadcast
  int threads;                                                // out is contiguous (batch, queries, heads, dim)
};

// m = sum over groups: the base weights w of w_0 out_0 + sum of w_k (out_k - out_0), made ready for a sampler step.
struct WeightsArgs {
  int64_t samples, groups;
  int64_t count, output_count;  // elements of a sample that count, and that there are
  int64_t channels, inner;      // channels-last: of each `inner` elements the first `channels` count; contiguous: 1, 1
  Array model_output;           // (groups * samples, output_count)
  const float* weights;         // (samples, groups); so is out
  double rescale;
  bool perpendicular;
  float* out;
  int threads;
};

// What D = ax*x + am*m is made of, before any clipping.
struct PredictionArgs {
  int64_t samples, count, groups;
  int64_t output_count;  // of model_output (groups * samples, output_count), whose first `count` elements count
  int64_t output_inner;  // its layout, as in StepArgs
  Array x, model_output;
  const float* weights;  // (samples, groups); nullptr: 1, or 1 and the row's guidance
  const float* row;      // of the table
  uint32_t index;        // of that row
  int threads;
};

struct ThresholdArgs : PredictionArgs {
  double percentile;
  float maximum;
  float* scales;  // (samples, 3)
};

struct StepSizeArgs : PredictionArgs {
  Array noise;
  const int64_t* seeds;
  double snr;
  float* scales;  // (samples, 3)
};

struct CorrectArgs {
  int64_t samples, count;
  Array x, score, noise;
  double snr;
  float* out;
  int threads;
};

struct GegluArgs {
  int64_t rows, hidden;
  Array x, y;  // (rows, 2 * hidden) and (rows, hidden), of one type
  int threads;
};

struct LayerNormArgs {
  int64_t samples, positions, channels;
  float eps;
  Array x, residual, y, sum;         // (samples, positions, channels), of one type
  Array weight, bias;                // (channels)
  Array scale, shift, gate;          // (samples, channels)
  int64_t scale_stride, shift_stride, gate_stride;  // of a sample
  int threads;
};

// The four phases of an upsampling convolution into their pixels: to[n, o, 2i + a, 2j + b] =
// from[n, (2a + b) * channels + o, i + a, j + b].
struct UpsampleArgs {
  int64_t samples, channels, height, width;  // the height and width of the map before
  Array from, to;                            // of one type
  int64_t from_strides[4], to_strides[4];    // sample, channel, row, column
  int threads;
};

constexpr int64_t PACKED_OUTPUTS = 64;  // outputs whose weights lie side by side; the last ones are filled with zeros

// A channels-last map and a weight that was packed, float32 or bfloat16; bias and residual (as the result) may be null.
struct ConvArgs {
  int64_t samples, channels, height, width;
  int64_t outputs, out_height, out_width;
  int64_t taps[2], stride[2], padding[2];
  Type type;  // of all but the bias
  const void *x, *weight, *residual;
  const float* bias;
  void* out;
  int threads;
};

// A 3x3 convolution of stride 1 by Winograd's filtering; maps channels-last, of `type`, as the weight that was packed.
struct WinogradArgs {
  int64_t samples, channels, height, width;
  int64_t outputs, out_height, out_width;
  int64_t padding[2];
  int64_t tile;  // results in a row and a column that are made together: 2 or 4
  bool doubled;  // x is read at twice its size, each pixel four times
  Type type;
  const void *x, *weight, *addend;  // addend as the result, or nullptr
  const float* bias;                // or nullptr
  void* out;
  void* scratch;  // winograd_scratch(args) bytes
  int threads;
};

// A channels-last map and a weight that was packed, bfloat16; for a product of pixels also a second map, for more
// channels.
struct ConvolveBFloat16Args {
  int64_t samples, channels, second_channels, height, width;
  int64_t outputs, out_height, out_width;
  int64_t taps[2], stride[2], padding[2];
  const void *x, *second, *weight, *bias, *addend;  // second, bias and addend (as the result) may be null
  void* out;
  int threads;
};

struct PackBFloat16Args {
  int64_t outputs, channels, taps;
  const uint16_t* weight;
  uint16_t* to;
  int threads;
};

struct PackArgs {
  int64_t outputs, channels, taps;
  Type type;  // F32 or BF16
  const void* weight;
  void* to;
  int threads;
};

namespace cpu {

#ifdef FASTDIFF_X86
#define FASTDIFF_CAPABILITIES(DO) DO(DEFAULT) DO(AVX2) DO(AVX512)
#else
#define FASTDIFF_CAPABILITIES(DO) DO(DEFAULT)
#endif

// Each csrc/cpu/*.cpp is compiled once per capability and defines its kernel in the namespace of that name. A kernel
// returns nullptr, or a message on what is missing.
#define FASTDIFF_DECLARE(CAPABILITY)                  \
  namespace CAPABILITY {                              \
  const char* sampler_step(const StepArgs& args);     \
  void add_noise(const NoiseArgs& args);              \
  void philox_normal(const NoiseArgs& args);          \
  void torch_normal(const TorchNormalArgs& args);     \
  void group_norm_silu(const GroupNormArgs& args);    \
  void attention(const AttentionArgs& args);          \
  void guidance_weights(const WeightsArgs& args);     \
  void dynamic_threshold(const ThresholdArgs& args);  \
  void langevin_step_size(const StepSizeArgs& args);  \
  void langevin_correct(const CorrectArgs& args);     \
  void geglu(const GegluArgs& args);                  \
  void layer_norm_modulate(const LayerNormArgs& args); \
  void upsample_conv(const UpsampleArgs& args);       \
  void conv_bias_residual(const ConvArgs& args);      \
  void pack_weight(const PackArgs& args);             \
  int64_t winograd_scratch(const WinogradArgs& args); \
  void winograd(const WinogradArgs& args);            \
  bool has_bfloat16_products();                       \
  void convolve_bfloat16(const ConvolveBFloat16Args& args); \
  void pack_bfloat16(const PackBFloat16Args& args);   \
  int64_t winograd_bfloat16_scratch(const WinogradArgs& args); \
  void winograd_bfloat16(const WinogradArgs& args);   \
  }
FASTDIFF_CAPABILITIES(FASTDIFF_DECLARE)
#undef FASTDIFF_DECLARE

}  // namespace cpu

#ifdef FASTDIFF_CUDA
namespace cuda {

// Each csrc/cuda/*.cu defines its launcher; `stream` is a cudaStream_t, what comes back a cudaError_t.
int sampler_step(const StepArgs& args, void* stream);
int add_noise(const NoiseArgs& args, void* stream);
int philox_normal(const NoiseArgs& args, void* stream);
int group_norm_silu(const GroupNormArgs& args, void* stream, void* workspace);
int64_t group_norm_silu_workspace(const GroupNormArgs& args);  // bytes

}  // namespace cuda
#endif

}  // namespace fastdiff
