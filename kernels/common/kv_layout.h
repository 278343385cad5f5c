// SPDX-License-Identifier: Apache-2.0
// Where one element of a key or value lies in a layer's paged KV cache.
//
// The same formulas, in torch, are in vllm_clover2/ops/layout.py. Usable from
// C++ and from CUDA device code.
#pragma once

#include <cstdint>

#if defined(__CUDACC__)
  #define CLOVER2_HOST_DEVICE __host__ __device__ __forceinline__
#else
  #define CLOVER2_HOST_DEVICE inline __attribute__((always_inline))
#endif

namespace clover2 {

// Values are part of the op schemas (argument `layout`).
enum class KVLayout : int64_t {
  kStrided = 0,  // logical [blocks, kv_heads, block_size, 2 * D], any strides
  kVec = 1,      // vLLM CPU: K [D, block_size], then V [block_size, D]
  kAmx = 2,      // vLLM CPU: K and V as tiles of 16 rows of 16 pairs
};

// A tree has at most 64 rows (root included): ancestors-or-self fit in one
// word.
constexpr int64_t kMaxTreeRows = 64;

// AMX tile geometry for 16-bit elements.
constexpr int64_t kTileRows = 16;
constexpr int64_t kPair = 2;

// Offset of element d of the key at `offset` in a (block, head) of kVec.
CLOVER2_HOST_DEVICE int64_t vec_key(int64_t offset, int64_t d,
                                    int64_t block_size) {
  return d * block_size + offset;
}

// Offset of element d of the value at `offset` in a (block, head) of kVec.
CLOVER2_HOST_DEVICE int64_t vec_value(int64_t offset, int64_t d,
                                      int64_t block_size, int64_t dim) {
  return block_size * dim + offset * dim + d;
}

CLOVER2_HOST_DEVICE int64_t amx_key(int64_t offset, int64_t d, int64_t dim) {
  return offset / kTileRows * kTileRows * dim +
         d / kPair * (kTileRows * kPair) + offset % kTileRows * kPair +
         d % kPair;
}

CLOVER2_HOST_DEVICE int64_t amx_value(int64_t offset, int64_t d,
                                      int64_t block_size, int64_t dim) {
  return block_size * dim + d / kTileRows * kTileRows * block_size +
         offset / kPair * (kTileRows * kPair) + d % kTileRows * kPair +
         offset % kPair;
}

}  // namespace clover2
