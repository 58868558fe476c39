// What the csrc/register*.cpp share, the only files that know torch: arrays of tensors, and the call of a kernel.
#pragma once

#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <pybind11/stl.h>
#include <torch/csrc/utils/pybind.h>

#ifdef FASTDIFF_CUDA
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#endif

#include "ops.h"
#include "register.h"

namespace fastdiff {

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;
using OptionalType = std::optional<at::ScalarType>;

inline Type type_of(at::ScalarType type) {
  return type == at::kHalf ? Type::F16 : type == at::kBFloat16 ? Type::BF16 : Type::F32;
}

inline Array array(const Tensor& tensor) { return {tensor.data_ptr(), type_of(tensor.scalar_type())}; }

inline Array array(const OptionalTensor& tensor) { return tensor ? array(*tensor) : Array{}; }

inline const float* floats(const OptionalTensor& tensor) { return tensor ? tensor->const_data_ptr<float>() : nullptr; }

inline const int64_t* integers(const OptionalTensor& tensor) {
  return tensor ? tensor->const_data_ptr<int64_t>() : nullptr;
}

inline at::MemoryFormat layout_of(const Tensor& x) {
  if (x.is_contiguous()) return at::MemoryFormat::Contiguous;
  return x.dim() == 5 ? at::MemoryFormat::ChannelsLast3d : at::MemoryFormat::ChannelsLast;
}

inline bool channels_last(const Tensor& x) { return !x.is_contiguous(); }

inline int64_t inner_of(const Tensor& x) { return channels_last(x) ? x.size(1) : 1; }

// A dense tensor: as it is if contiguous or channels-last, else a contiguous copy.
inline Tensor dense(const Tensor& x) {
  if (x.is_contiguous()) return x;
  if (x.dim() == 4 && x.is_contiguous(at::MemoryFormat::ChannelsLast)) return x;
  if (x.dim() == 5 && x.is_contiguous(at::MemoryFormat::ChannelsLast3d)) return x;
  return x.contiguous();
}

inline OptionalTensor contiguous(const OptionalTensor& x) { return x ? OptionalTensor(x->contiguous()) : x; }

#ifdef FASTDIFF_X86
#define ON_CPU(FUNCTION, ARGS)                                      \
  (capability() == Capability::AVX512 ? cpu::AVX512::FUNCTION(ARGS) \
   : capability() == Capability::AVX2 ? cpu::AVX2::FUNCTION(ARGS)   \
                                      : cpu::DEFAULT::FUNCTION(ARGS))
#else
#define ON_CPU(FUNCTION, ARGS) cpu::DEFAULT::FUNCTION(ARGS)
#endif

#ifdef FASTDIFF_CUDA
inline void check(int error) { C10_CUDA_CHECK(static_cast<cudaError_t>(error)); }

#define LAUNCH(FUNCTION, TENSOR, ...)                                               \
  if ((TENSOR).is_cuda()) {                                                         \
    const c10::cuda::CUDAGuard guard((TENSOR).device());                            \
    check(cuda::FUNCTION(__VA_ARGS__, c10::cuda::getCurrentCUDAStream().stream())); \
  } else
#else
#define LAUNCH(FUNCTION, TENSOR, ...)
#endif

}  // namespace fastdiff
