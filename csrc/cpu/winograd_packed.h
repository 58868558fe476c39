// A 3x3 convolution by F(2 x 2, 3 x 3) with weights that were transformed once. A thread transforms a strip of tiles,
// multiplies and transforms back while all of it is in the cache nearest to it. Where tiles are few the threads share
// them, and each takes a part of the weights, which are read once.
#pragma once

#include "winograd.h"

namespace fastdiff::cpu::CPU_CAPABILITY {
namespace {

// The products that count, of 16. With each pixel doubled the second and third of four neighbours are the same, and
// their difference, v[2], is zero.
class Frequencies {
 public:
  explicit Frequencies(bool doubled) {
    for (int f = 0; f < 16; ++f) {
      if (!doubled || (f / 4 != 2 && f % 4 != 2)) list_[count_++] = f;
    }
  }

  const int* begin() const { return list_; }
  const int* end() const { return list_ + count_; }
  int64_t count() const { return count_; }

 private:
  int list_[16], count_ = 0;
};

template <class Product>
class WinogradPacked : Winograd<Product, 2> {
  using Base = Winograd<Product, 2>;
  using Element = typename Product::Element;
  using Base::args_, Base::tiles_, Base::depth_, Base::row_, Base::rows_, Base::v_apart_, Base::m_apart_, Base::v_,
      Base::m_, Base::zeros_, Base::alone_;
  static constexpr int COLUMNS = Product::COLUMNS;
  static constexpr int64_t ALONE = 96;  // tiles of a thread from which on it does not share them

 public:
  explicit WinogradPacked(const WinogradArgs& args) : Base(args), frequencies_(args.doubled) {
    blocks_ = ceil_divide(args.outputs, COLUMNS);
    alone_ = tiles_ >= ALONE * args.threads;
    const int64_t fit = Product::STRIP_BYTES / (16 * row_ * static_cast<int64_t>(sizeof(Element))) / 6 * 6;
    int64_t strips = ceil_divide(tiles_, fit < 12 ? 12 : smaller(fit, Product::STRIP));
    if (alone_) strips = ceil_divide(strips, args.threads) * args.threads;
    while (!alone_ && blocks_ * strips % args.threads != 0 && tiles_ > 6 * strips) ++strips;
    rows_ = ceil_divide(tiles_, strips);
    strips_ = ceil_divide(tiles_, rows_);
    v_apart_ = (alone_ ? rows_ : tiles_) * row_ + APART;
    m_apart_ = rows_ * COLUMNS + APART;
  }

  int64_t scratch() const {
    return Base::template bytes<Element>(args_.channels + LANES) +
           args_.threads * Base::template bytes<float>(16 * m_apart_) +
           (alone_ ? args_.threads : 1) * Base::template bytes<Element>(16 * v_apart_);
  }

  void run() {
    char* at = static_cast<char*>(args_.scratch);
    Element* zeros = Base::template take<Element>(at, args_.channels + LANES);
    std::memset(zeros, 0, (args_.channels + LANES) * sizeof(Element));
    zeros_ = zeros;
    const int64_t m = Base::template bytes<float>(16 * m_apart_), v = Base::template bytes<Element>(16 * v_apart_);
    parallel_stages(args_.threads, [&](int64_t thread, int64_t team, const auto& wait) {
      WinogradPacked own = *this;
      own.m_ = reinterpret_cast<float*>(at + thread * m);
      own.v_ = reinterpret_cast<Element*>(at + args_.threads * m + (alone_ ? thread * v : 0));
      if (args_.doubled) std::memset(own.m_, 0, m);
      alone_ ? own.strips(thread, team) : own.share(thread, team, wait);
    });
  }

 private:
  void strips(int64_t thread, int64_t team) const {
    for (int64_t strip = thread * strips_ / team; strip < (thread + 1) * strips_ / team; ++strip) {
      const int64_t first = strip * rows_, rows = smaller(rows_, tiles_ - first);
      for (int64_t r = 0; r < rows; ++r) Base::transform_input(first + r, r);
      for (int64_t block = 0; block < blocks_; ++block) multiply(first, 0, rows, block);
    }
  }

  template <class Wait>
  void share(int64_t thread, int64_t team, const Wait& wait) const {
    for (int64_t r = thread * tiles_ / team; r < (thread + 1) * tiles_ / team; ++r) Base::transform_input(r, r);
    wait();
    const int64_t tasks = blocks_ * strips_;
    for (int64_t task = thread * tasks / team; task < (thread + 1) * tasks / team; ++task) {
      const int64_t first = task % strips_ * rows_;
      multiply(first, first, smaller(rows_, tiles_ - first), task / strips_);
    }
  }

  // Results of `rows` tiles from `tile` on, which lie in row `row` of the transformed input.
  void multiply(int64_t tile, int64_t row, int64_t rows, int64_t block) const {
    const Element* u = static_cast<const Element*>(args_.weight) + block * frequencies_.count() * depth_ * COLUMNS;
    for (const int f : frequencies_) {
      for (int64_t c = 0; c < depth_; c += Product::DEPTH) {
        const int64_t depth = smaller(Product::DEPTH, depth_ - c);
        Product::multiply(v_ + f * v_apart_ + row * row_ + c, row_, rows, u, depth, m_ + f * m_apart_, c == 0);
        u += depth * COLUMNS;
      }
    }
    const int64_t first = block * COLUMNS, outputs = smaller(COLUMNS, args_.outputs - first);
    for (int64_t r = 0; r < rows; ++r) {
      const auto place = Base::place(tile + r);
      for (int64_t o = 0; o < outputs; o += LANES) Base::transform_output(place, first + o, m_ + r * COLUMNS + o);
    }
  }

  Frequencies frequencies_;
  int64_t blocks_, strips_;
};

}  // namespace
}  // namespace fastdiff::cpu::CPU_CAPABILITY
