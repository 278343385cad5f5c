// SPDX-License-Identifier: Apache-2.0
// The attention kernel for layout kVec with AVX-512.

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
  #pragma GCC push_options
  #pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")

namespace clover2::cpu {
using torch::headeronly::BFloat16;
using torch::headeronly::Half;
using torch::headeronly::ScalarType;
}  // namespace clover2::cpu

  #define CLOVER2_ISA avx512
  #define CLOVER2_AVX512
  #include "simd.h"
  #include "vec_kernel.h"
  #include "attention.h"

namespace clover2::cpu {
namespace {

void attend(const AttentionProblem& problem, const AttentionTask& task) {
  switch (problem.dtype) {
    case ScalarType::Float:
      return avx512::Attention<avx512::VecKernel<float>>(problem, task).run();
    case ScalarType::BFloat16:
      return avx512::Attention<avx512::VecKernel<BFloat16>>(problem, task).run();
    default:
      return avx512::Attention<avx512::VecKernel<Half>>(problem, task).run();
  }
}

}  // namespace
}  // namespace clover2::cpu

  #pragma GCC pop_options

namespace clover2::cpu {

AttentionKernel avx512_attention() {
  const bool supported =
      __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  return supported ? attend : nullptr;
}

}  // namespace clover2::cpu

#else

namespace clover2::cpu {
AttentionKernel avx512_attention() { return nullptr; }
}  // namespace clover2::cpu

#endif
