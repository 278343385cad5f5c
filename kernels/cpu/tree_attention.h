// SPDX-License-Identifier: Apache-2.0
// What the builds of the CPU attention kernel (one per instruction set) share.
#pragma once

#include "../common/kv_layout.h"

#include <torch/headeronly/core/ScalarType.h>

#include <cstdint>

namespace clover2::cpu {

// Tokens are processed in groups of 32: two AMX tiles, and vLLM's own
// granularity. Block sizes are multiples of it, so that a group never straddles
// two blocks.
constexpr int64_t kGroupTokens = 32;

// Query vectors (row x head) of one task: the M side of two AMX tiles.
constexpr int64_t kMaxQueries = 32;

// One call of the op. Strides count elements; the last dimension of query and
// out is contiguous, the cache is contiguous in layout kVec or kAmx.
struct AttentionProblem {
  const void* query;  // [tokens, heads, D]
  int64_t query_token_stride;
  int64_t query_head_stride;
  void* out;  // [tokens, heads, D]
  int64_t out_token_stride;
  int64_t out_head_stride;
  const void* cache;  // [blocks, kv_heads, block_size, 2 * D]
  const int32_t* block_table;
  int64_t block_table_stride;
  const int32_t* prefix_lens;
  const int32_t* query_starts;
  const int32_t* row_offsets;
  const int64_t* ancestors;
  int64_t kv_heads;
  int64_t heads_per_kv;
  int64_t dim;
  int64_t block_size;
  int64_t split_threads;  // between which vLLM would divide the keys; 1: it
                          // would not
  int64_t
      tile_tokens;  // tokens per round of online softmax, multiple of a group
  float scale;
  float softcap;   // 0: none
  int64_t window;  // sequence positions a row sees, itself included; -1: all
  torch::headeronly::ScalarType dtype;
  KVLayout layout;
};

// Query vectors [first, last) of a request, numbered row * heads_per_kv + head,
// for one KV head: at most kMaxQueries.
struct AttentionTask {
  int64_t request;
  int64_t kv_head;
  int64_t first;
  int64_t last;
};

using AttentionKernel = void (*)(const AttentionProblem&, const AttentionTask&);

// All dtypes and layouts, on any machine.
AttentionKernel portable_attention();

// Null where the compiler or this machine lacks the instructions.
AttentionKernel avx512_attention();  // kVec
AttentionKernel avx2_attention();    // kVec
AttentionKernel amx_attention();     // kAmx

}  // namespace clover2::cpu
