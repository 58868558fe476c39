// y = act((h - mean) / sqrt(var + eps) * weight + bias) with h = x + addend + residual, x being one
// input or two side by side: a pass that takes the moments and a pass that applies them, to data that the first has
// left in the cache where it fits. The result does not depend on the number of threads.
#include "cpu/group_norm_contiguous.h"
#include "cpu/group_norm_rows.h"
#include "ops.h"

namespace fastdiff::cpu::CPU_CAPABILITY {

constexpr int64_t SERIAL = 16384;  // a tensor of so few elements is not worth waking a thread

template <class T, bool SILU, bool PLAIN>
static void run(const GroupNormArgs& args) {
  // A contiguous sample with one element per channel is a channels-last one of one row.
  if (args.channels_last || args.spatial == 1) {
    Rows<T, SILU, PLAIN>(args).run();
  } else {
    Contiguous<T, SILU, PLAIN>(args).run();
  }
}

template <class T>
static void run(const GroupNormArgs& args) {
  const bool plain = !args.residual && !args.sum;
  if (args.silu) {
    plain ? run<T, true, true>(args) : run<T, true, false>(args);
  } else {
    plain ? run<T, false, true>(args) : run<T, false, false>(args);
  }
}

void group_norm_silu(const GroupNormArgs& given) {
  GroupNormArgs args = given;
  if (args.samples * args.channels * args.spatial <= SERIAL) args.threads = 1;
  if (args.x.type == Type::F32) {
    run<float>(args);
  } else if (args.x.type == Type::F16) {
    run<Half>(args);
  } else {
    run<Brain>(args);
  }
}

}  // namespace fastdiff::cpu::CPU_CAPABILITY
