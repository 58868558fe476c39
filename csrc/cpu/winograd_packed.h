// A 3x3 convolution by F(2 x 2, 3 x 3). The weights are transformed once a call: fewer bytes come from memory than if
// they were kept so. A thread transforms a strip of tiles, multiplies and transforms back while all of it is in the
// cache nearest to it. Where tiles are few the threads share them, and each takes a part of the weights, of which it
// transforms some channels, multiplies, and fetches the next meanwhile.
#pragma once

#include "bfloat16_products.h"
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
  static constexpr int COLUMNS = Product::COLUMNS, TAPS = 9;
  static constexpr int64_t ALONE = 96;              // tiles of a thread from which on it does not share them
  static constexpr int64_t SHARED_BYTES = 1 << 24;  // of what all threads read, so that it stays in a cache
  static constexpr int64_t LINE = 64 / sizeof(Element);

 public:
  explicit WinogradPacked(const WinogradArgs& args) : Base(args), frequencies_(args.doubled) {
    blocks_ = ceil_divide(args.outputs, COLUMNS);
    const int64_t row_bytes = 16 * row_ * static_cast<int64_t>(sizeof(Element));
    const int64_t u_size = frequencies_.count() * blocks_ * depth_ * COLUMNS;
    alone_ = tiles_ >= ALONE * args.threads && Base::template bytes<Element>(u_size) <= SHARED_BYTES;
    chunk_ = alone_ ? Product::DEPTH : Product::SHARED_DEPTH;
    chunks_ = ceil_divide(depth_, chunk_);
    u_apart_ = smaller(chunk_, depth_) * COLUMNS + LINE;
    u_chunk_ = frequencies_.count() * u_apart_;
    held_ = alone_ ? tiles_ : smaller(tiles_, ceil_divide(SHARED_BYTES, row_bytes));
    const int64_t fit = Product::STRIP_BYTES / row_bytes / 6 * 6;
    int64_t strips = ceil_divide(held_, !alone_ ? Product::SHARED_STRIP : fit < 12 ? 12 : smaller(fit, Product::STRIP));
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
      own.u_ = reinterpret_cast<Element*>(at + (alone_ ? 0 : thread * Base::template bytes<Element>(u_chunk_)));
      own.m_ = reinterpret_cast<float*>(sums + thread * own_sums());
      own.v_ = reinterpret_cast<Element*>(sums + args_.threads * own_sums() + (alone_ ? thread * own_input() : 0));
      if (args_.doubled) std::memset(own.m_, 0, own_sums());
      alone_ ? own.strips(thread, team, wait) : own.share(thread, team, wait);
    });
  }

 private:
  int64_t u_block() const { return chunks_ * u_chunk_; }
  int64_t weights() const {
    return alone_ ? Base::template bytes<Element>(blocks_ * u_block())
                  : args_.threads * Base::template bytes<Element>(u_chunk_);
  }
  int64_t own_sums() const { return Base::template bytes<float>(16 * m_apart_); }
  int64_t own_input() const { return Base::template bytes<Element>(16 * v_apart_); }

  // Channels of a chunk in the packed weight, and with the zeros that fill them up.
  int64_t channels(int64_t chunk) const { return smaller(chunk_, args_.channels - chunk * chunk_); }
  int64_t depth(int64_t chunk) const { return smaller(chunk_, depth_ - chunk * chunk_); }

  // The weights of a block's chunk; those of its taps lie `tap_apart` apart.
  const Element* weight(int64_t block, int64_t chunk) const {
    return static_cast<const Element*>(args_.weight) + block * TAPS * tap_apart() + chunk * chunk_ * COLUMNS;
  }
  int64_t tap_apart() const { return args_.channels * COLUMNS; }

  template <class Wait>
  void strips(int64_t thread, int64_t team, const Wait& wait) const {
    const int64_t parts = blocks_ * chunks_;
    for (int64_t part = thread * parts / team; part < (thread + 1) * parts / team; ++part) {
      transform_weight(part / chunks_, part % chunks_, u_ + part * u_chunk_);
    }
    wait();
    const int64_t strips = ceil_divide(tiles_, rows_);
    for (int64_t strip = thread * strips / team; strip < (thread + 1) * strips / team; ++strip) {
      const int64_t first = strip * rows_, rows = smaller(rows_, tiles_ - first);
      for (int64_t r = 0; r < rows; ++r) Base::transform_input(first + r, r);
      for (int64_t block = 0; block < blocks_; ++block) {
        for (int64_t chunk = 0; chunk < chunks_; ++chunk) {
          multiply(0, rows, chunk, u_ + block * u_block() + chunk * u_chunk_, nullptr, 0);
        }
        transform_outputs(first, rows, block);
      }
    }
  }

  template <class Wait>
  void share(int64_t thread, int64_t team, const Wait& wait) const {
    for (int64_t begin = 0; begin < tiles_; begin += held_) {
      const int64_t held = smaller(held_, tiles_ - begin), strips = ceil_divide(held, rows_), tasks = blocks_ * strips;
      const int64_t last = (thread + 1) * tasks / team, last_row = (thread + 1) * held / team;
      int64_t task = thread * tasks / team, r = thread * held / team;
      if (begin > 0) wait();
      for (const int64_t from = r, count = last_row - r; r < last_row; ++r) {
        if (task < last) fetch(task / strips, (r - from) * TAPS / count, (r + 1 - from) * TAPS / count);
        Base::transform_input(begin + r, r);
      }
      wait();
      for (int64_t ready = -1; task < last; ++task) {
        const int64_t block = task / strips, next = task + 1 < last ? (task + 1) / strips : block;
        const int64_t first = task % strips * rows_, rows = smaller(rows_, held - first);
        for (int64_t chunk = 0; chunk < chunks_; ++chunk) {
          if (chunks_ > 1 || block != ready) transform_weight(block, chunk, u_);
          const bool more = chunk + 1 < chunks_;
          const Element* later = more ? weight(block, chunk + 1) : next != block ? weight(next, 0) : nullptr;
          multiply(first, rows, chunk, u_, later, channels(more ? chunk + 1 : 0));
        }
        ready = block;
        transform_outputs(begin + first, rows, block);
      }
    }
  }

  // Brings some taps of a block's first chunk near.
  void fetch(int64_t block, int64_t tap, int64_t last) const {
    for (; tap < last; ++tap) {
      const Element* from = weight(block, 0) + tap * tap_apart();
      for (int64_t i = 0; i < channels(0) * COLUMNS; i += LINE) __builtin_prefetch(from + i, 0, 2);
    }
  }

  // u[frequency][channel / PAIR][output of the block][channel % PAIR], zero beyond the last channel.
  void transform_weight(int64_t block, int64_t chunk, Element* u) const {
    const int64_t count = channels(chunk) * COLUMNS;
    Element* to[16] = {};
    for (const int f : frequencies_) {
      to[f] = u;
      std::memset(u + count, 0, (depth(chunk) * COLUMNS - count) * sizeof(Element));
      u += u_apart_;
    }
    Product::filter(weight(block, chunk), tap_apart(), count, to);
  }

  // Sums for `rows` tiles from row `row` of the transformed input on, of the channels of a chunk, whose transformed
  // weights are u. Meanwhile the weights `later` are fetched, of so many channels, if there are any.
  void multiply(int64_t row, int64_t rows, int64_t chunk, const Element* u, const Element* later,
                int64_t later_channels) const {
    int tap = 0;
    for (const int f : frequencies_) {
      Ahead ahead;
      if (later && tap < TAPS) {
        const Element* from = later + tap++ * tap_apart();
        ahead = {reinterpret_cast<const char*>(from), reinterpret_cast<const char*>(from + later_channels * COLUMNS)};
      }
      Product::multiply(v_ + f * v_apart_ + row * row_ + chunk * chunk_, row_, rows, u, depth(chunk),
                        m_ + f * m_apart_, chunk == 0, ahead);
      u += u_apart_;
    }
  }

  // Results of `rows` tiles from `tile` on.
  void transform_outputs(int64_t tile, int64_t rows, int64_t block) const {
    const int64_t first = block * COLUMNS, outputs = smaller(COLUMNS, args_.outputs - first);
    for (int64_t r = 0; r < rows; ++r) {
      const auto place = Base::place(tile + r);
      for (int64_t o = 0; o < outputs; o += LANES) Base::transform_output(place, first + o, m_ + r * COLUMNS + o);
    }
  }

  Frequencies frequencies_;
  int64_t blocks_, chunks_;    // of outputs, of channels
  int64_t chunk_;              // channels of a chunk
  int64_t u_apart_, u_chunk_;  // distance of frequencies; elements of a chunk's weights
  int64_t held_;               // tiles whose transformed input is held together
};

}  // namespace
}  // namespace fastdiff::cpu::CPU_CAPABILITY
