// SPDX-License-Identifier: Apache-2.0
// The int8 product with Intel's matrix unit. Tiles: 0 to 3 sums of 16 rows by
// 64 outputs; 4 inputs; 5 and 6 weights.

#include "draft.h"
#include "tree_attention.h"

#if defined(__x86_64__) && defined(__linux__) && defined(__GNUC__) && \
    !defined(__clang__)
  #include <immintrin.h>

  #include <algorithm>

  #pragma GCC push_options
  #pragma GCC target("avx512f,amx-tile,amx-int8")

namespace clover2::cpu {
namespace {

constexpr int64_t kTileBytes = 64;  // of a row
constexpr int64_t kAhead = 4096;  // bytes that weights are fetched ahead

struct alignas(64) TileConfig {
  uint8_t palette = 1;
  uint8_t start_row = 0;
  uint8_t reserved[14] = {};
  uint16_t row_bytes[16] = {};
  uint8_t rows[16] = {};
};

void configure(int64_t rows) {
  TileConfig config;
  for (int tile = 0; tile < 7; ++tile) {
    config.row_bytes[tile] = kTileBytes;
    config.rows[tile] = static_cast<uint8_t>(tile < 5 ? rows : kTileRows);
  }
  _tile_loadconfig(&config);
}

// kFetch: the weights come from far away, not from the rows before.
template <bool kFetch>
void multiply_tile(const int8_t* inputs, int64_t depth, const uint8_t* weights,
                   int32_t* sums) {
  // The unit's tiles are invisible to the compiler: a barrier keeps memory
  // accesses on their side of them.
  __asm__ volatile("" ::: "memory");
  constexpr int64_t kStride = kGroupOutputs * kBytesPerWord;
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
  for (int64_t i = 0; i < depth; i += kTileBytes) {
    _tile_loadd(4, inputs + i, depth);
    if (kFetch) {
      for (int64_t line = 0; line < kTileRows * kStride; line += kTileBytes) {
        __builtin_prefetch(weights + kAhead + line);
      }
    }
    _tile_loadd(5, weights, kStride);
    _tile_loadd(6, weights + 64, kStride);
    _tile_dpbsud(0, 4, 5);
    _tile_loadd(5, weights + 128, kStride);
    _tile_dpbsud(1, 4, 6);
    _tile_loadd(6, weights + 192, kStride);
    _tile_dpbsud(2, 4, 5);
    _tile_dpbsud(3, 4, 6);
    weights += kTileRows * kStride;
  }
  constexpr int64_t kOutBytes = kGroupOutputs * sizeof(int32_t);
  _tile_stored(0, sums, kOutBytes);
  _tile_stored(1, sums + 16, kOutBytes);
  _tile_stored(2, sums + 32, kOutBytes);
  _tile_stored(3, sums + 48, kOutBytes);
  __asm__ volatile("" ::: "memory");
}

// What was chosen without the unit; it is quicker where a tile would be mostly
// empty (0.17 against 0.20 ms for one row by 8,192 x 576 weights).
constexpr int64_t kFewRows = 4;
decltype(DraftKernels::multiply) multiply_few = nullptr;

void multiply(const int8_t* inputs, int64_t rows, int64_t depth,
              const uint8_t* weights, int32_t* sums) {
  if (rows <= kFewRows) return multiply_few(inputs, rows, depth, weights, sums);
  int64_t configured = 0;
  for (int64_t row = 0; row < rows; row += kTileRows) {
    const int64_t count = std::min(kTileRows, rows - row);
    if (count != configured) configure(configured = count);
    const auto tile = row == 0 ? multiply_tile<true> : multiply_tile<false>;
    tile(inputs + row * depth, depth, weights, sums + row * kGroupOutputs);
  }
  _tile_release();
}

}  // namespace
}  // namespace clover2::cpu

  #pragma GCC pop_options

namespace clover2::cpu {

bool amx_draft_kernels(DraftKernels& kernels) {
  // The attention kernel has asked for the unit.
  if (amx_attention() == nullptr || !__builtin_cpu_supports("amx-int8")) {
    return false;
  }
  multiply_few = kernels.multiply;
  kernels.multiply = multiply;
  return true;
}

}  // namespace clover2::cpu

#else

namespace clover2::cpu {
bool amx_draft_kernels(DraftKernels&) { return false; }
}  // namespace clover2::cpu

#endif
