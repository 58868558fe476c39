#include "bfloat16_dot.h"
#include "bfloat16_products.h"
#include "winograd_packed.h"

namespace fastdiff::cpu::CPU_CAPABILITY {

#ifdef FASTDIFF_BF16_DOT

namespace {

// What winograd.h asks of an element: for bfloat16, transformed in float32, rounded, multiplied with sums in float32.
struct WinogradBFloat16 {
  using Element = uint16_t;
  using Value = uint16_t;
  static constexpr int PAIR = 2;
  static constexpr int COLUMNS = 64;
  static constexpr int64_t DEPTH = 512;
  static constexpr int64_t SHARED_DEPTH = 128;
  static constexpr int64_t STRIP = 48;
  static constexpr int64_t SHARED_STRIP = 96;
  static constexpr int64_t STRIP_BYTES = 1 << 19;

  static Floats load(const uint16_t* from) { return get_bfloat16(from); }
  static void store(uint16_t* to, Floats x) { put_bfloat16(to, x); }

  static void multiply(const uint16_t* v, int64_t stride, int64_t rows, const uint16_t* u, int64_t depth, float* m,
                       bool first, Ahead& ahead) {
    multiply_bfloat16<COLUMNS / LANES>(reinterpret_cast<const uint32_t*>(v), stride / 2, rows,
                                       reinterpret_cast<const uint32_t*>(u), COLUMNS, depth / 2, m, COLUMNS, first,
                                       ahead);
  }

  // to[f][k] = (G g G^T)[f] of g[tap] = from[tap * apart + k], for k < count, a multiple of 32; none where to[f] is
  // null.
  static void filter(const uint16_t* from, int64_t apart, int64_t count, uint16_t* const (&to)[16]) {
    for (int64_t k = 0; k < count; k += 2 * LANES) {
      Floats low[16], high[16];
      filter_lanes(from + k, apart, low);
      filter_lanes(from + k + LANES, apart, high);
#pragma GCC unroll 16
      for (int f = 0; f < 16; ++f) {
        if (to[f]) _mm512_storeu_si512(to[f] + k, (__m512i)_mm512_cvtne2ps_pbh(high[f], low[f]));
      }
    }
  }

 private:
  static void filter_lanes(const uint16_t* from, int64_t apart, Floats (&u)[16]) {
    Floats half[4][3];
#pragma GCC unroll 3
    for (int j = 0; j < 3; ++j) {
      Floats g[3], column[4];
#pragma GCC unroll 3
      for (int i = 0; i < 3; ++i) g[i] = get_bfloat16(from + (3 * i + j) * apart);
      Transform<2>::weight(g, column);
#pragma GCC unroll 4
      for (int i = 0; i < 4; ++i) half[i][j] = column[i];
    }
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
      Floats row[4];
      Transform<2>::weight(half[i], row);
#pragma GCC unroll 4
      for (int j = 0; j < 4; ++j) u[4 * i + j] = row[j];
    }
  }
};

}  // namespace

bool has_bfloat16_products() { return __builtin_cpu_supports("avx512bf16"); }

int64_t winograd_bfloat16_scratch(const WinogradArgs& args) { return WinogradPacked<WinogradBFloat16>(args).scratch(); }

void winograd_bfloat16(const WinogradArgs& args) { WinogradPacked<WinogradBFloat16>(args).run(); }

#else

bool has_bfloat16_products() { return false; }

int64_t winograd_bfloat16_scratch(const WinogradArgs&) { return 0; }

void winograd_bfloat16(const WinogradArgs&) {}

#endif

}  // namespace fastdiff::cpu::CPU_CAPABILITY
