// SPDX-License-Identifier: Apache-2.0
// Entry points of the CUDA kernels, free of torch: plain pointers, sizes and
// strides.
//
// bindings.cpp checks the tensors and fills these in. Strides count elements
// unless a name says bytes. Every function returns a cudaError_t as an int (0:
// launched), never waits for the device and never reads from it, so that all of
// them can be captured in a CUDA graph.
#pragma once

#include <cstdint>

#include "common/context_limits.h"

namespace clover2 {

enum class AttentionType : int { kFloat32 = 0, kFloat16 = 1, kBFloat16 = 2 };

struct TreeAttentionParams {
  const void* query;  // [tokens, heads, D]
  const void* cache;  // [blocks, kv_heads, block_size, 2 * D]
  void* out;          // [tokens, heads, D]
  const int32_t* block_table;
  const int32_t* prefix_lens;
  const int32_t* query_starts;
  const int32_t* row_offsets;
  const int64_t* ancestors;
  // Partial results, one per split, rows and heads packed; null if there is one
  // split.
  float* partial_out;  // [splits, total_rows, heads, D], not normalised
  float*
      partial_stats;  // [splits, total_rows, heads, 2]: maximum (base 2), sum
  int64_t query_token_stride, query_head_stride;
  int64_t out_token_stride, out_head_stride;
  int64_t cache_block_stride, cache_head_stride, cache_slot_stride;
  int64_t block_table_stride;
  int requests, total_rows, heads, kv_heads, head_dim, block_size;
  int max_blocks;      // width of the block table
  int sliding_window;  // -1: none
  float scale, softcap;
  // Set by plan_tree_attention:
  int row_tiles, max_splits, min_tiles_per_split, tile_keys;
  int block_shared_bytes;  // what a block may have
};

// Head sizes that tree_attention has kernels for.
constexpr int kHeadDims[] = {64, 80, 96, 128, 256};

struct DeviceLimits {
  int multiprocessors;
  int shared_bytes;  // of one multiprocessor
};

// Chooses how the launch is cut up.
void plan_tree_attention(TreeAttentionParams& params, AttentionType type,
                         const DeviceLimits& device);

// `stream` is a cudaStream_t.
int launch_tree_attention(const TreeAttentionParams& params, AttentionType type,
                          void* stream);

struct TreeAcceptParams {
  const int64_t* target_tokens;  // [rows]
  const int64_t* draft_tokens;   // [rows]
  const int32_t* parents;        // [rows]
  const int32_t* row_offsets;    // [requests + 1]
  int32_t* paths;                // [requests, max_depth]
  int32_t* lengths;              // [requests]
  int64_t* next_tokens;          // [requests]
  int requests, max_depth;
};

int launch_tree_accept(const TreeAcceptParams& params, void* stream);

// Layers per launch: their pointers travel in the kernel's parameters, of which
// 4 KiB are allowed on every device.
constexpr int kMaxCommitLayers = 256;

struct CommitKvParams {
  void* layers[kMaxCommitLayers];  // each [blocks, kv_heads, block_size, 2 * D]
  const int32_t* block_table;
  const int32_t* prefix_lens;
  const int32_t* paths;                            // [requests, max_depth]
  const int32_t* lengths;                          // [requests]
  int64_t block_stride, head_stride, slot_stride;  // of every layer, in bytes
  int64_t block_table_stride;
  int64_t row_bytes;  // K and V of one token and head
  int num_layers, requests, max_depth, kv_heads, block_size;
};

int launch_commit_kv(const CommitKvParams& params, void* stream);

struct ContextNodesParams {
  const int32_t* history;   // [slots, width]
  const int32_t* requests;  // [num_requests]
  const int32_t* lengths;   // [num_requests]
  int64_t* tokens;          // [num_requests, max_nodes], as the next four
  int32_t* parents;
  int32_t* depths;
  int32_t* matches;
  int32_t* places;
  int32_t* sizes;  // [num_requests]
  int64_t slot_stride;
  int num_requests, slots, width;
  int min_match, max_match, max_places, max_depth, max_nodes;
};

int launch_context_nodes(const ContextNodesParams& params, void* stream);

}  // namespace clover2
