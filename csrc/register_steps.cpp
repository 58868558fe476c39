// Tensors in, raw pointers to the kernels, tensors out: a sampler's step. Arguments were checked in fastdiff/ops.
#include <ATen/EmptyTensor.h>
#include <c10/core/GradMode.h>
#include <c10/core/impl/TorchDispatchModeTLS.h>
#include <torch/csrc/Exceptions.h>
#include <torch/csrc/autograd/python_variable.h>
#include <torch/csrc/profiler/api.h>

#include <algorithm>
#include <atomic>

#include "row_index.h"
#include "step_row.h"
#include "tensors.h"

namespace fastdiff {

namespace {

void step_on_cpu(const StepArgs& args) {
  const int64_t index = row_index("sampler_step", args.row, args.counter, args.rows);
  if (const char* missing = ON_CPU(sampler_step, args)) {
    const std::string name = missing;
    input_error("sampler_step: row " + std::to_string(index) + " of the table uses " + name +
                ", which was not given; pass " +
                (name == "variance"                         ? "a model_output with twice the channels of x"
                 : name == "noise" || name == "known_noise" ? name + " or seeds"
                                                            : name));
  }
}

// The outputs that a step is asked for, beside x'.
struct Asked {
  bool history, anchor;
  OptionalType model_input;
};

struct Made {
  Tensor x;
  OptionalTensor history, anchor, model_input;
};

// An uninitialised tensor; on the CPU without PyTorch's dispatcher, which takes longer than the memory does.
Tensor uninitialised(const Tensor& like, at::IntArrayRef sizes, at::ScalarType type) {
  return like.is_cpu() ? Tensor(at::detail::empty_cpu(sizes, type)) : at::empty(sizes, like.options().dtype(type));
}

Made take_step(StepArgs& args, const Tensor& x, const Tensor& m, const Tensor& table, int64_t row,
               const OptionalTensor& anchor, const OptionalTensor* history, const OptionalTensor& noise,
               const Asked& asked) {
  args.samples = x.size(0);
  args.count = x.numel() / x.size(0);
  args.groups = m.size(0) / x.size(0);
  args.output_count = m.numel() / m.size(0);
  args.output_inner = inner_of(m);
  args.x = array(x);
  args.model_output = array(m);
  args.noise = array(noise);
  args.anchor = array(anchor);
  args.hist1 = array(history[0]);
  args.hist2 = array(history[1]);
  args.hist3 = array(history[2]);
  args.table = table.const_data_ptr<float>();
  args.row = row;
  args.rows = table.size(0);
  args.threads = at::get_num_threads();
  if (args.copies == 0) args.copies = args.groups;

  Made made{uninitialised(x, x.sizes(), x.scalar_type())};
  args.new_x = array(made.x);
  if (asked.history) args.new_history = array(made.history = uninitialised(x, x.sizes(), at::kFloat));
  if (asked.anchor) args.new_anchor = array(made.anchor = uninitialised(x, x.sizes(), at::kFloat));
  if (asked.model_input) {
    at::DimVector sizes(x.sizes());
    sizes[0] *= args.copies;
    args.model_input = array(made.model_input = uninitialised(x, sizes, *asked.model_input));
  }
  LAUNCH(sampler_step, x, args) step_on_cpu(args);
  return made;
}

std::tuple<Tensor, Tensor, Tensor, Tensor> sampler_step(
    const Tensor& state, const Tensor& model_output, const Tensor& table, int64_t row, const OptionalTensor& counter,
    const OptionalTensor& anchor, const OptionalTensor& hist1, const OptionalTensor& hist2, const OptionalTensor& hist3,
    const OptionalTensor& noise, const OptionalTensor& seeds, const OptionalTensor& weights,
    const OptionalTensor& scales, const OptionalTensor& known, const OptionalTensor& known_noise,
    const OptionalTensor& mask, bool new_history, bool new_anchor, const std::optional<int64_t>& copies,
    const OptionalType& model_input) {
  const Tensor x = state.contiguous(), m = dense(model_output);
  const OptionalTensor z = contiguous(noise), image = contiguous(known), image_noise = contiguous(known_noise);
  const OptionalTensor blend = contiguous(mask), history[] = {hist1, hist2, hist3};
  StepArgs args{};
  args.copies = copies.value_or(0);
  args.known = array(image);
  args.known_noise = array(image_noise);
  args.mask = floats(blend);
  if (blend) {
    args.mask_count = blend->numel() / blend->size(0);
    args.mask_stride = blend->size(0) == 1 ? 0 : args.mask_count;
  }
  args.weights = floats(weights);
  args.scales = floats(scales);
  args.seeds = integers(seeds);
  args.counter = integers(counter);
  const Made made =
      take_step(args, x, m, table, row, anchor, history, z, {new_history, new_anchor, model_input});
  const auto given = [&](const OptionalTensor& value, at::ScalarType type) {
    return value ? *value : at::empty({0}, x.options().dtype(type));
  };
  return {made.x, given(made.history, at::kFloat), given(made.anchor, at::kFloat),
          given(made.model_input, model_input.value_or(x.scalar_type()))};
}

// Whether `value` is what a plain step takes: on the CPU, of those sizes, floating, and without a gradient to record.
bool plain(const Tensor& value, at::IntArrayRef sizes, bool recording) {
  const at::ScalarType type = value.scalar_type();
  return value.is_cpu() && value.sizes() == sizes && (type == at::kFloat || type == at::kHalf || type == at::kBFloat16) &&
         !(recording && value.requires_grad());
}

bool kept_or_none(const OptionalTensor& value, at::IntArrayRef sizes, bool recording) {
  return !value || (plain(*value, sizes, recording) && value->scalar_type() == at::kFloat && value->is_contiguous());
}

std::atomic<int64_t> plain_steps{0};

// Whether nothing but the result of a call can be seen: no subclass of Tensor, no tracing, no profiler.
bool unobserved(PyObject* x, PyObject* model_output) {
  return THPVariable_CheckExact(x) && THPVariable_CheckExact(model_output) &&
         !c10::impl::TorchDispatchModeTLS::any_modes_set() && !torch::profiler::impl::profilerEnabled();
}

// The tensor in `value`, or nothing for None; false for anything else.
bool as_tensor(PyObject* value, OptionalTensor& tensor) {
  if (value == Py_None) return true;
  if (!THPVariable_Check(value)) return false;
  tensor = THPVariable_Unpack(value);
  return true;
}

// What is not there is None. pybind11's own takes a tenth of a small step.
template <class... Tensors>
py::object tuple_of(const Tensors&... tensors) {
  PyObject* result = PyTuple_New(sizeof...(tensors));
  if (result == nullptr) throw py::error_already_set();
  Py_ssize_t place = 0;
  const auto wrap = [](const OptionalTensor& tensor) {
    return tensor ? THPVariable_Wrap(*tensor) : Py_NewRef(Py_None);
  };
  (PyTuple_SET_ITEM(result, place++, wrap(tensors)), ...);
  return py::reinterpret_steal<py::object>(result);
}

// The number of a row; -1 where there is no such row, or no table.
Py_ssize_t row_in(const OptionalTensor& rows, PyObject* number) {
  const Py_ssize_t row = PyNumber_AsSsize_t(number, nullptr);
  if (PyErr_Occurred()) throw py::error_already_set();
  const bool fits = rows && rows->is_cpu() && rows->scalar_type() == at::kFloat && rows->dim() == 2 &&
                    rows->size(1) == row::SIZE && rows->is_contiguous() && row < rows->size(0);
  return fits ? std::max<Py_ssize_t>(row, -1) : -1;
}

// The most frequent kind of step, checked here, where that takes a tenth of the time: x', and history' and anchor' or
// None. Nothing where the call is another kind or wrong, which is then found out in fastdiff/ops.
// arguments: x, model_output, table, row, anchor, history, noise, new_history, new_anchor
py::object plain_step(PyObject* const* arguments) {
  if (!unobserved(arguments[0], arguments[1])) return py::none();
  const Tensor &x = THPVariable_Unpack(arguments[0]), &model_output = THPVariable_Unpack(arguments[1]);
  const at::IntArrayRef sizes = x.sizes();
  const bool recording = c10::GradMode::is_enabled();
  OptionalTensor rows, anchor, noise, kept[3];
  PyObject* history = arguments[5];
  if (sizes.empty() || x.numel() == 0 || !plain(x, sizes, recording) || !plain(model_output, sizes, recording) ||
      !as_tensor(arguments[2], rows) || !as_tensor(arguments[4], anchor) || !kept_or_none(anchor, sizes, recording) ||
      !as_tensor(arguments[6], noise) || !(!noise || plain(*noise, sizes, recording)) || !PyTuple_Check(history) ||
      PyTuple_GET_SIZE(history) > 3) {
    return py::none();
  }
  for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(history); ++i) {
    if (!as_tensor(PyTuple_GET_ITEM(history, i), kept[i]) || !kept_or_none(kept[i], sizes, recording)) {
      return py::none();
    }
  }
  const Py_ssize_t row = row_in(rows, arguments[3]);
  if (row < 0) return py::none();
  StepArgs args{};
  const Made made = take_step(args, x.contiguous(), dense(model_output), *rows, row, anchor, kept, contiguous(noise),
                              {arguments[7] == Py_True, arguments[8] == Py_True, std::nullopt});
  ++plain_steps;
  return tuple_of(made.x, made.history, made.anchor);
}

// A plain step of a row of x and m alone, in one dtype, at a time that has to be a float32 tensor: (x',). Nothing where
// the call is another kind or wrong.
// arguments: x, model_output, table, row, timestep
py::object bare_step(PyObject* const* arguments) {
  PyObject* time = arguments[4];
  if (!unobserved(arguments[0], arguments[1]) || !THPVariable_CheckExact(time) ||
      THPVariable_Unpack(time).scalar_type() != at::kFloat) {
    return py::none();
  }
  const Tensor &x = THPVariable_Unpack(arguments[0]), &model_output = THPVariable_Unpack(arguments[1]);
  const at::IntArrayRef sizes = x.sizes();
  const bool recording = c10::GradMode::is_enabled();
  OptionalTensor rows;
  if (!as_tensor(arguments[2], rows)) return py::none();
  const Py_ssize_t row = row_in(rows, arguments[3]);
  if (row < 0 || sizes.empty() || x.numel() == 0 || x.scalar_type() != model_output.scalar_type() ||
      !plain(x, sizes, recording) || !plain(model_output, sizes, recording)) {
    return py::none();
  }
  StepArgs args{};
  const OptionalTensor none[3];
  const Made made =
      take_step(args, x.contiguous(), dense(model_output), *rows, row, none[0], none, none[0], {false, false, std::nullopt});
  ++plain_steps;
  return tuple_of(made.x);
}

// Called as they are: finding out each argument's type would take longer than the smallest steps.
template <py::object (*step)(PyObject* const*), Py_ssize_t expected>
PyObject* called(PyObject*, PyObject* const* arguments, Py_ssize_t count) {
  HANDLE_TH_ERRORS
  if (count != expected) {
    PyErr_Format(PyExc_TypeError, "expected %zd arguments, got %zd", expected, count);
    return nullptr;
  }
  return step(arguments).release().ptr();
  END_HANDLE_TH_ERRORS
}

template <py::object (*step)(PyObject* const*), Py_ssize_t expected>
void define(py::module_& m, const char* name) {
  static PyMethodDef method = {name, reinterpret_cast<PyCFunction>(&called<step, expected>), METH_FASTCALL, nullptr};
  m.attr(name) = py::reinterpret_steal<py::object>(PyCFunction_New(&method, nullptr));
}

}  // namespace

void register_steps(py::module_& m) {
  m.def("sampler_step", &sampler_step);
  define<&plain_step, 9>(m, "plain_step");
  define<&bare_step, 5>(m, "bare_step");
  m.def("take_plain_steps", [] { return plain_steps.exchange(0); });
}

}  // namespace fastdiff
