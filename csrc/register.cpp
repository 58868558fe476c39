// fastdiff._C: the functions of the operators, and what the build is.
#include "register.h"

namespace fastdiff {
namespace {

const char* capability_name() {
  return capability() == Capability::AVX512 ? "AVX512" : capability() == Capability::AVX2 ? "AVX2" : "DEFAULT";
}

bool cuda_built() {
#ifdef FASTDIFF_CUDA
  return true;
#else
  return false;
#endif
}

}  // namespace
}  // namespace fastdiff

PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {
  m.doc() = "Compiled kernels of fastdiff; called through fastdiff.ops.";
  fastdiff::register_steps(m);
  fastdiff::register_prepass(m);
  fastdiff::register_noise(m);
  fastdiff::register_network(m);
  fastdiff::register_convolution(m);
  fastdiff::register_bfloat16(m);
  fastdiff::register_arena(m);
  fastdiff::register_writes(m);
  fastdiff::register_layers(m);
  m.def("cpu_capability", &fastdiff::capability_name);
  m.def("cuda_built", &fastdiff::cuda_built);
}
