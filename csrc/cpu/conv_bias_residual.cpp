#include "attention_tile.h"
#include "ops.h"
#include "parallel.h"
#include "scratch.h"

namespace fastdiff::cpu::CPU_CAPABILITY {

namespace {

constexpr int64_t PANEL = PACKED_OUTPUTS;
constexpr int64_t CHUNK = 128;            // products summed in registers: a panel's share stays in the nearest cache
constexpr int64_t ROW = CHUNK + LANES;    // distance of gathered rows; not a power of two, so that they do not collide
constexpr int64_t BLOCK = 128;            // pixels that are gathered together
constexpr int VECTORS = LANES == 16 ? 4 : 2;
constexpr int64_t PARALLEL = 1 << 18;     // products below which threads cost more than they give

struct Pixel {
  const float* sample;
  int64_t top, left;
};

Pixel pixel(const ConvArgs& args, int64_t index) {
  const int64_t column = index % args.out_width, row = index / args.out_width;
  return {args.x + row / args.out_height * args.height * args.width * args.channels,
          row % args.out_height * args.stride[0] - args.padding[0], column * args.stride[1] - args.padding[1]};
}

// to[0 .. count): what the products from `first` on read for one pixel, tap by tap and channel by channel.
void gather(const ConvArgs& args, const Pixel& at, int64_t first, int64_t count, float* to) {
  int64_t tap = first / args.channels, channel = first % args.channels;
  while (count > 0) {
    const int64_t run = smaller(count, args.channels - channel);
    const int64_t row = at.top + tap / args.taps[1], column = at.left + tap % args.taps[1];
    if (row < 0 || row >= args.height || column < 0 || column >= args.width) {
      std::memset(to, 0, run * sizeof(float));
    } else {
      std::memcpy(to, at.sample + (row * args.width + column) * args.channels + channel, run * sizeof(float));
    }
    to += run, count -= run, channel = 0, ++tap;
  }
}

// What a tile's sums are added to, and where: in the first chunk the bias and the residual, later the result so far.
struct Target {
  const float *bias, *residual;
  float* out;
  int64_t stride, columns;
  bool first;

  float base(int64_t row, int64_t column) const {
    if (!first) return out[row * stride + column];
    return (bias ? bias[column] : 0.0f) + (residual ? residual[row * stride + column] : 0.0f);
  }

  Floats bases(int64_t row, int64_t column) const {
    if (!first) return get(out + row * stride + column);
    const Floats start = bias ? get(bias + column) : Floats{};
    return residual ? start + get(residual + row * stride + column) : start;
  }

