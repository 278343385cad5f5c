// SPDX-License-Identifier: Apache-2.0
// Checks tensors, fills in the kernels' parameters and registers the CUDA
// kernels. The schemas are declared in vllm_clover2/ops/schema.py.
//
// Built against torch's stable ABI, so that one binary serves several torch
// versions. Everything goes to the current stream of the tensors' device;
// scratch memory comes from torch's allocator.
#ifndef USE_CUDA
  #define USE_CUDA  // torch's headers then declare the functions about streams
#endif

#include <cuda_runtime_api.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cstdint>
#include <tuple>
#include <vector>

#include "../common/checks.h"
#include "launch.h"

namespace clover2 {
namespace {

constexpr int64_t kAlignment = 16;       // of every row, for 16-byte copies
constexpr int64_t kMaxRequests = 65535;  // a grid's limit

using torch::stable::accelerator::DeviceGuard;

void* current_stream(int32_t device) {
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device, &stream));
  return stream;
}

void check_launch(int error, const char* op) {
  STD_TORCH_CHECK(error == 0, "clover2::", op, " could not be launched: ",
                  cudaGetErrorString(static_cast<cudaError_t>(error)));
}

DeviceLimits device_limits(int32_t device) {
  DeviceLimits limits{};
  check_launch(cudaDeviceGetAttribute(&limits.multiprocessors,
                                      cudaDevAttrMultiProcessorCount, device),
               "tree_attention");
  check_launch(cudaDeviceGetAttribute(
                   &limits.shared_bytes,
                   cudaDevAttrMaxSharedMemoryPerMultiprocessor, device),
               "tree_attention");
  return limits;
}

void check_device(const Tensor& tensor, const char* name, int32_t device) {
  STD_TORCH_CHECK(tensor.is_cuda() && tensor.get_device_index() == device, name,
                  " must be on cuda:", device, " like the other arguments");
}

void check_layout(int64_t layout) {
  STD_TORCH_CHECK(layout == static_cast<int64_t>(KVLayout::kStrided),
                  "layout must be 0 (STRIDED) on CUDA, found ", layout);
}

void check_requests(int64_t requests) {
  STD_TORCH_CHECK(requests <= kMaxRequests, "at most ", kMaxRequests,
                  " requests fit into a launch, found ", requests);
}

// Rows of `tensor` must begin at multiples of 16 bytes.
void check_aligned(const Tensor& tensor, const char* name) {
  const int64_t bytes = static_cast<int64_t>(tensor.element_size());
  STD_TORCH_CHECK(
      reinterpret_cast<uintptr_t>(tensor.data_ptr()) % kAlignment == 0, name,
      " must begin at a multiple of ", kAlignment, " bytes");
  for (int64_t axis = 0; axis + 1 < tensor.dim(); ++axis) {
    STD_TORCH_CHECK(
        tensor.size(axis) <= 1 || tensor.stride(axis) * bytes % kAlignment == 0,
        "strides of ", name, " must be multiples of ", kAlignment,
        " bytes; dimension ", axis, " has stride ", tensor.stride(axis),
        " elements of ", bytes, " bytes");
  }
}

AttentionType attention_type(const Tensor& query) {
  switch (query.scalar_type()) {
    case ScalarType::Float:
      return AttentionType::kFloat32;
    case ScalarType::Half:
      return AttentionType::kFloat16;
    case ScalarType::BFloat16:
      return AttentionType::kBFloat16;
    default:
      STD_TORCH_CHECK(false, "query must be float32, float16 or bfloat16");
  }
}

