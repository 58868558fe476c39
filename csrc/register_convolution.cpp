// Convolutions and products of float32 on the CPU whose weights were packed. Arguments were checked by
// fastdiff/models/prepacked.py.
#include "tensors.h"

namespace fastdiff {

namespace {

// weight (outputs, channels, taps...) as `convolve` reads it: (panels, taps, channels, PACKED_OUTPUTS).
Tensor pack_weight(const Tensor& weight) {
  const Tensor from = weight.contiguous();
  PackArgs args{};
  args.outputs = from.size(0);
  args.channels = from.size(1);
  args.taps = from.numel() / (args.outputs * args.channels);
  const int64_t panels = (args.outputs + PACKED_OUTPUTS - 1) / PACKED_OUTPUTS;
  const Tensor to = at::empty({panels, args.taps, args.channels, PACKED_OUTPUTS}, from.options());
  args.weight = from.const_data_ptr<float>();
  args.to = to.data_ptr<float>();
  args.threads = at::get_num_threads();
  ON_CPU(pack_weight, args);
  return to;
}

void check_packed(const Tensor& packed, const ConvolveArgs& args) {
  TORCH_CHECK(packed.numel() == (args.outputs + PACKED_OUTPUTS - 1) / PACKED_OUTPUTS * PACKED_OUTPUTS * args.taps[0] *
                                    args.taps[1] * args.channels,
              "the packed weight is not one for ", args.channels, " channels and ", args.outputs, " outputs");
}

// x (N, C, H, W) and addend channels-last, as the result is.
Tensor convolve(const Tensor& input, const Tensor& packed, const OptionalTensor& own_bias,
                const OptionalTensor& own_addend, int64_t outputs, const std::array<int64_t, 2>& taps,
                const std::array<int64_t, 2>& stride, const std::array<int64_t, 2>& padding) {
  const Tensor x = input.contiguous(at::MemoryFormat::ChannelsLast);
  ConvolveArgs args{};
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
  const OptionalTensor bias = contiguous(own_bias);
  const OptionalTensor addend =
      own_addend ? OptionalTensor(own_addend->contiguous(at::MemoryFormat::ChannelsLast)) : own_addend;
  TORCH_CHECK(!addend || addend->sizes() == out.sizes(), "convolve: the addend has not the result's shape");
  check_packed(packed, args);
  args.x = x.const_data_ptr<float>();
  args.weight = packed.const_data_ptr<float>();
  args.bias = floats(bias);
  args.addend = floats(addend);
  args.out = out.data_ptr<float>();
  args.threads = at::get_num_threads();
  ON_CPU(convolve, args);
  return out;
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
  TORCH_CHECK(packed.numel() == (outputs + PACKED_OUTPUTS - 1) / PACKED_OUTPUTS * PACKED_OUTPUTS * 9 * args.channels,
              "the packed weight is not one for ", args.channels, " channels and ", outputs, " outputs");
  const Tensor out =
      at::empty({args.samples, outputs, args.out_height, args.out_width}, x.options(), at::MemoryFormat::ChannelsLast);
  const OptionalTensor bias = own_bias ? OptionalTensor(own_bias->to(at::kFloat).contiguous()) : own_bias;
  const OptionalTensor addend =
      own_addend ? OptionalTensor(own_addend->contiguous(at::MemoryFormat::ChannelsLast)) : own_addend;
  TORCH_CHECK(!addend || addend->sizes() == out.sizes(), "winograd: the addend has not the result's shape");
  args.x = x.const_data_ptr();
  args.weight = packed.const_data_ptr();
  args.bias = floats(bias);
  args.addend = addend ? addend->const_data_ptr() : nullptr;
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
  ConvolveArgs args{};
  args.samples = args.height = args.out_height = 1;
  args.channels = sizes.back();
  args.width = args.out_width = x.numel() / args.channels;
  args.outputs = sizes.back() = outputs;
  for (int d = 0; d < 2; ++d) args.taps[d] = args.stride[d] = 1;
  const Tensor out = at::empty(sizes, x.options());
  const OptionalTensor bias = contiguous(own_bias);
  check_packed(packed, args);
  args.x = x.const_data_ptr<float>();
  args.weight = packed.const_data_ptr<float>();
  args.bias = floats(bias);
  args.out = out.data_ptr<float>();
  args.threads = at::get_num_threads();
  ON_CPU(convolve, args);
  return out;
}

}  // namespace

void register_convolution(py::module_& m) {
  m.def("pack_weight", &pack_weight);
  m.def("convolve", &convolve);
  m.def("multiply", &multiply);
  m.def("winograd", &winograd);
}

}  // namespace fastdiff
