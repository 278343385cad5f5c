// SPDX-License-Identifier: Apache-2.0
// A few rows times sixteen outputs, in float vectors. Included once per
// instruction set, after simd.h.

namespace clover2::cpu::CLOVER2_ISA {

constexpr int kVectors = kPanelOutputs / kLanes;

// sums += input[:, begin:end] * panel[begin:end]. With `kFetch` a cache line of
// `next` is asked for in each step: reading on goes on while products are made.
template <int kRows, bool kFetch>
CLOVER2_INLINE void add_products(const PanelProduct& product, int64_t begin,
                                 int64_t end,
                                 floats (&sums)[kRows][kVectors]) {
#pragma GCC unroll 4
  for (int64_t i = begin; i < end; ++i) {
    if constexpr (kFetch) __builtin_prefetch(product.next + i * 64);
    floats weight[kVectors];
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) {
      weight[v] = load_floats(product.panel + i * kPanelOutputs + v * kLanes);
    }
#pragma GCC unroll 6
    for (int row = 0; row < kRows; ++row) {
      const floats x = broadcast(product.input[row * product.input_stride + i]);
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) {
        sums[row][v] = multiply_add(x, weight[v], sums[row][v]);
      }
    }
  }
}

// out = (out +) sums (+ bias), for the outputs that exist.
CLOVER2_INLINE void finish_row(const PanelProduct& product, int64_t row,
                               const floats (&sums)[kVectors]) {
  float* out = product.out + row * product.out_stride;
  float results[kPanelOutputs];
  std::memcpy(results, sums, sizeof(results));
  for (int64_t i = 0; i < product.outputs; ++i) {
    if (product.add) results[i] += out[i];
    if (product.bias != nullptr) results[i] += product.bias[i];
    out[i] = results[i];
  }
}

template <int kRows>
void multiply_rows(const PanelProduct& product) {
  floats sums[kRows][kVectors] = {};
  add_products<kRows, true>(product, 0, product.lines, sums);
  add_products<kRows, false>(product, product.lines, product.depth, sums);
#pragma GCC unroll 6
  for (int row = 0; row < kRows; ++row) finish_row(product, row, sums[row]);
}

inline void multiply_panel(int64_t rows, const PanelProduct& product) {
  constexpr void (*kernels[])(const PanelProduct&) = {
      multiply_rows<1>, multiply_rows<2>, multiply_rows<3>,
      multiply_rows<4>, multiply_rows<5>, multiply_rows<6>};
  static_assert(std::size(kernels) == kGroupRows);
  kernels[rows - 1](product);
}

}  // namespace clover2::cpu::CLOVER2_ISA
