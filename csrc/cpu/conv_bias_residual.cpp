#include "attention_tile.h"
#include "elements.h"
#include "ops.h"
#include "parallel.h"
#include "scratch.h"

namespace fastdiff::cpu::CPU_CAPABILITY {

namespace {

constexpr int64_t PANEL = PACKED_OUTPUTS;
// Products summed in registers: what a tile reads of a panel stays in the nearest cache, of which columns that are a
// quarter of a panel reach a quarter.
constexpr int64_t CHUNK = LANES == 16 ? 128 : 64;
constexpr int64_t ROW = CHUNK + LANES;    // distance of gathered rows; not a power of two, so that they do not collide
constexpr int64_t BLOCK = 128;            // pixels that are gathered together
constexpr int VECTORS = LANES == 16 ? 4 : 2;
constexpr int64_t PARALLEL = 1 << 18;     // products below which threads cost more than they give

struct Pixel {
  int64_t sample, top, left;
};

Pixel pixel(const ConvArgs& args, int64_t index) {
  const int64_t column = index % args.out_width, row = index / args.out_width;
  return {row / args.out_height * args.height * args.width * args.channels,
          row % args.out_height * args.stride[0] - args.padding[0], column * args.stride[1] - args.padding[1]};
}

// Where a product reads, seen from its pixel.
struct Tap {
  int64_t row, column, channel;
};

Tap tap(const ConvArgs& args, int64_t product) {
  const int64_t index = product / args.channels;
  return {index / args.taps[1], index % args.taps[1], product % args.channels};
}

// to[0 .. count): what the products from `next` on read for one pixel, tap by tap and channel by channel.
template <class Element>
void gather(const ConvArgs& args, const Pixel& at, Tap next, int64_t count, float* to) {
  const Element* sample = static_cast<const Element*>(args.x) + at.sample;
  while (count > 0) {
    const int64_t run = smaller(count, args.channels - next.channel);
    const int64_t row = at.top + next.row, column = at.left + next.column;
    if (row < 0 || row >= args.height || column < 0 || column >= args.width) {
      std::memset(to, 0, run * sizeof(float));
    } else {
      widen(sample + (row * args.width + column) * args.channels + next.channel, run, to);
    }
    to += run, count -= run, next.channel = 0;
    if (++next.column == args.taps[1]) next.column = 0, ++next.row;
  }
}

// What a tile's sums are added to, and where: in the first chunk the bias and the residual, later the sums so far, which
// lie in whole vectors.
template <class Element>
struct Target {
  const float* bias;
  const Element* residual;
  float* sums;
  int64_t residual_stride, stride, columns;
  bool first;

  void add(int64_t row, int64_t column, Floats sum) const {
    float* to = sums + row * stride + column;
    put(to, sum + (first ? start(row, column) : get(to)));
  }

