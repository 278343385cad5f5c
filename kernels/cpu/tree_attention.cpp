// SPDX-License-Identifier: Apache-2.0
// tree_attention on the CPU: checks, division of the work, choice of the
// kernel. The arithmetic is in attention.h.

#include "tree_attention.h"

#include "../common/checks.h"
#include "ops.h"

#include <torch/csrc/stable/ops.h>

#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <cstring>

namespace clover2::cpu {

namespace {

// The best kernel for this machine. CLOVER2_CPU_ISA=avx512 (without AMX), avx2
// or portable tests what lesser machines run.
AttentionKernel choose_kernel(KVLayout layout) {
  const char* limit = std::getenv("CLOVER2_CPU_ISA");
  const bool best = limit == nullptr || *limit == '\0';
  const bool avx512 = best || std::strcmp(limit, "avx512") == 0;
  const bool avx2 = avx512 || std::strcmp(limit, "avx2") == 0;
  AttentionKernel kernel = nullptr;
  if (layout == KVLayout::kAmx) {
    if (best) kernel = amx_attention();
  } else {
    if (avx512) kernel = avx512_attention();
    if (avx2 && kernel == nullptr) kernel = avx2_attention();
  }
  return kernel != nullptr ? kernel : portable_attention();
}

// Tokens whose logits are kept between two rounds of online softmax: half of
// L2, as in vLLM's attention for one decode token (8,192 for a L2 of 2 MiB and
// D = 64), so that both round at the same places.
int64_t tile_tokens(int64_t dim) {
  const int64_t l2 =
      std::max<int64_t>(sysconf(_SC_LEVEL2_CACHE_SIZE), 512 << 10);
  const int64_t query_bytes = kMaxQueries * dim * (2 + 4);
  const int64_t tokens =
      (l2 / 2 - query_bytes) / int64_t{kMaxQueries * sizeof(float)};
  return std::max(tokens / kGroupTokens * kGroupTokens, 8 * kGroupTokens);
}

// vLLM divides the keys of one lone request between its threads, and of several
// requests in ways that depend on all of them; only the first can be repeated
// here. Not repeated either: head sizes for which it uses other groups (80,
// 112), windows.
int64_t split_threads(const AttentionShape& shape, int64_t sliding_window) {
  const char* enabled = std::getenv("VLLM_CPU_ATTN_SPLIT_KV");
  const bool off = enabled != nullptr && std::strcmp(enabled, "0") == 0;
  if (off || shape.requests != 1 || sliding_window >= 0 ||
      shape.dim % 32 != 0) {
    return 1;
  }
  return torch::stable::get_num_threads();
}

void check_rows(const AttentionProblem& problem, const Tensor& query,
                const Tensor& ancestors, const Tensor& block_table,
                int64_t request) {
  const int64_t first = problem.row_offsets[request];
  const int64_t rows = problem.row_offsets[request + 1] - first;
  STD_TORCH_CHECK(first >= 0 && rows >= 0 && first + rows <= ancestors.size(0),
                  "row_offsets must ascend within the ", ancestors.size(0),
                  " rows of ancestors; request ", request, " has rows ", first,
                  " to ", first + rows);
  STD_TORCH_CHECK(rows <= kMaxTreeRows, "a tree has at most ", kMaxTreeRows,
                  " rows, request ", request, " has ", rows);
  if (rows == 0) return;
  const int64_t token = problem.query_starts[request];
  STD_TORCH_CHECK(token >= 0 && token + rows <= query.size(0), "query_starts[",
                  request, "] = ", token, " and ", rows, " rows exceed the ",
                  query.size(0), " tokens of query");
  const int64_t length = problem.prefix_lens[request] + rows;
  STD_TORCH_CHECK(problem.prefix_lens[request] >= 0 &&
                      length <= block_table.size(1) * problem.block_size,
                  "request ", request, " needs ", length,
                  " positions, its block_table row has ",
                  block_table.size(1) * problem.block_size);
  for (int64_t row = 0; row < rows; ++row) {
    const auto word = static_cast<uint64_t>(problem.ancestors[first + row]);
    STD_TORCH_CHECK(word >> row == 1, "ancestors of row ", row, " of request ",
                    request, " must be the row itself and earlier rows");
  }
}

// Query vectors are split evenly into tasks of whole AMX tiles; smaller tasks
// when there would not be enough of them to keep all threads busy.
std::vector<AttentionTask> divide(const AttentionProblem& problem,
                                  int64_t requests) {
  int64_t full_tasks = 0;
  for (int64_t i = 0; i < requests; ++i) {
    const int64_t vectors =
        (problem.row_offsets[i + 1] - problem.row_offsets[i]) *
        problem.heads_per_kv;
    full_tasks += (vectors + kMaxQueries - 1) / kMaxQueries * problem.kv_heads;
  }
  const int64_t threads = torch::stable::get_num_threads();
  const int64_t size = full_tasks >= 2 * threads ? kMaxQueries : kTileRows;
  std::vector<AttentionTask> tasks;
  for (int64_t i = 0; i < requests; ++i) {
    const int64_t vectors =
        (problem.row_offsets[i + 1] - problem.row_offsets[i]) *
        problem.heads_per_kv;
    for (int64_t head = 0; head < problem.kv_heads; ++head) {
      for (int64_t first = 0; first < vectors; first += size) {
        tasks.push_back({i, head, first, std::min(first + size, vectors)});
      }
    }
  }
  return tasks;
}

void run_tasks(const AttentionProblem& problem,
               const std::vector<AttentionTask>& tasks) {
  const AttentionKernel kernel = choose_kernel(problem.layout);
  const auto count = static_cast<int64_t>(tasks.size());
  const int64_t threads =
      std::min<int64_t>(torch::stable::get_num_threads(), count);
  // Tasks differ in length: a thread takes the next one when it is done.
  std::atomic<int64_t> next{0};
  torch::stable::parallel_for(0, threads, 1, [&](int64_t begin, int64_t end) {
    for (int64_t worker = begin; worker < end; ++worker) {
      for (int64_t i = next++; i < count; i = next++) kernel(problem, tasks[i]);
    }
  });
}

// A cache of layout kStrided, on the CPU only used in tests, is copied to
// layout kVec: one block per request, as long as the longest request.
class StridedCopy {
 public:
  StridedCopy(AttentionProblem& problem, const Tensor& kv_cache,
              int64_t requests) {
    int64_t longest = 1;
    for (int64_t i = 0; i < requests; ++i) {
      longest = std::max(longest, length(problem, i));
    }
    const int64_t block =
        (longest + kGroupTokens - 1) / kGroupTokens * kGroupTokens;
    const int64_t bytes = kv_cache.element_size();
    memory_.resize(requests * problem.kv_heads * 2 * block * problem.dim *
                   bytes);
    for (int64_t i = 0; i < requests; ++i) {
      for (int64_t position = 0; position < length(problem, i); ++position) {
        copy_token(problem, kv_cache, i, position, block);
      }
      blocks_.push_back(static_cast<int32_t>(i));
    }
    problem.cache = memory_.data();
    problem.block_table = blocks_.data();
    problem.block_table_stride = 1;
    problem.block_size = block;
    problem.layout = KVLayout::kVec;
  }

