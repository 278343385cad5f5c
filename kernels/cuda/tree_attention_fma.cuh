// SPDX-License-Identifier: Apache-2.0
// Tree attention with plain float32 multiply-adds, for float32 caches: the
// tensor cores would round to tf32 (10 bits), and float32 is asked for where
// outputs must match.
//
// As the tensor-core kernel, with 128 threads per tile of 64 queries (32 for D
// = 256) and 32 keys (16): 16 groups of 8 threads own 4 (2) queries each; for
// scores the 8 threads share out the keys, for the output the columns. A tile
// of more queries reads the keys again, mostly from the L2 cache.
#pragma once

#include "tree_attention_block.cuh"

namespace clover2 {

constexpr int kFmaThreads = 128;
constexpr int kFmaLanes = 8;  // threads that share a query
constexpr int kFmaGroups = kFmaThreads / kFmaLanes;

constexpr int fma_tile_rows(int head_dim) { return head_dim > 128 ? 32 : 64; }
// As many as fit into the 99 KiB of shared memory that every GPU has.
constexpr int fma_tile_keys(int head_dim) {
  return head_dim > 128 ? 8 : head_dim > 96 ? 24 : 32;
}

// Shared memory, in floats; rows padded by 16 bytes against bank conflicts.
template <int kHeadDim>
struct FmaLayout {
  static constexpr int kRows = fma_tile_rows(kHeadDim);
  static constexpr int kKeys = fma_tile_keys(kHeadDim);
  static constexpr int kPitch = 2 * kHeadDim + 4;
  static constexpr int kQueryPitch = kHeadDim + 4;
  static constexpr int kScorePitch = kKeys + 4;
  static constexpr int kStage = kKeys * kPitch;
  static constexpr int kStageCount = 2;
  static constexpr int kBytes =
      4 * (kStageCount * kStage + kRows * kQueryPitch + kRows * kScorePitch) +
      8 * kStageCount * kKeys;
};

// Copies `rows` rows of kColumns floats from offset(row); rows from `valid` on
// are zeros.
template <int kColumns, typename Offset>
__device__ __forceinline__ void copy_rows(const float* from, Offset offset,
                                          int rows, int valid, int pitch,
                                          float* to) {
  constexpr int kCopies = kColumns / 4;
  for (int i = static_cast<int>(threadIdx.x); i < rows * kCopies;
       i += kFmaThreads) {
    const int row = i / kCopies;
    const int column = i % kCopies * 4;
    const int64_t start = row < valid ? offset(row) : 0;
    copy_16_async(to + row * pitch + column, from + start + column,
                  row < valid);
  }
}

// The queries of one group of 8 threads; this thread has keys lane, lane + 8,
// .. of a tile and the columns 2 * lane and the next, 16 more, ..
template <int kHeadDim>
struct FmaRows {
  using Layout = FmaLayout<kHeadDim>;
  static constexpr int kRows = Layout::kRows / kFmaGroups;
  static constexpr int kKeys = Layout::kKeys / kFmaLanes;
  static constexpr int kPairs = kHeadDim / (2 * kFmaLanes);

  float out[kRows][kPairs][2];
  float max[kRows];
  float sum[kRows];  // over this thread's keys
  RowView view[kRows];

  // Row i of this thread, in the block's tile.
  static __device__ __forceinline__ int tile_row(int i) {
    return static_cast<int>(threadIdx.x) / kFmaLanes + i * kFmaGroups;
  }
  static __device__ __forceinline__ int lane() {
    return static_cast<int>(threadIdx.x) % kFmaLanes;
  }

  __device__ __forceinline__ void start(const TreeAttentionParams& p,
                                        const BlockWork& work) {
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
      max[i] = -INFINITY;
      sum[i] = 0.0f;
      view[i] = find_view(p, work, tile_row(i));
#pragma unroll
      for (int j = 0; j < kPairs; ++j) out[i][j][0] = out[i][j][1] = 0.0f;
    }
  }

