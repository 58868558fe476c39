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
    depth_ = ceil_divide(args.taps[0] * args.taps[1] * args.channels + args.second_channels, 2) * 2;
    pixels_ = args.samples * args.out_height * args.out_width;
    panels_ = ceil_divide(args.outputs, PANEL);
    in_place_ = args.taps[0] * args.taps[1] * args.stride[0] * args.stride[1] == 1 &&
                args.padding[0] + args.padding[1] == 0 && args.channels % 2 + args.second_channels % 2 == 0;
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
        const int64_t panel = task % panels_, later = smaller((thread + 1) * tasks / team - task, panels_ - panel);
        multiply(gathered.data(), first, rows, panel * PANEL, later);
      }
    });
  }

 private:
  // What a pixel of the result is made of, tap by tap and channel by channel; a row of taps lies as it does in the map.
  void gather(int64_t pixel, uint16_t* to) const {
    const int64_t line = pixel / args_.out_width, across = args_.taps[1] * args_.channels;
    const int64_t top = line % args_.out_height * args_.stride[0] - args_.padding[0];
    const int64_t left = pixel % args_.out_width * args_.stride[1] - args_.padding[1];
    const int64_t begin = left < 0 ? smaller(-left, args_.taps[1]) : 0;
    const int64_t end = smaller(args_.taps[1], args_.width - left);
    const uint16_t* sample = words(args_.x) + line / args_.out_height * args_.height * args_.width * args_.channels;
    for (int64_t row = top; row < top + args_.taps[0]; ++row, to += across) {
      if (row < 0 || row >= args_.height || begin >= end) {
        fill(to, 0, across);
        continue;
      }
      fill(to, 0, begin * args_.channels);
      std::memcpy(to + begin * args_.channels, sample + (row * args_.width + left + begin) * args_.channels,
                  (end - begin) * args_.channels * sizeof(uint16_t));
      fill(to, end * args_.channels, across);
    }
    const int64_t more = args_.second_channels;
    if (more > 0) std::memcpy(to, words(args_.second) + pixel * more, more * sizeof(uint16_t));
    fill(to, more, depth_ - args_.taps[0] * across);
  }

  static void fill(uint16_t* to, int64_t begin, int64_t end) {
    if (begin < end) std::memset(to + begin, 0, (end - begin) * sizeof(uint16_t));
  }

  // `rows` pixels from `first` on, for the panel of outputs at `output`, the first of `panels` with these pixels.
  void multiply(const uint16_t* gathered, int64_t first, int64_t rows, int64_t output, int64_t panels) const {
    alignas(64) float sums[BLOCK * PANEL];
    const int64_t outputs = smaller(PANEL, args_.outputs - output);
    const uint16_t* b = words(args_.weight) + output * depth_;
    const auto* end = reinterpret_cast<const char*>(b + panels * depth_ * PANEL);
    bool begun = false;
    const auto add = [&](const uint16_t* a, int64_t apart, int64_t depth) {
      for (int64_t k = 0; k < depth; k += CHUNK, begun = true) {
        const int64_t pairs = smaller(CHUNK, depth - k) / 2;
        const auto* left = reinterpret_cast<const uint32_t*>(a + k);
        const auto* right = reinterpret_cast<const uint32_t*>(b);
        b += 2 * pairs * PANEL;
        Ahead ahead{reinterpret_cast<const char*>(b), end};
        with_vectors(outputs, [&]<int VECTORS>() {
          multiply_bfloat16<VECTORS>(left, apart / 2, rows, right, PANEL, pairs, sums, PANEL, !begun, ahead);
        });
      }
    };
    if (in_place_) {
      add(words(args_.x) + first * args_.channels, args_.channels, args_.channels);
      add(words(args_.second) + first * args_.second_channels, args_.second_channels, args_.second_channels);
    } else {
      add(gathered, row_, depth_);
    }
    for (int64_t r = 0; r < rows; ++r) {
      for (int64_t o = 0; o < outputs; o += LANES) {
        finish((first + r) * args_.outputs + output + o, output + o, smaller(LANES, outputs - o), sums + r * PANEL + o);
      }
    }
  }

  // As many vectors as hold the outputs of a panel.
  template <class Function>
  static void with_vectors(int64_t outputs, const Function& function) {
    if (outputs > 3 * LANES) {
      function.template operator()<4>();
    } else if (outputs > 2 * LANES) {
      function.template operator()<3>();
    } else if (outputs > LANES) {
      function.template operator()<2>();
    } else {
      function.template operator()<1>();
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

// to[panel][k / 2][output of the panel][k % 2] = weight[output][channel][tap] with k = tap * channels + channel, zero
// beyond the last output and beyond the last k.
void pack_bfloat16(const PackBFloat16Args& args) {
  const int64_t values = args.channels * args.taps, depth = ceil_divide(values, 2) * 2;
  parallel_for(ceil_divide(args.outputs, PACKED_OUTPUTS), args.threads, [&](int64_t panel) {
    const int64_t first = panel * PACKED_OUTPUTS;
    uint16_t* to = args.to + first * depth;
    const auto place = [&](int64_t k) { return k % args.channels * args.taps + k / args.channels; };
    for (int64_t k = 0; k < depth; k += 2) {
      const int64_t low = place(k), high = place(k + 1);
      for (int64_t o = first; o < first + PACKED_OUTPUTS; ++o, to += 2) {
        to[0] = o < args.outputs ? args.weight[o * values + low] : 0;
        to[1] = o < args.outputs && k + 1 < values ? args.weight[o * values + high] : 0;
      }
    }
  });
}

}  // namespace fastdiff::cpu::CPU_CAPABILITY
