// An allocator of PyTorch's CPU tensors that takes from a pool where its thread is inside the pool's scope.
#include <c10/core/CPUAllocator.h>

#include <cstring>

#include "arena.h"
#include "tensors.h"

namespace fastdiff {

namespace {

constexpr int DEEPEST = 64;

// The scopes that a thread is in, the innermost last; null for one outside of all arenas.
thread_local Pool* scopes[DEEPEST];
thread_local int depth = 0;

Pool* inside() { return depth == 0 ? nullptr : scopes[depth - 1]; }

void enter(Pool* pool) {
  if (depth == DEEPEST) throw std::runtime_error("more than 64 arenas were entered inside each other");
  if (pool) pool->enter();
  scopes[depth++] = pool;
}

void leave(Pool* pool) {
  if (depth == 0 || scopes[depth - 1] != pool) {
    throw std::runtime_error("an arena is left that this thread did not enter last; leave the inner one first");
  }
  --depth;
  if (pool) pool->leave();
}

void release(void* data) {
  c10::profiledCPUMemoryReporter().Delete(data);
  Pool::release(data);
}

class ScopedAllocator final : public c10::Allocator {
 public:
  explicit ScopedAllocator(c10::Allocator* outside) : outside_(outside) {}

  c10::DataPtr allocate(size_t bytes) override {
    void* const data = inside() && bytes > 0 ? inside()->allocate(bytes) : nullptr;
    if (!data) return outside_->allocate(bytes);
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
    if (Pool::hold(data)) return release(data);
    instance->outside_->raw_deallocate(data);
  }

  static inline ScopedAllocator* instance = nullptr;
  c10::Allocator* const outside_;
};

// What Python holds of a pool. With it goes what is not in use; the rest follows as it is released.
class Arena {
 public:
  explicit Arena(size_t limit) : pool_(new Pool(limit)) { ScopedAllocator::install(); }
  ~Arena() {
    pool_->close();
    pool_->drop();
  }
  Arena(const Arena&) = delete;
  Arena& operator=(const Arena&) = delete;

  Pool& pool() { return *pool_; }

 private:
  Pool* const pool_;
};

// Moves a tensor, and all that share its memory, out of an arena that this thread is not inside of.
void move_out(const at::Tensor& tensor) {
  if (!tensor.has_storage() || tensor.storage().device_type() != c10::kCPU) return;
  c10::StorageImpl* const storage = tensor.storage().unsafeGetStorageImpl();
  const c10::DataPtr& block = storage->data_ptr();
  if (block.get_deleter() != &release || Pool::owner(block.get()) == inside()) return;
  c10::DataPtr own = c10::GetCPUAllocator()->allocate(storage->nbytes());
  std::memcpy(own.get(), block.get(), storage->nbytes());
  storage->set_data_ptr_noswap(std::move(own));
}

// (bytes held, hits, misses); the last two count from the last reset on.
std::tuple<int64_t, int64_t, int64_t> arena_totals(bool reset) {
  if (reset) return {totals().held, totals().hits.exchange(0), totals().misses.exchange(0)};
  return {totals().held, totals().hits, totals().misses};
}

}  // namespace

void register_arena(py::module_& m) {
  py::class_<Arena>(m, "Arena")
      .def(py::init<size_t>())
      .def("enter", [](Arena& arena) { enter(&arena.pool()); })
      .def("leave", [](Arena& arena) { leave(&arena.pool()); })
      .def("clear", [](Arena& arena) { arena.pool().clear(); })
      .def_property_readonly("bytes", [](Arena& arena) { return arena.pool().held(); })
      .def_property_readonly("idle", [](Arena& arena) { return arena.pool().idle(); })
      .def_property_readonly("hits", [](Arena& arena) { return arena.pool().hits(); })
      .def_property_readonly("misses", [](Arena& arena) { return arena.pool().misses(); });
  m.def("arena_totals", &arena_totals);
  m.def("enter_outside", [] { enter(nullptr); });
  m.def("leave_outside", [] { leave(nullptr); });
  m.def("move_out", &move_out);
  m.def("trim_memory", &system_trim);
}

}  // namespace fastdiff
