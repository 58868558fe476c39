// Writes through `tensor.data`, which the tensor's own version does not count.
#include <ATen/core/VariableHooksInterface.h>
#include <c10/core/StorageImpl.h>

#include <algorithm>
#include <mutex>
#include <unordered_map>
#include <vector>

#include "tensors.h"

namespace fastdiff {
namespace {

using at::TensorBase;
using WeakStorage = c10::weak_intrusive_ptr<c10::StorageImpl>;

// What else shares a tensor's memory, and how often it had been written to when it was last looked at.
struct Alias {
  WeakStorage storage;
  c10::VariableVersion version;
  uint32_t seen;
};

class Writes {
 public:
  void note(const TensorBase& alias) {
    if (!alias.has_storage() || alias.is_inference()) return;
    const auto& version = alias.unsafeGetTensorImpl()->version_counter();
    const std::lock_guard lock(mutex_);
    if (aliases_.size() >= room_) {
      look();
      room_ = std::max<size_t>(64, 2 * aliases_.size());
    }
    aliases_.push_back({WeakStorage(storage(alias)), version, version.current_version()});
  }

  void watch(const TensorBase& tensor) {
    if (!tensor.has_storage()) return;
    const std::lock_guard lock(mutex_);
    if (watched_.size() >= most_) {
      std::erase_if(watched_, [](const auto& each) { return each.second.expired(); });
      most_ = std::max<size_t>(1024, 2 * watched_.size());
    }
    const auto held = storage(tensor);
    // The weak reference keeps the address from being another storage's.
    watched_.try_emplace(held.get(), WeakStorage(held));
  }

  int64_t count() {
    const std::lock_guard lock(mutex_);
    if (!aliases_.empty()) look();
    return count_;
  }

 private:
  static c10::intrusive_ptr<c10::StorageImpl> storage(const TensorBase& tensor) {
    // Asked for in the other way, tensors of classes that wrap others refuse.
    const auto& storage = tensor.unsafeGetTensorImpl()->unsafe_storage();
    return c10::intrusive_ptr<c10::StorageImpl>::reclaim_copy(storage.unsafeGetStorageImpl());
  }

  // Counts what was written since, and lets go of aliases that nobody holds any more.
  void look() {
    std::erase_if(aliases_, [this](Alias& alias) {
      const uint32_t now = alias.version.current_version();
      if (now != alias.seen && watched_.contains(alias.storage._unsafe_get_target())) ++count_;
      alias.seen = now;
      return alias.version.unique() || alias.storage.expired();
    });
  }

  std::mutex mutex_;
  std::vector<Alias> aliases_;
  std::unordered_map<const c10::StorageImpl*, WeakStorage> watched_;
  size_t room_ = 64, most_ = 1024;
  int64_t count_ = 0;
};

// As long as the process: tensors are used until its very end.
Writes& writes() {
  static Writes* const instance = new Writes;
  return *instance;
}

// PyTorch's own functions of variables, and a note of every alias that they make.
class Hooks final : public at::impl::VariableHooksInterface {
 public:
  explicit Hooks(const VariableHooksInterface& own) : own_(own) {}

  TensorBase variable_data(const TensorBase& self) const override {
    TensorBase alias = own_.variable_data(self);
    writes().note(alias);
    return alias;
  }

  TensorBase tensor_data(const TensorBase& self) const override { return own_.tensor_data(self); }
  const c10::intrusive_ptr<torch::autograd::Node>& grad_fn(const TensorBase& self) const override {
    return own_.grad_fn(self);
  }
  unsigned _register_hook(const TensorBase& self, std::function<TensorBase(const TensorBase&)> hook) const override {
    return own_._register_hook(self, std::move(hook));
  }
  void remove_hook(const TensorBase& self, unsigned position) const override { own_.remove_hook(self, position); }
  bool is_view(const TensorBase& self) const override { return own_.is_view(self); }
  const TensorBase& base(const TensorBase& self) const override { return own_.base(self); }
  const std::string& name(const TensorBase& self) const override { return own_.name(self); }
  bool is_leaf(const TensorBase& self) const override { return own_.is_leaf(self); }
  int64_t output_nr(const TensorBase& self) const override { return own_.output_nr(self); }
  void set_data(const TensorBase& self, const TensorBase& data) const override { own_.set_data(self, data); }
  TensorBase data(const TensorBase& self) const override { return own_.data(self); }
  int64_t _version(const TensorBase& self) const override { return own_._version(self); }
  void retain_grad(const TensorBase& self) const override { own_.retain_grad(self); }
  bool retains_grad(const TensorBase& self) const override { return own_.retains_grad(self); }
  void _backward(const Tensor& self, at::TensorList inputs, const std::optional<Tensor>& gradient,
                 std::optional<bool> keep_graph, bool create_graph) const override {
    own_._backward(self, inputs, gradient, keep_graph, create_graph);
  }
  void requires_grad_(const TensorBase& self, bool wanted) const override { own_.requires_grad_(self, wanted); }
  void basic_autograd_not_implemented_fallback(const c10::OperatorHandle& op, c10::DispatchKeySet keys,
                                               torch::jit::Stack* stack) const override {
    own_.basic_autograd_not_implemented_fallback(op, keys, stack);
  }
  std::optional<c10::ScalarType> grad_dtype(const TensorBase& self) const override { return own_.grad_dtype(self); }
  void set_grad_dtype(const TensorBase& self, const std::optional<c10::ScalarType>& dtype) const override {
    own_.set_grad_dtype(self, dtype);
  }

 private:
  const VariableHooksInterface& own_;
};

// From now on aliases are noted.
void notice_writes() {
  static const bool noticing = [] {
    at::impl::SetVariableHooks(new Hooks(*at::impl::GetVariableHooks()));
    return true;
  }();
  (void)noticing;
}

}  // namespace

int64_t unseen_writes() { return writes().count(); }

void register_writes(py::module_& m) {
  m.def("notice_writes", &notice_writes);
  m.def("watch_writes", [](const Tensor& tensor) { writes().watch(tensor); });
  m.def("unseen_writes", &unseen_writes);
}

}  // namespace fastdiff
