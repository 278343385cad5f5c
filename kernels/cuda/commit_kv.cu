// SPDX-License-Identifier: Apache-2.0
// Moves the KV of accepted tree rows to the positions right after the root: key
// prefix + path[i - 1] to key prefix + i, in all layers and for all requests in
// one launch.
//
// Memory traffic: what moves, read once and written once; rows that are in
// place already (every path that starts 1, 2, .. does so) are not touched.
//
// Sources and destinations overlap. A thread moves the same 16 bytes of every
// row of the path and reads up to kBatch of them before it writes any; no other
// thread touches these bytes. Over batches this is right because the rows of a
// path increase: path[i - 1] >= i, so what a batch overwrites, prefix + i, can
// only be the source of its own rows or of earlier ones.
//
// Limits: layers of one shape and one set of strides per launch, at most
// kMaxCommitLayers.
#include "common/tree_math.h"
#include "device.cuh"
#include "launch.h"

namespace clover2 {
namespace {

constexpr int kCommitThreads = 128;
constexpr int kBatch = 8;  // deeper paths than this are rarely accepted

struct alignas(16) Bytes16 {
  uint32_t words[4];
};

template <typename Unit>
__device__ __forceinline__ Unit* find_unit(const CommitKvParams& p, int request,
                                           int key, int64_t unit_offset) {
  const int32_t* blocks = p.block_table + request * p.block_table_stride;
  const int64_t offset =
      key_offset(blocks, key, p.block_size, p.block_stride, p.slot_stride);
  unsigned char* layer = static_cast<unsigned char*>(p.layers[blockIdx.y]);
  return reinterpret_cast<Unit*>(layer + offset + unit_offset);
}

// A thread per unit of bytes of a token's K and V over all heads; blockIdx:
// units, layer, request.
template <typename Unit>
__global__ void __launch_bounds__(kCommitThreads)
    commit_kv_kernel(const CommitKvParams p) {
  const int request = static_cast<int>(blockIdx.z);
  const int length = p.lengths[request];
  const int unit = static_cast<int>(blockIdx.x) * kCommitThreads +
                   static_cast<int>(threadIdx.x);
  const int units_per_head =
      static_cast<int>(p.row_bytes / static_cast<int64_t>(sizeof(Unit)));
  if (unit >= units_per_head * p.kv_heads) return;
  const int64_t unit_offset =
      unit / units_per_head * p.head_stride +
      unit % units_per_head * static_cast<int64_t>(sizeof(Unit));
  const int prefix = p.prefix_lens[request];
  const int32_t* path = p.paths + static_cast<int64_t>(request) * p.max_depth;

  for (int first = 0; first < length; first += kBatch) {
    Unit moved[kBatch];
#pragma unroll
    for (int i = 0; i < kBatch; ++i) {
      const int step = first + i;
      if (step < length && path[step] != step + 1) {
        moved[i] =
            *find_unit<Unit>(p, request, prefix + path[step], unit_offset);
      }
    }
#pragma unroll
    for (int i = 0; i < kBatch; ++i) {
      const int step = first + i;
      if (step < length && path[step] != step + 1) {
        *find_unit<Unit>(p, request, prefix + step + 1, unit_offset) = moved[i];
      }
    }
  }
}

bool all_aligned(const CommitKvParams& p, int64_t bytes) {
  bool aligned = p.block_stride % bytes == 0 && p.head_stride % bytes == 0 &&
                 p.slot_stride % bytes == 0 && p.row_bytes % bytes == 0;
  for (int layer = 0; layer < p.num_layers; ++layer) {
    aligned = aligned && reinterpret_cast<uintptr_t>(p.layers[layer]) %
                                 static_cast<uintptr_t>(bytes) ==
                             0;
  }
  return aligned;
}

template <typename Unit>
int launch(const CommitKvParams& p, Stream stream) {
  const int64_t units =
      p.kv_heads * (p.row_bytes / static_cast<int64_t>(sizeof(Unit)));
  const Grid grid{
      static_cast<unsigned>((units + kCommitThreads - 1) / kCommitThreads),
      static_cast<unsigned>(p.num_layers), static_cast<unsigned>(p.requests)};
  return launch_kernel(commit_kv_kernel<Unit>, grid, kCommitThreads, 0, stream,
                       p);
}

}  // namespace

int launch_commit_kv(const CommitKvParams& params, void* stream) {
  if (params.requests == 0 || params.num_layers == 0 || params.max_depth == 0) {
    return 0;
  }
  const Stream on = static_cast<Stream>(stream);
  // One-byte units serve caches whose rows are not 16-byte aligned: slow, but
  // right.
  return all_aligned(params, sizeof(Bytes16))
             ? launch<Bytes16>(params, on)
             : launch<unsigned char>(params, on);
}

}  // namespace clover2
