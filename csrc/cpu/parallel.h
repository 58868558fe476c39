// Threads for the CPU kernels. Everything is static: see convert.h.
#pragma once

#include <cstdint>

namespace fastdiff::cpu::CPU_CAPABILITY {

// body(task) for each task in [0, tasks): here, or on all `threads`. Never on some of them: OpenMP ends the threads
// that a smaller team leaves over, and starting them again costs more than a small kernel. body must not throw.
template <class Body>
static inline void parallel_for(int64_t tasks, int threads, const Body& body) {
  if (threads <= 1 || tasks <= 1) {
    for (int64_t task = 0; task < tasks; ++task) body(task);
    return;
  }
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t task = 0; task < tasks; ++task) body(task);
}

}  // namespace fastdiff::cpu::CPU_CAPABILITY
