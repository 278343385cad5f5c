// SPDX-License-Identifier: Apache-2.0
// Growing trees on the CPU: the likeliest tokens of a row of logits, products
// with int8 weights, and the recurrent step that is made of them.
//
// A growing tree has few rows, so its time is that of reading weights: int8
// halves it. Inputs are rounded to int8 row by row, sums are exact integers on
// every machine.

#include "draft.h"

#include "../common/checks.h"
#include "ops.h"

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <initializer_list>
#include <limits>
#include <memory>
#include <new>
#include <optional>

namespace clover2::cpu {

DraftKernels choose_draft_kernels() {
  const char* limit = std::getenv("CLOVER2_CPU_ISA");
  const bool best = limit == nullptr || *limit == '\0';
  DraftKernels kernels = portable_draft_kernels();
  if (best || std::strcmp(limit, "avx2") == 0) avx2_draft_kernels(kernels);
  if (best) avx512_draft_kernels(kernels);
  return kernels;
}

namespace {

// Rows whose inputs stay in L2 while all weights pass by.
constexpr int64_t kChunkRows = 256;
constexpr std::align_val_t kCacheLine{64};
constexpr float kInfinity = std::numeric_limits<float>::infinity();

int64_t padded(int64_t size, int64_t step) {
  return (size + step - 1) / step * step;
}

// Uninitialised, with rows that start at cache lines.
template <typename T>
class Rows {
 public:
  Rows(int64_t rows, int64_t size)
      : size_(padded(size, kRowStep)),
        memory_(static_cast<T*>(
            ::operator new(rows * size_ * sizeof(T), kCacheLine))) {}

  T* operator[](int64_t row) const { return memory_.get() + row * size_; }
  int64_t size() const { return size_; }

 private:
  struct Free {
    void operator()(T* memory) const { ::operator delete(memory, kCacheLine); }
  };
  int64_t size_;
  std::unique_ptr<T, Free> memory_;
};

// An int8 matrix as pack_int8 lays it out; see vllm_clover2/ops/int8.py.
struct Int8Weight {
  const uint8_t* packed;  // [outputs / 64][depth / 4][64][4]
  const float* scales;    // [outputs]
  const float* bias;      // [outputs] or null
  int64_t outputs;
  int64_t depth;  // padded

  int64_t groups() const { return padded(outputs, kGroupOutputs) / 64; }
};

Int8Weight int8_weight(const Tensor& packed, const Tensor& scales,
                       const Tensor* bias, int64_t depth, const char* name) {
  const int64_t outputs = scales.size(0);
  STD_TORCH_CHECK(
      packed.scalar_type() == ScalarType::Byte && packed.dim() == 4 &&
          packed.is_contiguous() && packed.size(2) == kGroupOutputs &&
          packed.size(3) == kBytesPerWord,
      name, " must be packed by pack_int8: uint8 [outputs / 64, depth / 4, ",
      "64, 4]");
  STD_TORCH_CHECK(packed.size(1) * kBytesPerWord == padded(depth, kDepthStep),
                  name, " must multiply rows of ", depth, ", found weights for ",
                  packed.size(1) * kBytesPerWord);
  STD_TORCH_CHECK(depth <= 1 << 16, name, " multiplies rows of ", depth,
                  ", but sums over more than 65,536 may not fit in 32 bits");
  STD_TORCH_CHECK(
      scales.scalar_type() == ScalarType::Float && scales.dim() == 1 &&
          scales.is_contiguous() &&
          padded(outputs, kGroupOutputs) == packed.size(0) * kGroupOutputs,
      "the scales of ", name, " must be a float32 vector, one per output");
  if (bias != nullptr) {
    STD_TORCH_CHECK(bias->scalar_type() == ScalarType::Float &&
                        bias->dim() == 1 && bias->is_contiguous() &&
                        bias->size(0) == outputs,
                    "the bias of ", name, " must be a float32 vector of ",
                    outputs);
  }
  return {packed.const_data_ptr<uint8_t>(), scales.const_data_ptr<float>(),
          bias == nullptr ? nullptr : bias->const_data_ptr<float>(), outputs,
          packed.size(1) * kBytesPerWord};
}

// Rows as int8: values[row] * scales[row].
struct Int8Rows {
  Int8Rows(int64_t rows, int64_t depth)
      : rows(rows), values(rows, depth), scales(1, rows), sums(1, rows) {}

  void set(const DraftKernels& kernels, int64_t row, const float* source) {
    kernels.quantize(source, values.size(), values[row], scales[0] + row,
                     sums[0] + row);
  }

