// float32 attention that reads its rows where they lie, one query at a time: for a few queries, which would leave most
// lanes of a block empty, and for a single key, where moving queries into lanes and back costs more than the products.
#pragma once

#include <algorithm>

#include "attention_pack.h"

namespace fastdiff::cpu::CPU_CAPABILITY {
namespace {

// The first `count` floats, at least one, and zeros.
inline Floats get(const float* source, int64_t count) {
  if (count >= LANES) return get(source);
#if defined(CPU_CAPABILITY_AVX512)
  return _mm512_maskz_loadu_ps(static_cast<__mmask16>((1 << count) - 1), source);
#else
  Floats x{};
  std::memcpy(&x, source, count * sizeof(float));
  return x;
#endif
}

inline void put(float* target, Floats x, int64_t count) {
  if (count >= LANES) return put(target, x);
#if defined(CPU_CAPABILITY_AVX512)
  _mm512_mask_storeu_ps(target, static_cast<__mmask16>((1 << count) - 1), x);
#else
  std::memcpy(target, &x, count * sizeof(float));
#endif
}

// Products of x with `count` rows, one in each lane; the lanes past the count repeat the last.
inline Floats dots(const float* rows, int64_t stride, int64_t count, const float* x, int64_t dim) {
  const float* row[LANES];
  for (int r = 0; r < LANES; ++r) row[r] = rows + std::min<int64_t>(r, count - 1) * stride;
  Floats sum[LANES] = {};
  int64_t d = 0;
  for (; d + LANES <= dim; d += LANES) {
#pragma GCC unroll 16
    for (int r = 0; r < LANES; ++r) sum[r] += get(row[r] + d) * get(x + d);
  }
  if (d < dim) {
#pragma GCC unroll 16
    for (int r = 0; r < LANES; ++r) sum[r] += get(row[r] + d, dim - d) * get(x + d, dim - d);
  }
  transpose(sum);
#pragma GCC unroll 4
  for (int half = LANES / 2; half > 0; half /= 2) {
#pragma GCC unroll 8
    for (int r = 0; r < half; ++r) sum[r] += sum[r + half];
  }
  return sum[0];
}

struct Rows {
  explicit Rows(const AttentionArgs& args) : args(args) {}

  const float* q(int64_t sample, int64_t head, int64_t query) const {
    return at(args.q, args.q_strides, sample, head) + query * args.q_strides[2];
  }
  const float* k(int64_t sample, int64_t head) const { return at(args.k, args.k_strides, sample, head); }
  const float* v(int64_t sample, int64_t head) const { return at(args.v, args.v_strides, sample, head); }
  float* out(int64_t sample, int64_t head, int64_t query) const {
    return static_cast<float*>(args.out.data) + ((sample * args.queries + query) * args.heads + head) * args.dim;
  }
  int64_t mask(int64_t sample, int64_t head, int64_t query) const {
    return sample * args.mask_strides[0] + head * args.mask_strides[1] + query * args.mask_strides[2];
  }
  bool masked() const { return args.mask || args.mask_bool; }

  const AttentionArgs& args;

 private:
  static const float* at(const Array& array, const int64_t (&strides)[3], int64_t sample, int64_t head) {
    return static_cast<const float*>(array.data) + sample * strides[0] + head * strides[1];
  }
};

// The only weight is 1, or 0 where the key is masked; the score is computed for its NaN and infinity alone.
class OneKey : Rows {
 public:
  using Rows::Rows;

  bool ready() const { return true; }

  // `count` queries from `query` on, of head `head` of sample `sample`.
  void run(int64_t sample, int64_t head, int64_t query, int64_t count) const {
    const float *key = k(sample, head), *value = v(sample, head);
    for (; count > 0; query += LANES, count -= LANES) {
      const int64_t rows = std::min<int64_t>(LANES, count);
      Floats score = dots(q(sample, head, query), args.q_strides[2], rows, key, args.dim) * args.scale;
      if (masked()) {
        float added[LANES] = {};
        for (int64_t r = 0; r < rows; ++r) load_mask_row(args, mask(sample, head, query + r), 1, added + r);
        score += get(added);
      }
      float weights[LANES];
      put(weights, score == -INF ? Floats{} : 1.0f + (score - score));  // 1 + NaN where the score is not finite
      for (int64_t r = 0; r < rows; ++r) {
        float* target = out(sample, head, query + r);
        for (int64_t d = 0; d < args.dim; d += LANES) {
          put(target + d, get(value + d, args.dim - d) * weights[r], args.dim - d);
        }
      }
    }
  }
};

class FewQueries : Rows {
 public:
  // As many as are faster here than in a block that they leave mostly empty; measured with AVX-512.
  static int64_t most(const AttentionArgs& args) { return std::min<int64_t>(LANES / 2, 1 + args.dim / 8); }

