#include <stdexcept>

#include "ops.h"

namespace fastdiff::cpu::CPU_CAPABILITY {

void attention(const AttentionArgs&) { throw std::runtime_error("attention: the CPU kernel is being written"); }

}  // namespace fastdiff::cpu::CPU_CAPABILITY
