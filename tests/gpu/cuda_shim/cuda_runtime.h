// A CPU in place of a GPU: as much of CUDA as csrc/cuda uses, so that g++ compiles the kernels unchanged.
//
// Threads are fibers: each runs until a barrier or a warp shuffle, then the next one does. What two threads do between
// two barriers happens in the order that `Order` names, so a missing barrier shows as a different result in one of
// them, and shared memory starts as NaN. A barrier or shuffle that some of its threads never reach is an error.
#pragma once

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <functional>

#define __CUDA_ARCH__ 900
#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __align__(N) alignas(N)
#define FASTDIFF_SHARED(NAME) unsigned char* NAME = shim::shared_memory()

struct alignas(8) float2 {
  float x, y;
};
struct alignas(16) float4 {
  float x, y, z, w;
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};
struct uint3 {
  unsigned x, y, z;
};
struct dim3 {
  unsigned x = 1, y = 1, z = 1;
  dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

extern uint3 threadIdx, blockIdx;
extern dim3 blockDim, gridDim;

enum cudaError_t {
  cudaSuccess = 0,
  cudaErrorInvalidValue = 1,
  cudaErrorInvalidConfiguration = 9,
  cudaErrorUnknown = 999
};
enum cudaDeviceAttr { cudaDevAttrMultiProcessorCount = 16, cudaDevAttrComputeCapabilityMajor = 75 };
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize = 8 };
enum cudaLaunchAttributeID { cudaLaunchAttributeClusterDimension = 4 };
using cudaStream_t = void*;

struct cudaFuncAttributes {
  int ptxVersion;
};
struct cudaLaunchAttribute {
  cudaLaunchAttributeID id;
  struct {
    struct {
      unsigned x, y, z;
    } clusterDim;
  } val;
};
struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes;
  cudaStream_t stream;
  cudaLaunchAttribute* attrs;
  unsigned numAttrs;
};

namespace shim {

constexpr size_t MAX_SHARED = 227 * 1024;  // of sm_90

// In reverse, the last block of a cluster runs as far as it can before the others do.
enum class Order { FORWARD, REVERSE, RANDOM };

struct Settings {
  Order order = Order::FORWARD;
  int major = 9, multiprocessors = 132;
  bool barriers = true;  // false: __syncthreads does nothing, to show that the tests would notice
  bool clusters = true;  // false: the cluster's barriers do nothing
};
extern Settings settings;

cudaError_t launch(const cudaLaunchConfig_t& config, const std::function<void()>& kernel);
unsigned char* shared_memory();
unsigned char* shared_memory_of(void* mine, unsigned rank);
float exchange(float value, unsigned lane_mask, int from_lane);
int lane();
void cluster_arrive();
void cluster_wait();

}  // namespace shim

void __syncthreads();

inline float __shfl_xor_sync(unsigned mask, float value, int offset) {
  return shim::exchange(value, mask, shim::lane() ^ offset);
}
inline float __shfl_down_sync(unsigned mask, float value, int offset) {
  return shim::exchange(value, mask, shim::lane() + offset < 32 ? shim::lane() + offset : shim::lane());
}

template <class T>
T __ldg(const T* from) {
  return *from;
}
inline void __stwb(uint4* to, uint4 value) { *to = value; }
inline unsigned __float_as_uint(float value) {
  unsigned bits;
  std::memcpy(&bits, &value, sizeof(bits));
  return bits;
}
inline float __uint_as_float(unsigned bits) {
  float value;
  std::memcpy(&value, &bits, sizeof(value));
  return value;
}
inline float __expf(float value) { return std::exp(value); }
inline float __fdividef(float a, float b) { return a / b; }

inline cudaError_t cudaGetDevice(int* device) {
  *device = 0;
  return cudaSuccess;
}
inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  *value = attribute == cudaDevAttrComputeCapabilityMajor ? shim::settings.major : shim::settings.multiprocessors;
  return cudaSuccess;
}
inline cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* attributes, const void*) {
  attributes->ptxVersion = 90;
  return cudaSuccess;
}
inline cudaError_t cudaFuncSetAttribute(const void*, cudaFuncAttribute, int bytes) {
  return bytes > static_cast<int>(shim::MAX_SHARED) ? cudaErrorInvalidValue : cudaSuccess;
}
template <class... Parameters, class... Args>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Parameters...), Args&&... args) {
  return shim::launch(*config, [&] { kernel(args...); });
}
