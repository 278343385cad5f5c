// SPDX-License-Identifier: Apache-2.0
// Tree attention over a paged KV cache: out = softmax(q K^T) V, where a tree row sees its
// request's committed prefix and its own ancestors.
//
// Fused: paging, the ancestor mask, grouped heads, soft-cap, sliding window; every
// request has its own tree and length. FlashDecoding style: the keys of a request (prefix,
// then tree rows, whose mask falls to the last splits) are split between blocks of
// threads, so that one long request fills the chip; a second kernel merges the splits.
//
// Memory traffic: K and V of every visible key once per KV head and tile of queries,
// queries and output once, and per split one float32 partial output written and read.
// Requests whose keys fit into one split write their output directly.
//
// Limits: head sizes 64, 80, 96, 128 and 256, trees of at most 64 rows, 16-byte aligned
// rows. Devices of compute capability 8.0 and up (mma.sync, cp.async).
#include "tree_attention_block.cuh"
#include "tree_attention_fma.cuh"
#include "tree_attention_mma.cuh"

namespace clover2 {
namespace {

// Blocks that a multiprocessor is expected to run at a time; shared memory allows two of
// the tensor-core kernel at D = 128 and 8 warps on Hopper, one on Ampere.
constexpr int kBlocksPerMultiprocessor = 2;
constexpr int kFewWarps = 4;

constexpr int kInvalidValue = 1;  // cudaErrorInvalidValue

int mma_warps(const TreeAttentionParams& p) {
  const int largest = min_int(static_cast<int>(kMaxTreeRows), p.total_rows);
  const int group = p.heads / p.kv_heads;
  return largest * group <= kFewWarps * kMmaRows ? kFewWarps : kMaxMmaWarps;
}

int tile_keys(const TreeAttentionParams& p, AttentionType type) {
  return type == AttentionType::kFloat32 ? fma_tile_keys(p.head_dim)
                                         : mma_tile_keys(p.head_dim);
}

Grid attention_grid(const TreeAttentionParams& p) {
  return Grid{static_cast<unsigned>(p.row_tiles * p.max_splits),
              static_cast<unsigned>(p.kv_heads),
              static_cast<unsigned>(p.requests)};
}

template <int kHeadDim>
int launch_attention(const TreeAttentionParams& p, AttentionType type,
                     Stream stream) {
  const Grid grid = attention_grid(p);
  if (type == AttentionType::kFloat32) {
    return launch_kernel(tree_attention_fma_kernel<kHeadDim>, grid, kFmaThreads,
                         FmaLayout<kHeadDim>::kBytes, stream, p);
  }
  const int warps = mma_warps(p);
  const auto kernel = type == AttentionType::kFloat16
                          ? tree_attention_mma_kernel<Float16, kHeadDim>
                          : tree_attention_mma_kernel<BFloat16, kHeadDim>;
  return launch_kernel(kernel, grid, static_cast<unsigned>(warps * kWarpSize),
                       MmaLayout<kHeadDim>::bytes(warps), stream, p);
}

int launch_merge(const TreeAttentionParams& p, AttentionType type,
                 Stream stream) {
  const int warps = kMergeThreads / kWarpSize;
  const int64_t pairs = static_cast<int64_t>(p.total_rows) * p.heads;
  const Grid grid{static_cast<unsigned>((pairs + warps - 1) / warps), 1, 1};
  const auto kernel = type == AttentionType::kFloat32   ? merge_splits_kernel<float>
                      : type == AttentionType::kFloat16 ? merge_splits_kernel<Float16>
                                                        : merge_splits_kernel<BFloat16>;
  return launch_kernel(kernel, grid, kMergeThreads, 0, stream, p);
}

}  // namespace

void plan_tree_attention(TreeAttentionParams& params, AttentionType type,
                         int multiprocessors) {
  AttentionSizes sizes{};
  sizes.requests = params.requests;
  sizes.total_rows = params.total_rows;
  sizes.kv_heads = params.kv_heads;
  sizes.group = params.heads / params.kv_heads;
  sizes.max_keys = params.max_blocks * params.block_size;
  sizes.tile_rows = type == AttentionType::kFloat32
                        ? fma_tile_rows(params.head_dim)
                        : mma_warps(params) * kMmaRows;
  sizes.tile_keys = tile_keys(params, type);
  sizes.resident_blocks = multiprocessors * kBlocksPerMultiprocessor;
  const AttentionPlan plan = plan_attention(sizes);
  params.row_tiles = plan.row_tiles;
  params.max_splits = plan.max_splits;
  params.min_tiles_per_split = plan.min_tiles_per_split;
  params.tile_keys = sizes.tile_keys;
}

int launch_tree_attention(const TreeAttentionParams& params, AttentionType type,
                          void* stream) {
  if (params.total_rows == 0 || params.requests == 0) return 0;
  const Stream on = static_cast<Stream>(stream);
  int error = kInvalidValue;
  switch (params.head_dim) {
    case 64:
      error = launch_attention<64>(params, type, on);
      break;
    case 80:
      error = launch_attention<80>(params, type, on);
      break;
    case 96:
      error = launch_attention<96>(params, type, on);
      break;
    case 128:
      error = launch_attention<128>(params, type, on);
      break;
    case 256:
      error = launch_attention<256>(params, type, on);
      break;
    default:
      break;
  }
  if (error != 0 || params.max_splits == 1) return error;
  return launch_merge(params, type, on);
}

}  // namespace clover2
