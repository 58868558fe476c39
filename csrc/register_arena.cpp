// An allocator of PyTorch's CPU tensors that takes from a pool where its thread is inside the pool's scope.
#include <c10/core/CPUAllocator.h>
#include <c10/core/impl/alloc_cpu.h>

#include "arena.h"
#include "tensors.h"

namespace fastdiff {

void* system_allocate(size_t bytes) { return c10::alloc_cpu(bytes); }
void system_free(void* data) { c10::free_cpu(data); }

namespace {

constexpr int DEEPEST = 64;

// The scopes that a thread is in, the innermost last. Trivial, since tensors are freed until a thread's very end.
thread_local Pool* scopes[DEEPEST];
thread_local int depth = 0;

void release(void* data) {
  c10::profiledCPUMemoryReporter().Delete(data);
  Pool::release(data);
}

class ScopedAllocator final : public c10::Allocator {
 public:
  explicit ScopedAllocator(c10::Allocator* outside) : outside_(outside) {}

  c10::DataPtr allocate(size_t bytes) override {
    if (depth == 0 || bytes == 0) return outside_->allocate(bytes);
    void* const data = scopes[depth - 1]->allocate(bytes);
    c10::profiledCPUMemoryReporter().New(data, bytes);
    return {data, data, &release, c10::Device(c10::kCPU)};
  }

  // For memory with only an address left: oneDNN's is given back so, whoever it came from.
  c10::DeleterFnPtr raw_deleter() const override { return &release_any; }

  void copy_data(void* to, const void* from, size_t bytes) const override { default_copy_data(to, from, bytes); }

  static void install() {
    static const bool installed = [] {
      instance = new ScopedAllocator(c10::GetCPUAllocator());
      c10::SetCPUAllocator(instance, /*priority=*/1);
      return true;
    }();
    (void)installed;
  }

 private:
  static void release_any(void* data) {
    if (addresses().hold(data)) return release(data);
    instance->outside_->raw_deallocate(data);
  }

  static inline ScopedAllocator* instance = nullptr;
  c10::Allocator* const outside_;
};

// What Python holds of a pool. With it go the idle blocks; those in use follow as they are released.
class Arena {
 public:
  explicit Arena(size_t limit) : pool_(new Pool(limit)) { ScopedAllocator::install(); }
  ~Arena() {
    pool_->set_limit(0);
    pool_->drop();
  }
  Arena(const Arena&) = delete;
  Arena& operator=(const Arena&) = delete;

  void enter() {
    if (depth == DEEPEST) throw std::runtime_error("more than 64 arenas were entered inside each other");
    pool_->retain();
    scopes[depth++] = pool_;
  }

  void leave() {
    if (depth == 0 || scopes[depth - 1] != pool_) {
      throw std::runtime_error("an arena is left that this thread did not enter last; leave the inner one first");
    }
    --depth;
    pool_->drop();
  }

  Pool& pool() { return *pool_; }

 private:
  Pool* const pool_;
};

// (bytes held, hits, misses); the last two count from the last reset on.
std::tuple<int64_t, int64_t, int64_t> arena_totals(bool reset) {
  if (reset) return {totals().held, totals().hits.exchange(0), totals().misses.exchange(0)};
  return {totals().held, totals().hits, totals().misses};
}

}  // namespace

void register_arena(py::module_& m) {
  py::class_<Arena>(m, "Arena")
      .def(py::init<size_t>())
      .def("enter", &Arena::enter)
      .def("leave", &Arena::leave)
      .def("clear", [](Arena& arena) { arena.pool().clear(); })
      .def_property_readonly("bytes", [](Arena& arena) { return arena.pool().held(); })
      .def_property_readonly("idle", [](Arena& arena) { return arena.pool().idle(); })
      .def_property_readonly("hits", [](Arena& arena) { return arena.pool().hits(); })
      .def_property_readonly("misses", [](Arena& arena) { return arena.pool().misses(); });
  m.def("arena_totals", &arena_totals);
}

}  // namespace fastdiff
