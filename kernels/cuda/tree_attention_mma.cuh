// SPDX-License-Identifier: Apache-2.0
// Tree attention on tensor cores, for bfloat16 and float16.
//
// One block of 2, 4 or 8 warps takes one tile of 16 queries per warp (tree rows
// x heads that share a KV head) and walks over its split of the keys, 64 at a
// time (32 with 2 warps, so that more blocks fit beside each other, and for D =
// 256): the next tile of keys and values is copied to shared memory while the
// current one is multiplied. Warp w owns the tile's rows 16w .. 16w + 15 from
// scores to output, so softmax needs no exchange between warps; a warp without
// rows only helps copying. Products are summed in float32, probabilities are
// rounded to the cache's type before they multiply V, as in FlashAttention.
//
// Every key is read from device memory once per tile of queries. 128 queries
// are as many as pay: each 2-byte element then takes part in 128 multiply-adds,
// which is about where the matrix units, not memory, become the limit.
#pragma once

#include "tree_attention_block.cuh"

namespace clover2 {

constexpr int kMmaRows = 16;   // of one warp: the M of m16n8k16
constexpr int kMmaCols = 8;    // its N
constexpr int kMmaDepth = 16;  // its K
constexpr int kMaxMmaWarps = 8;
constexpr int kCopyElements = 8;  // 16 bytes
constexpr int kStages = 2;

constexpr int kFewKeys = 32;
constexpr int mma_tile_keys(int head_dim) {
  return head_dim > 128 ? kFewKeys : 64;
}

// Shared memory: stages of keys and values, the queries, the keys' offsets.
// Every row is padded by 16 bytes, which makes its length an odd number of
// 16-byte units: the 8 rows that a matrix load touches at a time then lie in 8
// different groups of banks.
template <int kDim, int kTileKeys>
struct MmaLayout {
  static constexpr int kHeadDim = kDim;
  static constexpr int kKeys = kTileKeys;
  static constexpr int kPitch = 2 * kHeadDim + kCopyElements;
  static constexpr int kQueryPitch = kHeadDim + kCopyElements;
  static constexpr int kStage = kKeys * kPitch;

  static constexpr int bytes(int warps) {
    return 2 * (kStages * kStage + warps * kMmaRows * kQueryPitch) +
           8 * kStages * kKeys;
  }
};

template <typename Layout>
__device__ __forceinline__ void copy_queries(const TreeAttentionParams& p,
                                             const BlockWork& work,
                                             uint16_t* queries) {
  constexpr int kCopies = Layout::kHeadDim / kCopyElements;
  const int threads = static_cast<int>(blockDim.x);
  const uint16_t* query = static_cast<const uint16_t*>(p.query);
  const int total = threads / kWarpSize * kMmaRows * kCopies;
  for (int i = static_cast<int>(threadIdx.x); i < total; i += threads) {
    const int m = i / kCopies;
    const int column = i % kCopies * kCopyElements;
    const bool valid = m < work.tile_rows;
    const int64_t from = valid ? find_query(p, work, m) + column : 0;
    copy_16_async(queries + m * Layout::kQueryPitch + column, query + from,
                  valid);
  }
}

// Copies K and V of the tile's first `num_keys` keys and zeros the others,
// since 0 times whatever lies there could be NaN. A thread keeps its columns
// over all keys, so that a copy costs little more than adding the key's offset.
template <typename Layout>
__device__ __forceinline__ void copy_tile(const uint16_t* cache,
                                          const int64_t* offsets, int num_keys,
                                          uint16_t* stage) {
  // K and V lie side by side.
  constexpr int kCopies = 2 * Layout::kHeadDim / kCopyElements;
  constexpr int kWarpKeys = kCopies <= kWarpSize / 2 ? 2 : 1;
  constexpr int kLanes = kWarpSize / kWarpKeys;
  const int thread = static_cast<int>(threadIdx.x);
  const int step = static_cast<int>(blockDim.x) / kLanes;
#pragma unroll
  for (int first = 0; first < kCopies; first += kLanes) {
    const int copy = first + thread % kLanes;
    if (copy >= kCopies) continue;
    const uint16_t* from = cache + copy * kCopyElements;
    uint16_t* to = stage + copy * kCopyElements;
#pragma unroll 4
    for (int key = thread / kLanes; key < Layout::kKeys; key += step) {
      copy_16_async(to + key * Layout::kPitch, from + offsets[key],
                    key < num_keys);
    }
  }
}

// One warp's 16 rows: sums of the output, and softmax state of the two rows
// that this lane shares with the 3 other lanes of its group (lane / 4, and 8
// more).
template <typename Element, typename Layout>
struct MmaRows {
  static constexpr int kHeadDim = Layout::kHeadDim;
  static constexpr int kScoreTiles = Layout::kKeys / kMmaCols;
  static constexpr int kOutTiles = kHeadDim / kMmaCols;

