// fastdiff._C: tensors in, raw pointers to the kernels, tensors out. The only file that knows torch.
// Arguments were checked in fastdiff/ops/__init__.py.
#include <ATen/Parallel.h>
#include <ATen/Version.h>
#include <torch/extension.h>

#ifdef FASTDIFF_CUDA
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#endif

#include "ops.h"
#include "step_row.h"

namespace fastdiff {
namespace {

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;
using OptionalType = std::optional<at::ScalarType>;

Type type_of(at::ScalarType type) {
  return type == at::kHalf ? Type::F16 : type == at::kBFloat16 ? Type::BF16 : Type::F32;
}

Array array(const Tensor& tensor) { return {tensor.data_ptr(), type_of(tensor.scalar_type())}; }

Array array(const OptionalTensor& tensor) { return tensor ? array(*tensor) : Array{}; }

const float* floats(const OptionalTensor& tensor) { return tensor ? tensor->const_data_ptr<float>() : nullptr; }

const int64_t* integers(const OptionalTensor& tensor) { return tensor ? tensor->const_data_ptr<int64_t>() : nullptr; }

at::MemoryFormat layout_of(const Tensor& x) {
  if (x.is_contiguous()) return at::MemoryFormat::Contiguous;
  return x.dim() == 5 ? at::MemoryFormat::ChannelsLast3d : at::MemoryFormat::ChannelsLast;
}

bool channels_last(const Tensor& x) { return !x.is_contiguous(); }

int64_t inner_of(const Tensor& x) { return channels_last(x) ? x.size(1) : 1; }

// A dense tensor: as it is if contiguous or channels-last, else a contiguous copy.
Tensor dense(const Tensor& x) {
  if (x.is_contiguous()) return x;
  if (x.dim() == 4 && x.is_contiguous(at::MemoryFormat::ChannelsLast)) return x;
  if (x.dim() == 5 && x.is_contiguous(at::MemoryFormat::ChannelsLast3d)) return x;
  return x.contiguous();
}

OptionalTensor contiguous(const OptionalTensor& x) { return x ? OptionalTensor(x->contiguous()) : x; }

enum class Capability { DEFAULT, AVX2, AVX512 };

Capability capability() {
  static const Capability value = [] {
#ifdef FASTDIFF_X86
    const std::string name = at::get_cpu_capability();
    if (name.rfind("AVX512", 0) == 0 || name == "AMX") return Capability::AVX512;
    if (name == "AVX2") return Capability::AVX2;
#endif
    return Capability::DEFAULT;
  }();
  return value;
}

#ifdef FASTDIFF_X86
#define ON_CPU(FUNCTION, ARGS)                                          \
  (capability() == Capability::AVX512 ? cpu::AVX512::FUNCTION(ARGS)     \
   : capability() == Capability::AVX2 ? cpu::AVX2::FUNCTION(ARGS)       \
                                      : cpu::DEFAULT::FUNCTION(ARGS))
#else
#define ON_CPU(FUNCTION, ARGS) cpu::DEFAULT::FUNCTION(ARGS)
#endif

#ifdef FASTDIFF_CUDA
void check(int error) { C10_CUDA_CHECK(static_cast<cudaError_t>(error)); }

#define LAUNCH(FUNCTION, TENSOR, ...)                                               \
  if ((TENSOR).is_cuda()) {                                                         \
    const c10::cuda::CUDAGuard guard((TENSOR).device());                            \
    check(cuda::FUNCTION(__VA_ARGS__, c10::cuda::getCurrentCUDAStream().stream())); \
  } else
#else
#define LAUNCH(FUNCTION, TENSOR, ...)
#endif

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
                (name == "variance" ? "a model_output with twice the channels of x"
                 : name == "noise" || name == "known_noise" ? name + " or seeds"
                                                            : name));
  }
}

