// SPDX-License-Identifier: Apache-2.0
// The attention kernel for every layout and dtype with the compiler's default
// instructions: what other machines run.

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
#define CLOVER2_LANES 4
#include "simd.h"
#include "vec_kernel.h"
#include "amx_emulated.h"
#include "attention.h"
#include "attend_vec.h"

namespace clover2::cpu {
namespace {

void attend(const AttentionProblem& problem, const AttentionTask& task) {
  if (problem.layout != KVLayout::kAmx) {
    return portable::attend_vec(problem, task);
  }
  portable::Attention<portable::AmxEmulatedKernel>(problem, task).run();
}

}  // namespace

AttentionKernel portable_attention() { return attend; }

}  // namespace clover2::cpu
