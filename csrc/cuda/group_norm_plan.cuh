// How group_norm_silu is cut into blocks. Host only; the launcher and the workspace size follow from the same plan.
#pragma once

#include <algorithm>

#include "launch.cuh"
#include "vector.cuh"

namespace fastdiff::cuda {

// A slab is what is normalised together: one group where its memory is contiguous or its rows are long enough, several
// neighbouring groups where a channels-last row of one would be short or would not start at a 16-byte boundary. It is a
// matrix of chunks of `width` elements: contiguous (row = channel, column = position), channels-last (row = position,
// column = channel). A part is a run of its chunks, the work of one block; a tile is what a block holds at a time.
struct GroupNormPlan {
  bool one;     // one pass, the parts of a slab being one cluster; else statistics first, then the rest
  int width;    // WIDTH, or 1 where the shape or an address does not allow it
  int groups;   // in a slab
  int columns;  // chunks in a row
  int64_t rows, row_stride;
  int64_t chunks, unit;  // parts and tiles are multiples of `unit` chunks
  int threads, stride;   // of a block; of those, the ones that work, a multiple of `columns` if it can be
  int64_t parts, part_chunks, tile_chunks;
  int64_t scratch, shared;  // bytes of a block: for the reductions; with a tile
};

constexpr int64_t TILE_BYTES = 56 * 1024;        // so that three blocks, with their scratch, share a multiprocessor
constexpr int64_t SPLIT_TILE_BYTES = 32 * 1024;  // more blocks in flight, for there is nothing to wait for
constexpr int64_t MAX_CLUSTER = 8;               // the portable limit
constexpr int64_t MAX_PARTS = 64;                // merged by one warp, two a lane
constexpr int64_t ROW_BYTES = 64;                // two sectors
constexpr int GROUPED_THREADS = 256;             // several groups need scratch memory for each thread

inline int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

inline int64_t element_bytes(Type type) { return type == Type::F32 ? 4 : 2; }

// Bytes of an element in the tile: the sum with a residual is kept in float32, everything else as it came.
inline int64_t tile_element_bytes(const GroupNormArgs& args) { return args.residual ? 4 : element_bytes(args.x.type); }

// How many groups a channels-last slab takes, or 0 if `width` does not fit.
inline int groups_of_slab(const GroupNormArgs& args, int width) {
  const int64_t each = args.channels / args.groups;
  int best = 0;
  for (int64_t groups = 1; groups <= args.groups; ++groups) {
    const int64_t channels = groups * each;
    if (groups > 1 && channels / width > GROUPED_THREADS) break;
    if (args.groups % groups || channels % width) continue;
    best = static_cast<int>(groups);
    if (channels * element_bytes(args.x.type) >= ROW_BYTES) break;
  }
  return best;
}

// Float2 slots of the reductions: one a warp, or one for each element of a chunk and thread and then one a channel.
inline int64_t scratch_slots(const GroupNormPlan& plan) {
  if (plan.groups == 1) return 32;
  const int64_t channels = plan.columns * plan.width;
  return plan.threads * plan.width + std::max<int64_t>(plan.threads / channels, 1) * channels;
}

inline void choose_slab(GroupNormPlan& plan, const GroupNormArgs& args) {
  bool vector = true;
  for (const Array& array :
       {args.x, args.second, args.residual, args.y, args.sum, args.weight, args.bias, args.addend}) {
    vector = vector && aligned(array.data);
  }
  // No chunk has elements of both inputs.
  const bool whole =
      args.channels_last ? args.channels % WIDTH == 0 && args.x_channels % WIDTH == 0 : args.spatial % WIDTH == 0;
  plan.width = vector && whole ? WIDTH : 1;
  plan.groups = 1;
  if (args.channels_last) {
    plan.groups = groups_of_slab(args, plan.width);
    if (plan.groups == 0) {
      plan.width = 1;
      plan.groups = groups_of_slab(args, 1);
    }
  }
  const int64_t channels = plan.groups * (args.channels / args.groups);
  plan.rows = args.channels_last ? args.spatial : channels;
  plan.columns = static_cast<int>((args.channels_last ? channels : args.spatial) / plan.width);
  plan.row_stride = args.channels_last ? args.channels : args.spatial;
  plan.chunks = plan.rows * plan.columns;
  plan.unit = args.channels_last ? plan.columns : 1;
}

// Channels-last parts and tiles are whole rows.
inline void choose_parts(GroupNormPlan& plan, int64_t parts) {
  plan.parts = parts;
  plan.part_chunks = divide_up(divide_up(plan.chunks, parts), plan.unit) * plan.unit;
}

inline GroupNormPlan group_norm_plan(const GroupNormArgs& args, const Device& device) {
  GroupNormPlan plan{};
  choose_slab(plan, args);
  const int64_t slabs = args.samples * args.groups / plan.groups;
  const int64_t chunk_bytes = plan.width * tile_element_bytes(args);
  const int64_t clusters = device.clusters ? MAX_CLUSTER : 1;

  int64_t parts = 1;
  choose_parts(plan, parts);
  while (parts < clusters && (plan.part_chunks * chunk_bytes > TILE_BYTES ||
                              (slabs * parts < device.multiprocessors && plan.part_chunks * chunk_bytes > 8 * 1024))) {
    choose_parts(plan, parts *= 2);
  }
  plan.one = plan.part_chunks * chunk_bytes <= TILE_BYTES;
  if (!plan.one) {
    parts =
        std::max(divide_up(plan.chunks * chunk_bytes, SPLIT_TILE_BYTES), divide_up(2 * device.multiprocessors, slabs));
    choose_parts(plan, std::min({parts, MAX_PARTS, plan.chunks}));
  }
  const int64_t bytes = plan.one ? TILE_BYTES : SPLIT_TILE_BYTES;
  const int64_t most = std::max<int64_t>(bytes / (chunk_bytes * plan.unit), 1) * plan.unit;
  plan.tile_chunks = std::min(plan.part_chunks, most);

  plan.threads = plan.tile_chunks > 1024 ? 512 : plan.tile_chunks > 256 ? 256 : 128;
  if (plan.groups > 1) plan.threads = GROUPED_THREADS;
  const bool fixed = plan.columns <= plan.threads;
  plan.stride = fixed ? plan.threads / plan.columns * plan.columns : plan.threads;
  const int64_t slots = scratch_slots(plan) + 5 * plan.groups;  // the groups' results, finals and sums
  plan.scratch = divide_up(slots * static_cast<int64_t>(sizeof(float2)), 16) * 16;
  plan.shared = plan.scratch + plan.tile_chunks * chunk_bytes;
  return plan;
}

}  // namespace fastdiff::cuda
