// What register.cpp calls: each register_*.cpp adds its functions to the module. The headers of tensors stay out.
#pragma once

#include <ATen/Version.h>
#include <pybind11/pybind11.h>

#include <string>

namespace fastdiff {

namespace py = pybind11;

enum class Capability { DEFAULT, AVX2, AVX512 };

inline Capability capability() {
  static const Capability value = [] {
#ifdef FASTDIFF_X86
    const std::string name = at::get_cpu_capability();
    if (name.rfind("AVX512", 0) == 0 || name == "AMX") return Capability::AVX512;
    if (name == "AVX2") return Capability::AVX2;
#endif
    return Capability::DEFAULT;
  }();
  return value;
}

// Each in the file of that name.
void register_steps(py::module_& m);
void register_prepass(py::module_& m);
void register_noise(py::module_& m);
void register_network(py::module_& m);
void register_convolution(py::module_& m);
void register_bfloat16(py::module_& m);
void register_arena(py::module_& m);
void register_writes(py::module_& m);
void register_layers(py::module_& m);

// Writes through `tensor.data` to watched tensors so far: register_writes.cpp.
int64_t unseen_writes();

}  // namespace fastdiff
