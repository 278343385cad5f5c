// SPDX-License-Identifier: Apache-2.0
// What a text's own candidates are worth, on the CPU; see
// vllm_clover2/ops/calibration.py for what the ops compute. Parents come first,
// so one pass over a request's nodes does what takes the reference dozens of
// small tensor operations.

#include "ops.h"
#include "rows.h"

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cmath>
#include <vector>

namespace clover2::cpu {

namespace {

// How many of the ascending bounds are at most `value`.
struct Buckets {
  explicit Buckets(const Tensor& bounds)
      : data(bounds.const_data_ptr<float>()), size(bounds.size(0)) {}

  int64_t of(float value) const {
    return std::upper_bound(data, data + size, value) - data;
  }

  const float* data;
  int64_t size;
};

}  // namespace

std::tuple<Tensor, Tensor, Tensor, Tensor> judge_context(
    const Tensor& parents,   // [B, N] int32
    const Tensor& depths,    // [B, N] int32
    const Tensor& matches,   // [B, N] int32
    const Tensor& places,    // [B, N] int32
    std::vector<Tensor> bounds,
    const Tensor& values,  // [2, C] float32
    double max_sum) {
  STD_TORCH_CHECK(parents.dim() == 2 && values.dim() == 2 && bounds.size() == 3,
                  "parents and values must be matrices, bounds three vectors");
  for (const Tensor& bound : bounds) {
    STD_TORCH_CHECK(bound.dim() == 1 && bound.is_contiguous() &&
                        bound.scalar_type() == ScalarType::Float,
                    "bounds must be contiguous float32 vectors");
  }
  const Buckets match_bounds(bounds[0]), share_bounds(bounds[1]);
  const Buckets places_bounds(bounds[2]);
  const int64_t requests = parents.size(0), nodes = parents.size(1);
  const int64_t kinds = 2 * (match_bounds.size + 1) * (share_bounds.size + 1) *
                        (places_bounds.size + 1);
  const Rows<int32_t> all_parents(parents, "parents", ScalarType::Int, requests,
                                  nodes);
  const Rows<int32_t> all_depths(depths, "depths", ScalarType::Int, requests,
                                 nodes);
  const Rows<int32_t> all_matches(matches, "matches", ScalarType::Int, requests,
                                  nodes);
  const Rows<int32_t> all_places(places, "places", ScalarType::Int, requests,
                                 nodes);
  const Rows<float> of_kind(values, "values", ScalarType::Float, 2, kinds);
  const auto like = [&](ScalarType dtype) {
    return torch::stable::new_empty(parents, {requests, nodes}, dtype);
  };
  Tensor cells = like(ScalarType::Long);
  Tensor alone = like(ScalarType::Float);
  Tensor beside = like(ScalarType::Float);
  Tensor joint = like(ScalarType::Float);

  const auto most = static_cast<float>(max_sum);
  std::vector<int32_t> together(nodes + 1), longest(nodes + 1);
  std::vector<float> held(nodes + 1), path(nodes + 1);
  for (int64_t b = 0; b < requests; ++b) {
    const int32_t* parent = all_parents[b];
    const int32_t* depth = all_depths[b];
    int64_t* cell = cells.mutable_data_ptr<int64_t>() + b * nodes;
    std::fill(together.begin(), together.end(), 0);
    std::fill(longest.begin(), longest.end(), 0);
    for (int64_t i = 0; i < nodes; ++i) {
      check_row(parent[i], i + 1, "parents");
      together[parent[i]] += all_places[b][i];
      longest[parent[i]] = std::max(longest[parent[i]], all_matches[b][i]);
    }
    for (int64_t i = 0; i < nodes; ++i) {
      const int32_t match = all_matches[b][i], here = all_places[b][i];
      const float share = static_cast<float>(here) /
                          static_cast<float>(std::max(together[parent[i]], 1));
      int64_t kind = match_bounds.of(static_cast<float>(match + depth[i] - 1));
      kind = kind * (share_bounds.size + 1) + share_bounds.of(share);
      kind = kind * (places_bounds.size + 1) +
             places_bounds.of(static_cast<float>(here));
      kind = kind * 2 + (match < longest[parent[i]] ? 1 : 0);
      cell[i] = depth[i] > 0 ? kind : 0;
    }
    for (int64_t source = 0; source < 2; ++source) {
      float* value =
          (source == 0 ? alone : beside).mutable_data_ptr<float>() + b * nodes;
      std::fill(held.begin(), held.end(), 0.0f);
      for (int64_t i = 0; i < nodes; ++i) {
        value[i] = depth[i] > 0 ? of_kind[source][cell[i]] : 0.0f;
        held[parent[i]] += value[i];
      }
      for (int64_t i = 0; i < nodes; ++i) {
        value[i] *= most / std::max(held[parent[i]], most);
      }
    }
    float* product = joint.mutable_data_ptr<float>() + b * nodes;
    const float* below = alone.const_data_ptr<float>() + b * nodes;
    path[0] = 1.0f;
    for (int64_t i = 0; i < nodes; ++i) {
      product[i] = path[i + 1] = path[parent[i]] * below[i];
    }
  }
  return {cells, alone, beside, joint};
}

void learn_context(Tensor& counts,          // [4, C] float64
                   Tensor& values,          // [2, C] float32
                   const Tensor& tokens,    // [B, N] int64
                   const Tensor& parents,   // [B, N] int32
                   const Tensor& depths,    // [B, N] int32
                   const Tensor& cells,     // [B, N] int64
                   const Tensor& credit,    // [B, N] float32
                   const Tensor& emitted,   // [B, T] int64
                   double max_trials) {
  STD_TORCH_CHECK(tokens.dim() == 2 && counts.dim() == 2 && emitted.dim() == 2,
                  "tokens, counts and emitted must be matrices");
  const int64_t requests = tokens.size(0), nodes = tokens.size(1);
  const int64_t kinds = counts.size(1), told = emitted.size(1);
  const Rows<double> seen(counts, "counts", ScalarType::Double, 4, kinds);
  const Rows<float> of_kind(values, "values", ScalarType::Float, 2, kinds);
  const Rows<int64_t> all_tokens(tokens, "tokens", ScalarType::Long, requests,
                                 nodes);
  const Rows<int32_t> all_parents(parents, "parents", ScalarType::Int, requests,
                                  nodes);
  const Rows<int32_t> all_depths(depths, "depths", ScalarType::Int, requests,
                                 nodes);
  const Rows<int64_t> all_cells(cells, "cells", ScalarType::Long, requests,
                                nodes);
  const Rows<float> all_credit(credit, "credit", ScalarType::Float, requests,
                               nodes);
  const Rows<int64_t> texts(emitted, "emitted", ScalarType::Long, requests,
                            told);

  std::vector<char> came_true(nodes + 1);
  for (int64_t b = 0; b < requests; ++b) {
    came_true[0] = 1;
    for (int64_t i = 0; i < nodes; ++i) {
      const int64_t depth = all_depths[b][i], cell = all_cells[b][i];
      const int64_t parent = all_parents[b][i];
      check_row(parent, i + 1, "parents");
      check_row(cell, kinds, "cells");
      const bool tried = depth > 0 && depth <= told &&
                         texts[b][depth - 1] >= 0 && came_true[parent];
      const bool hit = tried && all_tokens[b][i] == texts[b][depth - 1];
      came_true[i + 1] = hit;
      if (!tried) continue;
      seen[0][cell] += 1.0;
      seen[1][cell] += hit;
      const float share = all_credit[b][i];
      if (std::isnan(share)) continue;
      seen[2][cell] += 1.0;
      if (hit) seen[3][cell] += share;
    }
  }
  for (int64_t pair = 0; pair < 2; ++pair) {
    double* trials = seen[2 * pair];
    double* hits = seen[2 * pair + 1];
    for (int64_t cell = 0; cell < kinds; ++cell) {
      const double fade = std::min(max_trials / trials[cell], 1.0);
      trials[cell] *= fade;
      hits[cell] *= fade;
      of_kind[pair][cell] = static_cast<float>(hits[cell] / trials[cell]);
    }
  }
}

}  // namespace clover2::cpu
