// SPDX-License-Identifier: Apache-2.0
// A linear layer in float32 over weights in panels, for a target's steps.
//
// A step that verifies trees has a handful of rows, and its time is that of
// reading the weights once. Libraries read and multiply in turn; here the next
// panel is on its way while this one is multiplied.

#include "packed_linear.h"

#include "../common/checks.h"
#include "ops.h"

#include <torch/csrc/stable/ops.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <iterator>
#include <optional>

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
  #include <immintrin.h>
#endif

#pragma GCC diagnostic ignored "-Wpsabi"

namespace clover2::cpu {
using torch::headeronly::BFloat16;
using torch::headeronly::Half;
}  // namespace clover2::cpu

#define CLOVER2_ISA portable
#define CLOVER2_LANES 4
#include "simd.h"
#include "packed_linear_rows.h"
#undef CLOVER2_LANES
#undef CLOVER2_ISA

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
  #pragma GCC push_options
  #pragma GCC target("avx2,fma,f16c")
  #define CLOVER2_ISA avx2
  #define CLOVER2_LANES 8
  #include "simd.h"
  #include "packed_linear_rows.h"
  #undef CLOVER2_LANES
  #undef CLOVER2_ISA
  #pragma GCC pop_options
#endif

namespace clover2::cpu {
namespace {

// Rows that stay in L2 while all weights pass by.
constexpr int64_t kChunkFloats = 1 << 16;

MultiplyPanel choose_multiply_panel() {
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
  const char* limit = std::getenv("CLOVER2_CPU_ISA");
  const bool best = limit == nullptr || std::strcmp(limit, "portable") != 0;
  if (best && __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) {
    return avx2::multiply_panel;
  }
#endif
  return portable::multiply_panel;
}

// out[rows][outputs] of input[rows][depth], by one of several threads.
struct Linear {
  const float* input;
  int64_t input_stride;
  int64_t rows;
  const float* packed;  // [panels][depth][16]
  int64_t panels;
  int64_t depth;
  const float* bias;  // [outputs] or null
  float* out;
  int64_t outputs;

  // Rows first to last, for the outputs of one panel.
  void panel(MultiplyPanel multiply, int64_t number, int64_t first,
             int64_t last) const {
    const int64_t groups = (last - first + kGroupRows - 1) / kGroupRows;
    const int64_t output = number * kPanelOutputs;
    for (int64_t i = 0; i < depth; i += kSumDepth) {
      const int64_t size = std::min(kSumDepth, depth - i);
      const int64_t line = number * depth + i;  // a row of a panel each
      const int64_t next = line + std::min(kSumDepth, depth);
      const int64_t lines = std::clamp<int64_t>(panels * depth - next, 0, size);
      int64_t row = first, fetched = 0;
      for (int64_t group = 1; group <= groups; ++group) {
        const int64_t end = first + (last - first) * group / groups;
        const int64_t fetch = lines * group / groups;
        const float* soon = packed + (next + fetched) * kPanelOutputs;
        multiply(end - row,
                 {input + row * input_stride + i, input_stride,
                  packed + line * kPanelOutputs, size,
                  reinterpret_cast<const char*>(soon), fetch - fetched, i > 0,
                  bias == nullptr || i + size < depth ? nullptr : bias + output,
                  out + row * outputs + output, outputs,
                  std::min(kPanelOutputs, outputs - output)});
        row = end;
        fetched = fetch;
      }
    }
  }
};

}  // namespace

Tensor packed_linear(const Tensor& input,   // [M, K] float32
                     const Tensor& packed,  // [N / 16, K, 16] float32
                     const std::optional<Tensor>& bias,  // [N] float32
                     int64_t outputs) {                  // N
  check_rows(input, "input");
  const int64_t rows = input.size(0), depth = input.size(1);
  STD_TORCH_CHECK(input.scalar_type() == ScalarType::Float &&
                      packed.scalar_type() == ScalarType::Float,
                  "input and packed must be float32");
  STD_TORCH_CHECK(depth >= 1, "input must have at least one column");
  const int64_t panels = (outputs + kPanelOutputs - 1) / kPanelOutputs;
  STD_TORCH_CHECK(packed.dim() == 3 && packed.is_contiguous() &&
                      packed.size(0) == panels && packed.size(1) == depth &&
                      packed.size(2) == kPanelOutputs,
                  "packed must be a weight [", outputs, ", ", depth,
                  "] as pack_linear lays it out");
  if (bias.has_value()) {
    STD_TORCH_CHECK(bias->scalar_type() == ScalarType::Float &&
                        bias->dim() == 1 && bias->is_contiguous() &&
                        bias->size(0) == outputs,
                    "bias must be a float32 vector of ", outputs);
  }
  Tensor out = torch::stable::new_empty(input, {rows, outputs});
  const Linear linear{
      input.const_data_ptr<float>(), input.stride(0), rows,
      packed.const_data_ptr<float>(), panels, depth,
      bias.has_value() ? bias->const_data_ptr<float>() : nullptr,
      out.mutable_data_ptr<float>(), outputs};
  const MultiplyPanel multiply = choose_multiply_panel();
  const int64_t chunk = std::max(kGroupRows, kChunkFloats / depth);
  torch::stable::parallel_for(0, panels, 1, [&](int64_t begin, int64_t end) {
    for (int64_t first = 0; first < rows; first += chunk) {
      const int64_t last = std::min(first + chunk, rows);
      for (int64_t i = begin; i < end; ++i) {
        linear.panel(multiply, i, first, last);
      }
    }
  });
  return out;
}

}  // namespace clover2::cpu
