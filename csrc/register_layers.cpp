// Whether layers still are what they were when prepacked.py looked at them, for each call of each: in Python that takes
// as long as a small layer.
#include <ATen/Context.h>
#include <c10/core/GradMode.h>
#include <torch/csrc/autograd/python_variable.h>

#include <vector>

#include "tensors.h"

namespace fastdiff {
namespace {

using Storage = c10::intrusive_ptr<c10::StorageImpl>;
using WeakStorage = c10::weak_intrusive_ptr<c10::StorageImpl>;

PyObject* name(const char* text) { return PyUnicode_InternFromString(text); }

// A parameter as it was. No reference is held that would keep it or its memory alive.
class Seen {
 public:
  Seen() = default;
  explicit Seen(py::handle parameter)
      : parameter_(py::reinterpret_steal<py::object>(PyWeakref_NewRef(parameter.ptr(), nullptr))) {
    if (!parameter_) throw py::error_already_set();
    const Tensor& tensor = THPVariable_Unpack(parameter.ptr());
    storage_ = WeakStorage(Storage::reclaim_copy(tensor.storage().unsafeGetStorageImpl()));
    offset_ = tensor.storage_offset();
    strides_ = tensor.strides().vec();
    version_ = tensor._version();
  }

  bool still(PyObject* parameter) const {
    if (!parameter || parameter == Py_None) return !parameter_;
    if (!parameter_) return false;
    if (PyWeakref_GetObject(parameter_.ptr()) != parameter) return false;
    const Tensor& tensor = THPVariable_Unpack(parameter);
    // While the weak reference is held no other storage has this address.
    return tensor.unsafeGetTensorImpl()->unsafe_storage().unsafeGetStorageImpl() == storage_._unsafe_get_target() &&
           !tensor.is_inference() && tensor._version() == version_ && tensor.storage_offset() == offset_ &&
           tensor.strides() == at::IntArrayRef(strides_) && !(c10::GradMode::is_enabled() && tensor.requires_grad());
  }

 private:
  py::object parameter_;
  WeakStorage storage_{Storage()};
  int64_t offset_ = 0;
  std::vector<int64_t> strides_;
  int64_t version_ = 0;
};

class Layer {
 public:
  explicit Layer(py::handle layer)
      : layer_(py::reinterpret_steal<py::object>(PyWeakref_NewRef(layer.ptr(), nullptr))), kind_(Py_TYPE(layer.ptr())) {
    if (!layer_) throw py::error_already_set();
    const py::dict held = layer.attr("__dict__");
    for (PyObject* each : settings())
      values_.push_back(py::reinterpret_borrow<py::object>(PyDict_GetItem(held.ptr(), each)));
    const py::dict parameters = held["_parameters"];
    weight_ = Seen(parameters["weight"]);
    if (!parameters["bias"].is_none()) bias_ = Seen(parameters["bias"]);
  }

  bool still(PyObject* layer) const {
    if (PyWeakref_GetObject(layer_.ptr()) != layer || Py_TYPE(layer) != kind_) return false;
    const auto dictionary = py::reinterpret_steal<py::object>(PyObject_GenericGetDict(layer, nullptr));
    PyObject* const held = dictionary.ptr();
    static PyObject *const forward = name("forward"), *const convolution = name("_conv_forward");
    static PyObject *const hooks = name("_forward_hooks"), *const pre_hooks = name("_forward_pre_hooks");
    if (!empty(held, hooks) || !empty(held, pre_hooks)) return false;
    if (PyDict_GetItem(held, forward) || PyDict_GetItem(held, convolution)) return false;
    for (size_t i = 0; i < values_.size(); ++i) {
      if (PyDict_GetItem(held, settings()[i]) != values_[i].ptr()) return false;
    }
    static PyObject *const parameters = name("_parameters"), *const weight = name("weight"), *const bias = name("bias");
    PyObject* const own = PyDict_GetItem(held, parameters);
    return own && PyDict_Check(own) && weight_.still(PyDict_GetItem(own, weight)) &&
           bias_.still(PyDict_GetItem(own, bias));
  }

 private:
  // What a convolution's result depends on besides its parameters; a linear layer has none of it.
  static const std::vector<PyObject*>& settings() {
    static const std::vector<PyObject*> names = {name("kernel_size"), name("stride"), name("padding"),
                                                 name("dilation"),    name("groups"), name("padding_mode")};
    return names;
  }

  static bool empty(PyObject* held, PyObject* hooks) {
    PyObject* const found = PyDict_GetItem(held, hooks);
    return found && PyDict_Check(found) && PyDict_Size(found) == 0;
  }

  py::object layer_;
  PyTypeObject* kind_;
  std::vector<py::object> values_;
  Seen weight_, bias_;
};

// Of layers that prepacked.py has found to fit an input of that dtype and number of channels.
class Layers {
 public:
  Layers(const py::tuple& layers, const Tensor& x, int64_t channels, bool flat)
      : writes_(unseen_writes()), dtype_(x.scalar_type()), channels_(channels), flat_(flat) {
    for (const py::handle layer : layers) layers_.emplace_back(layer);
  }

  // Whether x, with `second` for the last channels, fits them now. flat: some layer takes no maps.
  bool fit(const py::tuple& layers, py::handle x, py::handle second) const {
    if (!at::globalContext().userEnabledMkldnn() || unseen_writes() != writes_ || !usable(x)) return false;
    const Tensor& input = THPVariable_Unpack(x.ptr());
    int64_t channels = input.dim() == 4 ? input.size(1) : input.size(2);
    if (!second.is_none()) {
      if (!usable(second) || input.dim() != 4) return false;
      channels += THPVariable_Unpack(second.ptr()).size(1);
    }
    if (channels != channels_ || (flat_ && input.dim() == 4) || layers.size() != layers_.size()) return false;
    for (size_t i = 0; i < layers_.size(); ++i) {
      if (!layers_[i].still(PyTuple_GET_ITEM(layers.ptr(), i))) return false;
    }
    return true;
  }

 private:
  bool usable(py::handle given) const {
    if (reinterpret_cast<PyObject*>(Py_TYPE(given.ptr())) != THPVariableClass) return false;
    const Tensor& x = THPVariable_Unpack(given.ptr());
    if (x.scalar_type() != dtype_ || !x.is_cpu() || x.numel() == 0) return false;
    if (c10::GradMode::is_enabled() && x.requires_grad()) return false;
    return x.dim() == 3 || (x.dim() == 4 && x.is_contiguous(at::MemoryFormat::ChannelsLast));
  }

  std::vector<Layer> layers_;
  int64_t writes_;
  at::ScalarType dtype_;
  int64_t channels_;
  bool flat_;
};

}  // namespace

void register_layers(py::module_& m) {
  py::class_<Layers>(m, "Layers")
      .def(py::init<const py::tuple&, const Tensor&, int64_t, bool>())
      .def("fit", &Layers::fit);
}

}  // namespace fastdiff
