// What the kernels of group_norm_silu share: walking over a slab, the statistics of a tile, and the normalisation.
#pragma once

#include "group_norm_moments.cuh"
#include "group_norm_plan.cuh"

namespace fastdiff::cuda {

// One block's part of a slab. T: dtype of x. kWidth: elements of a chunk. kLast: channels-last.
template <class T, int kWidth, bool kLast>
struct Slab {
  static constexpr int CHANNELS = kLast ? kWidth : 1;  // different channels in a chunk
  static constexpr int UNROLL = kWidth == 1 ? 1 : 4;   // loads in flight

  const GroupNormArgs& args;
  const GroupNormPlan& plan;
  int64_t part, sample, first_channel, first_group;
  int64_t base;              // index of the slab's first element in y
  int64_t begin, size;       // chunks of this part
  int per_group;             // channels
  float4 *results, *finals;  // for each group, as `packed` and `finished` give them
  float2 *sums, *scratch;
  unsigned char* tile;

  __device__ Slab(const GroupNormArgs& args, const GroupNormPlan& plan, int64_t block, unsigned char* shared)
      : args(args), plan(plan) {
    const int64_t slab = block / plan.parts, slabs = args.groups / plan.groups;
    part = block - slab * plan.parts;
    sample = slab / slabs;
    first_group = (slab - sample * slabs) * plan.groups;
    per_group = static_cast<int>(args.channels / args.groups);
    first_channel = first_group * per_group;
    base = sample * args.channels * args.spatial + (kLast ? first_channel : first_channel * args.spatial);
    begin = part * plan.part_chunks;
    size = size_of(part);
    results = reinterpret_cast<float4*>(shared);
    finals = results + plan.groups;
    sums = reinterpret_cast<float2*>(finals + plan.groups);
    scratch = sums + plan.groups;
    tile = shared + plan.scratch;
  }

  __device__ __forceinline__ int64_t size_of(int64_t any_part) const {
    const int64_t left = plan.chunks - any_part * plan.part_chunks;
    return left < 0 ? 0 : left < plan.part_chunks ? left : plan.part_chunks;
  }

  // Elements of one group in so many chunks of the slab.
  __device__ __forceinline__ float elements(int64_t chunks) const {
    return static_cast<float>(chunks * kWidth / plan.groups);
  }

  // Where a chunk in row 0 of the slab, channels-last, or in a contiguous slab begins in its input, and how far on the
  // next row is there.
  struct Input {
    const T* from;
    int64_t row_stride;
  };

  // `channel` and `offset` are the chunk's first in the slab.
  __device__ __forceinline__ Input input_at(int channel, int64_t offset) const {
    const int64_t of_x = args.x_channels, of_second = args.channels - of_x, c = first_channel + channel;
    const bool second = c >= of_x;
    const T* from = static_cast<const T*>(second ? args.second.data : args.x.data);
    const int64_t channels = second ? of_second : of_x, skipped = second ? of_x : 0;
    const int64_t sample_begin = sample * channels * args.spatial;
    if (kLast) return {from + sample_begin + c - skipped, channels};
    return {from + sample_begin + (first_channel - skipped) * args.spatial + offset, 0};
  }

  // Calls f(i, index, from) for this thread's share of the chunks first .. first + count: i counted from `first`, index
  // that of the chunk's first element in y, from where it lies in x or in the second input. Before a chunk of other
  // channels comes prepare(c), c its first channel in the slab.
  template <class P, class F>
  __device__ __forceinline__ void walk(int64_t first, int count, P&& prepare, F&& f) const {
    const int thread = threadIdx.x, columns = plan.columns;
    if (thread >= plan.stride) return;
    const int64_t first_row = first / columns;
    if constexpr (kLast) {
      const int lines = columns < plan.threads ? plan.stride / columns : 1;
      const int line = columns < plan.threads ? thread / columns : 0;
      for (int column = thread - line * columns; column < columns; column += plan.threads) {
        prepare(column * kWidth);
        int64_t index = base + (first_row + line) * plan.row_stride + column * kWidth;
        const Input input = input_at(column * kWidth, 0);
        const T* from = input.from + (first_row + line) * input.row_stride;
#pragma unroll(UNROLL)
        for (int i = line * columns + column; i < count; i += lines * columns) {
          f(i, index, from);
          index += lines * plan.row_stride;
          from += lines * input.row_stride;
        }
      }
    } else {
      const int row_step = plan.stride / columns, column_step = plan.stride - row_step * columns;
      const int64_t from = first - first_row * columns + thread;
      int row = static_cast<int>(first_row + from / columns);
      int column = static_cast<int>(from % columns);
#pragma unroll(UNROLL)
      for (int i = thread; i < count; i += plan.stride) {
        prepare(row);
        const int64_t offset = (first + i) * kWidth;
        f(i, base + offset, input_at(row, offset).from);
        row += row_step;
        column += column_step;
        if (column >= columns) column -= columns, ++row;
      }
    }
  }

