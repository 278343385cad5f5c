// SPDX-License-Identifier: Apache-2.0
// What the builds of the CPU kernels for growing trees (one per instruction
// set) share: scoring a row of logits, int8 products, the recurrent step.
#pragma once

#include <torch/headeronly/core/ScalarType.h>

#include <cstdint>

namespace clover2::cpu {

// Products are computed for 64 outputs at a time, and the summed dimension is
// padded to a multiple of 64: whole vectors for every instruction set.
constexpr int64_t kGroupOutputs = 64;
constexpr int64_t kDepthStep = 64;
// Weights that are multiplied by four bytes of an input lie together.
constexpr int64_t kBytesPerWord = 4;
// Added to int8 weights, which makes them the unsigned factor that VNNI needs.
constexpr int32_t kWeightZero = 128;

// Rows of smaller inputs are rounded to 0: 127 / input would be infinite.
constexpr float kLeastInput = 1e-36f;

// Float rows that a kernel reads are padded to a multiple of this.
constexpr int64_t kRowStep = 64;

// The 64 sums of some rows that a group of weights contributes to.
struct GroupSums {
  const int32_t* sums;          // [rows][64] of weight * input
  int64_t rows;
  const float* row_scales;      // [rows]
  const float* output_scales;   // [outputs]
  const float* bias;            // [outputs] or null
  int64_t outputs;              // that exist, at most 64
  void* out;                    // [rows][stride]
  int64_t stride;
  torch::headeronly::ScalarType dtype;
};

struct DraftKernels {
  void (*to_float)(const void* source, torch::headeronly::ScalarType dtype,
                   int64_t size, float* target);
  void (*from_float)(const float* source, int64_t size, void* target,
                     torch::headeronly::ScalarType dtype);

  // The k largest log-probabilities and where they are. `logits` is changed;
  // what pads it to a multiple of kRowStep must be -inf.
  void (*top_k)(float* logits, int64_t padded, int64_t k, float* values,
                int64_t* indices);

  // row *= weight / sqrt(mean(row^2) + eps); both are padded with zeros.
  void (*rms_norm)(float* row, const float* weight, int64_t size, float eps);

  // row ~ target * scale. A row with NaN or infinity gets the scale NaN.
  void (*quantize)(const float* row, int64_t padded, int8_t* target,
                   float* scale, int32_t* sum);

  // state += cos(query, key) * value, head by head.
  void (*add_cosine)(const float* query, const float* key, const float* value,
                     int64_t heads, int64_t dim, float eps, float* state);

  // sums[rows][64] of inputs [rows][depth], whose own sums are row_sums[rows],
  // and one group of weights [depth / 4][64][4].
  void (*multiply)(const int8_t* inputs, const int32_t* row_sums, int64_t rows,
                   int64_t depth, const uint8_t* weights, int32_t* sums);

  // Scales sums, adds the bias, writes the result.
  void (*finish)(const GroupSums& group);
};

// The best for this machine; CLOVER2_CPU_ISA=avx2 or portable tests what lesser
// machines run.
DraftKernels choose_draft_kernels();

// Whether the machine has the instructions; then the kernels are filled in.
// The later ones replace parts of what the earlier ones filled in.
DraftKernels portable_draft_kernels();
bool avx2_draft_kernels(DraftKernels& kernels);
bool avx512_draft_kernels(DraftKernels& kernels);

}  // namespace clover2::cpu
