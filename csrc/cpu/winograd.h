// A 3x3 convolution of stride 1 by Winograd's filtering F(OUT x OUT, 3 x 3), for the elements of a Product (see
// winograd_product.h). A strip of tiles is transformed by all threads; then each takes blocks of outputs: it transforms
// their weights, which lie as `pack_weight` leaves them, multiplies, and transforms back. So there is one copy of the
// weights, and what was transformed stays in the caches.
#pragma once

#include "elements.h"
#include "ops.h"
#include "parallel.h"
#include "scratch.h"
#include "winograd_transform.h"

namespace fastdiff::cpu::CPU_CAPABILITY {
namespace {

constexpr int64_t APART = 16;  // elements between rows, so that they do not collide in a cache

template <class Product, int OUT>
class Winograd {
  using Element = typename Product::Element;
  using Value = typename Product::Value;
  using Filter = Transform<OUT>;
  static constexpr int SIZE = Filter::SIZE, FREQUENCIES = SIZE * SIZE, COLUMNS = Product::COLUMNS;
  static constexpr int64_t STRIP = Product::STRIP;              // tiles
  static constexpr int64_t STRIP_BYTES = Product::STRIP_BYTES;  // of transformed input, where that leaves 32 tiles
  static constexpr int64_t U_APART = Product::DEPTH * COLUMNS + APART;

 public:
  explicit Winograd(const WinogradArgs& args) : args_(args) {
    down_ = ceil_divide(args.out_height, OUT), across_ = ceil_divide(args.out_width, OUT);
    tiles_ = args.samples * down_ * across_;
    depth_ = ceil_divide(args.channels, 16) * 16;
    row_ = depth_ + APART;
    const int64_t fit = STRIP_BYTES / (FREQUENCIES * row_ * static_cast<int64_t>(sizeof(Value)));
    int64_t strips = ceil_divide(tiles_, fit < 32 ? 32 : smaller(fit, STRIP));
    alone_ = strips >= args.threads;
    if (alone_) strips = ceil_divide(strips, args.threads) * args.threads;
    rows_ = ceil_divide(tiles_, strips);
    v_apart_ = rows_ * row_ + APART;
    m_apart_ = rows_ * COLUMNS + APART;
  }

  int64_t scratch() const {
    return bytes<Element>(args_.channels + LANES) +
           (alone_ ? args_.threads : 1) * bytes<Value>(FREQUENCIES * v_apart_) +
           args_.threads * (bytes<Value>(FREQUENCIES * U_APART) + bytes<float>(FREQUENCIES * m_apart_));
  }

  void run() {
    char* at = static_cast<char*>(args_.scratch);
    Element* zeros = take<Element>(at, args_.channels + LANES);
    std::memset(zeros, 0, (args_.channels + LANES) * sizeof(Element));
    zeros_ = zeros;
    const int64_t v = bytes<Value>(FREQUENCIES * v_apart_);
    const int64_t um = bytes<Value>(FREQUENCIES * U_APART) + bytes<float>(FREQUENCIES * m_apart_);
    parallel_stages(args_.threads, [&](int64_t thread, int64_t team, const auto& wait) {
      Winograd own = *this;
      char* mine = at + thread * um;
      own.u_ = take<Value>(mine, FREQUENCIES * U_APART);
      own.m_ = take<float>(mine, FREQUENCIES * m_apart_);
      own.v_ = reinterpret_cast<Value*>(at + args_.threads * um + (alone_ ? thread * v : 0));
      if (alone_) {
        for (int64_t first = thread * rows_; first < tiles_; first += team * rows_) own.strip(first, 0, 1, [] {});
      } else {
        for (int64_t first = 0; first < tiles_; first += rows_) own.strip(first, thread, team, wait);
      }
    });
  }

 protected:
  struct Place {
    int64_t sample, row, column;  // of the tile's first result
  };

  template <class T>
  static int64_t bytes(int64_t count) {
    return (count * static_cast<int64_t>(sizeof(T)) + 63) / 64 * 64;
  }

  template <class T>
  static T* take(char*& at, int64_t count) {
    T* found = reinterpret_cast<T*>(at);
    at += bytes<T>(count);
    return found;
  }

  // Into how many parts a strip is split so that the threads have about as much to do each.
  static int64_t row_parts(int64_t blocks, int64_t rows, int64_t team) {
    int64_t parts = 1;
    while (parts < team && parts * 6 < rows && blocks * parts % team != 0 && blocks * parts < 8 * team) ++parts;
    return parts;
  }