  __device__ __forceinline__ int group_of(int channel) const { return plan.groups > 1 ? channel / per_group : 0; }

  // A chunk's channels of weight, bias or addend: x's dtype or float32.
  static __device__ __forceinline__ void parameters(const Array& array, int64_t index, float (&out)[CHANNELS]) {
    if (array.type == Type::F32) {
      Cell<float, CHANNELS>::load(static_cast<const float*>(array.data) + index).get(out);
    } else {
      Cell<T, CHANNELS>::load(static_cast<const T*>(array.data) + index).get(out);
    }
  }

  // What is added to a chunk's channels.
  struct Addend {
    float values[CHANNELS] = {};
  };

  __device__ __forceinline__ void prepare_addend(Addend& addend, int channel) const {
    if (args.addend.data) parameters(args.addend, sample * args.channels + first_channel + channel, addend.values);
  }

  // h of a chunk from x in registers; the residual is read.
  __device__ __forceinline__ void complete(const Cell<T, kWidth>& x, const Addend& addend, int64_t index,
                                           float (&h)[kWidth]) const {
    x.get(h);
#pragma unroll
    for (int j = 0; j < kWidth; ++j) h[j] += addend.values[kLast ? j : 0];
    if (args.residual.data) {
      float residual[kWidth];
      Cell<T, kWidth>::load(static_cast<const T*>(args.residual.data) + index).get(residual);
#pragma unroll
      for (int j = 0; j < kWidth; ++j) h[j] += residual[j];
    }
  }

  // h of chunk i of the tile.
  __device__ __forceinline__ void from_tile(int i, const Addend& addend, float (&h)[kWidth]) const {
    if (args.residual.data) {
      Cell<float, kWidth>::load_tile(reinterpret_cast<const float*>(tile) + i * kWidth).get(h);
    } else {
      Cell<T, kWidth>::load_tile(reinterpret_cast<const T*>(tile) + i * kWidth).get(h);
#pragma unroll
      for (int j = 0; j < kWidth; ++j) h[j] += addend.values[kLast ? j : 0];
    }
  }

  // The sum over the block of `values`, for each group, into `sums`; every thread takes part.
  __device__ __forceinline__ void reduce(const float2 (&values)[kWidth]) const {
    const int thread = threadIdx.x, lane = thread % 32, warp = thread / 32, warps = plan.threads / 32;
    if (plan.groups == 1) {
      float2 value{};
#pragma unroll
      for (int j = 0; j < kWidth; ++j) value.x += values[j].x, value.y += values[j].y;
      value = warp_sum(value);
      if (lane == 0) scratch[warp] = value;
      __syncthreads();
      if (warp == 0) {
        value = warp_sum(lane < warps ? scratch[lane] : float2{});
        if (lane == 0) sums[0] = value;
      }
    } else {
      reduce_grouped(values, thread, lane, warp, warps);
    }
    __syncthreads();
  }

  // First over the threads that share a column, then over the channels of a group.
  __device__ __forceinline__ void reduce_grouped(const float2 (&values)[kWidth], int thread, int lane, int warp,
                                                 int warps) const {
    const int channels = plan.columns * kWidth, lines = plan.stride / plan.columns;
    const int shares = plan.threads < channels ? 1 : plan.threads / channels;
    float2* shared = scratch + plan.threads * kWidth;
    if (thread < plan.stride) {
#pragma unroll
      for (int j = 0; j < kWidth; ++j) scratch[thread * kWidth + j] = values[j];
    }
    __syncthreads();
    for (int i = thread; i < shares * channels; i += plan.threads) {
      float2 value{};
      for (int line = i / channels; line < lines; line += shares) {
        const float2 other = scratch[line * channels + i % channels];
        value.x += other.x, value.y += other.y;
      }
      shared[i] = value;
    }
    __syncthreads();
    for (int group = warp; group < plan.groups; group += warps) {
      float2 value{};
      for (int i = lane; i < shares * per_group; i += 32) {
        const float2 other = shared[i / per_group * channels + group * per_group + i % per_group];
        value.x += other.x, value.y += other.y;
      }
      value = warp_sum(value);
      if (lane == 0) sums[group] = value;
    }
  }

