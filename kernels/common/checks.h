// SPDX-License-Identifier: Apache-2.0
// Argument checks shared by the CPU and CUDA entry points. Each message names
// the argument, what must hold and what was found.
#pragma once

#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <cstdint>
#include <vector>

#include "context_limits.h"
#include "kv_layout.h"

namespace clover2 {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

inline void check_vector(const Tensor& tensor, const char* name,
                         ScalarType dtype, int64_t size) {
  STD_TORCH_CHECK(tensor.scalar_type() == dtype, name, " must be ",
                  dtype == ScalarType::Int ? "int32" : "int64");
  STD_TORCH_CHECK(tensor.dim() == 1 && tensor.is_contiguous(), name,
                  " must be a contiguous vector, found ", tensor.dim(),
                  " dimensions");
  STD_TORCH_CHECK(tensor.size(0) == size, name, " must have ", size,
                  " elements, found ", tensor.size(0));
}

inline void check_block_table(const Tensor& block_table, int64_t requests) {
  STD_TORCH_CHECK(
      block_table.scalar_type() == ScalarType::Int && block_table.dim() == 2,
      "block_table must be a 2-dimensional int32 tensor");
  STD_TORCH_CHECK(block_table.size(0) == requests, "block_table must have ",
                  requests, " rows (one per request), found ",
                  block_table.size(0));
  STD_TORCH_CHECK(block_table.size(1) <= 1 || block_table.stride(1) == 1,
                  "rows of block_table must be contiguous");
}

inline void check_cache(const Tensor& kv_cache) {
  STD_TORCH_CHECK(
      kv_cache.dim() == 4 && kv_cache.size(3) % 2 == 0,
      "kv_cache must be [blocks, kv_heads, block_size, 2 * D], found ",
      kv_cache.dim(), " dimensions");
}

struct AttentionShape {
  int64_t requests;
  int64_t heads;
  int64_t kv_heads;
  int64_t dim;
  int64_t block_size;
};

// Checks what both devices need of tree_attention's arguments.
inline AttentionShape check_tree_attention(
    const Tensor& query, const Tensor& kv_cache, const Tensor& block_table,
    const Tensor& prefix_lens, const Tensor& query_starts,
    const Tensor& row_offsets, const Tensor& ancestors, const Tensor& out) {
  check_cache(kv_cache);
  const int64_t dim = kv_cache.size(3) / 2;
  STD_TORCH_CHECK(query.dim() == 3 && query.size(2) == dim,
                  "query must be [tokens, heads, ", dim, "]");
  STD_TORCH_CHECK(dim == 1 || query.stride(2) == 1,
                  "the last dimension of query must be contiguous");
  STD_TORCH_CHECK(out.dim() == 3 && out.size(0) == query.size(0) &&
                      out.size(1) == query.size(1) && out.size(2) == dim,
                  "out must have the shape of query");
  STD_TORCH_CHECK(dim == 1 || out.stride(2) == 1,
                  "the last dimension of out must be contiguous");
  STD_TORCH_CHECK(query.scalar_type() == kv_cache.scalar_type() &&
                      query.scalar_type() == out.scalar_type(),
                  "query, kv_cache and out must have one dtype");
  STD_TORCH_CHECK(query.size(1) % kv_cache.size(1) == 0, "query heads (",
                  query.size(1), ") must be a multiple of kv heads (",
                  kv_cache.size(1), ")");
  STD_TORCH_CHECK(row_offsets.dim() == 1 && row_offsets.size(0) >= 1,
                  "row_offsets must be a vector of requests + 1 elements");
  const int64_t requests = row_offsets.size(0) - 1;
  check_vector(row_offsets, "row_offsets", ScalarType::Int, requests + 1);
  check_vector(prefix_lens, "prefix_lens", ScalarType::Int, requests);
  check_vector(query_starts, "query_starts", ScalarType::Int, requests);
  check_vector(ancestors, "ancestors", ScalarType::Long, ancestors.size(0));
  check_block_table(block_table, requests);
  return {requests, query.size(1), kv_cache.size(1), dim, kv_cache.size(2)};
}

// Returns the number of requests.
inline int64_t check_tree_accept(const Tensor& target_tokens,
                                 const Tensor& draft_tokens,
                                 const Tensor& parents,
                                 const Tensor& row_offsets, int64_t max_depth) {
  STD_TORCH_CHECK(max_depth >= 0, "max_depth must not be negative, found ",
                  max_depth);
  const int64_t rows = parents.size(0);
  check_vector(target_tokens, "target_tokens", ScalarType::Long, rows);
  check_vector(draft_tokens, "draft_tokens", ScalarType::Long, rows);
  check_vector(parents, "parents", ScalarType::Int, rows);
  STD_TORCH_CHECK(row_offsets.dim() == 1 && row_offsets.size(0) >= 1,
                  "row_offsets must be a vector of requests + 1 elements");
  check_vector(row_offsets, "row_offsets", ScalarType::Int,
               row_offsets.size(0));
  return row_offsets.size(0) - 1;
}

// Returns the number of requests. All layers must have one shape and dtype.
inline int64_t check_commit_kv(const std::vector<Tensor>& kv_caches,
                               const Tensor& block_table,
                               const Tensor& prefix_lens, const Tensor& paths,
                               const Tensor& lengths) {
  const int64_t requests = lengths.size(0);
  check_vector(lengths, "lengths", ScalarType::Int, requests);
  check_vector(prefix_lens, "prefix_lens", ScalarType::Int, requests);
  STD_TORCH_CHECK(paths.scalar_type() == ScalarType::Int && paths.dim() == 2 &&
                      paths.size(0) == requests && paths.is_contiguous(),
                  "paths must be a contiguous int32 [requests, max_depth]");
  check_block_table(block_table, requests);
  for (const Tensor& cache : kv_caches) {
    check_cache(cache);
    for (int64_t axis = 0; axis < 4; ++axis) {
      STD_TORCH_CHECK(cache.size(axis) == kv_caches[0].size(axis),
                      "all kv_caches must have one shape; dimension ", axis,
                      " is ", cache.size(axis), " and ",
                      kv_caches[0].size(axis));
    }
    STD_TORCH_CHECK(cache.element_size() == kv_caches[0].element_size(),
                    "all kv_caches must have one dtype");
  }
  return requests;
}

inline void check_context_limits(const ContextLimits& limits) {
  const auto between = [](int64_t value, const char* name, int64_t low,
                          int64_t high) {
    STD_TORCH_CHECK(value >= low && value <= high, name, " must be between ",
                    low, " and ", high, ", found ", value);
  };
  between(limits.max_match, "max_match", 1, kMaxContextMatch);
  between(limits.min_match, "min_match", 1, limits.max_match);
  between(limits.max_places, "max_places", 1, kMaxContextPlaces);
  between(limits.max_depth, "max_depth", 1, kMaxContextDepth);
  between(limits.max_nodes, "max_nodes", 1, kMaxContextNodes);
}

// Returns the number of requests.
inline int64_t check_context_nodes(const Tensor& history,
                                   const Tensor& requests,
                                   const Tensor& lengths,
                                   const ContextLimits& limits) {
  STD_TORCH_CHECK(history.scalar_type() == ScalarType::Int,
                  "history must be int32");
  STD_TORCH_CHECK(history.dim() == 2, "history must be [slots, width], found ",
                  history.dim(), " dimensions");
  STD_TORCH_CHECK(history.size(1) <= 1 || history.stride(1) == 1,
                  "rows of history must be contiguous, found stride ",
                  history.stride(1), " between tokens");
  STD_TORCH_CHECK(requests.dim() == 1, "requests must be a vector, found ",
                  requests.dim(), " dimensions");
  check_vector(requests, "requests", ScalarType::Int, requests.size(0));
  check_vector(lengths, "lengths", ScalarType::Int, requests.size(0));
  check_context_limits(limits);
  return requests.size(0);
}

// Rows of floats, each contiguous.
inline void check_rows(const Tensor& tensor, const char* name) {
  const ScalarType dtype = tensor.scalar_type();
  STD_TORCH_CHECK(dtype == ScalarType::Float || dtype == ScalarType::BFloat16 ||
                      dtype == ScalarType::Half,
                  name, " must be float32, bfloat16 or float16");
  STD_TORCH_CHECK(tensor.dim() == 2, name, " must have 2 dimensions, found ",
                  tensor.dim());
  STD_TORCH_CHECK(tensor.size(1) == 1 || tensor.stride(1) == 1, "rows of ",
                  name, " must be contiguous");
}

inline void check_recurrent_step(const Tensor& state, const Tensor& embedding,
                                 const Tensor& input_norm,
                                 const Tensor& output_norm, int64_t num_heads) {
  check_rows(state, "state");
  check_rows(embedding, "embedding");
  const int64_t size = state.size(1);
  STD_TORCH_CHECK(
      embedding.size(0) == state.size(0) && embedding.size(1) == size,
      "embedding must have the shape of state, ", state.size(0), " x ", size,
      ", found ", embedding.size(0), " x ", embedding.size(1));
  for (const Tensor* norm : {&input_norm, &output_norm}) {
    STD_TORCH_CHECK(norm->dim() == 1 && norm->is_contiguous() &&
                        norm->size(0) == size &&
                        norm->scalar_type() == state.scalar_type(),
                    "the norms must be vectors of ", size,
                    " elements with the dtype of state");
  }
  STD_TORCH_CHECK(num_heads >= 1 && size % num_heads == 0,
                  "num_heads must divide ", size, ", found ", num_heads);
}

}  // namespace clover2
