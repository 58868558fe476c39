#include "bfloat16_dot.h"
#include "bfloat16_products.h"
#include "convert.h"
#include "winograd_packed.h"

namespace fastdiff::cpu::CPU_CAPABILITY {

#ifdef FASTDIFF_BF16_DOT

namespace {

// What winograd.h asks of an element: for bfloat16, transformed in float32, rounded, multiplied with sums in float32.
struct WinogradBFloat16 {
  using Element = uint16_t;
  static constexpr int PAIR = 2;
  static constexpr int COLUMNS = 64;
  static constexpr int64_t DEPTH = 512;
  static constexpr int64_t STRIP = 48;
  static constexpr int64_t STRIP_BYTES = 1 << 19;

  static Floats load(const uint16_t* from) { return get_bfloat16(from); }
  static void store(uint16_t* to, Floats x) { put_bfloat16(to, x); }

  static void multiply(const uint16_t* v, int64_t stride, int64_t rows, const uint16_t* u, int64_t depth, float* m,
                       bool first) {
    multiply_bfloat16<COLUMNS / LANES>(reinterpret_cast<const uint32_t*>(v), stride / 2, rows,
                                       reinterpret_cast<const uint32_t*>(u), COLUMNS, depth / 2, m, COLUMNS, first);
  }
};

constexpr int COLUMNS = WinogradBFloat16::COLUMNS;

// u = G g G^T of LANES outputs from `output` on; zero for what there is not.
void filter(const WinogradPackArgs& args, int64_t output, int64_t channel, Floats (&u)[4][4]) {
  Floats g[3][3] = {}, half[4][3];
  if (channel < args.channels) {
    for (int tap = 0; tap < 9; ++tap) {
      float lanes[LANES] = {};
      for (int64_t o = 0; o < smaller(LANES, args.outputs - output); ++o) {
        lanes[o] = from_bfloat16(args.weight[((output + o) * args.channels + channel) * 9 + tap]);
      }
      g[tap / 3][tap % 3] = get(lanes);
    }
  }
  for (int j = 0; j < 3; ++j) {
    const Floats column[3] = {g[0][j], g[1][j], g[2][j]};
    Floats result[4];
    Transform<2>::weight(column, result);
    for (int i = 0; i < 4; ++i) half[i][j] = result[i];
  }
  for (int i = 0; i < 4; ++i) Transform<2>::weight(half[i], u[i]);
}

}  // namespace

void pack_winograd_bfloat16(const WinogradPackArgs& args) {
  const Frequencies frequencies(args.doubled);
  const int64_t depth = ceil_divide(args.channels, 16) * 16;
  parallel_for(ceil_divide(args.outputs, COLUMNS), args.threads, [&](int64_t block) {
    uint16_t* to = args.to + block * frequencies.count() * depth * COLUMNS;
    for (int64_t o = 0; o < COLUMNS; o += LANES) {
      for (int64_t c = 0; c < depth; c += 2) {
        Floats even[4][4] = {}, odd[4][4] = {};
        filter(args, block * COLUMNS + o, c, even);
        filter(args, block * COLUMNS + o, c + 1, odd);
        uint16_t* pair = to + c * COLUMNS + 2 * o;
        for (const int f : frequencies) {
          BFloat16::store_pairs(reinterpret_cast<uint32_t*>(pair), even[f / 4][f % 4], odd[f / 4][f % 4]);
          pair += depth * COLUMNS;
        }
      }
    }
  });
}

bool has_bfloat16_products() { return __builtin_cpu_supports("avx512bf16"); }

int64_t winograd_bfloat16_scratch(const WinogradArgs& args) { return WinogradPacked<WinogradBFloat16>(args).scratch(); }

void winograd_bfloat16(const WinogradArgs& args) { WinogradPacked<WinogradBFloat16>(args).run(); }

#else

bool has_bfloat16_products() { return false; }

void pack_winograd_bfloat16(const WinogradPackArgs&) {}

int64_t winograd_bfloat16_scratch(const WinogradArgs&) { return 0; }

void winograd_bfloat16(const WinogradArgs&) {}

#endif

}  // namespace fastdiff::cpu::CPU_CAPABILITY
