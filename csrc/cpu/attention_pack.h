// From the tensors' memory to the layouts of the kernel, and back: packed keys and values, queries along the lanes.
#pragma once

#include <algorithm>

#include "attention_block.h"
#include "convert.h"

namespace fastdiff::cpu::CPU_CAPABILITY {
namespace {

constexpr int64_t round_up(int64_t n, int64_t multiple) { return (n + multiple - 1) / multiple * multiple; }

// Row-major (LANES, steps) words, rows `stride` apart, to (steps, width) columns; reads up to whole vectors of a row.
inline void to_columns(const float* rows, int64_t stride, float* columns, int64_t width, int64_t steps) {
  for (int64_t t = 0; t < steps; t += LANES) {
    Floats x[LANES];
    for (int r = 0; r < LANES; ++r) x[r] = get(rows + r * stride + t);
    transpose(x);
    for (int64_t i = 0; i < std::min<int64_t>(LANES, steps - t); ++i) put(columns + (t + i) * width, x[i]);
  }
}

inline void pack_keys(const Array& source, int64_t offset, int64_t stride, int64_t keys, int64_t dim, float* target) {
  for (int64_t key = 0; key < keys; ++key) load(source, offset + key * stride, target + key * dim, dim);
}

inline void pack_values(const Array& source, int64_t offset, int64_t stride, int64_t keys, int64_t dim, float* target) {
  pack_keys(source, offset, stride, keys, dim, target);
}

inline void pack_queries(const Array& source, int64_t offset, int64_t dim, bool negate, float* row) {
  load(source, offset, row, dim);
  if (negate) {
    for (int64_t d = 0; d < dim; ++d) row[d] = -row[d];
  }
}

// Keys in pairs along the head dimension; an odd dimension gets a zero.
inline void pack_keys(const Array& source, int64_t offset, int64_t stride, int64_t keys, int64_t dim,
                      uint32_t* target) {
  const int64_t steps = (dim + 1) / 2;
  for (int64_t key = 0; key < keys; ++key) {
    target[key * steps + steps - 1] = 0;
    memcpy(target + key * steps, static_cast<const uint16_t*>(source.data) + offset + key * stride, dim * 2);
  }
}

// Values in pairs along the keys; an odd number of keys gets a row of zeros.
inline void pack_values(const Array& source, int64_t offset, int64_t stride, int64_t keys, int64_t dim,
                        uint32_t* target) {
  const uint16_t* even = static_cast<const uint16_t*>(source.data) + offset;
  for (int64_t key = 0; key < keys; key += 2, even += 2 * stride, target += dim) {
    if (key + 1 < keys) {
      const uint16_t* odd = even + stride;
      for (int64_t d = 0; d < dim; ++d) target[d] = even[d] | static_cast<uint32_t>(odd[d]) << 16;
    } else {
      for (int64_t d = 0; d < dim; ++d) target[d] = even[d];
    }
  }
}

inline void pack_queries(const Array& source, int64_t offset, int64_t dim, bool negate, uint32_t* row) {
  row[(dim - 1) / 2] = 0;
  memcpy(row, static_cast<const uint16_t*>(source.data) + offset, dim * 2);
  if (negate) {
    for (int64_t pair = 0; pair < (dim + 1) / 2; ++pair) row[pair] ^= 0x80008000u;
  }
}

// Queries `query` to `query + count` as columns of scratch.q; columns past the count hold zeros.
template <class Math>
inline void load_queries(const AttentionArgs& args, int64_t offset, int64_t query, int64_t count, int64_t width,
                         const Scratch<Math>& scratch) {
  const int64_t steps = (args.dim + Math::PAIR - 1) / Math::PAIR, stride = round_up(steps, LANES);
  auto* rows = reinterpret_cast<typename Math::Element*>(scratch.rows);
  for (int64_t lane = 0; lane < width; lane += LANES) {
    for (int64_t r = 0; r < LANES; ++r) {
      if (lane + r < count) {
        const int64_t start = offset + (query + lane + r) * args.q_strides[2];
        pack_queries(args.q, start, args.dim, args.scale < 0, rows + r * stride);
      } else {
        memset(rows + r * stride, 0, steps * sizeof(*rows));
      }
    }
    to_columns(scratch.rows, stride, reinterpret_cast<float*>(scratch.q) + lane, width, steps);
  }
}

// `keys` values of the mask in units of log2. The least float, a common way to mask, stays finite, so that a row of it
// is a mean and not zero.
inline void load_mask_row(const AttentionArgs& args, int64_t offset, int64_t keys, float* row) {
  const int64_t stride = args.mask_strides[3];
  if (const bool* keep = args.mask_bool) {
    constexpr int32_t minus_inf = static_cast<int32_t>(0xFF800000u);
    for (int64_t i = 0; i < keys; ++i) {
      const int32_t value = keep[offset + i * stride] ? 0 : minus_inf;
      memcpy(row + i, &value, sizeof(value));
    }
    return;
  }
  if (stride == 1) {
    load(args.mask, offset, row, keys);
  } else {
    for (int64_t i = 0; i < keys; ++i) row[i] = load_one(args.mask, offset + i * stride);
  }
  constexpr float least = std::numeric_limits<float>::lowest();
  for (int64_t i = 0; i < keys; ++i) row[i] = row[i] == -INF ? -INF : std::max(row[i] * LOG2E, least);
}

// A byte for each key, 0 where it is masked.
inline void load_mask_row(const AttentionArgs& args, int64_t offset, int64_t keys, uint8_t* row) {
  const bool* keep = args.mask_bool + offset;
  const int64_t stride = args.mask_strides[3];
  if (stride == 1) {
    memcpy(row, keep, keys);
  } else {
    for (int64_t i = 0; i < keys; ++i) row[i] = keep[i * stride];
  }
}

// The mask of `count` queries from element `offset` on and of `keys` keys, its rows of T, as columns of words.
template <class T>
inline void load_mask(const AttentionArgs& args, int64_t offset, int64_t count, int64_t width, int64_t keys,
                      float* columns) {
  constexpr int64_t in_word = sizeof(float) / sizeof(T), stride = MAX_KEYS / in_word;
  const int64_t steps = (keys + in_word - 1) / in_word;
  float words[LANES * stride];
  T* rows = reinterpret_cast<T*>(words);
  if (args.mask_strides[2] == 0) {
    load_mask_row(args, offset, keys, rows);
    for (int64_t t = 0; t < steps; ++t) {
      int32_t word;
      memcpy(&word, words + t, sizeof(word));
      const Floats repeated = reinterpret_cast<Floats>(word - Ints{});
      for (int64_t lane = 0; lane < width; lane += LANES) put(columns + t * width + lane, repeated);
    }
    return;
  }
  for (int64_t lane = 0; lane < width; lane += LANES) {
    for (int64_t r = 0; r < LANES; ++r) {
      if (lane + r < count) {
        load_mask_row(args, offset + (lane + r) * args.mask_strides[2], keys, rows + r * MAX_KEYS);
      } else {
        memset(rows + r * MAX_KEYS, 0, keys * sizeof(T));
      }
    }
    to_columns(words, stride, columns + lane, width, steps);
  }
}

// scratch.out (dim, width) times inverse, as rows of the output (queries, heads, dim) from element `offset` on.
template <class Math>
inline void store_rows(const AttentionArgs& args, int64_t offset, int64_t count, int64_t width, const Floats* inverse,
                       const Scratch<Math>& scratch) {
  const int64_t stride = round_up(args.dim, LANES);
  for (int64_t lane = 0; lane < count; lane += LANES) {
    for (int64_t d = 0; d < args.dim; d += LANES) {
      Floats x[LANES];
      for (int i = 0; i < LANES; ++i) x[i] = get(scratch.out + (d + i) * width + lane) * inverse[lane / LANES];
      transpose(x);
      for (int r = 0; r < LANES; ++r) put(scratch.rows + r * stride + d, x[r]);
    }
    for (int64_t r = 0; r < std::min<int64_t>(LANES, count - lane); ++r) {
      store(scratch.rows + r * stride, args.out, offset + (lane + r) * args.heads * args.dim, args.dim);
    }
  }
}

}  // namespace
}  // namespace fastdiff::cpu::CPU_CAPABILITY
