// Convolutions of bfloat16 on the CPU whose weights were transformed. Arguments were checked by
// fastdiff/models/prepacked.py, which asks first whether the machine has the products.
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

int64_t packed_size(int64_t outputs, int64_t channels, bool doubled) {
  return (outputs + 63) / 64 * 64 * ((channels + 15) / 16 * 16) * (doubled ? 9 : 16);
}

const uint16_t* words(const Tensor& tensor) { return static_cast<const uint16_t*>(tensor.const_data_ptr()); }

// weight (outputs, channels, 3, 3) as `winograd_bfloat16` reads it.
Tensor pack_winograd_bfloat16(const Tensor& weight, bool doubled) {
  const Tensor from = weight.contiguous();
  WinogradPackArgs args{};
  args.outputs = from.size(0);
  args.channels = from.size(1);
  args.doubled = doubled;
  const Tensor to = at::empty({packed_size(args.outputs, args.channels, doubled)}, from.options());
  args.weight = words(from);
  args.to = static_cast<uint16_t*>(to.data_ptr());
  args.threads = at::get_num_threads();
  ON_CPU(pack_winograd_bfloat16, args);
  return to;
}

// A 3x3 convolution of stride 1 of x (N, C, H, W), or of x at twice its size with padding 1; x and addend channels-last,
// as the result is.
Tensor winograd_bfloat16(const Tensor& input, const Tensor& packed, const OptionalTensor& bias,
                         const OptionalTensor& own_addend, int64_t outputs, const std::array<int64_t, 2>& padding,
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
  args.tile = 2;
  args.doubled = doubled;
  args.type = Type::BF16;
  TORCH_CHECK(packed.numel() == packed_size(outputs, args.channels, doubled),
              "winograd_bfloat16: the packed weight is not one for ", args.channels, " channels and ", outputs,
              " outputs");
  const Tensor out =
      at::empty({args.samples, outputs, args.out_height, args.out_width}, x.options(), at::MemoryFormat::ChannelsLast);
  const OptionalTensor addend =
      own_addend ? OptionalTensor(own_addend->contiguous(at::MemoryFormat::ChannelsLast)) : own_addend;
  TORCH_CHECK(!addend || addend->sizes() == out.sizes(),
              "winograd_bfloat16: the addend has not the result's shape");
  args.x = x.const_data_ptr();
  args.weight = packed.const_data_ptr();
  args.addend = addend ? addend->const_data_ptr() : nullptr;
  args.out = out.data_ptr();
  args.threads = at::get_num_threads();
  const int64_t size = ON_CPU(winograd_bfloat16_scratch, args);
  const Tensor scratch = at::empty({size + outputs * 4}, x.options().dtype(at::kByte));
  args.scratch = scratch.data_ptr();
  const OptionalTensor short_bias = contiguous(bias);
  if (short_bias) {
    float* wide = reinterpret_cast<float*>(static_cast<char*>(args.scratch) + size);
    for (int64_t o = 0; o < outputs; ++o) wide[o] = static_cast<float>(short_bias->const_data_ptr<at::BFloat16>()[o]);
    args.bias = wide;
  }
  ON_CPU(winograd_bfloat16, args);
  return out;
}

}  // namespace

void register_bfloat16(py::module_& m) {
  m.def("has_bfloat16_products", &has_bfloat16_products);
  m.def("pack_winograd_bfloat16", &pack_winograd_bfloat16);
  m.def("winograd_bfloat16", &winograd_bfloat16);
}

}  // namespace fastdiff
