// The normals of csrc/philox.h, eight consecutive elements of one sample at a time.
#pragma once

#include "philox.h"
#include "vector.cuh"

namespace fastdiff::cuda {

// `element` is a multiple of four.
__device__ __forceinline__ void draw_eight(int64_t seed, int64_t element, uint32_t step, uint32_t stream,
                                           float (&out)[WIDTH]) {
  const uint64_t block = static_cast<uint64_t>(element) / 4;
  philox::normals(static_cast<uint64_t>(seed), block, step, stream, out);
  philox::normals(static_cast<uint64_t>(seed), block + 1, step, stream, out + 4);
}

}  // namespace fastdiff::cuda