  void add(int64_t row, int64_t column, Floats sum) const {
    if (column + LANES <= columns) return put(out + row * stride + column, sum + bases(row, column));
    float lanes[LANES];
    put(lanes, sum);
    for (int64_t o = column; o < columns; ++o) out[row * stride + o] = lanes[o - column] + base(row, o);
  }
};

template <int ROWS, int COUNT>
void multiply_tile(const float* a, const float* b, int64_t steps, int64_t row, int64_t column, const Target& target) {
  Floats sum[ROWS][COUNT] = {};
  for (int64_t t = 0; t < steps; ++t, b += PANEL) {
#pragma GCC unroll 16
    for (int r = 0; r < ROWS; ++r) {
#pragma GCC unroll 4
      for (int v = 0; v < COUNT; ++v) sum[r][v] = Float32::multiply_add(a[r * ROW + t], b + v * LANES, sum[r][v]);
    }
  }
#pragma GCC unroll 16
  for (int r = 0; r < ROWS; ++r) {
#pragma GCC unroll 4
    for (int v = 0; v < COUNT; ++v) target.add(row + r, column + v * LANES, sum[r][v]);
  }
}

template <int COUNT>
void multiply_rows(const float* a, int64_t rows, const float* b, int64_t steps, int64_t column, const Target& target) {
  for_tiles<TILE_ROWS<COUNT>>(0, rows, [&]<int ROWS>(int64_t row) {
    multiply_tile<ROWS, COUNT>(a + row * ROW, b, steps, row, column, target);
  });
}

void multiply_panel(const float* a, int64_t rows, const float* b, int64_t steps, const Target& target) {
  for (int64_t column = 0; column < target.columns; column += VECTORS * LANES, b += VECTORS * LANES) {
    const int64_t vectors = smaller(ceil_divide(target.columns - column, LANES), VECTORS);
    if (vectors == 1) multiply_rows<1>(a, rows, b, steps, column, target);
    if (vectors == 2) multiply_rows<2>(a, rows, b, steps, column, target);
    if constexpr (VECTORS == 4) {
      if (vectors == 3) multiply_rows<3>(a, rows, b, steps, column, target);
      if (vectors == 4) multiply_rows<4>(a, rows, b, steps, column, target);
    }
  }
}

}  // namespace

// A matrix product of gathered pixels (rows) with the packed weight. Sums of CHUNK products are made in registers and
// added up in the result: their rounding errors grow with the root of CHUNK, not of all products.
void conv_bias_residual(const ConvArgs& args) {
  const int64_t pixels = args.samples * args.out_height * args.out_width;
  const int64_t depth = args.taps[0] * args.taps[1] * args.channels, panels = ceil_divide(args.outputs, PANEL);
  const int64_t blocks = ceil_divide(pixels, BLOCK), rows = ceil_divide(pixels, blocks);
  const int threads = pixels * depth * args.outputs < PARALLEL ? 1 : args.threads;
  // Few pixels: the threads take a part of the weight each, which is read once.
  const int64_t parts = blocks >= 8 * threads ? 1 : smaller(threads, panels), share = ceil_divide(panels, parts);
  parallel_for(blocks * parts, threads, [&](int64_t task) {
    const int64_t begin = task / parts * rows, count = smaller(rows, pixels - begin);
    const int64_t start = task % parts * share, end = smaller(start + share, panels);
    if (count <= 0 || start >= end) return;
    alignas(64) float gathered[BLOCK * ROW];
    Pixel places[BLOCK];
    for (int64_t r = 0; r < count; ++r) places[r] = pixel(args, begin + r);
    for (int64_t k = 0; k < depth; k += CHUNK) {
      const int64_t steps = smaller(CHUNK, depth - k);
      for (int64_t r = 0; r < count; ++r) gather(args, places[r], k, steps, gathered + r * ROW);
      for (int64_t panel = start; panel < end; ++panel) {
        const int64_t first = panel * PANEL, offset = begin * args.outputs + first;
        const Target target{args.bias ? args.bias + first : nullptr, args.residual ? args.residual + offset : nullptr,
                            args.out + offset, args.outputs, smaller(PANEL, args.outputs - first), k == 0};
        multiply_panel(gathered, count, args.weight + (panel * depth + k) * PANEL, steps, target);
      }
    }
  });
}

// to[panel][tap][channel][output of the panel] = weight[output][channel][tap], zero beyond the last output.
void pack_weight(const PackArgs& args) {
  const int64_t depth = args.channels * args.taps;
  parallel_for(ceil_divide(args.outputs, PANEL), args.threads, [&](int64_t panel) {
    const float* from = args.weight + panel * PANEL * depth;
    float* to = args.to + panel * PANEL * depth;
    const int64_t count = smaller(PANEL, args.outputs - panel * PANEL);
    for (int64_t c = 0; c < args.channels; ++c) {
      for (int64_t tap = 0; tap < args.taps; ++tap) {
        float* row = to + (tap * args.channels + c) * PANEL;
        for (int64_t o = 0; o < count; ++o) row[o] = from[o * depth + c * args.taps + tap];
        for (int64_t o = count; o < PANEL; ++o) row[o] = 0.0f;
      }
    }
  });
}

}  // namespace fastdiff::cpu::CPU_CAPABILITY
