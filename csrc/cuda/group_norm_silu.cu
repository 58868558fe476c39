// y = silu(group_norm(x + addend + residual)), contiguous or channels-last; x may be two tensors side by side.
//
// `one`: x is read once; a block, or a cluster of 2-8 blocks that exchange their statistics through distributed shared
// memory, keeps a slab in shared memory. `split`: a kernel for the statistics and one that reads x again, last part
// first, while it is still in the L2 cache. Results never depend on the order in which blocks run.
//
// Byte floor of one read and one write at 4.3 TB/s, batch 2, float16, us: SD 1.5 320@64^2 2.4, 960@64^2 7.3,
// 1920@32^2 3.7, 1280@16^2 0.6; SDXL 960@128^2 29, 320@128^2 9.8, 1920@64^2 14.6; VAE (batch 1) 256@512^2 62. A
// residual adds half of that, a written sum another half; `split` adds up to half where L2 does not hold x.
#include <cooperative_groups.h>

#include "group_norm_tile.cuh"

namespace fastdiff::cuda {
namespace {

constexpr int MAX_THREADS = 512;

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
// The statistics of the whole slab from those of each block of the cluster. A block may end only when no other reads
// from it: `finish_exchange` waits for that.
template <class S>
__device__ __forceinline__ void exchange(const S& slab) {
  const auto cluster = cooperative_groups::this_cluster();
  cluster.sync();
  for (int group = threadIdx.x; group < slab.plan.groups; group += slab.plan.threads) {
    Moments total{};
    for (int64_t part = 0; part < slab.plan.parts; ++part) {
      const float4 other = cluster.map_shared_rank(slab.results, static_cast<int>(part))[group];
      total = merge(total, unpacked(slab.elements(slab.size_of(part)), other));
    }
    slab.finals[group] = finished(total, slab.args.eps);
  }
  cooperative_groups::this_cluster().barrier_arrive();
}

__device__ __forceinline__ void finish_exchange() { cooperative_groups::this_cluster().barrier_wait(); }
#else
template <class S>
__device__ __forceinline__ void exchange(const S&) {}
__device__ __forceinline__ void finish_exchange() {}
#endif

// The statistics of a part; with plan.one then its y, else they go to the workspace: float4 (samples, groups, parts),
// as `packed` gives them.
template <class T, int kWidth, bool kLast>
__global__ void __launch_bounds__(MAX_THREADS, 1)
    group_norm_silu_kernel(GroupNormArgs args, GroupNormPlan plan, float4* workspace) {
  FASTDIFF_SHARED(shared);
  const Slab<T, kWidth, kLast> slab(args, plan, blockIdx.x, shared);
  for (int64_t done = 0; done < slab.size; done += plan.tile_chunks) {
    const int64_t left = slab.size - done;
    slab.statistics(slab.begin + done, static_cast<int>(left < plan.tile_chunks ? left : plan.tile_chunks), done);
  }
  const int thread = threadIdx.x;
  if (!plan.one) {
    const int64_t group = slab.sample * args.groups + slab.first_group + thread;
    if (thread < plan.groups) workspace[group * plan.parts + slab.part] = slab.results[thread];
    return;
  }
  if (plan.parts > 1) {
    exchange(slab);
  } else if (thread < plan.groups) {
    slab.finals[thread] = finished(unpacked(slab.elements(slab.size), slab.results[thread]), args.eps);
  }
  __syncthreads();
  slab.normalise(
      [&](int i, int64_t, const T*, const auto& addend, float(&h)[kWidth]) { slab.from_tile(i, addend, h); });
  if (plan.parts > 1) finish_exchange();
}

template <class T, int kWidth, bool kLast>
__global__ void __launch_bounds__(MAX_THREADS, 1)
    group_norm_apply_kernel(GroupNormArgs args, GroupNormPlan plan, const float4* workspace) {
  FASTDIFF_SHARED(shared);
  const Slab<T, kWidth, kLast> slab(args, plan, gridDim.x - 1 - blockIdx.x, shared);
  const int lane = threadIdx.x % 32;
  for (int group = threadIdx.x / 32; group < plan.groups; group += plan.threads / 32) {
    const float4* parts = workspace + (slab.sample * args.groups + slab.first_group + group) * plan.parts;
    Moments total{};
    for (int64_t part = lane; part < plan.parts; part += 32) {
      total = merge(total, unpacked(slab.elements(slab.size_of(part)), parts[part]));
    }
#pragma unroll
    for (int offset = 16; offset > 0; offset /= 2) {
      total = merge(total,
                    {__shfl_down_sync(FULL_WARP, total.count, offset), __shfl_down_sync(FULL_WARP, total.mean, offset),
                     __shfl_down_sync(FULL_WARP, total.offset, offset), __shfl_down_sync(FULL_WARP, total.m2, offset)});
    }
    if (lane == 0) slab.finals[group] = finished(total, args.eps);
  }
  __syncthreads();
  slab.normalise([&](int, int64_t index, const T* from, const auto& addend, float(&h)[kWidth]) {
    slab.complete(Cell<T, kWidth>::load(from), addend, index, h);
  });
}

template <class T, int kWidth, bool kLast>
int run(const GroupNormArgs& args, const GroupNormPlan& plan, void* stream, void* workspace) {
  const int64_t blocks = args.samples * args.groups / plan.groups * plan.parts;
  float4* partials = static_cast<float4*>(workspace);
  const int cluster = plan.one ? static_cast<int>(plan.parts) : 1;
  const int error = launch(group_norm_silu_kernel<T, kWidth, kLast>, blocks, plan.threads, plan.shared, cluster, stream,
                           args, plan, partials);
  if (error || plan.one) return error;
  const float4* done = partials;
  return launch(group_norm_apply_kernel<T, kWidth, kLast>, blocks, plan.threads, plan.scratch, 1, stream, args, plan,
                done);
}

template <class T>
int run(const GroupNormArgs& args, const GroupNormPlan& plan, void* stream, void* workspace) {
  if (args.channels_last) {
    return plan.width == 1 ? run<T, 1, true>(args, plan, stream, workspace)
                           : run<T, WIDTH, true>(args, plan, stream, workspace);
  }
  return plan.width == 1 ? run<T, 1, false>(args, plan, stream, workspace)
                         : run<T, WIDTH, false>(args, plan, stream, workspace);
}

// Clusters need a device that has them and code made for it: what the driver makes from older PTX does not exchange.
int find_device(Device& device) {
  if (const cudaError_t error = current_device(device)) return error;
  cudaFuncAttributes attributes{};
  static const cudaError_t error =
      cudaFuncGetAttributes(&attributes, reinterpret_cast<const void*>(group_norm_silu_kernel<float, WIDTH, false>));
  static const bool compiled = attributes.ptxVersion >= 90;
  device.clusters = device.clusters && compiled;
  return error;
}

}  // namespace

int64_t group_norm_silu_workspace(const GroupNormArgs& args) {
  Device device;
  if (find_device(device)) return 0;
  const GroupNormPlan plan = group_norm_plan(args, device);
  return plan.one ? 0 : args.samples * args.groups * plan.parts * static_cast<int64_t>(sizeof(float4));
}

int group_norm_silu(const GroupNormArgs& args, void* stream, void* workspace) {
  Device device;
  if (const int error = find_device(device)) return error;
  if (args.spatial > INT32_MAX || args.channels > INT32_MAX) return cudaErrorInvalidValue;
  const GroupNormPlan plan = group_norm_plan(args, device);
  if (args.x.type == Type::F32) return run<float>(args, plan, stream, workspace);
  if (args.x.type == Type::F16) return run<__half>(args, plan, stream, workspace);
  return run<__nv_bfloat16>(args, plan, stream, workspace);
}

}  // namespace fastdiff::cuda
