// Threads for the CPU kernels. Everything is static: see convert.h.
#pragma once

#include <omp.h>

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

// body(thread, team, wait) on all `threads` at once; wait() returns when all have called it. For kernels of several
// stages: a wait costs a fraction of what ending and starting a parallel_for does.
template <class Body>
static inline void parallel_stages(int threads, const Body& body) {
  if (threads <= 1) return body(int64_t{0}, int64_t{1}, [] {});
#pragma omp parallel num_threads(threads)
  body(int64_t{omp_get_thread_num()}, int64_t{omp_get_num_threads()}, [] {
#pragma omp barrier
  });
}

}  // namespace fastdiff::cpu::CPU_CAPABILITY