  __device__ __forceinline__ void multiply_keys(const float* queries,
                                                const float* keys,
                                                float (&scores)[kRows][kKeys]) {
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
#pragma unroll
      for (int j = 0; j < kKeys; ++j) scores[i][j] = 0.0f;
    }
#pragma unroll 4
    for (int d = 0; d < kHeadDim; d += 4) {
      float4 key[kKeys];
#pragma unroll
      for (int j = 0; j < kKeys; ++j) {
        key[j] = *reinterpret_cast<const float4*>(
            keys + (lane() + j * kFmaLanes) * Layout::kPitch + d);
      }
#pragma unroll
      for (int i = 0; i < kRows; ++i) {
        const float4 query = *reinterpret_cast<const float4*>(
            queries + tile_row(i) * Layout::kQueryPitch + d);
#pragma unroll
        for (int j = 0; j < kKeys; ++j) {
          float& score = scores[i][j];
          score = fmaf(query.x, key[j].x, score);
          score = fmaf(query.y, key[j].y, score);
          score = fmaf(query.z, key[j].z, score);
          score = fmaf(query.w, key[j].w, score);
        }
      }
    }
  }

  // Leaves the probabilities in shared memory, for the group's 8 threads.
  __device__ __forceinline__ void softmax(const TreeAttentionParams& p,
                                          const BlockWork& work, int first_key,
                                          float (&scores)[kRows][kKeys],
                                          float* shared) {
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
      float tile_max = -INFINITY;
#pragma unroll
      for (int j = 0; j < kKeys; ++j) {
        const int key = first_key + lane() + j * kFmaLanes;
        if (p.softcap > 0.0f) scores[i][j] = capped_dot(p, scores[i][j]);
        if (!sees(view[i], key, work.prefix)) scores[i][j] = -INFINITY;
        tile_max = fmaxf(tile_max, scores[i][j]);
      }
      for (int mask = 1; mask < kFmaLanes; mask *= 2) {
        tile_max = fmaxf(tile_max, shuffle_xor(tile_max, mask));
      }
      const float scale = p.scale * kLog2E;
      const SoftmaxStep step = softmax_step(max[i], tile_max * scale);
      max[i] = step.max;
      sum[i] *= step.rescale;
#pragma unroll
      for (int j = 0; j < kKeys; ++j) {
        const float probability =
            exp2_fast(fmaf(scores[i][j], scale, -step.base));
        sum[i] += probability;
        shared[tile_row(i) * Layout::kScorePitch + lane() + j * kFmaLanes] =
            probability;
      }
#pragma unroll
      for (int j = 0; j < kPairs; ++j) {
        out[i][j][0] *= step.rescale;
        out[i][j][1] *= step.rescale;
      }
    }
    sync_warp();
  }

  __device__ __forceinline__ void multiply_values(const float* values,
                                                  const float* probabilities) {
#pragma unroll 2
    for (int key = 0; key < Layout::kKeys; ++key) {
      float probability[kRows];
#pragma unroll
      for (int i = 0; i < kRows; ++i) {
        probability[i] = probabilities[tile_row(i) * Layout::kScorePitch + key];
      }
#pragma unroll
      for (int j = 0; j < kPairs; ++j) {
        const float2 value = *reinterpret_cast<const float2*>(
            values + key * Layout::kPitch + 2 * (lane() + j * kFmaLanes));
#pragma unroll
        for (int i = 0; i < kRows; ++i) {
          out[i][j][0] = fmaf(probability[i], value.x, out[i][j][0]);
          out[i][j][1] = fmaf(probability[i], value.y, out[i][j][1]);
        }
      }
    }
  }

  __device__ __forceinline__ void store(const TreeAttentionParams& p,
                                        const BlockWork& work) {
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
      for (int mask = 1; mask < kFmaLanes; mask *= 2) {
        sum[i] += shuffle_xor(sum[i], mask);
      }
      const int m = tile_row(i);
      if (m >= work.tile_rows) continue;
      const bool final = work.splits == 1;
      const int64_t part = final ? 0 : find_partial(p, work, m);
      float* to = final ? static_cast<float*>(p.out) + find_out(p, work, m)
                        : p.partial_out + part * kHeadDim;
      const float scale =
          !final ? 1.0f : (sum[i] > 0.0f ? 1.0f / sum[i] : 0.0f);
#pragma unroll
      for (int j = 0; j < kPairs; ++j) {
        *reinterpret_cast<float2*>(to + 2 * (lane() + j * kFmaLanes)) =
            float2{out[i][j][0] * scale, out[i][j][1] * scale};
      }
      if (!final && lane() == 0) {
        *reinterpret_cast<float2*>(p.partial_stats + part * 2) =
            float2{max[i], sum[i]};
      }
    }
  }
};

