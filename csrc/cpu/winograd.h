// A 3x3 convolution of stride 1 by Winograd's filtering F(OUT x OUT, 3 x 3), for the elements of a Product (see
// winograd_product.h). A strip of tiles is transformed by all threads; then each takes blocks of outputs: it transforms
// their weights, which lie as `pack_weight` leaves them, multiplies, and transforms back. So there is one copy of the
// weights, and what was transformed stays in the caches.
#pragma once

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
    const int64_t fit = STRIP_BYTES / (FREQUENCIES * row_ * static_cast<int64_t>(sizeof(Element)));
    const int64_t strips = ceil_divide(tiles_, fit < 32 ? 32 : smaller(fit, STRIP));
    rows_ = ceil_divide(tiles_, strips);
    v_apart_ = rows_ * row_ + APART;
    m_apart_ = rows_ * COLUMNS + APART;
  }

  int64_t scratch() const {
    return bytes<Element>(FREQUENCIES * v_apart_) + bytes<Element>(args_.channels + LANES) +
           args_.threads * (bytes<Element>(FREQUENCIES * U_APART) + bytes<float>(FREQUENCIES * m_apart_));
  }

  void run() {
    char* at = static_cast<char*>(args_.scratch);
    v_ = take<Element>(at, FREQUENCIES * v_apart_);
    Element* zeros = take<Element>(at, args_.channels + LANES);
    std::memset(zeros, 0, (args_.channels + LANES) * sizeof(Element));
    zeros_ = zeros;
    char* const own = at;
    const int64_t share = bytes<Element>(FREQUENCIES * U_APART) + bytes<float>(FREQUENCIES * m_apart_);
    parallel_stages(args_.threads, [&](int64_t thread, int64_t team, const auto& wait) {
      char* mine = own + thread * share;
      Element* u = take<Element>(mine, FREQUENCIES * U_APART);
      float* m = take<float>(mine, FREQUENCIES * m_apart_);
      for (int64_t begin = 0; begin < tiles_; begin += rows_) {
        const int64_t rows = smaller(rows_, tiles_ - begin);
        if (begin > 0) wait();
        for (int64_t r = thread * rows / team; r < (thread + 1) * rows / team; ++r) transform_input(begin + r, r);
        wait();
        const int64_t blocks = ceil_divide(args_.outputs, COLUMNS), parts = row_parts(blocks, rows, team);
        const int64_t tasks = blocks * parts;
        for (int64_t task = thread * tasks / team; task < (thread + 1) * tasks / team; ++task) {
          const int64_t part = task % parts, first = part * rows / parts, last = (part + 1) * rows / parts;
          if (first < last) multiply(begin, first, last - first, task / parts * COLUMNS, u, m);
        }
      }
    });
  }

 private:
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
      Element* to = v_ + r * row_ + c;
      if (c + LANES <= args_.channels) {
        transform_pixels(pixels, c, to, [](const Element* from) { return Product::load(from); });
      } else {
        const int64_t count = args_.channels - c;
        transform_pixels(pixels, c, to, [&](const Element* from) { return load_some(from, count); });
      }
    }
  }

  template <class Load>
  void transform_pixels(const Element* const (&pixels)[SIZE][SIZE], int64_t c, Element* to, const Load& load) const {
    Floats half[SIZE][SIZE];
#pragma GCC unroll 6
    for (int j = 0; j < SIZE; ++j) {
      Floats d[SIZE], v[SIZE];
#pragma GCC unroll 6
      for (int i = 0; i < SIZE; ++i) d[i] = load(pixels[i][j] + c);
      Filter::input(d, v);
#pragma GCC unroll 6
      for (int i = 0; i < SIZE; ++i) half[i][j] = v[i];
    }
#pragma GCC unroll 6
    for (int i = 0; i < SIZE; ++i) {
      Floats v[SIZE];
      Filter::input(half[i], v);
#pragma GCC unroll 6
      for (int j = 0; j < SIZE; ++j) Product::store(to + (i * SIZE + j) * v_apart_, v[j]);
    }
  }

  static Floats load_some(const Element* from, int64_t count) {
    Element lanes[LANES] = {};
    for (int64_t i = 0; i < count; ++i) lanes[i] = from[i];
    return Product::load(lanes);
  }

  // Results of `rows` tiles from row `first` of the strip on, for the block of outputs at `column`.
  void multiply(int64_t strip, int64_t first, int64_t rows, int64_t column, Element* u, float* m) const {
    for (int64_t c = 0; c < depth_; c += Product::DEPTH) {
      const int64_t depth = smaller(Product::DEPTH, depth_ - c);
      transform_weight(column, c, depth, u);
      for (int f = 0; f < FREQUENCIES; ++f) {
        Product::multiply(v_ + f * v_apart_ + first * row_ + c, row_, rows, u + f * U_APART, depth, m + f * m_apart_,
                          c == 0);
      }
    }
    for (int64_t r = 0; r < rows; ++r) {
      for (int64_t o = 0; o < COLUMNS && column + o < args_.outputs; o += LANES) {
        transform_output(place(strip + first + r), column + o, m + r * COLUMNS + o);
      }
    }
  }

  // u[frequency][channel / PAIR][column][channel % PAIR]; zero for channels and outputs that there are not.
  void transform_weight(int64_t column, int64_t channel, int64_t depth, Element* u) const {
    constexpr int PAIR = Product::PAIR;
    const Element* panel = static_cast<const Element*>(args_.weight) +
                           column / PACKED_OUTPUTS * PACKED_OUTPUTS * 9 * args_.channels + column % PACKED_OUTPUTS;
    for (int64_t c = 0; c < depth; c += PAIR) {
      for (int64_t o = 0; o < COLUMNS; o += LANES) {
        Floats both[PAIR][SIZE][SIZE];
#pragma GCC unroll 2
        for (int p = 0; p < PAIR; ++p) filter_weight(panel + o, channel + c + p, both[p]);
        Element* to = u + (c * COLUMNS + o * PAIR);
#pragma GCC unroll 6
        for (int i = 0; i < SIZE; ++i) {
#pragma GCC unroll 6
          for (int j = 0; j < SIZE; ++j) {
            Floats pair[PAIR];
            for (int p = 0; p < PAIR; ++p) pair[p] = both[p][i][j];
            Product::store_weight(to + (i * SIZE + j) * U_APART, pair);
          }
        }
      }
    }
  }

  void filter_weight(const Element* panel, int64_t channel, Floats (&u)[SIZE][SIZE]) const {
    Floats half[SIZE][3];
#pragma GCC unroll 3
    for (int j = 0; j < 3; ++j) {
      Floats g[3] = {}, column[SIZE];
      if (channel < args_.channels) {
#pragma GCC unroll 3
        for (int i = 0; i < 3; ++i) {
          g[i] = Product::load(panel + ((i * 3 + j) * args_.channels + channel) * PACKED_OUTPUTS);
        }
      }
      Filter::weight(g, column);
#pragma GCC unroll 6
      for (int i = 0; i < SIZE; ++i) half[i][j] = column[i];
    }
#pragma GCC unroll 6
    for (int i = 0; i < SIZE; ++i) Filter::weight(half[i], u[i]);
  }

  // LANES outputs from `output` on, or as many as there are, of the OUT x OUT pixels of a tile inside the result.
  void transform_output(const Place& at, int64_t output, const float* m) const {
    Floats half[OUT][SIZE], y[OUT][OUT];
#pragma GCC unroll 6
    for (int j = 0; j < SIZE; ++j) {
      Floats column[SIZE], result[OUT];
#pragma GCC unroll 6
      for (int i = 0; i < SIZE; ++i) column[i] = get(m + (i * SIZE + j) * m_apart_);
      Filter::output(column, result);
#pragma GCC unroll 4
      for (int i = 0; i < OUT; ++i) half[i][j] = result[i];
    }
#pragma GCC unroll 4
    for (int i = 0; i < OUT; ++i) Filter::output(half[i], y[i]);
    const int64_t count = smaller(LANES, args_.outputs - output);
    const Floats bias = args_.bias ? some(args_.bias + output, count) : Floats{};
    const int64_t down = smaller(OUT, args_.out_height - at.row), across = smaller(OUT, args_.out_width - at.column);
    for (int64_t i = 0; i < down; ++i) {
      const int64_t pixel = (at.sample * args_.out_height + at.row + i) * args_.out_width + at.column;
      for (int64_t j = 0; j < across; ++j) finish((pixel + j) * args_.outputs + output, count, y[i][j] + bias);
    }
  }

  static Floats some(const float* from, int64_t count) {
    if (count == LANES) return get(from);
    float lanes[LANES] = {};
    for (int64_t i = 0; i < count; ++i) lanes[i] = from[i];
    return get(lanes);
  }

  void finish(int64_t offset, int64_t count, Floats y) const {
    const Element* addend = static_cast<const Element*>(args_.addend);
    Element* to = static_cast<Element*>(args_.out) + offset;
    if (count == LANES) return Product::store(to, addend ? y + Product::load(addend + offset) : y);
    if (addend) y += load_some(addend + offset, count);
    Element lanes[LANES];
    Product::store(lanes, y);
    for (int64_t i = 0; i < count; ++i) to[i] = lanes[i];
  }

  const WinogradArgs& args_;
  int64_t down_, across_, tiles_;
  int64_t depth_, row_, rows_;  // channels with zeros to a multiple of 16; distance of rows; tiles of a strip
  int64_t v_apart_, m_apart_;   // distances of frequencies
  Element* v_ = nullptr;
  const Element* zeros_ = nullptr;
};

}  // namespace
}  // namespace fastdiff::cpu::CPU_CAPABILITY