  // Reads chunks first .. first + count into the tile, writes the sum if asked, and puts the groups' mean and squared
  // deviations into `results`, merged with what stands there for the `before` chunks of the part. The deviations are
  // taken from the tile's own mean, so nothing cancels; what rounding left in that mean is taken out of both. A
  // result is written by the thread that reads it back; other threads need a barrier.
  __device__ __forceinline__ void statistics(int64_t first, int count, int64_t before) const {
    float2 totals[kWidth] = {};
    Addend addend;
    const auto prepare = [&](int channel) { prepare_addend(addend, channel); };
    walk(first, count, prepare, [&](int i, int64_t index, const T* from) {
      const auto x = Cell<T, kWidth>::load(from);
      float h[kWidth];
      complete(x, addend, index, h);
      if (args.residual.data) {
        Cell<float, kWidth>::from(h).store_tile(reinterpret_cast<float*>(tile) + i * kWidth);
      } else {
        x.store_tile(reinterpret_cast<T*>(tile) + i * kWidth);
      }
      if (args.sum.data) Cell<T, kWidth>::from(h).store(static_cast<T*>(args.sum.data) + index);
#pragma unroll
      for (int j = 0; j < kWidth; ++j) totals[j].x += h[j];
    });
    reduce(totals);

    const float elements_here = elements(count);
    const int thread = threadIdx.x;
    const float first_mean = thread < plan.groups ? sums[thread].x / elements_here : 0.0f;
    float mean[CHANNELS];
#pragma unroll
    for (int j = 0; j < kWidth; ++j) totals[j] = float2{};
    const auto prepare_mean = [&](int channel) {
      prepare_addend(addend, channel);
#pragma unroll
      for (int j = 0; j < CHANNELS; ++j) mean[j] = sums[kLast ? group_of(channel + j) : 0].x / elements_here;
    };
    walk(first, count, prepare_mean, [&](int i, int64_t, const T*) {
      float h[kWidth];
      from_tile(i, addend, h);
#pragma unroll
      for (int j = 0; j < kWidth; ++j) {
        const float deviation = h[j] - mean[kLast ? j : 0];
        totals[j].x += deviation;
        totals[j].y += deviation * deviation;
      }
    });
    reduce(totals);

    if (thread < plan.groups) {
      const float2 sum = sums[thread];
      const float shift = sum.x / elements_here;
      Moments moments{elements_here, first_mean, shift, fmaxf(sum.y - sum.x * shift, 0.0f)};
      if (before > 0) moments = merge(unpacked(elements(before), results[thread]), moments);
      results[thread] = packed(moments);
    }
  }

  // y of this part; `finals` is complete. get(i, index, from, addend, h) gives a chunk.
  template <class F>
  __device__ __forceinline__ void normalise(F&& get) const {
    float mean[CHANNELS], scale[CHANNELS], shift[CHANNELS];
    Addend addend;
    const auto prepare = [&](int channel) {
      prepare_addend(addend, channel);
      float weight[CHANNELS], bias[CHANNELS] = {};
      if (args.weight.data) parameters(args.weight, first_channel + channel, weight);
      if (args.bias.data) parameters(args.bias, first_channel + channel, bias);
#pragma unroll
      for (int j = 0; j < CHANNELS; ++j) {
        const float4 final = finals[kLast ? group_of(channel + j) : 0];
        mean[j] = final.x;
        scale[j] = args.weight.data ? final.z * weight[j] : final.z;
        shift[j] = bias[j] - final.y * scale[j];
      }
    };
    walk(begin, static_cast<int>(size), prepare, [&](int i, int64_t index, const T* from) {
      float h[kWidth];
      get(i, index, from, addend, h);
#pragma unroll
      for (int j = 0; j < kWidth; ++j) {
        const int c = kLast ? j : 0;
        const float value = (h[j] - mean[c]) * scale[c] + shift[c];
        h[j] = args.silu ? __fdividef(value, 1.0f + __expf(-value)) : value;
      }
      Cell<T, kWidth>::from(h).store(static_cast<T*>(args.y.data) + index);
    });
  }
};

}  // namespace fastdiff::cuda
