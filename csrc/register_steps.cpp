// Tensors in, raw pointers to the kernels, tensors out: a sampler's step and the operators before it. Arguments were
// checked in fastdiff/ops.
#include <c10/core/GradMode.h>

#include "step_row.h"
#include "tensors.h"

namespace fastdiff {

namespace {

[[noreturn]] void input_error(const std::string& message) {
  const py::object type = py::module_::import("fastdiff.errors").attr("InputError");
  PyErr_SetString(type.ptr(), message.c_str());
  throw py::error_already_set();
}

// row + counter: on the CPU both can be read, so that a wrong one is an error.
int64_t row_index(const std::string& name, int64_t row, const int64_t* counter, int64_t rows) {
  const int64_t index = row + (counter ? *counter : 0);
  if (index < 0 || index >= rows) {
    input_error(name + ": row + counter = " + std::to_string(index) + " is outside the table's " +
                std::to_string(rows) + " rows");
  }
  return index;
}

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

// What is asked for of a row, where it is on the CPU and can be read.
template <class Args>
Args prediction_args(const char* name, const Tensor& x, const Tensor& model_output, const Tensor& table, int64_t row,
                     const OptionalTensor& counter, const OptionalTensor& weights) {
  Args args{};
  args.index = static_cast<uint32_t>(row_index(name, row, integers(counter), table.size(0)));
  args.row = table.const_data_ptr<float>() + args.index * row::SIZE;
  args.samples = x.size(0);
  args.count = x.numel() / x.size(0);
  args.groups = model_output.size(0) / x.size(0);
  args.output_count = model_output.numel() / model_output.size(0);
  args.output_inner = inner_of(model_output);
  args.x = array(x);
  args.model_output = array(model_output);
  if (weights) args.weights = weights->const_data_ptr<float>();
  args.threads = at::get_num_threads();
  return args;
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
  const OptionalTensor blend = contiguous(mask);
  const auto wide = x.options().dtype(at::kFloat);
  const Tensor next_x = at::empty(x.sizes(), x.options());
  const Tensor history = new_history ? at::empty(x.sizes(), wide) : at::empty({0}, wide);
  const Tensor next_anchor = new_anchor ? at::empty(x.sizes(), wide) : at::empty({0}, wide);

  StepArgs args{};
  args.samples = x.size(0);
  args.count = x.numel() / x.size(0);
  args.groups = m.size(0) / x.size(0);
  args.output_count = m.numel() / m.size(0);
  args.output_inner = inner_of(m);
  args.copies = copies.value_or(args.groups);
  const auto input_options = x.options().dtype(model_input.value_or(x.scalar_type()));
  at::DimVector input_sizes(x.sizes());
  input_sizes[0] *= args.copies;
  const Tensor next_input = model_input ? at::empty(input_sizes, input_options) : at::empty({0}, input_options);
  args.x = array(x);
  args.model_output = array(m);
  args.noise = array(z);
  args.anchor = array(anchor);
  args.hist1 = array(hist1);
  args.hist2 = array(hist2);
  args.hist3 = array(hist3);
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
  args.table = table.const_data_ptr<float>();
  args.row = row;
  args.rows = table.size(0);
  args.counter = integers(counter);
  args.new_x = array(next_x);
  if (new_history) args.new_history = array(history);
  if (new_anchor) args.new_anchor = array(next_anchor);
  if (model_input) args.model_input = array(next_input);
  args.threads = at::get_num_threads();

  LAUNCH(sampler_step, x, args) step_on_cpu(args);
  return {next_x, history, next_anchor, next_input};
}

// Whether `value` is what a plain step takes: on the CPU, of those sizes, floating, and without a gradient to record.
bool plain(const Tensor& value, at::IntArrayRef sizes, bool recording) {
  const at::ScalarType type = value.scalar_type();
  return value.is_cpu() && value.sizes() == sizes && (type == at::kFloat || type == at::kHalf || type == at::kBFloat16) &&
         !(recording && value.requires_grad());
}

bool plain_or_none(const OptionalTensor& value, at::IntArrayRef sizes, bool recording) {
  return !value || plain(*value, sizes, recording);
}

bool kept_or_none(const OptionalTensor& value, at::IntArrayRef sizes, bool recording) {
  return !value || (plain(*value, sizes, recording) && value->scalar_type() == at::kFloat && value->is_contiguous());
}

// The most frequent kind of step, checked here, where that takes a tenth of the time; nothing where the call is another
// kind or wrong, which is then found out in fastdiff/ops.
std::optional<std::tuple<Tensor, OptionalTensor, OptionalTensor>> plain_step(
    const Tensor& x, const Tensor& model_output, const Tensor& table, int64_t row, const OptionalTensor& anchor,
    const OptionalTensor& hist1, const OptionalTensor& hist2, const OptionalTensor& hist3, const OptionalTensor& noise,
    bool new_history, bool new_anchor) {
  const at::IntArrayRef sizes = x.sizes();
  const bool recording = c10::GradMode::is_enabled();
  if (sizes.empty() || x.numel() == 0 || !plain(x, sizes, recording) || !plain(model_output, sizes, recording) ||
      !kept_or_none(anchor, sizes, recording) || !kept_or_none(hist1, sizes, recording) ||
      !kept_or_none(hist2, sizes, recording) || !kept_or_none(hist3, sizes, recording) ||
      !plain_or_none(noise, sizes, recording)) {
    return std::nullopt;
  }
  if (!table.is_cpu() || table.scalar_type() != at::kFloat || table.dim() != 2 || table.size(1) != row::SIZE ||
      !table.is_contiguous() || row < 0 || row >= table.size(0)) {
    return std::nullopt;
  }
  const OptionalTensor none;
  auto [next_x, history, next_anchor, next_input] =
      sampler_step(x, model_output, table, row, none, anchor, hist1, hist2, hist3, noise, none, none, none, none, none,
                   none, new_history, new_anchor, std::nullopt, std::nullopt);
  return std::tuple{next_x, new_history ? OptionalTensor(history) : none,
                    new_anchor ? OptionalTensor(next_anchor) : none};
}

Tensor guidance_weights(const Tensor& model_output, const Tensor& weights, double rescale, bool perpendicular,
                        const std::optional<int64_t>& channels) {
  const Tensor m = dense(model_output), out = at::empty(weights.sizes(), weights.options());
  const int64_t used = channels.value_or(m.size(1));
  WeightsArgs args{};
  args.samples = weights.size(0);
  args.groups = weights.size(1);
  args.output_count = m.numel() / m.size(0);
  args.count = args.output_count / m.size(1) * used;
  args.channels = channels_last(m) ? used : 1;
  args.inner = inner_of(m);
  args.model_output = array(m);
  args.weights = weights.const_data_ptr<float>();
  args.rescale = rescale;
  args.perpendicular = perpendicular;
  args.out = out.mutable_data_ptr<float>();
  args.threads = at::get_num_threads();
  ON_CPU(guidance_weights, args);
  return out;
}

Tensor dynamic_threshold(const Tensor& state, const Tensor& model_output, const Tensor& table, int64_t row,
                         const OptionalTensor& counter, const OptionalTensor& weights, double percentile,
                         double maximum) {
  const char* name = "dynamic_threshold";
  const Tensor x = state.contiguous(), m = dense(model_output);
  const Tensor scales = at::empty({x.size(0), 3}, x.options().dtype(at::kFloat));
  auto args = prediction_args<ThresholdArgs>(name, x, m, table, row, counter, weights);
  const float clip = args.row[row::CLIP];
  if (!(clip > 0.0f && clip < INFINITY)) {
    std::ostringstream message;
    message << name << ": row " << args.index << " clips D at " << clip << "; expected a positive finite clip";
    input_error(message.str());
  }
  args.percentile = percentile;
  args.maximum = static_cast<float>(maximum);
  args.scales = scales.mutable_data_ptr<float>();
  ON_CPU(dynamic_threshold, args);
  return scales;
}

Tensor langevin_step_size(const Tensor& state, const Tensor& model_output, const Tensor& table, int64_t row,
                          const OptionalTensor& counter, const OptionalTensor& weights, const OptionalTensor& noise,
                          const OptionalTensor& seeds, double snr) {
  const Tensor x = state.contiguous(), m = dense(model_output);
  const OptionalTensor z = noise ? OptionalTensor(noise->contiguous()) : noise;
  const Tensor scales = at::empty({x.size(0), 3}, x.options().dtype(at::kFloat));
  auto args = prediction_args<StepSizeArgs>("langevin_step_size", x, m, table, row, counter, weights);
  args.noise = array(z);
  args.seeds = integers(seeds);
  args.snr = snr;
  args.scales = scales.mutable_data_ptr<float>();
  ON_CPU(langevin_step_size, args);
  return scales;
}

}  // namespace

void register_steps(py::module_& m) {
  m.def("sampler_step", &sampler_step);
  m.def("plain_step", &plain_step);
  m.def("guidance_weights", &guidance_weights);
  m.def("dynamic_threshold", &dynamic_threshold);
  m.def("langevin_step_size", &langevin_step_size);
}

}  // namespace fastdiff