  float out[kOutTiles][4];
  float max[2];
  float sum[2];  // over this lane's columns
  RowView view[2];

  __device__ __forceinline__ void start(const TreeAttentionParams& p,
                                        const BlockWork& work, int first_row) {
    const int row = first_row + static_cast<int>(threadIdx.x) % kWarpSize / 4;
#pragma unroll
    for (int i = 0; i < kOutTiles; ++i) {
      out[i][0] = out[i][1] = out[i][2] = out[i][3] = 0.0f;
    }
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      max[half] = -INFINITY;
      sum[half] = 0.0f;
      view[half] = find_view(p, work, row + 8 * half);
    }
  }

  // scores = Q K^T
  __device__ __forceinline__ void multiply_keys(
      const uint16_t* queries, const uint16_t* keys,
      float (&scores)[kScoreTiles][4]) {
    const int lane = static_cast<int>(threadIdx.x) % kWarpSize;
    // Matrices of a query load: rows 0-7, rows 8-15, then both 8 columns on.
    const uint16_t* query =
        queries + lane % 16 * Layout::kQueryPitch + lane / 16 * 8;
    // Of a key load: keys 0-7, the same 8 columns on, then both for keys 8-15.
    const uint16_t* key =
        keys + (lane % 8 + lane / 16 * 8) * Layout::kPitch + lane / 8 % 2 * 8;
#pragma unroll
    for (int i = 0; i < kScoreTiles; ++i) {
      scores[i][0] = scores[i][1] = scores[i][2] = scores[i][3] = 0.0f;
    }
#pragma unroll
    for (int d = 0; d < kHeadDim; d += kMmaDepth) {
      uint32_t a[4];
      load_matrices(a, query + d);
#pragma unroll
      for (int tile = 0; tile < kScoreTiles; tile += 2) {
        uint32_t b[4];
        load_matrices(b, key + tile * kMmaCols * Layout::kPitch + d);
        Element::multiply_add(scores[tile], a, b[0], b[1]);
        Element::multiply_add(scores[tile + 1], a, b[2], b[3]);
      }
    }
  }

  // Caps the dot products of the tile that begins at key `first_key`, if there
  // is a cap, and makes those of keys that a row does not see -infinity.
  __device__ __forceinline__ void mask(const TreeAttentionParams& p,
                                       const BlockWork& work, int first_key,
                                       float (&scores)[kScoreTiles][4]) {
    if (p.softcap > 0.0f) {
#pragma unroll
      for (int i = 0; i < kScoreTiles * 4; ++i) {
        scores[i / 4][i % 4] = capped_dot(p, scores[i / 4][i % 4]);
      }
    }
    // Most tiles are prefix that every row sees.
    if (p.sliding_window < 0 && first_key + Layout::kKeys <= work.prefix)
      return;
    const int column = first_key + static_cast<int>(threadIdx.x) % 4 * 2;
#pragma unroll
    for (int i = 0; i < kScoreTiles * 4; ++i) {
      const int key = column + i / 4 * kMmaCols + i % 2;
      if (!sees(view[i % 4 / 2], key, work.prefix)) {
        scores[i / 4][i % 4] = -INFINITY;
      }
    }
  }

