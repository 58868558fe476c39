// What the processor has that no build of the kernels uses.
#pragma once

#include <cstdint>

#ifdef FASTDIFF_X86
#include <cpuid.h>
#endif

namespace fastdiff {

// Whether it multiplies tiles of bfloat16 (AMX), and the system keeps the registers of tiles: Intel SDM volume 1,
// section 18.3.
inline bool has_bfloat16_tiles() {
#ifdef FASTDIFF_X86
  constexpr uint32_t OSXSAVE = 1u << 27, AMX_BF16 = 1u << 22, AMX_TILE = 1u << 24, TILE_STATE = 3u << 17;
  uint32_t a, b, c, d;
  if (!__get_cpuid(1, &a, &b, &c, &d) || !(c & OSXSAVE)) return false;
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || (d & (AMX_BF16 | AMX_TILE)) != (AMX_BF16 | AMX_TILE)) return false;
  uint32_t low, high;
  asm volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  return (low & TILE_STATE) == TILE_STATE;
#else
  return false;
#endif
}

}  // namespace fastdiff
