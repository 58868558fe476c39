#include <stdexcept>

#include "ops.h"

namespace fastdiff::cpu::CPU_CAPABILITY {

void philox_normal(const NoiseArgs&) { throw std::runtime_error("philox_normal: the CPU kernel is being written"); }

}  // namespace fastdiff::cpu::CPU_CAPABILITY
