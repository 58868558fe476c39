// A 3x3 convolution by F(2 x 2, 3 x 3). The weights are transformed once a call: fewer bytes come from memory than if
// they were kept so. A thread transforms a strip of tiles, multiplies and transforms back while all of it is in the
// cache nearest to it. Where tiles are few the threads share them, and each takes a part of the weights.
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
      Base::u_, Base::m_, Base::zeros_, Base::alone_;
  static constexpr int COLUMNS = Product::COLUMNS;
  static constexpr int64_t ALONE = 96;              // tiles of a thread from which on it does not share them
  static constexpr int64_t SHARED_BYTES = 1 << 24;  // of what all threads read, so that it stays in a cache

 public:
  explicit WinogradPacked(const WinogradArgs& args) : Base(args), frequencies_(args.doubled) {
    blocks_ = ceil_divide(args.outputs, COLUMNS);
    u_block_ = frequencies_.count() * depth_ * COLUMNS;
    const int64_t row_bytes = 16 * row_ * static_cast<int64_t>(sizeof(Element));
    alone_ = tiles_ >= ALONE * args.threads && Base::template bytes<Element>(blocks_ * u_block_) <= SHARED_BYTES;
    held_ = alone_ ? tiles_ : smaller(tiles_, ceil_divide(SHARED_BYTES, row_bytes));
    const int64_t fit = Product::STRIP_BYTES / row_bytes / 6 * 6;
    int64_t strips = ceil_divide(held_, fit < 12 ? 12 : smaller(fit, Product::STRIP));
    if (alone_) strips = ceil_divide(strips, args.threads) * args.threads;
    while (!alone_ && blocks_ * strips % args.threads != 0 && held_ > 6 * strips) ++strips;
    rows_ = ceil_divide(held_, strips);
    v_apart_ = (alone_ ? rows_ : held_) * row_ + APART;
    m_apart_ = rows_ * COLUMNS + APART;
  }

  int64_t scratch() const {
    return Base::template bytes<Element>(args_.channels + LANES) + weights() + args_.threads * own_sums() +
           (alone_ ? args_.threads : 1) * own_input();
  }

  void run() {
    char* at = static_cast<char*>(args_.scratch);
    Element* zeros = Base::template take<Element>(at, args_.channels + LANES);
    std::memset(zeros, 0, (args_.channels + LANES) * sizeof(Element));
    zeros_ = zeros;
    parallel_stages(args_.threads, [&](int64_t thread, int64_t team, const auto& wait) {
      WinogradPacked own = *this;
      char* sums = at + weights();
      own.u_ = reinterpret_cast<Element*>(at) + (alone_ ? 0 : thread * u_block_);
      own.m_ = reinterpret_cast<float*>(sums + thread * own_sums());
      own.v_ = reinterpret_cast<Element*>(sums + args_.threads * own_sums() + (alone_ ? thread * own_input() : 0));
      if (args_.doubled) std::memset(own.m_, 0, own_sums());
      alone_ ? own.strips(thread, team, wait) : own.share(thread, team, wait);
    });
  }

 private:
  int64_t weights() const { return (alone_ ? blocks_ : args_.threads) * Base::template bytes<Element>(u_block_); }
  int64_t own_sums() const { return Base::template bytes<float>(16 * m_apart_); }
  int64_t own_input() const { return Base::template bytes<Element>(16 * v_apart_); }

  template <class Wait>
  void strips(int64_t thread, int64_t team, const Wait& wait) const {
    for (int64_t block = thread; block < blocks_; block += team) transform_weight(block, u_ + block * u_block_);
    wait();
    const int64_t strips = ceil_divide(tiles_, rows_);
    for (int64_t strip = thread * strips / team; strip < (thread + 1) * strips / team; ++strip) {
      const int64_t first = strip * rows_, rows = smaller(rows_, tiles_ - first);
      for (int64_t r = 0; r < rows; ++r) Base::transform_input(first + r, r);
      for (int64_t block = 0; block < blocks_; ++block) multiply(first, 0, rows, block, u_ + block * u_block_);
    }
  }

  template <class Wait>
  void share(int64_t thread, int64_t team, const Wait& wait) const {
    for (int64_t begin = 0; begin < tiles_; begin += held_) {
      const int64_t held = smaller(held_, tiles_ - begin), strips = ceil_divide(held, rows_), tasks = blocks_ * strips;
      if (begin > 0) wait();
      for (int64_t r = thread * held / team; r < (thread + 1) * held / team; ++r) Base::transform_input(begin + r, r);
      wait();
      int64_t ready = -1;
      for (int64_t task = thread * tasks / team; task < (thread + 1) * tasks / team; ++task) {
        const int64_t block = task / strips, first = task % strips * rows_;
        if (block != ready) transform_weight(block, u_);
        ready = block;
        multiply(begin + first, first, smaller(rows_, held - first), block, u_);
      }
    }
  }

  // u[frequency][channel / PAIR][output of the block][channel % PAIR], zero beyond the last channel.
  void transform_weight(int64_t block, Element* u) const {
    const int64_t count = args_.channels * COLUMNS, apart = depth_ * COLUMNS;
    Element* to[16] = {};
    for (const int f : frequencies_) {
      to[f] = u;
      std::memset(u + count, 0, (apart - count) * sizeof(Element));
      u += apart;
    }
    Product::filter(static_cast<const Element*>(args_.weight) + block * 9 * count, count, to);
  }

  // Results of `rows` tiles from `tile` on, which lie in row `row` of the transformed input; u: the block's weights.
  void multiply(int64_t tile, int64_t row, int64_t rows, int64_t block, const Element* u) const {
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
  int64_t blocks_, u_block_;  // of outputs; elements of the weights of one
  int64_t held_;              // tiles whose transformed input is held together
};

}  // namespace
}  // namespace fastdiff::cpu::CPU_CAPABILITY
