// SPDX-License-Identifier: Apache-2.0
// The attention kernel for layout kAmx with Intel's matrix unit (bf16 tiles,
// float32 sums).
//
// Tiles: 0, 1 query vectors 0-15 and 16-31 (or their probabilities); 2, 3 two B
// tiles side by side; 4, 5 and 6, 7 their results for the two halves. The
// unit's tiles are invisible to the compiler: a barrier keeps memory accesses
// on their side of them.

#include "tree_attention.h"

#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <cmath>
#include <cstring>
#include <limits>
#include <vector>

#if defined(__x86_64__) && defined(__linux__) && defined(__GNUC__) && \
    !defined(__clang__)
  #include <cpuid.h>
  #include <immintrin.h>
  #include <sys/syscall.h>
  #include <unistd.h>

  #pragma GCC diagnostic ignored "-Wpsabi"
  #pragma GCC push_options
  #pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")
  #pragma GCC target("avx512bf16,amx-tile,amx-bf16")

namespace clover2::cpu {
using torch::headeronly::BFloat16;
using torch::headeronly::Half;
using torch::headeronly::ScalarType;
}  // namespace clover2::cpu

  #define CLOVER2_ISA amx
  #define CLOVER2_LANES 16
  #define CLOVER2_BF16
  #include "simd.h"
  #include "attention.h"

namespace clover2::cpu::amx {

constexpr int64_t kTileElements = kTileRows * kTileRows * kPair;
constexpr int64_t kTileDepth = kTileRows * kPair;  // of the summed dimension
constexpr int64_t kRowBytes = 64;

struct alignas(64) TileConfig {
  uint8_t palette = 1;
  uint8_t start_row = 0;
  uint8_t reserved[14] = {};
  uint16_t row_bytes[16] = {};
  uint8_t rows[16] = {};
};

CLOVER2_INLINE void barrier() { __asm__ volatile("" ::: "memory"); }

struct AmxKernel {
  using Element = BFloat16;
  using Query = BFloat16;
  using Probability = BFloat16;
  static constexpr int64_t kLeastPiece = 128;  // of keys, in vLLM's division
  static constexpr bool kScaleLogits = true;   // queries stay exact bf16 values

  explicit AmxKernel(int64_t dim) : dim(dim) {}

  // Queries as A tiles: [half][dim / 32][16 queries][32].
  void pack_query(const Element* source, int64_t index, float,
                  Query* packed) const {
    Query* target = packed + index / kTileRows * kTileRows * dim +
                    index % kTileRows * kTileDepth;
    for (int64_t d = 0; d < dim; d += kTileDepth) {
      std::memcpy(target + d * kTileRows, source + d, kRowBytes);
    }
  }

  void begin(int64_t queries) const {
    TileConfig config;
    for (int tile = 0; tile < 8; ++tile) {
      config.row_bytes[tile] = kRowBytes;
      config.rows[tile] = kTileRows;
    }
    const int64_t upper = queries < kTileRows ? queries : kTileRows;
    config.rows[0] = config.rows[4] = config.rows[5] = upper;
    if (queries > kTileRows) {
      config.rows[1] = config.rows[6] = config.rows[7] = queries - kTileRows;
    }
    barrier();
    _tile_loadconfig(&config);
  }
  void end() const { _tile_release(); }

  int64_t key_offset(int64_t token) const { return token * dim; }
  int64_t value_offset(int64_t token) const { return token * kTileRows; }

  // logits[queries][32] of one token group.
  void query_key(int64_t queries, const Query* query, const Element* keys,
                 int64_t, float* logits, int64_t stride) const {
    const Operands operands{query,
                            kTileElements,
                            kRowBytes,
                            kTileRows * dim,  // queries of the second half
                            keys,
                            kTileRows * dim,
                            dim};
    multiply<false>(queries, operands, logits, stride);
  }

  // out[queries][dim] += probabilities[queries][tokens] * values.
  void probability_value(int64_t queries, const Probability* probabilities,
                         int64_t stride, const Element* values, int64_t tokens,
                         int64_t block_size, float* out) const {
    for (int64_t d = 0; d < dim; d += 2 * kTileRows) {
      const Operands operands{probabilities,
                              kTileDepth,
                              stride * int64_t{sizeof(Probability)},
                              kTileRows * stride,
                              values + d * block_size,
                              kTileRows * block_size,
                              tokens};
      multiply<true>(queries, operands, out + d, dim);
    }
  }

