// SPDX-License-Identifier: Apache-2.0
// The kernels for growing trees with AVX2, and with AVX-512 and its product of
// bytes (VNNI).

#include "draft.h"

#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
  #include <immintrin.h>

  #pragma GCC diagnostic ignored "-Wpsabi"

namespace clover2::cpu {
using torch::headeronly::BFloat16;
using torch::headeronly::Half;
using torch::headeronly::ScalarType;

namespace {

// Weights are read once, from far away: fetched this many bytes ahead.
constexpr int64_t kAhead = 4096;

using MultiplyRows = void (*)(const int8_t*, int64_t, const uint8_t*, int32_t*);

inline int32_t word(const int8_t* bytes) {
  int32_t result;
  std::memcpy(&result, bytes, sizeof(result));
  return result;
}

}  // namespace
}  // namespace clover2::cpu

  #pragma GCC push_options
  #pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")
  #pragma GCC target("avx512vnni")
  #define CLOVER2_ISA avx512
  #define CLOVER2_LANES 16
  #include "simd.h"
  #include "draft_rows.h"
  #undef CLOVER2_LANES
  #undef CLOVER2_ISA

namespace clover2::cpu::avx512 {

// kRows rows by 64 outputs: sums stay in registers.
template <int kRows>
void multiply_rows(const int8_t* inputs, int64_t depth, const uint8_t* weights,
                   int32_t* sums) {
  __m512i sum[kRows][4];
#pragma GCC unroll 4
  for (int row = 0; row < kRows; ++row) {
#pragma GCC unroll 4
    for (int v = 0; v < 4; ++v) sum[row][v] = _mm512_setzero_si512();
  }
  for (int64_t i = 0; i < depth; i += kBytesPerWord) {
    __m512i weight[4];
#pragma GCC unroll 4
    for (int v = 0; v < 4; ++v) {
      weight[v] = _mm512_loadu_si512(weights + 64 * v);
      __builtin_prefetch(weights + 64 * v + kAhead);
    }
    weights += kGroupOutputs * kBytesPerWord;
#pragma GCC unroll 4
    for (int row = 0; row < kRows; ++row) {
      const __m512i input = _mm512_set1_epi32(word(inputs + row * depth + i));
#pragma GCC unroll 4
      for (int v = 0; v < 4; ++v) {
        sum[row][v] = _mm512_dpbusd_epi32(sum[row][v], weight[v], input);
      }
    }
  }
#pragma GCC unroll 4
  for (int row = 0; row < kRows; ++row) {
#pragma GCC unroll 4
    for (int v = 0; v < 4; ++v) {
      _mm512_storeu_si512(sums + row * kGroupOutputs + 16 * v, sum[row][v]);
    }
  }
}

inline void multiply(const int8_t* inputs, int64_t rows, int64_t depth,
                     const uint8_t* weights, int32_t* sums) {
  constexpr MultiplyRows kernels[] = {multiply_rows<1>, multiply_rows<2>,
                                      multiply_rows<3>, multiply_rows<4>};
  for (int64_t row = 0; row < rows; row += 4) {
    const int64_t count = std::min<int64_t>(4, rows - row);
    kernels[count - 1](inputs + row * depth, depth, weights,
                       sums + row * kGroupOutputs);
  }
}

}  // namespace clover2::cpu::avx512

  #pragma GCC pop_options

  #pragma GCC push_options
  #pragma GCC target("avx2,fma,f16c")
  #define CLOVER2_ISA avx2
  #define CLOVER2_LANES 8
  #include "simd.h"
  #include "draft_rows.h"
  #undef CLOVER2_LANES
  #undef CLOVER2_ISA

namespace clover2::cpu::avx2 {

// kRows rows by 8 outputs. Bytes become 16-bit numbers, whose products are
// added in pairs: two sums for each output, in neighbouring lanes.
template <int kRows>
void multiply_rows(const int8_t* inputs, int64_t depth, const uint8_t* weights,
                   int32_t* sums) {
  __m256i sum[kRows][2];
#pragma GCC unroll 4
  for (int row = 0; row < kRows; ++row) {
    sum[row][0] = sum[row][1] = _mm256_setzero_si256();
  }
  for (int64_t i = 0; i < depth; i += kBytesPerWord) {
    __m256i weight[2];
#pragma GCC unroll 2
    for (int v = 0; v < 2; ++v) {
      const void* bytes = weights + 16 * v;
      weight[v] = _mm256_cvtepu8_epi16(
          _mm_loadu_si128(static_cast<const __m128i*>(bytes)));
    }
    weights += kGroupOutputs * kBytesPerWord;
#pragma GCC unroll 4
    for (int row = 0; row < kRows; ++row) {
      const __m256i input = _mm256_cvtepi8_epi16(
          _mm_set1_epi32(word(inputs + row * depth + i)));
#pragma GCC unroll 2
      for (int v = 0; v < 2; ++v) {
        sum[row][v] = _mm256_add_epi32(sum[row][v],
                                       _mm256_madd_epi16(weight[v], input));
      }
    }
  }
#pragma GCC unroll 4
  for (int row = 0; row < kRows; ++row) {
    // Adding neighbours leaves outputs 0, 1, 4, 5, 2, 3, 6, 7.
    const __m256i mixed = _mm256_hadd_epi32(sum[row][0], sum[row][1]);
    const __m256i sorted = _mm256_permute4x64_epi64(mixed, 0b11011000);
    void* out = sums + row * kGroupOutputs;
    _mm256_storeu_si256(static_cast<__m256i*>(out), sorted);
  }
}

inline void multiply(const int8_t* inputs, int64_t rows, int64_t depth,
                     const uint8_t* weights, int32_t* sums) {
  constexpr MultiplyRows kernels[] = {multiply_rows<1>, multiply_rows<2>,
                                      multiply_rows<3>, multiply_rows<4>};
  for (int64_t row = 0; row < rows; row += 4) {
    const int64_t count = std::min<int64_t>(4, rows - row);
    for (int64_t output = 0; output < kGroupOutputs; output += 8) {
      kernels[count - 1](inputs + row * depth, depth,
                         weights + output * kBytesPerWord,
                         sums + row * kGroupOutputs + output);
    }
  }
}

}  // namespace clover2::cpu::avx2

  #pragma GCC pop_options

namespace clover2::cpu {

bool avx2_draft_kernels(DraftKernels& kernels) {
  if (!__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("fma")) {
    return false;
  }
  avx2::fill_in(kernels);
  kernels.multiply = avx2::multiply;
  return true;
}

bool avx512_draft_kernels(DraftKernels& kernels) {
  if (!__builtin_cpu_supports("avx512f") ||
      !__builtin_cpu_supports("avx512bw") ||
      !__builtin_cpu_supports("avx512dq") ||
      !__builtin_cpu_supports("avx512vl") ||
      !__builtin_cpu_supports("avx512vnni")) {
    return false;
  }
  avx512::fill_in(kernels);
  kernels.multiply = avx512::multiply;
  return true;
}

}  // namespace clover2::cpu

#else

namespace clover2::cpu {
bool avx2_draft_kernels(DraftKernels&) { return false; }
bool avx512_draft_kernels(DraftKernels&) { return false; }
}  // namespace clover2::cpu

#endif