  Place place(int64_t tile) const {
    const int64_t row = tile / across_;
    return {row / down_, row % down_ * OUT, tile % across_ * OUT};
  }

  // The results of the tiles from `begin` on, this being one of `team` threads.
  template <class Wait>
  void strip(int64_t begin, int64_t thread, int64_t team, const Wait& wait) const {
    const int64_t rows = smaller(rows_, tiles_ - begin);
    const int64_t blocks = ceil_divide(args_.outputs, COLUMNS), parts = row_parts(blocks, rows, team);
    const int64_t tasks = blocks * parts, task_end = (thread + 1) * tasks / team;
    const int64_t r_end = (thread + 1) * rows / team;
    int64_t task = thread * tasks / team, r = thread * rows / team;
    Fetch fetch(*this, task / parts * COLUMNS, 0, task < task_end ? r_end - r : 0);
    if (begin > 0) wait();
    for (; r < r_end; ++r, fetch.some()) transform_input(begin + r, r);
    wait();
    for (; task < task_end; ++task) {
      const int64_t part = task % parts, first = part * rows / parts, last = (part + 1) * rows / parts;
      const int64_t next = task + 1 < task_end ? (task + 1) / parts * COLUMNS : args_.outputs;
      multiply(begin, first, last - first, task / parts * COLUMNS, next);
    }
  }

  void transform_input(int64_t tile, int64_t r) const {
    const Place first = place(tile);
    const Element* x =
        static_cast<const Element*>(args_.x) + first.sample * args_.height * args_.width * args_.channels;
    const int shift = args_.doubled ? 1 : 0;
    const Element* pixels[SIZE][SIZE];
    for (int i = 0; i < SIZE; ++i) {
      for (int j = 0; j < SIZE; ++j) {
        const int64_t row = first.row + i - args_.padding[0], column = first.column + j - args_.padding[1];
        const bool inside = row >= 0 && row < args_.height << shift && column >= 0 && column < args_.width << shift;
        pixels[i][j] = inside ? x + ((row >> shift) * args_.width + (column >> shift)) * args_.channels : zeros_;
      }
    }
    for (int64_t c = 0; c < depth_; c += LANES) {
      Value* to = v_ + r * row_ + c;
      if (c + LANES <= args_.channels) {
        transform_pixels(pixels, c, to, [](const Element* from) { return Product::load(from); });
      } else {
        const int64_t count = args_.channels - c;
        transform_pixels(pixels, c, to, [&](const Element* from) { return read_some(from, count); });
      }
    }
  }

  template <class Load>
  void transform_pixels(const Element* const (&pixels)[SIZE][SIZE], int64_t c, Value* to, const Load& load) const {
    const int64_t apart = v_apart_;
    transform<Filter::input, SIZE, SIZE>(
        [&](int i, int j) { return load(pixels[i][j] + c); },
        [=](int i, int j, Floats v) { Product::store(to + (i * SIZE + j) * apart, v); });
  }

  // Brings the weights of a block near while something else is computed, a part of them at each of `times` calls.
  class Fetch {
   public:
    Fetch(const Winograd& own, int64_t column, int64_t channel, int64_t times) {
      if (column >= own.args_.outputs || times == 0) return;
      count_ = smaller(Product::DEPTH, own.args_.channels - channel);
      from_ = own.panel(column) + channel * PACKED_OUTPUTS;
      apart_ = own.args_.channels * PACKED_OUTPUTS;
      taps_ = 9, step_ = ceil_divide(9 * count_, times);
    }

    void some() {
      for (int64_t step = 0; step < step_ && taps_ > 0; ++step) {
        for (int o = 0; o < COLUMNS; o += 64 / sizeof(Element)) {
          __builtin_prefetch(from_ + channel_ * PACKED_OUTPUTS + o, 0, 2);
        }
        if (++channel_ == count_) channel_ = 0, --taps_, from_ += apart_;
      }
    }

   private:
    const Element* from_ = nullptr;
    int64_t count_ = 0, apart_ = 0, step_ = 0, channel_ = 0, taps_ = 0;
  };

  // The weights of outputs from `column` on, of the first tap and channel.
  const Element* panel(int64_t column) const {
    return static_cast<const Element*>(args_.weight) + column / PACKED_OUTPUTS * PACKED_OUTPUTS * 9 * args_.channels +
           column % PACKED_OUTPUTS;
  }