  // Two tokens' values are interleaved, those of a group follow each other.
  void copy_values(const Element* source, int64_t source_block, Element* target,
                   int64_t target_block, int64_t tokens) const {
    const size_t pairs_bytes = tokens / kPair * kRowBytes;
    for (int64_t d = 0; d < dim; d += kTileRows) {
      std::memcpy(target + d * target_block, source + d * source_block,
                  pairs_bytes);
    }
    if (tokens % kPair != 0) {
      copy_value(source, tokens - 1, source_block, target, tokens - 1,
                 target_block);
    }
  }

  void copy_value(const Element* source, int64_t source_token,
                  int64_t source_block, Element* target, int64_t target_token,
                  int64_t target_block) const {
    source += amx_value(source_token, 0, source_block, 0);
    target += amx_value(target_token, 0, target_block, 0);
    for (int64_t d = 0; d < dim; d += kTileRows) {
      for (int64_t i = 0; i < kTileRows; ++i)
        target[i * kPair] = source[i * kPair];
      source += kTileRows * source_block;
      target += kTileRows * target_block;
    }
  }

 private:
  struct Operands {
    const Element* a;
    int64_t a_step;       // elements to the next 32 of the summed dimension
    int64_t a_row_bytes;  // between queries
    int64_t a_half;       // elements to the second 16 queries
    const Element* b;     // steps are kTileElements apart
    int64_t b_second;     // elements to the second 16 columns
    int64_t depth;
  };

  // c[queries][32] (+)= a * b.
  template <bool kAccumulate>
  static void multiply(int64_t queries, const Operands& operands, float* c,
                       int64_t stride) {
    const int64_t c_bytes = stride * sizeof(float);
    float* c_half = c + kTileRows * stride;
    const bool halves = queries > kTileRows;
    barrier();
    if (kAccumulate) {
      _tile_loadd(4, c, c_bytes);
      _tile_loadd(5, c + kTileRows, c_bytes);
    } else {
      _tile_zero(4);
      _tile_zero(5);
    }
    if (kAccumulate && halves) {
      _tile_loadd(6, c_half, c_bytes);
      _tile_loadd(7, c_half + kTileRows, c_bytes);
    } else if (halves) {
      _tile_zero(6);
      _tile_zero(7);
    }
    const Element* a = operands.a;
    const Element* b = operands.b;
    for (int64_t k = 0; k < operands.depth; k += kTileDepth) {
      _tile_loadd(0, a, operands.a_row_bytes);
      _tile_loadd(2, b, kRowBytes);
      _tile_loadd(3, b + operands.b_second, kRowBytes);
      _tile_dpbf16ps(4, 0, 2);
      _tile_dpbf16ps(5, 0, 3);
      if (halves) {
        _tile_loadd(1, a + operands.a_half, operands.a_row_bytes);
        _tile_dpbf16ps(6, 1, 2);
        _tile_dpbf16ps(7, 1, 3);
      }
      a += operands.a_step;
      b += kTileElements;
    }
    _tile_stored(4, c, c_bytes);
    _tile_stored(5, c + kTileRows, c_bytes);
    if (halves) {
      _tile_stored(6, c_half, c_bytes);
      _tile_stored(7, c_half + kTileRows, c_bytes);
    }
    barrier();
  }

  int64_t dim;
};

}  // namespace clover2::cpu::amx

namespace clover2::cpu {
namespace {

void attend(const AttentionProblem& problem, const AttentionTask& task) {
  amx::Attention<amx::AmxKernel>(problem, task).run();
}

}  // namespace
}  // namespace clover2::cpu

  #pragma GCC pop_options

namespace clover2::cpu {
namespace {

// The processor has the unit and Linux lets this process use its state.
bool amx_usable() {
  constexpr unsigned kAmxBf16 = 1u << 22;  // leaf 7, edx
  constexpr unsigned kAmxTile = 1u << 24;
  unsigned eax, ebx, ecx, edx;
  if (!__get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx)) return false;
  if ((edx & kAmxBf16) == 0 || (edx & kAmxTile) == 0) return false;
  constexpr int kArchReqXcompPerm = 0x1023;
  constexpr int kXfeatureTileData = 18;
  return syscall(SYS_arch_prctl, kArchReqXcompPerm, kXfeatureTileData) == 0;
}

}  // namespace

AttentionKernel amx_attention() {
  static const bool usable = avx512_attention() != nullptr && amx_usable();
  return usable ? attend : nullptr;
}

}  // namespace clover2::cpu

#else

namespace clover2::cpu {
AttentionKernel amx_attention() { return nullptr; }
}  // namespace clover2::cpu

#endif
