// Launching a kernel, and what the launchers ask of the device.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

// The block's dynamic shared memory as bytes, aligned for 16-byte accesses.
#ifndef FASTDIFF_SHARED
#define FASTDIFF_SHARED(NAME) extern __shared__ __align__(16) unsigned char NAME[]
#endif

namespace fastdiff::cuda {

struct Device {
  int multiprocessors = 0;
  bool clusters = false;  // thread-block clusters with distributed shared memory: compute capability 9.0 and later
};

inline cudaError_t current_device(Device& device) {
  int index = 0, major = 0;
  if (cudaError_t error = cudaGetDevice(&index)) return error;
  if (cudaError_t error = cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, index)) return error;
  device.clusters = major >= 9;
  return cudaDeviceGetAttribute(&device.multiprocessors, cudaDevAttrMultiProcessorCount, index);
}

// `cluster` blocks share their shared memory; blocks is a multiple of it. No blocks, no launch.
template <class... Args>
cudaError_t launch(void (*kernel)(Args...), int64_t blocks, int threads, int64_t shared, int cluster, void* stream,
                   const Args&... args) {
  if (blocks == 0) return cudaSuccess;
  if (blocks > INT32_MAX) return cudaErrorInvalidConfiguration;
  if (shared > 48 * 1024) {
    const cudaError_t error = cudaFuncSetAttribute(
        reinterpret_cast<const void*>(kernel), cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared));
    if (error != cudaSuccess) return error;
  }
  cudaLaunchAttribute attribute{};
  attribute.id = cudaLaunchAttributeClusterDimension;
  attribute.val.clusterDim.x = cluster;
  attribute.val.clusterDim.y = attribute.val.clusterDim.z = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(static_cast<unsigned>(blocks));
  config.blockDim = dim3(threads);
  config.dynamicSmemBytes = shared;
  config.stream = static_cast<cudaStream_t>(stream);
  config.attrs = &attribute;
  config.numAttrs = cluster > 1 ? 1 : 0;
  return cudaLaunchKernelEx(&config, kernel, Args(args)...);
}

}  // namespace fastdiff::cuda