template <int kHeadDim>
__global__ void __launch_bounds__(kFmaThreads)
    tree_attention_fma_kernel(const TreeAttentionParams p) {
  using Layout = FmaLayout<kHeadDim>;
  const BlockWork work = find_work(p, Layout::kRows, Layout::kKeys);
  if (work.tile_rows == 0) return;

  float* stages = reinterpret_cast<float*>(dynamic_shared());
  float* queries = stages + Layout::kStageCount * Layout::kStage;
  float* probabilities = queries + Layout::kRows * Layout::kQueryPitch;
  int64_t* offsets = reinterpret_cast<int64_t*>(
      probabilities + Layout::kRows * Layout::kScorePitch);
  const float* cache =
      static_cast<const float*>(p.cache) + work.kv_head * p.cache_head_stride;
  const int thread = static_cast<int>(threadIdx.x);
  const bool finds_keys = thread < Layout::kKeys;

  if (finds_keys) {
    for (int stage = 0; stage < Layout::kStageCount; ++stage) {
      offsets[stage * Layout::kKeys + thread] =
          find_key(p, work, (work.first_tile + stage) * Layout::kKeys + thread);
    }
  }
  FmaRows<kHeadDim> rows;
  rows.start(p, work);
  copy_rows<kHeadDim>(
      static_cast<const float*>(p.query),
      [&](int m) { return find_query(p, work, m); }, Layout::kRows,
      work.tile_rows, Layout::kQueryPitch, queries);
  const auto copy_tile = [&](int tile, int stage) {
    copy_rows<2 * kHeadDim>(
        cache, [&](int key) { return offsets[stage * Layout::kKeys + key]; },
        Layout::kKeys, work.num_keys - tile * Layout::kKeys, Layout::kPitch,
        stages + stage * Layout::kStage);
  };
  __syncthreads();  // the offsets are there
  copy_tile(work.first_tile, 0);

  // Stages and offsets change hands as in the tensor-core kernel.
  for (int tile = work.first_tile; tile < work.end_tile; ++tile) {
    const int stage = (tile - work.first_tile) % Layout::kStageCount;
    wait_copies();
    __syncthreads();
    if (tile + 1 < work.end_tile) copy_tile(tile + 1, 1 - stage);
    int64_t offset = 0;
    if (finds_keys) {
      offset = find_key(p, work,
                        (tile + Layout::kStageCount) * Layout::kKeys + thread);
    }
    const float* keys = stages + stage * Layout::kStage;
    float scores[FmaRows<kHeadDim>::kRows][FmaRows<kHeadDim>::kKeys];
    rows.multiply_keys(queries, keys, scores);
    rows.softmax(p, work, tile * Layout::kKeys, scores, probabilities);
    rows.multiply_values(keys + kHeadDim, probabilities);
    if (finds_keys) offsets[stage * Layout::kKeys + thread] = offset;
  }
  rows.store(p, work);
}

}  // namespace clover2
