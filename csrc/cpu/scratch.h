// Memory for the duration of a kernel. Not std::vector, whose functions, compiled for a newer processor, could be the
// ones that the linker keeps for all: see convert.h.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <new>

namespace fastdiff::cpu::CPU_CAPABILITY {

static inline int64_t ceil_divide(int64_t a, int64_t b) { return (a + b - 1) / b; }

static inline int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

// `count` elements of a trivial type, not initialised.
template <class T>
class Scratch {
 public:
  explicit Scratch(int64_t count) : data_(static_cast<T*>(malloc(static_cast<size_t>(count) * sizeof(T)))) {
    if (!data_) throw std::bad_alloc();
  }
  ~Scratch() { free(data_); }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;

  T* data() const { return data_; }
  T& operator[](int64_t i) const { return data_[i]; }

 private:
  T* data_;
};

}  // namespace fastdiff::cpu::CPU_CAPABILITY
