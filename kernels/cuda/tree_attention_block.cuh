// SPDX-License-Identifier: Apache-2.0
// What the tensor-core and the float32 kernel of tree attention have in common:
// which part of the work a block of threads has, where its keys and results
// lie, and the merge of the splits.
#pragma once

#include "common/tree_math.h"
#include "device.cuh"
#include "launch.h"

namespace clover2 {

constexpr float kLog2E = 1.4426950408889634f;

// A block's share: one split of the keys, one tile of queries, one KV head, one
// request.
struct BlockWork {
  int request, kv_head, group, split;
  int row_begin;   // of the request, in the flat batch
  int prefix;      // committed keys
  int num_keys;    // prefix + tree rows
  int tile_begin;  // first tile row (see tile_row_tree_row)
  int tile_rows;  // number of tile rows that exist from there on, 0: nothing to
                  // do
  int first_tile, end_tile;  // of keys
  int splits;                // that have work for this request
};

__device__ __forceinline__ BlockWork find_work(const TreeAttentionParams& p,
                                               int tile_rows, int tile_keys) {
  BlockWork work;
  // Blocks that run next to each other share their keys, by way of the L2
  // cache.
  const int row_tile = static_cast<int>(blockIdx.x) % p.row_tiles;
  work.split = static_cast<int>(blockIdx.x) / p.row_tiles;
  work.kv_head = static_cast<int>(blockIdx.y);
  work.request = static_cast<int>(blockIdx.z);
  work.group = p.heads / p.kv_heads;
  work.row_begin = p.row_offsets[work.request];
  const int rows = p.row_offsets[work.request + 1] - work.row_begin;
  work.prefix = p.prefix_lens[work.request];
  work.num_keys = work.prefix + rows;
  work.tile_begin = row_tile * tile_rows;
  const int left = rows * work.group - work.tile_begin;
  const KeySplit keys =
      split_keys(work.prefix, rows, p.sliding_window, tile_keys, p.max_splits,
                 p.min_tiles_per_split);
  work.splits = keys.splits;
  work.tile_rows =
      work.split < keys.splits ? max_int(0, min_int(left, tile_rows)) : 0;
  work.first_tile = keys.first_tile + work.split * keys.tiles_per_split;
  work.end_tile =
      min_int(work.first_tile + keys.tiles_per_split, keys.end_tile);
  return work;
}

// Offset of a key in the cache, within a KV head; 0 for keys beyond the last,
// which must not be looked up.
__device__ __forceinline__ int64_t find_key(const TreeAttentionParams& p,
                                            const BlockWork& work, int key) {
  if (key >= work.num_keys) return 0;
  return key_offset(p.block_table + work.request * p.block_table_stride, key,
                    p.block_size, p.cache_block_stride, p.cache_slot_stride);
}

// Offset of a tile row's query vector; `m` counts from the block's first tile
// row.
__device__ __forceinline__ int64_t find_query(const TreeAttentionParams& p,
                                              const BlockWork& work, int m) {
  const int tile_row = work.tile_begin + m;
  const int64_t token =
      p.query_starts[work.request] + tile_row_tree_row(tile_row, work.group);
  const int head =
      work.kv_head * work.group + tile_row_head(tile_row, work.group);
  return token * p.query_token_stride + head * p.query_head_stride;
}

__device__ __forceinline__ int64_t find_out(const TreeAttentionParams& p,
                                            const BlockWork& work, int m) {
  const int tile_row = work.tile_begin + m;
  const int64_t token =
      p.query_starts[work.request] + tile_row_tree_row(tile_row, work.group);
  const int head =
      work.kv_head * work.group + tile_row_head(tile_row, work.group);
  return token * p.out_token_stride + head * p.out_head_stride;
}

// Index of a tile row's partial result, in units of one (row, head).
__device__ __forceinline__ int64_t find_partial(const TreeAttentionParams& p,
                                                const BlockWork& work, int m) {
  const int tile_row = work.tile_begin + m;
  const int64_t row = static_cast<int64_t>(work.split) * p.total_rows +
                      work.row_begin + tile_row_tree_row(tile_row, work.group);
  return row * p.heads + work.kv_head * work.group +
         tile_row_head(tile_row, work.group);
}

__device__ __forceinline__ RowView find_view(const TreeAttentionParams& p,
                                             const BlockWork& work, int m) {
  // Rows that only pad the tile see the prefix: their results are dropped.
  if (m >= work.tile_rows) return RowView{0, 0};
  const int row = tile_row_tree_row(work.tile_begin + m, work.group);
  return row_view(p.ancestors[work.row_begin + row], work.prefix,
                  p.sliding_window);
}

// With a soft-cap, a dot product becomes the one whose plain score, dot *
// scale, is cap * tanh(dot * scale / cap). tanh x = 1 - 2 / (e^2x + 1) is exact
// to 1e-7, also where e^2x overflows.
__device__ __forceinline__ float capped_dot(const TreeAttentionParams& p,
                                            float dot) {
  const float squared = exp2_fast(dot * p.scale * (2.0f * kLog2E / p.softcap));
  const float tanh = 1.0f - 2.0f * reciprocal_fast(squared + 1.0f);
  return tanh * (p.softcap / p.scale);
}

// Running softmax of one row, in base 2: scores are dot products times scale *
// log2(e). The new maximum, and the factor for what was summed before.
struct SoftmaxStep {
  float max;
  float
      base;  // what to subtract from scores: finite also if no key was seen yet
  float rescale;
};

__device__ __forceinline__ SoftmaxStep softmax_step(float old_max,
                                                    float tile_max) {
  SoftmaxStep step;
  step.max = fmaxf(old_max, tile_max);
  step.base = step.max == -INFINITY ? 0.0f : step.max;
  step.rescale = exp2_fast(old_max - step.base);
  return step;
}

// Stores 4 consecutive elements as the cache's type.
template <typename Element>
__device__ __forceinline__ void store_4(void* out, int64_t offset,
                                        const float (&values)[4]) {
  uint32_t* to =
      reinterpret_cast<uint32_t*>(static_cast<uint16_t*>(out) + offset);
  to[0] = Element::pack(values[0], values[1]);
  to[1] = Element::pack(values[2], values[3]);
}

template <>
__device__ __forceinline__ void store_4<float>(void* out, int64_t offset,
                                               const float (&values)[4]) {
  float* to = static_cast<float*>(out) + offset;
  for (int i = 0; i < 4; ++i) to[i] = values[i];
}

constexpr int kMergeThreads = 128;

// The request that owns row `row` of the flat batch: as many requests end at or
// before it. All lanes of a warp ask for the same row.
__device__ __forceinline__ int find_request(const TreeAttentionParams& p,
                                            int row) {
  const int lane = static_cast<int>(threadIdx.x) % kWarpSize;
  int ended = 0;
  for (int begin = 0; begin < p.requests; begin += kWarpSize) {
    const int request = begin + lane;
    const bool ends = request < p.requests && p.row_offsets[request + 1] <= row;
    ended += count_bits(ballot(ends));
  }
  return ended;
}

// Merges the splits of one (row, head) per warp. Requests whose keys went to a
// single split have their result already.
template <typename Element>
__global__ void __launch_bounds__(kMergeThreads)
    merge_splits_kernel(const TreeAttentionParams p) {
  const int warps = kMergeThreads / kWarpSize;
  const int lane = static_cast<int>(threadIdx.x) % kWarpSize;
  const int64_t pair = static_cast<int64_t>(blockIdx.x) * warps +
                       static_cast<int>(threadIdx.x) / kWarpSize;
  const int row = static_cast<int>(pair / p.heads);
  const int head = static_cast<int>(pair % p.heads);
  // The flat batch may be padded beyond the last request's rows.
  if (row >= p.total_rows || row >= p.row_offsets[p.requests]) return;
  const int request = find_request(p, row);
  const int first_row = p.row_offsets[request];
  const int rows = p.row_offsets[request + 1] - first_row;
  const KeySplit keys =
      split_keys(p.prefix_lens[request], rows, p.sliding_window, p.tile_keys,
                 p.max_splits, p.min_tiles_per_split);
  if (keys.splits == 1) return;

  const int64_t split_stride = static_cast<int64_t>(p.total_rows) * p.heads;
  float max = -INFINITY;
  for (int split = lane; split < keys.splits; split += kWarpSize) {
    max = fmaxf(max, p.partial_stats[(split * split_stride + pair) * 2]);
  }
  for (int mask = kWarpSize / 2; mask > 0; mask /= 2) {
    max = fmaxf(max, shuffle_xor(max, mask));
  }
  const int64_t out =
      (p.query_starts[request] + row - first_row) * p.out_token_stride +
      head * p.out_head_stride;
  for (int d = 4 * lane; d < p.head_dim; d += 4 * kWarpSize) {
    float sum = 0.0f;
    float values[4] = {0.0f, 0.0f, 0.0f, 0.0f};
#pragma unroll 4
    for (int split = 0; split < keys.splits; ++split) {
      const int64_t part = split * split_stride + pair;
      const float weight = part_weight(p.partial_stats[part * 2], max);
      sum += weight * p.partial_stats[part * 2 + 1];
      const float4 partial = *reinterpret_cast<const float4*>(
          p.partial_out + part * p.head_dim + d);
      values[0] += weight * partial.x;
      values[1] += weight * partial.y;
      values[2] += weight * partial.z;
      values[3] += weight * partial.w;
    }
    const float scale = sum > 0.0f ? 1.0f / sum : 0.0f;
    for (int i = 0; i < 4; ++i) values[i] *= scale;
    store_4<Element>(p.out, out + d, values);
  }
}

}  // namespace clover2
