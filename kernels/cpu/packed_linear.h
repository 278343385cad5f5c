// SPDX-License-Identifier: Apache-2.0
// What the builds of the linear layer's kernel (one per instruction set) share.
#pragma once

#include <cstdint>

namespace clover2::cpu {

// Outputs whose weights lie together: a panel is [depth][16], a cache line a row.
constexpr int64_t kPanelOutputs = 16;

// Rows whose sums for a panel stay in registers; rows are taken in such groups.
constexpr int64_t kGroupRows = 6;

// Products are summed in order, this many from zero, and such sums added up: so
// oneDNN does, hence vLLM, and float32 text stays the same to the last bit.
constexpr int64_t kSumDepth = 1024;

// A group of rows times a part of a panel.
struct PanelProduct {
  const float* input;  // [at most 6][input_stride]
  int64_t input_stride;
  const float* panel;  // [depth][16]
  int64_t depth;
  const char* next;  // to be read soon, `lines` cache lines of it, at most depth
  int64_t lines;
  bool add;           // to what is in `out`
  const float* bias;  // [outputs], added last, or null
  float* out;         // [rows][out_stride]
  int64_t out_stride;
  int64_t outputs;  // that exist, at most 16
};

using MultiplyPanel = void (*)(int64_t rows, const PanelProduct& product);

}  // namespace clover2::cpu
