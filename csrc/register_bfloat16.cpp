// Convolutions and products of bfloat16 on the CPU whose weights were packed. Arguments were checked by
// fastdiff/models/prepacked.py, which asks first whether the machine has the products.
#include "processor.h"
#include "tensors.h"

namespace fastdiff {

namespace {

bool has_bfloat16_products() {
#ifdef FASTDIFF_X86
  return capability() == Capability::AVX512 && cpu::AVX512::has_bfloat16_products();
#else
  return false;
#endif
}

const uint16_t* words(const Tensor& tensor) { return static_cast<const uint16_t*>(tensor.const_data_ptr()); }

const void* data(const OptionalTensor& tensor) { return tensor ? tensor->const_data_ptr() : nullptr; }

// Elements of a packed weight: outputs fill panels, and what each is the sum of fills pairs.
int64_t packed_size(int64_t outputs, int64_t channels, int64_t taps) {
  return (outputs + PACKED_OUTPUTS - 1) / PACKED_OUTPUTS * PACKED_OUTPUTS * ((channels * taps + 1) / 2 * 2);
}

void check_packed(const Tensor& packed, int64_t outputs, int64_t channels, int64_t taps) {
  TORCH_CHECK(packed.numel() == packed_size(outputs, channels, taps), "the packed weight is not one for ", channels, " channels and ", outputs,
              " outputs");
}

// The sizes of x (N, C, H, W) and of a result of height by width, an empty tensor for it, and the addend as that lies.
template <class Args>
std::pair<Tensor, OptionalTensor> describe(Args& args, const Tensor& x, const OptionalTensor& addend, int64_t outputs,
                                           int64_t height, int64_t width) {
  args.samples = x.size(0);
  args.channels = x.size(1);
  args.height = x.size(2);
  args.width = x.size(3);
  args.outputs = outputs;
  args.out_height = height;
  args.out_width = width;
  args.x = x.const_data_ptr();
  args.threads = at::get_num_threads();
  const Tensor out = at::empty({x.size(0), outputs, height, width}, x.options(), at::MemoryFormat::ChannelsLast);
  args.out = out.data_ptr();
  if (!addend) return {out, addend};
  TORCH_CHECK(addend->sizes() == out.sizes(), "the addend has not the result's shape");
  return {out, addend->contiguous(at::MemoryFormat::ChannelsLast)};
}

// A 3x3 convolution of stride 1 of x (N, C, H, W), or of x at twice its size with padding 1; x and addend
// channels-last, as the result is.
Tensor winograd_bfloat16(const Tensor& input, const Tensor& packed, const OptionalTensor& own_bias,
                         const OptionalTensor& own_addend, int64_t outputs, const std::array<int64_t, 2>& padding,
                         bool doubled) {
  const Tensor x = input.contiguous(at::MemoryFormat::ChannelsLast);
  const int64_t scale = doubled ? 2 : 1;
  WinogradArgs args{};
  const auto [out, addend] = describe(args, x, own_addend, outputs, x.size(2) * scale + 2 * padding[0] - 2,
                                      x.size(3) * scale + 2 * padding[1] - 2);
  check_packed(packed, outputs, args.channels, 9);
  for (int d = 0; d < 2; ++d) args.padding[d] = padding[d];
  args.tile = 2;
  args.doubled = doubled;
  args.type = Type::BF16;
  args.weight = packed.const_data_ptr();
  args.addend = data(addend);
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
  args.outputs = from.size(0);
  args.channels = from.size(1);
  args.taps = from.numel() / (args.outputs * args.channels);
  const Tensor to = at::empty({packed_size(args.outputs, args.channels, args.taps)}, from.options());
  args.weight = words(from);
  args.to = static_cast<uint16_t*>(to.data_ptr());
  args.threads = at::get_num_threads();
  ON_CPU(pack_bfloat16, args);
  return to;
}

void convolve_into(ConvolveBFloat16Args& args, const Tensor& packed, const OptionalTensor& bias) {
  check_packed(packed, args.outputs, args.channels + args.second_channels, args.taps[0] * args.taps[1]);
  const OptionalTensor dense_bias = contiguous(bias);
  args.weight = packed.const_data_ptr();
  args.bias = data(dense_bias);
  ON_CPU(convolve_bfloat16, args);
}

// x (N, C, H, W) and addend channels-last, as the result is.
Tensor convolve_bfloat16(const Tensor& input, const Tensor& packed, const OptionalTensor& bias,
                         const OptionalTensor& own_addend, int64_t outputs, const std::array<int64_t, 2>& taps,
                         const std::array<int64_t, 2>& stride, const std::array<int64_t, 2>& padding) {
  const Tensor x = input.contiguous(at::MemoryFormat::ChannelsLast);
  ConvolveBFloat16Args args{};
  const auto [out, addend] =
      describe(args, x, own_addend, outputs, (x.size(2) + 2 * padding[0] - taps[0]) / stride[0] + 1,
               (x.size(3) + 2 * padding[1] - taps[1]) / stride[1] + 1);
  for (int d = 0; d < 2; ++d) {
    args.taps[d] = taps[d];
    args.stride[d] = stride[d];
    args.padding[d] = padding[d];
  }
  args.addend = data(addend);
  convolve_into(args, packed, bias);
  return out;
}

// The 1x1 convolution of x and second as if concatenated along the channels; both channels-last, as the result is.
Tensor convolve_both_bfloat16(const Tensor& input, const Tensor& other, const Tensor& packed,
                              const OptionalTensor& bias, int64_t outputs) {
  const Tensor x = input.contiguous(at::MemoryFormat::ChannelsLast);
  const Tensor second = other.contiguous(at::MemoryFormat::ChannelsLast);
  TORCH_CHECK(x.size(0) == second.size(0) && x.sizes().slice(2) == second.sizes().slice(2),
              "the second map has not the first one's size");
  ConvolveBFloat16Args args{};
  const auto [out, none] = describe(args, x, std::nullopt, outputs, x.size(2), x.size(3));
  for (int d = 0; d < 2; ++d) args.taps[d] = args.stride[d] = 1;
  args.second = second.const_data_ptr();
  args.second_channels = second.size(1);
  convolve_into(args, packed, bias);
  return out;
}

// x (..., C) -> (..., outputs).
Tensor multiply_bfloat16(const Tensor& input, const Tensor& packed, const OptionalTensor& bias, int64_t outputs) {
  const Tensor x = input.contiguous();
  auto sizes = x.sizes().vec();
  ConvolveBFloat16Args args{};
  args.samples = args.height = args.out_height = 1;
  args.channels = sizes.back();
  args.width = args.out_width = x.numel() / args.channels;
  args.outputs = sizes.back() = outputs;
  for (int d = 0; d < 2; ++d) args.taps[d] = args.stride[d] = 1;
  const Tensor out = at::empty(sizes, x.options());
  args.x = x.const_data_ptr();
  args.out = out.data_ptr();
  args.threads = at::get_num_threads();
  convolve_into(args, packed, bias);
  return out;
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