  // Dot products times `scale` become probabilities relative to the running
  // maximum.
  __device__ __forceinline__ void softmax(float scale,
                                          float (&scores)[kScoreTiles][4]) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float tile_max = -INFINITY;
#pragma unroll
      for (int i = 0; i < kScoreTiles * 2; ++i) {
        tile_max = fmaxf(tile_max, scores[i / 2][2 * half + i % 2]);
      }
      tile_max = fmaxf(tile_max, shuffle_xor(tile_max, 1));
      tile_max = fmaxf(tile_max, shuffle_xor(tile_max, 2));
      const SoftmaxStep step = softmax_step(max[half], tile_max * scale);
      max[half] = step.max;
      float tile_sum = 0.0f;
#pragma unroll
      for (int i = 0; i < kScoreTiles * 2; ++i) {
        float& score = scores[i / 2][2 * half + i % 2];
        score = exp2_fast(fmaf(score, scale, -step.base));
        tile_sum += score;
      }
      sum[half] = sum[half] * step.rescale + tile_sum;
#pragma unroll
      for (int i = 0; i < kOutTiles; ++i) {
        out[i][2 * half] *= step.rescale;
        out[i][2 * half + 1] *= step.rescale;
      }
    }
  }

  // out += P V
  __device__ __forceinline__ void multiply_values(
      const uint16_t* values, const float (&p)[kScoreTiles][4]) {
    const int lane = static_cast<int>(threadIdx.x) % kWarpSize;
    // Matrices of a value load: keys 0-7, keys 8-15, then both 8 columns on.
    const uint16_t* value = values + lane % 16 * Layout::kPitch + lane / 16 * 8;
#pragma unroll
    for (int tile = 0; tile < kScoreTiles; tile += 2) {
      // Where a lane holds the sums of Q K^T is where P V wants its left
      // factor.
      const uint32_t a[4] = {Element::pack(p[tile][0], p[tile][1]),
                             Element::pack(p[tile][2], p[tile][3]),
                             Element::pack(p[tile + 1][0], p[tile + 1][1]),
                             Element::pack(p[tile + 1][2], p[tile + 1][3])};
#pragma unroll
      for (int i = 0; i < kOutTiles; i += 2) {
        uint32_t b[4];
        load_matrices_transposed(
            b, value + tile * kMmaCols * Layout::kPitch + i * kMmaCols);
        Element::multiply_add(out[i], a, b[0], b[1]);
        Element::multiply_add(out[i + 1], a, b[2], b[3]);
      }
    }
  }

  // The final output if there is one split, else this split's part of it.
  __device__ __forceinline__ void store(const TreeAttentionParams& p,
                                        const BlockWork& work, int first_row) {
    const int lane = static_cast<int>(threadIdx.x) % kWarpSize;
    const int column = lane % 4 * 2;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      sum[half] += shuffle_xor(sum[half], 1);
      sum[half] += shuffle_xor(sum[half], 2);
      const int m = first_row + lane / 4 + 8 * half;
      if (m >= work.tile_rows) continue;
      if (work.splits == 1) {
        const float scale = sum[half] > 0.0f ? 1.0f / sum[half] : 0.0f;
        uint16_t* to =
            static_cast<uint16_t*>(p.out) + find_out(p, work, m) + column;
#pragma unroll
        for (int i = 0; i < kOutTiles; ++i) {
          *reinterpret_cast<uint32_t*>(to + i * kMmaCols) = Element::pack(
              out[i][2 * half] * scale, out[i][2 * half + 1] * scale);
        }
      } else {
        const int64_t part = find_partial(p, work, m);
        float* to = p.partial_out + part * kHeadDim + column;
#pragma unroll
        for (int i = 0; i < kOutTiles; ++i) {
          *reinterpret_cast<float2*>(to + i * kMmaCols) =
              float2{out[i][2 * half], out[i][2 * half + 1]};
        }
        if (lane % 4 == 0) {
          *reinterpret_cast<float2*>(p.partial_stats + part * 2) =
              float2{max[half], sum[half]};
        }
      }
    }
  }
};