void check_attention_device(const Tensor& query, const Tensor& kv_cache,
                            const Tensor& block_table,
                            const Tensor& prefix_lens,
                            const Tensor& query_starts,
                            const Tensor& row_offsets, const Tensor& ancestors,
                            const Tensor& out) {
  const int32_t device = query.get_device_index();
  check_device(query, "query", device);
  check_device(kv_cache, "kv_cache", device);
  check_device(block_table, "block_table", device);
  check_device(prefix_lens, "prefix_lens", device);
  check_device(query_starts, "query_starts", device);
  check_device(row_offsets, "row_offsets", device);
  check_device(ancestors, "ancestors", device);
  check_device(out, "out", device);
  STD_TORCH_CHECK(kv_cache.stride(3) == 1,
                  "the last dimension of kv_cache must be contiguous");
  check_aligned(query, "query");
  check_aligned(kv_cache, "kv_cache");
  check_aligned(out, "out");
}

TreeAttentionParams attention_params(
    const Tensor& query, const Tensor& kv_cache, const Tensor& block_table,
    const Tensor& prefix_lens, const Tensor& query_starts,
    const Tensor& row_offsets, const Tensor& ancestors, const Tensor& out,
    const AttentionShape& shape) {
  TreeAttentionParams params{};
  params.query = query.data_ptr();
  params.cache = kv_cache.data_ptr();
  params.out = out.data_ptr();
  params.block_table = static_cast<const int32_t*>(block_table.data_ptr());
  params.prefix_lens = static_cast<const int32_t*>(prefix_lens.data_ptr());
  params.query_starts = static_cast<const int32_t*>(query_starts.data_ptr());
  params.row_offsets = static_cast<const int32_t*>(row_offsets.data_ptr());
  params.ancestors = static_cast<const int64_t*>(ancestors.data_ptr());
  params.query_token_stride = query.stride(0);
  params.query_head_stride = query.stride(1);
  params.out_token_stride = out.stride(0);
  params.out_head_stride = out.stride(1);
  params.cache_block_stride = kv_cache.stride(0);
  params.cache_head_stride = kv_cache.stride(1);
  params.cache_slot_stride = kv_cache.stride(2);
  params.block_table_stride = block_table.stride(0);
  params.requests = static_cast<int>(shape.requests);
  params.total_rows = static_cast<int>(ancestors.size(0));
  params.heads = static_cast<int>(shape.heads);
  params.kv_heads = static_cast<int>(shape.kv_heads);
  params.head_dim = static_cast<int>(shape.dim);
  params.block_size = static_cast<int>(shape.block_size);
  params.max_blocks = static_cast<int>(block_table.size(1));
  return params;
}

void tree_attention(const Tensor& query, const Tensor& kv_cache, int64_t layout,
                    const Tensor& block_table, const Tensor& prefix_lens,
                    const Tensor& query_starts, const Tensor& row_offsets,
                    const Tensor& ancestors, double scale, double softcap,
                    int64_t sliding_window, const Tensor& out) {
  check_layout(layout);
  const AttentionShape shape =
      check_tree_attention(query, kv_cache, block_table, prefix_lens,
                           query_starts, row_offsets, ancestors, out);
  STD_TORCH_CHECK(std::count(std::begin(kHeadDims), std::end(kHeadDims),
                             static_cast<int>(shape.dim)) == 1,
                  "the head size must be 64, 80, 96, 128 or 256, found ",
                  shape.dim);
  STD_TORCH_CHECK(scale > 0.0, "scale must be positive, found ", scale);
  check_requests(shape.requests);
  if (ancestors.size(0) == 0 || shape.requests == 0) return;
  check_attention_device(query, kv_cache, block_table, prefix_lens,
                         query_starts, row_offsets, ancestors, out);
  const AttentionType type = attention_type(query);
  const int32_t device = query.get_device_index();
  const DeviceGuard guard(device);

  TreeAttentionParams params =
      attention_params(query, kv_cache, block_table, prefix_lens, query_starts,
                       row_offsets, ancestors, out, shape);
  params.scale = static_cast<float>(scale);
  params.softcap = static_cast<float>(softcap);
  params.sliding_window =
      static_cast<int>(std::min<int64_t>(sliding_window, INT32_MAX));
  plan_tree_attention(params, type, device_limits(device));

  Tensor partial;  // freed on return: the allocator keeps it for this stream
  if (params.max_splits > 1) {
    const int64_t parts = params.max_splits *
                          static_cast<int64_t>(params.total_rows) *
                          params.heads;
    partial = torch::stable::new_empty(query, {parts * (shape.dim + 2)},
                                       ScalarType::Float);
    params.partial_out = static_cast<float*>(partial.data_ptr());
    params.partial_stats = params.partial_out + parts * shape.dim;
  }
  check_launch(launch_tree_attention(params, type, current_stream(device)),
               "tree_attention");
}

