#include "bfloat16_dot.h"
#include "bfloat16_products.h"
#include "ops.h"
#include "parallel.h"
#include "scratch.h"

namespace fastdiff::cpu::CPU_CAPABILITY {

#ifdef FASTDIFF_BF16_DOT

namespace {

constexpr int64_t PANEL = PACKED_OUTPUTS;
constexpr int64_t CHUNK = 512;         // values multiplied at a time: a panel's share stays in the cache
constexpr int64_t BLOCK = 48;          // pixels at most that are multiplied together
constexpr int64_t GATHERED = 1 << 19;  // bytes of them, where that leaves 12
constexpr int64_t APART = 32;          // values between gathered rows, so that they do not collide in a cache
constexpr int64_t PARALLEL = 1 << 19;  // products below which threads cost more than they give

const uint16_t* words(const void* data) { return static_cast<const uint16_t*>(data); }

class Convolution {
 public:
  explicit Convolution(const ConvolveBFloat16Args& args) : args_(args) {
    depth_ = args.taps[0] * args.taps[1] * args.channels;
    pixels_ = args.samples * args.out_height * args.out_width;
    panels_ = ceil_divide(args.outputs, PANEL);
    in_place_ =
        depth_ == args.channels && args.stride[0] * args.stride[1] == 1 && args.padding[0] + args.padding[1] == 0;
    row_ = in_place_ ? depth_ : depth_ + APART;
    const int64_t fit = GATHERED / (2 * row_);
    const int64_t blocks = ceil_divide(pixels_, in_place_ ? BLOCK : fit < 12 ? 12 : smaller(fit, BLOCK));
    rows_ = ceil_divide(pixels_, blocks);
    blocks_ = ceil_divide(pixels_, rows_);
  }

  void run() const {
    const int64_t tasks = blocks_ * panels_;
    const int threads = pixels_ * depth_ * args_.outputs < PARALLEL ? 1 : args_.threads;
    parallel_stages(threads, [&](int64_t thread, int64_t team, const auto&) {
      const Scratch<uint16_t> gathered(in_place_ ? 1 : rows_ * row_);
      int64_t ready = -1;
      for (int64_t task = thread * tasks / team; task < (thread + 1) * tasks / team; ++task) {
        const int64_t block = task / panels_, first = block * rows_, rows = smaller(rows_, pixels_ - first);
        if (!in_place_ && block != ready) {
          for (int64_t r = 0; r < rows; ++r) gather(first + r, &gathered[r * row_]);
          ready = block;
        }
        multiply(in_place_ ? words(args_.x) + first * depth_ : gathered.data(), first, rows, task % panels_ * PANEL);
      }
    });
  }

 private:
  // What a pixel of the result is made of, tap by tap and channel by channel.
  void gather(int64_t pixel, uint16_t* to) const {
    const int64_t line = pixel / args_.out_width, size = args_.channels * static_cast<int64_t>(sizeof(uint16_t));
    const int64_t top = line % args_.out_height * args_.stride[0] - args_.padding[0];
    const int64_t left = pixel % args_.out_width * args_.stride[1] - args_.padding[1];
    const uint16_t* sample = words(args_.x) + line / args_.out_height * args_.height * args_.width * args_.channels;
    for (int64_t row = top; row < top + args_.taps[0]; ++row) {
      for (int64_t column = left; column < left + args_.taps[1]; ++column, to += args_.channels) {
        if (row < 0 || row >= args_.height || column < 0 || column >= args_.width) {
          std::memset(to, 0, size);
        } else {
          std::memcpy(to, sample + (row * args_.width + column) * args_.channels, size);
        }
      }
    }
  }

  void multiply(const uint16_t* a, int64_t first, int64_t rows, int64_t output) const {
    alignas(64) float sums[BLOCK * PANEL];
    const int64_t outputs = smaller(PANEL, args_.outputs - output);
    const uint16_t* b = words(args_.weight) + output * depth_;
    for (int64_t k = 0; k < depth_; k += CHUNK) {
      const int64_t pairs = smaller(CHUNK, depth_ - k) / 2;
      const auto* left = reinterpret_cast<const uint32_t*>(a + k);
      const auto* right = reinterpret_cast<const uint32_t*>(b + k * PANEL);
      const auto with = [&]<int VECTORS>() {
        multiply_bfloat16<VECTORS>(left, row_ / 2, rows, right, PANEL, pairs, sums, PANEL, k == 0);
      };
      if (outputs > 3 * LANES) {
        with.template operator()<4>();
      } else if (outputs > 2 * LANES) {
        with.template operator()<3>();
      } else if (outputs > LANES) {
        with.template operator()<2>();
      } else {
        with.template operator()<1>();
      }
    }
    for (int64_t r = 0; r < rows; ++r) {
      for (int64_t o = 0; o < outputs; o += LANES) {
        finish((first + r) * args_.outputs + output + o, output + o, smaller(LANES, outputs - o), sums + r * PANEL + o);
      }
    }
  }

  // `count` sums with bias and addend, at `offset` of the result.
  void finish(int64_t offset, int64_t output, int64_t count, const float* sums) const {
    const auto some = static_cast<__mmask16>((1 << count) - 1);
    const auto load = [&](const void* from, int64_t at) {
      const __m512i wide = _mm512_maskz_cvtepu16_epi32(some, _mm256_maskz_loadu_epi16(some, words(from) + at));
      return (Floats)_mm512_maskz_slli_epi32(some, wide, 16);
    };
    Floats y = get(sums);
    if (args_.bias) y += load(args_.bias, output);
    if (args_.addend) y += load(args_.addend, offset);
    _mm256_mask_storeu_epi16(static_cast<uint16_t*>(args_.out) + offset, some, (__m256i)_mm512_cvtneps_pbh(y));
  }

  const ConvolveBFloat16Args& args_;
  int64_t depth_, pixels_, panels_, row_, rows_, blocks_;
  bool in_place_;
};

}  // namespace

// A matrix product of the pixels' neighbourhoods (rows) with the packed weight.
void convolve_bfloat16(const ConvolveBFloat16Args& args) { Convolution(args).run(); }

#else

void convolve_bfloat16(const ConvolveBFloat16Args&) {}

#endif

// to[panel][tap][channel / 2][output of the panel][channel % 2] = weight[output][channel][tap], zero beyond the last
// output.
void pack_bfloat16(const PackBFloat16Args& args) {
  const int64_t depth = args.channels * args.taps;
  parallel_for(ceil_divide(args.outputs, PACKED_OUTPUTS), args.threads, [&](int64_t panel) {
    const int64_t first = panel * PACKED_OUTPUTS;
    uint16_t* to = args.to + first * depth;
    for (int64_t k = 0; k < depth; k += 2) {
      const int64_t from = k % args.channels * args.taps + k / args.channels;
      for (int64_t o = first; o < first + PACKED_OUTPUTS; ++o, to += 2) {
        to[0] = o < args.outputs ? args.weight[o * depth + from] : 0;
        to[1] = o < args.outputs ? args.weight[o * depth + from + args.taps] : 0;
      }
    }
  });
}

}  // namespace fastdiff::cpu::CPU_CAPABILITY
