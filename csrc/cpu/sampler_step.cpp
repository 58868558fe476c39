#include <stdexcept>

#include "ops.h"

namespace fastdiff::cpu::CPU_CAPABILITY {

const char* sampler_step(const StepArgs&) { throw std::runtime_error("sampler_step: the CPU kernel is being written"); }

}  // namespace fastdiff::cpu::CPU_CAPABILITY
