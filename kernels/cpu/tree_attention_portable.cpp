// SPDX-License-Identifier: Apache-2.0
// The attention kernel for every layout and dtype with the compiler's default
// instructions: what machines without AVX-512 or AMX run.

#include "tree_attention.h"

#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <cmath>
#include <cstring>
#include <limits>
#include <vector>

#pragma GCC diagnostic ignored "-Wpsabi"

namespace clover2::cpu {
using torch::headeronly::BFloat16;
using torch::headeronly::Half;
using torch::headeronly::ScalarType;
}  // namespace clover2::cpu

#define CLOVER2_ISA portable
#include "simd.h"
#include "vec_kernel.h"
#include "amx_emulated.h"
#include "attention.h"

namespace clover2::cpu {
namespace {

void attend(const AttentionProblem& problem, const AttentionTask& task) {
  using portable::AmxEmulatedKernel;
  using portable::Attention;
  using portable::VecKernel;
  if (problem.layout == KVLayout::kAmx) {
    return Attention<AmxEmulatedKernel>(problem, task).run();
  }
  switch (problem.dtype) {
    case ScalarType::Float:
      return Attention<VecKernel<float>>(problem, task).run();
    case ScalarType::BFloat16:
      return Attention<VecKernel<BFloat16>>(problem, task).run();
    default:
      return Attention<VecKernel<Half>>(problem, task).run();
  }
}

}  // namespace

AttentionKernel portable_attention() { return attend; }

}  // namespace clover2::cpu
