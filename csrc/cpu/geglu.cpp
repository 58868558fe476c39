// y = a * b * Phi(b) with [a, b] = x.
#include "cpu/normal_cdf.h"
#include "cpu/parallel.h"
#include "cpu/scratch.h"
#include "ops.h"

namespace fastdiff::cpu::CPU_CAPABILITY {

constexpr int64_t TASK = 16384;  // elements of y; a tensor of so few is not worth waking a thread

template <class T>
static void run_part(const T* a, const T* b, T* y, int64_t count) {
  constexpr bool ROUNDED = sizeof(T) == 2;
  for_blocks(
      count, false, [&](int64_t i, auto width) __attribute__((always_inline)) {
        const Block values = load(a + i, width), gates = load(b + i, width);
        store({values.first * (gates.first * normal_cdf<ROUNDED>(gates.first)),
               values.second * (gates.second * normal_cdf<ROUNDED>(gates.second))},
              y + i, width);
      });
}

template <class T>
static void run(const GegluArgs& args) {
  const T* x = static_cast<const T*>(args.x.data);
  T* y = static_cast<T*>(args.y.data);
  const int64_t total = args.rows * args.hidden;
  parallel_for(ceil_divide(total, TASK), args.threads, [&](int64_t task) {
    const int64_t end = smaller((task + 1) * TASK, total);
    for (int64_t at = task * TASK; at < end;) {
      const int64_t row = at / args.hidden, column = at % args.hidden;
      const int64_t count = smaller(args.hidden - column, end - at);
      const T* a = x + 2 * row * args.hidden + column;
      run_part(a, a + args.hidden, y + at, count);
      at += count;
    }
  });
}

void geglu(const GegluArgs& args) {
  if (args.x.type == Type::F32) {
    run<float>(args);
  } else if (args.x.type == Type::F16) {
    run<Half>(args);
  } else {
    run<Brain>(args);
  }
}

}  // namespace fastdiff::cpu::CPU_CAPABILITY