std::tuple<Tensor, Tensor, Tensor, Tensor> sampler_step(
    const Tensor& state, const Tensor& model_output, const Tensor& table, int64_t row, const OptionalTensor& counter,
    const OptionalTensor& anchor, const OptionalTensor& hist1, const OptionalTensor& hist2,
    const OptionalTensor& hist3, const OptionalTensor& noise, const OptionalTensor& seeds,
    const OptionalTensor& weights, const OptionalTensor& scales, const OptionalTensor& known,
    const OptionalTensor& known_noise, const OptionalTensor& mask, bool new_history, bool new_anchor,
    const std::optional<int64_t>& copies, const OptionalType& model_input) {
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

NoiseArgs noise_args(const Tensor& out, const OptionalTensor& seeds, int64_t step, int64_t stream) {
  NoiseArgs args{};
  args.samples = out.size(0);
  args.count = out.size(0) == 0 ? 0 : out.numel() / out.size(0);
  args.inner = inner_of(out);
  args.seeds = integers(seeds);
  args.step = static_cast<uint32_t>(step);
  args.stream = static_cast<uint32_t>(stream);
  args.out = array(out);
  args.threads = at::get_num_threads();
  return args;
}

Tensor add_noise(const Tensor& x, const Tensor& alpha, const Tensor& sigma, const OptionalTensor& noise,
                 const OptionalTensor& seeds, int64_t step, int64_t stream) {
  const Tensor source = dense(x);
  const Tensor out = at::empty(source.sizes(), source.options(), layout_of(source));
  const OptionalTensor z = noise ? OptionalTensor(noise->contiguous(layout_of(source))) : noise;
  NoiseArgs args = noise_args(out, seeds, step, stream);
  args.x = array(source);
  args.noise = array(z);
  args.alpha = alpha.const_data_ptr<float>();
  args.sigma = sigma.const_data_ptr<float>();
  if (out.numel() == 0) return out;
  LAUNCH(add_noise, x, args) ON_CPU(add_noise, args);
  return out;
}

Tensor philox_normal(const Tensor& seeds, const std::vector<int64_t>& shape, int64_t step, int64_t stream,
                     at::ScalarType dtype) {
  const Tensor out = at::empty(shape, seeds.options().dtype(dtype));
  const NoiseArgs args = noise_args(out, seeds, step, stream);
  if (out.numel() == 0) return out;
  LAUNCH(philox_normal, seeds, args) ON_CPU(philox_normal, args);
  return out;
}

std::tuple<Tensor, Tensor> group_norm_silu(const Tensor& input, int64_t groups, const OptionalTensor& weight,
                                           const OptionalTensor& bias, double eps, bool silu,
                                           const OptionalTensor& addend, const OptionalTensor& residual,
                                           bool return_sum) {
  const Tensor x = dense(input);
  const auto layout = layout_of(x);
  const Tensor y = at::empty(x.sizes(), x.options(), layout);
  const Tensor sum = return_sum ? at::empty(x.sizes(), x.options(), layout) : at::empty({0}, x.options());
  const OptionalTensor skip = residual ? OptionalTensor(residual->contiguous(layout)) : residual;

  GroupNormArgs args{};
  args.samples = x.size(0);
  args.channels = x.size(1);
  args.spatial = x.numel() / (x.size(0) * x.size(1));
  args.groups = groups;
  args.channels_last = channels_last(x);
  args.silu = silu;
  args.eps = static_cast<float>(eps);
  args.x = array(x);
  args.weight = array(weight);
  args.bias = array(bias);
  args.addend = array(addend);
  args.residual = array(skip);
  args.y = array(y);
  if (return_sum) args.sum = array(sum);
  args.threads = at::get_num_threads();

#ifdef FASTDIFF_CUDA
  if (x.is_cuda()) {
    const c10::cuda::CUDAGuard guard(x.device());
    const Tensor workspace = at::empty({cuda::group_norm_silu_workspace(args)}, x.options().dtype(at::kByte));
    check(cuda::group_norm_silu(args, c10::cuda::getCurrentCUDAStream().stream(), workspace.data_ptr()));
    return {y, sum};
  }
#endif
  ON_CPU(group_norm_silu, args);
  return {y, sum};
}

Tensor attention(const Tensor& q, const Tensor& k, const Tensor& v, const OptionalTensor& mask, double scale) {
  const Tensor out = at::empty({q.size(0), q.size(2), q.size(1), q.size(3)}, q.options());
  AttentionArgs args{};
  args.batch = q.size(0);
  args.heads = q.size(1);
  args.queries = q.size(2);
  args.keys = k.size(2);
  args.dim = q.size(3);
  args.scale = static_cast<float>(scale);
  args.q = array(q);
  args.k = array(k);
  args.v = array(v);
  args.out = array(out);
  for (int d = 0; d < 3; ++d) {
    args.q_strides[d] = q.stride(d);
    args.k_strides[d] = k.stride(d);
    args.v_strides[d] = v.stride(d);
  }
  Tensor added;
  if (mask) {
    added = *mask;
    if (added.scalar_type() == at::kBool) {
      args.mask_bool = added.const_data_ptr<bool>();
    } else {
      if (added.scalar_type() == at::kDouble) added = added.to(at::kFloat);
      args.mask = array(added);
    }
    for (int d = 0; d < 4; ++d) args.mask_strides[d] = added.stride(d);
  }
  args.threads = at::get_num_threads();
  ON_CPU(attention, args);
  return out.transpose(1, 2);
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

const char* capability_name() {
  return capability() == Capability::AVX512 ? "AVX512" : capability() == Capability::AVX2 ? "AVX2" : "DEFAULT";
}

bool cuda_built() {
#ifdef FASTDIFF_CUDA
  return true;
#else
  return false;
#endif
}

}  // namespace
}  // namespace fastdiff

PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {
  m.doc() = "Compiled kernels of fastdiff; called through fastdiff.ops.";
  m.def("sampler_step", &fastdiff::sampler_step);
  m.def("add_noise", &fastdiff::add_noise);
  m.def("philox_normal", &fastdiff::philox_normal);
  m.def("group_norm_silu", &fastdiff::group_norm_silu);
  m.def("attention", &fastdiff::attention);
  m.def("guidance_weights", &fastdiff::guidance_weights);
  m.def("dynamic_threshold", &fastdiff::dynamic_threshold);
  m.def("langevin_step_size", &fastdiff::langevin_step_size);
  m.def("cpu_capability", &fastdiff::capability_name);
  m.def("cuda_built", &fastdiff::cuda_built);
}