  int64_t rows;
  Rows<int8_t> values;
  Rows<float> scales;
  Rows<int32_t> sums;
};

// One group of out[rows][stride] = inputs * weight^T + bias.
void multiply_group(const DraftKernels& kernels, const Int8Rows& inputs,
                    const Int8Weight& weight, int64_t group,
                    const Rows<int32_t>& sums, void* out, int64_t stride,
                    ScalarType dtype, int64_t element_size) {
  const int64_t first = group * kGroupOutputs;
  kernels.multiply(inputs.values[0], inputs.sums[0], inputs.rows, weight.depth,
                   weight.packed + first * weight.depth, sums[0]);
  kernels.finish({sums[0], inputs.rows, inputs.scales[0], weight.scales + first,
                  weight.bias == nullptr ? nullptr : weight.bias + first,
                  std::min(kGroupOutputs, weight.outputs - first),
                  static_cast<char*>(out) + first * element_size, stride,
                  dtype});
}

// A product whose result the next one of a recurrent step reads.
struct Product {
  const Int8Rows& inputs;
  const Int8Weight& weight;
  const Rows<float>& out;
};

// Products that do not depend on each other: threads wait for each other once.
void multiply(const DraftKernels& kernels,
              std::initializer_list<Product> products) {
  int64_t groups = 0;
  for (const Product& product : products) groups += product.weight.groups();
  torch::stable::parallel_for(0, groups, 1, [&](int64_t begin, int64_t end) {
    const Rows<int32_t> sums(products.begin()->inputs.rows, kGroupOutputs);
    int64_t first = 0;  // group of the product among all
    for (const auto& [inputs, weight, out] : products) {
      const int64_t last = std::min(end - first, weight.groups());
      for (int64_t i = std::max<int64_t>(begin - first, 0); i < last; ++i) {
        multiply_group(kernels, inputs, weight, i, sums, out[0], out.size(),
                       ScalarType::Float, sizeof(float));
      }
      first += weight.groups();
    }
  });
}

// Calls body(row) for every row, many of them by several threads.
template <typename Body>
void for_rows(int64_t rows, const Body& body) {
  torch::stable::parallel_for(0, rows, 16, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) body(row);
  });
}

// A row of a tensor as floats, padded with zeros.
void read_row(const DraftKernels& kernels, const Tensor& source, int64_t row,
              float* target, int64_t padded_size) {
  const int64_t size = source.size(1);
  const char* data = static_cast<const char*>(source.const_data_ptr()) +
                     row * source.stride(0) * source.element_size();
  kernels.to_float(data, source.scalar_type(), size, target);
  std::fill(target + size, target + padded_size, 0.0f);
}

void write_row(const DraftKernels& kernels, const float* source, Tensor& target,
               int64_t row) {
  char* data = static_cast<char*>(target.mutable_data_ptr()) +
               row * target.stride(0) * target.element_size();
  kernels.from_float(source, target.size(1), data, target.scalar_type());
}

}  // namespace

std::tuple<Tensor, Tensor> top_k_log_probs(const Tensor& logits,  // [M, V]
                                           int64_t k) {
  check_rows(logits, "logits");
  const int64_t rows = logits.size(0), size = logits.size(1);
  STD_TORCH_CHECK(k >= 1 && k <= size, "k must be 1 to ", size,
                  " (the logits of a row), found ", k);
  Tensor values =
      torch::stable::new_empty(logits, {rows, k}, ScalarType::Float);
  Tensor indices =
      torch::stable::new_empty(logits, {rows, k}, ScalarType::Long);
  const DraftKernels kernels = choose_draft_kernels();
  float* value = values.mutable_data_ptr<float>();
  int64_t* index = indices.mutable_data_ptr<int64_t>();
  torch::stable::parallel_for(0, rows, 1, [&](int64_t begin, int64_t end) {
    const Rows<float> scratch(1, size);
    for (int64_t row = begin; row < end; ++row) {
      read_row(kernels, logits, row, scratch[0], scratch.size());
      std::fill(scratch[0] + size, scratch[0] + scratch.size(), -kInfinity);
      kernels.top_k(scratch[0], scratch.size(), k, value + row * k,
                    index + row * k);
    }
  });
  return {values, indices};
}

