// Convolutions and products on the CPU in float32, of weights that were packed before or are packed for the call.
// Arguments were checked in fastdiff/ops and fastdiff/models/prepacked.py.
#include "packed.h"

namespace fastdiff {

namespace {

// weight (outputs, channels, taps...) as `conv_bias_residual` reads it: (panels, taps, channels, PACKED_OUTPUTS).
Tensor pack_weight(const Tensor& weight) {
  const Tensor from = weight.contiguous();
  PackArgs args{};
  const Tensor to = describe_weight(args, from);
  args.type = type_of(from.scalar_type());
  args.weight = from.const_data_ptr();
  args.to = to.data_ptr();
  ON_CPU(pack_weight, args);
  return to;
}

OptionalTensor wide_bias(const OptionalTensor& bias) {
  return bias ? OptionalTensor(bias->to(at::kFloat).contiguous()) : bias;
}

void check_types(const Tensor& x, const Tensor& packed, const OptionalTensor& addend) {
  const auto type = x.scalar_type();
  TORCH_CHECK(packed.scalar_type() == type && (type == at::kFloat || type == at::kBFloat16),
              "expected a map and a packed weight of float32 or of bfloat16, got ", type, " and ", packed.scalar_type());
  TORCH_CHECK(!addend || addend->scalar_type() == type, "the addend has not the result's type");
}

// out: for the result, to be filled.
Tensor run(ConvArgs& args, const Tensor& x, const Tensor& packed, const OptionalTensor& own_bias,
           const OptionalTensor& residual, const Tensor& out) {
  check_types(x, packed, residual);
  if (out.numel() == 0) return out;
  const OptionalTensor bias = wide_bias(own_bias);
  args.type = type_of(x.scalar_type());
  args.x = x.const_data_ptr();
  args.weight = packed.const_data_ptr();
  args.bias = floats(bias);
  args.residual = data(residual);
  args.out = out.data_ptr();
  ON_CPU(conv_bias_residual, args);
  return out;
}

// x (N, C, H, W) and residual channels-last, as the result is.
Tensor conv_packed(const Tensor& input, const Tensor& packed, const OptionalTensor& bias,
                   const OptionalTensor& own_residual, int64_t outputs, const Pair& taps, const Pair& stride,
                   const Pair& padding) {
  const Tensor x = as_channels_last(input);
  ConvArgs args{};
  const auto [out, residual] =
      describe_convolution(args, x, packed, own_residual, outputs, taps, stride, padding);
  return run(args, x, packed, bias, residual, out);
}

// The products are float32's: what is narrower is widened for them, and the result rounded once.
Tensor conv_bias_residual(const Tensor& input, const Tensor& weight, const OptionalTensor& bias,
                          const OptionalTensor& residual, const Pair& stride, const Pair& padding) {
  const auto wide = [](const OptionalTensor& x) { return x ? OptionalTensor(x->to(at::kFloat)) : x; };
  const Tensor x = dense(input);
  const Tensor y = conv_packed(*wide(x), pack_weight(*wide(weight)), wide(bias), wide(residual), weight.size(0),
                               {weight.size(2), weight.size(3)}, stride, padding);
  return y.to(x.options(), /*non_blocking=*/false, /*copy=*/false, layout_of(x));
}

// A 3x3 convolution of stride 1 of x (N, C, H, W), or of x at twice its size, in tiles of tile x tile results; packed
// by `pack_weight`, addend channels-last, as the result is.
Tensor winograd(const Tensor& input, const Tensor& packed, const OptionalTensor& own_bias,
                const OptionalTensor& own_addend, int64_t outputs, const Pair& padding, int64_t tile, bool doubled) {
  const Tensor x = as_channels_last(input);
  WinogradArgs args{};
  const auto [out, addend] = describe_winograd(args, x, packed, own_addend, outputs, padding, tile, doubled);
  check_types(x, packed, addend);
  if (out.numel() == 0) return out;
  const OptionalTensor bias = wide_bias(own_bias);
  args.x = x.const_data_ptr();
  args.weight = packed.const_data_ptr();
  args.bias = floats(bias);
  args.addend = data(addend);
  args.out = out.data_ptr();
  const Tensor scratch = at::empty({ON_CPU(winograd_scratch, args)}, x.options().dtype(at::kByte));
  args.scratch = scratch.data_ptr();
  ON_CPU(winograd, args);
  return out;
}

// x (..., C) -> (..., outputs).
Tensor multiply(const Tensor& input, const Tensor& packed, const OptionalTensor& bias, int64_t outputs) {
  const Tensor x = input.contiguous();
  ConvArgs args{};
  const Tensor out = describe_product(args, x, packed, outputs);
  return run(args, x, packed, bias, std::nullopt, out);
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