  // Results of `rows` tiles from row `first` of the strip on, for the block of outputs at `column`; `next`: the column
  // of the block after it.
  void multiply(int64_t strip, int64_t first, int64_t rows, int64_t column, int64_t next) const {
    for (int64_t c = 0; c < depth_; c += Product::DEPTH) {
      const int64_t depth = smaller(Product::DEPTH, depth_ - c);
      transform_weight(column, c, depth);
      const bool last = c + depth == depth_;
      Fetch fetch(*this, last ? next : column, last ? 0 : c + depth, FREQUENCIES * ceil_divide(rows, Product::ROWS));
      for (int f = 0; f < FREQUENCIES; ++f) {
        const Value* v = v_ + f * v_apart_ + first * row_ + c;
        for (int64_t r = 0; r < rows; r += Product::ROWS, fetch.some()) {
          Product::multiply(v + r * row_, row_, smaller(Product::ROWS, rows - r), u_ + f * U_APART, depth,
                            m_ + f * m_apart_ + r * COLUMNS, c == 0);
        }
      }
    }
    for (int64_t r = 0; r < rows; ++r) {
      for (int64_t o = 0; o < COLUMNS && column + o < args_.outputs; o += LANES) {
        transform_output(place(strip + first + r), column + o, m_ + r * COLUMNS + o);
      }
    }
  }

  // u[frequency][channel][column] of `depth` channels; zero for channels and outputs that there are not.
  void transform_weight(int64_t column, int64_t channel, int64_t depth) const {
    const int64_t tap = args_.channels * PACKED_OUTPUTS, there = smaller(depth, args_.channels - channel);
    for (int64_t c = 0; c < depth; ++c) {
      Value* to = u_ + c * COLUMNS;
      if (c >= there) {
        for (int f = 0; f < FREQUENCIES; ++f) std::memset(to + f * U_APART, 0, COLUMNS * sizeof(Value));
        continue;
      }
      const Element* from = panel(column) + (channel + c) * PACKED_OUTPUTS;
      for (int64_t o = 0; o < COLUMNS; o += LANES, from += LANES, to += LANES) {
        transform<Filter::weight, 3, SIZE>(
            [=](int i, int j) { return Product::load(from + (i * 3 + j) * tap); },
            [=](int i, int j, Floats u) { Product::store(to + (i * SIZE + j) * U_APART, u); });
      }
    }
  }

  // LANES outputs from `output` on, or as many as there are, of the OUT x OUT pixels of a tile inside the result.
  void transform_output(const Place& at, int64_t output, const float* m) const {
    Floats y[OUT][OUT];
    transform<Filter::output, SIZE, OUT>(
        [&](int i, int j) { return get(m + (i * SIZE + j) * m_apart_); },
        [&](int i, int j, Floats result) { y[i][j] = result; });
    const int64_t count = smaller(LANES, args_.outputs - output);
    const Floats bias = args_.bias ? read_some(args_.bias + output, count) : Floats{};
    const int64_t down = smaller(OUT, args_.out_height - at.row), across = smaller(OUT, args_.out_width - at.column);
    if (down == OUT && across == OUT && count == LANES) {
#pragma GCC unroll 4
      for (int i = 0; i < OUT; ++i) {
        const int64_t pixel = (at.sample * args_.out_height + at.row + i) * args_.out_width + at.column;
#pragma GCC unroll 4
        for (int j = 0; j < OUT; ++j) finish((pixel + j) * args_.outputs + output, LANES, y[i][j] + bias);
      }
      return;
    }
    for (int64_t i = 0; i < down; ++i) {
      const int64_t pixel = (at.sample * args_.out_height + at.row + i) * args_.out_width + at.column;
      for (int64_t j = 0; j < across; ++j) finish((pixel + j) * args_.outputs + output, count, y[i][j] + bias);
    }
  }

  void finish(int64_t offset, int64_t count, Floats y) const {
    const Element* addend = static_cast<const Element*>(args_.addend);
    Element* to = static_cast<Element*>(args_.out) + offset;
    if (count == LANES) return Product::store(to, addend ? y + Product::load(addend + offset) : y);
    if (addend) y += read_some(addend + offset, count);
    write_some(to, y, count);
  }

  const WinogradArgs& args_;
  int64_t down_, across_, tiles_;
  int64_t depth_, row_, rows_;  // channels with zeros to a multiple of 16; distance of rows; tiles of a strip
  int64_t v_apart_, m_apart_;   // distances of frequencies
  bool alone_;                  // each thread has strips of its own
  Value *v_ = nullptr, *u_ = nullptr;
  float* m_ = nullptr;
  const Element* zeros_ = nullptr;
};

}  // namespace
}  // namespace fastdiff::cpu::CPU_CAPABILITY
