// Attention on the CPU. Each task is a block of queries of one head; a thread packs the keys and values of a head when
// it comes to its first block of it.

#include "bfloat16_dot.h"

#include <atomic>
#include <cmath>
#include <cstdlib>
#include <new>
#include <type_traits>

#include "attention_pack.h"
#include "attention_rows.h"
#include "ops.h"
#include "parallel.h"

namespace fastdiff::cpu::CPU_CAPABILITY {
namespace {

// Memory that a thread keeps between calls: fresh pages cost more than a small attention.
class Arena {
 public:
  ~Arena() { std::free(data_); }

  // At least so many bytes, or nullptr.
  void* reserve(int64_t bytes) {
    if (bytes > size_) {
      std::free(data_);
      data_ = std::aligned_alloc(64, round_up(bytes, 64));
      size_ = data_ == nullptr ? 0 : bytes;
    }
    return data_;
  }

 private:
  void* data_ = nullptr;
  int64_t size_ = 0;
};

thread_local Arena arena;

constexpr int64_t IN_PLACE = 4;  // blocks of queries up to which packing does not pay

template <class Math>
class Worker {
  using Element = typename Math::Element;

 public:
  explicit Worker(const AttentionArgs& args) : args_(args) {
    steps_ = (args.dim + Math::PAIR - 1) / Math::PAIR;
    const int64_t padded = round_up(args.dim, LANES);
    const int64_t sizes[] = {args.keys * steps_,
                             (args.keys + Math::PAIR - 1) / Math::PAIR * args.dim,
                             steps_ * MAX_QUERIES,
                             MAX_KEYS * MAX_QUERIES,
                             Math::PAIR == 1 ? 0 : MAX_KEYS / Math::PAIR * MAX_QUERIES,
                             MAX_KEYS * MAX_QUERIES,
                             padded * MAX_QUERIES,
                             padded * LANES,
                             FewQueries::floats(args)};
    int64_t offsets[10] = {};
    for (int i = 0; i < 9; ++i) offsets[i + 1] = offsets[i] + round_up(sizes[i], 16);
    float* base = static_cast<float*>(arena.reserve(offsets[9] * 4));
    if (base == nullptr) return;
    k_ = reinterpret_cast<Element*>(base);
    v_ = reinterpret_cast<Element*>(base + offsets[1]);
    scratch_.q = reinterpret_cast<Element*>(base + offsets[2]);
    scratch_.scores = base + offsets[3];
    scratch_.weights = reinterpret_cast<Element*>(base + offsets[Math::PAIR == 1 ? 3 : 4]);
    scratch_.mask = base + offsets[5];
    scratch_.out = base + offsets[6];
    scratch_.rows = base + offsets[7];
    few_ = base + offsets[8];
  }

  bool ready() const { return k_ != nullptr; }

  // `count` queries from `query` on, of head `head` of sample `sample`.
  void run(int64_t sample, int64_t head, int64_t query, int64_t count) {
    const int64_t rest = count % LANES;
    if (args_.q.type == Type::F32 && rest > 0 && rest <= FewQueries::most(args_)) {
      count -= rest;
      FewQueries(args_, few_).run(sample, head, query + count, rest);
      if (count == 0) return;
    }
    if (sample != sample_ || head != head_) {
      sample_ = sample, head_ = head;
      load_head();
    }
    if (args_.mask_bool) return blocks<COLUMNS, Mask::KEPT>(query, count);
    if (args_.mask) return blocks<COLUMNS, Mask::ADDED>(query, count);
    blocks<COLUMNS, Mask::NONE>(query, count);
  }

