// One block of queries against all keys of its head: softmax(scale * q k^T + mask) v in one pass over the keys.
//
// For each block of keys, with running maximum m and sum l of every query (Milakov & Gimelshein, "Online normalizer
// calculation for softmax", 2018; Dao et al., "FlashAttention", 2022):
//   s = q k^T, m' = max(m, s), p = 2^(c (s - m')), alpha = 2^(c (m - m')), l' = alpha l + p 1, o' = alpha o + p v,
// c = scale * log2(e); the result is o / l. Queries lie along the lanes, so that no row of scores is reduced across
// them.
#pragma once

#include <algorithm>
#include <limits>

#include "attention_tile.h"

namespace fastdiff::cpu::CPU_CAPABILITY {
namespace {

constexpr int COLUMNS = LANES == 16 ? 4 : 2;  // vectors of queries in a full block
constexpr int64_t MAX_QUERIES = COLUMNS * LANES;
constexpr int64_t MAX_KEYS = 128;  // in a block: scores and weights stay in the second-level cache
constexpr float LOG2E = 1.4426950408889634f;
constexpr float INF = std::numeric_limits<float>::infinity();

// Keys and values of one head: k (keys, k_steps), v (value_steps, dim), rows k_stride and v_stride apart; one element
// holds Math::PAIR values.
template <class Math>
struct Head {
  const typename Math::Element *k, *v;
  int64_t k_stride, v_stride, keys, dim, k_steps;
};

// What the mask adds to the scores: nothing, its values, or -inf for the keys that it does not keep.
enum class Mask { NONE, ADDED, KEPT };

// Memory of one thread; `width` is the number of queries in the block, rounded up to whole vectors.
template <class Math>
struct Scratch {
  typename Math::Element* q;        // (k_steps, width)
  float* scores;                    // (MAX_KEYS, width)
  typename Math::Element* weights;  // (MAX_KEYS / PAIR, width); may be the scores themselves
  float* mask;                      // (MAX_KEYS, width), in units of log2; Mask::KEPT: (MAX_KEYS / 4, width) words of
                                    // four keys, a byte each, the first the lowest
  float* out;                       // (dim rounded up to LANES, width)
  float* rows;                      // (LANES, dim rounded up to LANES)
};

// What is added to the scores of vector `w` of the queries with key `key` of its block.
template <class Math, int WIDTH, Mask MASK>
inline Floats mask_value(const Scratch<Math>& scratch, int64_t key, int w) {
  if constexpr (MASK == Mask::ADDED) return get(scratch.mask + (key * WIDTH + w) * LANES);
  const Ints word = reinterpret_cast<Ints>(get(scratch.mask + (key / 4 * WIDTH + w) * LANES));
  const Ints hidden = (word & (0xFF << key % 4 * 8)) == 0;
  return reinterpret_cast<Floats>(hidden & reinterpret_cast<Ints>(broadcast(-INF)));
}

// Scores of `keys` keys and their maximum; with a mask they are scaled, else raw.
template <class Math, int WIDTH, Mask MASK>
inline void score(const Head<Math>& head, const Scratch<Math>& scratch, int64_t first, int64_t keys, float c,
                  Floats (&largest)[WIDTH]) {
  for_tiles<TILE_ROWS<WIDTH>>(0, keys, [&]<int ROWS>(int64_t key) {
    Floats sum[ROWS][WIDTH] = {};
    multiply<Math>(head.k + (first + key) * head.k_stride, head.k_stride, 1, scratch.q, head.k_steps, sum);
#pragma GCC unroll 16
    for (int r = 0; r < ROWS; ++r) {
#pragma GCC unroll 4
      for (int w = 0; w < WIDTH; ++w) {
        Floats value = sum[r][w];
        if constexpr (MASK != Mask::NONE) value = value * c + mask_value<Math, WIDTH, MASK>(scratch, key + r, w);
        largest[w] = maximum(value, largest[w]);
        put(scratch.scores + ((key + r) * WIDTH + w) * LANES, value);
      }
    }
  });
}

// Weights 2^(c s - shift) of `keys` keys, added up in total. For pairs of bfloat16 an odd key gets a partner of zero.
template <class Math, int WIDTH>
inline void weigh(const Scratch<Math>& scratch, int64_t keys, float c, const Floats (&shift)[WIDTH],
                  Floats (&total)[WIDTH]) {
  const auto weight = [&](int64_t key, int w) {
    const Floats p = exp2_negative<Math::EXACT>(get(scratch.scores + (key * WIDTH + w) * LANES) * c - shift[w]);
    total[w] += p;
    return p;
  };
  if constexpr (Math::PAIR == 1) {
    for (int64_t key = 0; key < keys; ++key) {
#pragma GCC unroll 4
      for (int w = 0; w < WIDTH; ++w) put(scratch.weights + (key * WIDTH + w) * LANES, weight(key, w));
    }
  }
  if constexpr (Math::PAIR == 2) {
    for (int64_t key = 0; key < keys; key += 2) {
#pragma GCC unroll 4
      for (int w = 0; w < WIDTH; ++w) {
        const Floats p0 = weight(key, w), p1 = key + 1 < keys ? weight(key + 1, w) : Floats{};
        Math::store_pairs(scratch.weights + (key / 2 * WIDTH + w) * LANES, p0, p1);
      }
    }
  }
}

// out = alpha * out + weights v; the first block of keys finds nothing in out.
template <class Math, int WIDTH>
inline void accumulate(const Head<Math>& head, const Scratch<Math>& scratch, int64_t first, int64_t keys,
                       const Floats (&alpha)[WIDTH]) {
  const int64_t steps = (keys + Math::PAIR - 1) / Math::PAIR;
  for_tiles<TILE_ROWS<WIDTH>>(0, head.dim, [&]<int ROWS>(int64_t d) {
    Floats sum[ROWS][WIDTH] = {};
    float* out = scratch.out + d * WIDTH * LANES;
    if (first > 0) {
#pragma GCC unroll 16
      for (int r = 0; r < ROWS; ++r) {
#pragma GCC unroll 4
        for (int w = 0; w < WIDTH; ++w) sum[r][w] = get(out + (r * WIDTH + w) * LANES) * alpha[w];
      }
    }
    multiply<Math>(head.v + first / Math::PAIR * head.v_stride + d, 1, head.v_stride, scratch.weights, steps, sum);
#pragma GCC unroll 16
    for (int r = 0; r < ROWS; ++r) {
#pragma GCC unroll 4
      for (int w = 0; w < WIDTH; ++w) put(out + (r * WIDTH + w) * LANES, sum[r][w]);
    }
  });
}

// The block of queries in scratch.q against all keys; scratch.out (dim, width) receives o and inverse 1 / l, where
// load_mask(first key, keys) fills scratch.mask. c >= 0.
template <class Math, int WIDTH, Mask MASK, class LoadMask>
inline void attend(const Head<Math>& head, const Scratch<Math>& scratch, float c, const LoadMask& load_mask,
                   Floats (&inverse)[WIDTH]) {
  const int64_t blocks = (head.keys + MAX_KEYS - 1) / MAX_KEYS;
  const int64_t step = ((head.keys + blocks - 1) / blocks + 1) / 2 * 2;  // even, so that pairs never straddle
  Floats largest[WIDTH], total[WIDTH] = {};
  for (int w = 0; w < WIDTH; ++w) largest[w] = broadcast(-INF);
  for (int64_t first = 0; first < head.keys; first += step) {
    const int64_t keys = std::min(step, head.keys - first);
    if constexpr (MASK != Mask::NONE) load_mask(first, keys);
    Floats before[WIDTH], shift[WIDTH], alpha[WIDTH];
    for (int w = 0; w < WIDTH; ++w) before[w] = largest[w];
    score<Math, WIDTH, MASK>(head, scratch, first, keys, c, largest);
    const float factor = MASK == Mask::NONE ? c : 1.0f;
    for (int w = 0; w < WIDTH; ++w) {
      // With every key masked so far the maximum is -inf; 0 in its place gives weights of 0 instead of NaN.
      shift[w] = (largest[w] == -INF ? Floats{} : largest[w]) * factor;
      alpha[w] = exp2_negative<true>(before[w] * factor - shift[w]);
      total[w] = first > 0 ? total[w] * alpha[w] : Floats{};
    }
    weigh<Math, WIDTH>(scratch, keys, factor, shift, total);
    accumulate<Math, WIDTH>(head, scratch, first, keys, alpha);
  }
  for (int w = 0; w < WIDTH; ++w) inverse[w] = total[w] == 0.0f ? Floats{} : 1.0f / total[w];
}

}  // namespace
}  // namespace fastdiff::cpu::CPU_CAPABILITY
