#include "convert.h"
#include "ops.h"
#include "parallel.h"
#include "scratch.h"

namespace fastdiff::cpu::CPU_CAPABILITY {

namespace {

constexpr int64_t PARALLEL = 32768;  // output elements below which threads cost more than they give
constexpr int64_t CHANNELS = 16;     // read or written together where they do not lie together on both sides

// One row of one phase: to[o][2j] = from[o][j], a Value being the bits of an element.
template <class Value>
void interleave_row(const UpsampleArgs& args, const Value* from, Value* to) {
  const int64_t from_c = args.from_strides[1], from_w = args.from_strides[3];
  const int64_t to_c = args.to_strides[1], to_w = 2 * args.to_strides[3];
  if (from_c == 1 && to_c == 1) {
    for (int64_t j = 0; j < args.width; ++j) memcpy(to + j * to_w, from + j * from_w, args.channels * sizeof(Value));
  } else if (from_c == 1) {
    for (int64_t first = 0; first < args.channels; first += CHANNELS) {
      const int64_t last = smaller(first + CHANNELS, args.channels);
      for (int64_t j = 0; j < args.width; ++j) {
        for (int64_t o = first; o < last; ++o) to[o * to_c + j * to_w] = from[o + j * from_w];
      }
    }
  } else {
    for (int64_t o = 0; o < args.channels; ++o) {
      for (int64_t j = 0; j < args.width; ++j) to[o * to_c + j * to_w] = from[o * from_c + j * from_w];
    }
  }
}

template <class Value>
void interleave(const UpsampleArgs& args) {
  const int64_t rows = 2 * args.height;
  const int threads = 4 * args.samples * args.channels * args.height * args.width < PARALLEL ? 1 : args.threads;
  parallel_for(args.samples * rows, threads, [&](int64_t task) {
    const int64_t sample = task / rows, row = task % rows, a = row % 2, i = row / 2;
    const Value* from = static_cast<const Value*>(args.from.data) + sample * args.from_strides[0];
    Value* to = static_cast<Value*>(args.to.data) + sample * args.to_strides[0] + row * args.to_strides[2];
    for (int64_t b = 0; b < 2; ++b) {
      const int64_t phase = (2 * a + b) * args.channels * args.from_strides[1];
      interleave_row(args, from + phase + (i + a) * args.from_strides[2] + b * args.from_strides[3],
                     to + b * args.to_strides[3]);
    }
  });
}

}  // namespace

void upsample_conv(const UpsampleArgs& args) {
  size_of(args.from.type) == 4 ? interleave<uint32_t>(args) : interleave<uint16_t>(args);
}

}  // namespace fastdiff::cpu::CPU_CAPABILITY