  static int64_t floats(const AttentionArgs& args) { return most(args) * round_up(args.keys, LANES); }

  FewQueries(const AttentionArgs& args, float* memory)
      : Rows(args), padded_(round_up(args.keys, LANES)), weights_(memory) {}

  // `count` queries from `query` on, of head `head` of sample `sample`.
  void run(int64_t sample, int64_t head, int64_t query, int64_t count) const {
    score(sample, head, query, count);
    float inverse[LANES];
    for (int64_t i = 0; i < count; ++i) {
      const float total = weigh(weights_ + i * padded_);
      inverse[i] = total == 0.0f ? 0.0f : 1.0f / total;
    }
    for_tiles<8>(0, (args.dim + LANES - 1) / LANES, [&]<int VECTORS>(int64_t vector) {
      for_tiles<2>(0, count, [&]<int QUERIES>(int64_t i) {
        add_up<VECTORS, QUERIES>(v(sample, head) + vector * LANES, weights_ + i * padded_, args.dim - vector * LANES,
                                 inverse + i, out(sample, head, query + i) + vector * LANES);
      });
    });
  }

 private:
  // Scores in units of log2; each vector of keys meets all queries while it is in the cache.
  void score(int64_t sample, int64_t head, int64_t query, int64_t count) const {
    const float *keys = k(sample, head), c = args.scale * LOG2E;
    for (int64_t i = 0; i < count && masked(); ++i) {
      load_mask_row(args, mask(sample, head, query + i), args.keys, weights_ + i * padded_);
    }
    for (int64_t key = 0; key < args.keys; key += LANES) {
      const int64_t stride = args.k_strides[2], left = std::min<int64_t>(LANES, args.keys - key);
      for (int64_t i = 0; i < count; ++i) {
        float* target = weights_ + i * padded_ + key;
        Floats value = dots(keys + key * stride, stride, left, q(sample, head, query + i), args.dim) * c;
        if (masked()) value += get(target);
        put(target, value);
      }
    }
    for (int64_t i = 0; i < count; ++i)
      std::fill(weights_ + i * padded_ + args.keys, weights_ + (i + 1) * padded_, -INF);
  }

  // Weights in place of the scores of one query; their sum.
  float weigh(float* row) const {
    Floats most = broadcast(-INF), sum{};
    for (int64_t key = 0; key < padded_; key += LANES) most = maximum(get(row + key), most);
    float largest = most[0];
    for (int lane = 1; lane < LANES; ++lane) largest = std::max(largest, most[lane]);
    const float shift = largest == -INF ? 0.0f : largest;  // with every key masked, weights of 0 instead of NaN
    for (int64_t key = 0; key < padded_; key += LANES) {
      const Floats weight = exp2_negative<true>(get(row + key) - shift);
      put(row + key, weight);
      sum += weight;
    }
    float total = 0.0f;
    for (int lane = 0; lane < LANES; ++lane) total += sum[lane];
    return total;
  }

  // `dim` columns of the output, all but the last vector of them whole, for rows of weights.
  template <int VECTORS, int QUERIES>
  void add_up(const float* values, const float* weights, int64_t dim, const float* inverse, float* target) const {
    constexpr int CHAINS = std::max(1, 8 / (VECTORS * QUERIES));  // of additions, as many as cover their latency
    Floats sum[CHAINS][QUERIES][VECTORS] = {};
    const auto add = [&](int64_t key, Floats(&to)[QUERIES][VECTORS]) {
      const float* row = values + key * args.v_strides[2];
#pragma GCC unroll 8
      for (int i = 0; i < VECTORS; ++i) {
        const Floats value = i < VECTORS - 1 ? get(row + i * LANES) : get(row + i * LANES, dim - i * LANES);
#pragma GCC unroll 2
        for (int j = 0; j < QUERIES; ++j) to[j][i] += value * weights[j * padded_ + key];
      }
    };
    int64_t key = 0;
    for (; key + CHAINS <= args.keys; key += CHAINS) {
#pragma GCC unroll 8
      for (int chain = 0; chain < CHAINS; ++chain) add(key + chain, sum[chain]);
    }
    for (; key < args.keys; ++key) add(key, sum[0]);
    for (int j = 0; j < QUERIES; ++j, target += args.heads * args.dim) {
      for (int i = 0; i < VECTORS; ++i) {
        for (int chain = 1; chain < CHAINS; ++chain) sum[0][j][i] += sum[chain][j][i];
        put(target + i * LANES, sum[0][j][i] * inverse[j], dim - i * LANES);
      }
    }
  }

  const int64_t padded_;
  float* const weights_;
};

}  // namespace
}  // namespace fastdiff::cpu::CPU_CAPABILITY
