// A run of the normals of philox.h, in vectors.
#pragma once

#include <cstdint>

namespace fastdiff::cpu::CPU_CAPABILITY {

constexpr int64_t NORMALS_TILE = 64;  // blocks of four elements computed together

// How much room `draw` needs for `count` elements.
constexpr int64_t normals_room(int64_t count) {
  return (count + 4 + 4 * NORMALS_TILE - 1) / (4 * NORMALS_TILE) * (4 * NORMALS_TILE);
}

// The normals of elements [element, element + count) of a sample: a pointer into the buffer. Compiled once, in
// philox_normal.cpp, so that every kernel draws the same bits.
const float* draw(uint64_t seed, int64_t element, int64_t count, uint32_t step, uint32_t stream, float* buffer);

}  // namespace fastdiff::cpu::CPU_CAPABILITY