std::tuple<Tensor, Tensor, Tensor> tree_accept(const Tensor& target_tokens,
                                               const Tensor& draft_tokens,
                                               const Tensor& parents,
                                               const Tensor& row_offsets,
                                               int64_t max_depth) {
  const int64_t requests = check_tree_accept(target_tokens, draft_tokens,
                                             parents, row_offsets, max_depth);
  const int32_t device = target_tokens.get_device_index();
  check_device(target_tokens, "target_tokens", device);
  check_device(draft_tokens, "draft_tokens", device);
  check_device(parents, "parents", device);
  check_device(row_offsets, "row_offsets", device);
  const DeviceGuard guard(device);
  Tensor paths =
      torch::stable::new_empty(parents, {requests, max_depth}, ScalarType::Int);
  Tensor lengths =
      torch::stable::new_empty(parents, {requests}, ScalarType::Int);
  Tensor next_tokens =
      torch::stable::new_empty(parents, {requests}, ScalarType::Long);

  TreeAcceptParams params{};
  params.target_tokens = static_cast<const int64_t*>(target_tokens.data_ptr());
  params.draft_tokens = static_cast<const int64_t*>(draft_tokens.data_ptr());
  params.parents = static_cast<const int32_t*>(parents.data_ptr());
  params.row_offsets = static_cast<const int32_t*>(row_offsets.data_ptr());
  params.paths = static_cast<int32_t*>(paths.data_ptr());
  params.lengths = static_cast<int32_t*>(lengths.data_ptr());
  params.next_tokens = static_cast<int64_t*>(next_tokens.data_ptr());
  params.requests = static_cast<int>(requests);
  params.max_depth = static_cast<int>(max_depth);
  check_launch(launch_tree_accept(params, current_stream(device)),
               "tree_accept");
  return {paths, lengths, next_tokens};
}

bool same_strides(const Tensor& a, const Tensor& b) {
  return a.stride(0) == b.stride(0) && a.stride(1) == b.stride(1) &&
         a.stride(2) == b.stride(2);
}