 private:
  Floats start(int64_t row, int64_t column) const {
    const Floats own = bias ? read_some(bias + column, columns - column) : Floats{};
    return residual ? own + read_some(residual + row * residual_stride + column, columns - column) : own;
  }
};

// to[row][vector] = sum over t < steps of a[row][t] b[t][vector]. A function of its own, so that what is done with the
// sums takes no registers from the loop.
template <int ROWS, int COUNT, class Element>
[[gnu::noinline]] void sum_products(const float* a, const Element* b, int64_t steps, float* to) {
  Floats sum[ROWS][COUNT] = {};
  for (int64_t t = 0; t < steps; ++t, b += PANEL) {
    Floats weights[COUNT];
#pragma GCC unroll 4
    for (int v = 0; v < COUNT; ++v) weights[v] = read(b + v * LANES);
#pragma GCC unroll 16
    for (int r = 0; r < ROWS; ++r) {
      const Floats value = broadcast(a[r * ROW + t]);
#pragma GCC unroll 4
      for (int v = 0; v < COUNT; ++v) sum[r][v] += value * weights[v];
    }
  }
#pragma GCC unroll 16
  for (int r = 0; r < ROWS; ++r) {
#pragma GCC unroll 4
    for (int v = 0; v < COUNT; ++v) put(to + (r * COUNT + v) * LANES, sum[r][v]);
  }
}

template <int ROWS, int COUNT, class Element>
void multiply_tile(const float* a, const Element* b, int64_t steps, int64_t row, int64_t column,
                   const Target<Element>& target) {
  alignas(64) float sums[ROWS * COUNT * LANES];
  sum_products<ROWS, COUNT>(a, b, steps, sums);
  for (int r = 0; r < ROWS; ++r) {
    for (int v = 0; v < COUNT; ++v) target.add(row + r, column + v * LANES, get(sums + (r * COUNT + v) * LANES));
  }
}

template <int COUNT, class Element>
void multiply_rows(const float* a, int64_t rows, const Element* b, int64_t steps, int64_t column,
                   const Target<Element>& target) {
  for_tiles<TILE_ROWS<COUNT>>(0, rows, [&]<int ROWS>(int64_t row) {
    multiply_tile<ROWS, COUNT>(a + row * ROW, b, steps, row, column, target);
  });
}

template <class Element>
void multiply_panel(const float* a, int64_t rows, const Element* b, int64_t steps, const Target<Element>& target) {
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

// A block of pixels, `count` from `begin` on, and a part of the panels, from `start` to before `end`.
struct Part {
  int64_t begin, count, start, end;
};

// Sums of CHUNK products are made in registers and added up in the result, or in memory of their own where that holds
// no whole vectors of float32: their rounding errors grow with the root of CHUNK, not of all products.
template <class Element>
void convolve(const ConvArgs& args, const Part& part) {
  const int64_t depth = args.taps[0] * args.taps[1] * args.channels, first_output = part.start * PANEL;
  const int64_t width = smaller(part.end * PANEL, args.outputs) - first_output;
  const bool in_place = sizeof(Element) == sizeof(float) && width % LANES == 0;
  const int64_t offset = part.begin * args.outputs + first_output;
  const int64_t stride = in_place ? args.outputs : ceil_divide(width, LANES) * LANES;
  Element* out = static_cast<Element*>(args.out) + offset;
  const Element* residual = args.residual ? static_cast<const Element*>(args.residual) + offset : nullptr;
  const Scratch<float> own(in_place ? 1 : part.count * stride);
  float* sums = in_place ? reinterpret_cast<float*>(out) : own.data();
  alignas(64) float gathered[BLOCK * ROW];
  Pixel places[BLOCK];
  for (int64_t r = 0; r < part.count; ++r) places[r] = pixel(args, part.begin + r);
  for (int64_t k = 0; k < depth; k += CHUNK) {
    const int64_t steps = smaller(CHUNK, depth - k);
    const Tap first = tap(args, k);
    for (int64_t r = 0; r < part.count; ++r) gather<Element>(args, places[r], first, steps, gathered + r * ROW);
    for (int64_t at = 0; at < width; at += PANEL) {
      const Target<Element> target{args.bias ? args.bias + first_output + at : nullptr,
                                   residual ? residual + at : nullptr,
                                   sums + at,
                                   args.outputs,
                                   stride,
                                   smaller(PANEL, width - at),
                                   k == 0};
      const Element* weight = static_cast<const Element*>(args.weight) + (first_output + at) * depth + k * PANEL;
      multiply_panel(gathered, part.count, weight, steps, target);
    }
  }
  for (int64_t r = 0; !in_place && r < part.count; ++r) {
    for (int64_t o = 0; o < width; o += LANES) {
      write_some(out + r * args.outputs + o, get(sums + r * stride + o), width - o);
    }
  }
}

}  // namespace

// A matrix product of gathered pixels (rows) with the packed weight, in float32.
void conv_bias_residual(const ConvArgs& args) {
  const int64_t pixels = args.samples * args.out_height * args.out_width;
  const int64_t depth = args.taps[0] * args.taps[1] * args.channels, panels = ceil_divide(args.outputs, PANEL);
  const int64_t blocks = ceil_divide(pixels, BLOCK), rows = ceil_divide(pixels, blocks);
  const int threads = pixels * depth * args.outputs < PARALLEL ? 1 : args.threads;
  // Few pixels: the threads take a part of the weight each, which is read once.
  const int64_t parts = blocks >= 8 * threads ? 1 : smaller(threads, panels), share = ceil_divide(panels, parts);
  parallel_for(blocks * parts, threads, [&](int64_t task) {
    const int64_t begin = task / parts * rows, start = task % parts * share;
    const Part part{begin, smaller(rows, pixels - begin), start, smaller(start + share, panels)};
    if (part.count <= 0 || part.start >= part.end) return;
    args.type == Type::F32 ? convolve<float>(args, part) : convolve<uint16_t>(args, part);
  });
}

// to[panel][tap][channel][output of the panel] = weight[output][channel][tap], zero beyond the last output.
template <class Element>
static void pack(const PackArgs& args) {
  const int64_t depth = args.channels * args.taps;
  parallel_for(ceil_divide(args.outputs, PANEL), args.threads, [&](int64_t panel) {
    const Element* from = static_cast<const Element*>(args.weight) + panel * PANEL * depth;
    Element* to = static_cast<Element*>(args.to) + panel * PANEL * depth;
    const int64_t count = smaller(PANEL, args.outputs - panel * PANEL);
    for (int64_t c = 0; c < args.channels; ++c) {
      for (int64_t tap = 0; tap < args.taps; ++tap) {
        Element* row = to + (tap * args.channels + c) * PANEL;
        for (int64_t o = 0; o < count; ++o) row[o] = from[o * depth + c * args.taps + tap];
        for (int64_t o = count; o < PANEL; ++o) row[o] = 0;
      }
    }
  });
}

void pack_weight(const PackArgs& args) { args.type == Type::F32 ? pack<float>(args) : pack<uint16_t>(args); }

}  // namespace fastdiff::cpu::CPU_CAPABILITY