 private:
  static int64_t length(const AttentionProblem& problem, int64_t request) {
    return problem.prefix_lens[request] + problem.row_offsets[request + 1] -
           problem.row_offsets[request];
  }

  void copy_token(const AttentionProblem& problem, const Tensor& kv_cache,
                  int64_t request, int64_t position, int64_t block) {
    const int64_t source_block =
        problem.block_table[request * problem.block_table_stride +
                            position / problem.block_size];
    const int64_t dim = problem.dim;
    const auto bytes = static_cast<int64_t>(kv_cache.element_size());
    for (int64_t head = 0; head < problem.kv_heads; ++head) {
      const char* source =
          static_cast<const char*>(problem.cache) +
          (source_block * kv_cache.stride(0) + head * kv_cache.stride(1) +
           position % problem.block_size * kv_cache.stride(2)) *
              bytes;
      char* target = memory_.data() + (request * problem.kv_heads + head) * 2 *
                                          block * dim * bytes;
      for (int64_t d = 0; d < dim; ++d) {
        const int64_t step = kv_cache.stride(3) * bytes;
        std::memcpy(target + vec_key(position, d, block) * bytes,
                    source + d * step, bytes);
        std::memcpy(target + vec_value(position, d, block, dim) * bytes,
                    source + (dim + d) * step, bytes);
      }
    }
  }