// The sums of D = 256 need more registers than two blocks of 8 warps leave
// each.
constexpr int mma_min_blocks(int head_dim) { return head_dim > 128 ? 1 : 2; }

template <typename Element, int kHeadDim, int kTileKeys>
__global__ void __launch_bounds__(kMaxMmaWarps* kWarpSize,
                                  mma_min_blocks(kHeadDim))
    tree_attention_mma_kernel(const TreeAttentionParams p) {
  using Layout = MmaLayout<kHeadDim, kTileKeys>;
  const int warps = static_cast<int>(blockDim.x) / kWarpSize;
  const BlockWork work = find_work(p, warps * kMmaRows, Layout::kKeys);
  if (work.tile_rows == 0) return;

  uint16_t* stages = reinterpret_cast<uint16_t*>(dynamic_shared());
  uint16_t* queries = stages + kStages * Layout::kStage;
  int64_t* offsets = reinterpret_cast<int64_t*>(
      queries + warps * kMmaRows * Layout::kQueryPitch);
  const uint16_t* cache = static_cast<const uint16_t*>(p.cache) +
                          work.kv_head * p.cache_head_stride;
  const int thread = static_cast<int>(threadIdx.x);
  const int first_row = thread / kWarpSize * kMmaRows;
  const bool has_rows = first_row < work.tile_rows;
  const bool finds_keys = thread < Layout::kKeys;

  if (finds_keys) {
    for (int stage = 0; stage < kStages; ++stage) {
      offsets[stage * Layout::kKeys + thread] =
          find_key(p, work, (work.first_tile + stage) * Layout::kKeys + thread);
    }
  }
  MmaRows<Element, Layout> rows;
  rows.start(p, work, first_row);
  copy_queries<Layout>(p, work, queries);
  __syncthreads();  // the offsets are there
  copy_tile<Layout>(cache, offsets,
                    work.num_keys - work.first_tile * Layout::kKeys, stages);

  for (int tile = work.first_tile; tile < work.end_tile; ++tile) {
    const int stage = (tile - work.first_tile) % kStages;
    const int other = 1 - stage;
    wait_copies();
    // All copies of this tile are there, and nobody reads the other stage any
    // more.
    __syncthreads();
    if (tile + 1 < work.end_tile) {
      copy_tile<Layout>(cache, offsets + other * Layout::kKeys,
                        work.num_keys - (tile + 1) * Layout::kKeys,
                        stages + other * Layout::kStage);
    }
    // Looked up one tile ahead of the copy, and stored after the products, so
    // that nobody waits for the block table.
    int64_t offset = 0;
    if (finds_keys) {
      offset = find_key(p, work, (tile + kStages) * Layout::kKeys + thread);
    }
    if (has_rows) {
      const uint16_t* keys = stages + stage * Layout::kStage;
      float scores[Layout::kKeys / kMmaCols][4];
      rows.multiply_keys(queries + first_row * Layout::kQueryPitch, keys,
                         scores);
      rows.mask(p, work, tile * Layout::kKeys, scores);
      rows.softmax(p.scale * kLog2E, scores);
      rows.multiply_values(keys + kHeadDim, scores);
    }
    // This stage's offsets were last read before this tile's barrier.
    if (finds_keys) offsets[stage * Layout::kKeys + thread] = offset;
  }
  if (has_rows) rows.store(p, work, first_row);
}

}  // namespace clover2
