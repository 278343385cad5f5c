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

using MultiplyRows = void (*)(const int8_t* inputs, const int32_t* row_sums,
                              int64_t depth, const uint8_t* weights,
                              int32_t* sums);

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

// kRows rows by 64 outputs: sums stay in registers. They start with what 128 in
// every weight adds.
template <int kRows>
void multiply_rows(const int8_t* inputs, const int32_t* row_sums, int64_t depth,
                   const uint8_t* weights, int32_t* sums) {
  __m512i sum[kRows][4];
#pragma GCC unroll 4
  for (int row = 0; row < kRows; ++row) {
    const __m512i start = _mm512_set1_epi32(-kWeightZero * row_sums[row]);
#pragma GCC unroll 4
    for (int v = 0; v < 4; ++v) sum[row][v] = start;
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

inline void multiply(const int8_t* inputs, const int32_t* row_sums,
                     int64_t rows, int64_t depth, const uint8_t* weights,
                     int32_t* sums) {
  constexpr MultiplyRows kernels[] = {multiply_rows<1>, multiply_rows<2>,
                                      multiply_rows<3>, multiply_rows<4>};
  for (int64_t row = 0; row < rows; row += 4) {
    const int64_t count = std::min<int64_t>(4, rows - row);
    kernels[count - 1](inputs + row * depth, row_sums + row, depth, weights,
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

// kRows rows by 16 outputs. Products of bytes are added in pairs, in 16 bits,
// which holds twice 127 * 127: hence the first factor, which must be unsigned,
// is the size of a weight, and its sign goes to the input.
template <int kRows>
void multiply_rows(const int8_t* inputs, const int32_t*, int64_t depth,
                   const uint8_t* weights, int32_t* sums) {
  const __m256i ones = _mm256_set1_epi16(1);
  const __m256i zero = _mm256_set1_epi8(static_cast<char>(kWeightZero));
  __m256i sum[kRows][2];
#pragma GCC unroll 4
  for (int row = 0; row < kRows; ++row) {
    sum[row][0] = sum[row][1] = _mm256_setzero_si256();
  }
  for (int64_t i = 0; i < depth; i += kBytesPerWord) {
    __m256i weight[2], size[2];
#pragma GCC unroll 2
    for (int v = 0; v < 2; ++v) {
      const void* bytes = weights + 32 * v;
      // The lowest bytes of weight + 128 and weight - 128 are the same.
      weight[v] = _mm256_xor_si256(
          _mm256_loadu_si256(static_cast<const __m256i*>(bytes)), zero);
      size[v] = _mm256_abs_epi8(weight[v]);
    }
    __builtin_prefetch(weights + kAhead);
    weights += kGroupOutputs * kBytesPerWord;
#pragma GCC unroll 4
    for (int row = 0; row < kRows; ++row) {
      const __m256i input = _mm256_set1_epi32(word(inputs + row * depth + i));
#pragma GCC unroll 2
      for (int v = 0; v < 2; ++v) {
        const __m256i pairs = _mm256_maddubs_epi16(
            size[v], _mm256_sign_epi8(input, weight[v]));
        sum[row][v] =
            _mm256_add_epi32(sum[row][v], _mm256_madd_epi16(pairs, ones));
      }
    }
  }
#pragma GCC unroll 4
  for (int row = 0; row < kRows; ++row) {
#pragma GCC unroll 2
    for (int v = 0; v < 2; ++v) {
      void* out = sums + row * kGroupOutputs + 8 * v;
      _mm256_storeu_si256(static_cast<__m256i*>(out), sum[row][v]);
    }
  }
}

inline void multiply(const int8_t* inputs, const int32_t* row_sums,
                     int64_t rows, int64_t depth, const uint8_t* weights,
                     int32_t* sums) {
  constexpr MultiplyRows kernels[] = {multiply_rows<1>, multiply_rows<2>,
                                      multiply_rows<3>, multiply_rows<4>};
  // All rows for some outputs, whose weights stay in L1 meanwhile.
  for (int64_t output = 0; output < kGroupOutputs; output += 16) {
    for (int64_t row = 0; row < rows; row += 4) {
      const int64_t count = std::min<int64_t>(4, rows - row);
      kernels[count - 1](inputs + row * depth, row_sums + row, depth,
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
