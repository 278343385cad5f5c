// SPDX-License-Identifier: Apache-2.0
// Arithmetic of tree attention over a paged cache that does not depend on the
// device: which keys a row sees, where a key lies, how the keys are split
// between blocks of threads, how partial softmaxes merge. Plain integers and
// floats, no torch, so that it compiles for the host and for the GPU and can be
// tested on either.
//
// Keys of a request are numbered linearly: 0 .. prefix - 1 is the committed
// prefix, prefix + j is tree row j.
#pragma once

#include <cmath>
#include <cstdint>

#include "kv_layout.h"

namespace clover2 {

CLOVER2_HOST_DEVICE int ceil_div(int value, int divisor) {
  return (value + divisor - 1) / divisor;
}

CLOVER2_HOST_DEVICE int min_int(int a, int b) { return a < b ? a : b; }
CLOVER2_HOST_DEVICE int max_int(int a, int b) { return a > b ? a : b; }

CLOVER2_HOST_DEVICE int count_bits(uint64_t word) {
#if defined(__CUDA_ARCH__)
  return __popcll(word);
#else
  return __builtin_popcountll(word);
#endif
}

// What one tree row may attend to.
struct RowView {
  uint64_t rows;  // bit j: tree row j
  int first_key;  // of the prefix, keys from here on
};

// `ancestors` has bit j set if row j is an ancestor of this row or the row
// itself; so the number of set bits is the row's depth + 1, and, since
// ancestors are numbered from the root down, the lowest set bits are the ones
// farthest away. A window of w sees sequence positions (prefix + depth) greater
// than the row's own minus w; -1 sees all.
CLOVER2_HOST_DEVICE RowView row_view(int64_t ancestors, int prefix,
                                     int window) {
  RowView view{static_cast<uint64_t>(ancestors), 0};
  if (window < 0) return view;
  const int depth = count_bits(view.rows) - 1;
  for (int hidden = depth + 1 - window; hidden > 0; --hidden) {
    view.rows &= view.rows - 1;  // clears the lowest set bit
  }
  view.first_key = max_int(0, prefix + depth - window + 1);
  return view;
}

CLOVER2_HOST_DEVICE bool sees(const RowView& view, int key, int prefix) {
  if (key < prefix) return key >= view.first_key;
  const int row = key - prefix;
  return row < kMaxTreeRows && ((view.rows >> row) & 1) != 0;
}

// Offset, in elements, of a key's block and slot; the head's offset comes on
// top.
CLOVER2_HOST_DEVICE int64_t key_offset(const int32_t* blocks, int key,
                                       int block_size, int64_t block_stride,
                                       int64_t slot_stride) {
  const int block = key / block_size;
  return blocks[block] * block_stride +
         (key - block * block_size) * slot_stride;
}

// How a request's keys are shared out: tiles of `tile_keys` keys, aligned to
// multiples of it, consecutive tiles to one split. Splits beyond `splits` have
// nothing to do.
struct KeySplit {
  int first_tile;
  int end_tile;
  int tiles_per_split;
  int splits;  // at least 1
};

CLOVER2_HOST_DEVICE KeySplit split_keys(int prefix, int rows, int window,
                                        int tile_keys, int max_splits,
                                        int min_tiles_per_split) {
  KeySplit split;
  // The root is the shallowest row, so its window reaches back farthest.
  const int first_key = window < 0 ? 0 : max_int(0, prefix - window + 1);
  split.first_tile = min_int(first_key, prefix) / tile_keys;
  split.end_tile = ceil_div(prefix + rows, tile_keys);
  const int tiles = max_int(split.end_tile - split.first_tile, 1);
  split.tiles_per_split =
      max_int(ceil_div(tiles, max_splits), min_tiles_per_split);
  split.splits = ceil_div(tiles, split.tiles_per_split);
  return split;
}

// Row m of a tile of queries is query head m % group of tree row m / group: all
// heads that share a KV head, of all rows, so that a key read once serves all
// of them.
CLOVER2_HOST_DEVICE int tile_row_tree_row(int m, int group) {
  return m / group;
}
CLOVER2_HOST_DEVICE int tile_row_head(int m, int group) { return m % group; }

// Factor by which a partial softmax with maximum `part_max` (base 2) counts in
// one with maximum `max`. A part that saw no key has maximum -infinity and
// counts nothing, also when no part saw any.
CLOVER2_HOST_DEVICE float part_weight(float part_max, float max) {
  return part_max == -INFINITY ? 0.0f : exp2f(part_max - max);
}

// How an attention launch is cut up; chosen on the host from sizes alone,
// without reading a length back from the device.
struct AttentionPlan {
  int row_tiles;   // tiles of queries per request, for the largest tree
  int max_splits;  // splits of the keys
  int min_tiles_per_split;  // fewer tiles of keys are not worth a split
};

struct AttentionSizes {
  int requests;
  int total_rows;  // of all requests
  int kv_heads;
  int group;      // query heads per KV head
  int max_keys;   // upper bound of prefix + rows: what the block table can hold
  int tile_rows;  // tile row = (tree row, head of the group)
  int tile_keys;
  int resident_blocks;  // blocks of threads that the device runs at a time
};

// More splits than this would cost more in partial results than they gain.
constexpr int kMaxSplits = 128;
// A split's partial result is tile_rows x D floats, written and read once; a
// tile of keys is tile_keys x 2D elements. While the chip has idle
// multiprocessors two tiles already pay; once it is full, splitting only evens
// out the last wave.
constexpr int kMinTilesIdle = 2;
constexpr int kMinTilesFull = 8;
// Take the smallest number of splits whose last wave is filled this well,
// relative to the best (the rule of FlashAttention's num_splits heuristic).
constexpr float kWaveTolerance = 0.85f;

CLOVER2_HOST_DEVICE float wave_efficiency(int blocks, int resident_blocks) {
  const float waves = static_cast<float>(blocks) / resident_blocks;
  return waves / ceilf(waves);
}

inline AttentionPlan plan_attention(const AttentionSizes& sizes) {
  AttentionPlan plan{};
  const int largest = min_int(static_cast<int>(kMaxTreeRows), sizes.total_rows);
  plan.row_tiles = ceil_div(largest * sizes.group, sizes.tile_rows);
  const int typical = ceil_div(sizes.total_rows, sizes.requests);
  const int blocks = sizes.requests * sizes.kv_heads *
                     ceil_div(typical * sizes.group, sizes.tile_rows);
  plan.min_tiles_per_split =
      blocks < sizes.resident_blocks ? kMinTilesIdle : kMinTilesFull;
  const int tiles = ceil_div(sizes.max_keys, sizes.tile_keys);
  const int limit = max_int(
      1, min_int(kMaxSplits, ceil_div(tiles, plan.min_tiles_per_split)));
  float best = 0.0f;
  for (int splits = 1; splits <= limit; ++splits) {
    best = fmaxf(best, wave_efficiency(blocks * splits, sizes.resident_blocks));
  }
  plan.max_splits = 1;
  while (wave_efficiency(blocks * plan.max_splits, sizes.resident_blocks) <
         kWaveTolerance * best) {
    ++plan.max_splits;
  }
  return plan;
}

}  // namespace clover2
