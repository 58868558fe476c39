// Addresses of the system's, and memory for parts of them. No torch here.
#pragma once

#include <cstddef>

#if __has_include(<sys/mman.h>)
#ifdef __GLIBC__
#include <malloc.h>
#endif
#include <pthread.h>
#include <sys/mman.h>
#include <unistd.h>
#endif

namespace fastdiff {

#if __has_include(<sys/mman.h>)

inline size_t system_page() { return static_cast<size_t>(sysconf(_SC_PAGESIZE)); }
inline size_t system_memory() { return static_cast<size_t>(sysconf(_SC_PHYS_PAGES)) * system_page(); }

// Addresses without memory, or null.
inline void* system_reserve(size_t bytes) {
  void* const data = mmap(nullptr, bytes, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  return data == MAP_FAILED ? nullptr : data;
}

// From now on a page comes when it is first written to.
inline bool system_commit(void* data, size_t bytes) {
  if (mprotect(data, bytes, PROT_READ | PROT_WRITE) != 0) return false;
#ifdef MADV_HUGEPAGE
  madvise(data, bytes, MADV_HUGEPAGE);
#endif
  return true;
}

// The pages go, and with them what is in them; the next write brings new ones.
inline void system_give_back(void* data, size_t bytes) { madvise(data, bytes, MADV_DONTNEED); }
inline void system_release(void* data, size_t bytes) { munmap(data, bytes); }

// What was freed goes back, as far as it is whole pages.
inline void system_trim() {
#ifdef __GLIBC__
  malloc_trim(0);
#endif
}

// What is done before a process becomes two, and after it in both.
inline void system_around_fork(void (*before)(), void (*after)()) { pthread_atfork(before, after, after); }

#else  // no arena here: nothing is reserved

inline size_t system_page() { return 4096; }
inline size_t system_memory() { return 0; }
inline void* system_reserve(size_t) { return nullptr; }
inline bool system_commit(void*, size_t) { return false; }
inline void system_give_back(void*, size_t) {}
inline void system_release(void*, size_t) {}
inline void system_trim() {}
inline void system_around_fork(void (*)(), void (*)()) {}

#endif

}  // namespace fastdiff