  std::vector<char> memory_;
  std::vector<int32_t> blocks_;
};

void check_layout(const AttentionProblem& problem, const Tensor& kv_cache) {
  const ScalarType dtype = problem.dtype;
  STD_TORCH_CHECK(dtype == ScalarType::Float || dtype == ScalarType::BFloat16 ||
                      dtype == ScalarType::Half,
                  "query must be float32, bfloat16 or float16");
  STD_TORCH_CHECK(problem.dim % 16 == 0,
                  "the head size must be a multiple of 16 on the CPU, found ",
                  problem.dim);
  if (problem.layout == KVLayout::kStrided) return;
  STD_TORCH_CHECK(
      kv_cache.is_contiguous(),
      "caches in the layouts VEC and AMX must be contiguous; pass the "
      "layer's cache tensor itself, not a view");
  STD_TORCH_CHECK(problem.block_size % kGroupTokens == 0,
                  "the block size must be a multiple of ", kGroupTokens,
                  " on the CPU, found ", problem.block_size);
  STD_TORCH_CHECK(problem.layout != KVLayout::kAmx ||
                      (dtype == ScalarType::BFloat16 && problem.dim % 32 == 0),
                  "the AMX layout needs bfloat16 and a head size that is a "
                  "multiple of 32, found head size ",
                  problem.dim);
}

}  // namespace

void tree_attention(const Tensor& query,     // [tokens, heads, D]
                    const Tensor& kv_cache,  // [blocks, kv_heads, B, 2 * D]
                    int64_t layout,
                    const Tensor& block_table,   // [R, max_blocks] int32
                    const Tensor& prefix_lens,   // [R] int32
                    const Tensor& query_starts,  // [R] int32
                    const Tensor& row_offsets,   // [R + 1] int32
                    const Tensor& ancestors,     // [rows] int64
                    double scale, double softcap, int64_t sliding_window,
                    Tensor& out) {  // [tokens, heads, D]
  const AttentionShape shape =
      check_tree_attention(query, kv_cache, block_table, prefix_lens,
                           query_starts, row_offsets, ancestors, out);
  STD_TORCH_CHECK(layout >= 0 && layout <= 2,
                  "layout must be a KVLayout (0, 1 or 2), found ", layout);
  AttentionProblem problem{query.const_data_ptr(),
                           query.stride(0),
                           query.stride(1),
                           out.mutable_data_ptr(),
                           out.stride(0),
                           out.stride(1),
                           kv_cache.const_data_ptr(),
                           block_table.const_data_ptr<int32_t>(),
                           block_table.stride(0),
                           prefix_lens.const_data_ptr<int32_t>(),
                           query_starts.const_data_ptr<int32_t>(),
                           row_offsets.const_data_ptr<int32_t>(),
                           ancestors.const_data_ptr<int64_t>(),
                           shape.kv_heads,
                           shape.heads / shape.kv_heads,
                           shape.dim,
                           shape.block_size,
                           split_threads(shape, sliding_window),
                           tile_tokens(shape.dim),
                           static_cast<float>(scale),
                           static_cast<float>(softcap),
                           sliding_window,
                           query.scalar_type(),
                           static_cast<KVLayout>(layout)};
  check_layout(problem, kv_cache);
  for (int64_t request = 0; request < shape.requests; ++request) {
    check_rows(problem, query, ancestors, block_table, request);
  }
  const std::vector<AttentionTask> tasks = divide(problem, shape.requests);
  if (tasks.empty()) return;
  if (problem.layout == KVLayout::kStrided) {
    const StridedCopy copy(problem, kv_cache, shape.requests);
    return run_tasks(problem, tasks);
  }
  run_tasks(problem, tasks);
}

}  // namespace clover2::cpu