Tensor int8_product(const Tensor& input,   // [M, K]
                    const Tensor& packed,  // [N / 64, K / 4, 64, 4] uint8
                    const Tensor& scales,  // [N] float32
                    const std::optional<Tensor>& bias) {  // [N] float32
  check_rows(input, "input");
  const Int8Weight weight =
      int8_weight(packed, scales, bias.has_value() ? &*bias : nullptr,
                  input.size(1), "the weight");
  const int64_t rows = input.size(0);
  Tensor out = torch::stable::new_empty(input, {rows, weight.outputs});
  const DraftKernels kernels = choose_draft_kernels();
  const int64_t row_bytes = weight.outputs * out.element_size();
  for (int64_t first = 0; first < rows; first += kChunkRows) {
    const int64_t count = std::min(kChunkRows, rows - first);
    Int8Rows inputs(count, weight.depth);
    const Rows<float> floats(count, weight.depth);
    for_rows(count, [&](int64_t row) {
      read_row(kernels, input, first + row, floats[row], floats.size());
      inputs.set(kernels, row, floats[row]);
    });
    char* target = static_cast<char*>(out.mutable_data_ptr()) +
                   first * row_bytes;
    const auto multiply_some = [&](int64_t begin, int64_t end) {
      const Rows<int32_t> sums(count, kGroupOutputs);
      for (int64_t group = begin; group < end; ++group) {
        multiply_group(kernels, inputs, weight, group, sums, target,
                       weight.outputs, input.scalar_type(), out.element_size());
      }
    };
    torch::stable::parallel_for(0, weight.groups(), 1, multiply_some);
  }
  return out;
}

std::tuple<Tensor, Tensor> recurrent_step(
    const Tensor& state,               // [M, H]
    const Tensor& embedding,           // [M, H]
    std::vector<Tensor> query,         // packed, scales, bias: H -> H
    std::vector<Tensor> of_embedding,  // H -> 3 H: key, value, output
    std::vector<Tensor> output,        // H -> H
    const Tensor& input_norm,          // [H]
    const Tensor& output_norm,         // [H]
    int64_t num_heads, double eps) {
  check_recurrent_step(state, embedding, input_norm, output_norm, num_heads);
  const int64_t rows = state.size(0), size = state.size(1);
  const auto weight = [size](const std::vector<Tensor>& parts, int64_t outputs,
                             const char* name) {
    STD_TORCH_CHECK(parts.size() == 3, name, " must be packed weight, scales, ",
                    "bias, found ", parts.size(), " tensors");
    const Int8Weight result =
        int8_weight(parts[0], parts[1], &parts[2], size, name);
    STD_TORCH_CHECK(result.outputs == outputs, name, " must have ", outputs,
                    " outputs, found ", result.outputs);
    return result;
  };
  const Int8Weight of_state = weight(query, size, "query");
  const Int8Weight of_token = weight(of_embedding, 3 * size, "of_embedding");
  const Int8Weight of_next = weight(output, size, "output");
  const DraftKernels kernels = choose_draft_kernels();
  const auto small = static_cast<float>(eps);

  const Rows<float> norms(2, size);
  for (const auto& [index, norm] :
       {std::pair(0, &input_norm), std::pair(1, &output_norm)}) {
    std::fill(norms[index], norms[index] + norms.size(), 0.0f);
    kernels.to_float(norm->const_data_ptr(), norm->scalar_type(), size,
                     norms[index]);
  }
  Tensor next = torch::stable::new_empty(state, {rows, size});
  Tensor out = torch::stable::new_empty(state, {rows, size});
  const Rows<float> states(rows, size), queries(rows, size);
  const Rows<float> of_tokens(rows, 3 * size);
  Int8Rows inputs(rows, size), token_inputs(rows, size);
  for_rows(rows, [&](int64_t row) {
    float* scratch = queries[row];
    read_row(kernels, embedding, row, scratch, queries.size());
    token_inputs.set(kernels, row, scratch);
    read_row(kernels, state, row, states[row], states.size());
    std::copy_n(states[row], states.size(), scratch);
    kernels.rms_norm(scratch, norms[0], size, small);
    inputs.set(kernels, row, scratch);
  });
  multiply(kernels, {{inputs, of_state, queries},
                     {token_inputs, of_token, of_tokens}});
  for_rows(rows, [&](int64_t row) {
    const float* key = of_tokens[row];
    kernels.add_cosine(queries[row], key, key + size, num_heads,
                       size / num_heads, small, states[row]);
    write_row(kernels, states[row], next, row);
    inputs.set(kernels, row, states[row]);
  });
  multiply(kernels, {{inputs, of_next, queries}});
  for_rows(rows, [&](int64_t row) {
    float* result = queries[row];
    const float* of_its_token = of_tokens[row] + 2 * size;
    for (int64_t i = 0; i < size; ++i) result[i] += of_its_token[i];
    kernels.rms_norm(result, norms[1], size, small);
    write_row(kernels, result, out, row);
  });
  return {next, out};
}

}  // namespace clover2::cpu
