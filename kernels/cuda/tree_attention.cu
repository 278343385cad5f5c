// SPDX-License-Identifier: Apache-2.0
// Tree attention over a paged KV cache: out = softmax(q K^T) V, where a tree
// row sees its request's committed prefix and its own ancestors.
//
// Fused: paging, the ancestor mask, grouped heads, soft-cap, sliding window;
// every request has its own tree and length. FlashDecoding style: the keys of a
// request (prefix, then tree rows, whose mask falls to the last splits) are
// split between blocks of threads, so that one long request fills the chip; a
// second kernel merges the splits.
//
// Memory traffic: K and V of every visible key once per KV head and tile of
// queries, queries and output once, and per split one float32 partial output
// written and read. Requests whose keys fit into one split write their output
// directly.
//
// Limits: head sizes 64, 80, 96, 128 and 256, trees of at most 64 rows, 16-byte
// aligned rows. Devices of compute capability 8.0 and up (mma.sync, cp.async).
#include <algorithm>

#include "tree_attention_block.cuh"
#include "tree_attention_fma.cuh"
#include "tree_attention_mma.cuh"

namespace clover2 {
namespace {

constexpr int kReservedSharedBytes = 1024;  // of every block, by the system
// What a block may have on every GPU since Ampere: consumer GPUs have no more.
constexpr int kLeastSharedBytes = 99 * 1024;
constexpr int kInvalidValue = 1;            // cudaErrorInvalidValue

// How the blocks of a launch look.
struct BlockShape {
  int threads;
  int tile_rows;
  int tile_keys;
  int shared_bytes;
  int max_resident;  // per multiprocessor, as registers allow
};

template <int kHeadDim, int kTileKeys>
BlockShape mma_shape(int warps) {
  return {warps * kWarpSize, warps * kMmaRows, kTileKeys,
          MmaLayout<kHeadDim, kTileKeys>::bytes(warps),
          mma_min_blocks(kHeadDim) * kMaxMmaWarps / warps};
}

// Sizes of single trees are on the device. Two warps serve where they suffice
// for the average tree; larger trees are then cut into more tiles and read
// their keys again. Of the larger shapes the one is taken that serves every
// tree, if shared memory allows: warps without rows are nearly free.
template <int kHeadDim>
BlockShape block_shape(const TreeAttentionParams& p, AttentionType type) {
  if (type == AttentionType::kFloat32) {
    using Layout = FmaLayout<kHeadDim>;
    static_assert(Layout::kBytes <= kLeastSharedBytes);
    return {kFmaThreads, Layout::kRows, Layout::kKeys, Layout::kBytes, 2};
  }
  const int group = p.heads / p.kv_heads;
  const int average = ceil_div(p.total_rows, p.requests) * group;
  if (average <= 2 * kMmaRows) return mma_shape<kHeadDim, kFewKeys>(2);
  const int largest =
      min_int(static_cast<int>(kMaxTreeRows), p.total_rows) * group;
  constexpr int kTileKeys = mma_tile_keys(kHeadDim);
  using Layout = MmaLayout<kHeadDim, kTileKeys>;
  static_assert(Layout::bytes(4) <= kLeastSharedBytes);
  const bool large = largest > 4 * kMmaRows &&
                     Layout::bytes(kMaxMmaWarps) <= p.block_shared_bytes;
  return mma_shape<kHeadDim, kTileKeys>(large ? kMaxMmaWarps : 4);
}

// Calls function.operator()<D>() for the head size D that is asked for.
template <typename Function>
bool with_head_dim(int head_dim, Function function) {
  switch (head_dim) {
    case 64:
      function.template operator()<64>();
      return true;
    case 80:
      function.template operator()<80>();
      return true;
    case 96:
      function.template operator()<96>();
      return true;
    case 128:
      function.template operator()<128>();
      return true;
    case 256:
      function.template operator()<256>();
      return true;
    default:
      return false;
  }
}

Grid attention_grid(const TreeAttentionParams& p) {
  return Grid{static_cast<unsigned>(p.row_tiles * p.max_splits),
              static_cast<unsigned>(p.kv_heads),
              static_cast<unsigned>(p.requests)};
}

template <typename Element, int kHeadDim>
auto mma_kernel(int tile_keys) {
  return tile_keys == kFewKeys
             ? tree_attention_mma_kernel<Element, kHeadDim, kFewKeys>
             : tree_attention_mma_kernel<Element, kHeadDim,
                                         mma_tile_keys(kHeadDim)>;
}

template <int kHeadDim>
int launch_attention(const TreeAttentionParams& p, AttentionType type,
                     Stream stream) {
  const BlockShape shape = block_shape<kHeadDim>(p, type);
  const auto kernel = type == AttentionType::kFloat32
                          ? tree_attention_fma_kernel<kHeadDim>
                      : type == AttentionType::kFloat16
                          ? mma_kernel<Float16, kHeadDim>(shape.tile_keys)
                          : mma_kernel<BFloat16, kHeadDim>(shape.tile_keys);
  return launch_kernel(kernel, attention_grid(p),
                       static_cast<unsigned>(shape.threads), shape.shared_bytes,
                       stream, p);
}

int launch_merge(const TreeAttentionParams& p, AttentionType type,
                 Stream stream) {
  const int warps = kMergeThreads / kWarpSize;
  const int64_t pairs = static_cast<int64_t>(p.total_rows) * p.heads;
  const Grid grid{static_cast<unsigned>((pairs + warps - 1) / warps), 1, 1};
  const auto kernel =
      type == AttentionType::kFloat32   ? merge_splits_kernel<float>
      : type == AttentionType::kFloat16 ? merge_splits_kernel<Float16>
                                        : merge_splits_kernel<BFloat16>;
  return launch_kernel(kernel, grid, kMergeThreads, 0, stream, p);
}

}  // namespace

void plan_tree_attention(TreeAttentionParams& params, AttentionType type,
                         const DeviceLimits& device) {
  params.block_shared_bytes = device.shared_bytes - kReservedSharedBytes;
  BlockShape shape{};
  const bool known = with_head_dim(params.head_dim, [&]<int kHeadDim>() {
    shape = block_shape<kHeadDim>(params, type);
  });
  if (!known) return;  // refused at launch
  AttentionSizes sizes{};
  sizes.requests = params.requests;
  sizes.total_rows = params.total_rows;
  sizes.kv_heads = params.kv_heads;
  sizes.group = params.heads / params.kv_heads;
  sizes.max_keys = static_cast<int>(std::min<int64_t>(
      static_cast<int64_t>(params.max_blocks) * params.block_size, 1 << 30));
  sizes.tile_rows = shape.tile_rows;
  sizes.tile_keys = shape.tile_keys;
  sizes.resident_blocks =
      device.multiprocessors *
      max_int(1, min_int(shape.max_resident,
                         device.shared_bytes /
                             (shape.shared_bytes + kReservedSharedBytes)));
  const AttentionPlan plan = plan_attention(sizes);
  params.row_tiles = plan.row_tiles;
  params.max_splits = plan.max_splits;
  params.min_tiles_per_split = plan.min_tiles_per_split;
  params.tile_keys = shape.tile_keys;
}

int launch_tree_attention(const TreeAttentionParams& params, AttentionType type,
                          void* stream) {
  if (params.total_rows == 0 || params.requests == 0) return 0;
  const Stream on = static_cast<Stream>(stream);
  int error = kInvalidValue;
  with_head_dim(params.head_dim, [&]<int kHeadDim>() {
    error = launch_attention<kHeadDim>(params, type, on);
  });
  if (error != 0 || params.max_splits == 1) return error;
  return launch_merge(params, type, on);
}

}  // namespace clover2
