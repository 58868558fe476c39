// Tensors in, raw pointers to the kernels, tensors out: the operators that run before a sampler's step. Arguments were
// checked in fastdiff/ops.
#include <sstream>

#include "row_index.h"
#include "step_row.h"
#include "tensors.h"

namespace fastdiff {

namespace {

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

void register_prepass(py::module_& m) {
  m.def("guidance_weights", &guidance_weights);
  m.def("dynamic_threshold", &dynamic_threshold);
  m.def("langevin_step_size", &langevin_step_size);
}

}  // namespace fastdiff
