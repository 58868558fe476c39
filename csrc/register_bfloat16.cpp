// Convolutions and products of bfloat16 on the CPU whose weights were packed. Arguments were checked by
// fastdiff/models/prepacked.py, which asks first whether the machine has the products.
#include "packed.h"
#include "processor.h"

namespace fastdiff {

namespace {

bool has_bfloat16_products() {
#ifdef FASTDIFF_X86
  return capability() == Capability::AVX512 && cpu::AVX512::has_bfloat16_products();
#else
  return false;
#endif
}

// A 3x3 convolution of stride 1 of x (N, C, H, W), or of x at twice its size with padding 1; x and addend
// channels-last, as the result is.
Tensor winograd_bfloat16(const Tensor& input, const Tensor& packed, const OptionalTensor& own_bias,
                         const OptionalTensor& own_addend, int64_t outputs, const Pair& padding, bool doubled) {
  const Tensor x = as_channels_last(input);
  WinogradArgs args{};
  const auto [out, addend] = describe_winograd(args, x, packed, own_addend, outputs, padding, /*tile=*/2, doubled);
  if (out.numel() == 0) return out;
  args.x = x.const_data_ptr();
  args.weight = packed.const_data_ptr();
  args.addend = data(addend);
  args.out = out.data_ptr();
  const int64_t size = ON_CPU(winograd_bfloat16_scratch, args);
  const Tensor scratch = at::empty({size + outputs * 4}, x.options().dtype(at::kByte));
  args.scratch = scratch.data_ptr();
  const OptionalTensor bias = contiguous(own_bias);
  if (bias) {
    float* wide = reinterpret_cast<float*>(static_cast<char*>(args.scratch) + size);
    for (int64_t o = 0; o < outputs; ++o) wide[o] = static_cast<float>(bias->const_data_ptr<at::BFloat16>()[o]);
    args.bias = wide;
  }
  ON_CPU(winograd_bfloat16, args);
  return out;
}

// weight (outputs, channels, taps...) as the functions here read it.
Tensor pack_bfloat16(const Tensor& weight) {
  const Tensor from = weight.contiguous();
  PackBFloat16Args args{};
  const Tensor to = describe_weight(args, from);
  args.weight = static_cast<const uint16_t*>(from.const_data_ptr());
  args.to = static_cast<uint16_t*>(to.data_ptr());
  ON_CPU(pack_bfloat16, args);
  return to;
}

// out: for the result, to be filled.
Tensor run(ConvolveBFloat16Args& args, const Tensor& x, const Tensor& packed, const OptionalTensor& own_bias,
           const Tensor& out) {
  if (out.numel() == 0) return out;
  const OptionalTensor bias = contiguous(own_bias);
  args.x = x.const_data_ptr();
  args.weight = packed.const_data_ptr();
  args.bias = data(bias);
  args.out = out.data_ptr();
  ON_CPU(convolve_bfloat16, args);
  return out;
}

// x (N, C, H, W) and addend channels-last, as the result is.
Tensor convolve_bfloat16(const Tensor& input, const Tensor& packed, const OptionalTensor& bias,
                         const OptionalTensor& own_addend, int64_t outputs, const Pair& taps, const Pair& stride,
                         const Pair& padding) {
  const Tensor x = as_channels_last(input);
  ConvolveBFloat16Args args{};
  const auto [out, addend] = describe_convolution(args, x, packed, own_addend, outputs, taps, stride, padding);
  args.addend = data(addend);
  return run(args, x, packed, bias, out);
}

// The 1x1 convolution of x and second as if concatenated along the channels; both channels-last, as the result is.
Tensor convolve_both_bfloat16(const Tensor& input, const Tensor& other, const Tensor& packed,
                              const OptionalTensor& bias, int64_t outputs) {
  const Tensor x = as_channels_last(input), second = as_channels_last(other);
  TORCH_CHECK(x.size(0) == second.size(0) && x.sizes().slice(2) == second.sizes().slice(2),
              "the second map has not the first one's size");
  ConvolveBFloat16Args args{};
  args.second = second.const_data_ptr();
  args.second_channels = second.size(1);
  check_packed<ConvolveBFloat16Args>(packed, 1, x.size(1) + second.size(1), outputs);
  for (int d = 0; d < 2; ++d) args.taps[d] = args.stride[d] = 1;
  const auto [out, none] = describe_maps(args, x, std::nullopt, outputs, x.size(2), x.size(3));
  return run(args, x, packed, bias, out);
}

// x (..., C) -> (..., outputs).
Tensor multiply_bfloat16(const Tensor& input, const Tensor& packed, const OptionalTensor& bias, int64_t outputs) {
  const Tensor x = input.contiguous();
  ConvolveBFloat16Args args{};
  const Tensor out = describe_product(args, x, packed, outputs);
  return run(args, x, packed, bias, out);
}

}  // namespace

void register_bfloat16(py::module_& m) {
  m.def("has_bfloat16_products", &has_bfloat16_products);
  m.def("has_bfloat16_tiles", &has_bfloat16_tiles);
  m.def("winograd_bfloat16", &winograd_bfloat16);
  m.def("pack_bfloat16", &pack_bfloat16);
  m.def("convolve_bfloat16", &convolve_bfloat16);
  m.def("convolve_both_bfloat16", &convolve_both_bfloat16);
  m.def("multiply_bfloat16", &multiply_bfloat16);
}

}  // namespace fastdiff
