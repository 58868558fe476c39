// Allows the AVX-512 build the bfloat16 dot product. The compiler emits that instruction only where it is called by
// name, which what includes this chooses at run time. To be included before anything else.
#pragma once

#if defined(CPU_CAPABILITY_AVX512) && defined(__GNUC__) && !defined(__clang__)
#pragma GCC target("avx512bf16")
#define FASTDIFF_BF16_DOT
#endif