 private:
  void load_head() {
    const int64_t k = start(args_.k_strides), v = start(args_.v_strides);
    if constexpr (Math::PAIR == 1) {
      // float32 that is read a few times only is read where it lies.
      if (args_.k.type == Type::F32 && args_.queries <= IN_PLACE * MAX_QUERIES) {
        const Element *keys = static_cast<float*>(args_.k.data) + k, *values = static_cast<float*>(args_.v.data) + v;
        loaded_ = {keys, values, args_.k_strides[2], args_.v_strides[2], args_.keys, args_.dim, steps_};
        return;
      }
    }
    pack_keys(args_.k, k, args_.k_strides[2], args_.keys, args_.dim, k_);
    pack_values(args_.v, v, args_.v_strides[2], args_.keys, args_.dim, v_);
    loaded_ = {k_, v_, steps_, args_.dim, args_.keys, args_.dim, steps_};
  }

  int64_t start(const int64_t (&strides)[3]) const { return sample_ * strides[0] + head_ * strides[1]; }

  // The block with the fewest vectors that hold `count` queries.
  template <int WIDTH, Mask MASK>
  void blocks(int64_t query, int64_t count) {
    if constexpr (WIDTH > 1) {
      if (count <= (WIDTH - 1) * LANES) return blocks<WIDTH - 1, MASK>(query, count);
    }
    block<WIDTH, MASK>(query, count);
  }

  template <int WIDTH, Mask MASK>
  void block(int64_t query, int64_t count) {
    constexpr int64_t width = WIDTH * LANES;
    load_queries(args_, start(args_.q_strides), query, count, width, scratch_);
    const auto mask = [&](int64_t key, int64_t keys) {
      const int64_t* strides = args_.mask_strides;
      const int64_t offset = sample_ * strides[0] + head_ * strides[1] + query * strides[2] + key * strides[3];
      load_mask<std::conditional_t<MASK == Mask::KEPT, uint8_t, float>>(args_, offset, count, width, keys,
                                                                        scratch_.mask);
    };
    Floats inverse[WIDTH];
    const float c = std::fabs(args_.scale) * LOG2E;
    attend<Math, WIDTH, MASK>(loaded_, scratch_, c, mask, inverse);
    const int64_t first = ((sample_ * args_.queries + query) * args_.heads + head_) * args_.dim;
    store_rows(args_, first, count, width, inverse, scratch_);
  }

  const AttentionArgs& args_;
  Scratch<Math> scratch_;
  Head<Math> loaded_;
  Element *k_ = nullptr, *v_ = nullptr;
  float* few_;
  int64_t steps_, sample_ = -1, head_ = -1;
};

// Queries in a task: a full block, or less where full blocks are few and leave threads idle. Each query's result is the
// same in any block.
int64_t block_of(const AttentionArgs& args) {
  const auto tasks = [&](int64_t block) { return args.batch * args.heads * ((args.queries + block - 1) / block); };
  int64_t block = MAX_QUERIES;
  while (block > LANES && tasks(block) < 4 * args.threads && tasks(block) % args.threads != 0) block /= 2;
  return block;
}

template <class Worker>
void run(const AttentionArgs& args) {
  const int64_t block = block_of(args), blocks = (args.queries + block - 1) / block;
  const int64_t tasks = args.batch * args.heads * blocks, threads = std::min<int64_t>(args.threads, tasks);
  std::atomic<bool> exhausted = false;
  parallel_for(threads, args.threads, [&](int64_t thread) {
    Worker worker(args);
    if (!worker.ready()) {
      exhausted = true;
      return;
    }
    for (int64_t task = tasks * thread / threads; task < tasks * (thread + 1) / threads; ++task) {
      const int64_t head = task / blocks, query = task % blocks * block;
      worker.run(head / args.heads, head % args.heads, query, std::min(block, args.queries - query));
    }
  });
  if (exhausted) throw std::bad_alloc();
}

}  // namespace

void attention(const AttentionArgs& args) {
  if (args.q.type == Type::F32 && args.keys == 1) return run<OneKey>(args);
#ifdef FASTDIFF_BF16_DOT
  static const bool bf16_dot = __builtin_cpu_supports("avx512bf16");
  if (args.q.type == Type::BF16 && bf16_dot) return run<Worker<BFloat16>>(args);
#endif
  run<Worker<Float32>>(args);
}

}  // namespace fastdiff::cpu::CPU_CAPABILITY
