// Convolutions and products on the CPU, of weights that were packed before or are packed for the call. Arguments were
// checked in fastdiff/ops and fastdiff/models/prepacked.py.
#include "tensors.h"

namespace fastdiff {

namespace {

// weight (outputs, channels, taps...) as `conv_bias_residual` reads it: (panels, taps, channels, PACKED_OUTPUTS).
Tensor pack_weight(const Tensor& weight) {
  const Tensor from = weight.contiguous();
  PackArgs args{};
  args.outputs = from.size(0);
  args.channels = from.size(1);
  args.taps = from.numel() / (args.outputs * args.channels);
  const int64_t panels = (args.outputs + PACKED_OUTPUTS - 1) / PACKED_OUTPUTS;
  const Tensor to = at::empty({panels, args.taps, args.channels, PACKED_OUTPUTS}, from.options());
  args.type = type_of(from.scalar_type());
  args.weight = from.const_data_ptr();
  args.to = to.data_ptr();
  args.threads = at::get_num_threads();
  ON_CPU(pack_weight, args);
  return to;
}

const void* data(const OptionalTensor& x) { return x ? x->const_data_ptr() : nullptr; }

OptionalTensor as_channels_last(const OptionalTensor& x) {
  if (!x) return x;
  return x->contiguous(at::MemoryFormat::ChannelsLast);
}

void check_addend(const Tensor& addend, const Tensor& out) {
  TORCH_CHECK(addend.sizes() == out.sizes() && addend.scalar_type() == out.scalar_type(),
              "the addend has not the result's shape and type");
}

OptionalTensor wide_bias(const OptionalTensor& bias) {
  return bias ? OptionalTensor(bias->to(at::kFloat).contiguous()) : bias;
}

void check_packed(const Tensor& packed, const Tensor& x, int64_t taps, int64_t channels, int64_t outputs) {
  const auto type = x.scalar_type();
  TORCH_CHECK(packed.scalar_type() == type && (type == at::kFloat || type == at::kBFloat16),
              "expected a map and a packed weight of float32 or of bfloat16, got ", type, " and ", packed.scalar_type());
  TORCH_CHECK(packed.numel() == (outputs + PACKED_OUTPUTS - 1) / PACKED_OUTPUTS * PACKED_OUTPUTS * taps * channels,
              "the packed weight is not one for ", channels, " channels and ", outputs, " outputs");
}

// x (N, C, H, W) and residual channels-last, as the result is.
Tensor conv_packed(const Tensor& input, const Tensor& packed, const OptionalTensor& own_bias,
                   const OptionalTensor& own_residual, int64_t outputs, const std::array<int64_t, 2>& taps,
                   const std::array<int64_t, 2>& stride, const std::array<int64_t, 2>& padding) {
  const Tensor x = input.contiguous(at::MemoryFormat::ChannelsLast);
  ConvArgs args{};
  args.samples = x.size(0);
  args.channels = x.size(1);
  args.height = x.size(2);
  args.width = x.size(3);
  args.outputs = outputs;
  for (int d = 0; d < 2; ++d) {
    args.taps[d] = taps[d];
    args.stride[d] = stride[d];
    args.padding[d] = padding[d];
  }
  args.out_height = (args.height + 2 * padding[0] - taps[0]) / stride[0] + 1;
  args.out_width = (args.width + 2 * padding[1] - taps[1]) / stride[1] + 1;
  const Tensor out =
      at::empty({args.samples, outputs, args.out_height, args.out_width}, x.options(), at::MemoryFormat::ChannelsLast);
  const OptionalTensor bias = wide_bias(own_bias);
  const OptionalTensor residual = as_channels_last(own_residual);
  if (residual) check_addend(*residual, out);
  check_packed(packed, x, taps[0] * taps[1], args.channels, outputs);
  if (out.numel() == 0) return out;
  args.type = type_of(x.scalar_type());
  args.x = x.const_data_ptr();
  args.weight = packed.const_data_ptr();
  args.bias = floats(bias);
  args.residual = data(residual);
  args.out = out.data_ptr();
  args.threads = at::get_num_threads();
  ON_CPU(conv_bias_residual, args);
  return out;
}

// The products are float32's: what is narrower is widened for them, and the result rounded once.
Tensor conv_bias_residual(const Tensor& input, const Tensor& weight, const OptionalTensor& bias,
                          const OptionalTensor& residual, const std::array<int64_t, 2>& stride,
                          const std::array<int64_t, 2>& padding) {
  const auto wide = [](const OptionalTensor& x) { return x ? OptionalTensor(x->to(at::kFloat)) : x; };
  const Tensor x = dense(input);
  const Tensor y = conv_packed(*wide(x), pack_weight(*wide(weight)), wide(bias), wide(residual), weight.size(0),
                               {weight.size(2), weight.size(3)}, stride, padding);
  return y.to(x.options(), /*non_blocking=*/false, /*copy=*/false, layout_of(x));
}

// A 3x3 convolution of stride 1 of x (N, C, H, W), or of x at twice its size, in tiles of tile x tile results; packed
// by `pack_weight`, addend channels-last, as the result is.
Tensor winograd(const Tensor& input, const Tensor& packed, const OptionalTensor& own_bias,
                const OptionalTensor& own_addend, int64_t outputs, const std::array<int64_t, 2>& padding, int64_t tile,
                bool doubled) {
  const Tensor x = input.contiguous(at::MemoryFormat::ChannelsLast);
  WinogradArgs args{};
  args.samples = x.size(0);
  args.channels = x.size(1);
  args.height = x.size(2);
  args.width = x.size(3);
  args.outputs = outputs;
  args.out_height = args.height * (doubled ? 2 : 1) + 2 * padding[0] - 2;
  args.out_width = args.width * (doubled ? 2 : 1) + 2 * padding[1] - 2;
  for (int d = 0; d < 2; ++d) args.padding[d] = padding[d];
  args.tile = tile;
  args.doubled = doubled;
  args.type = type_of(x.scalar_type());
  check_packed(packed, x, 9, args.channels, outputs);
  const Tensor out =
      at::empty({args.samples, outputs, args.out_height, args.out_width}, x.options(), at::MemoryFormat::ChannelsLast);
  const OptionalTensor bias = wide_bias(own_bias);
  const OptionalTensor addend = as_channels_last(own_addend);
  if (addend) check_addend(*addend, out);
  args.x = x.const_data_ptr();
  args.weight = packed.const_data_ptr();
  args.bias = floats(bias);
  args.addend = data(addend);
  args.out = out.data_ptr();
  args.threads = at::get_num_threads();
  const Tensor scratch = at::empty({ON_CPU(winograd_scratch, args)}, x.options().dtype(at::kByte));
  args.scratch = scratch.data_ptr();
  ON_CPU(winograd, args);
  return out;
}

// x (..., C) -> (..., outputs).
Tensor multiply(const Tensor& input, const Tensor& packed, const OptionalTensor& own_bias, int64_t outputs) {
  const Tensor x = input.contiguous();
  auto sizes = x.sizes().vec();
  ConvArgs args{};
  args.samples = args.height = args.out_height = 1;
  args.channels = sizes.back();
  args.width = args.out_width = x.numel() / args.channels;
  args.outputs = sizes.back() = outputs;
  for (int d = 0; d < 2; ++d) args.taps[d] = args.stride[d] = 1;
  const Tensor out = at::empty(sizes, x.options());
  const OptionalTensor bias = wide_bias(own_bias);
  check_packed(packed, x, 1, args.channels, outputs);
  args.type = type_of(x.scalar_type());
  args.x = x.const_data_ptr();
  args.weight = packed.const_data_ptr();
  args.bias = floats(bias);
  args.out = out.data_ptr();
  args.threads = at::get_num_threads();
  ON_CPU(conv_bias_residual, args);
  return out;
}

}  // namespace

void register_convolution(py::module_& m) {
  m.def("conv_bias_residual", &conv_bias_residual);
  m.def("pack_weight", &pack_weight);
  m.def("conv_packed", &conv_packed);
  m.def("multiply", &multiply);
  m.def("winograd", &winograd);
}

}  // namespace fastdiff
