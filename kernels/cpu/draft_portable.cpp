// SPDX-License-Identifier: Apache-2.0
// The kernels for growing trees with the compiler's default instructions.

#include "draft.h"

#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <cmath>
#include <cstring>
#include <limits>

#pragma GCC diagnostic ignored "-Wpsabi"

namespace clover2::cpu {
using torch::headeronly::BFloat16;
using torch::headeronly::Half;
using torch::headeronly::ScalarType;
}  // namespace clover2::cpu

#define CLOVER2_ISA portable
#define CLOVER2_LANES 4
#include "simd.h"
#include "draft_rows.h"

namespace clover2::cpu {
namespace {

void multiply(const int8_t* inputs, const int32_t*, int64_t rows, int64_t depth,
              const uint8_t* weights, int32_t* sums) {
  for (int64_t row = 0; row < rows; ++row) {
    const int8_t* input = inputs + row * depth;
    int32_t* out = sums + row * kGroupOutputs;
    std::memset(out, 0, kGroupOutputs * sizeof(int32_t));
    const uint8_t* weight = weights;
    for (int64_t i = 0; i < depth; i += kBytesPerWord) {
      for (int64_t output = 0; output < kGroupOutputs; ++output) {
        for (int64_t byte = 0; byte < kBytesPerWord; ++byte) {
          out[output] += input[i + byte] * (*weight++ - kWeightZero);
        }
      }
    }
  }
}

}  // namespace

DraftKernels portable_draft_kernels() {
  DraftKernels kernels;
  portable::fill_in(kernels);
  kernels.multiply = multiply;
  return kernels;
}

}  // namespace clover2::cpu
