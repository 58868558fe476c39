// The launchers of csrc/cuda as C functions, for ctypes.
#include "cuda_runtime.h"
#include "ops.h"

using namespace fastdiff;

extern "C" {

void shim_set(int order, int major, int multiprocessors, int barriers, int clusters) {
  shim::settings = {static_cast<shim::Order>(order), major, multiprocessors, barriers != 0, clusters != 0};
}

struct Tensor {
  void* data;
  int type;
  Array array() const { return {data, static_cast<Type>(type)}; }
};

int shim_sampler_step(const int64_t* sizes, const Tensor* t, const int64_t* seeds, const float* table,
                      const int64_t* counter, const float* weights, const float* scales, const float* mask) {
  StepArgs args{};
  args.samples = sizes[0];
  args.count = sizes[1];
  args.groups = sizes[2];
  args.output_count = sizes[3];
  args.output_inner = sizes[4];
  args.copies = sizes[5];
  args.row = sizes[6];
  args.rows = sizes[7];
  args.mask_stride = sizes[8];
  args.mask_count = sizes[9];
  args.x = t[0].array();
  args.model_output = t[1].array();
  args.noise = t[2].array();
  args.anchor = t[3].array();
  args.hist1 = t[4].array();
  args.hist2 = t[5].array();
  args.hist3 = t[6].array();
  args.new_x = t[7].array();
  args.new_history = t[8].array();
  args.new_anchor = t[9].array();
  args.model_input = t[10].array();
  args.known = t[11].array();
  args.known_noise = t[12].array();
  args.weights = weights;
  args.scales = scales;
  args.mask = mask;
  args.seeds = seeds;
  args.table = table;
  args.counter = counter;
  return cuda::sampler_step(args, nullptr);
}

int shim_noise(const int64_t* sizes, const Tensor* t, const float* alpha, const float* sigma, const int64_t* seeds) {
  NoiseArgs args{};
  args.samples = sizes[0];
  args.count = sizes[1];
  args.inner = sizes[2];
  args.step = static_cast<uint32_t>(sizes[3]);
  args.stream = static_cast<uint32_t>(sizes[4]);
  args.x = t[0].array();
  args.noise = t[1].array();
  args.out = t[2].array();
  args.alpha = alpha;
  args.sigma = sigma;
  args.seeds = seeds;
  return args.x ? cuda::add_noise(args, nullptr) : cuda::philox_normal(args, nullptr);
}

GroupNormArgs group_norm_args(const int64_t* sizes, const Tensor* t, float eps) {
  GroupNormArgs args{};
  args.samples = sizes[0];
  args.channels = sizes[1];
  args.spatial = sizes[2];
  args.groups = sizes[3];
  args.channels_last = sizes[4] != 0;
  args.silu = sizes[5] != 0;
  args.x_channels = sizes[6];
  args.eps = eps;
  args.x = t[0].array();
  args.weight = t[1].array();
  args.bias = t[2].array();
  args.addend = t[3].array();
  args.residual = t[4].array();
  args.y = t[5].array();
  args.sum = t[6].array();
  args.second = t[7].array();
  return args;
}

int64_t shim_group_norm_silu_workspace(const int64_t* sizes, const Tensor* t) {
  return cuda::group_norm_silu_workspace(group_norm_args(sizes, t, 0.0f));
}

int shim_group_norm_silu(const int64_t* sizes, const Tensor* t, float eps, void* workspace) {
  return cuda::group_norm_silu(group_norm_args(sizes, t, eps), nullptr, workspace);
}
}
