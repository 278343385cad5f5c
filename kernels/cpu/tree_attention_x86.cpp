// SPDX-License-Identifier: Apache-2.0
// The attention kernel for layout kVec with AVX-512 and with AVX2.

#include "tree_attention.h"

#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <cmath>
#include <cstring>
#include <limits>
#include <vector>

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
  #include <immintrin.h>

  #pragma GCC diagnostic ignored "-Wpsabi"

namespace clover2::cpu {
using torch::headeronly::BFloat16;
using torch::headeronly::Half;
using torch::headeronly::ScalarType;
}  // namespace clover2::cpu

  #pragma GCC push_options
  #pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")
  #define CLOVER2_ISA avx512
  #define CLOVER2_LANES 16
  #include "simd.h"
  #include "vec_kernel.h"
  #include "attention.h"
  #include "attend_vec.h"
  #undef CLOVER2_LANES
  #undef CLOVER2_ISA
  #pragma GCC pop_options

  #pragma GCC push_options
  #pragma GCC target("avx2,fma,f16c")
  #define CLOVER2_ISA avx2
  #define CLOVER2_LANES 8
  #include "simd.h"
  #include "vec_kernel.h"
  #include "attention.h"
  #include "attend_vec.h"
  #undef CLOVER2_LANES
  #undef CLOVER2_ISA
  #pragma GCC pop_options

namespace clover2::cpu {

AttentionKernel avx512_attention() {
  const bool supported =
      __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  return supported ? avx512::attend_vec : nullptr;
}

AttentionKernel avx2_attention() {
  const bool supported =
      __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  return supported ? avx2::attend_vec : nullptr;
}

}  // namespace clover2::cpu

#else

namespace clover2::cpu {
AttentionKernel avx512_attention() { return nullptr; }
AttentionKernel avx2_attention() { return nullptr; }
}  // namespace clover2::cpu

#endif
