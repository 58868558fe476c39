// Tensors in, raw pointers to the kernels, tensors out: the operators of networks. Arguments were checked in
// fastdiff/ops.
#include <c10/core/GradMode.h>
#include <c10/core/impl/TorchDispatchModeTLS.h>
#include <torch/csrc/autograd/python_variable.h>
#include <torch/csrc/profiler/api.h>

#include <atomic>

#include "tensors.h"

namespace fastdiff {

namespace {

std::tuple<Tensor, Tensor> group_norm_silu(const Tensor& input, int64_t groups, const OptionalTensor& weight,
                                           const OptionalTensor& bias, double eps, bool silu,
                                           const OptionalTensor& addend, const OptionalTensor& residual,
                                           const OptionalTensor& second, bool return_sum) {
  const Tensor x = dense(input);
  OptionalTensor more = second ? OptionalTensor(dense(*second)) : second;
  // One channel lies in either layout; then that of the other input counts.
  const bool either = more && x.is_contiguous() && x.is_contiguous(layout_of(*more));
  const auto layout = layout_of(either ? *more : x);
  if (more) more = more->contiguous(layout);
  auto shape = x.sizes().vec();
  if (more) shape[1] += more->size(1);
  const Tensor y = at::empty(shape, x.options(), layout);
  const Tensor sum = return_sum ? at::empty(shape, x.options(), layout) : at::empty({0}, x.options());
  const OptionalTensor skip = residual ? OptionalTensor(residual->contiguous(layout)) : residual;

  GroupNormArgs args{};
  args.samples = x.size(0);
  args.channels = shape[1];
  args.x_channels = x.size(1);
  args.spatial = x.numel() / (x.size(0) * x.size(1));
  args.groups = groups;
  args.channels_last = layout != at::MemoryFormat::Contiguous;
  args.silu = silu;
  args.eps = static_cast<float>(eps);
  args.x = array(x);
  args.weight = array(weight);
  args.bias = array(bias);
  args.addend = array(addend);
  args.residual = array(skip);
  args.second = array(more);
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

std::atomic<int64_t> plain_norms{0};

// Whether a norm takes this parameter or addend: none, or of those sizes, and as narrow as x or float32.
bool plain(py::handle given, at::IntArrayRef sizes, const Tensor& x) {
  if (given.is_none()) return true;
  if (!THPVariable_CheckExact(given.ptr())) return false;
  const Tensor& value = THPVariable_Unpack(given.ptr());
  const at::ScalarType type = value.scalar_type();
  return value.is_cpu() && value.sizes() == sizes && (type == x.scalar_type() || type == at::kFloat) &&
         !(c10::GradMode::is_enabled() && value.requires_grad());
}

// Whether it is a channels-last map that a norm takes as it is.
bool plain_map(const Tensor& x) {
  const at::ScalarType type = x.scalar_type();
  return x.is_cpu() && x.has_storage() && x.dim() == 4 && x.numel() > 0 && !x.is_contiguous() &&
         x.is_contiguous(at::MemoryFormat::ChannelsLast) &&
         (type == at::kFloat || type == at::kHalf || type == at::kBFloat16) &&
         !(c10::GradMode::is_enabled() && x.requires_grad());
}

// The most frequent kind of norm, checked here, where that takes a tenth of the time. Nothing where the call is another
// kind or wrong, which is then found out in fastdiff/ops.
OptionalTensor plain_norm(py::handle input, int64_t groups, py::handle weight, py::handle bias, double eps, bool silu,
                          py::handle addend, py::handle other) {
  if (!THPVariable_CheckExact(input.ptr()) || c10::impl::TorchDispatchModeTLS::any_modes_set() ||
      torch::profiler::impl::profilerEnabled()) {
    return std::nullopt;
  }
  const Tensor& x = THPVariable_Unpack(input.ptr());
  if (!plain_map(x)) return std::nullopt;
  int64_t channels = x.size(1);
  OptionalTensor second;
  if (!other.is_none()) {
    if (!THPVariable_CheckExact(other.ptr())) return std::nullopt;
    second = THPVariable_Unpack(other.ptr());
    if (!plain_map(*second) || second->scalar_type() != x.scalar_type() || second->size(0) != x.size(0) ||
        second->sizes().slice(2) != x.sizes().slice(2)) {
      return std::nullopt;
    }
    channels += second->size(1);
  }
  if (groups < 1 || channels % groups != 0 || !plain(weight, {channels}, x) || !plain(bias, {channels}, x) ||
      !plain(addend, {x.size(0), channels}, x)) {
    return std::nullopt;
  }
  const auto tensor = [](py::handle given) {
    return given.is_none() ? OptionalTensor() : OptionalTensor(THPVariable_Unpack(given.ptr()).contiguous());
  };
  ++plain_norms;
  return std::get<0>(group_norm_silu(x, groups, tensor(weight), tensor(bias), eps, silu, tensor(addend), std::nullopt,
                                     second, false));
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

Tensor geglu(const Tensor& input) {
  const Tensor x = input.contiguous();
  auto sizes = x.sizes().vec();
  sizes.back() /= 2;
  const Tensor y = at::empty(sizes, x.options());
  GegluArgs args{};
  args.hidden = sizes.back();
  args.rows = y.numel() / args.hidden;
  args.x = array(x);
  args.y = array(y);
  args.threads = at::get_num_threads();
  ON_CPU(geglu, args);
  return y;
}

// (N, C), rows of which are dense, wherever they lie.
Array rows(OptionalTensor& values, int64_t& stride) {
  if (!values) return {};
  if (values->stride(1) != 1) values = values->contiguous();
  stride = values->stride(0);
  return array(values);
}

std::tuple<Tensor, Tensor> layer_norm_modulate(const Tensor& input, const OptionalTensor& weight,
                                               const OptionalTensor& bias, OptionalTensor scale, OptionalTensor shift,
                                               double eps, const OptionalTensor& residual, OptionalTensor gate,
                                               bool return_sum) {
  const Tensor x = input.contiguous(), y = at::empty(x.sizes(), x.options());
  const Tensor sum = return_sum ? at::empty(x.sizes(), x.options()) : at::empty({0}, x.options());
  const OptionalTensor own_weight = contiguous(weight), own_bias = contiguous(bias), skip = contiguous(residual);
  LayerNormArgs args{};
  args.samples = x.size(0);
  args.channels = x.size(-1);
  args.positions = x.numel() / (args.samples * args.channels);
  args.eps = static_cast<float>(eps);
  args.x = array(x);
  args.residual = array(skip);
  args.y = array(y);
  if (return_sum) args.sum = array(sum);
  args.weight = array(own_weight);
  args.bias = array(own_bias);
  args.scale = rows(scale, args.scale_stride);
  args.shift = rows(shift, args.shift_stride);
  args.gate = rows(gate, args.gate_stride);
  args.threads = at::get_num_threads();
  ON_CPU(layer_norm_modulate, args);
  return {y, sum};
}

// phases (N, 4 C, H + 1, W + 1) -> (N, C, 2 H, 2 W).
Tensor interleave_phases(const Tensor& phases, at::MemoryFormat layout) {
  UpsampleArgs args{};
  args.samples = phases.size(0);
  args.channels = phases.size(1) / 4;
  args.height = phases.size(2) - 1;
  args.width = phases.size(3) - 1;
  const Tensor out =
      at::empty({args.samples, args.channels, 2 * args.height, 2 * args.width}, phases.options(), layout);
  args.from = array(phases);
  args.to = array(out);
  for (int d = 0; d < 4; ++d) {
    args.from_strides[d] = phases.stride(d);
    args.to_strides[d] = out.stride(d);
  }
  args.threads = at::get_num_threads();
  ON_CPU(upsample_conv, args);
  return out;
}

// The convolution is PyTorch's; ours is to put its phases in place.
Tensor upsample_conv(const Tensor& input, const Tensor& weight, const OptionalTensor& bias) {
  const Tensor x = dense(input);
  const OptionalTensor each = bias ? OptionalTensor(bias->repeat({4})) : bias;
  return interleave_phases(at::conv2d(x, weight, each, /*stride=*/1, /*padding=*/1), layout_of(x));
}

Tensor interleave_channels_last(const Tensor& phases) {
  return interleave_phases(phases, at::MemoryFormat::ChannelsLast);
}

}  // namespace

void register_network(py::module_& m) {
  m.def("group_norm_silu", &group_norm_silu);
  m.def("plain_norm", &plain_norm);
  m.def("take_plain_norms", [] { return plain_norms.exchange(0); });
  m.def("attention", &attention);
  m.def("geglu", &geglu);
  m.def("layer_norm_modulate", &layer_norm_modulate);
  m.def("upsample_conv", &upsample_conv);
  m.def("interleave", &interleave_channels_last);
}

}  // namespace fastdiff
