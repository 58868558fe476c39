// What convolutions and products of packed weights share, whatever their dtype: the sizes that a kernel is told, the
// tensors that it fills, and whether the weight is one for them.
#pragma once

#include <array>
#include <utility>

#include "tensors.h"

namespace fastdiff {

using Pair = std::array<int64_t, 2>;  // rows, columns

// Values that lie side by side because they are multiplied at once.
template <class Args>
constexpr int64_t TOGETHER = 1;
template <>
inline constexpr int64_t TOGETHER<PackBFloat16Args> = 2;
template <>
inline constexpr int64_t TOGETHER<ConvolveBFloat16Args> = 2;

// Elements of a packed weight: outputs fill panels, and what each is the sum of fills groups of TOGETHER.
template <class Args>
int64_t packed_size(int64_t taps, int64_t channels, int64_t outputs) {
  constexpr int64_t group = TOGETHER<Args>;
  const int64_t panels = (outputs + PACKED_OUTPUTS - 1) / PACKED_OUTPUTS;
  return panels * PACKED_OUTPUTS * ((channels * taps + group - 1) / group * group);
}

template <class Args>
void check_packed(const Tensor& packed, int64_t taps, int64_t channels, int64_t outputs) {
  TORCH_CHECK(packed.numel() == packed_size<Args>(taps, channels, outputs), "the packed weight is not one for ",
              channels, " channels and ", outputs, " outputs");
}

inline Tensor as_channels_last(const Tensor& x) { return x.contiguous(at::MemoryFormat::ChannelsLast); }

// The sizes of weight (outputs, channels, taps...), and an empty tensor for it packed.
template <class Args>
Tensor describe_weight(Args& args, const Tensor& weight) {
  args.outputs = weight.size(0);
  args.channels = weight.size(1);
  args.taps = weight.numel() / (args.outputs * args.channels);
  args.threads = at::get_num_threads();
  return at::empty({packed_size<Args>(args.taps, args.channels, args.outputs)}, weight.options());
}

// The sizes of x (N, C, H, W), channels-last, and of a result of height by width; an empty tensor for that, and the
// addend as it lies.
template <class Args>
std::pair<Tensor, OptionalTensor> describe_maps(Args& args, const Tensor& x, const OptionalTensor& addend,
                                                int64_t outputs, int64_t height, int64_t width) {
  args.samples = x.size(0);
  args.channels = x.size(1);
  args.height = x.size(2);
  args.width = x.size(3);
  args.outputs = outputs;
  args.out_height = height;
  args.out_width = width;
  args.threads = at::get_num_threads();
  const Tensor out = at::empty({x.size(0), outputs, height, width}, x.options(), at::MemoryFormat::ChannelsLast);
  if (!addend) return {out, addend};
  TORCH_CHECK(addend->sizes() == out.sizes(), "the addend has not the result's shape");
  return {out, as_channels_last(*addend)};
}

// Of a convolution with a weight that was packed.
template <class Args>
std::pair<Tensor, OptionalTensor> describe_convolution(Args& args, const Tensor& x, const Tensor& packed,
                                                       const OptionalTensor& addend, int64_t outputs, const Pair& taps,
                                                       const Pair& stride, const Pair& padding) {
  check_packed<Args>(packed, taps[0] * taps[1], x.size(1), outputs);
  int64_t sizes[2];
  for (int d = 0; d < 2; ++d) {
    args.taps[d] = taps[d];
    args.stride[d] = stride[d];
    args.padding[d] = padding[d];
    // Division would round what is negative up.
    TORCH_CHECK(x.size(2 + d) + 2 * padding[d] >= taps[d], "a padded map is smaller than the kernel: ", x.sizes());
    sizes[d] = (x.size(2 + d) + 2 * padding[d] - taps[d]) / stride[d] + 1;
  }
  return describe_maps(args, x, addend, outputs, sizes[0], sizes[1]);
}

// Of a 3x3 convolution of stride 1 of x, or of x at twice its size, in tiles of tile x tile results.
inline std::pair<Tensor, OptionalTensor> describe_winograd(WinogradArgs& args, const Tensor& x, const Tensor& packed,
                                                           const OptionalTensor& addend, int64_t outputs,
                                                           const Pair& padding, int64_t tile, bool doubled) {
  check_packed<WinogradArgs>(packed, 9, x.size(1), outputs);
  int64_t sizes[2];
  for (int d = 0; d < 2; ++d) {
    args.padding[d] = padding[d];
    sizes[d] = x.size(2 + d) * (doubled ? 2 : 1) + 2 * padding[d] - 2;
  }
  args.type = type_of(x.scalar_type());
  args.tile = tile;
  args.doubled = doubled;
  return describe_maps(args, x, addend, outputs, sizes[0], sizes[1]);
}

// The product x (..., C) -> (..., outputs) as the 1x1 convolution of a map of one row.
template <class Args>
Tensor describe_product(Args& args, const Tensor& x, const Tensor& packed, int64_t outputs) {
  at::DimVector sizes(x.sizes());
  args.samples = args.height = args.out_height = 1;
  args.channels = sizes.back();
  args.width = args.out_width = x.numel() / args.channels;
  args.outputs = sizes.back() = outputs;
  for (int d = 0; d < 2; ++d) args.taps[d] = args.stride[d] = 1;
  args.threads = at::get_num_threads();
  check_packed<Args>(packed, 1, args.channels, outputs);
  return at::empty(sizes, x.options());
}

inline const void* data(const OptionalTensor& tensor) { return tensor ? tensor->const_data_ptr() : nullptr; }

}  // namespace fastdiff