void commit_kv(std::vector<Tensor> kv_caches, int64_t layout,
               const Tensor& block_table, const Tensor& prefix_lens,
               const Tensor& paths, const Tensor& lengths) {
  check_layout(layout);
  const int64_t requests =
      check_commit_kv(kv_caches, block_table, prefix_lens, paths, lengths);
  check_requests(requests);
  if (kv_caches.empty() || requests == 0) return;
  const int32_t device = lengths.get_device_index();
  check_device(lengths, "lengths", device);
  check_device(paths, "paths", device);
  check_device(prefix_lens, "prefix_lens", device);
  check_device(block_table, "block_table", device);
  for (const Tensor& cache : kv_caches) {
    check_device(cache, "kv_caches", device);
    STD_TORCH_CHECK(cache.stride(3) == 1,
                    "the last dimension of kv_caches must be contiguous");
  }
  const DeviceGuard guard(device);

  CommitKvParams params{};
  params.block_table = static_cast<const int32_t*>(block_table.data_ptr());
  params.prefix_lens = static_cast<const int32_t*>(prefix_lens.data_ptr());
  params.paths = static_cast<const int32_t*>(paths.data_ptr());
  params.lengths = static_cast<const int32_t*>(lengths.data_ptr());
  params.block_table_stride = block_table.stride(0);
  params.requests = static_cast<int>(requests);
  params.max_depth = static_cast<int>(paths.size(1));
  // One launch, unless layers differ in strides or exceed a launch's
  // parameters.
  for (size_t first = 0; first < kv_caches.size();) {
    const Tensor& cache = kv_caches[first];
    const int64_t bytes = static_cast<int64_t>(cache.element_size());
    params.block_stride = cache.stride(0) * bytes;
    params.head_stride = cache.stride(1) * bytes;
    params.slot_stride = cache.stride(2) * bytes;
    params.row_bytes = cache.size(3) * bytes;
    params.kv_heads = static_cast<int>(cache.size(1));
    params.block_size = static_cast<int>(cache.size(2));
    params.num_layers = 0;
    while (first < kv_caches.size() && params.num_layers < kMaxCommitLayers &&
           same_strides(kv_caches[first], cache)) {
      params.layers[params.num_layers++] = kv_caches[first++].data_ptr();
    }
    check_launch(launch_commit_kv(params, current_stream(device)), "commit_kv");
  }
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> context_nodes(
    const Tensor& history, const Tensor& requests, const Tensor& lengths,
    int64_t min_match, int64_t max_match, int64_t max_places, int64_t max_depth,
    int64_t max_nodes) {
  const ContextLimits limits{min_match, max_match, max_places, max_depth,
                             max_nodes};
  const int64_t count = check_context_nodes(history, requests, lengths, limits);
  const int32_t device = history.get_device_index();
  check_device(history, "history", device);
  check_device(requests, "requests", device);
  check_device(lengths, "lengths", device);
  const DeviceGuard guard(device);
  const auto column = [&](ScalarType dtype) {
    return torch::stable::new_empty(history, {count, max_nodes}, dtype);
  };
  Tensor tokens = column(ScalarType::Long);
  Tensor parents = column(ScalarType::Int);
  Tensor depths = column(ScalarType::Int);
  Tensor matches = column(ScalarType::Int);
  Tensor places = column(ScalarType::Int);
  Tensor sizes = torch::stable::new_empty(history, {count}, ScalarType::Int);

  ContextNodesParams params{};
  params.history = static_cast<const int32_t*>(history.data_ptr());
  params.requests = static_cast<const int32_t*>(requests.data_ptr());
  params.lengths = static_cast<const int32_t*>(lengths.data_ptr());
  params.tokens = static_cast<int64_t*>(tokens.data_ptr());
  params.parents = static_cast<int32_t*>(parents.data_ptr());
  params.depths = static_cast<int32_t*>(depths.data_ptr());
  params.matches = static_cast<int32_t*>(matches.data_ptr());
  params.places = static_cast<int32_t*>(places.data_ptr());
  params.sizes = static_cast<int32_t*>(sizes.data_ptr());
  params.slot_stride = history.stride(0);
  params.num_requests = static_cast<int>(count);
  // Indices in requests and lengths are int32 and reach no farther.
  params.slots =
      static_cast<int>(std::min<int64_t>(history.size(0), INT32_MAX));
  params.width =
      static_cast<int>(std::min<int64_t>(history.size(1), INT32_MAX));
  params.min_match = static_cast<int>(min_match);
  params.max_match = static_cast<int>(max_match);
  params.max_places = static_cast<int>(max_places);
  params.max_depth = static_cast<int>(max_depth);
  params.max_nodes = static_cast<int>(max_nodes);
  check_launch(launch_context_nodes(params, current_stream(device)),
               "context_nodes");
  return {tokens, parents, depths, matches, places, sizes};
}

}  // namespace
}  // namespace clover2

STABLE_TORCH_LIBRARY_IMPL(clover2, CUDA, library) {
  library.impl("tree_attention", TORCH_BOX(&clover2::tree_attention));
  library.impl("tree_accept", TORCH_BOX(&clover2::tree_accept));
  library.impl("commit_kv", TORCH_BOX(&clover2::commit_kv));
  library.impl("context_nodes", TORCH_BOX(&clover2::context_nodes));
}
