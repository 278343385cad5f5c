// SPDX-License-Identifier: Apache-2.0
// The CPU kernels behind torch.ops.clover2.*; schemas and the meaning of the
// arguments are in vllm_clover2/ops/{schema,reference}.py.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <optional>
#include <tuple>
#include <vector>

namespace clover2::cpu {

using torch::stable::Tensor;

void tree_attention(const Tensor& query, const Tensor& kv_cache, int64_t layout,
                    const Tensor& block_table, const Tensor& prefix_lens,
                    const Tensor& query_starts, const Tensor& row_offsets,
                    const Tensor& ancestors, double scale, double softcap,
                    int64_t sliding_window, Tensor& out);

std::tuple<Tensor, Tensor, Tensor> tree_accept(const Tensor& target_tokens,
                                               const Tensor& draft_tokens,
                                               const Tensor& parents,
                                               const Tensor& row_offsets,
                                               int64_t max_depth);

void commit_kv(std::vector<Tensor> kv_caches, int64_t layout,
               const Tensor& block_table, const Tensor& prefix_lens,
               const Tensor& paths, const Tensor& lengths);

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> context_nodes(
    const Tensor& history, const Tensor& requests, const Tensor& lengths,
    int64_t min_match, int64_t max_match, int64_t max_places, int64_t max_depth,
    int64_t max_nodes);

std::tuple<Tensor, Tensor, Tensor, Tensor> add_candidates(
    Tensor& tokens, Tensor& parents, Tensor& joint, Tensor& below,
    Tensor& credit, Tensor& by_head, const Tensor& depths, const Tensor& beside,
    int64_t first, int64_t level, const Tensor& rows, const Tensor& open,
    const Tensor& asked, const Tensor& child_values, const Tensor& child_tokens,
    int64_t width);

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> best_candidates(
    const Tensor& parents, const Tensor& joint, const Tensor& below,
    const Tensor& depths, int64_t num_nodes);

std::tuple<Tensor, Tensor, Tensor, Tensor> judge_context(
    const Tensor& parents, const Tensor& depths, const Tensor& matches,
    const Tensor& places, std::vector<Tensor> bounds, const Tensor& values,
    double max_sum);

void learn_context(Tensor& counts, Tensor& values, const Tensor& tokens,
                   const Tensor& parents, const Tensor& depths,
                   const Tensor& cells, const Tensor& credit,
                   const Tensor& emitted, double max_trials);

std::tuple<Tensor, Tensor> top_k_log_probs(const Tensor& logits, int64_t k);

Tensor int8_product(const Tensor& input, const Tensor& packed,
                    const Tensor& scales, const std::optional<Tensor>& bias);

Tensor packed_linear(const Tensor& input, const Tensor& packed,
                     const std::optional<Tensor>& bias, int64_t outputs);

std::tuple<Tensor, Tensor> recurrent_step(
    const Tensor& state, const Tensor& embedding, std::vector<Tensor> query,
    std::vector<Tensor> of_embedding, std::vector<Tensor> output,
    const Tensor& input_norm, const Tensor& output_norm, int64_t num_heads,
    double eps);

}  // namespace clover2::cpu
